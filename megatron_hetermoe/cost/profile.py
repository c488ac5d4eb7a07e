"""What was measured on a kind of GPU: the profile file, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.curves import Curve, Notes
from megatron_hetermoe.cost.estimate import Seconds

FORMAT = 1
# Fields of the shape that a part's time depends on. Layers do not matter: parts are measured one by one.
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_position_dim", "v_head_dim")  # not in older profiles
_TIMED = ("hidden", "expert_ffn", "gated", "heads", "query_groups", "head_dim", "topk", *_LATENT)
_PARTS = ("attention", "attention_core_recomputed", "expert", "expert_activation_again", "head", "embedding")
_REQUIRED = ("attention", "expert")
_HOST = ("attention", "attention_core_recomputed", "expert", "expert_task", "head", "embedding")
# Bytes; each is optional and replaces the planner's own arithmetic.
_MEMORY = ("overhead", "attention_activation_per_token", "expert_activation_per_row", "expert_activation_again_per_row")

Points = dict[float, Seconds]


@dataclass(frozen=True)
class Profile:
    """A profile file's content.

    Attributes:
        kind: what was measured, such as "A40".
        taken_for: the ModelShape's fields that times depend on, and ``precision``.
        parts: for "attention" (one sequence, by its tokens), "attention_core_recomputed" (the same with selective
            recomputation), "expert" (each expert of an E task, by its tokens), "expert_activation_again" (the same where the backward
            computes the output of the activation again), "head" and "embedding" (by tokens): seconds of
            forward and backward, on a GPU without waiting for the host.
        optimizer: seconds a parameter, or None.
        memory: bytes, see _MEMORY.
        expert_task: seconds, forward and backward, of an E task beside those of its experts, or None where that was not
            measured: what a rank with few experts takes longer for each of them.
        host: seconds, forward and backward, in which the host queues what a GPU computes: for "attention" (an A task),
            "attention_core_recomputed", "head" and "embedding" of a microbatch, for "expert" (each expert of an E task) and
            "expert_task" (the task beside these); it does not depend on the number of tokens. 0 where the host computes itself,
            None where it was not measured.
    """

    kind: str
    taken_for: dict[str, Any]
    parts: dict[str, Points]
    optimizer: float | None = None
    memory: dict[str, float] | None = None
    expert_task: Seconds | None = None
    host: dict[str, Seconds] | None = None

    def to_json(self) -> str:
        """The text of a profile file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def taken_for(shape: ModelShape, precision: str) -> dict[str, Any]:
    """What a profile of this model's parts is taken for."""
    return {**{name: getattr(shape, name) for name in _TIMED}, "precision": precision}


def read_profile(path: str | Path) -> Profile:
    """Reads a profile file.

    Raises:
        UsageError: with everything that is not as ``Profile.to_json`` writes it: missing parts, figures that are no
            positive numbers.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError([f"cannot read the profile {path}: {error.strerror}"]) from None
    except (ValueError, RecursionError) as error:
        raise UsageError([f"the profile {path} is not JSON ({error})"]) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError([f"{path} is not a profile of format {FORMAT} (megatron_hetermoe/cost/profile.py says what one "
                          f"holds)"])
    problems = Problems()
    known = {"format", "kind", "taken_for", "parts", "optimizer", "memory", "expert_task", "host"}
    for key in sorted(document.keys() - known):
        problems.add(f"{path}: unknown key {key!r}; a profile has {', '.join(sorted(known))}")
    for key, type_ in (("kind", str), ("taken_for", dict), ("parts", dict)):
        if not isinstance(document.get(key), type_):
            problems.add(f"{path}: {key!r} is missing or no {'text' if type_ is str else 'mapping'}; profile anew")
    if not isinstance(document.get("parts"), dict):
        problems.raise_if_any()
    parts = {}
    for name in sorted(document["parts"].keys() - set(_PARTS)):
        problems.add(f"{path}: unknown part {name!r}; parts are {', '.join(_PARTS)}")
    for name in _PARTS:
        points = document["parts"].get(name)
        if points or name in _REQUIRED:
            parts[name] = _points(points, f"{path}: {name}", problems)
    optimizer = document.get("optimizer")
    if optimizer is not None and not _positive(optimizer):
        problems.add(f"{path}: optimizer is {optimizer!r}; it must be a positive number of seconds a parameter")
    expert_task = document.get("expert_task")
    if expert_task is not None and not (
            isinstance(expert_task, list) and len(expert_task) == 2 and all(map(_positive, expert_task))):
        problems.add(f"{path}: expert_task is {expert_task!r}; it must be positive seconds of forward and backward")
        expert_task = None
    memory = document.get("memory") or {}
    if not isinstance(memory, dict):
        problems.add(f"{path}: memory is no mapping of {', '.join(_MEMORY)} to bytes")
        memory = {}
    for name, value in memory.items():
        if name not in _MEMORY or not _positive(value):
            problems.add(f"{path}: memory {name} is {value!r}; known are {', '.join(_MEMORY)}, in positive bytes")
    host = _host(document.get("host"), f"{path}: host", problems)
    problems.raise_if_any()
    return Profile(document["kind"], document["taken_for"], parts, optimizer, memory, expert_task and tuple(expert_task), host)


def _host(entry: Any, where: str, problems: Problems) -> dict[str, Seconds] | None:
    """Seconds in which the host queues each part; None where nobody measured them."""
    if entry is None:
        return None
    wanted = f"{', '.join(_HOST)} to seconds of forward and backward, from 0 on"
    if not isinstance(entry, dict):
        problems.add(f"{where} is no mapping of {wanted}")
        return None
    found = {}
    for name, pair in entry.items():
        if name not in _HOST or not isinstance(pair, list) or len(pair) != 2 or not all(
                value == 0 and not isinstance(value, bool) or _positive(value) for value in pair):
            problems.add(f"{where} has {name}: {pair!r}; it maps {wanted}")
        else:
            found[name] = tuple(map(float, pair))
    return found


def _points(points: Any, where: str, problems: Problems) -> Points:
    """Seconds by size; notes whatever is no positive number."""
    wanted = "seconds of forward and backward"
    if not isinstance(points, Mapping) or not points:
        problems.add(f"{where} is missing: profile anew, it maps sizes to {wanted}")
        return {}
    result = {}
    for size, value in points.items():
        values = value if isinstance(value, list) else [value]
        try:
            number = float(size)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < float("inf") or len(values) != 2 or not all(map(_positive, values)):
            problems.add(f"{where} has {size}: {value!r}; it must map a positive size to {wanted}, all positive")
        else:
            result[number] = tuple(map(float, values))
    return result


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


class Profiled:
    """Seconds of each part of the model from a profile: the counterpart of ``cost.estimate.Estimate``.

    Args:
        profile: what was measured.
        shape: the model's.
        precision: of the parameters. For bf16, a profile in fp16 is one of a GPU that has no bf16.
        notes: gets what is read beyond the measurements.

    Raises:
        UsageError: when the profile was taken for other shapes.
    """

    estimated = False

    def __init__(self, profile: Profile, shape: ModelShape, precision: str, notes: Notes):
        # A GPU without bf16 is measured in fp16, and then takes experts only.
        self.bf16 = not (precision == "bf16" and profile.taken_for.get("precision") == "fp16")
        wanted = taken_for(shape, precision if self.bf16 else "fp16")
        there = {**dict.fromkeys(_LATENT, 0), **profile.taken_for}
        differing = [f"{name} {there.get(name)} there, {value} here"
                     for name, value in wanted.items() if there.get(name) != value]
        if differing:
            raise UsageError([f"the profile of {profile.kind} was taken for other shapes ({'; '.join(differing)}): "
                              f"take one for this model"])
        self.name = profile.kind
        self.memory_figures = profile.memory or {}
        self._shape, self._notes, self._profile = shape, notes, profile
        self._curves = {
            name: tuple(
                Curve(f"{profile.kind}, {name} {way}", "tokens",
                      {size: pair[index] for size, pair in points.items()}, notes)
                for index, way in enumerate(("forward", "backward"))
            )
            for name, points in profile.parts.items()
        }

    def attention(self, tokens: int, recompute: str) -> Seconds:
        """The attention part on one sequence."""
        part = "attention_core_recomputed" if recompute == "core_attn" else "attention"
        return self._read(part, tokens, recompute)

    def expert(self, tokens: float, recompute: str) -> Seconds:
        """One routed expert on that many tokens."""
        return self._read("expert", tokens, recompute)

    def expert_task(self, recompute: str) -> Seconds:
        """An E task beside its experts."""
        forward, backward = self._profile.expert_task or (0.0, 0.0)
        return forward, backward + (forward if recompute == "full" else 0)

    @property
    def host_is_known(self) -> bool:
        """Whether it is known what queueing takes the host."""
        return self._profile.host is not None

    @cached_property
    def has_host(self) -> bool:
        """Whether queueing is known to take the host something."""
        return any(map(any, (self._profile.host or {}).values()))

    def host(self, part: str, recompute: str) -> Seconds:
        """Seconds in which the host queues a part, as ``Profile.host`` names it; what is recomputed is queued again."""
        known = self._profile.host or {}
        if part == "attention" and recompute == "core_attn":
            part = "attention_core_recomputed" if "attention_core_recomputed" in known else part
        forward, backward = known.get(part, (0.0, 0.0))
        return forward, backward + (forward if recompute == "full" else 0)

    def activation_again(self, tokens: float) -> float:
        """What one expert's backward takes longer where it computes the activation's output again."""
        again, kept = (self._read(part, tokens, "none")[1] for part in ("expert_activation_again", "expert"))
        return max(0.0, again - kept)

    @property
    def has_activation_again(self) -> bool:
        """Whether that is known."""
        return "expert_activation_again" in self._curves

    def feed_forward(self, ffn: int, tokens: float, recompute: str) -> Seconds:
        """A shared expert or a dense part of width ffn: an expert's time, in proportion to its width."""
        if not ffn or not tokens:
            return 0.0, 0.0
        scale = ffn / self._shape.expert_ffn
        if scale != 1:
            self._notes.add(f"{self.name}: a feed-forward part of width {ffn} taken as {scale:.2f} of an expert")
        forward, backward = self._read("expert", tokens, recompute)
        return scale * forward, scale * backward

    def head(self, vocabulary: int, tokens: int) -> Seconds:
        """Final norm, output layer, loss."""
        return self._read("head", tokens, "none")

    def embedding(self, tokens: int) -> Seconds:
        """The embedding's rows."""
        return self._read("embedding", tokens, "none")

    def optimizer(self, parameters: float) -> float:
        """One step over that many parameters."""
        if self._profile.optimizer is None:
            self._notes.add(f"{self.name}: the optimizer was not measured and counts as nothing")
        return parameters * (self._profile.optimizer or 0.0)

    def has_recompute(self, recompute: str) -> bool:
        """Whether times with this recomputation are known."""
        return recompute != "core_attn" or "attention_core_recomputed" in self._curves

    def _read(self, part: str, tokens: float, recompute: str) -> Seconds:
        if part not in self._curves:
            self._notes.add(f"{self.name}: {part} was not measured and counts as nothing")
            return 0.0, 0.0
        forward, backward = (curve(tokens) for curve in self._curves[part])
        return forward, backward + (forward if recompute == "full" else 0)
