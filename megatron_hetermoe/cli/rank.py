"""``hetermoe rank``: one rank of a recipe, under a launcher that starts all of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from megatron_hetermoe import pretrain_gpt
from megatron_hetermoe.cli.words import resumed, with_plan
from megatron_hetermoe.config.errors import Problems, UsageError, tell
from megatron_hetermoe.config.recipe import Recipe, load_recipe, override

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "rank", help="run one rank of a recipe or script, under srun or torchrun", usage="hetermoe rank [SCRIPT.py] "
        "[RECIPE.yaml] [options] [-- Megatron's flags]", description="What a launcher starts for each rank, as `srun "
        "hetermoe rank R.yaml` or `torchrun ... -m megatron_hetermoe rank R.yaml`. It sets RANK, WORLD_SIZE and "
        "LOCAL_RANK, or is Slurm; MASTER_ADDR and MASTER_PORT say where the first one is.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="a recipe (.yaml), a training script (.py), or both")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint in the folder of --save, if one is there")
    parser.add_argument("--plan", metavar="plan.json", help="roles, placement and schedule by this plan, whatever the recipe "
                        "says of them; `hetermoe elastic` makes one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    try:
        script, recipe = script_and_recipe(args.files)
    except UsageError as error:
        return tell(error)

    def flags_of(argv: Sequence[str]) -> list[str]:
        found = resumed(argv) if args.resume else list(argv)
        return with_plan(found, args.plan) if args.plan else found

    return run_rank(script, recipe, args.overrides, args.drop, flags_of)


def run_rank(
    script: str | None, recipe_path: str | None, overrides: Sequence[str], drop: Sequence[str],
    flags_of: Callable[[Sequence[str]], list[str]] = list,
) -> int:
    """Runs one rank in this process, and returns its exit code.

    Args:
        script: a training script; None for this package's own.
        recipe_path: a recipe, if there is one.
        overrides: flags that replace the recipe's.
        drop: flags of it to leave out.
        flags_of: from these flags to those that are run with.
    """
    try:
        take_place(os.environ)
        recipe = Recipe() if recipe_path is None else load_recipe(recipe_path, os.environ)
        argv = flags_of(override(recipe.argv, overrides, drop))
    except UsageError as error:
        return tell(error)
    os.environ.update(recipe.env)
    if script is None:
        return pretrain_gpt.main(argv)
    from megatron_hetermoe import script as training_script

    return training_script.main([script, *argv])


def script_and_recipe(files: Sequence[str]) -> tuple[str | None, str | None]:
    """The training script and the recipe among the files that were named.

    Raises:
        UsageError: if there are two of a kind, or no such script.
    """
    problems = Problems()
    scripts = [file for file in files if file.endswith(".py")]
    recipes = [file for file in files if not file.endswith(".py")]
    for kind, found in (("training script", scripts), ("recipe", recipes)):
        if len(found) > 1:
            problems.add(f"{len(found)} files are each a {kind}: {', '.join(found)}; give one")
    for script in scripts[:1]:
        if not Path(script).is_file():
            problems.add(f"there is no training script {script}; give its path, as Megatron-LM/pretrain_gpt.py")
    problems.raise_if_any()
    return next(iter(scripts), None), next(iter(recipes), None)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one rank of several: torch's, or Slurm as a task of a step. A batch
    script, which starts steps, is no rank."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    return "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


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
