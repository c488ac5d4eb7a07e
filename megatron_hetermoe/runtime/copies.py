"""Rows of which several experts get a copy: the copies of each row, and the sum of what experts make of them.

A token crosses to a holder once, as a row there, whichever number of the holder's experts it goes to. Copies are made where
the experts are, and summed there. Rows are copies too, of a token, which goes to several holders. Each of the two is the
other one's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import embedding_bag

from megatron_hetermoe.runtime.device import has_kernels


@dataclass(frozen=True)
class Copies:
    """Which row each copy is of.

    Attributes:
        source: [copies], int32, the row.
        by_row: [at least copies], the copies in the order of their rows; what is behind them is the number of some copy.
        starts: [rows + 1], of by_row's type, where those of each row begin there, and the last one's end.
    """

    source: torch.Tensor
    by_row: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, source: torch.Tensor, rows: int) -> Copies:
        """From ``source`` and the number of rows. The host does not wait for the device."""
        ordered, by_row = source.sort(stable=True)
        every = torch.arange(rows + 1, dtype=source.dtype, device=source.device)
        return cls(source, by_row, torch.searchsorted(ordered, every))

    @classmethod
    def where(cls, goes: torch.Tensor, most: int) -> Copies:
        """A copy of each row for each place that it goes to, sorted by place, then by row. How many there are is known on the
        device alone, and the host does not wait for it: behind those that there are, ``source`` has others, of row 0, of which
        no sum has a part.

        Args:
            goes: [places, rows], True where a row goes to a place.
            most: copies to make room for; no more are True.
        """
        narrow = torch.int32
        number = goes.view(-1).cumsum(dim=0, dtype=narrow) - 1  # of each copy
        of_row = goes.cumsum(dim=0, dtype=narrow)
        starts = torch.cat([of_row.new_zeros(1), of_row[-1].cumsum(dim=0, dtype=narrow)])
        place = (starts[:-1] + of_row - 1).view(-1)
        rows = torch.arange(goes.shape[1], dtype=narrow, device=goes.device).expand_as(goes).reshape(-1)

        def put(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            # One more, for all that is no copy.
            return values.new_zeros(most + 1).scatter_(0, torch.where(goes.view(-1), at, most).long(), values)[:most]

        return cls(put(rows, number), put(number, place), starts)

    def first(self, copies: int) -> Copies:
        """Of so many copies, which are all that there are."""
        return replace(self, source=self.source[:copies])

    def expanded(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, width] to [copies, width]."""
        return _Expanded.apply(rows, self)

    def summed(self, copies: torch.Tensor) -> torch.Tensor:
        """[copies, width] to [rows, width]: sums in fp32 or wider, in the order of the copies, so that they are always the
        same."""
        return _Summed.apply(copies, self)


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, copies: Copies) -> torch.Tensor:
        ctx.save_for_backward(copies.by_row, copies.starts)
        return rows.index_select(0, copies.source)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(grad, *ctx.saved_tensors), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, copies: Copies) -> torch.Tensor:
        ctx.save_for_backward(copies.source)
        return _sum(outputs, copies.by_row, copies.starts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.index_select(0, *ctx.saved_tensors), None


def _sum(copies: torch.Tensor, by_row: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """As ``Copies.summed``, without a graph."""
    if has_kernels(copies.device):
        from megatron_hetermoe.runtime import kernels

        return kernels.summed(copies.contiguous(), by_row, starts)
    if not len(copies):
        return copies.new_zeros(len(starts) - 1, *copies.shape[1:])
    # torch's kernel for the CPU rounds a half of bf16 away from zero; all else, the GPU's too, rounds it to even.
    addends = copies.float() if copies.dtype is torch.bfloat16 and not copies.is_cuda else copies
    # A last bag has what is behind the last row's copies.
    return embedding_bag(by_row, addends.contiguous(), starts, mode="sum")[:-1].to(copies.dtype)


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
