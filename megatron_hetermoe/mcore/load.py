"""How evenly the router spreads tokens, said now and then: one that has collapsed fills one GPU and idles others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hetermoe.mcore.session import Session

EVERY = 20  # training steps from one look to the next
QUIET = 1000  # training steps in which an expert or a holder is not named again


class Load:
    """The rows of each expert in one step, of all attention ranks.

    Args:
        session: this rank's.
    """

    def __init__(self, session: Session):
        self._session = session
        self._layers = session.plan.model.moe_layers
        self._orders = {layer: session.placement.expert_order(layer) for layer in self._layers}
        self._rows = torch.zeros(len(self._layers), session.plan.model.experts, dtype=torch.int64)

    def note(self, layer: int, counts: Sequence[Sequence[int]]) -> None:
        """An attention rank's copies of one microbatch, as ``TransferSizes.counts``, in a layer as tasks number it."""
        layer = self._session.numbering.layer_in_model(layer)
        flat = torch.tensor([rows for of_holder in counts for rows in of_holder])
        self._rows[self._layers.index(layer), list(self._orders[layer])] += flat

    def uneven(self) -> dict[tuple[str, int, int], str]:
        """What to warn of, fullest first: for each a key, which stays, and a phrase. All ranks call it together."""
        dist.all_reduce(self._rows, group=self._session.control)
        topk = self._session.plan.model.topk
        found = []
        for layer, rows in zip(self._layers, self._rows.tolist()):
            tokens = sum(rows) / topk  # with capacity fewer, since what is dropped reaches no expert
            part = topk / len(rows)
            holders = self._session.placement.holders[layer - 1]
            found += [
                (got / tokens, ("expert", layer, expert),
                 f"expert {expert} of layer {layer}, on {self._of_holder(layer, holders[expert])}, gets "
                 f"{got / tokens:.0%} of all tokens, {got / tokens / part:.1f} times its part")
                for expert, got in enumerate(rows) if tokens and got / tokens >= limit(part)
            ]
            idle = set(holders) - {holder for holder, got in zip(holders, rows) if got}
            found += [(0.0, ("holder", layer, holder), f"no token of layer {layer} goes to {self._of_holder(layer, holder)}")
                      for holder in sorted(idle) if tokens]
        return {key: said for _, key, said in sorted(found, key=lambda one: (-one[0], one[1]))}

    def _of_holder(self, layer: int, holder: int) -> str:
        """A holder's ranks in each ZP group of a layer's stage."""
        layout, plan = self._session.layout, self._session.plan
        stage = next(stage for stage in range(plan.stages) if any(layer in layers for layers in plan.chunks_of_stage(stage)))
        ranks = [layout.rank_of(group, member)
                 for group in range(stage * layout.groups, (stage + 1) * layout.groups)
                 for member in layout.members_of(holder)]
        word = "rank" if len(ranks) == 1 else "ranks"
        return f"{word} {', '.join(map(str, ranks))} ({layout.role(ranks[0])})"


def limit(part: float) -> float:
    """The share of tokens from which an expert is named: four times its part, or half-way to all of them."""
    return min(4 * part, (1 + part) / 2)


class LoadWarnings:
    """Looks every so many steps and says what is new.

    Args:
        session: this rank's.
    """

    def __init__(self, session: Session):
        self._session = session
        self._named: dict[tuple[str, int, int], int] = {}  # the step in which each was named

    def of_step(self, step: int) -> Load | None:
        """What notes a training step, from 1 on, if it is one that is looked at."""
        return Load(self._session) if step % EVERY == 1 else None

    def look(self, load: Load, step: int) -> None:
        """Warns, on the run's first rank. All ranks call it together."""
        uneven = load.uneven()
        new = [said for key, said in uneven.items() if step - self._named.get(key, -QUIET) >= QUIET]
        if not new:
            return
        self._named.update(dict.fromkeys(uneven, step))
        if self._session.rank == 0:
            more = f"; and {len(new) - 1} more such" if len(new) > 1 else ""
            print(f"hetermoe: warning: uneven load in step {step} since the start: {new[0]}{more}. A load-balancing loss or "
                  "an expert bias (--moe-router-load-balancing-type, --moe-router-enable-expert-bias) evens it out",
                  flush=True)
