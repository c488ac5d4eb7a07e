"""The asymmetric dispatcher: an attention rank's side of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hetermoe.topology.placement import Placement


@dataclass
class DispatchState:
    """What the dispatcher must remember of one microbatch in one layer between dispatch and combine.

    Attributes:
        counts: tells, for each holder of the layer, ascending, the tokens for each of its experts.
        mapping: for each routed row, the token that it is a copy of.
        hidden_shape: of the layer's input, [sequence, batch, hidden].
    """

    counts: Callable[[], list[list[int]]] | None = None
    mapping: torch.Tensor | None = None
    hidden_shape: torch.Size | None = None

    def count(self, per_expert: torch.Tensor, experts_of_holder: Sequence[int]) -> None:
        """Takes the tokens for each expert, in the order of holders; the host learns them while the device goes on."""
        self.counts = _counts_on_host(per_expert, experts_of_holder)


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
        self._order = torch.tensor(placement.expert_order(layer), device=torch.cuda.current_device())
        self._experts_of_holder = [len(placement.held(layer, holder)) for holder in placement.holders_of(layer)]
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
        """Sorts tokens by holder, then by the holder's local expert.

        Args:
            tokens: [sequence, batch, hidden].
            routing_map: [tokens, experts], True where a token goes to an expert.
            probs: [tokens, experts].

        Returns:
            Routed tokens, [routed, hidden], and their probabilities, [routed], in the precision of ``probs``.
        """
        state = self._state
        state.hidden_shape = tokens.shape
        routing_map, probs = routing_map[:, self._order], probs[:, self._order]
        state.count(routing_map.sum(dim=0), self._experts_of_holder)
        rows = routing_map.shape[0] * self.config.moe_router_topk
        if self.config.moe_expert_capacity_factor is not None:  # tokens are dropped, so only the device knows how many
            rows = sum(map(sum, state.counts()))
        routed, routed_probs, state.mapping, *_ = permute(
            tokens.reshape(-1, tokens.shape[-1]), routing_map, probs=probs, num_out_tokens=rows,
            fused=self.config.moe_permute_fusion,
        )
        return routed, routed_probs

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
        """Sums each token's outputs, [routed, hidden], into the layer's shape, [sequence, batch, hidden]."""
        state = self._state
        shape = torch.Size((state.hidden_shape[:-1].numel(), state.hidden_shape[-1]))
        summed = unpermute(hidden_states, state.mapping, restore_shape=shape, fused=self.config.moe_permute_fusion)
        return summed.view(state.hidden_shape)


def _counts_on_host(counts: torch.Tensor, experts_of_holder: Sequence[int]) -> Callable[[], list[list[int]]]:
    """Starts a copy of [experts] to the host; what is returned waits for it and splits it by holder."""
    copied = None
    if counts.is_cuda:
        counts = torch.empty_like(counts, device="cpu", pin_memory=True).copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

    def on_host() -> list[list[int]]:
        if copied is not None:
            copied.synchronize()
        return [part.tolist() for part in counts.split(experts_of_holder)]

    return on_host
