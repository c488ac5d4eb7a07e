"""``hetermoe plan``: which ranks do what on a cluster, which experts go where, and what to expect."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hetermoe.cli.activity import Activity
from megatron_hetermoe.cli.environment import environment
from megatron_hetermoe.cli.output import check_output, write_plan
from megatron_hetermoe.cli.quiet import quiet
from megatron_hetermoe.cli.words import decided_by_plan
from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX, parse_flags
from megatron_hetermoe.config.plan import DELAYED, TOGETHER, WEIGHT_GRADIENTS, Plan
from megatron_hetermoe.config.recipe import load_recipe, locating, override, places_left
from megatron_hetermoe.config.stages import stage_flags
from megatron_hetermoe.config.step import RECOMPUTE
from megatron_hetermoe.simulator.host import BUSY, WAY_OUT
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_hetermoe.config.shape import ModelShape
    from megatron_hetermoe.cost.cluster import Cluster, Kind
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.planner.advice import Alone
    from megatron_hetermoe.planner.options import Question
    from megatron_hetermoe.planner.search import Found, Priced

DEFAULT_VOCABULARY = 32_000
NOT_SEARCHED = "context parallelism and virtual stages are the recipe's, and CPU offload of the optimizer was not searched; " \
               "routing is taken to be balanced"
_RUNNERS_UP = 5
_TENSOR = (1, 2, 4, 8)
_EXPERT_TENSOR = (1, 2, 4)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "plan", help="find the fastest layout of a recipe on a cluster", usage="hetermoe plan RECIPE.yaml --cluster "
        "CLUSTER.yaml [options] [-- Megatron's flags]", description="Searches roles, ZP groups, waves and placements, "
        "and says what to expect, why, and what the runners-up would do.")
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("--cluster", required=True, metavar="CLUSTER.yaml", help="pools: kind, nodes, GPUs, links")
    parser.add_argument("--out", metavar="plan.json", help="write the plan there, for `hetermoe train` and `simulate`")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    parser.add_argument("--vocabulary", type=int, metavar="N",
                        help=f"rows of the output layer, where the recipe does not say (default {DEFAULT_VOCABULARY})")
    parser.add_argument("--drop", action="append", default=[], metavar="FLAG", help="leave out a flag of the recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from megatron_hetermoe.cost.cluster import kinds_of, read_cluster
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.planner.advice import alone, nothing_fits, with_attention_alone
    from megatron_hetermoe.planner.search import after_losing_a_node, search, with_fewer_nodes

    problems, notes = Problems(), Notes()
    with problems.taking():
        cluster = read_cluster(args.cluster, notes)
    if args.vocabulary is not None and args.vocabulary < 1:
        problems.add(f"--vocabulary is {args.vocabulary}; it must be from 1 on")
    if args.out:
        check_output("--out", Path(args.out), problems)
    with Activity() as activity:
        activity.enter("reading the recipe with Megatron")
        with problems.taking():
            question = _question(args, notes)
        problems.raise_if_any()
        kinds = kinds_of(cluster, question.shape, question.precision, notes)
        found = search(question, cluster, kinds, tell=activity.enter)
        if not found.best:
            activity.enter("looking for what would fit")
            raise UsageError(nothing_fits(question, cluster, kinds))
        activity.enter("comparing with other ways to use these GPUs")
        lost = after_losing_a_node(question, cluster, kinds, found.best[0])
        found = with_fewer_nodes(found, lost)
        alones = alone(question, cluster, kinds)
        plan = with_attention_alone(found.best[0], alones)
        answer = _answer(question, cluster, kinds, found, lost, plan, alones, notes)
    if args.out:
        write_plan(plan, args.out)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        _print(answer, args)
    return 0


def _question(args: argparse.Namespace, notes: Notes) -> Question:
    """What the recipe asks to train; Megatron parses its flags, which takes some seconds to import.

    Raises:
        UsageError: with what keeps it from being planned for, and where in the recipe it stands.
    """
    recipe = load_recipe(args.recipe, os.environ)
    argv = override(recipe.argv, args.overrides, args.drop)
    if decided := decided_by_plan(argv):
        notes.add(f"the recipe's {', '.join(decided)} did not count: a plan decides that")
    with locating(places_left(recipe, args.overrides)), environment(
            {**recipe.env, "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")}):
        return _question_of(argv, args.vocabulary, notes)


def _question_of(argv: Sequence[str], vocabulary: int | None, notes: Notes) -> Question:
    from megatron_hetermoe.planner.options import Question
    from megatron_hetermoe.planner.staged import divisions

    problems = Problems()
    ours, rest = parse_flags(argv, problems)
    with quiet():
        from megatron_hetermoe.mcore.arguments import (
            activation_again, arguments_to_plan_for, parallelism_of, recomputed,
        )

        parsed, shape = arguments_to_plan_for(rest, problems)
    parallelism = parallelism_of(parsed)
    if shape is not None and parallelism.stage_layers and not _may_be_staged(
            shape, parallelism.stage_layers, parallelism.virtual_stages):
        problems.add(f"pipeline stages of {', '.join(map(str, parallelism.stage_layers))} layers are no plan for "
                     f"{shape.layers} layers, of which each stage must have one with experts: change "
                     "--pipeline-model-parallel-size or the layers of the first and last stage")
    problems.raise_if_any()
    vocabulary = vocabulary or getattr(parsed, "padded_vocab_size", None) or parsed.vocab_size
    if vocabulary is None:
        vocabulary = DEFAULT_VOCABULARY
        notes.add(f"the recipe's vocabulary is known to its tokenizer only: {vocabulary:,} taken; "
                  f"--vocabulary N says it")
    precision = "fp16" if parsed.fp16 else "bf16" if parsed.bf16 else "fp32"
    recompute = RECOMPUTE[RECOMPUTE.index(recomputed(parsed)):]  # more than asked for, where memory asks for it
    distributed = bool(parsed.use_distributed_optimizer)
    stages = (parallelism.stage_layers,) if parallelism.stage_layers else ((), *divisions(shape))
    tensor = _tensor(parsed)
    # Megatron's own linear layers; the weight gradients of others are not split off.
    weights = WEIGHT_GRADIENTS if parsed.transformer_impl == "local" else (TOGETHER,)
    if ours.cuda_graphs:  # which stand beside none of these but what was asked for
        recompute, stages, tensor = recompute[:1], stages[:1], tensor[:1]
        weights = tuple(choice for choice in weights if choice != DELAYED)
    return Question(shape, precision, parsed.micro_batch_size, parsed.global_batch_size, vocabulary, recompute,
                    (distributed,) if distributed else (False, True), tensor,
                    weights, activation_again=(True,) if activation_again(parsed) else (False, True),
                    expert_tensor=(parallelism.expert_tensor,) if parsed.expert_tensor_parallel_size else _EXPERT_TENSOR,
                    stage_layers=stages, virtual_stages=parallelism.virtual_stages, context=parallelism.context,
                    cuda_graphs=ours.cuda_graphs)


def _may_be_staged(shape: ModelShape, stage_layers: Sequence[int], virtual_stages: int) -> bool:
    """Whether the layers divide so, with experts in each stage."""
    from megatron_hetermoe.planner.staged import layers_of

    return sum(stage_layers) == shape.layers and min(stage_layers) > 0 and not len(stage_layers) % virtual_stages and all(
        set(layers) & set(shape.moe_layers) for layers in layers_of(stage_layers, virtual_stages))


def _tensor(parsed: argparse.Namespace) -> tuple[int, ...]:
    """How many attention ranks may share a microbatch: what the recipe says, or any number where it can run that."""
    if parsed.tensor_model_parallel_size > 1:
        return (parsed.tensor_model_parallel_size,)
    # Without transformer-engine tensor parallelism does not run on a GPU (mcore/arguments.py).
    return (1,) if parsed.transformer_impl == "local" else _TENSOR


def _answer(
    question: Question, cluster: Cluster, kinds: Mapping[str, Kind], found: Found, lost: Mapping[str, Priced | None],
    plan: Plan, alones: Sequence[Alone], notes: Notes,
) -> dict[str, Any]:
    """Everything that is said, as data."""
    from megatron_hetermoe.planner.advice import alone, baselines, larger_microbatches
    from megatron_hetermoe.planner.memory import MARGIN
    from megatron_hetermoe.planner.search import left_out

    best = found.best[0]
    assignment = best.assignment
    held = assignment.experts
    return {
        "plan": {**{key: value for key, value in asdict(plan).items() if key not in ("model", "placement")},
                 "layout": best.option.describe()},
        "flags": flags_of(plan),
        "experts_on_attention_ranks": {
            layer: int(held[layer - 1, :best.option.m].sum()) for layer in question.shape.moe_layers},
        "assignment": {"by": assignment.origin, "seconds": assignment.seconds,
                       "gather_and_squeeze_seconds": assignment.paper_seconds, "even_seconds": assignment.even_seconds},
        "left_out": [asdict(one) for one in left_out(found, cluster)],
        "runners_up": [{"layout": one.option.describe(), "wave": one.wave, "tokens_per_second": one.tokens_per_second}
                       for one in found.best[1:1 + _RUNNERS_UP]],
        "larger_microbatches": {
            size: {"layout": one.option.describe(), "wave": one.wave, "tokens_per_second": one.tokens_per_second}
            for size, one in larger_microbatches(question, cluster, kinds, best).items()},
        "other_ways": [{**asdict(one), "runs": one.runs} for one in baselines(best)],
        "alone": [asdict(one) for one in alones],
        "after_losing_a_node": {
            name: {"layout": one.option.describe(), "tokens_per_second": one.tokens_per_second} if one else
            _best_alone(alone(question, cluster.without_node(name), kinds)) for name, one in lost.items()},
        "search": {"considered": found.considered, "fitting": found.fitting, "simulated": found.simulated},
        "memory": {role: {"bytes": best.bytes_of(role), "of": min(
            cluster.pools[name].memory for name, _ in pools)} for role, pools in
            ((ATTENTION, best.option.attention), (EXPERT, best.option.expert))},
        "margin": MARGIN,
        "queueing": {role: best.queueing(role) for role in (ATTENTION, EXPERT)},
        "imbalance": dict(zip(("fits", "most"), best.imbalance)),
        "notes": [*notes, NOT_SEARCHED],
    }


def _best_alone(alones: Sequence[Alone]) -> dict[str, Any] | None:
    """The pool that does most by itself, for when no plan is left; None where the model fits none."""
    best = max(alones, key=lambda one: one.tokens_per_second or 0.0, default=None)
    if best is None or not best.tokens_per_second:
        return None
    return {"layout": f"{best.pool} alone, expert parallel", "tokens_per_second": best.tokens_per_second}


def _print(answer: dict[str, Any], args: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    console.print(_plan_table(answer))
    console.print(_others_table(answer))
    for one in answer["left_out"]:
        console.print(f"left out: {one['gpus']} GPUs of {one['pool']}: {one['reason']}")
    for sentence in _faster(answer):
        console.print(sentence, highlight=False)
    search = answer["search"]
    console.print(f"{search['considered']} layouts considered, {search['fitting']} fit, "
                  f"{search['simulated']} simulated")
    if max(answer["queueing"].values()) >= BUSY:
        console.print(f"hosts may be what a step takes: {WAY_OUT}", highlight=False)
    for note in answer["notes"]:
        console.print(f"note: {note}", highlight=False)
    if args.out:
        console.print(f"written to {args.out}", highlight=False, soft_wrap=True)
        for what, words in (("the step, task by task", ["simulate", args.out, "--cluster", args.cluster]),
                            ("to train it", train_words(args, answer["flags"]))):
            console.print(f"{what}: hetermoe {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)


def _word(answer: dict[str, Any]) -> str:
    """What a prediction is called: one that rests on data sheets is an estimate."""
    return "estimated" if answer["plan"]["predicted"]["estimated"] else "predicted"


def _plan_table(answer: dict[str, Any]) -> Table:
    """The plan, and what to expect of it."""
    from rich.table import Table

    plan, predicted = answer["plan"], answer["plan"]["predicted"]
    table = Table(title=f"plan: {plan['layout']}", title_justify="left", show_header=False)
    table.add_row(f"step ({_word(answer)})",
                  f"{predicted['step_seconds']:.3f} s, {predicted['tokens_per_second']:,.0f} tokens/s")
    table.add_row("microbatches", f"{plan['step']['microbatches']} a rank, {plan['wave']} on the way together"
                                  f"{', waves overlapped' if plan['schedule'] == 'overlapped' else ''}; "
                                  f"recompute {plan['step']['recompute']}"
                                  f"{', activation of experts' if plan['step']['activation_again'] else ''}; distributed optimizer "
                                  f"{'on' if plan['step']['distributed_optimizer'] else 'off'}")
    table.add_row("computing", f"attention ranks {predicted['attention_busy']:.0%} of the step, expert ranks "
                               f"{predicted['expert_busy']:.0%}")
    if any(answer["queueing"].values()):
        table.add_row("hosts queue tasks", "attention ranks' {attention:.0%} of the step, expert ranks' {expert:.0%}".format(
            **answer["queueing"]))
    for role, memory in answer["memory"].items():
        table.add_row(f"memory, {role}", f"{memory['bytes'] / 1e9:.1f} of {memory['of'] / 1e9:.0f} GB "
                                         f"({answer['margin']:.0%} is kept free)")
    table.add_row("uneven routing", "memory is enough while no rank's experts get more than {fits:.1f} times their part "
                                    "of the tokens; {most:.1f} if all that can go there do".format(**answer["imbalance"]))
    moved = list(answer["experts_on_attention_ranks"].values())
    table.add_row("experts on attention ranks", f"{min(moved)} to {max(moved)} of each layer, {sum(moved)} in all")
    if answer["assignment"]["gather_and_squeeze_seconds"]:
        gain = answer["assignment"]["gather_and_squeeze_seconds"] / answer["assignment"]["seconds"]
        table.add_row("against the paper's placement", f"{gain:.3f} times as fast")
    return table


def _others_table(answer: dict[str, Any]) -> Table:
    """What else these GPUs could do, beside the plan."""
    from rich.table import Table

    table = Table("what else", "tokens/s", f"of the plan ({_word(answer)})", title_justify="left")
    rows = [(f"runner-up: {one['layout']}, wave {one['wave']}", one["tokens_per_second"])
            for one in answer["runners_up"]]
    rows += [(f"--micro-batch-size {size}: {one['layout']}, wave {one['wave']}", one["tokens_per_second"])
             for size, one in answer["larger_microbatches"].items()]
    rows += [(one["name"], one["obstacle"] or one["tokens_per_second"]) for one in answer["other_ways"]]
    rows += [(f"{one['pool']} alone, expert parallel", one["tokens_per_second"]) for one in answer["alone"]]
    rows += [(f"a node of {name} lost: {one['layout'] if one else 'nothing fits'}", one and one["tokens_per_second"])
             for name, one in answer["after_losing_a_node"].items()]
    for name, value in rows:
        if isinstance(value, float):
            table.add_row(name, f"{value:,.0f}", f"{value / answer['plan']['predicted']['tokens_per_second']:.2f}")
        else:
            table.add_row(name, "", value or "does not fit")
    return table


def _faster(answer: dict[str, Any]) -> Iterator[str]:
    """What could be had on the same GPUs and would be faster, a sentence each."""
    planned = answer["plan"]["predicted"]["tokens_per_second"]
    for one in answer["other_ways"]:
        if one["runs"] and one["tokens_per_second"] > planned:
            assumed = ", were handovers free and microbatches of any size" if one["name"].startswith("pipeline") else ""
            yield f"faster on these GPUs: {one['name']}, {one['tokens_per_second'] / planned:.2f} times{assumed}"


def train_words(args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """What trains by the plan that was written: the words of this command, without what the plan decides.

    Args:
        args: this command's.
        flags: Megatron's, that the plan's times and memory were reckoned with (``flags_of``).
    """
    recipe = load_recipe(args.recipe, os.environ)
    drop = [*args.drop, *(flag.removeprefix("--") for flag in decided_by_plan(recipe.argv))]
    switch = [] if PREFIX in recipe.argv else [PREFIX]
    over = override(args.overrides, [*switch, f"{PREFIX}-plan", args.out, *flags], decided_by_plan(args.overrides))
    return ["train", args.recipe, *(word for flag in dict.fromkeys(drop) for word in ("--drop", flag)), "--", *over]


def flags_of(plan: Plan) -> list[str]:
    """Megatron's flags that a plan's times and memory were reckoned with. The plan has a step."""
    step, words = plan.step, ["--micro-batch-size", str(plan.step.micro_batch)]
    if plan.tensor_parallel > 1:
        words += ["--tensor-model-parallel-size", str(plan.tensor_parallel), "--sequence-parallel"]
    if plan.context_parallel > 1:
        words += ["--context-parallel-size", str(plan.context_parallel)]
    if plan.expert_tensor_parallel > 1:
        words += ["--expert-tensor-parallel-size", str(plan.expert_tensor_parallel)]
    if plan.stage_layers:
        words += stage_flags(plan.stage_layers, plan.virtual_stages, plan.model.mtp_layers)
    if step.distributed_optimizer:
        words.append("--use-distributed-optimizer")
    modules = [module for module, again in (("core_attn", step.recompute == "core_attn"), ("moe_act", step.activation_again)) if again]
    if step.recompute == "full":
        return [*words, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    return [*words, "--recompute-granularity", "selective", "--recompute-modules", *modules] if modules else words
