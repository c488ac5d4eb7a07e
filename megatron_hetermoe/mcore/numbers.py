"""Where numbers first went wrong in a step: in which rank, layer and expert.

Megatron finds a loss or a gradient that is NaN or infinite (``--check-for-nan-in-loss-and-grad``) on whichever rank it
shows first, mostly in an attention rank's loss when an expert made it. An attention rank sees what goes to the experts
of a layer and what comes back from each holder, so it can tell. Where a token went to several of a holder's experts their sum
comes back; then those are named of which nothing good has come. Flags stay on the device until they are asked for, after a
finding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_hetermoe.mcore.experts import HeldExperts
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.copies import from_labels
from megatron_hetermoe.runtime.transfers import Routed, TransferSizes

UNEXPECTED = "Unexpected result"  # in Megatron's error, where --rerun-mode disabled has it raise one
_MOST = 4  # parameters that a message names


class Numbers:
    """What one rank saw of its own tokens, so an attention rank, in the forward passes of one step.

    Args:
        session: this rank's.
        enabled: whether to look at all; it reads every token twice a layer.
    """

    def __init__(self, session: Session, enabled: bool):
        self._session = session
        self._enabled = enabled
        self._sent: dict[tuple[int, int], torch.Tensor] = {}  # (layer, microbatch): which rows are finite
        self._came: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, TransferSizes]] = {}  # the same, the copies' rows, sizes

    def sent(self, layer: int, microbatch: int, tokens: torch.Tensor) -> None:
        """Tokens, [at least rows, hidden], on their way to the experts of a layer."""
        if self._enabled:
            self._sent[layer, microbatch] = tokens.isfinite().all(dim=1)

    def came(self, layer: int, microbatch: int, routed: Routed) -> None:
        """What the experts made of them, before it is summed."""
        if self._enabled:
            index, _ = from_labels(routed.labels, routed.probs_dtype)
            self._came[layer, microbatch] = routed.outputs.isfinite().all(dim=1), index, routed.sizes

    def first(self) -> str | None:
        """The first place in the model whose results are not finite, or None where all were."""
        for layer, microbatch in sorted(self._sent):
            where = f"layer {self._session.numbering.layer_in_model(layer)}, microbatch {microbatch + 1}"
            came = self._came.get((layer, microbatch))
            if not self._sent[layer, microbatch][:len(came[0]) if came else None].all():
                return f"{where}: in attention, or before it, on {self._name(self._session.rank)}"
            if came and not came[0].all():
                experts = self._experts_of(layer, *came)
                holder = self._session.stage_placement.holders[layer - 1][experts[0]]
                return f"{where}: in expert {' or '.join(map(str, experts))}, on {self._name(self._rank_of(holder))}"
        return None

    def _rank_of(self, holder: int) -> int:
        """The first rank of a holder of this rank's ZP group."""
        layout = self._session.layout
        return layout.rank_of(layout.group_of(self._session.rank), layout.members_of(holder)[0])

    def _experts_of(self, layer: int, finite: torch.Tensor, index: torch.Tensor, sizes: TransferSizes) -> list[int]:
        """The experts that the first row that is not finite may come from: of those that it went to, those of which no row is
        finite, or all where each has one that is."""
        spoiled, good, rows_of_copies = int((~finite).nonzero()[0]), finite.tolist(), iter(index.tolist())
        order = iter(self._session.stage_placement.expert_order(layer))
        went: list[int] = []
        suspects: list[int] = []
        for before, counts in zip(accumulate(sizes.rows, initial=0), sizes.counts):
            for count in counts:
                expert, rows = next(order), [before + row for row in islice(rows_of_copies, count)]
                if spoiled in rows:
                    went.append(expert)
                    suspects += [] if any(good[row] for row in rows) else [expert]
        return suspects or went

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._session.layout.role(rank)})"


def report(numbers: Numbers, chunks: Sequence[Any], session: Session) -> None:
    """Says on stderr where numbers went wrong. For a rank on which Megatron has found that they did.

    Args:
        numbers: of the step.
        chunks: of this rank's model, for weights and gradients.
        session: this rank's.
    """
    first = numbers.first()
    parts = [f"first {first}"] if first else []
    for what, names in (("weights", _not_finite(chunks, "data")), ("gradients", _not_finite(chunks, "main_grad"))):
        found = list(names)
        if found:
            more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
            parts.append(f"{what} of {', '.join(found[:_MOST])}{more}")
    said = "; ".join(parts) or "in the loss itself: all before it is finite"
    print(f"hetermoe: rank {session.rank} ({session.role}) has numbers that are not finite: {said}", file=sys.stderr,
          flush=True)


def _not_finite(chunks: Sequence[Any], attribute: str) -> Iterator[str]:
    """The parameters of which a tensor is not finite, experts' as layer and expert."""
    for model in map(unwrap_model, chunks):
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                tensor = getattr(parameter, attribute, None)
                if tensor is not None and tensor.numel() and not tensor.isfinite().all():
                    yield _described(model, path, name)


def _described(model: torch.nn.Module, path: str, name: str) -> str:
    """A parameter's name."""
    parts = path.split(".")
    for end in range(len(parts) - 1):
        module = model.get_submodule(".".join(parts[: end + 1]))
        if isinstance(module, HeldExperts):  # decoder.layers.L.mlp.experts.local_experts.J.linear_fc1
            expert = module.held[int(parts[end + 2])]
            return f"expert {expert} of layer {module.layer} ({'.'.join(parts[end + 3:])}.{name})"
    return f"{path}.{name}"
