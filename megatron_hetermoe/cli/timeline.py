"""Draws a timeline: a band a rank, in it its compute stream above its two channels."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the choice of a backend that needs no screen)
from matplotlib.patches import Patch  # noqa: E402

# Kind and pass: colour and what it is called. Forward light, backward dark, one hue a kind.
_KINDS = {
    "AF": ("#8ecae6", "attention forward"), "AB": ("#219ebc", "attention backward"),
    "EF": ("#ffd166", "experts forward"), "EB": ("#fb8500", "experts backward"),
    "AW": ("#126782", "attention weights"), "EW": ("#bc6c25", "experts weights"),
    "DF": ("#b7e4c7", "dispatch"), "CB": ("#40916c", "combine backward"),
    "CF": ("#d8bbff", "combine"), "DB": ("#7b2cbf", "dispatch backward"),
    "HF": ("#f4a6b8", "handover between stages"), "HB": ("#c9415f", "handover backward"),
    REDUCE: ("#aab2bb", "gradient reduction"), OPTIMIZER: ("#6d7784", "optimizer step"),
}
# Top and height inside a rank's band.
_ROWS = {"compute": (0.0, 0.56), "out": (0.58, 0.14), "back": (0.74, 0.14), "stages": (0.9, 0.07), STEP: (0.0, 0.56)}
_WIDE = 0.012  # share of the picture's width from which a task has room for its microbatch's number


def draw(spans: list[Span], roles: dict[int, str], out: Path) -> None:
    """Writes the picture.

    Args:
        spans: one step, in seconds since its start.
        roles: the role of each rank, in the order in which they are drawn.
        out: file, of a kind that matplotlib knows.
    """
    kinds = {_kind(span) for span in spans}
    figure, axes = pyplot.subplots(figsize=(14, 0.9 + 0.85 * len(roles)))
    length = max(span.end for span in spans)
    row = {rank: index for index, rank in enumerate(roles)}
    for span in spans:
        top, height = _ROWS[span.stream]
        colour, _ = _KINDS[_kind(span)]
        axes.broken_barh(
            [(span.start * 1e3, (span.end - span.start) * 1e3)], (row[span.rank] + top, height), facecolors=colour,
            edgecolors="white", linewidth=0.4,
        )
        if span.stream == "compute" and span.end - span.start > _WIDE * length:
            axes.text(
                (span.start + span.end) * 500, row[span.rank] + top + height / 2, span.task.partition("_")[2],
                ha="center", va="center", fontsize=6,
            )
    axes.set_yticks([index + 0.28 for index in row.values()], [f"rank {rank}\n{role}" for rank, role in roles.items()])
    axes.set_ylim(len(roles), 0)
    axes.set_xlim(0, length * 1e3)
    axes.set_xlabel("milliseconds; in a task: layer, microbatch; below each rank's tasks its channels")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[Patch(color=colour, label=label) for kind, (colour, label) in _KINDS.items() if kind in kinds],
        ncols=12, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _kind(span: Span) -> str:
    """The key of a span in _KINDS."""
    return span.task if span.stream == STEP else span.task[:2]
