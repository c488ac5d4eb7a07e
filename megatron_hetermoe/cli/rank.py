"""``hetermoe rank``: one rank of a recipe, under a launcher that starts all of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from megatron_hetermoe import pretrain_gpt
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.recipe import load_recipe, override

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, in a folder that has a checkpoint
# What a recipe says of the checkpoint that it begins with, and what does not hold of the job's own.
_OF_THE_FIRST_START = ("--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-step", "--pretrained-checkpoint")
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "rank", help="run one rank of a recipe, under srun or torchrun", usage="hetermoe rank RECIPE.yaml [options] "
        "[-- Megatron's flags]", description="What a launcher starts for each rank, as `srun hetermoe rank R.yaml` or "
        "`torchrun ... -m megatron_hetermoe rank R.yaml`. It sets RANK, WORLD_SIZE and LOCAL_RANK, or is Slurm; "
        "MASTER_ADDR and MASTER_PORT say where the first one is.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint in the folder of --save, if one is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        take_place(os.environ)
        recipe = load_recipe(args.recipe, os.environ)
        argv = override(recipe.argv, args.overrides, args.drop)
        if args.resume:
            argv = resumed(argv)
    except UsageError as error:
        return pretrain_gpt.refuse(error)
    os.environ.update(recipe.env)
    return pretrain_gpt.main(argv)


def take_place(environ: MutableMapping[str, str]) -> None:
    """Sets what torch's launcher sets, from Slurm's variables, where nothing has set it.

    Raises:
        UsageError: when no launcher is there, or it does not say where rank 0 is.
    """
    problems = Problems()
    if "RANK" not in environ and all(name in environ for name in _SLURM.values()):
        for name, slurm in _SLURM.items():
            environ[name] = environ[slurm]
    missing = [name for name in _SLURM if name not in environ]
    if missing:
        problems.add(f"no launcher has set {', '.join(missing)}: start this with srun or torchrun, or all ranks on this "
                     "machine with `hetermoe train`")
    elif gone := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        problems.add(f"{' and '.join(gone)} not set: export the first node's name and a free port, the same for all "
                     "ranks; `hetermoe submit` writes a batch script that does")
    problems.raise_if_any()


def resumed(argv: Sequence[str]) -> list[str]:
    """The command line that goes on from the folder it saves to, or the same one while nothing is there.

    Raises:
        UsageError: when it saves nowhere.
    """
    folder = value_of(argv, "--save")
    if folder is None:
        raise UsageError(["--resume needs --save: without it there is nothing to go on from"])
    if not Path(folder, TRACKER).is_file():
        return list(argv)
    names = {word.partition("=")[0] for word in argv}
    return override(argv, ["--load", folder], [flag for flag in _OF_THE_FIRST_START if flag in names])


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag in either spelling, None where it is not given."""
    for index, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
    return None
