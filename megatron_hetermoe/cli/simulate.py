"""``hetermoe simulate``: the predicted step of a plan, task by task."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import MOST
from megatron_hetermoe.config.plan import PRECISIONS, SCHEDULES, Plan, plan_from_json
from megatron_hetermoe.config.step import RECOMPUTE

_MAY_BE_ZERO = ("dense_ffn", "shared_expert_ffn")  # widths of what a model may not have


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "simulate", help="simulate the step of a plan", description="Runs a plan's schedule on predicted times: how "
        "busy each pool is, where time is lost and why. One ZP group is simulated; the others do the same.")
    parser.add_argument("plan", metavar="plan.json")
    parser.add_argument("--cluster", required=True, metavar="CLUSTER.yaml")
    parser.add_argument("--timeline", metavar="out.json", help="write a trace for ui.perfetto.dev or chrome://tracing; "
                        "with the ending .jsonl, one span a line as `hetermoe trace` reads it")
    parser.add_argument("--replay", type=_scale, metavar="SCALE", help="also run the step here, a process for each member "
                        "of a ZP group, whose tasks wait SCALE times what they would take; and beside it what it is "
                        "compared with")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_hetermoe.cli import replay
    from megatron_hetermoe.cost.cluster import kinds_of, read_cluster
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.cost.tasks import costs_of_plan
    from megatron_hetermoe.schedule.orders import build
    from megatron_hetermoe.schedule.trace import write_chrome, write_jsonl
    from megatron_hetermoe.simulator.events import simulate
    from megatron_hetermoe.simulator.summary import summarise
    from megatron_hetermoe.topology.layout import layout_of

    try:
        text = Path(args.plan).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError([f"cannot read {args.plan}: {getattr(error, 'strerror', None) or 'it is not text'}"]) from None
    plan = plan_from_json(text, args.plan)
    notes = Notes()
    cluster = read_cluster(args.cluster, notes)
    _check(plan, cluster, args.plan)
    kinds = kinds_of(cluster, plan.model, plan.attention_precision, notes)
    costs = costs_of_plan(plan, cluster, kinds)
    layout = layout_of(plan)
    schedule = build(plan.schedule, plan.model.layers, costs.placement, layout.m, plan.step.microbatches, plan.wave)
    result = simulate(schedule, costs)
    summary = summarise(result)
    replayed = args.replay and replay.replayed(args.plan, args.cluster, replay.ways(plan, cluster, kinds), args.replay)
    if args.timeline:
        spans = result.spans(lambda member: layout.rank_of(0, member))
        if args.timeline.endswith(".jsonl"):
            write_jsonl(spans, args.timeline)
        else:
            ranks = layout.zp_group(0)
            write_chrome(spans, args.timeline, {rank: layout.role(rank) for rank in ranks})
    if args.json:
        seconds = {name: dict(zip(("simulated", "replayed"), pair)) for name, pair in (replayed or {}).items()}
        print(json.dumps({**asdict(summary), "replay": seconds, "notes": list(notes)}, indent=1))
    else:
        _print(summary, notes, args.timeline)
        _print_replay(replayed or {})
    return 0


def _check(plan: Plan, cluster, origin: str) -> None:
    """What must hold before a plan can be priced."""
    from megatron_hetermoe.topology.layout import layout_problems

    problems = Problems()
    if plan.step is None or not plan.pools:
        problems.add(f"{origin} says no step and no pools: make it with `hetermoe plan --cluster`, or there is nothing "
                     f"to price")
    if plan.expert_tensor_parallel > 1:
        problems.add(f"{origin} has experts shared by ranks, which nothing prices yet: simulate a plan without that")
    for name in sorted(set(plan.pools) - cluster.pools.keys()):
        problems.add(f"{origin} uses the pool {name}, {cluster.origin} has {', '.join(cluster.pools)}: give the "
                     f"cluster file that it was made for")
    for problem in layout_problems(
        plan.attention_ranks, plan.expert_ranks, max(1, plan.groups), plan.tensor_parallel
    ):
        problems.add(f"{origin}: {problem}")
    figures = _figures(plan)
    for problem in figures:
        problems.add(f"{origin}: {problem}: make it anew")
    if figures or not plan.pools:
        problems.raise_if_any()  # what follows counts with them
    members = (plan.attention_ranks + plan.expert_ranks) // plan.groups
    if len(plan.pools) != members:
        problems.add(f"{origin} names pools for {len(plan.pools)} members, a ZP group of it has {members}: make it "
                     f"anew")
    experts = [plan.model.experts if layer in plan.model.moe_layers else 0
               for layer in range(1, plan.model.layers + 1)]
    if [len(layer) for layer in plan.placement] != experts \
            or any(not 0 <= holder < members for layer in plan.placement for holder in layer):
        problems.add(f"{origin}: the placement does not fit the model or the layout: make it anew")
    problems.raise_if_any()


def _figures(plan: Plan) -> list[str]:
    """What of a plan nothing could be priced with, one phrase each."""
    model, step = plan.model, plan.step
    counted = {f"the model's {name}": value for name, value in vars(model).items() if name not in _MAY_BE_ZERO}
    if step is not None:
        counted |= {f"the step's {name}": value for name, value in vars(step).items()}
    counted |= {"wave": plan.wave or 1, "groups": plan.groups}
    found = [f"{name} is {value}, not from 1 to {MOST}" for name, value in counted.items()
             if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MOST]
    found += [f"the model's {name} is {getattr(model, name)}, not from 0 to {MOST}" for name in _MAY_BE_ZERO
              if not 0 <= getattr(model, name) <= MOST]
    choices = [("schedule", plan.schedule, SCHEDULES), ("attention_precision", plan.attention_precision, PRECISIONS)]
    choices += [("recompute", step.recompute, RECOMPUTE)] if step is not None else []
    found += [f"{name} is {value!r}, none of {', '.join(known)}" for name, value, known in choices if value not in known]
    if len(plan.placement) != model.layers or not set(model.moe_layers) <= set(range(1, len(plan.placement) + 1)) \
            or not model.moe_layers:
        found.append(f"it has {model.layers} layers, some of them with experts, and a placement for {len(plan.placement)}")
    return found


def _print(summary, notes, timeline: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    causes = list(next(iter(summary.roles.values())).bubbles)
    table = Table("role", "computing", *(f"idle: {cause}" for cause in causes), title_justify="left",
                  title=f"step {summary.seconds:.4f} s; bound {summary.bound:.4f} s (the busiest rank's work), "
                        f"{summary.distance:.1%} above; after the last task {summary.after:.4f} s")
    for name, role in summary.roles.items():
        table.add_row(name, f"{role.busy:.1%}", *(f"{role.bubbles[cause] / summary.seconds:.1%}" for cause in causes))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    if timeline:
        console.print(f"timeline written to {timeline}")


def _print_replay(replayed: dict[str, tuple[float, float]]) -> None:
    for name, (simulated, measured) in replayed.items():
        print(f"{name}: tasks {simulated:.3f} s as simulated, {measured:.3f} s replayed, {measured / simulated - 1:+.1%}")
