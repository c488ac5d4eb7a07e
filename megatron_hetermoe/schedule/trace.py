"""What ran where and when, as data: the same for a run that was measured and for one that was simulated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.schedule.tasks import Task

STEP, REDUCE, OPTIMIZER = "step", "reduce", "optimizer"  # a stream for what is no task, and what is there
STREAMS = ("compute", "out", "back", "stages", STEP)  # rows of a rank in a viewer, top to bottom
_COLOURS = {"A": "thread_state_running", "E": "rail_animation", "D": "thread_state_iowait", "C": "rail_response",
            "H": "rail_load"}


@dataclass(frozen=True)
class Span:
    """One task of one rank.

    Attributes:
        rank: global rank.
        stream: one of STREAMS.
        task: as ``str(Task)`` writes it, such as ``AF_1,2``, with the model's number for its layer (``schedule.numbering``);
            or REDUCE, OPTIMIZER.
        start, end: seconds; in a file that a rank writes since the epoch, else since the start of the step.
        sent: bytes that a transfer sends from this rank to others.
        tokens: of a dispatch that this rank receives, tokens for each of its experts of that layer, ascending.
        queued: of a compute task on a GPU, when the host began and ended to queue it, as start and end; None on the CPU,
            where the host runs it, and in a simulation of hosts that cost nothing.
    """

    rank: int
    stream: str
    task: str
    start: float
    end: float
    sent: int = 0
    tokens: tuple[int, ...] = ()
    queued: tuple[float, float] | None = None

    @property
    def lead(self) -> float | None:
        """Seconds from when the host had queued the task to when the GPU came to it; below 0 where the GPU came first."""
        return None if self.queued is None else self.start - self.queued[1]

    def moved(self, seconds: float) -> Span:
        """The same, so much later."""
        queued = self.queued and (self.queued[0] + seconds, self.queued[1] + seconds)
        return replace(self, start=self.start + seconds, end=self.end + seconds, queued=queued)


_NAMES = {field.name for field in fields(Span)}
_NEEDED = {field.name for field in fields(Span) if field.default is MISSING}


def write_jsonl(spans: Iterable[Span], path: str | Path) -> None:
    """Writes one JSON object a line, with the fields of Span."""
    with Path(path).open("w", encoding="utf-8") as file:
        for span in spans:
            file.write(json.dumps(asdict(span)) + "\n")


def read_jsonl(path: str | Path) -> list[Span]:
    """Reads what write_jsonl wrote.

    Raises:
        UsageError: with the lines that are no spans.
    """
    problems = Problems()
    spans = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if _is_span(values):
            queued = values.get("queued")
            spans.append(Span(**{**values, "tokens": tuple(values.get("tokens", ())), "queued": queued and tuple(queued)}))
        else:
            problems.add(f"{path}, line {number} is not a span with {', '.join(sorted(_NEEDED))}: record the trace anew")
    problems.raise_if_any()
    return spans


def _is_span(values: Any) -> bool:
    """Whether a JSON value has the fields of a Span, with what may be in them."""
    if not isinstance(values, dict) or not _NEEDED <= values.keys() <= _NAMES:
        return False
    task, tokens, queued = values["task"], values.get("tokens", []), values.get("queued")
    return values["stream"] in STREAMS and isinstance(task, str) and (task in (REDUCE, OPTIMIZER) or Task.parse(task) is not None) \
        and isinstance(tokens, list) and (queued is None or isinstance(queued, list) and len(queued) == 2) \
        and all(isinstance(one, (int, float)) for one in (
            values["rank"], values["start"], values["end"], values.get("sent", 0), *tokens, *(queued or ())))


def write_chrome(
    spans: Iterable[Span], path: str | Path, roles: dict[int, str], facts: Mapping[str, object] | None = None
) -> None:
    """Writes a trace that chrome://tracing and ui.perfetto.dev show: a process a rank, a thread a stream.

    Args:
        spans: what ran.
        path: of the JSON file.
        roles: for each rank, what to call it beside its number, in the order in which they are shown.
        facts: of all, by name.
    """
    events = [*_names(roles), *(_event(span) for span in spans)]
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(facts or {})}
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def _names(roles: dict[int, str]) -> Iterator[dict]:
    for place, (rank, role) in enumerate(roles.items()):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank} ({role})"}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": place}}
        for number, stream in enumerate(STREAMS):
            yield {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": stream}}


def _event(span: Span) -> dict:
    microseconds = 1e6
    event = {
        "ph": "X", "pid": span.rank, "tid": STREAMS.index(span.stream), "name": span.task, "cat": span.task[:2],
        "ts": span.start * microseconds, "dur": (span.end - span.start) * microseconds,
    }
    if span.sent or span.tokens:
        event["args"] = {"bytes sent": span.sent, "tokens": sum(span.tokens)}
    if span.queued is not None:
        began, ended = span.queued
        event["args"] = {"µs to queue": (ended - began) * microseconds, "µs ahead": span.lead * microseconds}
    if span.task[0] in _COLOURS:
        event["cname"] = _COLOURS[span.task[0]]
    return event
