"""``hetermoe submit``: the batch script that trains a recipe on a cluster with Slurm."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from megatron_hetermoe.cli.recipe_plan import plan_of
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.recipe import load_recipe, override, value_of

NOTICE = 300  # seconds before the time limit
_CONTAINERS = ("pyxis:", "apptainer:")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "submit", help="print the Slurm batch script for a recipe on a cluster, or submit it", usage="hetermoe submit "
        "RECIPE.yaml --cluster CLUSTER.yaml [options] [-- Megatron's flags]", description="Prints the batch script: a "
        "heterogeneous job with a component for each pool, or with --mixed one over nodes of all kinds. With --yes it is "
        "submitted. sbatch's options for a pool are in the cluster file, as `slurm: {partition: new, account: us}`.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--cluster", required=True, metavar="CLUSTER.yaml", help="pools: kind, nodes, GPUs, slurm")
    parser.add_argument("--mixed", action="store_true", help="one component over nodes of all kinds in one partition")
    parser.add_argument("--elastic", action="store_true", help="start, and start again, with as many of the nodes as are "
                        "there, at least one of each pool, under the plan nearest to the last one")
    parser.add_argument("--container", default="", metavar="pyxis:IMAGE|apptainer:IMAGE",
                        help="run the ranks in it; hetermoe must be installed there")
    parser.add_argument("--mounts", default="", metavar="FROM:TO,...", help="folders for the container, beside this one")
    parser.add_argument("--hetermoe", metavar="COMMAND", help="how a rank starts this package on its node "
                        "(default: this Python, or the container's hetermoe)")
    parser.add_argument("--time", metavar="HH:MM:SS", help="the job's time limit")
    parser.add_argument("--notice", type=int, default=NOTICE, metavar="SECONDS",
                        help=f"save and queue again so long before the time limit (default {NOTICE})")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.add_argument("--yes", action="store_true", help="submit it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    script = batch_script(args)
    if not args.yes:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise UsageError(["sbatch is not on PATH: do this on a node that submits jobs, or print the script without --yes"])
    ended = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True)
    if ended.returncode:
        raise UsageError([f"sbatch refuses the script: {' '.join(ended.stderr.split())}"])
    print(f"job {ended.stdout.strip()}")
    return 0


def batch_script(args: argparse.Namespace) -> str:
    """The script for what the command line asks.

    Raises:
        UsageError: with all that would keep the job from running, as far as that can be told here.
    """
    from megatron_hetermoe.cost.cluster import read_cluster
    from megatron_hetermoe.planner.batch import components, elastic_components, one_component

    problems = Problems()
    cluster = None
    with problems.taking():
        cluster = read_cluster(args.cluster)
    if args.container and not any(args.container.startswith(kind) and args.container != kind for kind in _CONTAINERS):
        problems.add(f"--container is {args.container!r}; write pyxis:IMAGE or apptainer:IMAGE")
    if args.hetermoe and not _splits(args.hetermoe):
        problems.add(f"--hetermoe {args.hetermoe!r} has a quote that does not end")
    if args.notice < 1:
        problems.add(f"--notice is {args.notice}; it must be 1 or more seconds")
    if args.mixed and args.elastic:
        problems.add("--elastic needs a component for each pool, to know how many nodes of each are there: leave --mixed out")
    plan, flags = _plan(args, problems)
    problems.raise_if_any()
    patterns, ranks = "", []
    if args.elastic:
        parts, ranks = elastic_components(cluster, plan, problems)
    elif args.mixed:
        component, patterns = one_component(cluster, plan, problems)
        parts = [component]
    else:
        parts = components(cluster, plan, problems)
    problems.raise_if_any()
    common = {"job-name": Path(args.recipe).stem, **cluster.slurm, **({"time": args.time} if args.time else {})}
    output = common.pop("output", "%x-%j.log")
    return "\n".join([
        "#!/usr/bin/env bash",
        *_directives({"output": output, "open-mode": "append", "signal": f"B:USR1@{args.notice}"}),
        *_between("#SBATCH hetjob", [_directives({**common, "requeue": "", **part.options}) for part in parts]),
        "",
        "# " + _shown(["hetermoe", "submit", *_given(args)]),
        f"RECIPE={_array([args.recipe, *(word for flag in args.drop for word in ('--drop', flag))])}",
        f"FLAGS={_array([*args.overrides, *flags])}",
        f"HETERMOE={_array(_command(args))}",
        f"CONTAINER={shlex.quote(args.container)}   # pyxis:IMAGE, apptainer:IMAGE, or nothing",
        f"MOUNTS={shlex.quote(args.mounts)}   # for the container, beside this folder: FROM:TO,...",
        f"POOLS={_array([part.pool for part in parts] if len(parts) > 1 else [])}   # of each component's ranks",
        f"PATTERNS={shlex.quote(patterns)}   # what tells pools apart within one component",
        f"RANKS={_array(map(str, ranks))}   # on each node of a component, where a restart takes what nodes are there",
        f"CLUSTER={_array(['--cluster', args.cluster] if plan.pools else [])}   # for an elastic job's memory",
        "",
        resources.files(__package__).joinpath("job.sh").read_text(encoding="utf-8"),
    ])


def _plan(args: argparse.Namespace, problems: Problems) -> tuple[Plan | None, list[str]]:
    """The recipe's plan, None where it has problems, and the flags that a planner's plan needs. A job that is refused when it
    starts has waited in a queue for nothing."""
    with problems.taking():
        recipe = load_recipe(args.recipe, os.environ)
        argv = override(recipe.argv, args.overrides, args.drop)
        if value_of(argv, "--save") is None:
            problems.add("the recipe has no --save: a job that is queued again needs a checkpoint to go on from")
        return plan_of(recipe, argv, args.overrides)
    return None, []


def _command(args: argparse.Namespace) -> list[str]:
    """How a rank starts this package."""
    if args.hetermoe:
        return shlex.split(args.hetermoe)
    return ["hetermoe"] if args.container else [sys.executable, "-m", "megatron_hetermoe"]


def _splits(text: str) -> bool:
    try:
        return bool(shlex.split(text))
    except ValueError:
        return False


def _given(args: argparse.Namespace) -> list[str]:
    """The words of this command, so that a script says how it was made."""
    words = [args.recipe, "--cluster", args.cluster]
    for name in ("container", "mounts", "hetermoe", "time"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    words += [f"--{name}" for name in ("mixed", "elastic") if getattr(args, name)]
    words += ["--notice", str(args.notice)] if args.notice != NOTICE else []
    words += [word for flag in args.drop for word in ("--drop", flag)]
    return words + (["--", *args.overrides] if args.overrides else [])


def _directives(options: Mapping[str, str]) -> list[str]:
    return [f"#SBATCH --{name}{'=' + shlex.quote(value) if value else ''}" for name, value in options.items()]


def _between(line: str, blocks: Iterable[Sequence[str]]) -> list[str]:
    result: list[str] = []
    for block in blocks:
        result += [line, *block] if result else block
    return result


def _array(words: Iterable[str]) -> str:
    return "(" + shlex.join(words) + ")"


def _shown(words: Sequence[str]) -> str:
    """The words in a comment, which ends at the first new line."""
    return shlex.join(words).replace("\n", " ")
