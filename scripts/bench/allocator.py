#!/usr/bin/env python3
"""What torch's allocator holds beyond what experts need, by its rules and the rows that ranks of a recorded run got.

    scripts/bench/allocator.py RUN...

RUN is a folder of ``--hetermoe-trace`` with a plan (``--hetermoe-plan``) whose gradients of weights are merged. For each rank with
experts its weights, optimizer and grouped experts' tensors are allocated and freed in the order of a step, step after step, with
the recorded rows. Prints the most that is needed at once, what the allocator has taken from the GPU by then, and the
difference as a share of what comes and goes, which ``planner.memory`` plans for. Large blocks only; one stream.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.cost.work import crossing_share
from megatron_hetermoe.schedule.tasks import Task
from megatron_hetermoe.schedule.trace import read_jsonl

MIB = 2**20
_SMALL, _LARGE, _SEGMENT = MIB, 10 * MIB, 20 * MIB  # up to one MiB: a pool of its own; from ten on a segment of its own
_HALF, _FULL = 2, 4  # bytes of a weight or activation, and of its gradient or a moment
Rows = dict[tuple[int, int], int]  # copies that a rank's experts got, by layer and microbatch


@dataclass(eq=False)
class Block:
    """A piece of a segment, between its neighbours."""

    size: int
    before: Block | None = None
    behind: Block | None = None
    free: bool = False
    key: tuple[int, int] = (0, 0)


@dataclass
class Allocator:
    """The rules of CUDACachingAllocator: the smallest free block that is large enough, split where a MiB is left over; blocks that
    are free and lie beside each other become one.

    Attributes:
        reserved: bytes taken from the GPU.
        needed, most: bytes in use, and the most that were.
    """

    reserved: int = 0
    needed: int = 0
    most: int = 0
    _free: list[tuple[tuple[int, int], Block]] = field(default_factory=list)
    _number: Iterator[int] = field(default_factory=itertools.count)

    def take(self, size: float) -> Block:
        """A block of at least so many bytes; small ones are not counted."""
        size = -(-int(size) // 512) * 512
        place = bisect.bisect_left(self._free, (size, 0), key=lambda one: one[0])
        if place < len(self._free):
            block = self._free.pop(place)[1]
        else:
            block = Block(_SEGMENT if size < _LARGE else -(-size // (2 * MIB)) * 2 * MIB)
            self.reserved += block.size
        if block.size - size > _SMALL:
            rest = Block(block.size - size, block, block.behind)
            if rest.behind:
                rest.behind.before = rest
            block.behind, block.size = rest, size
            self._put(rest)
        block.free = False
        self.needed += block.size
        self.most = max(self.most, self.needed)
        return block

    def give(self, *blocks: Block) -> None:
        """Blocks that are needed no longer."""
        for block in blocks:
            self.needed -= block.size
            if block.before and block.before.free:
                block = self._joined(self._out(block.before), block)
            if block.behind and block.behind.free:
                block = self._joined(block, self._out(block.behind))
            self._put(block)

    def _put(self, block: Block) -> None:
        block.free, block.key = True, (block.size, next(self._number))
        bisect.insort(self._free, (block.key, block), key=lambda one: one[0])

    def _out(self, block: Block) -> Block:
        del self._free[bisect.bisect_left(self._free, block.key, key=lambda one: one[0])]
        return block

    @staticmethod
    def _joined(block: Block, behind: Block) -> Block:
        block.size, block.behind = block.size + behind.size, behind.behind
        if block.behind:
            block.behind.before = block
        return block


@dataclass
class Holder:
    """What a rank's experts allocate.

    Args:
        plan: of the run.
        held: experts of the rank, by layer from 1 on.
    """

    plan: Plan
    held: Sequence[int]

    def __post_init__(self) -> None:
        self.allocator = Allocator()
        model = self.plan.model
        self._hidden, self._inner = _HALF * model.hidden, _HALF * model.expert_ffn
        self._weights = [2 * model.hidden * model.expert_ffn, model.hidden * model.expert_ffn]  # of the two products
        for experts in filter(None, self.held):
            for weights in self._weights:
                self.allocator.take(_HALF * weights * experts)
        self.allocator.take(_FULL * sum(self._weights) * sum(self.held))
        self._state(1)  # the copy in full precision

    def moments(self) -> None:
        """Adam's, which come in the first step, into whatever is free then."""
        self._state(2)

    def _state(self, each: int) -> None:
        for weights in self._weights * sum(self.held):
            for _ in range(each):
                self.allocator.take(_FULL * weights)

    def wave(self, copies: Rows, microbatches: Sequence[int]) -> None:
        """Forwards, backwards and W tasks of a wave."""
        layers = [layer for layer, experts in enumerate(self.held, start=1) if experts]
        kept = {(layer, one): self._forward(copies[layer, one], layer) for layer in layers for one in microbatches}
        for layer in reversed(layers):
            self._merged(layer, [self._backward(copies[layer, one], layer, *kept[layer, one]) for one in microbatches])

    def _rows(self, copies: int, layer: int) -> float:
        model, experts = self.plan.model, self.held[layer - 1]
        return copies * crossing_share(model, experts) * model.experts / (model.topk * experts)

    def _forward(self, copies: int, layer: int) -> tuple[Block, ...]:
        """Kept: the copies, what goes into the activation function, and what comes out."""
        take = self.allocator.take
        kept = take(copies * self._hidden), take(2 * copies * self._inner), take(copies * self._inner)
        outputs, sums = take(copies * self._hidden), take(self._rows(copies, layer) * self._hidden)
        self.allocator.give(outputs, sums)
        return kept

    def _backward(self, copies: int, layer: int, rows: Block, before: Block, after: Block) -> tuple[int, Block, ...]:
        """Left to the W task: gradients and inputs of both products."""
        take, give = self.allocator.take, self.allocator.give
        outputs, inside = take(copies * self._hidden), take(copies * self._inner)
        into = take(2 * copies * self._inner)
        give(inside, before)
        inputs, sums = take(copies * self._hidden), take(self._rows(copies, layer) * self._hidden)
        give(inputs, sums)
        return copies, outputs, after, into, rows

    def _merged(self, layer: int, left: Sequence[tuple]) -> None:
        copies, inner, hidden = sum(one[0] for one in left), self._inner, self._hidden
        for weights, widths, parts in zip(reversed(self._weights), ((hidden, inner), (2 * inner, hidden)), ((1, 2), (3, 4))):
            joined = [self.allocator.take(copies * width) for width in widths]
            gradient = self.allocator.take(_HALF * weights * self.held[layer - 1])
            self.allocator.give(*joined, gradient, *(one[part] for one in left for part in parts))


def rows_of(run: Path, rank: int) -> Iterator[Rows]:
    """Those of each recorded step."""
    for path in sorted(run.glob(f"step*.rank{rank:05d}.jsonl")):
        routed = [(Task.parse(span.task), sum(span.tokens)) for span in read_jsonl(path) if span.tokens]
        yield {(task.layer, task.microbatch): copies for task, copies in routed}


def replay(plan: Plan, rank: int, steps: Sequence[Rows]) -> Allocator:
    """All of a rank's steps."""
    holder = Holder(plan, [layer.count(rank) for layer in plan.placement])
    microbatches = sorted({microbatch for _, microbatch in steps[0]})
    wave = plan.wave or len(microbatches)
    for number, copies in enumerate(steps):
        for first in range(0, len(microbatches), wave):
            holder.wave(copies, microbatches[first:first + wave])
        if not number:
            holder.moments()
    return holder.allocator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args()
    print(f"{'run':36}{'rank':>5}{'needed':>10}{'reserved':>10}{'gaps':>7}")
    for run in args.runs:
        plan = read_plan(run / "plan.json")
        for rank in range(plan.attention_ranks + plan.expert_ranks):
            if steps := list(rows_of(run, rank)):
                found = replay(plan, rank, steps)
                gaps = (found.reserved - found.most) / (found.most - found.needed)
                print(f"{run.name:36}{rank:5}{found.most / 1e9:7.1f} GB{found.reserved / 1e9:7.1f} GB{gaps:7.2f}")


if __name__ == "__main__":
    main()
