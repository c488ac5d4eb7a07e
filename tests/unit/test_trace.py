"""The trace format."""

import json

import pytest

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.schedule.trace import Span, read_jsonl, write_chrome, write_jsonl

SPANS = [Span(0, "compute", "AF_1,1", 0.0, 0.5), Span(0, "out", "DF_1,1", 0.5, 0.6, 4096),
         Span(1, "out", "DF_1,1", 0.5, 0.6, 0, (3, 0, 5)),
         Span(1, "step", "optimizer", 1.0, 1.5), Span(0, "compute", "AB_1,1", 1.0, 1.5, queued=(0.5, 0.75))]


def test_spans_are_read_back(tmp_path):
    write_jsonl(SPANS, tmp_path / "t.jsonl")
    assert read_jsonl(tmp_path / "t.jsonl") == SPANS


def test_what_was_moved_may_be_left_out(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"rank": 0, "stream": "out", "task": "DF_1,1", "start": 0.5, "end": 0.6}\n')
    assert read_jsonl(tmp_path / "t.jsonl") == [Span(0, "out", "DF_1,1", 0.5, 0.6, 0, ())]


def test_a_span_that_is_moved_stays_as_it_is():
    moved = SPANS[-1].moved(-0.25)
    assert (moved.start, moved.end, moved.queued) == (0.75, 1.25, (0.25, 0.5)) and moved.lead == SPANS[-1].lead == 0.25
    assert SPANS[0].moved(1) == Span(0, "compute", "AF_1,1", 1.0, 1.5) and SPANS[0].lead is None


def test_lines_that_are_no_spans_are_named(tmp_path):
    good = {"rank": 0, "stream": "out", "task": "DF_1,1", "start": 0.5, "end": 0.6}
    wrong = [{"rank": 0}, *({**good, **one} for one in (
        {"start": "x"}, {"task": "XX"}, {"stream": "none"}, {"tokens": 3}, {"tokens": ["a"]}, {"queued": [1.0]}, {"sent": None}))]
    lines = [*map(json.dumps, wrong), "nonsense", "\udcff"]
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as error:
        read_jsonl(tmp_path / "t.jsonl")
    assert len(error.value.problems) == len(lines)


def test_the_chrome_trace_has_a_process_a_rank_and_microseconds(tmp_path):
    write_chrome(SPANS, tmp_path / "t.json", {0: "attention", 1: "expert"}, {"a fact": "of all"})
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["otherData"] == {"a fact": "of all"}
    events = document["traceEvents"]
    assert [event["args"] for event in events if event.get("name") == "AB_1,1"] == [{"µs to queue": 250000.0, "µs ahead": 250000.0}]
    first = next(event for event in events if event["ph"] == "X")
    assert (first["pid"], first["ts"], first["dur"]) == (0, 0.0, 500000.0)
    assert [event["args"] for event in events if event.get("name") == "DF_1,1"] == [
        {"bytes sent": 4096, "tokens": 0}, {"bytes sent": 0, "tokens": 8}]
    assert {event["args"]["name"] for event in events if event.get("name") == "process_name"} == {
        "rank 0 (attention)", "rank 1 (expert)"}
