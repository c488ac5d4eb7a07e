"""How training goes, read from the ranks' logs as they grow: Megatron's own lines are the only source."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from megatron_hetermoe.config.log_lines import DRY_RUN, PLAN

PLAIN_INTERVAL = 5.0  # seconds between lines where there is no terminal

_ITERATION = re.compile(r"\biteration +(\d+)/ *(\d+) \|(.*)")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (.+?)(?: \[ t |$)")
_MEGATRON = re.compile(r"hetermoe: .+ runs with (Megatron-Core .+)")
_ARGUMENT = re.compile(r"  (seq_length) \.+ (\d+)$")


@dataclass(frozen=True)
class Step:
    """One of Megatron's lines about an iteration.

    Attributes:
        iteration, total: the iteration, and how many there are to be.
        milliseconds: time for one iteration.
        global_batch: samples in one iteration.
        loss: mean language-model loss since the line before; None if Megatron printed none, as when it is no number.
        grad_norm: gradient norm before clipping.
    """

    iteration: int
    total: int
    milliseconds: float
    global_batch: int
    loss: float | None = None
    grad_norm: float | None = None


def parse_step(line: str) -> Step | None:
    """Reads a line of a log; None if it is not about an iteration."""
    match = _ITERATION.search(line)
    if not match:
        return None
    values = {}
    for field in match[3].split("|"):
        name, colon, text = field.rpartition(":")
        if colon:
            try:
                values[name.strip()] = float(text)
            except ValueError:
                continue  # a field that is no number is none of ours
    if "elapsed time per iteration (ms)" not in values or "global batch size" not in values:
        return None
    return Step(int(match[1]), int(match[2]), values["elapsed time per iteration (ms)"],
                int(values["global batch size"]), values.get("lm loss"), values.get("grad norm"))


class Watch:
    """What the logs of a run have told so far.

    Args:
        logs: the ranks' log files, rank 0 first; they may appear later.

    Attributes:
        first, last: the first and the latest step.
        plan: what rank 0 says that it runs, None for stock Megatron.
        megatron: which one a training script has imported; None for a recipe alone.
        seq_length: tokens in a sample.
        checkpoint: (iteration, folder) of the last checkpoint saved.
        report: lines of a dry run's report.
    """

    def __init__(self, logs: Sequence[Path]):
        self.first: Step | None = None
        self.last: Step | None = None
        self.plan: dict | None = None
        self.megatron: str | None = None
        self.seq_length: int | None = None
        self.checkpoint: tuple[int, str] | None = None
        self.report: list[str] = []
        self._logs = tuple(logs)
        self._read = [0] * len(self._logs)

    def read(self) -> None:
        """Takes in the complete lines that are new."""
        for index, log in enumerate(self._logs):
            try:
                with log.open("rb") as file:
                    file.seek(self._read[index])
                    data = file.read()
            except FileNotFoundError:
                continue
            complete = data.rfind(b"\n") + 1
            self._read[index] += complete
            for line in data[:complete].decode("utf-8", "replace").splitlines():
                self._take(line)

    def tokens_per_second(self) -> float | None:
        """Of the latest step."""
        if self.last is None or self.seq_length is None or not self.last.milliseconds:
            return None
        return self.last.global_batch * self.seq_length / self.last.milliseconds * 1000

    def seconds_left(self) -> float | None:
        """Until the last iteration, at the pace of the latest step."""
        return None if self.last is None else (self.last.total - self.last.iteration) * self.last.milliseconds / 1000

    def _take(self, line: str) -> None:
        # every rank's log is read, so it does not matter here which rank it is that Megatron's lines come from
        if step := parse_step(line):
            if self.last is None or step.iteration > self.last.iteration:
                self.first = self.first or step
                self.last = step
        elif match := _SAVED.search(line):
            self.checkpoint = int(match[1]), match[2]
        elif match := _MEGATRON.match(line):
            self.megatron = match[1]
        elif match := _ARGUMENT.match(line):
            self.seq_length = int(match[2])
        elif line.startswith(DRY_RUN):
            self.report.append(line.removeprefix(DRY_RUN))
        elif line.startswith(PLAN):
            try:
                self.plan = json.loads(line[len(PLAN):])
            except json.JSONDecodeError:
                return


def describe(watch: Watch) -> str:
    """The latest step in one line: step, loss, tokens/s, time left."""
    step = watch.last
    if step is None:
        return "starting"
    parts = [f"step {step.iteration}/{step.total}", "loss -" if step.loss is None else f"loss {step.loss:.3f}"]
    if (rate := watch.tokens_per_second()) is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    left = round(watch.seconds_left())
    hours, rest = divmod(left, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    parts.append("done" if step.iteration >= step.total else f"{clock} left")
    return "  ".join(parts)


class Display:
    """Shows a Watch: a live bar on a terminal; otherwise a line every few seconds, and the last. A context manager."""

    def __init__(self, console: Console, interval: float = PLAIN_INTERVAL):
        self._console = console
        self._interval = interval
        self._next = 0.0
        self._shown: Step | None = None
        self._pending: str | None = None
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), console=console)
            self._task = self._progress.add_task("starting", total=None)

    def update(self, watch: Watch) -> None:
        """Shows the latest step if it is new."""
        if watch.last is None or watch.last == self._shown:
            return
        self._shown = watch.last
        if self._progress is not None:
            self._progress.update(self._task, total=watch.last.total, completed=watch.last.iteration,
                                  description=describe(watch))
            return
        self._pending = describe(watch)
        if time.monotonic() >= self._next:
            self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            self._console.print(self._pending, highlight=False)
            self._pending = None
            self._next = time.monotonic() + self._interval

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._flush()
