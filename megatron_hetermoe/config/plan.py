"""The Plan: everything that a run decides before a rank starts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Prediction, Step, TaskSeconds

FORMAT = 1
SCHEDULES = ("zebra", "overlapped", "sequential")
PRECISIONS = ("fp32", "bf16", "fp16")
EXPERT_PRECISIONS = {"fp32": ("fp32",), "bf16": ("bf16", "fp16", "fp32"), "fp16": ("fp16",)}  # beside attention's
ATTENTION_KERNELS = ("auto", "flash", "efficient", "math", "megatron")
EXPERT_KERNELS = ("auto", "sequential", "grouped")
EXPERT_IMPLS = ("auto", "local", "transformer_engine")
WEIGHT_GRADIENTS = TOGETHER, DELAYED, MERGED = ("together", "delayed", "merged")
_PARTS = {part.__name__: part for part in (ModelShape, Step, Prediction, TaskSeconds)}  # of a plan, mappings in its file


@dataclass(frozen=True)
class Plan:
    """What executor, checkpoint and trace read; flags, recipe and plan file all resolve to it.

    Attributes:
        model: the model's shape.
        attention_ranks: attention ranks of all ZP groups together.
        expert_ranks: expert ranks of all ZP groups together.
        groups: G, the number of ZP groups, in each pipeline stage.
        placement: for each layer from 1 on, the holder of each expert (attention ranks 0 to M-1 of a ZP group, then
            its expert ranks from M on, as many together as ``expert_tensor_parallel`` says); empty for a layer without
            experts.
        schedule: one of SCHEDULES; "overlapped" is zebra whose next wave goes forward while the last one goes backward.
        wave: the most microbatches on the way together, None for all of a step.
        attention_precision: of all parameters but the experts', one of PRECISIONS.
        expert_precision: of the experts, whichever rank they are on, one of EXPERT_PRECISIONS.
        attention_kernel: one of ATTENTION_KERNELS, where there is no transformer-engine.
        expert_kernel: one of EXPERT_KERNELS: one expert after the other, or all as grouped matrix products.
        tensor_parallel: attention ranks that share the dense weights and a microbatch.
        context_parallel: tensor-parallel groups of attention ranks that have parts of one sequence.
        expert_tensor_parallel: expert ranks that share the weights of their experts.
        weight_gradients: one of WEIGHT_GRADIENTS: with those of activations; or in tasks of their own after these; or the
            experts' alone in tasks of their own, one for a layer and a wave, and all others with those of activations.
        stage_layers: how many layers each pipeline stage has; empty where there is one stage. With virtual stages, how many
            each chunk has: the first of each stage, then the second of each, and so on, which is the order in the model.
        pools: for each member of a ZP group, the pool of the cluster file that it is of; empty when no cluster file
            was there.
        step: the step that was planned for, None when nothing was predicted.
        predicted: what is expected of it.
        tasks: what is expected of the tasks of each pipeline stage; empty when nothing was predicted.
        virtual_stages: chunks that each pipeline stage has.
        expert_impl: whose linear layers experts have, whichever rank they are on, one of EXPERT_IMPLS: torch's, or
            transformer-engine's.
    """

    model: ModelShape
    attention_ranks: int
    expert_ranks: int
    groups: int
    placement: tuple[tuple[int, ...], ...]
    schedule: str = "zebra"
    wave: int | None = None
    attention_precision: str = "fp32"
    expert_precision: str = "fp32"
    attention_kernel: str = "auto"
    expert_kernel: str = "auto"
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_tensor_parallel: int = 1
    weight_gradients: str = TOGETHER
    stage_layers: tuple[int, ...] = ()
    pools: tuple[str, ...] = ()
    step: Step | None = None
    predicted: Prediction | None = None
    tasks: tuple[TaskSeconds, ...] = ()
    virtual_stages: int = 1
    expert_impl: str = "auto"

    @property
    def stages(self) -> int:
        """P, the number of pipeline stages."""
        return max(1, len(self.stage_layers) // max(1, self.virtual_stages))

    def chunks_of_stage(self, stage: int) -> tuple[range, ...]:
        """The layers, from 1 on, of each chunk of a pipeline stage, from 0 on; of the stage itself where it is one."""
        if not self.stage_layers:
            return (range(1, self.model.layers + 1),)
        parts = range(stage, len(self.stage_layers), self.stages)
        firsts = [1 + sum(self.stage_layers[:part]) for part in parts]
        return tuple(range(first, first + self.stage_layers[part]) for first, part in zip(firsts, parts))

    @property
    def has_loss_scale(self) -> bool:
        """Whether gradients may overflow, on whatever rank."""
        return "fp16" in (self.attention_precision, self.expert_precision)

    def to_json(self) -> str:
        """The plan as the text of a plan file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_plan(path: str | Path) -> Plan:
    """Reads a plan file.

    Raises:
        UsageError: where it cannot be read, and as ``plan_from_json``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text, or its name is none"
        raise UsageError([f"cannot read the plan {path}: {reason}"]) from None
    return plan_from_json(text, str(path))


def plan_from_json(text: str, origin: str) -> Plan:
    """The plan that a file holds.

    Args:
        text: the file's content.
        origin: the file's name, for messages.

    Raises:
        UsageError: with everything that is not as ``Plan.to_json`` writes it. What the values mean for each
            other and for the model is checked where a plan is resolved, not here.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # the former for a number of thousands of digits too
        raise UsageError([f"{origin} is not JSON ({error}); write it with `hetermoe plan`"]) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError([f"{origin} is not a plan of format {FORMAT}; write it with this version's `hetermoe plan`"])
    del document["format"]
    problems = Problems()
    values = _fields_of(Plan, document, origin, problems)
    for field in dataclasses.fields(Plan):
        kind = _PARTS.get(_inner(str(field.type)).removesuffix(" | None"))
        value = values.get(field.name)
        if kind and value is not None:
            where = f"{origin}: {field.name}"
            if isinstance(value, tuple):
                values[field.name] = tuple(_part_of(kind, one, where, problems) for one in value)
            else:
                values[field.name] = _part_of(kind, value, where, problems)
    problems.raise_if_any()
    return Plan(**values)


def _part_of(kind: type, document: Any, where: str, problems: Problems) -> Any:
    """The part of a plan that a mapping of its file describes; None, with what is wrong noted, where it describes none."""
    own = Problems()
    fields = _fields_of(kind, document, where, own)
    with problems.taking():
        own.raise_if_any()
        return kind(**fields)


def _fields_of(kind: type, document: Any, where: str, problems: Problems) -> dict[str, Any]:
    """The document's values for the fields of a dataclass, with lists as tuples; notes what does not fit."""
    if not isinstance(document, dict):
        problems.add(f"{where} is not a mapping")
        return {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in document.keys() - fields.keys():
        problems.add(f"{where}: unknown key {name!r}")
    values = {}
    for name, field in fields.items():
        if name not in document:
            if field.default is dataclasses.MISSING:
                problems.add(f"{where}: {name!r} is missing")
        elif not _fits(document[name], str(field.type)):
            problems.add(f"{where}: {name!r} is {document[name]!r}, which is not of type {field.type}")
        else:
            values[name] = _as_tuple(document[name])
    return values


def _fits(value: Any, annotation: str) -> bool:
    """Whether a JSON value has the type that a field's annotation names."""
    if annotation.endswith(" | None"):
        return value is None or _fits(value, annotation.removesuffix(" | None"))
    if annotation.startswith("tuple["):
        return isinstance(value, list) and all(_fits(item, _inner(annotation)) for item in value)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"bool": bool, "str": str}.get(annotation, dict))


def _inner(annotation: str) -> str:
    """What a tuple's annotation says of its items; any other annotation as it is."""
    return annotation.removeprefix("tuple[").removesuffix(", ...]") if annotation.startswith("tuple[") else annotation


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value
