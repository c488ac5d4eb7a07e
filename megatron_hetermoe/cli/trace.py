"""``hetermoe trace``: what a run recorded with ``--hetermoe-trace``, as a picture or for a trace viewer."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import plan_from_json
from megatron_hetermoe.schedule.trace import Span, read_jsonl, write_chrome
from megatron_hetermoe.topology.layout import layout_of

_FILE = re.compile(r"step(\d+)\.rank(\d+)\.jsonl")
_PICTURES = (".png", ".svg", ".pdf")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "trace", help="draw the timeline of a recorded run",
        description="Reads the folder that a run with --hetermoe-trace DIR wrote and draws one step.")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--out", required=True, metavar="FILE",
                        help=f"{', '.join(_PICTURES)} for a picture (needs matplotlib), .json for ui.perfetto.dev")
    parser.add_argument("--step", type=int, metavar="N", help="training step since the start (default: the shortest)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    folder, out = Path(args.folder), Path(args.out)
    roles = _roles(folder)
    step, spans = _step(folder, args.step, len(roles))
    if out.suffix == ".json":
        write_chrome(spans, out, roles)
    elif out.suffix in _PICTURES:
        try:
            from megatron_hetermoe.cli.timeline import draw
        except ModuleNotFoundError:
            raise UsageError(["a picture needs matplotlib: pip install 'megatron-hetermoe[plot]'"]) from None
        draw(spans, roles, out)
    else:
        raise UsageError([f"--out {out}: the name must end in one of {', '.join((*_PICTURES, '.json'))}"])
    print(f"step {step}, {len(spans)} tasks of {len(roles)} ranks: {out}")
    return 0


def _roles(folder: Path) -> dict[int, str]:
    """The role of each rank of the recorded run."""
    plan_file = folder / "plan.json"
    if not plan_file.exists():
        raise UsageError([f"{folder} has no plan.json: record a run with --hetermoe-trace {folder}"])
    plan = plan_from_json(plan_file.read_text(encoding="utf-8"), str(plan_file))
    layout = layout_of(plan)
    return {rank: layout.role(rank) for rank in range(layout.world_size)}


def _step(folder: Path, wanted: int | None, ranks: int) -> tuple[int, list[Span]]:
    """A step's number and spans, in seconds since its first task; without a wish the shortest step's."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(int(match[1]), []).append(path)
    steps = {step: paths for step, paths in files.items() if len(paths) == ranks}
    if not steps or (wanted is not None and wanted not in steps):
        found = ", ".join(map(str, steps)) or "none"
        raise UsageError([f"{folder} has no step {'' if wanted is None else wanted} of all {ranks} ranks (found: {found}); "
                          "copy the files of all machines into one folder"])
    spans = {
        step: [span for path in paths for span in read_jsonl(path)]
        for step, paths in steps.items() if wanted in (None, step)
    }
    step = min(spans, key=lambda number: _length(spans[number]))
    start = min(span.start for span in spans[step])
    return step, [replace(span, start=span.start - start, end=span.end - start) for span in spans[step]]


def _length(spans: list[Span]) -> float:
    return max(span.end for span in spans) - min(span.start for span in spans)
