"""Which rank has which role, in which ZP group, and which ranks reduce with each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hetermoe.config.plan import Plan

ATTENTION = "attention"
EXPERT = "expert"
MOST_RANKS = 1_000_000  # of a role; more are a slip of the pen, and would be listed one by one


@dataclass(frozen=True)
class Layout:
    """G ZP groups of M attention and N expert ranks, in each of P pipeline stages.

    Attention ranks come first in global rank order, then expert ranks, in each pool stage by stage, as Megatron has
    them, and there group by group: nodes are of one kind and launchers number node by node. A *member* is a rank's
    index inside its ZP group: attention ranks are 0 to M-1, expert ranks M to M+N-1. ZP groups are numbered in the
    same order: stage by stage.

    Ranks next to each other share matrices, each with a part of every one: ``tensor`` attention ranks share the dense
    part and a microbatch, ``expert_tensor`` expert ranks share experts, and are one *holder* together. ``context`` such
    tensor-parallel groups next to each other, each with all of the dense part, have parts of one sequence. An attention
    rank is a holder by itself. Holders are numbered like members, attention ranks first.

    Attributes:
        attention_ranks: P x G x M.
        expert_ranks: P x G x N.
        groups: G, the ZP groups of a stage.
        tensor: attention ranks of one tensor-parallel group; divides M.
        expert_tensor: expert ranks of one holder; divides N.
        context: tensor-parallel groups that have parts of one sequence; ``tensor`` times it divides M.
        stages: P; each has a part of the layers.
    """

    attention_ranks: int
    expert_ranks: int
    groups: int = 1
    tensor: int = 1
    expert_tensor: int = 1
    context: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        assert not layout_problems(
            self.attention_ranks, self.expert_ranks, self.groups, self.tensor, self.expert_tensor, self.context,
            self.stages,
        )

    @property
    def m(self) -> int:
        """M: attention ranks of one ZP group."""
        return self.attention_ranks // (self.groups * self.stages)

    @property
    def n(self) -> int:
        """N: expert ranks of one ZP group."""
        return self.expert_ranks // (self.groups * self.stages)

    @property
    def world_size(self) -> int:
        return self.attention_ranks + self.expert_ranks

    @property
    def replicas(self) -> int:
        """Copies of the dense part."""
        return self.attention_ranks // (self.tensor * self.stages)

    @property
    def microbatches(self) -> int:
        """Microbatches that attention ranks work on at once."""
        return self.replicas // self.context

    @property
    def holders(self) -> int:
        """Holders of one ZP group."""
        return self.m + self.n // self.expert_tensor

    def role(self, rank: int) -> str:
        """ATTENTION or EXPERT."""
        assert 0 <= rank < self.world_size
        return ATTENTION if rank < self.attention_ranks else EXPERT

    def pool(self, role: str) -> range:
        """The global ranks of a role."""
        return range(self.attention_ranks) if role == ATTENTION else range(self.attention_ranks, self.world_size)

    def group_of(self, rank: int) -> int:
        """The ZP group that a rank belongs to, of those of all stages."""
        if self.role(rank) == ATTENTION:
            return rank // self.m
        return (rank - self.attention_ranks) // self.n

    def stage_of(self, rank: int) -> int:
        """The pipeline stage that a rank is in, from 0 on."""
        return self.group_of(rank) // self.groups

    def stage_ranks(self, role: str, stage: int) -> range:
        """The global ranks of a role in one stage."""
        pool = self.pool(role)
        size = len(pool) // self.stages
        return pool[stage * size:(stage + 1) * size]

    def member_of(self, rank: int) -> int:
        """A rank's index inside its ZP group."""
        if self.role(rank) == ATTENTION:
            return rank % self.m
        return self.m + (rank - self.attention_ranks) % self.n

    def holder_of(self, rank: int) -> int:
        """The holder of its ZP group that a rank is, or is a part of."""
        member = self.member_of(rank)
        return member if member < self.m else self.m + (member - self.m) // self.expert_tensor

    def members_of(self, holder: int) -> tuple[int, ...]:
        """The members of a ZP group that are a holder together."""
        if holder < self.m:
            return (holder,)
        first = self.m + (holder - self.m) * self.expert_tensor
        return tuple(range(first, first + self.expert_tensor))

    def rank_of(self, group: int, member: int) -> int:
        """The global rank of a ZP group's member: the inverse of group_of and member_of."""
        if member < self.m:
            return group * self.m + member
        return self.attention_ranks + group * self.n + member - self.m

    def zp_group(self, group: int) -> tuple[int, ...]:
        """A ZP group's global ranks, in the order of its members. Both channels span all of them."""
        return tuple(self.rank_of(group, member) for member in range(self.m + self.n))

    def zp_groups(self) -> tuple[tuple[int, ...], ...]:
        """All ZP groups."""
        return tuple(self.zp_group(group) for group in range(self.stages * self.groups))

    def pipeline_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """The ranks at one place of each stage: attention ranks hand over to the next of theirs."""
        return tuple(zip(*(self.stage_ranks(role, stage) for stage in range(self.stages))))

    def tensor_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that share a copy of a role's dense part. An expert rank has none, and is alone."""
        return _runs(self.pool(role), self.tensor if role == ATTENTION else 1)

    def data_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that have the same part of a role's dense part, whichever ZP group they are in, since each has
        its own tokens. Expert ranks have no dense part; the group carries their stage's control."""
        return self._same_place(role, self.tensor if role == ATTENTION else 1)

    def context_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that have parts of one sequence and the same part of the dense part."""
        if role == EXPERT:
            return self.tensor_parallel(role)
        together = _runs(self.pool(role), self.tensor * self.context)
        return tuple(ranks[place::self.tensor] for ranks in together for place in range(self.tensor))

    def expert_tensor_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """The ranks of a role that are a holder together."""
        return _runs(self.pool(role), self.expert_tensor if role == EXPERT else 1)

    def expert_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """For each ZP group, and each place in a holder, the ranks of a role that hold the group's experts."""
        size, share = (self.n, self.expert_tensor) if role == EXPERT else (self.m, 1)
        return tuple(
            ranks[place::share] for ranks in _runs(self.pool(role), size) for place in range(share)
        )

    def expert_data_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """For each place of a role in its ZP group, the ranks at this place in all groups: they have the same parts of
        the same experts, so they reduce the experts' gradients with each other."""
        return self._same_place(role, self.n if role == EXPERT else self.m)

    def _same_place(self, role: str, length: int) -> tuple[tuple[int, ...], ...]:
        """For each stage, and each place in its runs of so many ranks, the ranks at that place."""
        return tuple(
            ranks for stage in range(self.stages) for ranks in zip(*_runs(self.stage_ranks(role, stage), length))
        )


def layout_of(plan: Plan) -> Layout:
    """The layout that a plan decides."""
    return Layout(
        plan.attention_ranks, plan.expert_ranks, plan.groups, plan.tensor_parallel, plan.expert_tensor_parallel,
        plan.context_parallel, plan.stages,
    )


def layout_problems(
    attention_ranks: int, expert_ranks: int, groups: int, tensor: int = 1, expert_tensor: int = 1, context: int = 1,
    stages: int = 1,
) -> list[str]:
    """What keeps these numbers from being a layout, one sentence each."""
    if groups < 1:
        return [f"{groups} ZP groups: a layout needs at least one"]
    problems = []
    for name, ranks, shares in (
        ("attention", attention_ranks, (tensor, context)), ("expert", expert_ranks, (expert_tensor,))
    ):
        share = math.prod(shares)
        unit = stages * groups * share
        if min(shares) < 1:
            problems.append(f"tensor or context parallelism of {min(shares)} {name} ranks: it must be 1 or more")
        elif ranks < 1:
            problems.append(f"a layout needs at least one {name} rank")
        elif ranks > MOST_RANKS:
            problems.append(f"{ranks} {name} ranks: a layout has at most {MOST_RANKS:,}")
        elif ranks % unit:
            lower = ranks // unit * unit
            fits = f"{lower} or {lower + unit}" if lower else str(unit)
            each = f", each of them into groups of {share} that tensor or context parallelism puts together" \
                if share > 1 else ""
            of_stages = f" in each of {stages} pipeline stages" if stages > 1 else ""
            problems.append(f"{ranks} {name} ranks do not divide into {groups} ZP groups{of_stages}{each}; take {fits} "
                            "of them")
    return problems


def stage_problems(plan: Plan) -> list[str]:
    """What keeps a plan's layers and schedule from being divided into its pipeline stages, one sentence each."""
    problems = []
    further = plan.model.mtp_layers
    own = (*plan.stage_layers[:-1], plan.stage_layers[-1] - further) if plan.stage_layers else ()
    if own and (sum(own) != plan.model.decoder_layers or min(own) < 1):
        beside = f" beside the {further} that predict further tokens" if further else ""
        problems.append(f"pipeline stages of {', '.join(map(str, own))} layers do not make up the model's "
                        f"{plan.model.decoder_layers}{beside}, at least one each: change --pipeline-model-parallel-size or what "
                        "each stage has (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers, "
                        "--pipeline-model-parallel-layout)")
    if plan.schedule == "overlapped" and plan.stages > 1:
        problems.append(f"overlapped waves are not supported with {plan.stages} pipeline stages, where 1F1B has a wave's "
                        "forward beside another one's backward already: use --hetermoe-schedule zebra")
    return problems


def _runs(ranks: range, length: int) -> tuple[tuple[int, ...], ...]:
    """Ranks in groups of so many next to each other."""
    return tuple(tuple(ranks[first:first + length]) for first in range(0, len(ranks), length))
