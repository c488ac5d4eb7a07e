"""Combinations of options, each against stock Megatron: ``matrix.py`` says which, and how they were picked.

In fp32 losses and gradient norms of every step are within 1e-5. Where a router's choice hangs on rounding, ours is stock
Megatron's (``near_ties.py``); what is printed at the end says how often it would have been another.

In half precision, where sums in another order are other numbers, a run is as near to one of stock Megatron's expert-parallel
layouts as these are to each other, measured on the same model and data, with the same attention kernel, precision of experts
and loss scale. Where sums are of other rounded parts than in any of them (``matrix.OTHER_SUMS``), it is as near as the nearest
of these is to stock Megatron in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import matrix
import pytest
from near_ties import TAKEN
from parity_cases import REL, placement_file
from ranks import Run, assert_same_steps, largest_differences

OURS = "hetermoe_"


def _split(row: matrix.Row, parity) -> tuple[dict[str, object], list[str]]:
    """Megatron's flags of a row, and ours but for those of its ranks."""
    flags = matrix.flags(row)
    ours = [word for flag, value in flags.items() if flag.startswith(OURS)
            for word in (f"--{flag.replace('_', '-')}", str(value))]
    layers = matrix.placement(row)
    if layers:
        ours += ["--hetermoe-placement", placement_file(parity, experts=8, layers=layers)]
    return {flag: value for flag, value in flags.items() if not flag.startswith(OURS)}, ours


def _evaluations_agree(run: Run, reference: Run, rel: float) -> None:
    for evals in run.evals:
        for ours, theirs in zip(evals, reference.evals[0], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=rel)


def _stock_layouts(parity, row: matrix.Row, model: dict[str, object]) -> list[Run]:
    """Stock Megatron with expert-parallel sizes 1, 2 and 4: on as many ranks as have a data set of their own, or on twice as
    many where those are two."""
    m, _, g = matrix.sizes(row)
    context = int(row["context"])
    whole = m * g // context  # ranks with whole sequences
    sizes = [(whole, 1), (whole, 2), (max(whole, 4), 4)]
    env = matrix.given_to_stock(row)
    return [parity.stock(world * context, env, expert_model_parallel_size=size, **model) for world, size in sizes]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=matrix.name(row), marks=() if row in matrix.sample() else pytest.mark.slow)
     for row in matrix.rows()],
)
def test_matrix(parity, row, record_property):
    compare = _in_fp32 if row["precision"] == matrix.FP32 else _in_half
    run, stock, allowed = compare(parity, row)
    for steps in run.steps[1:]:
        assert_same_steps(steps, run.steps[0])
    found = _smallest(largest_differences(run.steps[0], other.steps[0]) for other in stock)
    taken = _taken(run)
    record_property(matrix.DEVIATION, (row["precision"], *found, *allowed, len(taken)))
    assert found[0] <= allowed[0] and found[1] <= allowed[1], "\n".join([f"{found} against {allowed}: {row}", *taken])
    _evaluations_agree(run, stock[0], rel=max(REL, 2 * allowed[0]))


Compared = tuple[Run, list[Run], tuple[float, float]]  # ours, stock Megatron's, and how far losses and norms may be apart


def _in_fp32(parity, row: matrix.Row) -> Compared:
    model, ours = _split(row, parity)
    m, n, g = matrix.sizes(row)
    note, take = _near_choices(parity, row)
    stock = parity.stock(m * g, note, **model)
    return parity.disaggregated(m, n, g, ours, take, **model), [stock], (REL, REL)


def _in_half(parity, row: matrix.Row) -> Compared:
    model, ours = _split(row, parity)
    m, n, g = matrix.sizes(row)
    run = parity.disaggregated(m, n, g, ours, **model)
    stock = [one for one in _stock_layouts(parity, row, model) if _skips(one) == _skips(run)]
    assert len(stock) > 1, "stock Megatron's layouts skip other steps"
    allowed = _largest(largest_differences(one.steps[0], other.steps[0]) for one, other in combinations(stock, 2))
    if matrix.sums_otherwise(row):
        in_fp32, _ = _split({**row, "precision": matrix.FP32}, parity)
        whole = parity.stock(m * g, **in_fp32)
        from_fp32 = _smallest(largest_differences(one.steps[0], whole.steps[0]) for one in stock)
        allowed = _largest([allowed, from_fp32])
    return run, stock, allowed


def _skips(run: Run) -> list[int]:
    """The steps that a loss scale has a run skip. An overflow depends on what a rank sums up, so on the layout."""
    return [index for index, step in enumerate(run.steps[0]) if step.skipped]


def _near_choices(parity, row: matrix.Row) -> tuple[dict[str, str], dict[str, str]]:
    """What has stock Megatron note the router's choices that hang on rounding, and ours take them over. With context
    parallelism stock Megatron's ranks have whole sequences, so ours, which have parts, find none."""
    if row["precision"] != matrix.FP32 or row["context"] != "1":
        return {}, {}
    folder = Path(tempfile.mkdtemp(prefix="ties-", dir=parity.folder))
    return {"HETERMOE_TEST_NOTE_TIES": str(folder)}, {"HETERMOE_TEST_TAKE_TIES": str(folder)}


def _taken(run: Run) -> list[str]:
    """The choices that a run would have made otherwise, by rank."""
    return [f"rank {rank}: {line}" for rank, output in enumerate(run.output)
            for line in output.splitlines() if line.startswith(TAKEN)]


def _largest(differences: Iterable[tuple[float, float]]) -> tuple[float, float]:
    losses, norms = zip(*differences)
    return max(losses), max(norms)


def _smallest(differences: Iterable[tuple[float, float]]) -> tuple[float, float]:
    losses, norms = zip(*differences)
    return min(losses), min(norms)
