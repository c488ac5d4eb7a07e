"""Which plan is best on a cluster, by how much, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_hetermoe.config.plan import DELAYED, MERGED, TOGETHER, Plan
from megatron_hetermoe.config.step import Prediction
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.asym_ea import LONG, Assignment, balance, placement_of
from megatron_hetermoe.planner.memory import imbalance_that_fits, in_flight, member_memory, most_imbalance
from megatron_hetermoe.planner.options import Option, Question, options, variants
from megatron_hetermoe.planner.staged import balance_stages, divisions, quick_seconds, scheduled
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.schedule.tasks import Kind as TaskKind
from megatron_hetermoe.schedule.tasks import Stream
from megatron_hetermoe.simulator.events import simulate, simulate_stages
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

if TYPE_CHECKING:
    import numpy as np

_QUICK = 40  # options that are simulated
_STAGED = 8  # options of pipelines and shared experts that are simulated after them, half of them where a few are
_VARIED = 24  # layouts of which pipelines are made, or experts shared
_FEW = 12  # of them, where only a figure to compare with is asked for
_OVERLAPPED = 1.4  # times as fast, that filling the ramps of waves may make a step: more than it did on any plan that ships
_WORTH_A_DELAY = 0.99  # of a step's time; W tasks are more kernels than prices know of
_WORTH_STAGES = 0.97  # of its speed, that a pipeline counts with beside layouts of one stage
_THOROUGH = 3  # of these, the best ones whose placement is searched in full


@dataclass(frozen=True)
class Priced:
    """A simulated option.

    Attributes:
        option: the layout.
        wave: R.
        assignment: the experts' placement.
        tokens_per_second: of all groups.
        weight_gradients, schedule: as in a plan.
    """

    option: Option
    wave: int
    assignment: Assignment
    tokens_per_second: float
    weight_gradients: str = TOGETHER
    schedule: str = "zebra"

    @cached_property
    def _stages(self) -> list[tuple[GroupCosts, np.ndarray, float]]:
        """For each pipeline stage costs, experts that each member holds in all its layers, microbatches on their way."""
        experts, option = self.assignment.experts, self.option
        return [
            (group, experts[[layer - 1 for layer in layers]].sum(axis=0), in_flight(
                self.schedule, self.wave, group.step.microbatches, group.shape.layers, option.ahead(group.stage)))
            for group, layers in zip(option.stages, option.layers)
        ]

    def busy(self, role: str) -> float:
        """Share of the step in which a role's ranks compute, on average."""
        group, experts = self.option.group, self.assignment.experts
        if self.weight_gradients == MERGED:
            group = group.amortised(self.wave)
        members = _members(group, role)
        work = 0.0
        for member in members:
            work += sum(group.expert_seconds(member, way, int(held)) for way in (0, 1) for held in experts[:, member])
            if role == ATTENTION:
                work += sum(map(sum, group.attention[member]))
        ranks = len(members) * len(self.option.stages)
        return work * group.step.microbatches / ranks / self.assignment.seconds

    def queueing(self, role: str) -> float:
        """Share of the step in which the host of a role's rank that has most to queue does so; 0 where that is not known."""
        group = self.option.group
        costs = TaskCosts(group, placement_of(self.assignment.experts))
        most = max(costs.host_computes(member) + costs.host_transfers(member) for member in _members(group, role))
        return most * group.step.microbatches / len(self.option.stages) / self.assignment.seconds

    def without_work(self) -> dict[str, int]:
        """Expert ranks of each pool that hold no expert."""
        idle: dict[str, int] = {}
        for group, held, _ in self._stages:
            for member in _members(group, EXPERT):
                if not held[member]:
                    name = group.seats[member].pool.name
                    idle[name] = idle.get(name, 0) + self.option.groups * group.expert_tensor
        return idle

    def bytes_of(self, role: str) -> float:
        """Of a role's fullest rank."""
        return max(member_memory(group, member, int(held[member]), wave, weight_gradients=self.weight_gradients).total
                   for group, held, wave in self._stages for member in _members(group, role))

    @property
    def imbalance(self) -> tuple[float, float]:
        """How uneven routing may become before some GPU is full, and the most that it can become there: rows of a
        member's experts, over those of balanced routing."""
        return min(
            (imbalance_that_fits(group, member, int(held[member]), wave, self.weight_gradients),
             most_imbalance(group, int(held[member])))
            for group, held, wave in self._stages for member in range(group.members) if held[member]
        )

    def plan(self) -> Plan:
        """As a plan file has it."""
        option, group = self.option, self.option.group
        prediction = Prediction(
            self.assignment.seconds, self.tokens_per_second, self.busy(ATTENTION), self.busy(EXPERT),
            self.bytes_of(ATTENTION), self.bytes_of(EXPERT), any(seat.kind.estimated for seat in group.seats),
        )
        placement = placement_of(self.assignment.experts)
        copies = option.groups * len(option.stages)
        plan = Plan(
            group.shape, option.m * copies, option.n * copies, option.groups,
            placement.holders, self.schedule, self.wave, group.precision, _expert_precision(group),
            tensor_parallel=group.tensor, context_parallel=group.context, expert_tensor_parallel=group.expert_tensor,
            weight_gradients=self.weight_gradients, stage_layers=option.stage_layers,
            pools=tuple(name for name, count in (*option.attention, *option.expert) for _ in range(count)),
            step=group.step, predicted=prediction, virtual_stages=option.virtual_stages,
        )
        return replace(plan, tasks=tuple(TaskCosts(stage, placement.of_chunks(plan.chunks_of_stage(number))).typical()
                                         for number, stage in enumerate(option.stages)))


def _expert_precision(group: GroupCosts) -> str:
    """That of all else, but fp16 where a rank for experts has no bf16."""
    return "fp16" if group.precision == "bf16" and not all(seat.kind.bf16 for seat in group.seats) else group.precision


def _members(group: GroupCosts, role: str) -> range:
    return range(group.attention_members) if role == ATTENTION else range(group.attention_members, group.members)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the fastest plan first, then the best of each other layout that was simulated.
        considered: options that the batch allows.
        fitting: those of them that fit.
        simulated: those of them that were simulated; the others cannot be faster than the best or came after the most that were asked for.
    """

    best: tuple[Priced, ...]
    considered: int
    fitting: int
    simulated: int


def search(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], thorough: bool = True,
    tell: Callable[[str], None] = lambda what: None, most: int = _QUICK,
) -> Found:
    """Finds the fastest plan that fits.

    Every option has a bound on its throughput that no placement can beat. Options, of each sort some, are simulated from
    the highest on, with placements that differ by layer only in what does not divide, until no bound is above the best that
    was found. Then pipelines and layouts that share experts, made of the layouts with the highest bounds, where their own
    bounds are above that. The best few get the full search of ``asym_ea.balance``.

    Args:
        question: what is to be trained.
        cluster: on what.
        kinds: what its GPUs cost.
        thorough: whether placements are searched in full.
        tell: called with what comes next, in words.
        most: options that are simulated.
    """
    tell("listing layouts")
    considered = list(options(question, cluster, kinds, question.ways[:1]))
    fitting = _by_turns(_highest_first(considered))
    priced, simulated = _simulate(fitting, question, most, 0.0, tell)
    if len(question.ways) > 1:
        reached = max((one.tokens_per_second for one in priced), default=0.0)
        tell("listing pipelines and shared experts")
        special = list(variants(_by_bound(considered)[:_VARIED], question, cluster, kinds) if priced else
                       options(question, cluster, kinds, question.ways[1:]))
        highest = [option for option in _highest_first(special) if option.bound > reached]
        considered, fitting = considered + special, fitting + highest
        more, count = _simulate(_by_turns(highest), question, _STAGED if most == _QUICK else _STAGED // 2, reached, tell)
        priced, simulated = priced + more, simulated + count
    priced.sort(key=_fastest)
    if thorough:
        tell("placing experts of the best layouts")
        priced = _thoroughly(priced)
    by_layout: dict[tuple, Priced] = {}
    for one in priced:
        option = one.option
        by_layout.setdefault((option.attention, option.expert, option.groups, option.group.tensor,
                              option.group.expert_tensor, option.stage_layers), one)
    best = list(by_layout.values())
    if thorough and best:
        best[0] = _with_weight_tasks(best[0], question.weight_gradients)
    return Found(tuple(best), len(considered), len(fitting), simulated)


def _highest_first(considered: list[Option]) -> list[Option]:
    """The options that fit, by their bounds. Copies of a layout with more ZP groups have the same bound; the smaller groups
    waste less on what does not divide."""
    return _sorted(option for option in considered if option.fits(1))


def _by_bound(considered: list[Option]) -> list[Option]:
    """An option of each layout, whether or not it fits, some of each sort among the first."""
    layouts = {(option.attention, option.expert, option.groups, option.group.tensor): option for option in reversed(considered)}
    return _by_turns(_sorted(layouts.values()))


def _sorted(found: Iterable[Option]) -> list[Option]:
    return sorted(found, key=lambda option: (-float(f"{option.bound:.2g}"), option.group.members, -option.bound))


def _simulate(
    fitting: list[Option], question: Question, most: int, reached: float, tell: Callable[[str], None]
) -> tuple[list[Priced], int]:
    """Prices options one after the other, at most so many of those whose bound is above what was ``reached``, in tokens a
    second. Returns them, and how many were looked at."""
    priced: list[Priced] = []
    simulated = 0
    for option in fitting:
        if simulated == most:
            break
        if option.bound <= reached:
            continue
        simulated += 1
        tell(f"simulating layout {simulated} of at most {min(len(fitting), most)}: {option.describe()}")
        found = _staged_wave(option) if option.stage_layers else _best_wave(option, question.schedules, reached)
        priced += found
        reached = max([reached, *(one.tokens_per_second for one in found)])
    return priced, simulated


def _by_turns(fitting: list[Option]) -> list[Option]:
    """By their bounds, and by turns with these the first option of each sort, then the second ones, and so on.

    Bounds of alike layouts are close to each other and far above what any of them reaches where ramps are long, so by
    bounds alone all that are simulated may be of one sort. A sort is which pools do what, and how many ranks share a
    microbatch.
    """
    seen: Counter[tuple] = Counter()
    turns = {}
    for option in fitting:
        sort = (tuple(name for name, _ in option.attention), tuple(name for name, _ in option.expert), option.group.tensor,
                option.group.expert_tensor, len(option.stages))
        turns[id(option)] = seen[sort]
        seen[sort] += 1
    sorts = sorted(fitting, key=lambda option: turns[id(option)])
    return list({id(option): option for pair in zip(fitting, sorts) for option in pair}.values())


def _with_weight_tasks(one: Priced, choices: tuple[str, ...]) -> Priced:
    """The same with W tasks, where these shorten the step by more than they may cost."""
    found = [make(one) for name, make in ((DELAYED, _delayed), (MERGED, _merged)) if name in choices]
    best = min((other for other in found if other is not None), key=_fastest, default=one)
    return best if best.assignment.seconds <= _WORTH_A_DELAY * one.assignment.seconds else one


def _merged(one: Priced) -> Priced | None:
    """With one W task for a layer and a wave; where experts take less of the step, others of them may move. None for
    pipelines, whose placement is that of each stage by itself."""
    if one.option.stage_layers:
        return None
    limits = one.option.limits(one.wave, one.schedule, MERGED)[0]
    assignment = balance(one.option.group, limits, one.wave, True, one.schedule, MERGED)
    return assignment and replace(one, assignment=assignment, tokens_per_second=one.option.tokens / assignment.seconds,
                                  weight_gradients=MERGED)


def _delayed(one: Priced) -> Priced | None:
    """With a W task for each B task, in the same placement; None where ranks share attention, or a step is long."""
    group, placement = one.option.group, placement_of(one.assignment.experts)
    if group.shape.layers * group.step.microbatches > LONG or group.tensor > 1:
        return None
    if one.option.stage_layers:
        stages = scheduled(one.option.stages, one.assignment.experts, one.wave, group.step.microbatches, DELAYED)
        seconds = simulate_stages(stages)[0].seconds
    else:
        orders = build(one.schedule, group.shape.layers, placement, group.attention_members, group.step.microbatches,
                       one.wave, weight_gradients=DELAYED)
        seconds = simulate(orders, TaskCosts(group, placement, DELAYED)).seconds
    assignment = replace(one.assignment, seconds=seconds)
    return replace(one, assignment=assignment, tokens_per_second=one.option.tokens / seconds, weight_gradients=DELAYED)


def _thoroughly(priced: list[Priced], least: int = _THOROUGH) -> list[Priced]:
    """The fastest priced with all that a schedule has, at least so many and so on until the fastest of all is one of these: the
    quick figures leave out what channels take from each other, so they are lower."""
    full: list[Priced] = []
    quick = list(priced)
    while quick and (len(full) < least or _fastest(quick[0]) < min(map(_fastest, full))):
        one = quick.pop(0)
        if one.option.stage_layers and full and _fastest(one) > min(map(_fastest, full)):
            full.append(one)  # its first figure is rather too high
            continue
        full += filter(None, [_price(one.option, one.wave, one.schedule, thorough=True)])
    return sorted((*full, *quick), key=_fastest)


def _fastest(one: Priced) -> tuple[float, int, bool]:
    """Sorts the fastest first, and of equals the one that needs fewer GPUs, and less memory. A pipeline must be faster by more
    than its first figure may be off."""
    speed = one.tokens_per_second * (_WORTH_STAGES if one.option.stage_layers else 1)
    return -speed, sum(one.option.used().values()), one.schedule != "zebra"


def _best_wave(option: Option, schedules: tuple[str, ...], to_beat: float) -> list[Priced]:
    """The option with the largest wave that fits and with smaller ones, while these are faster: a smaller wave has more
    ramps, but leaves more room for experts where they are done sooner. Each also with the ramps filled by the next
    wave, where there is one, its first layer fits beside, and that could make it faster than ``to_beat``, in tokens a
    second."""
    total = option.group.step.microbatches
    priced: list[Priced] = []
    reached = 0.0
    # Waves are as equal as can be, so only these sizes differ.
    for wave in sorted({-(-total // count) for count in range(-(-total // option.wave), total + 1)}, reverse=True):
        found = [one] if (one := _price(option, wave, "zebra", thorough=False)) else []
        if wave < total and "overlapped" in schedules and (not one or one.tokens_per_second * _OVERLAPPED > to_beat):
            found += filter(None, [_price(option, wave, "overlapped", thorough=False)])
        if not found:
            continue
        priced += found
        fastest = max(one.tokens_per_second for one in found)
        if fastest < reached:
            break
        reached = fastest
    return priced


def _staged_wave(option: Option) -> list[Priced]:
    """A pipeline with the wave that is fastest by a first figure: large ones keep other stages waiting, small ones have more
    ramps."""
    total = option.group.step.microbatches
    best = None
    for wave in sorted({-(-total // count) for count in range(-(-total // option.wave), total + 1)}, reverse=True):
        seconds = quick_seconds(option.stages, option.limits(wave), wave)
        if seconds is None:
            continue
        if best is not None and seconds >= best[0]:
            break
        best = seconds, wave
    return list(filter(None, [_price(option, best[1], "zebra", thorough=False)])) if best else []


def _price(option: Option, wave: int, schedule: str, thorough: bool) -> Priced | None:
    limits = option.limits(wave, schedule)
    if min(min(of_stage.pairs) for of_stage in limits) < 0:
        return None
    if option.stage_layers:
        assignment = balance_stages(option.stages, limits, wave, thorough)
    else:
        assignment = balance(option.group, limits[0], wave, thorough, schedule)
    if assignment is None:
        return None
    return Priced(option, wave, assignment, option.tokens / assignment.seconds, schedule=schedule)


@dataclass(frozen=True)
class LeftOut:
    """GPUs that the best plan does not use.

    Attributes:
        pool: theirs.
        gpus: how many.
        reason: why.
    """

    pool: str
    gpus: int
    reason: str


def left_out(found: Found, cluster: Cluster) -> list[LeftOut]:
    """The GPUs that the best plan leaves idle, with reasons."""
    best = found.best[0]
    used = best.option.used()
    result = []
    for name, pool in cluster.pools.items():
        waiting = best.without_work().get(name, 0)
        if waiting:
            result.append(LeftOut(name, waiting, f"they hold no expert in the fastest placement: {_of_one_expert(best, name)}, so "
                                                 "the others could train without them"))
        idle = pool.gpus - used.get(name, 0)
        if not idle:
            continue
        with_more = [one for one in found.best if one.option.used().get(name, 0) > used.get(name, 0)]
        if with_more:
            other = with_more[0]
            slower = 1 - other.tokens_per_second / best.tokens_per_second
            reason = f"with more of them, {other.option.describe()} is {slower:.1%} slower"
        elif name not in used:
            reason = "no layout that uses them was fast enough to be simulated"
        else:
            reason = "they do not divide into the ZP groups for which the global batch divides"
        result.append(LeftOut(name, idle, reason))
    return result


def _of_one_expert(best: Priced, pool: str) -> str:
    """What an expert on each expert rank of a pool would take, beside one on an attention rank."""
    import numpy as np

    group = best.option.group
    members = [member for member in _members(group, EXPERT) if group.seats[member].pool.name == pool]
    held = np.zeros(group.members)
    held[members[:group.shape.experts]] = 1
    sent = 2 * sum(group.latency + float(group.link_seconds(kind, Stream.OUT, held).max())
                   for kind in (TaskKind.DISPATCH, TaskKind.COMBINE))
    there, here = (1e3 * sum(group.expert[member]) for member in (members[0], 0))
    return f"one each takes {1e3 * sent:.1f} ms of a layer and microbatch to send and {there:.1f} to compute, on an attention rank " \
           f"{here:.1f} to compute"


def after_losing_a_node(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], best: Priced | None = None
) -> dict[str, Priced | None]:
    """For each pool, a good plan when one of its nodes is gone, of fewer layouts than ``search`` looks at; None when nothing
    fits then. Of pipelines and shared experts only such are looked at as the best plan with all nodes has."""
    result = {}
    if best is None or best.option.is_plain:
        question = question.plain
    else:
        like = best.option.stage_layers, best.option.group.expert_tensor
        question = replace(
            question, stage_layers=tuple(one for one in question.stage_layers if one in (question.stage_layers[0], like[0])),
            expert_tensor=tuple(one for one in question.expert_tensor if one in (question.expert_tensor[0], like[1])))
    question = replace(question, schedules=("zebra",))
    for name in cluster.pools:
        rest = cluster.without_node(name)
        found = search(question, rest, kinds, thorough=False, most=_FEW)
        best_left = list(found.best)
        if best_left and best_left[0].option.stage_layers:
            best_left = _thoroughly(best_left, 1)  # first figures of pipelines may be far too low
        result[name] = best_left[0] if best_left else None
    return result


def with_fewer_nodes(found: Found, lost: Mapping[str, Priced | None]) -> Found:
    """The same, headed by a plan that ``after_losing_a_node`` came to, where one is faster: it is one for all nodes too, of a
    layout that has fewer ranks than the nodes allow."""
    best = found.best[0]
    for one in filter(None, lost.values()):
        if one.tokens_per_second > best.tokens_per_second:
            one = _thoroughly([one], 1)[0]
            best = one if one.tokens_per_second > best.tokens_per_second else best
    return found if best is found.best[0] else replace(found, best=(best, *found.best))


def fits(question: Question, cluster: Cluster, kinds: Mapping[str, Kind]) -> bool:
    """Whether any layout holds the model."""
    return any(option.fits(1) for ways in (question.ways[:1], question.ways[1:])
               for option in options(question, cluster, kinds, ways))


def smaller(question: Question, layers: int) -> Question:
    """The same model with that many layers, and as many as before that predict further tokens."""
    shape = question.shape
    fewer = shape.decoder_layers - layers
    own = tuple(layer for layer in shape.moe_layers if layer <= layers)
    further = tuple(layer - fewer for layer in shape.moe_layers if layer > shape.decoder_layers)
    shape = replace(shape, layers=shape.layers - fewer, moe_layers=(*own, *further))
    stage_layers = question.stage_layers
    if stage_layers != ((),):
        # As many stages as were asked for, or may be.
        counts = {len(one) for one in stage_layers}
        stage_layers = tuple(one for one in ((), *divisions(shape)) if len(one) in counts) or ((),)
    return replace(question, shape=shape, stage_layers=stage_layers)
