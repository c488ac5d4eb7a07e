"""What was measured: a cell is one way to train one model at one length, a line of a file; and the table of all."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from systems import FAST, SLOW

EP = "EP, all ranks"
# How far losses may be apart, as a share, at any step: bf16 rounds to 2^-8 or 0.4%. Cells add up the same numbers in other
# orders, so logits differ by one rounding; the loss is a mean over all tokens, where most of that cancels, but what the optimizer
# makes of it grows from step to step, and near a tie a token goes to another expert. On an H200 cells were 0.1 to 0.7% apart at the
# ninth step, where the loss has come from 10.6 to 0.5; where experts began with other weights 1.3 and 17%.
SPREAD = 1e-2


def read(path: Path) -> list[dict]:
    """The cells of a file; none if it is not there. A last line that was cut off is none."""
    if not path.exists():
        return []
    *whole, rest = path.read_text().split("\n")
    if rest:
        path.write_text("".join(f"{line}\n" for line in whole))
    return [json.loads(line) for line in whole]


def append(path: Path, cell: dict) -> None:
    """Adds a cell."""
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def key(cell: dict) -> tuple:
    """What tells a cell from others of its file."""
    return *setting(cell), cell["system"], cell["repeat"]


class Setting(NamedTuple):
    """What cells have in common that are compared.

    Attributes:
        model, length: as ``paper_models.model_flags``.
        ranks: of each pool.
        batch, micro_batch: sequences of a step and of a microbatch.
        gbps: speed of traffic; None where it is not throttled.
    """

    model: str
    length: int
    ranks: tuple[int, int]
    batch: int
    micro_batch: int
    gbps: float | None

    @property
    def pools(self) -> str:
        """How the pools are used, in words."""
        beside = f", microbatches of {self.micro_batch}" if self.micro_batch > 1 else ""
        return "{} fast, {} slow".format(*self.ranks) + beside + (f", {self.gbps:g} Gbit/s" if self.gbps else "")


def setting(cell: dict) -> Setting:
    """The one of a cell."""
    return Setting(cell["model"], cell["length"], tuple(cell["ranks"]), cell["batch"], cell.get("micro_batch", 1), cell.get("gbps"))


def compared(cells: Iterable[dict]) -> list[dict]:
    """The cells, with those failed whose loss is not that of the others.

    All train one model on the same batches from the same weights. Stock expert parallelism is what others are held against, or
    where it was not measured the median of all.
    """
    by_training: dict[tuple, list[dict]] = {}
    for cell in cells:
        by_training.setdefault((cell["model"], cell["length"], cell["batch"], cell.get("micro_batch", 1)), []).append(cell)
    return [_checked(cell, _reference(alike)) for alike in by_training.values() for cell in alike]


def _reference(cells: list[dict]) -> list[float]:
    """The loss of each step that is right."""
    counted = [cell for cell in cells if "seconds" in cell]
    stock = [cell["loss"] for cell in counted if cell["system"] == EP]
    return [statistics.median(at_once) for at_once in zip(*(stock or [cell["loss"] for cell in counted]))]


def _checked(cell: dict, right: list[float]) -> dict:
    if "seconds" not in cell:
        return cell
    apart = [abs(loss / other - 1) for loss, other in zip(cell["loss"], right)]
    if max(apart) <= SPREAD:
        return cell
    step = next(index for index, share in enumerate(apart, start=1) if share > SPREAD)
    left = {name: value for name, value in cell.items() if name != "seconds"}
    return {**left, "failed": f"the loss of step {step} is {cell['loss'][step - 1]:.4f}, others have {right[step - 1]:.4f}, "
                              f"and more than {SPREAD:.1%} is no rounding"}


def by_setting(cells: Iterable[dict]) -> dict[Setting, dict[str, list[dict]]]:
    """For each setting the cells that count, by system, in the order of the file."""
    groups: dict[Setting, dict[str, list[dict]]] = {}
    for cell in compared(cells):
        if "seconds" in cell:
            groups.setdefault(setting(cell), {}).setdefault(cell["system"], []).append(cell)
    return groups


_COLUMNS = ("model", "tokens", "ranks", "system", "sequences/s", "spread", "predicted", "over EP", "over the sum of pools",
            "of the bound", "over EP's compute alone", "busy, profiled", "busy, kernels")


def table(cells: Iterable[dict]) -> str:
    """The figures as Markdown, and what failed."""
    cells = list(cells)
    lines = [_row(_COLUMNS), _row("---" for _ in _COLUMNS)]
    for where, by_system in by_setting(cells).items():
        lines += [_row((where.model, str(where.length), where.pools, *row)) for row in _rows(by_system)]
    failed = [cell for cell in compared(cells) if "seconds" not in cell]
    return "\n".join([*lines, *(f"failed: {key(cell)}: {cell['failed']}" for cell in failed)])


def _row(columns: Iterable[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _rows(by_system: dict[str, list[dict]]) -> Iterator[tuple[str, ...]]:
    """The table's columns from the system on, for one setting."""
    rates = {name: [cell["batch"] / cell["seconds"] for cell in found] for name, found in by_system.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    pools = [median.get(f"EP, {pool} pool alone") for pool in (FAST, SLOW)]
    for name, found in by_system.items():
        over = [_ratio(median[name], base) for base in (median.get(EP), sum(pools) if all(pools) else None)]
        shares = [_ratio(statistics.median(values), 1.0) if (values := [cell[field] for cell in found if field in cell]) else ""
                  for field in ("of_bound", "over_ep_compute")]
        layout = f" ({found[0]['layout']})" if found[0].get("layout") else ""
        yield (name + layout, f"{median[name]:.2f}", f"{min(rates[name]):.2f} to {max(rates[name]):.2f}",
               f"{found[0]['batch'] / found[0]['predicted']:.2f}", *over, *shares,
               *(_shares(busy_shares(found, how)) for how in ("profiled", "kernels")))


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else ""


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{role} {share:.0%}" for role, share in shares.items())


def busy_shares(cells: Iterable[dict], how: str) -> dict[str, float]:
    """The share of a step without its optimizer in which a rank of each role or pool computes, medians over repetitions.

    Args:
        cells: of one system in one setting.
        how: "profiled", by the times that tasks had in profiles, or "kernels", as the GPU ran them.

    Returns:
        None of a cell's shares where it has none of that kind.
    """
    found = [cell["busy"][how] for cell in cells if how in cell.get("busy", {})]
    return {name: statistics.median(shares[name] for shares in found) for name in (found[0] if found else ())}
