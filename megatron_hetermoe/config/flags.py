"""The ``--hetermoe`` flags: one namespace that refuses what it does not know."""

from __future__ import annotations

import argparse
import difflib
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.plan import (
    ATTENTION_KERNELS, EXPERT_IMPLS, EXPERT_KERNELS, PRECISIONS, SCHEDULES, WEIGHT_GRADIENTS,
)
from megatron_hetermoe.config.slow_down import EXAMPLE, parse_slow_down

PREFIX = "--hetermoe"
STALL_TIMEOUT = 30  # seconds
ON_SAVE_FAILURE = ("stop", "continue")
MOST = 10**6  # of anything that is counted here


@dataclass(frozen=True)
class Flags:
    """What the user said with ``--hetermoe`` flags; None where nothing was said.

    Attributes:
        enabled: ``--hetermoe`` was given.
        attention_ranks, expert_ranks: totals over all ZP groups.
        groups: ZP groups that the totals are divided into.
        placement: file that says which holder has which expert.
        schedule: one of ``config.plan.SCHEDULES``.
        wave: the most microbatches on the way together.
        attention: one of ``config.plan.ATTENTION_KERNELS``.
        experts: one of ``config.plan.EXPERT_KERNELS``.
        expert_impl: one of ``config.plan.EXPERT_IMPLS``.
        expert_precision: one of ``config.plan.PRECISIONS``.
        weight_gradients: one of ``config.plan.WEIGHT_GRADIENTS``.
        plan: plan file, in place of the flags above or beside ones that agree with it.
        trace: folder to record task times into.
        dry_run: train a few steps, print what was predicted beside what was measured, leave nothing behind.
        slow_down: see ``config.slow_down``.
        stall_timeout: seconds within which all ranks end after one has died or stopped.
        self_check: training steps from one comparison of what was sent with what came to the next.
        on_save_failure: one of ON_SAVE_FAILURE, "stop" where nothing was said.
        cuda_graphs: attention ranks replay what they compute between transfers.
    """

    enabled: bool = False
    attention_ranks: int | None = None
    expert_ranks: int | None = None
    groups: int | None = None
    placement: str | None = None
    schedule: str | None = None
    wave: int | None = None
    attention: str | None = None
    experts: str | None = None
    expert_impl: str | None = None
    expert_precision: str | None = None
    weight_gradients: str | None = None
    plan: str | None = None
    trace: str | None = None
    dry_run: bool = False
    slow_down: str | None = None
    stall_timeout: int | None = None
    self_check: int | None = None
    on_save_failure: str | None = None
    cuda_graphs: bool = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, with their help, to a parser."""
    group = parser.add_argument_group("hetermoe", "train with attention and experts on different ranks")
    group.add_argument("--hetermoe", action="store_true", dest="enabled", help="switch it on")
    group.add_argument("--hetermoe-attention-ranks", metavar="RANKS", help="attention ranks, all ZP groups together")
    group.add_argument("--hetermoe-expert-ranks", metavar="RANKS", help="expert ranks, all ZP groups together")
    group.add_argument("--hetermoe-groups", metavar="G", help="ZP groups that the ranks are divided into (default 1)")
    group.add_argument("--hetermoe-placement", metavar="FILE", help="YAML or JSON: which holder has which expert "
                       "(default: spread evenly over the expert ranks)")
    group.add_argument("--hetermoe-schedule", metavar="|".join(SCHEDULES),
                       help="order of tasks: zebra (default), zebra whose next wave begins while the last one goes "
                       "backward, or one microbatch at a time, for comparison")
    group.add_argument("--hetermoe-wave", metavar="R",
                       help="the most microbatches on the way together (default: all of a step)")
    group.add_argument("--hetermoe-attention", metavar="|".join(ATTENTION_KERNELS),
                       help="attention where there is no transformer-engine: torch's kernels, or Megatron's own")
    group.add_argument("--hetermoe-experts", metavar="|".join(EXPERT_KERNELS), help="experts of a rank one after the "
                       "other, or as grouped matrix products (default: where the GPU has them)")
    group.add_argument("--hetermoe-expert-impl", metavar="|".join(EXPERT_IMPLS), help="whose linear layers experts have that "
                       "run one after the other (default: those of --transformer-impl, where all ranks with experts can)")
    group.add_argument("--hetermoe-expert-precision", metavar="|".join(PRECISIONS), help="of the experts beside "
                       "attention in bf16, for GPUs without bf16 (default: that of all else)")
    group.add_argument("--hetermoe-weight-gradients", metavar="|".join(WEIGHT_GRADIENTS), help="with those of "
                       "activations (default); or delayed, after these have gone out; or merged, those of experts only, one "
                       "product for all microbatches of a layer and wave, for which their rows are kept")
    group.add_argument("--hetermoe-plan", metavar="FILE", help="plan.json of an earlier run or of `hetermoe plan`")
    group.add_argument("--hetermoe-trace", metavar="DIR", help="record every task's start and end there")
    group.add_argument("--hetermoe-dry-run", action="store_true", help="train three steps, print what the plan predicted "
                       "beside what was measured, save nothing")
    group.add_argument("--hetermoe-slow-down", metavar="WHAT=FACTOR,...", help="without a GPU: tasks wait until they took "
                       f"so many times as long, by role or by task and role ({EXAMPLE})")
    group.add_argument("--hetermoe-stall-timeout", metavar="SECONDS", help="all ranks end within so many seconds after "
                       f"one has died or stopped (default {STALL_TIMEOUT})")
    group.add_argument("--hetermoe-self-check", metavar="N", help="every N steps compare checksums of all that ranks "
                       "sent to each other with what came (default: never)")
    group.add_argument("--hetermoe-on-save-failure", metavar="|".join(ON_SAVE_FAILURE), help="end the run (default), "
                       "or go on training, when a checkpoint cannot be written")
    group.add_argument("--hetermoe-cuda-graphs", action="store_true", help="attention ranks queue what they compute between "
                       "transfers by one launch, for short sequences on fast GPUs")


def parse_flags(argv: Sequence[str], problems: Problems) -> tuple[Flags, list[str]]:
    """Takes the ``--hetermoe`` flags out of a command line.

    Args:
        argv: the command line.
        problems: gets what is wrong: an unknown flag with this prefix, a missing or ill-typed value, a flag without
            ``--hetermoe``.

    Returns:
        The flags, as far as they could be read, and the rest of the command line for Megatron.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_flags(parser)
    ours, rest = _split(argv, parser, problems)
    parsed, _ = parser.parse_known_args(ours)
    values = {}
    for field in fields(Flags):
        value = getattr(parsed, "enabled" if field.name == "enabled" else f"hetermoe_{field.name}")
        value = "--" if value == [] else value  # argparse takes it for the end of flags, after "=" too
        if value is not None and field.type == "int | None":
            value = _positive(value, field.name, problems)
        values[field.name] = value
    flags = Flags(**values)
    for name, allowed in (
        ("schedule", SCHEDULES), ("attention", ATTENTION_KERNELS), ("experts", EXPERT_KERNELS),
        ("expert_impl", EXPERT_IMPLS), ("expert_precision", PRECISIONS), ("weight_gradients", WEIGHT_GRADIENTS),
        ("on_save_failure", ON_SAVE_FAILURE),
    ):
        if getattr(flags, name) not in (None, *allowed):
            problems.add(f"{PREFIX}-{name.replace('_', '-')} is {getattr(flags, name)!r}; it must be one of "
                         f"{', '.join(allowed)}")
    if flags.slow_down is not None:
        parse_slow_down(flags.slow_down, problems)
    if flags.dry_run and flags.trace:
        problems.add(f"{PREFIX}-trace beside {PREFIX}-dry-run: one run is timed for either; leave one out")
    given = [f"{PREFIX}-{name.replace('_', '-')}" for name, value in vars(flags).items()
             if name != "enabled" and value not in (None, False)]
    if given and not flags.enabled:
        problems.add(f"{', '.join(given)} without {PREFIX}: add {PREFIX}, or leave them out for plain Megatron")
    return flags, rest


def _split(argv: Sequence[str], parser: argparse.ArgumentParser, problems: Problems) -> tuple[list[str], list[str]]:
    """Separates our flags, each with its value, from the rest; notes unknown ones and missing values."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    ours: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, joined, value = word.partition("=")
        if name != PREFIX and not name.startswith(PREFIX + "-"):
            rest.append(word)
        elif name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            problems.add(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))
            if not joined and words and not words[0].startswith("--"):
                words.pop(0)
        elif actions[name].nargs == 0:
            if joined:
                problems.add(f"{name} takes no value")
            ours.append(name)
        elif joined:
            ours.append(f"{name}={value}")
        elif words and not words[0].startswith("--"):
            ours.append(f"{name}={words.pop(0)}")
        else:
            problems.add(f"{name} needs a value ({actions[name].metavar})")
    return ours, rest


def _positive(text: str, name: str, problems: Problems) -> int | None:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST:
        problems.add(f"{PREFIX}-{name.replace('_', '-')} is {reprlib.repr(text)}; it must be a whole number from 1 on"
                     + (f", and at most {MOST}" if value > MOST else ""))
        return None
    return value
