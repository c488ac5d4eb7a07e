"""Commands that show: patches and timelines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.cli.main import main
from megatron_hetermoe.runtime.recorder import FIRST
from megatron_hetermoe.schedule.trace import read_jsonl

ROOT = Path(__file__).parents[2]


def test_patches_are_listed_and_fit():
    ended = subprocess.run(
        [sys.executable, "-m", "megatron_hetermoe", "patches", "--json"], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    listed = json.loads(ended.stdout)
    assert 0 < len(listed["patches"]) <= listed["most"] == 12
    documented = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for patch in listed["patches"]:
        assert not patch["problems"]
        assert patch["reason"] and patch["removable_when"] and patch["relies_on"]
        assert (ROOT / patch["test"]).exists()
        assert patch["symbol"] in documented, "docs/design.md lists every patch"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    flags = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"]
    run_ranks([*flags, "--hetermoe-trace", "spans", *tiny(train_iters=3, global_batch_size=2)], 2, cwd=folder).check()
    return folder / "spans"


def test_a_recorded_step_has_every_task(trace):
    """Two layers, two microbatches: on each rank its tasks, on each stream one after the other."""
    for rank, computes in ((0, 2 * 3 * 2), (1, 2 * 2 * 2)):
        spans = read_jsonl(trace / f"step{FIRST:05d}.rank{rank:05d}.jsonl")
        assert len([span for span in spans if span.stream == "compute"]) == computes
        for stream in ("compute", "out", "back"):
            times = [(span.start, span.end) for span in spans if span.stream == stream]
            assert times == sorted(times)
            assert all(end <= start for (_, end), (start, _) in zip(times, times[1:]))
        assert {span.queued for span in spans} == {None}, "on the CPU the host runs what it queues"


def test_a_recorded_transfer_has_what_it_moved(trace):
    """32 tokens, 32 wide in fp32, go once to the holder of all experts, two of which each is for: each such copy has a
    probability and the number of its row; before them go a header of 6 numbers and 8 experts' copies."""
    rows, copies, header = 32 * 32 * 4, 32 * 2, 8 * (6 + 8)
    owner, holder = (
        {span.task: span for span in read_jsonl(trace / f"step{FIRST:05d}.rank{rank:05d}.jsonl")} for rank in (0, 1))
    for layer in (1, 2):
        for microbatch in (1, 2):
            at = f"_{layer},{microbatch}"
            assert owner[f"DF{at}"].sent == rows + copies * (4 + 4) + header and holder[f"DF{at}"].sent == 0
            assert holder[f"CF{at}"].sent == rows and owner[f"CF{at}"].sent == 0
            assert owner[f"CB{at}"].sent == rows and holder[f"CB{at}"].sent == 0
            assert holder[f"DB{at}"].sent == rows + copies * 4 and owner[f"DB{at}"].sent == 0
            assert len(holder[f"DF{at}"].tokens) == 8 and sum(holder[f"DF{at}"].tokens) == copies
            assert owner[f"DF{at}"].tokens == ()
    for spans in (owner, holder):
        last = max(span.end for span in spans.values() if span.stream == "compute")
        assert last <= spans["reduce"].start <= spans["reduce"].end <= spans["optimizer"].start


def test_a_holder_of_several_ranks_is_shown_by_its_ranks(tmp_path):
    """Two expert ranks share all experts, and each gets the rows of one of two attention ranks."""
    flags = tiny(train_iters=2, global_batch_size=2, tensor_model_parallel_size=2, sequence_parallel=True,
                 expert_tensor_parallel_size=2)
    ranks = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]
    run_ranks([*ranks, "--hetermoe-trace", "spans", *flags], 4, cwd=tmp_path).check()
    page = tmp_path / "report.html"
    assert main(["trace", str(tmp_path / "spans"), "--out", str(page)]) == 0
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text())[1])
    (shown,) = data["runs"]
    assert [entry["rank"] for entry in shown["ranks"]] == [0, 1, 2, 3]
    rows = 2 * 32 * 2 * 2  # microbatches, tokens, experts of each, layers
    assert [holder["rank"] for holder in shown["load"]["holders"]] == [2, 3]
    assert sum(holder["tokens"] for holder in shown["load"]["holders"]) == rows
    assert sum(sum(layer["tokens"]) for layer in shown["load"]["layers"]) == rows


@pytest.fixture(scope="module")
def pipeline_trace(tmp_path_factory):
    """Two stages of two chunks each, of one layer; the second layer has no experts."""
    folder = tmp_path_factory.mktemp("pipeline")
    flags = tiny(train_iters=2, num_layers=4, global_batch_size=2, moe_layer_freq="([1,0,1,1])", pipeline_model_parallel_size=2,
                 num_virtual_stages_per_pipeline_rank=2, log_interval=2)
    ranks = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2", "--hetermoe-wave", "1"]
    run = run_ranks([*ranks, "--hetermoe-trace", "spans", *flags], 4, cwd=folder).check()
    assert re.search(r"out [\d.,]+ MB/s, back [\d.,]+ MB/s, stages [\d.,]+ MB/s", run.output[-1])
    return folder / "spans"


def test_a_pipelines_tasks_have_the_models_layers(pipeline_trace):
    """The first stage has layers 1 and 3, the second one layers 2 and 4; what one ends, the other goes on with."""
    of_rank = {rank: read_jsonl(pipeline_trace / f"step{FIRST:05d}.rank{rank:05d}.jsonl") for rank in range(4)}
    layers = {rank: {span.task[:2] + span.task[3:].split(",")[0] for span in spans if "_" in span.task and span.task[1] == "F"}
              for rank, spans in of_rank.items()}
    assert layers == {
        0: {"AF1", "DF1", "CF1", "AF2", "HF2", "HF3", "AF3", "DF3", "CF3", "AF4", "HF4"},
        1: {"HF2", "AF2", "AF3", "HF3", "HF4", "AF4", "DF4", "CF4", "AF5"},
        2: {"DF1", "EF1", "CF1", "DF3", "EF3", "CF3"}, 3: {"DF4", "EF4", "CF4"},
    }
    hidden = 32 * 32 * 4  # tokens, width, bytes
    sent = {span.task: span.sent for span in of_rank[0] if span.stream == "stages"}
    assert sent["HF_2,1"] == sent["HB_3,2"] == hidden and sent["HB_2,1"] == sent["HF_3,2"] == 0


def test_a_pipelines_page_has_its_stages_side_by_side(pipeline_trace, tmp_path):
    page = tmp_path / "report.html"
    assert main(["trace", str(pipeline_trace), "--out", str(page)]) == 0
    (shown,) = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text())[1])["runs"]
    assert [(entry["rank"], entry["stage"]) for entry in shown["ranks"]] == [(0, 1), (2, 1), (1, 2), (3, 2)]
    assert {entry["pool"] for entry in shown["ranks"]} == {
        f"{role} ranks, stage {stage}" for role in ("attention", "expert") for stage in (1, 2)}
    for entry in shown["ranks"]:
        assert sum(entry["parts"].values()) == pytest.approx(shown["seconds"])
    rows = 2 * 32 * 2  # microbatches, tokens, experts of each
    assert {layer["layer"]: sum(layer["tokens"]) for layer in shown["load"]["layers"]} == {1: rows, 3: rows, 4: rows}
    assert [channel["name"] for channel in shown["channels"]] == ["out", "back", "stages"]
    drawn = tmp_path / "timeline.json"
    assert main(["trace", str(pipeline_trace), "--out", str(drawn)]) == 0
    names = [event["args"]["name"] for event in json.loads(drawn.read_text())["traceEvents"] if event["name"] == "process_name"]
    assert names == ["rank 0 (attention, stage 1)", "rank 2 (expert, stage 1)", "rank 1 (attention, stage 2)",
                     "rank 3 (expert, stage 2)"]


@pytest.mark.parametrize("name", ["timeline.svg", "timeline.json"])
def test_a_timeline_is_drawn(trace, tmp_path, name):
    assert main(["trace", str(trace), "--out", str(tmp_path / name)]) == 0
    drawn = (tmp_path / name).read_text()
    if name.endswith(".json"):
        events = json.loads(drawn)["traceEvents"]
        assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
            "rank 0 (attention)", "rank 1 (expert)"}
        # A, E, transfers on both ranks, and what follows the last task there
        assert sum(event["ph"] == "X" for event in events) == 12 + 8 + 2 * 16 + 2 * 2
    else:
        assert "<svg" in drawn


@pytest.mark.parametrize(
    "argv, said",
    [(["{trace}", "--out", "x.txt"], "must end in one of"), (["{trace}", "--step", "99", "--out", "x.json"], "no step 99"),
     (["{trace}", "--cluster", "c.yaml", "--out", "x.svg"], "ends in .html"),
     (["{trace}", "--out", "no/such/x.html"], "there is no folder no/such: make it"),
     (["no", "--cluster", "c.yaml", "--out", "x.txt"], "hetermoe: 3 problems:"),
     (["{tmp}", "--out", "x.json"], "has no plan.json")],
)
def test_what_cannot_be_drawn(trace, tmp_path, capsys, argv, said):
    argv = [word.format(trace=trace, tmp=tmp_path) for word in argv]
    assert main(["trace", *argv]) == 2
    assert said in capsys.readouterr().err
