"""Records when tasks ran, in the format that the simulator writes too."""

from __future__ import annotations

from pathlib import Path

from megatron_hetermoe.schedule.tasks import Stream, Task
from megatron_hetermoe.schedule.trace import Span, write_jsonl

FIRST, LAST = 2, 11  # training steps of a start that are recorded; the first one warms up


class Recorder:
    """Writes a file for each recorded step of one rank.

    Args:
        folder: where to; made if it is not there.
        rank: this rank.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._rank = rank
        self._step = 0
        self._spans: list[Span] = []

    def observe(self, stream: Stream, task: Task, start: float, end: float) -> None:
        """Notes one task; called from the thread of its stream, times in seconds of ``time.perf_counter``."""
        self._spans.append(Span(self._rank, stream.value, str(task), start, end))

    def end_step(self) -> None:
        """Writes what was noted since the last step, if the step is one to record."""
        self._step += 1
        if FIRST <= self._step <= LAST:
            write_jsonl(self._spans, self._folder / f"step{self._step:05d}.rank{self._rank:05d}.jsonl")
        self._spans.clear()
