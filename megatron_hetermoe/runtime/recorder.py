"""Records when tasks ran and what they moved, in the format that the simulator writes too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.streams import Queued
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.tasks import Stream, Task
from megatron_hetermoe.schedule.trace import OPTIMIZER, REDUCE, STEP, Span, write_jsonl

FIRST, LAST = 2, 11  # training steps of a start that are written; the first one warms up


class Recorder:
    """Writes a file for each recorded step of one rank.

    Times are of the host's clock, so ranks of several nodes are as far apart in a trace as their clocks are.

    Args:
        folder: where to; made if it is not there.
        rank: this rank.
        device: where it computes.
        numbering: of the layers of its stage; spans have the model's numbers.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, numbering: Numbering):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._rank = rank
        self._device = device
        self._numbering = numbering
        self._is_gpu = is_gpu(device)
        self._epoch = time.time() - time.perf_counter()
        self._step = 0
        self.begin_step()

    def begin_step(self) -> None:
        """Forgets a step that did not end, as one that Megatron runs again."""
        self._spans: list[tuple[str, str, float, float, Queued]] = []
        self._sent: dict[str, int] = {}
        self._tokens: dict[str, tuple[int, ...]] = {}

    def observe(self, stream: Stream, task: Task, start: float, end: float, queued: Queued) -> None:
        """Notes one task; called from the thread of its stream, times in seconds of ``time.perf_counter``."""
        self._spans.append((stream.value, self._name(task), start, end, queued))

    def sent(self, task: Task, size: int) -> None:
        """Adds to the bytes that a transfer sent from here; called from the thread of its stream."""
        name = self._name(task)
        self._sent[name] = self._sent.get(name, 0) + size

    def routed(self, task: Task, tokens: Sequence[int]) -> None:
        """Notes the tokens that a dispatch brought for each of this rank's experts."""
        self._tokens[self._name(task)] = tuple(tokens)

    def _name(self, task: Task) -> str:
        return str(self._numbering.in_model(task))

    @contextmanager
    def reduction(self) -> Iterator[None]:
        """What the reduction of gradients runs in."""
        with self._after_tasks(REDUCE):
            yield

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """What the optimizer step runs in."""
        with self._after_tasks(OPTIMIZER):
            yield

    @contextmanager
    def _after_tasks(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._is_gpu:
            torch.cuda.synchronize(self._device)
        self._spans.append((STEP, name, start, time.perf_counter(), None))

    def end_step(self) -> list[Span]:
        """The step's spans; written, if the step is one to keep."""
        self._step += 1
        spans = [
            Span(self._rank, stream, task, start, end, self._sent.get(task, 0), self._tokens.get(task, ()), queued).moved(
                self._epoch)
            for stream, task, start, end, queued in self._spans
        ]
        if FIRST <= self._step <= LAST:
            write_jsonl(spans, self._folder / f"step{self._step:05d}.rank{self._rank:05d}.jsonl")
        return spans
