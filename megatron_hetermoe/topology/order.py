"""Pool order: which rank each process of a launcher becomes, so that attention runs where it is meant to.

Launchers number processes by node, and know nothing of pools: torchrun's rendezvous numbers nodes as they come, Slurm
sorts their names. So processes tell each other where they are before any of them is a rank (``runtime/roll_call.py``).
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.topology.layout import ATTENTION, Layout

POOL_VARIABLE = "HETERMOE_POOL"  # a process's pool
POOLS_VARIABLE = "HETERMOE_POOLS"  # for all processes, the pools' patterns
_WAY_OUT = f"start as many as the layout has, or name each process's pool with {POOL_VARIABLE}"


@dataclass(frozen=True)
class Started:
    """A process, as its launcher started it.

    Attributes:
        gpu: kind of its GPU; empty without one.
        capability: compute capability of it, as 8.6; 0 without one.
        node: its machine's name.
        features: what else describes the machine, as Slurm's features do.
        pool: what HETERMOE_POOL says; empty when it is not set.
        engine: transformer-engine is installed there.
    """

    gpu: str = ""
    capability: float = 0.0
    node: str = ""
    features: tuple[str, ...] = ()
    pool: str = ""
    engine: bool = False

    def __str__(self) -> str:
        pool = f" ({self.pool})" if self.pool else ""
        return f"{self.gpu or 'no GPU'} of {self.node}{pool}"


def parse_patterns(text: str, problems: Problems) -> dict[str, tuple[str, ...]]:
    """Reads HETERMOE_POOLS, as ``attention=A40 expert=V100,old-*``: for each pool, what tells its processes.

    A pattern is a word of the GPU's or node's name or a feature (``A40`` is no word of ``RTX A4000``), or with ``*``,
    ``?`` the whole of one. Case does not count.
    """
    patterns = {}
    for part in text.split():
        pool, equals, terms = part.partition("=")
        found = tuple(term for term in terms.split(",") if term)
        if not pool or not equals or not found:
            problems.add(f"{POOLS_VARIABLE} has {part!r}; write it as `attention=A40 expert=V100,old-*`")
        patterns[pool] = found
    return patterns


def pool_order(
    started: Sequence[Started], layout: Layout, pools: Sequence[str], patterns: Mapping[str, Sequence[str]]
) -> tuple[int, ...]:
    """For each process, by the launcher's number, the rank that it becomes.

    What HETERMOE_POOL or the patterns say counts. Where they say nothing, kinds of GPU are given to pools of as many
    ranks, the newest kind to attention; where no numbers fit, the ranks take the kinds from the newest on. Processes of
    one pool stay in the launcher's order, and when all are alike so does everything.

    Args:
        started: all processes.
        layout: the roles.
        pools: for each member of a ZP group, its pool in the plan; empty when the plan names none. Then the roles are
            the pools.
        patterns: of ``parse_patterns``; empty when there are none.

    Raises:
        UsageError: when processes and pools do not fit.
    """
    assert len(started) == layout.world_size
    seats = [pools[layout.member_of(rank)] if pools else layout.role(rank) for rank in range(layout.world_size)]
    problems = Problems()
    names = _named(started, patterns, problems)
    problems.raise_if_any()
    if names:
        _check(names, seats, problems)
    elif len({one.gpu for one in started}) == 1:
        return tuple(range(layout.world_size))
    else:
        names = _by_kind(started, seats, layout, bool(pools), problems)
    problems.raise_if_any()
    if names is None:
        appearance = {one.gpu: index for index, one in reversed(list(enumerate(started)))}
        order = sorted(range(len(started)), key=lambda index: (-started[index].capability, appearance[started[index].gpu]))
        return tuple(order.index(index) for index in range(len(started)))
    free = {name: iter([rank for rank, seat in enumerate(seats) if seat == name]) for name in seats}
    return tuple(next(free[name]) for name in names)


def describe_order(started: Sequence[Started], ranks: Sequence[int]) -> str:
    """In one line, which ranks are where."""
    places = sorted(zip(ranks, map(str, started)))
    parts = []
    for place, group in itertools.groupby(places, key=lambda item: item[1]):
        numbers = [rank for rank, _ in group]
        parts.append(f"{numbers[0]}-{numbers[-1]} on {place}" if len(numbers) > 1 else f"{numbers[0]} on {place}")
    return ", ".join(parts)


def _named(
    started: Sequence[Started], patterns: Mapping[str, Sequence[str]], problems: Problems
) -> list[str] | None:
    """Each process's pool, as the user named it; None when nothing is named."""
    if not patterns:
        unnamed = [str(index) for index, one in enumerate(started) if not one.pool]
        if len(unnamed) == len(started):
            return None
        if unnamed:
            problems.add(f"{POOL_VARIABLE} is set for some processes, but not for {', '.join(unnamed)}: set it for all")
        return [one.pool for one in started]
    names = []
    for index, one in enumerate(started):
        fits = [one.pool] if one.pool else [
            pool for pool, terms in patterns.items() if any(_matches(term, one) for term in terms)
        ]
        if len(fits) != 1:
            described = ", ".join([repr(one.gpu), one.node, *one.features])
            problems.add(f"process {index} ({described}) is of {' and '.join(fits) or 'no pool'} by {POOLS_VARIABLE}: "
                         "change the patterns so that one fits")
        names.append(fits[0] if fits else "")
    return names


def _matches(term: str, one: Started) -> bool:
    texts = [text for text in (one.gpu, one.node, *one.features) if text]
    if set(term) & set("*?"):
        return any(fnmatch.fnmatchcase(text.lower(), term.lower()) for text in texts)
    # GeForce boards have a space in RTX 3090, which the names of kinds do not
    word = r"[ -]?".join(map(re.escape, re.split(r"(?<=[A-Za-z])(?=\d)", term)))
    return any(re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", text, re.IGNORECASE) for text in texts)


def _check(names: Sequence[str], seats: Sequence[str], problems: Problems) -> None:
    wanted, have = Counter(seats), Counter(names)
    for name in have.keys() - wanted.keys():
        problems.add(f"{POOL_VARIABLE} is {name!r}; the pools are {', '.join(dict.fromkeys(seats))}")
    if wanted != have and not problems:
        problems.add(f"the layout has {_counts(wanted)}, the launcher started {_counts(have)}: start as many")


def _by_kind(
    started: Sequence[Started], seats: Sequence[str], layout: Layout, planned: bool, problems: Problems
) -> list[str] | None:
    """Each process's pool by numbers and kinds of GPU; None when no numbers fit and the plan names no pools."""
    kinds, wanted = Counter(one.gpu for one in started), Counter(seats)
    capability = {one.gpu: one.capability for one in started}
    attention = Counter(seat for rank, seat in enumerate(seats) if layout.role(rank) == ATTENTION)
    fits = []
    if len(kinds) == len(wanted):
        for order in itertools.permutations(wanted):
            pool_of = dict(zip(kinds, order))
            if all(wanted[pool_of[kind]] == count for kind, count in kinds.items()):
                fits.append((sum(capability[kind] * attention[pool_of[kind]] for kind in kinds), pool_of))
    if fits:
        # Of equal ones the launcher's order: permutations begin with it, and max takes the first.
        pool_of = max(fits, key=lambda fit: fit[0])[1]
        return [pool_of[one.gpu] for one in started]
    if planned:
        problems.add(f"the plan has {_counts(wanted)}, the launcher started {_counts(kinds)}: {_WAY_OUT}")
    return None


def _counts(numbers: Mapping[str, int]) -> str:
    return " and ".join(f"{count} of {name or 'no GPU'}" for name, count in numbers.items())
