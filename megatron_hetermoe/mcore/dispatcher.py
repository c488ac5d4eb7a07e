"""The asymmetric dispatcher: an attention rank's side of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hetermoe.runtime.copies import Copies, labels_of
from megatron_hetermoe.runtime.transfers import TransferSizes
from megatron_hetermoe.topology.placement import Placement


@dataclass
class DispatchState:
    """What the dispatcher must remember of one microbatch in one layer between dispatch and combine.

    Attributes:
        sizes: tells what goes to each holder of the layer, ascending.
        labels: [copies, words], of each copy the row with the holder and the probability, as ``runtime.transfers.Routed`` has it.
        rows: of each token, for the holders that it goes to.
        hidden_shape: of the layer's input, [sequence, batch, hidden].
    """

    sizes: Callable[[], TransferSizes] | None = None
    labels: torch.Tensor | None = None
    rows: Copies | None = None
    hidden_shape: torch.Size | None = None

    def count(self, totals: torch.Tensor, experts_of_holder: Sequence[int]) -> None:
        """Takes the copies for each expert, in the order of holders, and behind them the rows for each holder; the host learns
        them while the device goes on."""
        self.sizes = _sizes_on_host(totals, experts_of_holder)


class AsymmetricDispatcher(MoETokenDispatcher):
    """Sorts tokens by the holders of their experts, and back.

    Stock dispatchers keep a microbatch's state on themselves, since between its dispatch and combine there is never
    another one in the layer. Zebra has R on the way, so the state belongs to the microbatch and is lent to the
    dispatcher while one of its methods runs. The transfers are tasks of their own; here they are the identity.

    Args:
        config: the transformer's.
        pg_collection: groups of the attention pool.
        placement: who holds which expert.
        layer: from 1 on.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, placement: Placement, layer: int
    ):
        super().__init__(config, pg_collection)
        device = torch.cuda.current_device()
        self._order = torch.tensor(placement.expert_order(layer), device=device)
        self._experts_of_holder = [len(placement.held(layer, holder)) for holder in placement.holders_of(layer)]
        holders = torch.arange(len(self._experts_of_holder), device=device)
        # Of each expert in that order.
        self._holder = holders.repeat_interleave(torch.tensor(self._experts_of_holder, device=device))
        self._state: DispatchState | None = None

    @contextmanager
    def lent(self, state: DispatchState) -> Iterator[None]:
        """Works on a microbatch's state inside the context."""
        self._state = state
        try:
            yield
        finally:
            self._state = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorts tokens by holder, each there once, and their probabilities by holder, then by the holder's local expert.

        How many rows there are is known on the device only, so there is room for as many as there may be: behind those that
        are sent are others, of whose gradients those of probabilities must be 0.

        Args:
            tokens: [sequence, batch, hidden].
            routing_map: [tokens, experts], True where a token goes to an expert.
            probs: [tokens, experts].

        Returns:
            Rows, [at least rows, hidden], and probabilities, [at least copies], in the precision of ``probs``.
        """
        state = self._state
        state.hidden_shape = tokens.shape
        routed = routing_map.t().index_select(0, self._order)  # [experts, tokens], by holder
        copies = routed.new_zeros(len(self._experts_of_holder), len(routing_map), dtype=torch.int32)
        crossing = copies.index_add(0, self._holder, routed.int()) > 0  # [holders, tokens]
        most = self._most_copies(len(routing_map))
        state.rows = Copies.where(crossing, min(most, crossing.numel()))
        row = crossing.cumsum(dim=1, dtype=torch.int32)  # [holders, tokens], each holder's from 1 on
        state.count(torch.cat([routed.sum(dim=1), row[:, -1]]), self._experts_of_holder)
        chosen = routed.view(-1).argsort(descending=True, stable=True)[:most]
        index = (row - 1).index_select(0, self._holder).view(-1).index_select(0, chosen)
        probs = probs.t().index_select(0, self._order).view(-1).index_select(0, chosen)
        state.labels = labels_of(index, probs.detach())
        return state.rows.expanded(tokens.reshape(-1, tokens.shape[-1])), probs

    def _most_copies(self, tokens: int) -> int:
        """The most copies that there may be of so many tokens."""
        config = self.config
        if not config.moe_pad_expert_input_to_capacity:
            return tokens * config.moe_router_topk
        experts = len(self._order)
        capacity = get_capacity(tokens * config.moe_router_topk, experts, config.moe_expert_capacity_factor)
        return experts * min(tokens, capacity)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The identity: D tasks carry tokens."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor):
        """Holders sort what they receive (``mcore.tasks``); an attention rank's own dispatcher is not asked."""
        raise AssertionError("experts run in E tasks")

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The identity, as token_dispatch."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The identity: C tasks carry outputs."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sums each token's outputs of all holders, [rows, hidden], into the layer's shape, [sequence, batch, hidden]."""
        state = self._state
        return state.rows.first(len(hidden_states)).summed(hidden_states).view(state.hidden_shape)


def _sizes_on_host(totals: torch.Tensor, experts_of_holder: Sequence[int]) -> Callable[[], TransferSizes]:
    """Starts a copy of [experts + holders] to the host; what is returned waits for it and splits it by holder."""
    copied = None
    if totals.is_cuda:
        totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def on_host() -> TransferSizes:
        if copied is not None:
            copied.synchronize()
        *counts, rows = (part.tolist() for part in totals.split([*experts_of_holder, len(experts_of_holder)]))
        return TransferSizes(rows, counts)

    return on_host
