"""``hetermoe train --emulate``: which part of one GPU each rank has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_hetermoe.config.errors import Problems

ROLES = ("attention", "expert")
EXAMPLE = "attention=2x26%,expert=2x24%"  # in which an H200 computes right (docs/one-gpu.md)
_PART = re.compile(r"(?P<role>[^=]*)=(?P<ranks>[0-9]{1,6})x(?P<percent>[0-9]{1,6})%?")


@dataclass(frozen=True)
class Shares:
    """A mixed cluster on one GPU.

    Attributes:
        ranks: of each role, by its name.
        percent: of the GPU's multiprocessors that a rank of each role has, by its name.
    """

    ranks: dict[str, int]
    percent: dict[str, int]

    @property
    def by_rank(self) -> tuple[int, ...]:
        """Percent of every rank, attention ranks first."""
        return tuple(self.percent[role] for role in ROLES for _ in range(self.ranks[role]))

    def __str__(self) -> str:
        return ",".join(f"{role}={self.ranks[role]}x{self.percent[role]}%" for role in ROLES)


def parse_shares(text: str, problems: Problems) -> Shares | None:
    """Reads ``ROLE=RANKSxPERCENT%`` for both roles, with a comma between them.

    Args:
        text: as EXAMPLE.
        problems: gets what cannot be read, roles that are unknown, missing or there twice, and shares that no GPU has.

    Returns:
        None where something could not be read.
    """
    before = len(problems)
    ranks, percent = {}, {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            problems.add(f"--emulate has {part.strip()!r}; write ROLE=RANKSxPERCENT%, as in {EXAMPLE}")
            continue
        role = match["role"].strip()
        if role not in ROLES or role in ranks:
            problems.add(f"--emulate has the role {role!r}{' twice' if role in ranks else ''}; name attention and expert, "
                         f"each once, as in {EXAMPLE}")
            continue
        ranks[role], percent[role] = int(match["ranks"]), int(match["percent"])
        if ranks[role] < 1 or not 1 <= percent[role] <= 100:
            problems.add(f"--emulate has {part.strip()!r}; it takes 1 or more ranks, each with 1 to 100% of the GPU")
    missing = [role for role in ROLES if role not in ranks]
    if len(problems) == before and missing:
        problems.add(f"--emulate says nothing of {' and '.join(missing)} ranks; name both roles, as in {EXAMPLE}")
    if len(problems) > before:
        return None
    shares = Shares(ranks, percent)
    if sum(shares.by_rank) > 100:
        problems.add(f"--emulate gives away {sum(shares.by_rank)}% of the GPU; ranks that wait for each other's "
                     "multiprocessors are no cluster: lower ranks or shares until they add up to 100% or less")
    return shares
