"""The page of a step, opened in a real browser: all ranks are there, its totals are the trace's, hovering works."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from browser import probe

from megatron_hetermoe.cli.main import main
from megatron_hetermoe.config.plan import Plan, plan_from_json
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.cluster import read_cluster
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.schedule.tasks import Task
from megatron_hetermoe.schedule.trace import Span, write_jsonl
from megatron_hetermoe.simulator.planned import predict

# Two ZP groups of one attention rank, which holds an expert of layer 2, and two expert ranks.
MODEL = ModelShape(
    layers=3, moe_layers=(1, 2, 3), experts=4, topk=2, hidden=64, expert_ffn=128, dense_ffn=128, shared_expert_ffn=0,
    gated=True, heads=4, query_groups=2, head_dim=16, tied_embeddings=False, sequence=128,
)
PLAN = Plan(
    MODEL, 2, 4, 2, ((1, 1, 2, 2), (0, 1, 2, 2), (2, 1, 1, 1)), wave=2,
    pools=("new", "old", "old"), step=Step(1, 3, 1000),
)
LINK = {"gb_per_s": 0.5, "latency_us": 20}
POOL = {"nodes": 1, "gpus_per_node": 4, "memory_gb": 40, "intra_node": LINK, "inter_node": LINK}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder, in which each rank is 10% slower than the one before, on a clock of its own, and has a GPU whose host is
    0.25 s ahead, but behind with layer 1."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "cluster.yaml").write_text(
        json.dumps({"pools": {"new": {"kind": "A40", **POOL}, "old": {"kind": "V100-SXM2", **POOL}}}))
    (folder / "plan.json").write_text(PLAN.to_json())
    notes = Notes()
    predicted = predict(PLAN, read_cluster(str(folder / "cluster.yaml"), notes), "plan.json", notes)
    for group, ranks in enumerate(predicted.layout.zp_groups()):
        for member, rank in enumerate(ranks):
            factor = 1 + rank / 10
            write_jsonl(
                [on_gpu(replace(span, rank=rank, start=1e9 + factor * span.start, end=1e9 + factor * span.end))
                 for span in predicted.spans if span.rank == predicted.layout.zp_group(0)[member]],
                folder / f"step00002.rank{rank:05d}.jsonl")
    return folder


def on_gpu(span: Span) -> Span:
    if span.stream != "compute":
        return span
    queued = span.start + (0.25 if Task.parse(span.task).layer == 1 else -0.25)
    return replace(span, queued=(queued - 0.125, queued))


@pytest.fixture(scope="module")
def spans(folder):
    """What the ranks wrote, read without our reader."""
    return [json.loads(line) for path in sorted(folder.glob("step*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def page(folder):
    out = folder / "report.html"
    assert main(["trace", str(folder), "--out", str(out), "--cluster", str(folder / "cluster.yaml")]) == 0
    return out


def test_what_the_host_does_is_said_wherever_the_step_is(folder, page, capsys):
    """Late are an expert rank's tasks of one of three layers; of an attention rank's, which has those of an output layer and of
    an expert too, one in five."""
    assert main(["trace", str(folder), "--out", str(folder / "viewer.json")]) == 0
    printed = capsys.readouterr().out
    document = json.loads((folder / "viewer.json").read_text())
    shown = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text())[1])
    for role, late in (("attention", "20.0%"), ("expert", "33.3%")):
        line = document["otherData"][f"host, {role} ranks"]
        assert re.fullmatch(r"the host queues a task in 125,000 µs .* 250,000 µs before .* the GPU came to (\S+) before .*",
                            line)[1] == late
        assert f"{role} ranks: {line}\n" in printed and f"{role} ranks: {line}" in shown["facts"]
    (event,) = [event for event in document["traceEvents"] if event["name"] == "EF_1,1" and event.get("pid") == 2]
    assert event["args"] == pytest.approx({"µs to queue": 125000, "µs ahead": -250000}, abs=1)


def test_the_page_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(src|href)=|https?://|@import|url\(", text)
    assert page.stat().st_size < 200_000


def test_its_totals_are_the_traces(page, spans, folder):
    found = probe(page, """
        const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
        return {
          ranks: all("[data-rank][data-run=measured]", (one) => [+one.dataset.rank, parseFloat(one.textContent)]),
          predicted: all("[data-rank][data-run=predicted]", (one) => +one.dataset.rank),
          bytes: all("[data-channel][data-run=measured]", (one) => [one.dataset.channel, +one.dataset.bytes]),
          tokens: all("[data-holder]", (one) => [+one.dataset.holder, +one.dataset.tokens]),
          canvases: all("canvas", (one) => one.getAttribute("aria-label")),
          lanes: timeline.panels.map((panel) => panel.lanes.reduce((sum, lane) => sum + lane.spans.length, 0)),
          stacks: all(".stack:not(.under)", (one) =>
            [...one.children].reduce((sum, part) => sum + part.getBoundingClientRect().width, 0) / one.clientWidth),
        };""", folder)
    length = max(span["end"] for span in spans) - min(span["start"] for span in spans)
    busy = {rank: 0.0 for rank in range(6)}
    sent, tokens = {"out": 0, "back": 0}, {}
    for span in spans:
        if span["stream"] == "compute":
            busy[span["rank"]] += span["end"] - span["start"]
        elif span["stream"] in sent:
            sent[span["stream"]] += span["sent"]
        if span["tokens"]:
            tokens[span["rank"]] = tokens.get(span["rank"], 0) + sum(span["tokens"])
    assert dict(found["ranks"]) == pytest.approx({rank: 100 * work / length for rank, work in busy.items()}, abs=0.06)
    assert sorted(found["predicted"]) == [0, 2, 3], "one ZP group is simulated"
    assert min(sent.values()) > 0 and dict(found["bytes"]) == sent
    assert set(tokens) == set(range(6)) and dict(found["tokens"]) == tokens
    assert found["canvases"] == ["measured timeline of 6 ranks", "predicted timeline of 3 ranks"]
    assert found["lanes"] == [len(spans), len(spans) // 2]
    assert found["stacks"] == pytest.approx([1.0] * len(found["stacks"]), abs=0.01), "parts fill the step"


def test_hovering_a_task_names_it(page, spans, folder):
    """The mouse is put on tasks as they are drawn: the canvas has the kind's colour there, and the tip is the task's."""
    found = probe(page, """
        const seen = [];
        for (const [run, name, rank] of [[0, "AB_4,2", 1], [0, "EF_2,3", 5], [0, "DF_1,1", 2], [1, "EB_3,1", 3]]) {
          timeline.fit();
          const number = data.runs[run].spans.findIndex((span) => span[2] === name && span[0] === rank);
          const task = data.runs[run].spans.find((span) => span.number === number);
          timeline.show(task[3] - 40, task[4] + 40);
          const box = timeline.boxOf(run, number);
          const at = { clientX: (box.left + box.right) / 2, clientY: box.top + 3, bubbles: true };
          const canvas = document.elementFromPoint(at.clientX, at.clientY);
          const place = canvas.getBoundingClientRect(), scale = canvas.width / place.width;
          const pixel = [...canvas.getContext("2d").getImageData(
            (at.clientX - place.left) * scale, (at.clientY - place.top) * scale, 1, 1).data].slice(0, 3);
          canvas.dispatchEvent(new MouseEvent("mousemove", at));
          seen.push({ name, pixel, want: style(name.slice(0, 2)), hidden: tip.hidden, text: tip.innerText });
          canvas.dispatchEvent(new MouseEvent("mouseleave", at));
        }
        return [...seen, { hidden: tip.hidden }];""", folder)
    *tasks, after = found
    texts = {task["name"]: task["text"] for task in tasks}
    for task in tasks:
        assert not task["hidden"]
        assert task["pixel"] == [int(task["want"][at:at + 2], 16) for at in (1, 3, 5)], task
    assert after["hidden"], "the tip goes with the mouse"
    measured = next(span for span in spans if span["task"] == "EF_2,3" and span["rank"] == 5)
    assert re.search(r"experts forward EF_2,3\s+rank\s+5, expert\s+layer\s+2\s+microbatch\s+3\s+start", texts["EF_2,3"])
    length = float(re.search(r"duration\s+([\d.]+) µs", texts["EF_2,3"])[1])
    assert length == pytest.approx(1e6 * (measured["end"] - measured["start"]), abs=0.3)
    assert re.search(r"queued by the host in\s+125.0 ms\s+before the GPU came, by\s+250.0 ms", texts["EF_2,3"])
    assert "attention backward AB_4,2" in texts["AB_4,2"]
    assert re.search(r"tokens\s+\d", texts["DF_1,1"])
    assert re.search(r"duration.*\n?.*measured", texts["EB_3,1"].replace("\t", " ")), "the same task of the other run"


def test_zoom_pan_and_theme(page, folder):
    found = probe(page, """
        const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
        const at = (x) => ({ clientX: box.left + x, clientY: box.top + 60, bubbles: true, cancelable: true });
        const views = [[...timeline.view]];
        const note = () => views.push([...timeline.view]);
        document.getElementById("zoom-in").click(); note();
        canvas.dispatchEvent(new MouseEvent("mousedown", at(600)));
        canvas.dispatchEvent(new MouseEvent("mousemove", at(500)));
        window.dispatchEvent(new MouseEvent("mouseup")); note();
        canvas.dispatchEvent(new WheelEvent("wheel", { ...at(700), deltaY: -100, ctrlKey: true })); note();
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "0", bubbles: true })); note();
        const colour = () => getComputedStyle(document.body).backgroundColor;
        const before = colour();
        document.getElementById("theme").click();
        return { views, colours: [before, colour()] };""", folder)
    whole, zoomed, moved, nearer, fitted = found["views"]
    length = lambda view: view[1] - view[0]  # noqa: E731
    assert length(zoomed) == pytest.approx(0.6 * length(whole))
    assert length(moved) == pytest.approx(length(zoomed)) and moved[0] > zoomed[0]
    assert length(nearer) < length(moved) and moved[0] < nearer[0] and nearer[1] < moved[1]
    assert fitted == whole
    assert len(set(found["colours"])) == 2


def test_a_predicted_step_has_the_same_page(folder, tmp_path):
    out = tmp_path / "predicted.html"
    argv = ["simulate", str(folder / "plan.json"), "--cluster", str(folder / "cluster.yaml"), "--timeline", str(out)]
    assert main(argv) == 0
    found = probe(out, "return [...document.querySelectorAll('canvas')].map((one) => one.getAttribute('aria-label'));",
                  tmp_path)
    assert found == ["predicted timeline of 3 ranks"]


def test_a_folder_of_two_runs_is_refused(folder, tmp_path, capsys):
    for path in folder.glob("*.json*"):
        (tmp_path / path.name).write_text(path.read_text())
    other = replace(plan_from_json(PLAN.to_json(), ""), schedule="sequential", placement=((1,) * 4, (1,) * 4, (1,) * 4))
    (tmp_path / "plan.json").write_text(other.to_json())
    assert main(["trace", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert "the folder mixes runs" in capsys.readouterr().err
