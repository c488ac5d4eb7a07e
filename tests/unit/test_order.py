"""Which rank each process becomes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.topology.layout import Layout
from megatron_hetermoe.topology.order import Started, describe_order, parse_patterns, pool_order

NEW, OLD = ("NVIDIA A40", 8.6), ("Tesla V100-SXM2-16GB", 7.0)


def processes(*kinds, **common):
    return [Started(gpu, capability, f"node{index // 2}", **common) for index, (gpu, capability) in enumerate(kinds)]


def named(*pools):
    return [Started(node=f"node{index}", pool=pool) for index, pool in enumerate(pools)]


def order(started, layout, pools=(), **patterns):
    return pool_order(started, layout, pools, patterns)


def test_alike_stay_as_they_are():
    for kind in (NEW, ("", 0.0)):
        assert order(processes(*[kind] * 4), Layout(2, 2)) == (0, 1, 2, 3)
        assert order(processes(*[kind] * 4), Layout(2, 2), ("new", "new", "old", "old")) == (0, 1, 2, 3)


def test_attention_goes_to_the_newest():
    assert order(processes(NEW, NEW, OLD, OLD), Layout(2, 2)) == (0, 1, 2, 3)
    assert order(processes(OLD, OLD, NEW, NEW), Layout(2, 2)) == (2, 3, 0, 1)
    assert order(processes(NEW, OLD, NEW, OLD), Layout(2, 2)) == (0, 2, 1, 3)


def test_numbers_decide_before_age():
    """Four old and two new, and attention on four ranks: so it was meant."""
    assert order(processes(NEW, NEW, OLD, OLD, OLD, OLD), Layout(4, 2)) == (4, 5, 0, 1, 2, 3)


def test_where_no_numbers_fit_the_newest_come_first():
    assert order(processes(OLD, OLD, OLD, NEW, NEW, NEW), Layout(2, 4)) == (3, 4, 5, 0, 1, 2)
    third = ("NVIDIA L40S", 8.9)
    assert order(processes(OLD, NEW, third), Layout(1, 2)) == (2, 1, 0)


def test_of_equal_age_the_launcher_decides():
    board, other = ("NVIDIA A40", 8.6), ("NVIDIA A10", 8.6)
    assert order(processes(board, board, other, other), Layout(2, 2)) == (0, 1, 2, 3)
    assert order(processes(other, board, other, board), Layout(2, 2)) == (0, 2, 1, 3)


def test_pools_of_a_plan_interleave():
    """Two ZP groups of one attention rank on new, and expert ranks on old, old and new: no launcher numbers like that."""
    pools = ("new", "old", "old", "new")
    started = processes(NEW, NEW, NEW, NEW, OLD, OLD, OLD, OLD)
    layout = Layout(2, 6, 2)
    ranks = order(started, layout, pools)
    assert sorted(ranks) == list(range(8))
    for process, rank in zip(started, ranks):
        assert (process.gpu == NEW[0]) == (pools[layout.member_of(rank)] == "new")
    with pytest.raises(UsageError, match="the plan has 4 of new and 4 of old, the launcher started 2 of NVIDIA A40"):
        order(processes(NEW, NEW, *[OLD] * 6), layout, pools)


def test_named_pools_count():
    assert order(named("expert", "attention", "expert"), Layout(1, 2)) == (1, 0, 2)
    assert order(named("old", "new"), Layout(1, 1), ("new", "old")) == (1, 0)
    with pytest.raises(UsageError, match="HETERMOE_POOL is 'experts'; the pools are attention, expert"):
        order(named("attention", "experts"), Layout(1, 1))
    with pytest.raises(UsageError, match="not for 1, 2"):
        order(named("attention", "", ""), Layout(1, 2))
    with pytest.raises(UsageError, match="has 1 of attention and 2 of expert, the launcher started 2 of attention and 1"):
        order(named("attention", "attention", "expert"), Layout(1, 2))


@pytest.mark.parametrize("term, gpu, fits", [
    ("A40", "NVIDIA A40", True), ("a40", "NVIDIA A40-48Q", True), ("A40", "NVIDIA RTX A4000", False),
    ("H20", "NVIDIA H200", False), ("V100", "Tesla V100-SXM2-16GB", True), ("RTX3090", "NVIDIA GeForce RTX 3090", True),
    ("V100", "Quadro GV100", False), ("*A40*", "NVIDIA RTX A4000", True), ("V?00*", "Tesla V100-SXM2-16GB", False), ("L40", "NVIDIA L40S", False),
])
def test_words_and_patterns(term, gpu, fits):
    started = [Started(gpu, 8.0, "n0"), Started("other", 7.0, "n1")]
    if fits:
        assert order(started, Layout(1, 1), attention=(term,), expert=("other",)) == (0, 1)
    else:
        with pytest.raises(UsageError, match=f"process 0 .*{gpu}.*is of no pool"):
            order(started, Layout(1, 1), attention=(term,), expert=("other",))


def test_patterns_find_nodes_and_features():
    started = [Started(node="old-1", features=("big",)), Started(node="x", features=("a40", "big"))]
    assert order(started, Layout(1, 1), attention=("a40",), expert=("old-*",)) == (1, 0)
    with pytest.raises(UsageError, match="process 1 .* is of attention and expert"):
        order(started, Layout(1, 1), attention=("a40",), expert=("big",))


def test_patterns_as_text():
    problems = Problems()
    assert parse_patterns("attention=A40 expert=V100,old-*", problems) == {
        "attention": ("A40",), "expert": ("V100", "old-*")}
    assert parse_patterns("", problems) == {} and not problems
    parse_patterns("attention= expert", problems)
    with pytest.raises(UsageError, match="'attention='.*\n.*'expert'"):
        problems.raise_if_any()


def test_description():
    started = processes(NEW, NEW, OLD)
    assert describe_order(started, (1, 2, 0)) == "0 on Tesla V100-SXM2-16GB of node1, 1-2 on NVIDIA A40 of node0"


@given(st.lists(st.sampled_from([NEW, OLD, ("NVIDIA T4", 7.5)]), min_size=2, max_size=9), st.data())
def test_always_a_permutation_that_keeps_order_within_a_kind(kinds, data):
    attention = data.draw(st.integers(1, len(kinds) - 1))
    started = processes(*kinds)
    ranks = order(started, Layout(attention, len(kinds) - attention))
    assert sorted(ranks) == list(range(len(kinds)))
    for gpu in {gpu for gpu, _ in kinds}:
        own = [rank for one, rank in zip(started, ranks) if one.gpu == gpu]
        assert own == sorted(own)
