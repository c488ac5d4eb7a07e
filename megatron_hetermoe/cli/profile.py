"""``hetermoe profile``: how long a recipe's tasks take on the GPU (or CPU) of this machine, for the planner."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hetermoe.cli.environment import environment
from megatron_hetermoe.cli.output import check_output, writing
from megatron_hetermoe.cli.plan import DEFAULT_VOCABULARY
from megatron_hetermoe.cli.quiet import quiet
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import Flags, parse_flags
from megatron_hetermoe.config.recipe import load_recipe, locating, override, places_left

_REPEATS = 5
_OF_TASKS = ("kind", "lengths", "expert_tokens", "vocabulary", "drop")  # what transfers have no use for
# Of the tokens that an expert gets from one sequence: more attention ranks and sequences bring more.
_TIMES = (0.25, 0.5, 1, 2, 4, 8, 16)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "profile", help="measure a recipe's tasks on this machine's GPU, for `hetermoe plan`",
        usage="hetermoe profile RECIPE.yaml --out PROFILE.json [options] [-- Megatron's flags]\n"
              "       LAUNCHER hetermoe profile --network --cluster CLUSTER.yaml --out MEASURED.yaml",
        description="Runs attention and experts of the recipe's model, two layers of it, through the modules that "
                    "train, and writes their times. Name the file as a pool's kind in a cluster file. With --network, "
                    "started by a launcher on the ranks of both pools, it measures transfers between them and writes "
                    "the cluster file with what it found.")
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--network", action="store_true", help="measure the channel between the cluster's pools")
    parser.add_argument("--cluster", metavar="CLUSTER.yaml", help="for --network")
    parser.add_argument("--attention-ranks", type=int, metavar="M",
                        help="for --network: ranks that send (default: the first pool's GPUs)")
    parser.add_argument("--kind", metavar="NAME", help="what is measured (default: the GPU's name, or CPU)")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS",
                        help="of sequences (default: the recipe's)")
    parser.add_argument("--expert-tokens", nargs="+", type=int, metavar="TOKENS",
                        help="that one expert gets (default: from a quarter to 16 times of what it gets from one "
                             "sequence)")
    parser.add_argument("--vocabulary", type=int, metavar="N",
                        help=f"rows of the output layer, where the recipe does not say (default {DEFAULT_VOCABULARY})")
    parser.add_argument("--repeats", type=int, default=_REPEATS, metavar="N", help=f"of which the median counts ({_REPEATS})")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    problems = Problems()
    out = Path(args.out)
    if out.exists():
        problems.add(f"{out} is there already: give another name to --out, or remove it")
    else:
        check_output("--out", out, problems)
    for name, values in (("--lengths", args.lengths or ()), ("--expert-tokens", args.expert_tokens or ()),
                         ("--repeats", [args.repeats]), ("--vocabulary", [1 if args.vocabulary is None else args.vocabulary])):
        if any(value < 1 for value in values):
            problems.add(f"{name} must be whole numbers from 1 on")
    if args.network:
        from megatron_hetermoe.cli.network import run as measure_network

        given = [f"--{name.replace('_', '-')}" for name in _OF_TASKS if getattr(args, name)] + ["--"] * bool(args.overrides)
        if given:
            problems.add(f"{', '.join(given)} with --network, which measures no recipe's tasks: leave out what is for these")
        return measure_network(args, problems)
    if not args.recipe or args.cluster or args.attention_ranks:
        problems.add("give a RECIPE.yaml to measure tasks, or --network with --cluster to measure transfers")
        problems.raise_if_any()
    argv = None
    with problems.taking():
        recipe = load_recipe(args.recipe, os.environ)
        argv = override(recipe.argv, args.overrides, args.drop)
    if argv is None:  # where the recipe cannot be read Megatron has nothing to look at
        problems.raise_if_any()
    flags, rest = parse_flags(argv, problems)
    of_rank = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
    with environment({**recipe.env, **of_rank}), locating(places_left(recipe, args.overrides)):
        profile = _measure(args, flags, rest, problems)
    with writing(out):
        out.write_text(profile.to_json(), encoding="utf-8")
    for name, points in profile.parts.items():
        forward, backward = points[max(points)]
        print(f"{name}: {1e3 * forward:.3f} ms forward, {1e3 * backward:.3f} ms backward at {max(points):,.0f} tokens")
    for name, (forward, backward) in (profile.host or {}).items():
        if forward or backward:
            print(f"{name}: the host queues it in {1e3 * forward:.3f} ms forward, {1e3 * backward:.3f} ms backward")
    print(f"written to {out}; name it as a pool's kind in a cluster file")
    return 0


def _measure(args: argparse.Namespace, flags: Flags, rest: Sequence[str], problems: Problems) -> Any:
    """Takes this process for one rank of a run of three: one attention rank and two expert ranks."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_hetermoe.mcore.platform import compiler, cpu
    from megatron_hetermoe.mcore.platform.flags import for_cpu

    on_cpu = cpu.needed()
    if on_cpu:
        with quiet():
            cpu.install()
            rest, changes = for_cpu(rest)
        rest += ["--distributed-backend", "gloo"]
        print(*changes, sep="\n", end="\n" * bool(changes), flush=True)
    else:
        compiler.choose(rest, compiler.capability_here())  # as its ranks do
    with Progress(console=Console(stderr=True), transient=True) as progress, quiet():
        task = progress.add_task("importing Megatron", total=None)
        import torch

        from megatron_hetermoe.mcore import profiler

        parsed, plan = profiler.arguments(rest, flags, problems)
        parsed.padded_vocab_size = \
            args.vocabulary or parsed.padded_vocab_size or parsed.vocab_size or DEFAULT_VOCABULARY
        sizes = _sizes(args, parsed)
        progress.update(task, total=len(sizes.lengths) + len(sizes.expert_tokens) + 1)
        return profiler.measure(
            parsed, plan, args.kind or ("CPU" if on_cpu else torch.cuda.get_device_name()), sizes,
            lambda what: progress.update(task, advance=1, description=what), flags.cuda_graphs)


def _sizes(args: argparse.Namespace, parsed: argparse.Namespace) -> Any:
    from megatron_hetermoe.mcore.profiler import Sizes

    lengths = tuple(sorted(args.lengths or [parsed.seq_length]))
    each = [length * parsed.moe_router_topk / parsed.num_experts for length in (lengths[0], lengths[-1])]
    tokens = args.expert_tokens or {max(1, round(one * times)) for one in each for times in _TIMES}
    return Sizes(lengths, tuple(sorted(tokens)), args.repeats)
