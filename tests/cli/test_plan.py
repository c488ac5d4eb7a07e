"""``hetermoe plan`` and ``hetermoe simulate``, without Megatron: what a recipe asks is put in its place."""

import json
import os
import pty
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_hetermoe.cli import main as command
from megatron_hetermoe.cli import plan
from megatron_hetermoe.config.plan import read_plan
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.profile import Profile, taken_for
from megatron_hetermoe.planner.options import Question

LINK = {"gb_per_s": 12.5, "latency_us": 20}
MODEL = ModelShape(4, (1, 2, 3, 4), 12, 2, 1024, 3584, 3584, 0, True, 16, 8, 64, False, 4096)


def cluster(folder, gpus=2, **changed):
    """A cluster file with so many GPUs of each of two kinds; JSON is YAML."""
    pools = {name: {"kind": kind, "nodes": 1, "gpus_per_node": gpus, "memory_gb": memory, "intra_node": LINK,
                    "inter_node": LINK} for name, kind, memory in (("new", "A40", 48), ("old", "V100-SXM2", 32))}
    pools["old"].update(changed)
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"pools": pools}))
    return str(path)


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Puts a question in place of the recipe's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("MODEL_ARGS: {}\n")

    def put(**changed):
        values = dict(shape=MODEL, precision="fp16", micro_batch=1, global_batch=8, vocabulary=32000) | changed
        monkeypatch.setattr(plan, "_question", lambda args, notes: Question(**values))
    put()
    return put


def test_a_plan_is_found_written_and_simulated(tmp_path, ask, capsys):
    out, timeline = str(tmp_path / "plan.json"), tmp_path / "t.json"
    on = cluster(tmp_path)
    assert command.main(["plan", "recipe.yaml", "--cluster", on, "--out", out, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert any("estimated" in note for note in answer["notes"]) and answer["plan"]["predicted"]["estimated"]
    assert {"left_out", "runners_up", "alone", "after_losing_a_node", "other_ways"} <= answer.keys()
    assert command.main(["simulate", out, "--cluster", on, "--timeline", str(timeline), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["seconds"] == pytest.approx(answer["plan"]["predicted"]["step_seconds"])
    names = {event["name"] for event in json.loads(timeline.read_text())["traceEvents"]}
    assert {"AF_1,1", "EB_4,1", "DF_2,1", "CB_3,1", "optimizer"} <= names


def test_the_tables_say_estimated_and_what_was_not_searched(tmp_path, ask, capsys):
    on = cluster(tmp_path)
    assert command.main(["plan", "recipe.yaml", "--cluster", on]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "estimated" in text and "not searched" in text and "a node of old lost" in text


@pytest.mark.parametrize("layers, said", [
    ((), ""), ((2, 2), "--pipeline-model-parallel-size 2"),
    ((3, 1), "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3"),
])
def test_the_flags_of_a_plan_are_said(tmp_path, ask, capsys, layers, said):
    ask(stage_layers=(layers,))
    arguments = ["plan", "recipe.yaml", "--cluster", cluster(tmp_path), "--out", str(tmp_path / "plan.json")]
    assert command.main(arguments) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to train it")]
    assert f" --micro-batch-size 1 {said}".rstrip() in line and f"hetermoe train recipe.yaml -- --hetermoe --hetermoe-plan {tmp_path}" in line
    made = read_plan(tmp_path / "plan.json")
    more = replace(made, expert_tensor_parallel=2, context_parallel=2, step=replace(made.step, recompute="core_attn"))
    assert {"--expert-tensor-parallel-size", "--context-parallel-size", "core_attn"} <= set(plan.flags_of(more))


def test_the_command_that_trains_leaves_out_what_a_plan_decides(tmp_path):
    """And no more: it is refused beside a plan, or would change what the plan was reckoned with."""
    path = tmp_path / "r.yaml"
    path.write_text("MODEL_ARGS: {--num-layers: 4}\nHETERMOE: {attention-ranks: 2, expert-ranks: 1, self-check: 5}\n")
    args = Namespace(recipe=str(path), drop=["bf16"], out="p.json",
                     overrides=["--hetermoe-wave", "2", "--micro-batch-size=2", "--seq-length", "64"])
    assert plan.train_words(args, ["--micro-batch-size", "1"]) == [
        "train", str(path), "--drop", "bf16", "--drop", "hetermoe-attention-ranks", "--drop", "hetermoe-expert-ranks", "--",
        "--seq-length", "64", "--hetermoe-plan", "p.json", "--micro-batch-size", "1"]


def test_a_fault_of_a_recipe_is_said_once_with_its_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("MODEL_ARGS:\n  --num-layers: four\n")
    assert command.main(["plan", str(tmp_path / "r.yaml"), "--cluster", cluster(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hetermoe: 1 problem:") and "r.yaml:2: Megatron does not accept these flags" in said


def test_a_model_that_fits_nowhere_ends_with_what_would(tmp_path, ask, capsys):
    ask(shape=MODEL.__class__(**{**MODEL.__dict__, "layers": 400, "moe_layers": tuple(range(1, 401))}))
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster(tmp_path)]) == 2
    assert "layers in place of 400" in capsys.readouterr().err


def test_a_bad_cluster_names_all_problems(tmp_path, ask, capsys):
    on = cluster(tmp_path, kind="V1000", nodes=-1, inter_node={"gb_per_s": 0, "latency_us": 1})
    assert command.main(["plan", "recipe.yaml", "--cluster", on]) == 2
    error = capsys.readouterr().err
    assert "3 problems" in error and "V1000" in error and "nodes is -1" in error and "gb_per_s is 0" in error


def test_all_that_is_wrong_comes_in_one_message(tmp_path, capsys):
    on = cluster(tmp_path, nodes=0)
    assert command.main(["plan", "none.yaml", "--cluster", on, "--vocabulary", "-1", "--out", "/no/such/plan.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hetermoe: 4 problems:") and "Traceback" not in error
    for part in ("nodes is 0", "cannot read the recipe none.yaml", "--vocabulary is -1", "there is no folder /no/such: make it"):
        assert part in error, part


def test_all_that_a_simulation_lacks_comes_in_one_message(tmp_path, capsys):
    argv = ["simulate", str(tmp_path / "none.json"), "--cluster", "none.yaml", "--timeline", "no/such/t.html"]
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("hetermoe: 3 problems:") and "there is no folder no/such: make it" in error


def test_a_kind_without_profile_or_row_and_a_profile_for_other_shapes(tmp_path, ask, capsys):
    (tmp_path / "other.json").write_text(Profile("A40", taken_for(MODEL, "fp16") | {"hidden": 77}, {
        "attention": {4096.0: (1.0, 2.0)}, "expert": {64.0: (1.0, 2.0)}}).to_json())
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster(tmp_path, kind="other.json")]) == 2
    assert "taken for other shapes (hidden 77 there, 1024 here)" in capsys.readouterr().err
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster(tmp_path, kind="missing.json")]) == 2
    assert "no row in the device table and is no profile file" in capsys.readouterr().err


def test_hosts_that_take_longer_than_gpus_are_named_with_a_way_out(tmp_path, ask, capsys):
    slow = {"attention": (2e-2, 2e-2), "expert_task": (2e-2, 2e-2)}
    (tmp_path / "slow.json").write_text(Profile("slow", taken_for(MODEL, "fp16"), {
        "attention": {4096.0: (1e-3, 2e-3)}, "expert": {64.0: (1e-5, 2e-5)}}, host=slow).to_json())
    on, out = cluster(tmp_path, kind="slow.json"), str(tmp_path / "plan.json")
    document = json.loads((tmp_path / "cluster.yaml").read_text())
    document["pools"]["new"]["kind"] = "slow.json"
    (tmp_path / "cluster.yaml").write_text(json.dumps(document | {"channel_host": [1e-3, 2e-3]}))
    for words in (["plan", "recipe.yaml", "--cluster", on, "--out", out], ["simulate", out, "--cluster", on]):
        assert command.main(words) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "raise --micro-batch-size" in text and ("--micro-batch-size 2: " in text) == (words[0] == "plan")
        assert "host" in text and "queue tasks was not measured" not in text
    assert command.main(["simulate", out, "--cluster", on, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roles"]["attention"]["bubbles"]["host"] > 0


@pytest.mark.parametrize("path, value", [
    (("model", "layers"), 10**30), (("step", "microbatches"), 0), (("step", "recompute"), "some"), (("groups",), 10**9),
    (("schedule",), "zigzag"), (("attention_precision",), "fp4"), (("wave",), -1), (("model", "hidden"), 0),
])
def test_a_plan_with_a_figure_that_nothing_can_be_priced_with(tmp_path, ask, capsys, path, value):
    out, on = tmp_path / "plan.json", cluster(tmp_path)
    assert command.main(["plan", "recipe.yaml", "--cluster", on, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    inner = document[path[0]] if len(path) == 2 else document
    inner[path[-1]] = value
    out.write_text(json.dumps(document))
    capsys.readouterr()
    assert command.main(["simulate", str(out), "--cluster", on]) == 2
    assert path[-1] in capsys.readouterr().err or path == ("model", "layers")


def staged(out, cluster, stage_layers, **changed):
    """Has a plan for a half of the cluster made one of two stages of all of it."""
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    stages = len(stage_layers) // changed.get("virtual_stages", 1)
    document |= {"stage_layers": stage_layers, "schedule": "zebra", "attention_ranks": stages * document["attention_ranks"],
                 "expert_ranks": stages * document["expert_ranks"], **changed}
    out.write_text(json.dumps(document))


def test_a_pipeline_is_simulated_and_drawn(tmp_path, ask, capsys):
    out, on = tmp_path / "plan.json", cluster(tmp_path, gpus=1)
    staged(out, on, [2, 2])
    capsys.readouterr()
    for ending in ("json", "jsonl", "html", "svg"):
        timeline = tmp_path / f"t.{ending}"
        assert command.main(["simulate", str(out), "--cluster", on, "--timeline", str(timeline), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["roles"]["attention"]["bubbles"]["other stage"] > 0
        assert timeline.stat().st_size
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    ranks = {name: {event["pid"] for event in events if event["name"] == name} for name in ("HF_3,1", "HF_1,1", "HB_3,1")}
    assert ranks == {"HF_3,1": {0, 1}, "HF_1,1": set(), "HB_3,1": {0, 1}}  # attention ranks come first
    assert command.main(["simulate", str(out), "--cluster", on]) == 0
    assert "stage" in capsys.readouterr().out


@pytest.mark.parametrize("layers, virtual", [([2, 2], 1), pytest.param([1, 1, 1, 1], 2, marks=pytest.mark.slow)])
def test_a_pipeline_is_replayed(tmp_path, ask, capsys, layers, virtual):
    out, on = tmp_path / "plan.json", cluster(tmp_path, gpus=1)
    ask(global_batch=2)
    staged(out, on, layers, virtual_stages=virtual)
    capsys.readouterr()
    assert command.main(["simulate", str(out), "--cluster", on, "--replay", "3", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["replay"]
    assert all(0.1 < one["simulated"] < one["replayed"] + 0.01 for one in replayed.values()), replayed


def test_stages_that_do_not_fit_the_model_are_refused(tmp_path, ask, capsys):
    out, on = tmp_path / "plan.json", cluster(tmp_path)
    for layers, virtual, said in (([3, 3], 1, "do not make up the model's 4"), ([4, 0], 1, "at least one each"),
                                  ([2, 2], 2, "virtual_stages is 2, and stage_layers has 2 parts")):
        staged(out, on, layers, virtual_stages=virtual)
        capsys.readouterr()
        assert command.main(["simulate", str(out), "--cluster", on]) == 2
        assert said in capsys.readouterr().err
    staged(out, on, [2, 2], schedule="overlapped")
    capsys.readouterr()
    assert command.main(["simulate", str(out), "--cluster", on]) == 2
    assert "overlapped waves are not supported with 2 pipeline stages" in capsys.readouterr().err


def test_a_plan_for_another_cluster_is_refused(tmp_path, ask, capsys):
    out = tmp_path / "plan.json"
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster(tmp_path), "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    document["pools"] = ["newer"] * len(document["pools"])
    document["placement"][0] = document["placement"][0][1:]
    out.write_text(json.dumps(document))
    capsys.readouterr()
    assert command.main(["simulate", str(out), "--cluster", cluster(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "newer" in error and "placement" in error
    assert command.main(["simulate", str(tmp_path / "none.json"), "--cluster", cluster(tmp_path)]) == 2


def test_a_search_says_what_it_does(tmp_path, ask, monkeypatch):
    said = []
    monkeypatch.setattr(plan.Activity, "enter", lambda activity, what: said.append(what))
    assert command.main(["plan", "recipe.yaml", "--cluster", cluster(tmp_path)]) == 0
    assert said[:2] == ["reading the recipe with Megatron", "listing layouts"]
    assert any(what.startswith("simulating layout 1 of at most ") for what in said)
    assert said[-1] == "comparing with other ways to use these GPUs"


def test_the_stage_is_seen_on_a_terminal_only(tmp_path):
    """On a pseudo-terminal the line is there, and gone at the end; in a pipe there is nothing."""
    script = ("from megatron_hetermoe.cli.activity import Activity\n"
              "with Activity() as activity:\n    activity.enter('simulating layout 7')\n")
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert piped.stderr == "" and piped.stdout == ""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        seen += more
    assert process.wait() == 0 and b"simulating layout 7" in seen
    os.close(ours)


def test_a_plan_is_replayed_beside_what_it_is_compared_with(tmp_path, ask, capsys):
    """With processes for its ranks; no step can be over before the simulator's."""
    out, on = str(tmp_path / "plan.json"), cluster(tmp_path, gpus=1)
    ask(global_batch=3)
    assert command.main(["plan", "recipe.yaml", "--cluster", on, "--out", out]) == 0
    capsys.readouterr()
    assert command.main(["simulate", out, "--cluster", on, "--replay", "3", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["replay"]
    assert list(replayed) == ["the plan", "experts spread over expert ranks", "that, one microbatch at a time"]
    assert all(0.2 < one["simulated"] < one["replayed"] + 0.01 for one in replayed.values()), replayed
