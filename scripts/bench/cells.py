"""What was measured: a cell is one way to train one model at one length, a line of a file; and the table of all."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from systems import FAST, SLOW


def read(path: Path) -> list[dict]:
    """The cells of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, cell: dict) -> None:
    """Adds a cell."""
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def key(cell: dict) -> tuple:
    """What tells a cell from others of its file."""
    return cell["model"], cell["length"], tuple(cell["ranks"]), cell["system"], cell["repeat"]


def table(cells: list[dict]) -> str:
    """The figures as Markdown."""
    lines = ["| model | tokens | ranks | system | sequences/s | spread | predicted | over EP | over the sum of pools |",
             "|---|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, int, str], dict[str, list[dict]]] = {}
    for cell in cells:
        if "seconds" in cell:
            key = cell["model"], cell["length"], "{}:{}".format(*cell["ranks"])
            groups.setdefault(key, {}).setdefault(cell["system"], []).append(cell)
    for (model, length, ranks), by_system in groups.items():
        rates = {name: [cell["batch"] / cell["seconds"] for cell in found] for name, found in by_system.items()}
        median = {name: statistics.median(values) for name, values in rates.items()}
        pools = [median.get(f"EP, {pool} pool alone") for pool in (FAST, SLOW)]
        for name, values in rates.items():
            over = [median[name] / base if base else None
                    for base in (median.get("EP, all ranks"), sum(pools) if all(pools) else None)]
            ratios = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in over)
            predicted = by_system[name][0]["batch"] / by_system[name][0]["predicted"]
            lines.append(f"| {model} | {length} | {ranks} | {name} | {median[name]:.2f} | {min(values):.2f} to {max(values):.2f} "
                         f"| {predicted:.2f} | {ratios} |")
    return "\n".join(lines)
