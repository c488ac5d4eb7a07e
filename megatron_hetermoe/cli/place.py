"""Which rank this process is, where a launcher has started one for each rank."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = range(20000, 30000)  # for jobs of Slurm, by their number: below those that Linux gives out by itself


def place_of_rank(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The variables by which torch and Megatron know their rank, or None where no launcher has started several.

    torchrun and its like set them. ``srun`` has names of its own, and says nothing of where ranks meet: that is the
    first node of its step, on a port that follows from the job, unless MASTER_ADDR and MASTER_PORT are set.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {name: environ[name] for name in _NAMES if name in environ}
    if "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    job = int(environ.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_PORTS[job % len(_PORTS)]),
    }


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: ``gpu07`` of ``gpu[07-09,12],cpu1``."""
    prefix, first, suffix = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes).groups()
    return prefix + (first or "") + suffix
