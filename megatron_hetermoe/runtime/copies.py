"""Rows of which several experts get a copy: the copies of each row, and the sum of what experts make of them.

A token crosses to a holder once, as a row there, whichever number of the holder's experts it goes to. Copies are made where
the experts are, and summed there. Each of the two is the other one's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Copies:
    """Which row each copy is of. Every row has at least one.

    Attributes:
        source: [copies], int32, the row.
        by_row: [copies], int64, the copies in the order of their rows.
        starts: [rows], int64, where those of each row begin in ``by_row``.
    """

    source: torch.Tensor
    by_row: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, source: torch.Tensor, rows: int) -> Copies:
        """From ``source`` and the number of rows. The host does not wait for the device."""
        ordered, by_row = source.sort(stable=True)
        every = torch.arange(rows, dtype=source.dtype, device=source.device)
        return cls(source, by_row, torch.searchsorted(ordered, every))

    def expanded(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, width] to [copies, width]."""
        return _Expanded.apply(rows, self)

    def summed(self, copies: torch.Tensor) -> torch.Tensor:
        """[copies, width] to [rows, width]: sums in fp32 or wider, in the order of the copies, so that they are always the
        same."""
        return _Summed.apply(copies, self)

    def _expand(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, self.source)

    def _sum(self, copies: torch.Tensor) -> torch.Tensor:
        if not len(self.starts):
            return copies
        # torch's kernel for the CPU rounds a half of bf16 away from zero; all else, the GPU's too, rounds it to even.
        addends = copies.float() if copies.dtype is torch.bfloat16 and not copies.is_cuda else copies
        return embedding_bag(self.by_row, addends, self.starts, mode="sum").to(copies.dtype)


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, copies: Copies) -> torch.Tensor:
        ctx.copies = copies
        return copies._expand(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.copies._sum(grad.contiguous()), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, copies: Copies) -> torch.Tensor:
        ctx.copies = copies
        return copies._sum(outputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.copies._expand(grad), None


def labels_of(rows: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """What is sent of copies beside their rows, as one tensor: a message takes the host longer than its few bytes the network.

    Args:
        rows: [copies], int32, the row that each is of.
        probs: [copies], in any precision.

    Returns:
        [copies, words], integers with the bits of both (``from_labels``).
    """
    word = _word(probs.dtype)
    return torch.cat([part.view(word).view(len(part), part.itemsize // word.itemsize) for part in (rows, probs)], dim=1)


def empty_labels(copies: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer for the labels of so many copies whose probabilities are of this type."""
    word = _word(dtype)
    return torch.empty(copies, (torch.int32.itemsize + dtype.itemsize) // word.itemsize, dtype=word, device=device)


def from_labels(labels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, [copies], int32, and the probabilities, [copies], of a type."""
    rows = torch.int32.itemsize // labels.element_size()
    # A copy of each: what is in one place may be viewed as wider elements.
    return tuple(part.clone(memory_format=torch.contiguous_format).view(of).view(-1) for part, of in (
        (labels[:, :rows], torch.int32), (labels[:, rows:], dtype)))


def _word(dtype: torch.dtype) -> torch.dtype:
    """What both int32 and a type are whole numbers of, and NCCL sends."""
    return torch.uint8 if dtype.itemsize == 2 else torch.int32


def by_expert(copies: torch.Tensor, counts: Sequence[Sequence[int]], order: Sequence[int]) -> torch.Tensor:
    """Copies that are sorted by owner, then by expert, sorted by expert, then by owner.

    Args:
        copies: [copies, ...].
        counts: of each owner for each expert, [owners][experts].
        order: that of the experts in the result.
    """
    chunks = copies.split([count for of_owner in counts for count in of_owner])
    return torch.cat([chunks[first + expert] for expert in order for first in range(0, len(chunks), len(order))])
