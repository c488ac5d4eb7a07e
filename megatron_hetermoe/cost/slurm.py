"""What a cluster file says of Slurm: options of sbatch, for a pool or for every job."""

from __future__ import annotations

import re
from typing import Any

from megatron_hetermoe.config.errors import Problems

# What the layout decides, or the batch script relies on.
_OURS = ("nodes", "ntasks", "ntasks-per-node", "requeue", "no-requeue", "signal", "open-mode", "distribution", "array",
         "het-group", "wrap")
_NAME = re.compile(r"[a-z][a-z-]+")
_EXAMPLE = "slurm: {partition: new, constraint: a40}"


def slurm_options(entry: Any, where: str, problems: Problems) -> dict[str, str]:
    """The options of a ``slurm`` key: names without dashes, with their values as text, "" for a bare one.

    Args:
        entry: as YAML gives it: a mapping of names to text, numbers, or true for a bare option; None for none.
        where: file and pool, for messages.
        problems: gets what does not fit.
    """
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        problems.add(f"{where}: slurm is not a mapping of sbatch's options; write it as {_EXAMPLE}")
        return {}
    options = {}
    for name, value in entry.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.add(f"{where}, slurm: {name!r} is no long option of sbatch; write it as {_EXAMPLE}")
        elif name in _OURS:
            problems.add(f"{where}, slurm: {name} is decided by the layout or the batch script; leave it out")
        elif value is True:
            options[name] = ""
        elif isinstance(value, bool) or not isinstance(value, (str, int)) or any(
            ord(letter) < 32 for letter in str(value)
        ):
            problems.add(f"{where}, slurm: {name} is {value!r}; it must be text on one line, a whole number, or true "
                         "for an option without a value")
        elif name == "time" and isinstance(value, int):
            problems.add(f"{where}, slurm: time is {value}, as YAML reads it: write it with quotes, as \"24:00:00\"")
        else:
            options[name] = str(value)
    return options
