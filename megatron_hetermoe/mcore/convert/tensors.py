"""Which tensors of a Hugging Face model a parameter of Megatron is made of, and how.

Megatron keeps together what Hugging Face keeps apart: queries, keys and values, by group of attention heads, and the two
first matrices of a gated feed-forward network.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer.

    Attributes:
        groups: heads of keys and of values.
        queries: heads of queries in each group.
        width: of a head.
    """

    groups: int
    queries: int
    width: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Heads:
        """Those of Megatron's arguments."""
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        return cls(groups, args.num_attention_heads // groups, args.kv_channels)


class Whole:
    """One tensor, the same on both sides."""

    def shapes(self, shape: Sequence[int], heads: Heads) -> list[tuple[int, ...]]:
        """Shapes of the parts of a whole of ``shape``."""
        return [tuple(shape)]

    def join(self, parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
        """Megatron's tensor of Hugging Face's."""
        return parts[0]

    def split(self, whole: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
        """Hugging Face's tensors of Megatron's."""
        return [whole]


class Stacked(Whole):
    """Two tensors of one shape, one above the other: the gate, then what it gates."""

    def shapes(self, shape: Sequence[int], heads: Heads) -> list[tuple[int, ...]]:
        return [(shape[0] // 2, *shape[1:])] * 2

    def join(self, parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
        return torch.cat(list(parts))

    def split(self, whole: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
        return list(whole.chunk(2))


class Grouped(Whole):
    """Queries, keys and values: group by group its queries' heads, its key's and its value's. Weights or biases."""

    def shapes(self, shape: Sequence[int], heads: Heads) -> list[tuple[int, ...]]:
        rows = heads.groups * heads.width
        return [(rows * heads.queries, *shape[1:]), (rows, *shape[1:]), (rows, *shape[1:])]

    def join(self, parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
        by_group = [part.reshape(heads.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, whole: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
        by_group = whole.reshape(heads.groups, -1, *whole.shape[1:])
        parts = by_group.split([heads.queries * heads.width, heads.width, heads.width], dim=1)
        return [part.flatten(0, 1) for part in parts]


WHOLE, STACKED, GROUPED = Whole(), Stacked(), Grouped()


@dataclass(frozen=True)
class Rule:
    """A parameter of Megatron and what it is made of.

    Attributes:
        megatron: its name, with ``{layer}`` and ``{expert}`` for numbers.
        parts: names of Hugging Face's tensors, with the same numbers.
        form: how they are put together.
    """

    megatron: str
    parts: tuple[str, ...]
    form: Whole = WHOLE

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        escaped = re.escape(self.megatron)
        for number in ("layer", "expert"):
            escaped = escaped.replace(re.escape("{%s}" % number), rf"(?P<{number}>\d+)")
        return re.compile(escaped)

    def named(self, parameter: str) -> tuple[str, ...] | None:
        """Names of the parts of a parameter; None when the rule is not about it."""
        match = self._pattern.fullmatch(parameter)
        return tuple(part.format(**match.groupdict()) for part in self.parts) if match else None
