"""The matrix's rows: what is promised of how they were picked, and that what they leave out is refused at start."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import matrix
import pytest
import yaml
from models import tiny
from ranks import run_function

# Probabilities on inputs want top 1, and top 1 excludes the first of each pair.
IMPLIED = {
    (("scores", "softmax"), ("probabilities on", "inputs")),
    (("router groups", "best 2 of 4"), ("probabilities on", "inputs")),
}


def test_all_pairs_stand_somewhere_in_fp32():
    whole = [row for row in matrix.rows() if row["precision"] == matrix.FP32]
    assert len(whole) >= 60 and all(map(matrix.allowed, matrix.rows()))
    there = {pair for row in whole for pair in combinations(((axis, row[axis]) for axis in matrix.AXES), 2)}
    missing = {
        ((first, one), (second, other)) for first, second in combinations(matrix.AXES, 2)
        for one in matrix.AXES[first] for other in matrix.AXES[second] if matrix.allowed({first: one, second: other})
    } - there
    assert missing == IMPLIED


def test_each_option_stands_twice_and_once_in_the_sample():
    options = {(axis, option) for axis in matrix.AXES for option in matrix.AXES[axis]}
    options |= {("precision", precision) for precision in (matrix.FP32, *matrix.HALVES)}
    times = Counter(option for row in matrix.rows() for option in row.items())
    assert set(times) == options and min(times.values()) >= 2
    in_half = {("precision", precision) for precision in matrix.HALVES}
    assert {option for row in matrix.sample() for option in row.items()} == options - in_half
    assert len(matrix.sample()) <= 12


def _refusals(rank: int, world: int, cases: list[tuple[list[str], int]]) -> list[str]:
    """For each command line and number of ranks, what is said against it at start."""
    import contextlib
    import io
    import os

    from megatron_hetermoe.config.errors import Problems, UsageError
    from megatron_hetermoe.config.flags import parse_flags
    from megatron_hetermoe.mcore.arguments import disaggregated_arguments

    said = []
    for argv, ranks in cases:
        os.environ["WORLD_SIZE"] = str(ranks)
        problems = Problems()
        flags, rest = parse_flags(argv, problems)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                disaggregated_arguments(flags, rest, problems)
            said.append("")
        except UsageError as error:
            said.append(str(error))
    return said


def _command(row: matrix.Row, folder) -> tuple[list[str], int]:
    m, n, g = matrix.sizes(row)
    flags = {"hetermoe": True, "hetermoe_attention_ranks": m * g, "hetermoe_expert_ranks": n * g, "hetermoe_groups": g}
    layers = matrix.placement(row)
    if layers:
        file = folder / f"{len(list(folder.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump({"experts": 8, "layers": layers}))
        flags["hetermoe_placement"] = file
    return tiny(**flags, **matrix.flags(row)), (m + n) * g


def test_what_is_excluded_is_refused(tmp_path):
    """The first options of each exclusion that says so, beside the first options of all other axes."""
    refused = [exclusion for exclusion in matrix.EXCLUSIONS if exclusion.refused]
    first = {axis: next(iter(options)) for axis, options in matrix.AXES.items()}
    excluded = [first | {axis: options[0] for axis, options in exclusion.of.items()} for exclusion in refused]
    (said,) = run_function(_refusals, 1, [_command(row, tmp_path) for row in excluded])
    for exclusion, message in zip(refused, said, strict=True):
        assert exclusion.why in message, exclusion


@pytest.mark.slow
def test_no_row_is_refused(tmp_path):
    (said,) = run_function(_refusals, 1, [_command(row, tmp_path) for row in matrix.rows()], timeout=600)
    assert not any(said)
