"""Layouts and placements, for any M, N and G."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import shape

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT, Layout, layout_problems
from megatron_hetermoe.topology.placement import Placement, even_placement, placement_from_document

sizes = st.integers(1, 7)


@st.composite
def layouts(draw):
    groups, tensor, expert_tensor = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    context, stages = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    attention, expert = (draw(sizes) * stages * groups * share for share in (tensor * context, expert_tensor))
    return Layout(attention, expert, groups, tensor, expert_tensor, context, stages)


@given(layouts())
def test_every_rank_has_one_place(layout):
    places = {(layout.group_of(rank), layout.member_of(rank)) for rank in range(layout.world_size)}
    assert places == {(g, member) for g in range(layout.stages * layout.groups) for member in range(layout.m + layout.n)}
    for rank in range(layout.world_size):
        assert layout.rank_of(layout.group_of(rank), layout.member_of(rank)) == rank
        assert layout.role(rank) == (ATTENTION if layout.member_of(rank) < layout.m else EXPERT)


@given(layouts())
def test_groups_partition_their_pools(layout):
    for role in (ATTENTION, EXPERT):
        pool = list(layout.pool(role))
        for groups in (
            layout.tensor_parallel(role), layout.context_parallel(role), layout.data_parallel(role), layout.expert_tensor_parallel(role),
            layout.expert_parallel(role), layout.expert_data_parallel(role), layout.pipeline_parallel(role),
        ):
            assert sorted(rank for group in groups for rank in group) == pool
        for group in layout.expert_data_parallel(role):
            assert len({layout.member_of(rank) for rank in group}) == 1
            first = layout.stage_of(group[0]) * layout.groups
            assert sorted(layout.group_of(rank) for rank in group) == list(range(first, first + layout.groups))
        for ranks in layout.pipeline_parallel(role):
            assert [layout.stage_of(rank) for rank in ranks] == list(range(layout.stages))
            assert len({layout.member_of(rank) for rank in ranks}) == 1
    assert sorted(rank for group in layout.zp_groups() for rank in group) == list(range(layout.world_size))


def test_process_groups_of_two_zp_groups_by_hand():
    layout = Layout(attention_ranks=4, expert_ranks=6, groups=2)
    assert layout.zp_groups() == ((0, 1, 4, 5, 6), (2, 3, 7, 8, 9))
    assert layout.data_parallel(ATTENTION) == ((0, 1, 2, 3),)
    assert layout.expert_parallel(EXPERT) == ((4, 5, 6), (7, 8, 9))
    assert layout.expert_data_parallel(EXPERT) == ((4, 7), (5, 8), (6, 9))
    assert layout.expert_data_parallel(ATTENTION) == ((0, 2), (1, 3))


def test_process_groups_of_two_stages_by_hand():
    """Two stages of two ZP groups, each of one attention and two expert ranks."""
    layout = Layout(attention_ranks=4, expert_ranks=8, groups=2, stages=2)
    assert layout.zp_groups() == ((0, 4, 5), (1, 6, 7), (2, 8, 9), (3, 10, 11))
    assert layout.data_parallel(ATTENTION) == ((0, 1), (2, 3))
    assert layout.pipeline_parallel(ATTENTION) == ((0, 2), (1, 3))
    assert layout.expert_data_parallel(EXPERT) == ((4, 6), (5, 7), (8, 10), (9, 11))
    assert (layout.replicas, layout.microbatches) == (2, 2)


def test_process_groups_with_tensor_parallelism_by_hand():
    """Four attention ranks in pairs, and four expert ranks that are two holders, in each of two ZP groups."""
    layout = Layout(attention_ranks=8, expert_ranks=8, groups=2, tensor=2, expert_tensor=2)
    assert layout.tensor_parallel(ATTENTION) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.data_parallel(ATTENTION) == ((0, 2, 4, 6), (1, 3, 5, 7)) and layout.replicas == 4
    assert layout.tensor_parallel(EXPERT) == tuple((rank,) for rank in range(8, 16))
    assert layout.expert_tensor_parallel(EXPERT) == ((8, 9), (10, 11), (12, 13), (14, 15))
    assert layout.expert_parallel(EXPERT) == ((8, 10), (9, 11), (12, 14), (13, 15))
    assert layout.expert_parallel(ATTENTION) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.expert_data_parallel(EXPERT) == ((8, 12), (9, 13), (10, 14), (11, 15))
    assert layout.holders == 6 and [layout.holder_of(rank) for rank in (4, 7, 12, 13, 14, 15)] == [0, 3, 4, 4, 5, 5]


def test_context_parallel_groups_by_hand():
    """Two sequences, each in two parts, each part on two ranks that share the dense part."""
    layout = Layout(attention_ranks=8, expert_ranks=1, tensor=2, context=2)
    assert layout.tensor_parallel(ATTENTION) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.context_parallel(ATTENTION) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.data_parallel(ATTENTION) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (layout.replicas, layout.microbatches) == (4, 2)


@given(layouts())
def test_every_member_is_a_part_of_one_holder(layout):
    members = [member for holder in range(layout.holders) for member in layout.members_of(holder)]
    assert members == list(range(layout.m + layout.n))
    for rank in range(layout.world_size):
        assert layout.member_of(rank) in layout.members_of(layout.holder_of(rank))


@pytest.mark.parametrize(
    "numbers, said",
    [((0, 2, 1), "at least one attention rank"), ((2, 0, 1), "at least one expert rank"),
     ((5, 4, 2), "5 attention ranks do not divide into 2 ZP groups; take 4 or 6"),
     ((1, 4, 4), "1 attention ranks do not divide into 4 ZP groups; take 4"),
     ((6, 4, 2, 2), "into 2 ZP groups, each of them into groups of 2 that tensor or context parallelism puts together; take 4 or 8"),
     ((4, 3, 1, 2, 2), "3 expert ranks do not divide into 1 ZP groups, each of them into groups of 2"),
     ((4, 4, 1, 0), "parallelism of 0 attention ranks"),
     ((6, 8, 2, 1, 1, 1, 2), "6 attention ranks do not divide into 2 ZP groups in each of 2 pipeline stages; take 4 or 8")],
)
def test_layouts_that_cannot_be(numbers, said):
    assert said in " ".join(layout_problems(*numbers))


@given(layouts(), st.integers(1, 20), st.integers(1, 5))
def test_even_placement_holds_every_expert_once(layout, experts, layers):
    placement = even_placement(shape(experts=experts, layers=layers), layout)
    for layer in range(1, layers + 1):
        held = [placement.held(layer, holder) for holder in range(layout.holders)]
        assert sorted(expert for part in held for expert in part) == list(range(experts))
        assert not any(held[: layout.m]), "attention ranks hold experts only where asked to"
        counts = [len(part) for part in held[layout.m:]]
        assert max(counts) - min(counts) <= 1
        assert placement.expert_order(layer) == tuple(expert for part in held for expert in part)


def test_placement_as_a_user_writes_it():
    layout = Layout(2, 2)
    placement = placement_from_document(
        {"experts": 4, "layers": {"all": {"e0": ["0-1"], "e1": [2, 3]}, 2: {"a0": [3], "a1": 0, "e1": ["1-2"]}}},
        shape(experts=4, layers=3), layout, "p.yaml",
    )
    assert placement == Placement(((2, 2, 3, 3), (1, 3, 3, 0), (2, 2, 3, 3)), 4)
    assert placement.layers_of(0) == {2} and placement.layers_of(2) == {1, 3}
    assert placement.holders_of(2) == (0, 1, 3)
    assert placement.experts_held(3) == 6


def test_every_fault_of_a_placement_is_named():
    with pytest.raises(UsageError) as caught:
        placement_from_document(
            {"experts": 5, "extra": 1, "layers": {
                1: {"e0": [0, 1, 9], "e1": [1], "x7": [2]}, 2: {"e0": ["two"]}, 5: {"e0": [0]}}},
            shape(experts=4, layers=3), Layout(2, 2), "p.yaml",
        )
    said = caught.value.message()
    for problem in (
        "unknown key 'extra'", "5 experts a layer, this one has 4", "layer 1, e0: no expert 9",
        "layer 1: expert 1 has 2 holders, e0 and e1", "layer 1: expert 2 has no holder", "no holder 'x7'",
        "layer 2, e0: 'two' is neither", "layer 3 has no entry", "layer 5 does not exist",
    ):
        assert problem in said, problem


def test_a_dense_layer_takes_no_experts():
    with pytest.raises(UsageError, match="layer 1 has no experts"):
        placement_from_document(
            {"experts": 2, "layers": {"all": {"e0": ["0-1"]}, 1: {"e0": ["0-1"]}}},
            shape(experts=2, layers=2, moe_layers=(2,)), Layout(1, 1), "p.yaml",
        )
