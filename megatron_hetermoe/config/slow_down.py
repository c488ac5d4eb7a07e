"""``--hetermoe-slow-down``: which tasks of which ranks are to take longer than they do."""

from __future__ import annotations

import math

from megatron_hetermoe.config.errors import Problems

_ROLES = _TASKS = ("attention", "expert")
_ON = "-on-"
EXAMPLE = "expert=1.25,attention=2,expert-on-attention=3"


def parse_slow_down(text: str, problems: Problems) -> dict[tuple[str, str], float]:
    """Reads ``ROLE=FACTOR`` for all that ranks of a role compute and ``TASK-on-ROLE=FACTOR`` for one kind of task there,
    which goes before; with commas between them.

    Args:
        text: as EXAMPLE.
        problems: gets what is no such pair and factors below 1.

    Returns:
        Factors by (task, role), both "attention" or "expert".
    """
    known = [*_ROLES, *(f"{task}{_ON}{role}" for task in _TASKS for role in _ROLES)]
    said: dict[str, float] = {}
    for pair in text.split(","):
        name, _, value = pair.strip().partition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if name not in known or not 1 <= factor < math.inf or name in said:
            problems.add(f"--hetermoe-slow-down has {pair.strip()!r}; write NAME=FACTOR once for each of "
                         f"{', '.join(known)}, with factors from 1 on, as in {EXAMPLE}")
        else:
            said[name] = factor
    return {
        (task, role): said.get(f"{task}{_ON}{role}", said.get(role, 1.0)) for task in _TASKS for role in _ROLES
    }
