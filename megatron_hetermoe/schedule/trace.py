"""What ran where and when, as data: the same for a run that was measured and for one that was simulated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_hetermoe.config.errors import Problems

# Rows of a rank in a viewer, top to bottom. "step" has what is no task: gradient reduction and optimizer.
STREAMS = ("compute", "out", "back", "step")
_COLOURS = {"A": "thread_state_running", "E": "rail_animation", "D": "thread_state_iowait", "C": "rail_response"}


@dataclass(frozen=True)
class Span:
    """One task of one rank.

    Attributes:
        rank: global rank.
        stream: one of STREAMS.
        task: as ``str(Task)`` writes it, such as ``AF_1,2``; or ``reduce``, ``optimizer``.
        start, end: seconds since the start of the step.
    """

    rank: int
    stream: str
    task: str
    start: float
    end: float


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
    names = {field.name for field in fields(Span)}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if isinstance(values, dict) and values.keys() == names:
            spans.append(Span(**values))
        else:
            problems.add(f"{path}, line {number} is not a span with {', '.join(sorted(names))}: record the trace anew")
    problems.raise_if_any()
    return spans


def write_chrome(spans: Iterable[Span], path: str | Path, roles: dict[int, str]) -> None:
    """Writes a trace that chrome://tracing and ui.perfetto.dev show: a process a rank, a thread a stream.

    Args:
        spans: what ran.
        path: of the JSON file.
        roles: for each rank, what to call it beside its number.
    """
    events = [*_names(roles), *(_event(span) for span in spans)]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _names(roles: dict[int, str]) -> Iterator[dict]:
    for rank, role in roles.items():
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank} ({role})"}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        for number, stream in enumerate(STREAMS):
            yield {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": stream}}


def _event(span: Span) -> dict:
    microseconds = 1e6
    event = {
        "ph": "X", "pid": span.rank, "tid": STREAMS.index(span.stream), "name": span.task, "cat": span.task[:2],
        "ts": span.start * microseconds, "dur": (span.end - span.start) * microseconds,
    }
    if span.task[0] in _COLOURS:
        event["cname"] = _COLOURS[span.task[0]]
    return event
