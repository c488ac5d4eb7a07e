"""A token that goes to several experts of a holder crosses once each way."""

from __future__ import annotations

from math import comb

import pytest
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.schedule.trace import read_jsonl

STEPS, MICROBATCHES, LAYERS, TOKENS, TOPK, EXPERTS, HELD, OWNERS = 2, 4, 2, 32, 2, 8, 4, 2
ROW = 32 * 4  # bytes, fp32
HEADERS = 2 * 8 * (6 + HELD)  # bytes that an owner sends to two holders


def test_bytes_are_those_of_the_equation(tmp_path):
    """Every token to two of eight experts that are drawn at random, on two holders of four.

    Of the bytes that transfers were recorded to send, what is not headers, probabilities and indexes are rows: as many each
    way, and as many as the equation says. With a row for each expert there were 2 for each token.
    """
    layout = ["--hetermoe", "--hetermoe-attention-ranks", str(OWNERS), "--hetermoe-expert-ranks", "2"]
    flags = tiny(train_iters=1 + STEPS, moe_router_force_load_balancing=True, global_batch_size=OWNERS * MICROBATCHES)
    run_ranks([*layout, "--hetermoe-trace", "spans", *flags], 4, cwd=tmp_path).check()
    sent = {(kind, way): 0 for kind in (Kind.DISPATCH, Kind.COMBINE) for way in Pass}
    experts = 0
    for path in (tmp_path / "spans").glob("*.jsonl"):
        for span in read_jsonl(path):
            if span.sent:
                task = Task.parse(span.task)
                sent[task.kind, task.direction] += span.sent
            experts += sum(span.tokens)
    transfers = STEPS * MICROBATCHES * LAYERS * OWNERS
    tokens = transfers * TOKENS
    assert experts == TOPK * tokens
    rows, rest = divmod(sent[Kind.COMBINE, Pass.FORWARD], ROW)
    assert rest == 0 and sent[Kind.COMBINE, Pass.BACKWARD] == rows * ROW
    assert sent[Kind.DISPATCH, Pass.FORWARD] == rows * ROW + TOPK * tokens * (4 + 4) + transfers * HEADERS
    assert sent[Kind.DISPATCH, Pass.BACKWARD] == rows * ROW + TOPK * tokens * 4
    share = 1 - comb(EXPERTS - HELD, TOPK) / comb(EXPERTS, TOPK)
    assert rows / (TOPK * tokens) == pytest.approx(2 * share / TOPK, rel=0.03)
