"""Writes a timeline as a picture or for a trace viewer, as the file's ending says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.schedule.trace import Span, write_chrome
from megatron_hetermoe.simulator.host import host_costs

PICTURES = (".png", ".svg", ".pdf")
VIEWER = ".json"


def write_timeline(spans: Sequence[Span], roles: dict[int, str], out: Path) -> None:
    """Writes the file.

    Args:
        spans: one step, in seconds since its start.
        roles: for each rank that is to be shown, its role.
        out: ends in VIEWER or one of PICTURES.

    Raises:
        UsageError: a picture is wanted where matplotlib is not installed.
    """
    if out.suffix == VIEWER:
        write_chrome(spans, out, roles, {f"host, {role} ranks": str(cost) for role, cost in host_costs(spans, roles).items()})
        return
    assert out.suffix in PICTURES
    try:
        from megatron_hetermoe.cli.timeline import draw
    except ModuleNotFoundError:
        raise UsageError(["a picture needs matplotlib: pip install 'megatron-hetermoe[plot]'"]) from None
    draw(spans, roles, out)
