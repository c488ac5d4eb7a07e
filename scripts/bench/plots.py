"""Draws what ``compare.py`` measured, from its file alone: throughput by sequence length, and how busy each role was.

    scripts/bench/plots.py cells.jsonl --out docs

Makes throughput-MODEL.png and busy-MODEL.png, each with a panel for every number of ranks and speed of traffic. Needs
matplotlib: pip install 'megatron-hetermoe[plot]'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cells
import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Lines = dict[str, dict[int, float]]  # by name, a value for each sequence length
_HOW = {"profiled": "by profiles", "kernels": "by kernels"}
_PANEL = 4.2, 3.6  # inches


def panels(measured: Iterable[dict], model: str, lines_of: Callable[[str, list[dict]], dict[str, float]]) -> dict[str, Lines]:
    """What is drawn of a model: for each panel the values by line and length.

    Args:
        measured: cells.
        model: of MODELS.
        lines_of: the values of one system's repetitions in one setting, by line.
    """
    found: dict[str, Lines] = {}
    for (of, length, ranks, batch, gbps), by_system in cells.by_setting(measured).items():
        if of != model:
            continue
        title = "{} fast, {} slow".format(*ranks) + (f", {gbps:g} Gbit/s" if gbps else "")
        for system, repetitions in by_system.items():
            for line, value in lines_of(system, repetitions).items():
                found.setdefault(title, {}).setdefault(line, {})[length] = value
    return found


def throughput(system: str, repetitions: list[dict]) -> dict[str, float]:
    """Thousands of tokens a second."""
    return {system: statistics.median(cell["batch"] * cell["length"] / cell["seconds"] / 1e3 for cell in repetitions)}


def busy(system: str, repetitions: list[dict]) -> dict[str, float]:
    """Percent of a step without its optimizer, of the disaggregated systems."""
    if not cells.busy_shares(repetitions, "profiled"):
        return {}
    return {f"{system}: {role}, {words}": 100 * share for how, words in _HOW.items()
            for role, share in cells.busy_shares(repetitions, how).items()}


def draw(found: dict[str, Lines], title: str, unit: str, path: Path) -> None:
    """A figure of these panels, as PNG."""
    figure, row = pyplot.subplots(1, len(found), figsize=(_PANEL[0] * len(found) + 2.5, _PANEL[1]), squeeze=False)
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    for axes, (panel, lines) in zip(row[0], found.items()):
        _draw_panel(axes, lines, names)
        axes.set(title=panel, xlabel="tokens of a sequence")
    row[0][0].set_ylabel(unit)
    handles = {label: handle for axes in row[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _draw_panel(axes: Axes, lines: Lines, names: list[str]) -> None:
    for name, points in lines.items():
        number = names.index(name)
        lengths = sorted(points)
        axes.plot(lengths, [points[length] for length in lengths], marker="os^Dv"[number % 5], color=f"C{number % 10}",
                  linestyle="-" if number < 10 else "--", label=name)
    lengths = sorted({length for points in lines.values() for length in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="that compare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    args = parser.parse_args()
    measured = cells.read(args.cells)
    args.out.mkdir(parents=True, exist_ok=True)
    for model in sorted({cell["model"] for cell in measured}):
        for name, lines_of, title, unit in (
            ("throughput", throughput, "Throughput", "thousand tokens a second"),
            ("busy", busy, "Busy share of a step", "percent"),
        ):
            found = panels(measured, model, lines_of)
            if found:
                path = args.out / f"{name}-{model}.png"
                draw(found, f"{title}, Mixtral-{model}", unit, path)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
