"""Draws what ``compare.py`` measured, from its file alone: throughput by sequence length, and how busy each role was.

    scripts/bench/plots.py cells.jsonl --out docs

Makes throughput-MODEL.png and busy-MODEL.png. Needs matplotlib: pip install 'megatron-hetermoe[plot]'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import cells
import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Lines = dict[str, dict[int, float]]  # by name, a value for each sequence length
Panels = dict[tuple[str, str], Lines]  # by the titles of row and column
_HOW = {"profiled": "by profiles", "kernels": "by kernels"}
_PANEL = 3.6, 3.2  # inches
_LEGEND = 2.2


def throughput(measured: Iterable[dict], model: str) -> Panels:
    """Thousands of tokens a second of each system: a column for each setting."""
    found: Panels = {}
    for title, length, system, repetitions in _systems(measured, model):
        rate = statistics.median(cell["batch"] * length / cell["seconds"] / 1e3 for cell in repetitions)
        found.setdefault(("", title), {}).setdefault(system, {})[length] = rate
    return found


def busy(measured: Iterable[dict], model: str) -> Panels:
    """Percent of a step without its optimizer in which each role computes: a row for each setting, a column for each
    disaggregated system."""
    found: Panels = {}
    for title, length, system, repetitions in _systems(measured, model):
        if not cells.busy_shares(repetitions, "profiled"):
            continue
        lines = found.setdefault((title, system), {})
        for how, words in _HOW.items():
            for role, share in cells.busy_shares(repetitions, how).items():
                lines.setdefault(f"{role}, {words}", {})[length] = 100 * share
    return found


def _systems(measured: Iterable[dict], model: str) -> Iterator[tuple[str, int, str, list[dict]]]:
    """A model's cells that count: the setting in words but for the length, the length, the system, its repetitions."""
    for where, by_system in cells.by_setting(measured).items():
        if where.model == model:
            for system, repetitions in by_system.items():
                yield where.pools, where.length, system, repetitions


def draw(found: Panels, title: str, unit: str, path: Path) -> None:
    """A figure of these panels, as PNG."""
    rows, columns = (list(dict.fromkeys(titles)) for titles in zip(*found))
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    size = _PANEL[0] * len(columns) + _LEGEND, _PANEL[1] * len(rows)
    figure, grid = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharey=True)
    for row, of_row in zip(rows, grid):
        of_row[0].set_ylabel(f"{row}\n{unit}" if row else unit)
        for column, axes in zip(columns, of_row):
            _draw_panel(axes, found.get((row, column), {}), names)
            axes.set(title=column, xlabel="tokens of a sequence")
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _draw_panel(axes: Axes, lines: Lines, names: list[str]) -> None:
    for name, points in lines.items():
        number = names.index(name)
        lengths = sorted(points)
        axes.plot(lengths, [points[length] for length in lengths], marker="os^Dv"[number % 5], color=f"C{number % 10}", label=name)
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
        for name, panels, title, unit in (
            ("throughput", throughput, "Throughput", "thousand tokens a second"),
            ("busy", busy, "Busy share of a step", "percent"),
        ):
            if found := panels(measured, model):
                path = args.out / f"{name}-{model}.png"
                draw(found, f"{title}, Mixtral-{model}", unit, path)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
