"""A step as one HTML page that needs no network: timeline, shares of time, traffic, load of experts.

The timeline is a canvas of our own: tens of thousands of tasks, two runs on one axis and a lane for each stream take 300
lines, and a page of some hundred kilobytes, where a plotting library would bring five megabytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.schedule.trace import STREAMS, Span
from megatron_hetermoe.simulator.events import Result
from megatron_hetermoe.simulator.host import advice, host_costs
from megatron_hetermoe.simulator.summary import HOST, summarise, summarise_members
from megatron_hetermoe.topology.layout import Layout, layout_of
from megatron_hetermoe.topology.placement import Placement

_PAGE = Path(__file__).parent / "page"
_CHANNELS = STREAMS[1:4]
MEASURED, PREDICTED = "measured", "predicted"


@dataclass(frozen=True)
class Run:
    """One step, to be shown.

    Attributes:
        name: MEASURED or PREDICTED.
        spans: of its ranks, in seconds since its start.
        results: of its ZP groups, by their number.
    """

    name: str
    spans: Sequence[Span]
    results: Mapping[int, Result]


def write_page(path: Path, title: str, plan: Plan, runs: Sequence[Run], notes: Sequence[str]) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        title: of the page.
        plan: of all runs.
        runs: the first one is what the page is about, the others are beside it on the timeline.
        notes: sentences below.
    """
    data = {"facts": _facts(plan, runs[0]), "runs": [_run(run, plan) for run in runs], "notes": list(notes)}
    read = {name: (_PAGE / name).read_text(encoding="utf-8") for name in
            ("page.html", "page.css", "timeline.js", "tables.js")}
    # "<" may not stand in a script element, where "</script>" would end it
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Template(read["page.html"]).substitute(
        title=escape(title), style=read["page.css"], data=text, script=read["timeline.js"] + read["tables.js"])
    path.write_text(page, encoding="utf-8")


def _facts(plan: Plan, run: Run) -> list[str]:
    model, schedule = plan.model, next(iter(run.results.values())).schedule
    groups = f", {plan.groups} ZP groups" if plan.groups > 1 else ""
    groups += f", {plan.stages} pipeline stages" if plan.stages > 1 else ""
    facts = [
        f"{plan.attention_ranks} attention and {plan.expert_ranks} expert ranks{groups}",
        f"{model.layers} layers, {model.experts} experts, top {model.topk}, width {model.hidden}, "
        f"{model.sequence} tokens a sequence",
        f"{schedule.last_microbatch + 1} microbatches, {plan.schedule}"
        + (f", {max(map(len, schedule.waves))} on the way together" if plan.schedule != "sequential" else ""),
    ]
    layout = layout_of(plan)
    roles = {rank: layout.role(rank) for rank in range(layout.world_size)}
    costs = host_costs(run.spans, roles)
    facts += [f"{role} ranks: {cost}" for role, cost in costs.items()]
    summary = summarise(*run.results.values())
    if hint := advice(costs.values(), max(one.bubbles[HOST] for one in summary.roles.values()) / summary.seconds):
        facts.append(hint)
    if plan.predicted:
        facts.append(f"planned: {plan.predicted.step_seconds:.4g} s a step")
    return facts


def _run(run: Run, plan: Plan) -> dict[str, Any]:
    layout = layout_of(plan)
    ranks = [rank for group in run.results for rank in layout.zp_group(group)]
    microseconds = 1e6
    return {
        "name": run.name, "seconds": next(iter(run.results.values())).seconds,
        "ranks": sorted(_ranks(run, plan, layout), key=lambda entry: (entry["stage"], entry["rank"])),
        "spans": [
            [span.rank, STREAMS.index(span.stream), span.task, round(span.start * microseconds, 1),
             round(span.end * microseconds, 1), span.sent, sum(span.tokens), *_host(span)]
            for span in run.spans
        ],
        "channels": [_channel(name, run.spans, len(ranks)) for name in _CHANNELS[:2 + (plan.stages > 1)]],
        "load": _load(run.spans, plan, layout),
    }


def _host(span: Span) -> list[float]:
    """Microseconds in which the host queued a task and by which it was ahead, where it did."""
    if span.queued is None:
        return []
    return [round(1e6 * seconds, 1) for seconds in (span.queued[1] - span.queued[0], span.lead)]


def _ranks(run: Run, plan: Plan, layout: Layout) -> list[dict[str, Any]]:
    """For each rank its stage, from 1 on, or 0 where there is one; where its time went, as parts that add up to the step; and
    what it sent."""
    entries = []
    sent = Counter()
    for span in run.spans:
        sent[span.rank, span.stream] += span.sent
    lasts: dict[int, float] = {}  # when a ZP group's last task ends, and those that it is in a pipeline with
    for group, result in run.results.items():
        pipeline = group % layout.groups
        lasts[pipeline] = max(lasts.get(pipeline, 0.0),
                              *(end for member in result.members for _, end in member.times.values()))
    for group, result in run.results.items():
        last = lasts[group % layout.groups]
        for member, summary in enumerate(summarise_members(result, last)):
            rank = layout.rank_of(group, member)
            role = layout.role(rank)
            pool = f" of {escape(plan.pools[member])}" if plan.pools else ""
            stage = 1 + layout.stage_of(rank) if plan.stages > 1 else 0
            after = min(summary.after, result.seconds - last)
            entries.append({
                "rank": rank, "role": role, "stage": stage,
                "pool": f"{role} ranks{pool}" + (f", stage {stage}" if stage else ""),
                "parts": {"work": summary.work, **summary.bubbles, "after": after,
                          "end": result.seconds - last - after},
                "sent": {name: sent[rank, name] for name in _CHANNELS},
            })
    return entries


def _channel(name: str, spans: Sequence[Span], ranks: int) -> dict[str, Any]:
    """What all ranks sent on a channel, and for how many seconds a rank was in a transfer, on average."""
    inside = [span for span in spans if span.stream == name]
    return {
        "name": name, "bytes": sum(span.sent for span in inside), "transfers": len({span.task for span in inside}),
        "seconds": sum(span.end - span.start for span in inside) / ranks,
    }


def _load(spans: Sequence[Span], plan: Plan, layout: Layout) -> dict[str, Any]:
    """Tokens of each expert by layer, over all ZP groups, and of each holder."""
    placement = Placement(plan.placement, layout.holders)
    tokens = {layer: [0] * len(holders) for layer, holders in enumerate(placement.holders, start=1)}
    by_rank: dict[int, int] = {}
    for span in spans:
        task = Task.parse(span.task)
        if not span.tokens or task is None or (task.kind, task.direction) != (Kind.DISPATCH, Pass.FORWARD):
            continue
        by_rank[span.rank] = by_rank.get(span.rank, 0) + sum(span.tokens)
        for expert, count in zip(placement.held(task.layer, layout.holder_of(span.rank)), span.tokens, strict=True):
            tokens[task.layer][expert] += count
    stage_of = {layer: stage for stage in range(plan.stages) for layers in plan.chunks_of_stage(stage) for layer in layers}

    def first(layer: int, holder: int) -> int:
        """A holder's first rank, in its stage's first group."""
        return layout.rank_of(stage_of[layer] * layout.groups, layout.members_of(holder)[0])

    def held(rank: int) -> int:
        return placement.of_chunks(plan.chunks_of_stage(layout.stage_of(rank))).experts_held(layout.holder_of(rank))

    return {
        "layers": [
            {"layer": layer, "tokens": counts,
             "names": [f"rank {first(layer, holder)}" for holder in placement.holders[layer - 1]],
             "roles": [layout.role(first(layer, holder)) for holder in placement.holders[layer - 1]]}
            for layer, counts in tokens.items() if counts
        ] if by_rank else [],
        "holders": [
            {"rank": rank, "role": layout.role(rank), "tokens": count,
             "experts": held(rank)}
            for rank, count in sorted(by_rank.items())
        ],
    }
