"""Layers have two numbers: in the tasks of a pipeline stage, and in the model.

A stage's tasks number its own layers from 1, and those of a chunk behind those of the chunk before, with one number between
that ends it. Files and tables have the model's numbers. There A_k of the stage that has layer k and A_k of the one that ends
layer k-1 are what A_k is without a pipeline, and a handover has the same name at both of its ends. A rank has one of the two,
since the chunks next to a stage's own are other stages'.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_hetermoe.schedule.tasks import Task


def first_numbers(chunk_layers: Sequence[int]) -> tuple[int, ...]:
    """The number in tasks of each chunk's first layer, from how many layers each has."""
    return tuple(1 + sum(chunk_layers[:chunk]) + chunk for chunk in range(len(chunk_layers)))


@dataclass(frozen=True)
class Numbering:
    """The two numbers of a pipeline stage's layers.

    Attributes:
        chunks: the layers, by their numbers in the model, of each chunk (``Plan.chunks_of_stage``).
    """

    chunks: tuple[range, ...]

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The number in tasks of each chunk's first layer."""
        return first_numbers([len(layers) for layers in self.chunks])

    def chunk_of(self, layer: int) -> int:
        """The chunk of a layer, or of the A task that ends one, which has this number in tasks."""
        return bisect(self.firsts, layer) - 1

    def layer_in_model(self, layer: int) -> int:
        """The number in the model of what has this number in tasks."""
        chunk = self.chunk_of(layer)
        return self.chunks[chunk].start + layer - self.firsts[chunk]

    def in_model(self, task: Task) -> Task:
        """The stage's task as files and tables have it."""
        return replace(task, layer=self.layer_in_model(task.layer))

    def in_stage(self, task: Task) -> Task | None:
        """The inverse of ``in_model``; None for a layer that the stage has no task of."""
        for layers, first in zip(self.chunks, self.firsts):
            if layers.start <= task.layer <= layers.stop:
                return replace(task, layer=first + task.layer - layers.start)
        return None
