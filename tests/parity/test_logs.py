"""The training log is Megatron's, once, from the last rank, with the numbers of the ranks that have them."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import pytest
from models import tiny
from ranks import Run, run_ranks

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Prediction
from megatron_hetermoe.mcore import meter
from megatron_hetermoe.schedule.trace import read_jsonl
from megatron_hetermoe.topology.layout import Layout

FIELDS = ("consumed samples", "lm loss", "load_balancing_loss", "z_loss", "loss scale", "grad norm", "learning rate")


def logged(output: str) -> list[dict[str, str]]:
    """The fields of each iteration's line."""
    lines = [line for line in output.splitlines() if re.search(r"\] iteration +\d+/", line)]
    return [
        {name: match[1] for name in FIELDS if (match := re.search(rf"{re.escape(name)}: +(\S+) \|", line))}
        for line in lines
    ]


SHARED = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_router_load_balancing_type": "global_aux_loss"}


@pytest.mark.parametrize("sizes", [{}, pytest.param(SHARED, marks=pytest.mark.slow)], ids=["whole", "tensor-parallel"])
def test_the_log_is_stock_megatrons(parity, sizes):
    """Losses that routers record on attention ranks reach the expert rank that prints."""
    flags = dict(moe_z_loss_coeff=0.01, log_throughput=True, eval_interval=10, eval_iters=1, **sizes)
    assert_same_log(parity.disaggregated(2, 2, **flags), parity.stock(2, **flags))


@pytest.mark.slow
def test_the_log_of_a_pipeline(parity):
    """The last rank is of the last stage, and prints what routers of all stages record."""
    flags = dict(moe_z_loss_coeff=0.01, log_throughput=True, eval_interval=10, eval_iters=1, num_layers=4)
    run = parity.disaggregated(2, 2, pipeline_model_parallel_size=2, **flags)
    assert_same_log(run, parity.stock(1, **flags))


def assert_same_log(run: Run, stock: Run) -> None:
    """Twenty iterations, from the last rank alone."""
    ours, reference = logged(run.output[-1]), logged(stock.output[-1])
    assert len(ours) == len(reference) == 20
    assert all(len(line) == len(FIELDS) for line in reference)
    for mine, other in zip(ours, reference):
        assert mine.keys() == other.keys()
        for name in FIELDS:
            assert abs(float(mine[name]) - float(other[name])) <= 2e-5 * abs(float(other[name])) + 1e-3 * (
                name == "grad norm"), name
    assert not any(logged(output) for output in run.output[:-1]), "one rank prints"
    assert run.output[-1].count("throughput per GPU") == 20
    assert run.output[-1].count("validation loss at") == reference_count(stock.output[-1])


def reference_count(output: str) -> int:
    """How often stock Megatron prints a validation loss."""
    count = output.count("validation loss at")
    assert count > 1
    return count


# What models.tiny describes, with an expert of each layer on the attention rank.
PLAN = Plan(
    ModelShape(layers=2, moe_layers=(1, 2), experts=8, topk=2, hidden=32, expert_ffn=32, dense_ffn=64,
               shared_expert_ffn=0, gated=True, heads=4, query_groups=2, head_dim=8, tied_embeddings=False, sequence=32),
    1, 1, 1, ((0, 1, 1, 1, 1, 1, 1, 1),) * 2,
    predicted=Prediction(1.0, 500.0, 0.5, 0.5, 1.0, 1.0, False, attention_alone=250.0),
)


def test_each_log_interval_says_what_was_measured(tmp_path):
    """TensorBoard gets what the trace of the same two steps says; the log has tokens/s beside what was predicted."""
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    flags = tiny(train_iters=4, global_batch_size=2, log_interval=2, tensorboard_dir="tensorboard")
    run = run_ranks(["--hetermoe", "--hetermoe-plan", "plan.json", "--hetermoe-trace", "spans", *flags], 2,
                    cwd=tmp_path).check()
    assert not any("hetermoe/" in name for name, _ in run.scalars[0]), "the last rank alone writes"
    scalars = {name.removeprefix("hetermoe/"): value for (name, step), value in run.scalars[1].items()
               if name.startswith("hetermoe/") and step == 4}
    spans = [span for step in (3, 4) for rank in (0, 1)
             for span in read_jsonl(tmp_path / "spans" / f"step{step:05d}.rank{rank:05d}.jsonl")]
    sent, work, tokens = Counter(), Counter(), Counter()
    for span in spans:
        sent[span.stream] += span.sent
        work[span.rank] += (span.end - span.start) * (span.stream == "compute")
        if span.tokens:
            layer = int(span.task[3])
            held = (0,) if span.rank == 0 else range(1, 8)
            tokens.update({(layer, expert): count for expert, count in zip(held, span.tokens, strict=True)})
    seconds = 2 * 2 * 32 / scalars["tokens-per-second"]
    assert scalars["expert-busy"] == pytest.approx(work[1] / seconds)  # of rank 1, whose seconds these are
    assert 0 < scalars["attention-busy"] <= 1  # by rank 0's seconds, which only it knows
    for role in ("attention", "expert"):
        assert 0 <= scalars[f"{role}-bubble"] <= 1 - scalars[f"{role}-busy"]
    for name in ("out", "back"):
        assert scalars[f"{name}-bytes-per-second"] == pytest.approx(sent[name] / seconds)
    by_layer = [[tokens[layer, expert] for expert in range(8)] for layer in (1, 2)]
    assert all(sum(counts) == 2 * 2 * 32 * 2 for counts in by_layer)
    assert scalars["expert-load-most-over-mean"] == pytest.approx(max(8 * max(counts) / sum(counts) for counts in by_layer))
    held = [sum(counts[0] for counts in by_layer), sum(sum(counts[1:]) for counts in by_layer)]
    assert scalars["holder-load-most-over-mean"] == pytest.approx(2 * max(held) / sum(held))
    said = re.findall(r"hetermoe: ([\d,]+) tokens/s \| ([\d.]+) of the plan's 500 \| ([\d.]+) of 250 predicted for the "
                      r"attention GPUs alone \| attention ranks compute", run.output[1])
    assert len(said) == 2 and "tokens/s" not in run.output[0]
    rate = float(said[1][0].replace(",", ""))
    assert rate == pytest.approx(scalars["tokens-per-second"], abs=0.51)
    assert float(said[1][2]) == pytest.approx(rate / 250, abs=0.01)


@pytest.mark.parametrize("layout, sequences", [
    (Layout(8, 1), 8), (Layout(8, 1, tensor=2), 4), (Layout(8, 1, tensor=2, context=2), 2), (Layout(8, 2, stages=2, context=2), 2),
])
def test_a_token_counts_once_whichever_ranks_share_its_sequence(layout, sequences, monkeypatch, capsys):
    args = SimpleNamespace(micro_batch_size=1, seq_length=32, curr_iteration=0, log_interval=1)
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(meter, "get_args", lambda: args)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for writer in ("get_tensorboard_writer", "get_wandb_writer"):
        monkeypatch.setattr(meter, writer, lambda: None)
    plan = SimpleNamespace(placement=(), predicted=None)
    one = meter.Meter(SimpleNamespace(layout=layout, plan=plan, rank=layout.world_size - 1), None)
    one.begin_step(microbatches=4)
    one.end_step()
    assert f"hetermoe: {4 * sequences * 32 // 2} tokens/s" in capsys.readouterr().out.replace(",", "")
