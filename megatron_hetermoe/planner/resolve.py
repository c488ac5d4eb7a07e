"""From flags, files and the model's shape to one Plan: the one place where a run's input is validated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX, Flags
from megatron_hetermoe.config.plan import (
    ATTENTION_KERNELS, EXPERT_IMPLS, EXPERT_KERNELS, EXPERT_PRECISIONS, SCHEDULES, WEIGHT_GRADIENTS, Plan, read_plan,
)
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.topology.layout import Layout, layout_of, layout_problems, stage_problems
from megatron_hetermoe.topology.placement import even_placement, placement_from_document

# Flags that a plan file decides, and the plan's field that each is shorthand for.
PLANNED = {
    "attention_ranks": "attention_ranks", "expert_ranks": "expert_ranks", "groups": "groups", "schedule": "schedule",
    "wave": "wave", "attention": "attention_kernel", "experts": "expert_kernel",
    "expert_impl": "expert_impl", "expert_precision": "expert_precision", "weight_gradients": "weight_gradients",
}


class Parallelism(NamedTuple):
    """What Megatron's flags say of ranks that share weights or sequences, as ``Layout`` has it, and of pipeline stages, as
    ``Plan`` has them."""

    tensor: int = 1
    expert_tensor: int = 1
    context: int = 1
    stage_layers: tuple[int, ...] = ()
    virtual_stages: int = 1

    @property
    def stages(self) -> int:
        """P."""
        return max(1, len(self.stage_layers) // self.virtual_stages)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As ``Layout`` takes them."""
        return self.tensor, self.expert_tensor, self.context, self.stages


def resolve(
    flags: Flags, shape: ModelShape, precision: str, world_size: int, problems: Problems,
    parallelism: Parallelism = Parallelism(),
) -> Plan | None:
    """The run's plan.

    Args:
        flags: what the user said.
        shape: of the model that Megatron's flags describe.
        precision: of the parameters, one of ``config.plan.PRECISIONS``.
        world_size: ranks that the launcher started.
        problems: gets everything that is wrong.
        parallelism: what Megatron's flags say of it.

    Returns:
        The plan, or None when there are problems with it.
    """
    found = Problems()
    try:
        if flags.plan:
            plan = _from_file(flags, shape, precision, parallelism, found)
        else:
            plan = _from_flags(flags, shape, precision, world_size, parallelism, found)
        if plan is not None:
            _check(plan, world_size, found)
        found.raise_if_any()
        return plan
    except UsageError as error:
        problems.extend(error)
        return None


def _from_flags(
    flags: Flags, shape: ModelShape, precision: str, world_size: int, parallelism: Parallelism,
    problems: Problems,
) -> Plan | None:
    for name in ("attention_ranks", "expert_ranks"):
        if getattr(flags, name) is None:
            problems.add(f"{_flag(name)} is missing: give it, or {PREFIX}-plan")
    if flags.schedule == "sequential" and flags.wave is not None:
        problems.add(f"{PREFIX}-wave {flags.wave} contradicts {PREFIX}-schedule sequential, which has one microbatch "
                     f"on the way at a time: leave one out")
    if flags.attention_ranks is None or flags.expert_ranks is None:
        return None
    groups = flags.groups or 1
    for problem in layout_problems(flags.attention_ranks, flags.expert_ranks, groups, *parallelism.sizes):
        problems.add(problem)
    _check_world(flags.attention_ranks, flags.expert_ranks, world_size, problems)
    problems.raise_if_any()  # before a placement is made for as many ranks as a slip of a digit asks for
    layout = Layout(flags.attention_ranks, flags.expert_ranks, groups, *parallelism.sizes)
    placement = even_placement(shape, layout)
    if flags.placement:
        placement = placement_from_document(_read_yaml(flags.placement), shape, layout, flags.placement)
    return Plan(
        shape, layout.attention_ranks, layout.expert_ranks, groups, placement.holders, flags.schedule or "zebra",
        flags.wave, precision, flags.expert_precision or precision, flags.attention or "auto", flags.experts or "auto",
        parallelism.tensor, parallelism.context, parallelism.expert_tensor, flags.weight_gradients or "together",
        parallelism.stage_layers, virtual_stages=parallelism.virtual_stages, expert_impl=flags.expert_impl or "auto",
    )


def _from_file(
    flags: Flags, shape: ModelShape, precision: str, parallelism: Parallelism, problems: Problems
) -> Plan:
    plan = read_plan(flags.plan)
    for name, field in PLANNED.items():
        said, planned = getattr(flags, name), getattr(plan, field)
        if said is not None and said != planned:
            problems.add(f"{_flag(name)} {said} disagrees with {planned} in {flags.plan}: leave one out")
    if flags.placement:
        problems.add(f"{PREFIX}-placement beside {PREFIX}-plan: the plan has a placement; leave one out")
    differing = [
        f"{field.name} {getattr(plan.model, field.name)} there, {getattr(shape, field.name)} here"
        for field in dataclasses.fields(ModelShape) if getattr(plan.model, field.name) != getattr(shape, field.name)
    ]
    if differing:
        problems.add(f"{flags.plan} is for another model ({'; '.join(differing)}): make a plan for this one")
    for flag, said, planned in (
        ("--tensor-model-parallel-size", parallelism.tensor, plan.tensor_parallel),
        ("--expert-tensor-parallel-size", parallelism.expert_tensor, plan.expert_tensor_parallel),
        ("--context-parallel-size", parallelism.context, plan.context_parallel),
        ("--pipeline-model-parallel-size", parallelism.stages, plan.stages),
        ("virtual stages of each pipeline stage,", parallelism.virtual_stages, plan.virtual_stages),
    ):
        if said != planned:
            problems.add(f"{flag} {said} disagrees with {planned} in {flags.plan}: change the flag")
    if parallelism.stage_layers != plan.stage_layers and len(parallelism.stage_layers) == len(plan.stage_layers):
        problems.add(f"Megatron's flags give the pipeline's stages {list(parallelism.stage_layers)} layers, {flags.plan} "
                     f"{list(plan.stage_layers)}: change the flags")
    if plan.attention_precision != precision:
        problems.add(f"{flags.plan} has attention in {plan.attention_precision}, Megatron's flags say {precision}: "
                     f"change one")
    return plan


def _check(plan: Plan, world_size: int, problems: Problems) -> None:
    """What must hold of a plan whichever way it came."""
    for problem in layout_problems(
        plan.attention_ranks, plan.expert_ranks, plan.groups, plan.tensor_parallel, plan.expert_tensor_parallel,
        plan.context_parallel, plan.stages,
    ):
        problems.add(problem)
    for problem in stage_problems(plan):
        problems.add(problem)
    _check_world(plan.attention_ranks, plan.expert_ranks, world_size, problems)
    if plan.schedule not in SCHEDULES:
        problems.add(f"the plan's schedule is {plan.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    beside = EXPERT_PRECISIONS.get(plan.attention_precision, ())
    if plan.expert_precision not in beside:
        problems.add(f"experts in {plan.expert_precision} beside attention in {plan.attention_precision} are not supported: "
                     f"{PREFIX}-expert-precision may be {' or '.join(beside)} there")
    for name, allowed in (
        ("attention_kernel", ATTENTION_KERNELS), ("expert_kernel", EXPERT_KERNELS),
        ("expert_impl", EXPERT_IMPLS), ("weight_gradients", WEIGHT_GRADIENTS),
    ):
        if getattr(plan, name) not in allowed:
            problems.add(f"the plan's {name} is {getattr(plan, name)!r}; it must be one of {', '.join(allowed)}")
    if plan.wave is not None and plan.wave < 1:
        problems.add(f"the plan's wave is {plan.wave}; it must be from 1 on, or null for all of a step")
    if problems:
        return
    layout = layout_of(plan)
    holders = layout.holders
    if layout.expert_tensor > 1 and any(holder < layout.m for layer in plan.placement for holder in layer):
        problems.add(f"the placement has experts on attention ranks, where they are whole, and "
                     f"--expert-tensor-parallel-size {layout.expert_tensor} splits the others; Megatron's checkpoints have "
                     f"parts of one size only: place all experts on expert ranks, or leave the flag out")
    lengths = [len(layer) for layer in plan.placement]
    expected = [plan.model.experts if layer in plan.model.moe_layers else 0
                for layer in range(1, plan.model.layers + 1)]
    if lengths != expected:
        problems.add(f"the plan's placement has {lengths} experts by layer, the model {expected}")
    elif any(not 0 <= holder < holders for layer in plan.placement for holder in layer):
        problems.add(f"the plan's placement names holders beyond the {holders} that a ZP group has")


def _check_world(attention_ranks: int, expert_ranks: int, world_size: int, problems: Problems) -> None:
    needed = attention_ranks + expert_ranks
    if needed != world_size:
        problems.add(f"{attention_ranks} attention and {expert_ranks} expert ranks need {needed} ranks, but "
                     f"{world_size} were started (WORLD_SIZE): start {needed}, or change the ranks of a role")


def _flag(name: str) -> str:
    return f"{PREFIX}-{name.replace('_', '-')}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text, or its name is none"
        raise UsageError([f"cannot read {path}: {reason}"]) from None


def _read_yaml(path: str) -> object:
    try:
        return yaml.safe_load(_read(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets through what int() and dates raise
        raise UsageError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from None
