"""The nearest plan for other ranks: valid, as large as can be, the same where nothing changed, and few experts move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pricing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import shape

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import Flags
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.stages import stage_flags
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profiled
from megatron_hetermoe.planner.elastic import refit, within_memory
from megatron_hetermoe.planner.resolve import Parallelism, resolve
from megatron_hetermoe.topology.layout import Layout
from megatron_hetermoe.topology.placement import Placement, even_placement

SHAPE = shape(experts=8)
THREE = shape(layers=3)


def plan(attention, expert, groups=1, placement=None, **fields):
    holders = placement or even_placement(SHAPE, Layout(attention, expert, groups)).holders
    return Plan(SHAPE, attention, expert, groups, holders, **fields)


@st.composite
def cases(draw):
    groups = draw(st.integers(1, 3))
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layer = st.lists(st.integers(0, m + n - 1), min_size=8, max_size=8).map(tuple)
    holders = tuple(draw(layer) if number in SHAPE.moe_layers else () for number in range(1, SHAPE.layers + 1))
    there = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return plan(groups * m, groups * n, groups, holders), there, groups * m * draw(st.integers(1, 6))


@given(cases())
def test_any_ranks_give_a_valid_plan(case):
    before, (attention, expert), microbatches = case
    found = refit(before, attention, expert, microbatches)
    now = found.plan
    assert now.attention_ranks <= attention and now.expert_ranks <= expert and microbatches % now.attention_ranks == 0
    Placement(now.placement, (now.attention_ranks + now.expert_ranks) // now.groups)
    assert [len(layer) for layer in now.placement] == [len(layer) for layer in before.placement]
    assert found.said or now == before
    if (attention, expert) == (before.attention_ranks, before.expert_ranks):
        assert now == before


def test_nothing_moves_between_ranks_that_are_left():
    """Of four expert ranks with two experts a layer each the last is lost: its two go, the other six stay."""
    found = refit(plan(2, 4, wave=3), 2, 3, 8)
    for old, new in zip(plan(2, 4).placement, found.plan.placement):
        assert all(one == other for one, other in zip(old, new) if one != 5)
        assert sorted(Counter(new).values()) in ([], [2, 3, 3])
    assert found.plan.wave == 3
    layers = len(SHAPE.moe_layers)
    assert f"{2 * layers} of {8 * layers} experts of all layers move" in found.said[1]


def test_new_ranks_take_their_part():
    found = refit(plan(2, 2), 4, 4, 8)
    assert found.plan.groups == 1
    assert all(sorted(Counter(layer).values()) in ([], [2, 2, 2, 2]) for layer in found.plan.placement)


def test_roles_keep_their_part_of_the_experts():
    """Two attention ranks hold two experts a layer together; one of them lost, the other still holds one."""
    holders = tuple((0, 1, 2, 2, 2, 3, 3, 3) if number in SHAPE.moe_layers else ()
                    for number in range(1, SHAPE.layers + 1))
    found = refit(plan(2, 2, placement=holders), 1, 2, 8)
    assert all(Counter(layer)[0] == 1 for layer in found.plan.placement if layer)


def test_ranks_that_do_not_divide_stay_idle():
    found = refit(plan(4, 4, 2, step=Step(1, 2, 1000)), 3, 3, 8)
    assert (found.plan.attention_ranks, found.plan.expert_ranks, found.plan.groups) == (2, 3, 1)
    assert found.plan.step.microbatches == 4 and found.plan.predicted is None
    assert any("1 attention ranks stay idle: 3 do not divide 8 microbatches" in said for said in found.said)


def test_no_rank_of_a_role():
    with pytest.raises(UsageError, match="at least one of each role"):
        refit(plan(2, 2), 2, 0, 8)


def test_what_is_found_is_a_plan_that_a_run_takes(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(refit(plan(2, 4), 2, 3, 8).plan.to_json())
    problems = Problems()
    resolve(Flags(enabled=True, plan=str(path)), SHAPE, "fp32", 5, problems)
    problems.raise_if_any()


def priced(memory):
    """A plan of two and two ranks that the planner made for GPUs of so many bytes, which has lost an expert rank."""
    of = pricing.shape(layers=2, experts=8)
    holders = even_placement(of, Layout(2, 2, 1)).holders
    before = Plan(of, 2, 2, 1, holders, wave=4, pools=("new", "new", "old", "old"), step=Step(1, 4, 1000),
                  attention_precision="bf16", expert_precision="bf16")
    on = pricing.cluster(2, 2, memory=memory)
    kinds = {name: Profiled(pricing.profile(of), of, "bf16", Notes()) for name in on.pools}
    return within_memory(refit(before, 2, 1, 8), on, kinds)


def test_memory_decides_how_many_microbatches_are_on_the_way():
    assert priced(40e9).plan.wave == 4
    smaller = priced(1.68e9)
    assert smaller.plan.wave == 2 and "2 microbatches on the way together in place of 4, for memory" in smaller.said[-1]
    with pytest.raises(UsageError, match="with 16 experts of all layers a GPU of old lacks"):
        priced(1.67e9)


def test_ranks_that_share_weights_stay_together():
    """Two attention ranks share the dense part and two expert ranks their experts: of three of each, two are used."""
    layout = Layout(4, 4, 1, tensor=2, expert_tensor=2)
    before = plan(4, 4, placement=even_placement(SHAPE, layout).holders, tensor_parallel=2, expert_tensor_parallel=2)
    found = refit(before, 3, 3, 8).plan
    now = Layout(found.attention_ranks, found.expert_ranks, found.groups, 2, 2)
    assert (now.attention_ranks, now.expert_ranks, now.holders) == (2, 2, 3)
    assert {holder for layer in found.placement for holder in layer} == {2}
    grown = refit(before, 8, 6, 8).plan
    assert (grown.attention_ranks, grown.expert_ranks) == (8, 6)
    Placement(grown.placement, Layout(8, 6, grown.groups, 2, 2).holders)
    with pytest.raises(UsageError, match="2 and 2 of them, which share weights or a sequence, are needed"):
        refit(before, 1, 4, 8)


def staged(attention, expert, stage_layers, groups=1, **fields):
    """A pipeline of three layers."""
    layout = Layout(attention, expert, groups, stages=len(stage_layers) // fields.get("virtual_stages", 1))
    return Plan(THREE, attention, expert, groups, even_placement(THREE, layout).holders, stage_layers=stage_layers, **fields)


def test_a_pipeline_keeps_its_stages():
    """Two stages of 1 and 3 ranks: with one expert rank of a stage lost, each has 2."""
    before = staged(2, 6, (2, 1), step=Step(1, 8, 1000))
    found = refit(before, 2, 5, 8)
    now = found.plan
    assert (now.attention_ranks, now.expert_ranks, now.stages, now.stage_layers) == (2, 4, 2, (2, 1))
    assert all(Counter(layer) == {1: 4, 2: 4} for layer in now.placement) and now.step.microbatches == 8
    assert "1 expert ranks stay idle: 5 do not divide into 1 ZP groups in 2 pipeline stages" in found.said
    assert refit(before, 2, 6, 8).plan == before
    grown = refit(before, 8, 12, 8).plan
    assert (grown.attention_ranks, grown.expert_ranks, grown.stages, grown.step.microbatches) == (8, 12, 2, 2)


@pytest.mark.parametrize("before, there, layers, virtual, flags", [
    (staged(2, 2, (2, 1)), (1, 2), (), 1, "--pipeline-model-parallel-size 1"),
    (staged(3, 3, (1, 1, 1)), (2, 2), (), 1, "--pipeline-model-parallel-size 1"),
])
def test_stages_next_to_each_other_become_one_where_ranks_are_too_few(before, there, layers, virtual, flags, tmp_path):
    found = refit(before, *there, 6)
    assert (found.plan.stage_layers, found.plan.virtual_stages) == (layers, virtual)
    assert found.said[0].endswith(f"pipeline stages in place of {before.stages}: start with {flags}")
    path = tmp_path / "plan.json"
    path.write_text(found.plan.to_json())
    problems = Problems()
    ranks = found.plan.attention_ranks + found.plan.expert_ranks
    parallelism = Parallelism(stage_layers=layers, virtual_stages=virtual)
    assert resolve(Flags(enabled=True, plan=str(path)), THREE, "fp32", ranks, problems, parallelism) == found.plan


@pytest.mark.parametrize("layers, virtual, further, flags", [
    ((2, 2), 1, 0, []), ((2, 3), 1, 1, []), ((3, 2), 1, 0, ["--decoder-first-pipeline-num-layers", "3"]),
    ((2, 2, 1), 1, 0, ["--decoder-last-pipeline-num-layers", "1"]),
    ((1, 2, 2, 4), 1, 1, ["--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "3"]),
    ((1, 2, 3, 1), 1, 0, ["--pipeline-model-parallel-layout", "Et|tt|ttt|tL"]),
    ((1, 1, 1, 1), 2, 0, ["--num-virtual-stages-per-pipeline-rank", "2"]),
    ((1, 2, 1, 2), 2, 1, ["--pipeline-model-parallel-layout", "Et|tt|t|tmL"]),
])
def test_the_flags_of_stages(layers, virtual, further, flags):
    assert stage_flags(layers, virtual, further) == ["--pipeline-model-parallel-size", str(len(layers) // virtual), *flags]


def test_merged_stages_keep_their_parts():
    """Of four stages of two parts, two of two parts, each of two next to each other."""
    of = replace(SHAPE, layers=16, moe_layers=tuple(range(1, 17)))
    before = Plan(of, 4, 4, 1, ((1,) * 8,) * 16, stage_layers=(1, 2, 3, 2, 1, 2, 3, 2), virtual_stages=2)
    found = refit(before, 3, 3, 8).plan
    assert (found.stages, found.virtual_stages, found.stage_layers) == (2, 2, (3, 5, 3, 5))


def test_ranks_that_share_a_sequence_stay_together():
    before = plan(4, 2, placement=even_placement(SHAPE, Layout(4, 2, 1, context=2)).holders, context_parallel=2,
                  step=Step(1, 4, 1000))
    found = refit(before, 3, 2, 8).plan
    assert (found.attention_ranks, found.expert_ranks, found.step.microbatches) == (2, 2, 8)


@pytest.mark.parametrize("field, value, said", [
    ("groups", 0, "0 ZP groups"), ("attention_ranks", 2**63, "at most 1,000,000"), ("expert_ranks", 3, "do not divide"),
])
def test_a_plan_that_is_none_is_refused(field, value, said):
    with pytest.raises(UsageError, match=said):
        refit(replace(plan(4, 4, 2), **{field: value}), 2, 2, 8)
