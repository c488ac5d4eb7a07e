"""``hetermoe simulate``: the predicted step of a plan, task by task."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hetermoe.cli.drawing import PICTURES, VIEWER, write_timeline
from megatron_hetermoe.cli.output import check_output, writing
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.plan import Plan, read_plan

if TYPE_CHECKING:
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.simulator.planned import Predicted
    from megatron_hetermoe.simulator.summary import Summary

_ENDINGS = (".html", *PICTURES, VIEWER, ".jsonl")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "simulate", help="simulate the step of a plan", description="Runs a plan's schedule on predicted times: how "
        "busy each pool is, where time is lost and why. One ZP group of each pipeline stage is simulated; the others do the "
        "same.")
    parser.add_argument("plan", metavar="plan.json")
    parser.add_argument("--cluster", required=True, metavar="CLUSTER.yaml")
    parser.add_argument("--timeline", metavar="FILE", help=f".html for a page; {', '.join(PICTURES)} for a picture "
                        "(needs matplotlib); .json for ui.perfetto.dev; .jsonl for one span a line, as a run with "
                        "--hetermoe-trace writes them")
    parser.add_argument("--replay", type=_scale, metavar="SCALE", help="also run the step here, a process for each member "
                        "of a ZP group, whose tasks wait SCALE times what they would take; and beside it what it is "
                        "compared with")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_hetermoe.cli import replay
    from megatron_hetermoe.cost.cluster import kinds_of, read_cluster
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.simulator.planned import predict
    from megatron_hetermoe.simulator.summary import summarise

    problems, notes = Problems(), Notes()
    timeline = Path(args.timeline) if args.timeline else None
    if timeline:
        if timeline.suffix not in _ENDINGS:
            problems.add(f"--timeline {timeline}: the name must end in one of {', '.join(_ENDINGS)}")
        check_output("--timeline", timeline, problems)
    with problems.taking():
        plan = read_plan(args.plan)
    with problems.taking():
        cluster = read_cluster(args.cluster, notes)
    problems.raise_if_any()
    predicted = predict(plan, cluster, args.plan, notes)
    summary = summarise(*predicted.results)
    replayed = None
    if args.replay:
        kinds = kinds_of(cluster, plan.model, plan.attention_precision, notes)
        replayed = replay.replayed(args.plan, args.cluster, replay.ways(plan, cluster, kinds), args.replay)
    if timeline:
        with writing(timeline):
            _write(timeline, plan, predicted, notes)
    if args.json:
        seconds = {name: dict(zip(("simulated", "replayed"), pair)) for name, pair in (replayed or {}).items()}
        print(json.dumps({**asdict(summary), "replay": seconds, "notes": list(notes)}, indent=1))
    else:
        _print(summary, notes, args.timeline)
        _print_replay(replayed or {})
    return 0


def _write(path: Path, plan: Plan, predicted: Predicted, notes: Notes) -> None:
    """The timeline, in the form that the file's ending names."""
    from megatron_hetermoe.cli.report import PREDICTED, Run, write_page
    from megatron_hetermoe.schedule.trace import write_jsonl

    if path.suffix == ".jsonl":
        write_jsonl(predicted.spans, path)
    elif path.suffix == ".html":
        run = Run(PREDICTED, predicted.spans, dict(zip(predicted.groups, predicted.results)))
        write_page(path, "A step as predicted", plan, [run], [*notes])
    else:
        write_timeline(predicted.spans, predicted.layout, predicted.ranks, path)


def _print(summary: Summary, notes: Notes, timeline: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_hetermoe.simulator.host import advice
    from megatron_hetermoe.simulator.summary import CAUSES, HOST, STAGE

    console = Console()
    causes = [cause for cause in CAUSES
              if cause not in (STAGE, HOST) or any(role.bubbles[cause] for role in summary.roles.values())]
    table = Table("role", "computing", *causes, "after", title_justify="left", caption_justify="left",
                  title=f"step {summary.seconds:.4f} s; bound {summary.bound:.4f} s (the busiest rank's work), "
                        f"{summary.distance:.1%} above",
                  caption="shares of the step: computing, idle by cause (docs/concepts.md), and after the last task: gradient "
                          "reduction, optimizer")
    for name, role in summary.by_name.items():
        _, of_stage, stage = name.partition(", ")
        idle = (role.bubbles[cause] / summary.seconds for cause in causes)
        shares = (role.busy, *idle, summary.after / summary.seconds)
        table.add_row(f"  {stage}" if of_stage else name, *(f"{share:.1%}" for share in shares))
    console.print(table)
    if hint := advice((), max(role.bubbles[HOST] for role in summary.roles.values()) / summary.seconds):
        console.print(hint, highlight=False)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    if timeline:
        console.print(f"timeline written to {timeline}")


def _print_replay(replayed: dict[str, tuple[float, float]]) -> None:
    for name, (simulated, measured) in replayed.items():
        print(f"{name}: tasks {simulated:.3f} s as simulated, {measured:.3f} s replayed, {measured / simulated - 1:+.1%}")
