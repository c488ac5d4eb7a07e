"""A dry run trains a few steps on the real ranks, says what was predicted and measured, and leaves nothing behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from models import tiny
from ranks import run_ranks

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import parse_flags
from megatron_hetermoe.config.log_lines import DRY_RUN
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.step import Prediction, Step, TaskSeconds
from megatron_hetermoe.mcore.dry_run import _OfRank, typical
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from shapes import shape  # noqa: E402


def test_all_tasks_are_measured_beside_the_plan_and_nothing_is_saved(tmp_path):
    plan = Plan(
        shape(), 2, 2, 1, ((0, 2, 2, 2, 3, 3, 3, 3),) * 2,  # an attention rank holds an expert
        step=Step(1, 4, 255), predicted=Prediction(4.0, 256.0, 0.5, 0.5, 2e9, 1e9, True),
        tasks=(TaskSeconds(*(0.001 * number for number in range(1, 11))),),
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    flags = tiny(save=tmp_path / "saved", save_interval=1, load=tmp_path / "none", train_iters=50, eval_iters=1,
                 eval_interval=1, tensorboard_dir=tmp_path / "board")
    run = run_ranks(
        ["--hetermoe", "--hetermoe-plan", str(tmp_path / "plan.json"), "--hetermoe-dry-run", *flags], 4, cwd=tmp_path
    ).check()
    assert {len(steps) for steps in run.steps} == {3}
    assert not (tmp_path / "saved").exists() and not (tmp_path / "board").exists() and not any(run.evals)
    lines = [line.removeprefix(DRY_RUN) for line in run.output[0].splitlines() if line.startswith(DRY_RUN)]
    assert not any(DRY_RUN in output for output in run.output[1:])
    table = {line[:28].strip(): line[28:].split() for line in lines}
    # Predicted and measured, each with its unit, and their ratio.
    assert table["attention forward"][:2] == ["1.00", "ms"] and table["moved expert backward"][:2] == ["10.00", "ms"]
    for kind in ("attention", "dispatch", "combine", "expert"):
        for way in ("forward", "backward"):
            assert float(table[f"{kind} {way}"][2]) > 0, lines
    assert table["step"][:2] == ["4000.00", "ms"] and float(table["step"][2]) > 0
    assert table["memory of attention ranks"] == ["1.00", "GB", "-"]  # without what no allocator of torch counts
    assert "memory: not checked without a GPU" in lines
    assert sum(bool(re.match(r"channel (out|back): \d+\.\d MB .* GB/s$", line)) for line in lines) == 2


def test_a_transfer_counts_from_when_the_last_rank_came():
    dispatch, experts = Task(Kind.DISPATCH, Pass.FORWARD, 1, 0), Task(Kind.EXPERT, Pass.FORWARD, 1, 0)
    found = typical([
        _OfRank("attention", {dispatch: [5.0, 1.0], experts: [8.0, 8.0]}, 0.0, 0.0),
        _OfRank("expert", {dispatch: [3.0, 9.0], experts: [2.0, 4.0]}, 0.0, 0.0),
    ])
    assert found == [{"dispatch_forward": 2.0, "moved_forward": 8.0, "expert_forward": 3.0}]


def test_a_handover_counts_for_both_stages_at_each_place():
    """Two places, of which the second one's ranks come later; the later of two ranks waits for none."""
    over = Task(Kind.HANDOVER, Pass.FORWARD, 3, 0)
    found = typical([_OfRank("attention", {over: [seconds]}, 0.0, 0.0, stage, member)
                     for stage, member, seconds in ((0, 0, 1.0), (1, 0, 4.0), (0, 1, 5.0), (1, 1, 3.0))])
    assert found == [{"handover": 2.0}] * 2


def test_a_pipeline_is_measured_stage_by_stage(tmp_path):
    """A plan whose stages are predicted to take different times."""
    stages = tuple(TaskSeconds(*(0.001 * number for number in range(first, first + 11))) for first in (1, 101))
    plan = Plan(shape(layers=3), 2, 2, 1, ((1,) * 8,) * 3, stage_layers=(2, 1), step=Step(1, 2, 255),
                predicted=Prediction(4.0, 256.0, 0.5, 0.5, 2e9, 1e9, True), tasks=stages)
    (tmp_path / "plan.json").write_text(plan.to_json())
    flags = tiny(num_layers=3, global_batch_size=2, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2)
    run = run_ranks(
        ["--hetermoe", "--hetermoe-plan", str(tmp_path / "plan.json"), "--hetermoe-dry-run", *flags], 4, cwd=tmp_path
    ).check()
    lines = [line.removeprefix(DRY_RUN) for line in run.output[0].splitlines() if line.startswith(DRY_RUN)]
    first, second, end = (next(number for number, line in enumerate(lines) if line.startswith(start))
                          for start in ("median of a task, stage 1", "median of a task, stage 2", "step"))
    for offset, rows in ((1, lines[first + 1:second]), (101, lines[second + 1:end])):
        table = {row[:28].strip(): row[28:].split() for row in rows}
        assert table.keys() == {*(f"{kind} {way}" for kind in ("attention", "expert", "dispatch", "combine")
                                  for way in ("forward", "backward")), "handover"}
        assert table["attention forward"][0] == f"{offset:.2f}" and table["handover"][0] == f"{offset + 10:.2f}"
        assert all(float(row[2]) > 0 for row in table.values())


def test_a_backward_has_its_part_of_what_w_tasks_took():
    """One for each of its microbatches, or one for both."""
    backward = {Task(Kind.EXPERT, Pass.BACKWARD, 1, number): [2.0, 4.0] for number in (0, 1)}
    first, second = (Task(Kind.EXPERT, Pass.WEIGHT, 1, number) for number in (0, 1))
    for weights in ({first: [1.0, 1.0], second: [3.0, 3.0]}, {second: [4.0, 4.0]}):
        found = typical([_OfRank("expert", {**backward, **weights}, 0.0, 0.0)])
        assert found == [{"expert_backward": 5.0}]


def test_one_run_is_timed_for_one_purpose():
    problems = Problems()
    flags, rest = parse_flags(["--hetermoe", "--hetermoe-dry-run", "--hetermoe-trace", "there", "--lr", "1"], problems)
    assert flags.dry_run and rest == ["--lr", "1"] and problems
    quiet = Problems()
    assert not parse_flags(["--lr", "1"], quiet)[0].dry_run and not quiet


def test_a_backward_is_measured_with_its_weights_part():
    """Prices of a plan are of whole backwards, whether or not its schedule splits them."""
    backward, weights = (Task(Kind.EXPERT, way, 1, 0) for way in (Pass.BACKWARD, Pass.WEIGHT))
    found = typical([_OfRank("expert", {backward: [3.0, 5.0], weights: [2.0, 1.0]}, 9.0, 0.0)])
    assert found == [{"expert_backward": 5.5}]
