"""Which rank has which role, in which ZP group, and which ranks reduce with each other."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = "attention"
EXPERT = "expert"


@dataclass(frozen=True)
class Layout:
    """G ZP groups of M attention and N expert ranks.

    Attention ranks come first in global rank order, then expert ranks, group by group in each pool: nodes are of
    one kind and launchers number node by node. A *member* is a rank's index inside its ZP group: attention
    ranks are 0 to M-1, expert ranks M to M+N-1.

    Attributes:
        attention_ranks: G x M.
        expert_ranks: G x N.
        groups: G.
    """

    attention_ranks: int
    expert_ranks: int
    groups: int = 1

    def __post_init__(self) -> None:
        assert not layout_problems(self.attention_ranks, self.expert_ranks, self.groups)

    @property
    def m(self) -> int:
        """M: attention ranks of one ZP group."""
        return self.attention_ranks // self.groups

    @property
    def n(self) -> int:
        """N: expert ranks of one ZP group."""
        return self.expert_ranks // self.groups

    @property
    def world_size(self) -> int:
        return self.attention_ranks + self.expert_ranks

    def role(self, rank: int) -> str:
        """ATTENTION or EXPERT."""
        assert 0 <= rank < self.world_size
        return ATTENTION if rank < self.attention_ranks else EXPERT

    def pool(self, role: str) -> range:
        """The global ranks of a role."""
        return range(self.attention_ranks) if role == ATTENTION else range(self.attention_ranks, self.world_size)

    def group_of(self, rank: int) -> int:
        """The ZP group that a rank belongs to."""
        if self.role(rank) == ATTENTION:
            return rank // self.m
        return (rank - self.attention_ranks) // self.n

    def member_of(self, rank: int) -> int:
        """A rank's index inside its ZP group."""
        if self.role(rank) == ATTENTION:
            return rank % self.m
        return self.m + (rank - self.attention_ranks) % self.n

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
        return tuple(self.zp_group(group) for group in range(self.groups))

    def data_parallel(self, role: str) -> tuple[int, ...]:
        """The ranks that share the weights of a role's dense part: the whole pool, since each attention rank has
        its own microbatches. Expert ranks have no dense part; the group carries their pool's control."""
        return tuple(self.pool(role))

    def expert_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """For each ZP group, the ranks of a role that hold its experts."""
        members = range(self.m) if role == ATTENTION else range(self.m, self.m + self.n)
        return tuple(tuple(self.rank_of(group, member) for member in members) for group in range(self.groups))

    def expert_data_parallel(self, role: str) -> tuple[tuple[int, ...], ...]:
        """For each holder of a role, the ranks that are this holder in the ZP groups: they hold the same experts,
        so they reduce the experts' gradients with each other."""
        return tuple(zip(*self.expert_parallel(role)))


def layout_problems(attention_ranks: int, expert_ranks: int, groups: int) -> list[str]:
    """What keeps these numbers from being a layout, one sentence each."""
    if groups < 1:
        return [f"{groups} ZP groups: a layout needs at least one"]
    problems = []
    for name, ranks in (("attention", attention_ranks), ("expert", expert_ranks)):
        if ranks < 1:
            problems.append(f"a layout needs at least one {name} rank")
        elif ranks % groups:
            lower, upper = ranks // groups * groups, (ranks // groups + 1) * groups
            fits = f"{lower} or {upper}" if lower else str(upper)
            problems.append(f"{ranks} {name} ranks do not divide into {groups} ZP groups; take {fits} of them")
    return problems
