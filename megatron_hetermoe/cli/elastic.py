"""``hetermoe elastic``: the plan with which a run goes on from its checkpoint on the ranks that are there now."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_hetermoe.cli.output import check_output, write_plan
from megatron_hetermoe.cli.words import has_saved, resumed
from megatron_hetermoe.config.batches import FLAG as GROWING
from megatron_hetermoe.config.batches import scheduled_batches
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.config.recipe import Recipe, load_recipe, override, value_of
from megatron_hetermoe.config.saved import saved_plan
from megatron_hetermoe.planner.elastic import Refit, refit, within_memory


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "elastic", help="fit a checkpoint's layout to the ranks that are there", usage="hetermoe elastic RECIPE.yaml "
        "--attention-ranks M --expert-ranks N --out plan.json [options] [-- Megatron's flags]",
        description="Reads the plan beside the recipe's last checkpoint (--load, else --save) and writes the nearest "
        "one for at most so many ranks of each role, for --hetermoe-plan. What is different is said. A batch script "
        "starts as many ranks as --json names. Exit code 2: no plan fits.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--attention-ranks", type=int, required=True, metavar="M", help="that are there")
    parser.add_argument("--expert-ranks", type=int, required=True, metavar="N", help="that are there")
    parser.add_argument("--out", required=True, metavar="plan.json")
    parser.add_argument("--plan", metavar="FILE", help="start from this plan in place of the checkpoint's")
    parser.add_argument("--resume", action="store_true", help="as of `hetermoe rank`: the checkpoint is that in the folder "
                        "of --save; while none is there, what the recipe says of ranks is the plan to start from")
    parser.add_argument("--cluster", metavar="CLUSTER.yaml", help="see to it that memory is enough, for a plan that "
                        "`hetermoe plan` made")
    parser.add_argument("--json", action="store_true", help="print ranks and changes as JSON")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    out, problems = Path(args.out), Problems()
    check_output("--out", out, problems)
    for role, count in (("attention", args.attention_ranks), ("expert", args.expert_ranks)):
        if count < 1:
            problems.add(f"--{role}-ranks is {count}: at least one rank of each role is needed")
    with problems.taking():
        recipe = load_recipe(args.recipe, os.environ)
        argv = override(recipe.argv, args.overrides, args.drop)
    problems.raise_if_any()
    before = read_plan(args.plan) if args.plan else _before(recipe, argv, args.overrides) if args.resume else _of_checkpoint(argv)
    found = fitted(argv, args.attention_ranks, args.expert_ranks, before, args.cluster)
    write_plan(found.plan, out)
    if args.json:
        print(json.dumps({"attention_ranks": found.plan.attention_ranks, "expert_ranks": found.plan.expert_ranks,
                          "groups": found.plan.groups, "changes": found.said}, indent=1))
    else:
        for line in found.said or ("nothing changes",):
            print(line)
    return 0


def fitted(
    argv: Sequence[str], attention_ranks: int, expert_ranks: int, before: Plan | None = None, cluster: str | None = None
) -> Refit:
    """The plan nearest to that of a run's checkpoint.

    Args:
        argv: the run's flags.
        attention_ranks, expert_ranks: that are there.
        before: a plan in place of the checkpoint's.
        cluster: a cluster file, to see to memory.

    Raises:
        UsageError: when there is no plan to start from, or none fits.
    """
    found = refit(before or _of_checkpoint(argv), attention_ranks, expert_ranks, _microbatches(argv))
    if cluster is None:
        return found
    from megatron_hetermoe.cost.cluster import kinds_of, read_cluster
    from megatron_hetermoe.cost.curves import Notes

    machines = read_cluster(cluster)
    missing = set(found.plan.pools) - machines.pools.keys()
    if missing or not found.plan.pools or found.plan.step is None:
        raise UsageError([f"the plan is not one of `hetermoe plan` for {cluster}: leave --cluster out, or make a plan"])
    return within_memory(found, machines, kinds_of(machines, found.plan.model, found.plan.attention_precision, Notes()))


def _before(recipe: Recipe, argv: Sequence[str], overrides: Sequence[str]) -> Plan:
    """What a job that is started again begins from: its own checkpoint's plan, or the recipe's while it has saved none."""
    if has_saved(argv):
        return _of_checkpoint(resumed(argv))
    from megatron_hetermoe.cli.recipe_plan import plan_of

    return plan_of(recipe, argv, overrides)[0]


def _of_checkpoint(argv: Sequence[str]) -> Plan:
    folder = value_of(argv, "--load") or value_of(argv, "--save")
    if folder is None:
        raise UsageError(["the recipe names no checkpoint: give -- --load DIR, or --plan FILE"])
    step = value_of(argv, "--ckpt-step")
    if step is not None and not (step.isdecimal() and len(step) <= 12):
        raise UsageError([f"--ckpt-step is {step!r}; it must be a whole number"])
    return saved_plan(folder, None if step is None else int(step))


def _microbatches(argv: Sequence[str]) -> int:
    """Of a step, all attention ranks together; where the batch grows, what the microbatches of all its sizes divide by."""
    problems = Problems()
    micro_batch = _size(argv, "--micro-batch-size", problems)
    schedule = value_of(argv, GROWING)
    if schedule is None:
        name, batches = "--global-batch-size", [_size(argv, "--global-batch-size", problems)]
    else:
        name, batches = f"{GROWING}'s batch of", []
        with problems.taking():
            # When each of them begins does not count, so neither do the tokens of a sequence.
            batches = [batch for _, batch in scheduled_batches(schedule, sequence=1)]
    problems.raise_if_any()
    for batch in batches:
        if batch % micro_batch:
            problems.add(f"{name} {batch} does not divide by --micro-batch-size {micro_batch}")
    problems.raise_if_any()
    return math.gcd(*batches) // micro_batch


def _size(argv: Sequence[str], flag: str, problems: Problems) -> int:
    """A flag's number of sequences."""
    text = value_of(argv, flag) or ""
    if not text.isdecimal() or len(text) > 12 or int(text) == 0:
        problems.add(f"{flag} is {text or 'missing'}: how the batch divides over ranks depends on it")
        return 0
    return int(text)
