"""The schedule of a batch that grows, and the layouts that a run with one goes on in."""

from __future__ import annotations

import pytest

from megatron_hetermoe.cli.elastic import _microbatches
from megatron_hetermoe.config.batches import scheduled_batches
from megatron_hetermoe.config.errors import UsageError


def test_a_schedule_counts_tokens():
    assert scheduled_batches("1.5k:8, 0:4 2M:16", sequence=100) == [(0, 4), (15, 8), (20_000, 16)]


@pytest.mark.parametrize(
    "schedule, said",
    [("", "no batch for the first step"), ("100:8", "no batch for the first step"), ("8", "has '8': write"),
     ("0:4 1K", "has '1K': write"), ("0:4:8", "write TOKENS:SEQUENCES"), ("0:x", "write TOKENS:SEQUENCES"),
     ("0:inf", "write TOKENS:SEQUENCES"), ("0:0", "sequences from 1 on"), ("-8:4", "tokens are from 0 on"),
     ("0:4 250:8 299:16", "two batches from sequence 2 on")],
)
def test_what_is_no_schedule(schedule, said):
    with pytest.raises(UsageError, match=said):
        scheduled_batches(schedule, sequence=100)


def test_every_batch_divides_over_the_ranks_that_are_left():
    argv = ["--micro-batch-size", "2", "--step-batch-size-schedule", "0:8 1M:12"]
    assert _microbatches(argv) == 2
    with pytest.raises(UsageError, match="batch of 9 does not divide by --micro-batch-size 2"):
        _microbatches([*argv[:-1], "0:8 1M:9"])
    with pytest.raises(UsageError, match="no batch for the first step"):
        _microbatches([*argv[:-1], "1M:8"])
