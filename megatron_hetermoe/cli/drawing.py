"""Writes a timeline as a picture or for a trace viewer, as the file's ending says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.schedule.trace import Span, write_chrome
from megatron_hetermoe.simulator.host import host_costs
from megatron_hetermoe.topology.layout import Layout

PICTURES = (".png", ".svg", ".pdf")
VIEWER = ".json"


def write_timeline(spans: Sequence[Span], layout: Layout, ranks: Iterable[int], out: Path) -> None:
    """Writes the file, in which the ranks of a pipeline stage are next to each other.

    Args:
        spans: one step, in seconds since its start.
        layout: of the run.
        ranks: that are to be shown.
        out: ends in VIEWER or one of PICTURES.

    Raises:
        UsageError: a picture is wanted where matplotlib is not installed.
    """
    roles = {rank: layout.role(rank) for rank in sorted(ranks, key=lambda rank: (layout.stage_of(rank), rank))}
    names = roles if layout.stages == 1 else {
        rank: f"{role}, stage {layout.stage_of(rank) + 1}" for rank, role in roles.items()}
    if out.suffix == VIEWER:
        write_chrome(spans, out, names, {f"host, {role} ranks": str(cost) for role, cost in host_costs(spans, roles).items()})
        return
    assert out.suffix in PICTURES
    try:
        from megatron_hetermoe.cli.timeline import draw
    except ModuleNotFoundError:
        raise UsageError(["a picture needs matplotlib: pip install 'megatron-hetermoe[plot]'"]) from None
    draw(spans, names, out)
