"""``hetermoe trace``: what a run recorded with ``--hetermoe-trace``, as a page, a picture or for a trace viewer."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_hetermoe.cli.activity import Activity
from megatron_hetermoe.cli.drawing import PICTURES, VIEWER, write_timeline
from megatron_hetermoe.cli.output import check_output, writing
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.cost.cluster import Cluster, read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.schedule.trace import STEP, Span, read_jsonl
from megatron_hetermoe.simulator.host import advice, host_costs
from megatron_hetermoe.simulator.recorded import from_start
from megatron_hetermoe.topology.layout import layout_of

_FILE = re.compile(r"step(\d+)\.rank(\d+)\.jsonl")
_ENDINGS = (".html", *PICTURES, VIEWER)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "trace", help="draw the timeline of a recorded run",
        description="Reads the folder that a run with --hetermoe-trace DIR wrote and draws one step.")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--out", required=True, metavar="FILE",
                        help=f".html for a page, {', '.join(PICTURES)} for a picture (needs matplotlib), .json for "
                             f"ui.perfetto.dev")
    parser.add_argument("--cluster", metavar="CLUSTER.yaml",
                        help="that the run's plan was made for: the page then has the predicted step beside the recorded")
    parser.add_argument("--step", type=int, metavar="N", help="training step since the start (default: the shortest)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    folder, out = Path(args.folder), Path(args.out)
    problems, notes = Problems(), Notes()
    if out.suffix not in _ENDINGS:
        problems.add(f"--out {out}: the name must end in one of {', '.join(_ENDINGS)}")
    elif args.cluster and out.suffix != ".html":
        problems.add(f"--cluster is for what was predicted, which a page shows: give --out a name that ends in "
                     f".html in place of {out}")
    check_output("--out", out, problems)
    with problems.taking():
        plan = _plan(folder)
    with problems.taking():
        cluster = read_cluster(args.cluster, notes) if args.cluster else None
    problems.raise_if_any()
    layout = layout_of(plan)
    roles = {rank: layout.role(rank) for rank in range(layout.world_size)}
    with Activity() as activity:
        step, spans = _step(folder, args.step, len(roles), activity)
        activity.enter(f"writing {out}")
        with writing(out):
            if out.suffix == ".html":
                _write_page(out, step, spans, plan, folder, cluster, notes)
            else:
                write_timeline(spans, layout, roles, out)
    print(f"step {step}, {sum(span.stream != STEP for span in spans)} tasks of {len(roles)} ranks: {out}")
    costs = host_costs(spans, roles)
    for role, cost in costs.items():
        print(f"{role} ranks: {cost}")
    if hint := advice(costs.values(), 0.0):
        print(hint)
    return 0


def _write_page(
    out: Path, step: int, spans: list[Span], plan: Plan, folder: Path, cluster: Cluster | None, notes: Notes
) -> None:
    """The page of a recorded step, with the predicted one beside it where there is a cluster."""
    from megatron_hetermoe.cli.report import MEASURED, PREDICTED, Run, write_page
    from megatron_hetermoe.simulator.planned import predict
    from megatron_hetermoe.simulator.recorded import results_of

    runs = [Run(MEASURED, spans, dict(enumerate(results_of(spans, plan))))]
    if cluster:
        predicted = predict(plan, cluster, str(folder / "plan.json"), notes)
        runs.append(Run(PREDICTED, predicted.spans, dict(zip(predicted.groups, predicted.results))))
    write_page(out, f"Training step {step}, recorded in {folder.absolute().name}", plan, runs, [*notes])


def _plan(folder: Path) -> Plan:
    """The plan of the recorded run."""
    plan_file = folder / "plan.json"
    if not plan_file.exists():
        raise UsageError([f"{folder} has no plan.json: record a run with --hetermoe-trace {folder}"])
    return read_plan(plan_file)


def _step(folder: Path, wanted: int | None, ranks: int, activity: Activity) -> tuple[int, list[Span]]:
    """A step's number and spans, in seconds since its first task; without a wish the shortest step's."""
    files: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(int(match[1]), []).append(path)
    steps = {step: paths for step, paths in files.items() if len(paths) == ranks}
    if not steps or (wanted is not None and wanted not in steps):
        found = ", ".join(map(str, steps)) or "none"
        step = "step" if wanted is None else f"step {wanted}"
        raise UsageError([f"{folder} has no {step} of all {ranks} ranks (found: {found}); copy the files of all machines "
                          f"into one folder"])
    shortest: tuple[int, list[Span]] | None = None
    for step, paths in steps.items():
        if wanted not in (None, step):
            continue
        activity.enter(f"reading step {step} of {ranks} ranks")
        spans = [span for path in paths for span in read_jsonl(path)]
        if shortest is None or _length(spans) < _length(shortest[1]):
            shortest = step, spans
    return shortest[0], from_start(shortest[1])


def _length(spans: list[Span]) -> float:
    return max(span.end for span in spans) - min(span.start for span in spans)
