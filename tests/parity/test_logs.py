"""The training log is Megatron's, once, from the last rank, with the numbers of the ranks that have them."""

from __future__ import annotations

import re

import pytest

FIELDS = ("consumed samples", "lm loss", "load_balancing_loss", "z_loss", "loss scale", "grad norm", "learning rate")


def logged(output: str) -> list[dict[str, str]]:
    """The fields of each iteration's line."""
    lines = [line for line in output.splitlines() if re.search(r"\] iteration +\d+/", line)]
    return [
        {name: match[1] for name in FIELDS if (match := re.search(rf"{re.escape(name)}: +(\S+) \|", line))}
        for line in lines
    ]


SHARED = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_router_load_balancing_type": "global_aux_loss"}


@pytest.mark.parametrize("sizes", [{}, SHARED], ids=["whole", "tensor-parallel"])
def test_the_log_is_stock_megatrons(parity, sizes):
    """Losses that routers record on attention ranks reach the expert rank that prints."""
    flags = dict(moe_z_loss_coeff=0.01, log_throughput=True, eval_interval=10, eval_iters=1, **sizes)
    reference = logged(parity.stock(2, **flags).output[-1])
    run = parity.disaggregated(2, 2, **flags)
    ours = logged(run.output[-1])
    assert len(ours) == len(reference) == 20
    assert all(len(line) == len(FIELDS) for line in reference)
    for mine, other in zip(ours, reference):
        assert mine.keys() == other.keys()
        for name in FIELDS:
            assert abs(float(mine[name]) - float(other[name])) <= 2e-5 * abs(float(other[name])) + 1e-3 * (
                name == "grad norm"), name
    assert not any(logged(output) for output in run.output[:-1]), "one rank prints"
    assert run.output[-1].count("throughput per GPU") == 20
    assert run.output[-1].count("validation loss at") == reference_count(parity.stock(2, **flags).output[-1])


def reference_count(output: str) -> int:
    """How often stock Megatron prints a validation loss."""
    count = output.count("validation loss at")
    assert count > 1
    return count
