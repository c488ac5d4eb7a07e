"""A router's choices that hang on rounding: a run notes them, and a run that is compared with it decides them alike.

Where the last score that is chosen and the first that is not are within rounding of each other, sums in another order or
another processor's kernels choose otherwise, and from there on two right runs are apart by a token's way. So the noting run
writes such choices to a file for each rank, and the other one, at the same place, takes them over, if its own scores are
as near to each other. All other choices are its own. ``TAKEN`` begins a line of its output for each that was another.

No import of Megatron at the top: the functions on tensors are tested without.
"""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NEAR = 2.0**-21  # of the largest score of a choice: four units of the last place in fp32
TAKEN = "a choice within rounding was taken over"

Noted = tuple[torch.Tensor, torch.Tensor]  # of a call of topk: numbers of choices [C], what each chose [C, k]
Place = tuple  # of a call of topk: step, whether it trains, has gradients, predicts further tokens, layer, microbatch, call in it
TopK = Callable[[torch.Tensor, int], Any]


def note(folder: Path, rank: int) -> None:
    """Has this rank write its near choices to ``folder``."""
    file = (folder / str(rank)).open("wb", buffering=0)

    def topk(choose: TopK, place: Place, scores: torch.Tensor, k: int, dim: int) -> Any:
        result = choose(scores, k)
        noted = near_choices(scores, result.indices, dim)
        if len(noted[0]):
            pickle.dump((place, noted), file)
        return result

    _watch(topk)


def take_over(folder: Path, rank: int) -> None:
    """Has this rank decide its near choices as rank ``rank`` did that noted them in ``folder``; expert ranks have none."""
    file, there = folder / str(rank), {}
    if file.exists():
        with file.open("rb") as stream:
            while stream.peek(1):
                place, noted = pickle.load(stream)
                there[place] = noted

    def topk(choose: TopK, place: Place, scores: torch.Tensor, k: int, dim: int) -> Any:
        result = choose(scores, k)
        if place not in there:
            return result
        indices, others = decided(scores, result.indices, dim, there[place])
        if not others:
            return result
        print(f"{TAKEN}: step {place[0]}, layer {place[4]}, {others} of {len(there[place][0])}", flush=True)
        return torch.return_types.topk((scores.gather(dim, indices), indices))

    _watch(topk)


def near_choices(scores: torch.Tensor, chosen: torch.Tensor, dim: int, near: float = NEAR) -> Noted:
    """The choices along ``dim`` of which the last that is chosen and the first that is not are within ``near``.

    Scores of 0 are left out: which of those without a score fill a capacity is no matter.
    """
    scores, chosen = scores.detach().movedim(dim, -1).flatten(0, -2), chosen.movedim(dim, -1).flatten(0, -2)
    last = scores.gather(-1, chosen).min(-1).values
    first = scores.scatter(-1, chosen, -torch.inf).max(-1).values
    largest = scores.masked_fill(scores.isinf(), 0).abs().max(-1).values
    numbers = ((last - first <= near * largest) & (last != 0) & last.isfinite()).nonzero().flatten()
    return numbers, chosen[numbers]


def decided(scores: torch.Tensor, chosen: torch.Tensor, dim: int, noted: Noted) -> tuple[torch.Tensor, int]:
    """What is chosen when choices that are near here too are those noted, and how many of them are others."""
    near_here, _ = near_choices(scores, chosen, dim, near=2 * NEAR)
    moved = chosen.movedim(dim, -1)
    own = moved.flatten(0, -2).clone()
    others = 0
    for number, theirs in zip(*noted, strict=True):
        if number in near_here and set(own[number].tolist()) != set(theirs.tolist()):
            own[number] = theirs
            others += 1
    return own.view(moved.shape).movedim(-1, dim), others


def _watch(choose: Callable[..., Any]) -> None:
    """Calls ``choose`` for each call of ``torch.topk`` among a router's scores, with the plain function and the place."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    routing, topk = TopKRouter.routing, torch.topk
    microbatches: Counter[tuple] = Counter()

    @functools.wraps(routing)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        where = (get_args().curr_iteration, self.training, torch.is_grad_enabled(), self.is_mtp_layer, self.layer_number)
        microbatches[where] += 1
        calls = [0]

        def one(scores: torch.Tensor, k: int, dim: int = -1, **others: Any) -> Any:
            def plain(scores: torch.Tensor, k: int) -> Any:
                return topk(scores, k, dim, **others)

            if not scores.is_floating_point() or k == scores.shape[dim]:
                return plain(scores, k)
            calls[0] += 1
            return choose(plain, (*where, microbatches[where], calls[0]), scores, k, dim)

        torch.topk = one
        try:
            return routing(self, *args, **kwargs)
        finally:
            torch.topk = topk

    TopKRouter.routing = watched
