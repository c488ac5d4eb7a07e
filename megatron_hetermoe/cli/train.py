"""``hetermoe train``: a recipe or a training script, all of its ranks on this machine; or one rank of a launcher's."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hetermoe.cli.emulate import Emulation, divided, emulation, with_layout
from megatron_hetermoe.cli.output import write_plan
from megatron_hetermoe.cli.rank import is_launched, run_rank, script_and_recipe
from megatron_hetermoe.cli.words import with_plan
from megatron_hetermoe.config.errors import EXIT_CODE, PEER_LOST_CODE, Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX, Flags, parse_flags
from megatron_hetermoe.config.plan import read_plan
from megatron_hetermoe.config.recipe import Recipe, load_recipe, located, locating, override, places_left, value_of
from megatron_hetermoe.config.shares import EXAMPLE, parse_shares
from megatron_hetermoe.runtime.mps import LOGS

OWN_ENTRY = "megatron_hetermoe.pretrain_gpt"
SCRIPT_ENTRY = "megatron_hetermoe.script"


@dataclass(frozen=True)
class Job:
    """What to start on this machine.

    Attributes:
        world: number of ranks.
        entry: module that a rank runs.
        argv: its command line.
        env: environment variables for it.
        places: where in a recipe a flag of ``argv`` stands.
        logs: folder for the ranks' output.
        watched: the ranks watch each other.
        emulation: of a cluster on one GPU; None for ranks with a GPU each, or without one.
    """

    world: int
    entry: str
    argv: list[str]
    env: dict[str, str]
    places: dict[str, str]
    logs: Path
    watched: bool
    emulation: Emulation | None


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "train", help="train a recipe, or a script of Megatron-LM", usage="hetermoe train [SCRIPT.py] [RECIPE.yaml] "
        "[options] [-- Megatron's flags]", description="Starts the attention and expert ranks of a recipe on this machine "
        "and shows how training goes. Flags after -- replace those of the recipe, as in `-- --num-layers 4`. With a "
        "training script, as pretrain_gpt.py in a checkout of Megatron-LM, that script is run as it is, with the "
        "recipe's flags or those after -- alone. Under a launcher (torchrun, srun) it is one rank: see `hetermoe rank`.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="a recipe (.yaml), a training script (.py), or both")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks, for a run without HETERMOE (stock Megatron)")
    parser.add_argument("--dry-run", action="store_true", help="train three steps, print what the plan predicted beside "
                        "what was measured, save nothing")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG",
                        help="leave out a flag of the recipe, as `--drop bf16`; may be given again")
    parser.add_argument("--keep-logs", metavar="DIR",
                        help="folder for the ranks' output (default: runs/RECIPE/logs, written over by each run)")
    parser.add_argument("--elastic", nargs=2, type=int, metavar=("M", "N"), help="go on from the last checkpoint with "
                        "at most M attention and N expert ranks, whatever layout it was saved under")
    parser.add_argument("--emulate", metavar="SHARES", help="one GPU as a mixed cluster: ranks of each role and what part of "
                        f"the GPU each has, as {EXAMPLE.replace('%', '%%')}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    script, recipe_path = script_and_recipe(args.files)
    dry_run = [f"{PREFIX}-dry-run"] if args.dry_run else []
    if is_launched(os.environ):
        own = ("elastic", "nproc", "keep-logs", "emulate")
        if given := [f"--{name}" for name in own if getattr(args, name.replace("-", "_"))]:
            raise UsageError([f"{', '.join(given)}: a launcher has started this as one of its ranks; leave them out"])
        return run_rank(script, recipe_path, [*args.overrides, *dry_run], args.drop)
    recipe = Recipe() if recipe_path is None else load_recipe(recipe_path, os.environ)
    argv = override(recipe.argv, args.overrides, args.drop) + dry_run
    logs = Path(args.keep_logs) if args.keep_logs else Path("runs", Path(recipe_path or script).stem, "logs")
    if args.elastic:
        argv = _elastic(argv, *args.elastic, logs)
    problems = Problems()
    shares = None if args.emulate is None else parse_shares(args.emulate, problems)
    if shares is not None:
        argv = with_layout(argv, shares)
    flags, _ = parse_flags(argv, problems)
    emulated = None if shares is None else emulation(shares, flags, argv, recipe.env, problems)
    places = places_left(recipe, args.overrides)
    with locating(places):
        problems.raise_if_any()
    world = world_size(flags, args.nproc)
    command = [*_own_words(), "train", *args.files, *(["--nproc", str(args.nproc)] if args.nproc else []),
               *(["--emulate", args.emulate] if args.emulate else []),
               *(word for flag in args.drop for word in ("--drop", flag))]
    if script is None:
        job = Job(world, OWN_ENTRY, argv, recipe.env, places, logs, flags.enabled, emulated)
    else:
        job = Job(world, SCRIPT_ENTRY, [script, *argv], _beside(script, recipe.env), places, logs, flags.enabled, emulated)
    return _train(job, command, args.overrides)


def _beside(script: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a script: its folder comes first on the path, as when Python runs it. A process that is forked
    imports Megatron before it knows of the script, and a checkout has a Megatron of its own."""
    before = env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    folders = [str(Path(script).resolve().parent), *([before] if before else [])]
    return {**env, "PYTHONPATH": os.pathsep.join(folders)}


def _located(said: str, places: Mapping[str, str]) -> str:
    """A rank's message, with the place in the recipe of each flag that has a problem: the rank knows flags only."""
    lines = []
    for line in said.splitlines():
        bullet = "  - " if line.startswith("  - ") else ""
        lines.append(bullet + located(line.removeprefix(bullet), places))
    return "\n".join(lines)


def _elastic(argv: list[str], attention_ranks: int, expert_ranks: int, logs: Path) -> list[str]:
    """The flags that go on from the last checkpoint, with the plan nearest to its own in the logs' folder."""
    from megatron_hetermoe.cli.elastic import fitted

    found = fitted(argv, attention_ranks, expert_ranks)
    path = logs / "plan.json"
    logs.mkdir(parents=True, exist_ok=True)
    write_plan(found.plan, path)
    for line in found.said:
        print(f"elastic: {line}", flush=True)
    load = [] if value_of(argv, "--load") else ["--load", value_of(argv, "--save")]
    return override(with_plan(argv, str(path)), load)


def _own_words() -> list[str]:
    """How the user can start this command again: by the name alone where that is found, or else as it was started."""
    if shutil.which("hetermoe"):
        return ["hetermoe"]
    if Path(sys.argv[0]).name == "__main__.py":
        return [sys.executable, "-m", "megatron_hetermoe"]
    return [os.path.relpath(sys.argv[0])]


def world_size(flags: Flags, nproc: int | None) -> int:
    """The number of ranks that flags ask for, or for stock Megatron ``--nproc``.

    Raises:
        UsageError: if neither says it, or both do and differ.
    """
    problems = Problems()
    if nproc is not None and nproc < 1:
        problems.add(f"--nproc is {nproc}; it must be 1 or more")
    world = nproc
    if flags.enabled:
        attention, expert = flags.attention_ranks, flags.expert_ranks
        if flags.plan is not None and None in (attention, expert):
            plan = read_plan(flags.plan)
            attention, expert = plan.attention_ranks, plan.expert_ranks
        for name, count in (("attention", attention), ("expert", expert)):
            if count is None:
                problems.add(f"how many {name} ranks? Give {name}-ranks in HETERMOE, or {PREFIX}-{name}-ranks after --")
        world = (attention or 0) + (expert or 0)
        if nproc not in (None, world) and not problems:
            problems.add(f"--nproc is {nproc}, but there are {attention} attention and {expert} expert ranks; "
                         "leave --nproc out")
    elif nproc is None:
        problems.add("the recipe has no section HETERMOE; add one, or --hetermoe flags after --, or give --nproc N to "
                     "train with stock Megatron")
    problems.raise_if_any()
    return world


def _environments(job: Job) -> contextlib.AbstractContextManager[tuple[dict[str, str], list[dict[str, str]]]]:
    """Environment variables for all ranks and for each rank, as long as the ranks run."""
    if job.emulation is None:
        return contextlib.nullcontext((job.env, []))
    return divided(job.emulation, job.env, job.logs)


def _train(job: Job, command: list[str], overrides: list[str]) -> int:
    # imported here because rich takes a while and `hetermoe --help` needs none of it
    from rich.console import Console

    from megatron_hetermoe.cli.interrupt import interruptible
    from megatron_hetermoe.cli.launch import Ranks
    from megatron_hetermoe.cli.progress import Display, Watch
    from megatron_hetermoe.cli.summary import failure, print_summary

    console = Console()
    console.print(f"starting {job.world} ranks, logs in {job.logs}", highlight=False, markup=False)
    with interruptible(), _environments(job) as (env, each), Display(console) as display, Ranks(
        job.world, job.argv, env, job.logs, entry=job.entry, watched=job.watched, each=each
    ) as ranks:
        watch = Watch([ranks.log(rank) for rank in range(job.world)])
        while ranks.wait(0.25):
            watch.read()
            display.update(watch)
        watch.read()
        display.update(watch)
    code = ranks.exit_code()
    if ranks.failed is None:
        if watch.report:
            console.print("\n".join(watch.report), highlight=False, markup=False, soft_wrap=True)
        else:
            print_summary(console, watch, command, overrides, job.logs)
        return 0
    log = ranks.log(ranks.failed if ranks.witness is None else ranks.witness)
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    said_with = code if ranks.witness is None else PEER_LOST_CODE
    said = failure(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", said_with)
    errors.print(_located(said, job.places) if code == EXIT_CODE else said)
    if code != EXIT_CODE:
        errors.print(f"rank {ranks.failed} ended with exit code {code}; all of its output is in "
                     f"{ranks.log(ranks.failed)}")
        if job.emulation is not None:
            errors.print(f"what the Multi-Process Service logged is in {' and '.join(str(job.logs / name) for name in LOGS)}")
    return code
