"""The words of a run's command line: what they say, and those that go on from a checkpoint or follow a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX
from megatron_hetermoe.config.plan import read_plan
from megatron_hetermoe.config.recipe import by_flag, override, value_of
from megatron_hetermoe.config.saved import TRACKER
from megatron_hetermoe.config.stages import SIZE, STAGE_FLAGS, stage_flags
from megatron_hetermoe.planner.resolve import PLANNED

# What a recipe says of the checkpoint that it begins with, and what does not hold of the job's own.
_OF_THE_FIRST_START = ("--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-step", "--pretrained-checkpoint")


def has_saved(argv: Sequence[str]) -> bool:
    """Whether a checkpoint is in the folder that a command line saves to.

    Raises:
        UsageError: when it saves nowhere.
    """
    folder = value_of(argv, "--save")
    if folder is None:
        raise UsageError(["--resume needs --save: without it there is nothing to go on from"])
    return Path(folder, TRACKER).is_file()


def resumed(argv: Sequence[str]) -> list[str]:
    """The command line that goes on from the folder it saves to, or the same one while nothing is there.

    Raises:
        UsageError: when it saves nowhere.
    """
    if not has_saved(argv):
        return list(argv)
    folder = value_of(argv, "--save")
    names = {word.partition("=")[0] for word in argv}
    return override(argv, ["--load", folder], [flag for flag in _OF_THE_FIRST_START if flag in names])


def decided_by_plan(argv: Sequence[str]) -> list[str]:
    """Those ``--hetermoe`` flags of a command line that a plan file stands for."""
    decided = {f"{PREFIX}-{name.replace('_', '-')}" for name in (*PLANNED, "placement", "plan")}
    return [flag for flag, _ in by_flag(argv, Problems()) if flag in decided]


def with_plan(argv: Sequence[str], path: str) -> list[str]:
    """The command line with a plan file in place of all that a plan decides, and with as many pipeline stages.

    Raises:
        UsageError: as ``read_plan``.
    """
    decided = set(decided_by_plan(argv))
    plan, words = read_plan(path), [f"{PREFIX}-plan", path]
    if value_of(argv, SIZE) != str(plan.stages) and not (plan.stages == 1 and value_of(argv, SIZE) is None):
        decided |= set(STAGE_FLAGS)
        words += stage_flags(plan.stage_layers, plan.virtual_stages, plan.model.mtp_layers)
    given = {word.partition("=")[0] for word in argv}
    return override(argv, words, sorted(decided & given))
