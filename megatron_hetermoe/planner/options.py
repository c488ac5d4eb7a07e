"""The layouts that a cluster allows: which pools do what, how many ZP groups, how many ranks of each role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from megatron_hetermoe.config.plan import TOGETHER
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import RECOMPUTE, Step
from megatron_hetermoe.cost.cluster import Cluster, Kind
from megatron_hetermoe.cost.group import GroupCosts, seats_of
from megatron_hetermoe.planner.asym_ea import Limits, limits_of
from megatron_hetermoe.planner.memory import in_flight, member_memory, usable, waves_ahead
from megatron_hetermoe.planner.staged import layers_of
from megatron_hetermoe.schedule.tasks import Kind as TaskKind
from megatron_hetermoe.schedule.tasks import Stream

MOST_MEMBERS = 64  # ranks of a ZP group; larger ones only make each expert's tokens more and each transfer wider
Way = tuple[int, tuple[int, ...]]  # expert ranks that share an expert, layers of each pipeline stage
_A, _E, _BOTH, _UNUSED = "attention", "expert", "both", "unused"


@dataclass(frozen=True)
class Question:
    """What is to be trained.

    Attributes:
        shape: the model's.
        precision: of parameters and activations.
        micro_batch: sequences of one microbatch.
        global_batch: sequences of a step.
        vocabulary: rows of the output layer.
        recompute: choices, from the least recomputation on.
        distributed_optimizer: choices, the user's first.
        tensor: choices of how many attention ranks share the dense weights and a microbatch.
        weight_gradients: choices, of ``config.plan.WEIGHT_GRADIENTS``.
        activation_again: choices, the first where expert ranks have room for a whole step.
        expert_tensor: choices of how many expert ranks share an expert.
        stage_layers: choices of the layers of each pipeline stage, or of each chunk, as in a plan; empty for one stage.
        schedules: choices, "zebra" and perhaps "overlapped", where a step has more than one wave.
        virtual_stages: chunks that each pipeline stage has.
        context: attention ranks, or groups of them that share weights, that have parts of one sequence.
        cuda_graphs: whether attention ranks replay what they compute between transfers.
    """

    shape: ModelShape
    precision: str
    micro_batch: int
    global_batch: int
    vocabulary: int
    recompute: tuple[str, ...] = RECOMPUTE
    distributed_optimizer: tuple[bool, ...] = (False, True)
    tensor: tuple[int, ...] = (1,)
    weight_gradients: tuple[str, ...] = (TOGETHER,)
    schedules: tuple[str, ...] = ("zebra", "overlapped")
    activation_again: tuple[bool, ...] = (False,)
    expert_tensor: tuple[int, ...] = (1,)
    stage_layers: tuple[tuple[int, ...], ...] = ((),)
    virtual_stages: int = 1
    context: int = 1
    cuda_graphs: bool = False

    def stages(self, stage_layers: tuple[int, ...]) -> int:
        """The number of pipeline stages that a choice has."""
        return max(1, len(stage_layers) // self.virtual_stages)

    @property
    def ways(self) -> tuple[Way, ...]:
        """Each of these choices with each; the first is the plain one, unless it is asked for otherwise."""
        return tuple(product(self.expert_tensor, self.stage_layers))

    @property
    def plain(self) -> Question:
        """The part of it that has the first way only."""
        return replace(self, expert_tensor=self.expert_tensor[:1], stage_layers=self.stage_layers[:1])


@dataclass(frozen=True)
class Option:
    """One layout with one way to do a step.

    Attributes:
        attention, expert: ranks of one ZP group by pool.
        groups: G.
        group: its costs, with all layers.
        stage_layers: of each pipeline stage, or each chunk; empty for one stage.
        virtual_stages: chunks of each stage.
    """

    attention: tuple[tuple[str, int], ...]
    expert: tuple[tuple[str, int], ...]
    groups: int
    group: GroupCosts
    stage_layers: tuple[int, ...] = ()
    virtual_stages: int = 1

    @cached_property
    def stages(self) -> tuple[GroupCosts, ...]:
        """The group's costs in each stage."""
        return self.group.of_stages(self.stage_layers, self.virtual_stages)

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The layers, from 1 on, of each stage."""
        return layers_of(self.stage_layers or (self.group.shape.layers,), self.virtual_stages)

    def ahead(self, stage: int) -> float:
        """Waves that a stage has on the way beside the one at hand."""
        return waves_ahead(stage, len(self.stages), self.virtual_stages)

    @property
    def m(self) -> int:
        return self.group.attention_members

    @property
    def n(self) -> int:
        return sum(count for _, count in self.expert)

    @property
    def is_plain(self) -> bool:
        """One stage, whole experts."""
        return len(self.stages) == self.group.expert_tensor == 1

    def used(self) -> dict[str, int]:
        """GPUs of each pool that take part."""
        used: dict[str, int] = {}
        for name, count in (*self.attention, *self.expert):
            used[name] = used.get(name, 0) + count * self.groups * len(self.stages)
        return used

    def describe(self) -> str:
        """In a few words, such as ``2 x (4 new attention + 3 old expert)``."""
        def ranks(role: str, pools: tuple[tuple[str, int], ...]) -> str:
            tensor, experts = self.group.tensor, self.group.expert_tensor
            shared = f", {tensor} a microbatch" if role == _A and tensor > 1 else ""
            shared += f", {self.group.context} parts of a sequence" if role == _A and self.group.context > 1 else ""
            shared += f", {experts} an expert" if role == _E and experts > 1 else ""
            return " + ".join(f"{count} {name}" for name, count in pools) + f" {role}{shared}"

        chunks = f" of {self.virtual_stages} chunks" if self.virtual_stages > 1 else ""
        stages = f"{len(self.stages)} stages{chunks} x " if self.stage_layers else ""
        return f"{stages}{self.groups} x ({ranks('attention', self.attention)}, {ranks('expert', self.expert)})"

    @property
    def tokens(self) -> int:
        """Of a step of all groups."""
        group = self.group
        return self.groups * group.replicas * group.step.microbatches * group.step.micro_batch * group.shape.sequence

    @cached_property
    def bound(self) -> float:
        """Tokens a second that the option cannot exceed, whatever the placement: the slowest stage's work, which begins
        when a microbatch has come through the stages before (with virtual stages through a part of them, which is not
        counted) and ends when its gradients have gone back."""
        known: dict[tuple, float] = {}
        sent = _channel_seconds(self.group)  # of a layer of any stage
        microbatches, before, slowest = self.group.step.microbatches, 0.0, 0.0
        for group in self.stages:
            key = group.begins, group.ends, group.shape
            if key not in known:
                known[key] = _microbatch_bound(group, sent) * microbatches + max(
                    group.optimizer(members[0], 0) for members in group.alike.values())
            slowest = max(slowest, before + known[key])
            before += 0.0 if group.chunks else min(
                sum(map(sum, group.attention[members[0]]))
                for (is_attention, _), members in group.alike.items() if is_attention)
        return self.tokens / slowest

    @cached_property
    def wave(self) -> int:
        """The most microbatches on their way for which an assignment of experts fits; 0 for none."""
        low, high = 0, self.group.step.microbatches
        if self.fits(high):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle - 1)
        return low

    def limits(self, wave: int, schedule: str = "zebra", weight_gradients: str = TOGETHER) -> tuple[Limits, ...]:
        """What fits in each stage, which has as many waves on the way as there are stages from it on."""
        return tuple(self._limits_of(stage, wave, schedule, weight_gradients) for stage in range(len(self.stages)))

    def _limits_of(self, stage: int, wave: int, schedule: str = "zebra", weight_gradients: str = TOGETHER) -> Limits:
        key, group = (stage, wave, schedule, weight_gradients), self.stages[stage]
        if key not in self._limits:
            flying = in_flight(schedule, wave, group.step.microbatches, group.shape.layers, self.ahead(stage))
            self._limits[key] = limits_of(group, flying, weight_gradients)
        return self._limits[key]

    @cached_property
    def _limits(self) -> dict[tuple[int, int, str, str], Limits]:
        """Those that were asked for: a search asks for some of them several times."""
        return {}

    def fits(self, wave: int) -> bool:
        """Whether all experts find room with that many microbatches of a step on their way."""
        return self.has_room or all(_hold(group, self._limits_of(stage, wave), range(group.members))
                                    for stage, group in enumerate(self.stages))

    @cached_property
    def has_room(self) -> bool:
        """Whether the expert ranks hold all experts with all of a step's microbatches on their way."""
        return all(_hold(group, self._limits_of(stage, self.group.step.microbatches), range(self.m, group.members))
                   for stage, group in enumerate(self.stages))

    def shortfall(self) -> float:
        """Bytes that all ranks of a group together lack, with one microbatch on its way; negative if it fits."""
        return max(map(_shortfall, self.stages))


def _hold(group: GroupCosts, limits: Limits, members: range) -> bool:
    """Whether these members have room for all experts of the group's layers, and all ranks for what is theirs anyway."""
    pairs = group.shape.experts * len(group.shape.moe_layers)
    return min(limits.pairs) >= 0 and limits.total(members) >= pairs


def _shortfall(group: GroupCosts) -> float:
    shape, ranks = group.shape, [1] * group.attention_members
    ranks += [group.expert_tensor] * (group.members - group.attention_members)
    lacking = sum(count * (member_memory(group, member, 0, 1).total - usable(group, member))
                  for member, count in enumerate(ranks))
    pair = [member_memory(group, member, len(shape.moe_layers), 1).total - member_memory(group, member, 0, 1).total
            for member in range(group.members)]
    return lacking + shape.experts * min(count * one for count, one in zip(ranks, pair))


def _microbatch_bound(group: GroupCosts, sent: float) -> float:
    """Seconds that a microbatch takes at least: no ramp, all work spread perfectly, the channels' bytes of the
    experts that attention ranks cannot take, and what an attention rank's host queues without experts. ``sent`` is what
    ``_channel_seconds`` says."""
    attention = {members: [sum(pair) for pair in zip(*group.attention[members[0]])]
                 for (is_attention, _), members in group.alike.items() if is_attention}
    worst = sum(max(layer) for layer in zip(*attention.values()))
    speeds = [1 / sum(pair) if sum(pair) else float("inf") for pair in group.expert]
    m, experts, layers = group.attention_members, group.shape.experts, len(group.shape.moe_layers)
    queueing = _queueing_seconds(group)
    if group.expert_tensor > 1:  # attention ranks hold no expert
        return max(experts * layers / sum(speeds[m:]), worst, sent * layers, queueing)
    free = sum(len(members) * speeds[members[0]] * sum(rest) for members, rest in attention.items())
    # All layers together, each rank always busy: sum(speed) * T = work, with attention first. An E task may run
    # beside another layer's attention, so only the sums over layers bind.
    balanced = (experts * layers + free) / sum(speeds)
    moved_share = max(0.0, balanced - worst) * sum(speeds[:m]) / (experts * layers)
    return max(balanced, worst, sent * layers * max(0.0, 1 - moved_share), queueing)


def _queueing_seconds(group: GroupCosts) -> float:
    """In which the slowest host of an attention rank queues its A tasks and all transfers of a microbatch."""
    if not group.has_host:
        return 0.0
    layer = 2 * sum(group.host_transfer(0, kind) for kind in (TaskKind.DISPATCH, TaskKind.COMBINE))
    return layer * len(group.shape.moe_layers) + max(sum(map(sum, passes)) for passes in group.host_attention)


def _channel_seconds(group: GroupCosts) -> float:
    """Of one layer on the busier channel, with all experts on expert ranks in proportion to their speed."""
    import numpy as np

    m = group.attention_members
    speeds = np.array([0.0] * m + [1 / max(1e-12, sum(pair)) for pair in group.expert[m:]])
    experts = group.shape.experts * speeds / speeds.sum()
    dispatch, combine = (
        float(group.link_seconds(kind, Stream.OUT, experts).max()) for kind in (TaskKind.DISPATCH, TaskKind.COMBINE)
    )
    return dispatch + combine


def options(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], ways: Sequence[Way] | None = None
) -> Iterator[Option]:
    """All layouts whose batch divides, with each way to do a step, whether or not they fit.

    Megatron asks that the global batch divides by micro batch x attention ranks, those that share a microbatch counted
    once; these sit on one node. A pool does attention, experts, both
    (its attention ranks first) or nothing; at most one pool does both. Attention in bf16 takes GPUs that have it.
    """
    ways = question.ways if ways is None else ways
    sequences = question.global_batch // question.micro_batch
    names = list(cluster.pools)
    seen = set()
    for roles in product((_A, _E, _BOTH, _UNUSED), repeat=len(names)):
        by_role = {role: [name for name, given in zip(names, roles) if given == role]
                   for role in (_A, _E, _BOTH)}
        if question.precision == "bf16" and not all(kinds[name].bf16 for name in (*by_role[_A], *by_role[_BOTH])):
            continue
        if not (by_role[_A] or by_role[_BOTH]) or not (by_role[_E] or by_role[_BOTH]) or len(by_role[_BOTH]) > 1:
            continue
        for groups, (shares, stage_layers) in product(_divisors(sequences), ways):
            each = {name: cluster.pools[name].gpus // (groups * question.stages(stage_layers)) for name in names}
            for replicas, tensor in product(_divisors(sequences // groups), question.tensor):
                split = _split(by_role, each, replicas * tensor * question.context, kinds, question)
                if split is None:
                    continue
                attention, expert = split
                if shares > 1:
                    expert = tuple((name, count - count % shares) for name, count in expert)
                members = sum(count for _, count in (*attention, *expert))
                layout = attention, expert, groups, tensor, shares, stage_layers
                if members > MOST_MEMBERS or layout in seen \
                        or not _may_share(question, cluster, attention, tensor) \
                        or shares > 1 and not _may_share_experts(question, cluster, expert, shares):
                    continue
                seen.add(layout)
                yield from _steps(question, cluster, kinds, *layout)


def variants(
    plain: Sequence[Option], question: Question, cluster: Cluster, kinds: Mapping[str, Kind]
) -> Iterator[Option]:
    """The question's other ways, on the ZP groups of layouts of its first way: of a layout's groups, several are the stages
    of a pipeline. So the work of a rank is the same; memory, ramps and what does not divide are not."""
    seen = set()
    for option in plain:
        for shares, stage_layers in question.ways[1:]:
            groups, left = divmod(option.groups * len(option.stages), question.stages(stage_layers))
            expert = tuple((name, count - count % shares) for name, count in option.expert)
            layout = option.attention, expert, groups, option.group.tensor, shares, stage_layers
            if left or layout in seen or shares > 1 and not _may_share_experts(question, cluster, expert, shares):
                continue
            seen.add(layout)
            yield from _steps(question, cluster, kinds, *layout)


def _may_share(question: Question, cluster: Cluster, attention: tuple[tuple[str, int], ...], tensor: int) -> bool:
    """Whether so many attention ranks of a ZP group can share a microbatch: what they split divides, and nodes do. Of a
    sequence each of those that have parts of it has two."""
    shape, together = question.shape, tensor * question.context
    divided = (shape.heads, shape.query_groups, shape.sequence, shape.dense_ffn, shape.shared_expert_ffn)
    parts = 2 * together if question.context > 1 else 1
    return not any(size % tensor for size in divided) and shape.sequence % parts == 0 and not any(
        count % together or cluster.pools[name].gpus_per_node % together for name, count in attention)


def _may_share_experts(question: Question, cluster: Cluster, expert: tuple[tuple[str, int], ...], shares: int) -> bool:
    """Whether so many expert ranks of a ZP group can share experts, and where it is a choice, should: when a layer's
    experts do not divide over the ranks, less of them is left over."""
    if question.shape.expert_ffn % shares or any(
            not count or cluster.pools[name].gpus_per_node % shares for name, count in expert):
        return False
    ranks, experts = sum(count for _, count in expert), question.shape.experts
    return len(question.expert_tensor) == 1 or -(-experts * shares // ranks) / shares < -(-experts // ranks)


def _steps(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], attention: tuple[tuple[str, int], ...],
    expert: tuple[tuple[str, int], ...], groups: int, tensor: int, shares: int, stage_layers: tuple[int, ...],
) -> Iterator[Option]:
    """A layout with each way to do a step. Where a pipeline is a choice, and one stage on the same ranks has room for a
    step as the user asks for it, there is none: stages only add ramps."""
    m = sum(count for _, count in attention)
    microbatches = question.global_batch // question.micro_batch // (groups * (m // (tensor * question.context)))
    base = None
    for recompute in question.recompute:
        if not all(kinds[name].has_recompute(recompute) for name, _ in attention):
            continue
        for distributed in question.distributed_optimizer:
            step = Step(question.micro_batch, microbatches, question.vocabulary, recompute, distributed, cuda_graphs=question.cuda_graphs)
            if base is None:
                seats = seats_of([name for name, count in (*attention, *expert) for _ in range(count)], cluster, kinds)
                base = GroupCosts(question.shape, step, (*seats[:m], *seats[m::shares]), m, groups, question.precision,
                                  tensor, shares, context=question.context)
                if stage_layers and len(question.stage_layers) > 1 and _roomy(base, question.stages(stage_layers)):
                    return
            for again in (False,) if recompute == "full" else question.activation_again:
                if again and not all(seat.kind.has_activation_again for seat in base.seats):
                    continue
                option = Option(attention, expert, groups,
                                replace(base, step=replace(step, activation_again=again)), stage_layers,
                                question.virtual_stages if stage_layers else 1)
                yield option
                if option.has_room:
                    break


def _roomy(group: GroupCosts, stages: int) -> bool:
    """Whether as many ZP groups more, in place of stages, have room for all layers and all of their microbatches."""
    microbatches = max(1, group.step.microbatches // stages)
    return _hold(group, limits_of(replace(group, groups=group.groups * stages), microbatches),
                 range(group.attention_members, group.members))


def _split(by_role, each, m, kinds, question) -> tuple[tuple, tuple] | None:
    """How m attention ranks of a group are taken from the pools, fastest first, and what is left for experts; None
    where it does not come out. A pool for attention alone gives what it has and leaves out the rest."""
    speed = {name: sum(kinds[name].attention(question.shape.sequence, "none")) for name in each}
    attention, left = [], m
    for name in sorted(by_role[_A], key=lambda name: speed[name]):
        count = min(left, each[name])
        if not count:
            return None  # a pool that gives no rank is another assignment of roles
        attention.append((name, count))
        left -= count
    for name in by_role[_BOTH]:
        if not 0 < left < each[name]:
            return None
        attention.append((name, left))
    if left and not by_role[_BOTH]:
        return None
    expert = [(name, each[name] - left) for name in by_role[_BOTH]]
    expert += [(name, each[name]) for name in by_role[_E]]
    if not expert or any(count < 1 for _, count in expert):
        return None
    return tuple(attention), tuple(expert)


def _divisors(number: int) -> list[int]:
    small = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})
