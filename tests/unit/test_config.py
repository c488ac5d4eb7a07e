"""Flags, plan files, and how they resolve to one plan."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import shape

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import Flags, parse_flags
from megatron_hetermoe.config.plan import Plan, plan_from_json
from megatron_hetermoe.config.slow_down import parse_slow_down
from megatron_hetermoe.planner.resolve import Parallelism, resolve

BASE = Flags(enabled=True, attention_ranks=2, expert_ranks=2)


def parsed(line: str) -> tuple[Flags, list[str], str]:
    problems = Problems()
    flags, rest = parse_flags(line.split(), problems)
    try:
        problems.raise_if_any()
    except UsageError as error:
        return flags, rest, error.message()
    return flags, rest, ""


def resolved(flags: Flags = BASE, world: int = 4, **model) -> Plan:
    problems = Problems()
    plan = resolve(flags, shape(**model), "fp32", world, problems)
    problems.raise_if_any()
    return plan


def test_flags_are_taken_out_of_megatrons():
    flags, rest, said = parsed("--lr 1 --hetermoe --hetermoe-attention-ranks 2 --hetermoe-wave=3 --seed -5")
    assert not said and rest == ["--lr", "1", "--seed", "-5"]
    assert flags == Flags(enabled=True, attention_ranks=2, wave=3)


def test_without_ours_nothing_changes():
    assert parsed("--lr 1 --het x") == (Flags(), ["--lr", "1", "--het", "x"], "")


@pytest.mark.parametrize(
    "line, said",
    [
        ("--hetermoe --hetermoe-attention-rank 2", "did you mean --hetermoe-attention-ranks?"),
        ("--hetermoe --hetermoe-wave 0", "--hetermoe-wave is '0'; it must be a whole number from 1 on"),
        ("--hetermoe --hetermoe-groups two", "--hetermoe-groups is 'two'"),
        ("--hetermoe --hetermoe-plan --lr 1", "--hetermoe-plan needs a value (FILE)"),
        ("--hetermoe --hetermoe-wave=--", "--hetermoe-wave is '--'"),
        ("--hetermoe=1", "--hetermoe takes no value"),
        ("--hetermoe --hetermoe-schedule zebras", "must be one of zebra, overlapped, sequential"),
        ("--hetermoe-groups 2 --hetermoe-wave 1", "--hetermoe-groups, --hetermoe-wave without --hetermoe"),
    ],
)
def test_bad_flags(line, said):
    assert said in parsed(line)[2]


def test_all_bad_flags_are_named_at_once():
    said = parsed("--hetermoe-x 1 --hetermoe-wave a --hetermoe-groups")[2]
    assert said.startswith("hetermoe: 3 problems:")


def test_the_default_plan():
    plan = resolved()
    assert plan.placement == ((2, 2, 2, 2, 3, 3, 3, 3),) * 2 and plan.groups == 1
    assert (plan.schedule, plan.wave) == ("zebra", None)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(1, 9), st.booleans())
def test_plan_files_round_trip(m, n, g, wave, sequential):
    flags = Flags(True, m * g, n * g, g, None, "sequential" if sequential else None, None if sequential else wave)
    plan = resolved(flags, (m + n) * g, experts=5)
    assert plan_from_json(plan.to_json(), "plan.json") == plan


@pytest.mark.parametrize(
    "flags, world, said",
    [
        (Flags(True, 2), 4, "--hetermoe-expert-ranks is missing"),
        (BASE, 5, "2 attention and 2 expert ranks need 4 ranks, but 5 were started"),
        (Flags(True, 2, 3, 2), 5, "3 expert ranks do not divide into 2 ZP groups; take 2 or 4"),
        (Flags(True, 2, 2, schedule="sequential", wave=2), 4, "--hetermoe-wave 2 contradicts"),
        (Flags(True, 2, 2, placement="/nowhere.yaml"), 4, "cannot read /nowhere.yaml: No such file"),
        (Flags(True, 2, 2, plan="/nowhere.json"), 4, "cannot read the plan /nowhere.json: No such file"),
    ],
)
def test_what_cannot_be_resolved(flags, world, said):
    with pytest.raises(UsageError) as caught:
        resolved(flags, world)
    assert said in caught.value.message()


def test_a_plan_file_decides_and_flags_may_only_agree(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(resolved().to_json())
    assert resolved(Flags(True, plan=str(path))) == resolved()
    assert resolved(dataclasses.replace(BASE, plan=str(path))) == resolved()
    with pytest.raises(UsageError) as caught:
        resolved(Flags(True, expert_ranks=3, wave=2, placement="p", plan=str(path)), experts=9)
    said = caught.value.message()
    for problem in (
        "--hetermoe-expert-ranks 3 disagrees with 2", "--hetermoe-wave 2 disagrees with None", "leave one out",
        "is for another model (experts 8 there, 9 here)",
    ):
        assert problem in said


def test_pipeline_stages_are_part_of_the_plan(tmp_path):
    """Which layers are in which stage; a plan file and Megatron's flags must say the same."""
    problems = Problems()
    four = shape(layers=4)
    plan = resolve(BASE, four, "fp32", 4, problems, Parallelism(stage_layers=(1, 3)))
    assert not problems and plan.placement == ((1,) * 8,) * 4
    assert [plan.chunks_of_stage(stage) for stage in range(plan.stages)] == [(range(1, 2),), (range(2, 5),)]
    interleaved = resolve(BASE, four, "fp32", 4, problems, Parallelism(stage_layers=(1, 1, 1, 1), virtual_stages=2))
    assert [interleaved.chunks_of_stage(stage) for stage in range(2)] == [
        (range(1, 2), range(3, 4)), (range(2, 3), range(4, 5))]
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    from_file = Flags(True, plan=str(path))
    assert resolve(from_file, four, "fp32", 4, problems, Parallelism(stage_layers=(1, 3))) == plan
    for stage_layers in ((2, 2), (), (1, 2)):
        assert resolve(from_file, four, "fp32", 4, problems, Parallelism(stage_layers=stage_layers)) is None
    with pytest.raises(UsageError) as caught:
        problems.raise_if_any()
    assert "stages [2, 2] layers" in caught.value.message()
    assert "--pipeline-model-parallel-size 1 disagrees with 2" in caught.value.message()


def test_layers_that_predict_further_tokens_are_the_last_stages():
    further = dataclasses.replace(shape(layers=4), mtp_layers=2)
    problems = Problems()
    plan = resolve(BASE, further, "fp32", 4, problems, Parallelism(stage_layers=(1, 3)))
    assert not problems and len(plan.placement) == 4 and plan.chunks_of_stage(1) == (range(2, 5),)
    assert resolve(BASE, further, "fp32", 4, problems, Parallelism(stage_layers=(2, 2))) is None
    with pytest.raises(UsageError, match="stages of 2, 0 layers do not make up the model's 2 beside the 2 that predict"):
        problems.raise_if_any()


@pytest.mark.parametrize("stage_layers, said", [
    ((2, 2), "overlapped waves are not supported with 2 pipeline stages"),
    ((2, 1), "stages of 2, 1 layers do not make up the model's 4"), ((4, 0), "stages of 4, 0 layers"),
    ((1, 1, 2), "2 attention ranks do not divide into 1 ZP groups in each of 3 pipeline stages"),
])
def test_pipelines_that_cannot_be(stage_layers, said):
    problems = Problems()
    dense_first = dataclasses.replace(shape(layers=4), moe_layers=(2, 3, 4))
    overlapped = dataclasses.replace(BASE, schedule="overlapped")
    assert resolve(overlapped, dense_first, "fp32", 4, problems, Parallelism(stage_layers=stage_layers)) is None
    with pytest.raises(UsageError) as caught:
        problems.raise_if_any()
    assert said in caught.value.message()


def test_tensor_parallelism_is_part_of_the_plan(tmp_path):
    """Two expert ranks are one holder; a plan file and Megatron's flags must say the same."""
    problems = Problems()
    plan = resolve(BASE, shape(), "fp32", 4, problems, Parallelism(2, 2, 1))
    assert not problems and plan.placement == ((2,) * 8,) * 2
    assert (plan.tensor_parallel, plan.expert_tensor_parallel) == (2, 2)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    from_file = Flags(True, plan=str(path))
    assert resolve(from_file, shape(), "fp32", 4, problems, Parallelism(2, 2, 1)) == plan
    assert resolve(from_file, shape(), "fp32", 4, problems, Parallelism(1, 2, 1)) is None
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 1 disagrees with 2"):
        problems.raise_if_any()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 99}, "not a plan of format"),
        ({"wave": "all"}, "'wave' is 'all', which is not of type int | None"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"placement": [[0, 1], "x"]}, "'placement'"),
        ({"model": {}}, "'layers' is missing"),
        ({"placement": [[9] * 8] * 2}, "names holders beyond the 4 that a ZP group has"),
        ({"placement": [[2] * 8]}, "placement has [8] experts by layer, the model [8, 8]"),
        ({"groups": 0}, "0 ZP groups"),
    ],
)
def test_plan_files_that_are_not_as_they_should_be(tmp_path, change, said):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(resolved().to_json()), **change}))
    with pytest.raises(UsageError) as caught:
        resolved(Flags(True, plan=str(path)))
    assert said in caught.value.message()


def test_a_plan_file_that_is_no_json(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("placement: yes")
    with pytest.raises(UsageError, match="is not JSON"):
        resolved(Flags(True, plan=str(path)))


def test_what_is_to_be_slowed_down():
    problems = Problems()
    assert parse_slow_down("expert=1.25,attention-on-expert=3", problems) == {
        ("attention", "attention"): 1.0, ("expert", "attention"): 1.0, ("attention", "expert"): 3.0,
        ("expert", "expert"): 1.25,
    }
    assert not problems
    for text in ("", "expert", "expert=0.5", "experts=2", "expert=2,expert=3", "expert=inf", "dispatch-on-expert=2"):
        wrong = Problems()
        parse_slow_down(text, wrong)
        assert wrong, text
    parse_flags(["--hetermoe", "--hetermoe-slow-down", "expert=-1"], problems)
    with pytest.raises(UsageError, match="--hetermoe-slow-down has 'expert=-1'"):
        problems.raise_if_any()
