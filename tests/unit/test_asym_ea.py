"""Asymmetric expert assignment: the paper's, and the better one against it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pricing import cluster, group, profile, shape

from megatron_hetermoe.planner.asym_ea import (
    Limits, balance, feasible, gather_and_squeeze, limits_of, placement_of,
)
from megatron_hetermoe.planner.memory import (
    imbalance_that_fits, member_memory, most_experts, most_imbalance, usable,
)
from megatron_hetermoe.simulator.baselines import ideal_seconds, zebra_seconds


def free(members):
    """No memory bound."""
    return Limits((10**6,) * members)


def slow_experts(m, n, layers=4, experts=24, factor=2.0, **settings):
    """Expert ranks take ``factor`` times as long for their share of a layer as attention ranks for attention."""
    of = shape(layers=layers, experts=experts)
    unit = 1e-4
    tokens = m * of.sequence * of.topk / experts
    seconds = unit * tokens / 64 * 3 * experts / n
    return group(m, n, of, new=profile(of, (seconds / factor / 3, 2 * seconds / factor / 3), (unit, 2 * unit)),
                 old=profile(of, (1e-2, 2e-2), (unit, 2 * unit)), **settings)


def test_a_bubble_that_pays_for_no_chunk_gathers_until_it_does():
    """M = N = 2: a chunk is two experts, one off and one on each rank. Each layer's bubble is 1/2 of the expert time
    of 12 experts a rank, and a chunk shrinks it by two experts of a rank: 3 chunks a layer."""
    moved = gather_and_squeeze(slow_experts(2, 2), free(4))
    assert moved[:, 0].tolist() == [3, 3, 3, 3]
    assert (moved.sum(axis=1) == 24).all()
    third = gather_and_squeeze(slow_experts(2, 2, factor=12 / 11.5), free(4))
    # Half an expert's time a layer: one chunk of two is paid for in every fourth layer.
    assert third[:, 0].tolist() == [0, 0, 0, 1]


def test_chunks_keep_ranks_equal():
    moved = gather_and_squeeze(slow_experts(2, 4), free(6))
    assert (moved[:, 0] == moved[:, 1]).all() and (moved[:, 2:] == moved[:, 2:3]).all()
    uneven = gather_and_squeeze(slow_experts(4, 3), free(7))
    assert set(uneven[:, 0]) <= {0, 3, 6}  # lcm(4, 3) = 12 experts: 3 on each attention rank


def test_memory_bounds_of_the_paper():
    """n_max holds chunks back, n_min moves more than the bubble pays for."""
    limited = gather_and_squeeze(slow_experts(2, 2), Limits((5, 5, 100, 100)))
    assert limited[:, 0].sum() == 5
    forced = gather_and_squeeze(slow_experts(2, 2, factor=0.5), Limits((100, 100, 40, 40)))
    assert forced[:, 2].sum() == 40 and forced[:, 0].sum() == 8


def test_nothing_moves_when_experts_are_faster():
    assert not gather_and_squeeze(slow_experts(2, 2, factor=0.9), free(4))[:, :2].any()


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    of = shape(layers=layers, experts=experts)
    seconds = st.floats(1e-5, 3e-3)
    profiles = [profile(of, (draw(seconds), draw(seconds)), (draw(seconds), draw(seconds)), head=(1e-4, 2e-4),
                        expert_task=draw(st.sampled_from([None, (2e-4, 5e-4)]))) for _ in range(2)]
    microbatches = draw(st.integers(1, 6))
    priced = group(m, n, of, microbatches, *profiles, cluster(m, n, bandwidth=draw(st.floats(1e6, 1e10))))
    pairs = layers * experts
    limits = Limits(tuple(draw(st.integers(pairs // 3, pairs)) for _ in range(m + n)))
    return priced, limits, draw(st.one_of(st.none(), st.integers(1, microbatches)))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_never_worse_than_gather_and_squeeze(case):
    priced, limits, wave = case
    paper = gather_and_squeeze(priced, limits)
    best = balance(priced, limits, wave)
    if best is None:
        assert not feasible(paper, limits)
        return
    assert feasible(best.experts, limits) and (best.experts.sum(axis=1) == priced.shape.experts).all()
    assert best.seconds == pytest.approx(zebra_seconds(priced, placement_of(best.experts), wave=wave))
    if feasible(paper, limits):
        assert best.seconds <= zebra_seconds(priced, placement_of(paper), wave=wave)


def test_better_than_the_paper_where_m_and_n_do_not_divide():
    priced = slow_experts(4, 3, layers=8, factor=1.4, microbatches=8)
    best = balance(priced, free(7), None)
    assert best.origin == "balance" and best.seconds < 0.95 * best.paper_seconds
    assert best.seconds < ideal_seconds(priced)


def test_ranks_with_little_memory_leave_experts_to_those_with_much():
    """Equally fast, so only memory tells them apart; everything fits in one way."""
    limits = Limits((0, 4, 4, 12, 12))
    best = balance(slow_experts(1, 4, layers=4, experts=8), limits, None)
    assert (best.experts == [0, 1, 1, 3, 3]).all()


def test_what_does_not_divide_goes_round_where_memory_asks_for_it():
    """Large groups keep ranks alike where they can; 13 ranks with room for 20 pairs take 5 x 32 of 12 in turn."""
    of = shape(layers=12, experts=20)
    priced = slow_experts(1, 13, layers=12, experts=20)
    best = balance(priced, Limits((0, *(19,) * 13)), None)
    assert of.layers * of.experts > 13 * 18 and feasible(best.experts, Limits((0, *(19,) * 13)))


def test_whatever_fits_at_all_is_found():
    """Four ranks of odd room, all of which is needed, and one expert more."""
    priced, limits = slow_experts(1, 4, layers=4, experts=8), Limits((1, 3, 5, 9, 14))
    best = balance(priced, limits, None)
    assert best.origin == "memory" and (best.experts.sum(axis=0) == limits.pairs).all()
    assert (best.experts.sum(axis=1) == 8).all()
    assert balance(priced, Limits((1, 3, 5, 9, 13)), None) is None


def test_memory_counts_what_a_rank_holds():
    priced = group(2, 2, microbatches=4)
    few, many = (member_memory(priced, 2, experts, 4, 1) for experts in (3, 6))
    assert many.weights == 2 * few.weights and many.activations == 2 * few.activations
    assert member_memory(priced, 0, 0, 4).activations == 2 * member_memory(priced, 0, 0, 2).activations
    assert few.gradients == 2 * few.weights and few.optimizer == 6 * few.weights  # bf16: fp32 gradients, 12 bytes


def test_memory_counts_what_waits_for_a_waves_weights():
    """Of six experts in three layers, in bf16, for each row of a wave: the second product's gradient (64) and a copy of its
    rows and gradient (128 and 64); more where the backward makes rows again."""
    priced = group(2, 2, microbatches=4)
    rows = 4 * 2 * priced.expert_tokens
    for step, size in ((priced.step, 2 * 256), (replace(priced.step, activation_again=True), 2 * (256 + 128)),
                       (replace(priced.step, recompute="full"), 2 * (256 + 64 + 3 * 128))):
        of = replace(priced, step=step)
        merged, plain = (member_memory(of, 2, 6, 4, 1, how) for how in ("merged", "together"))
        assert merged.transient - plain.transient == pytest.approx(rows * size)


def test_memory_bounds_how_uneven_routing_may_become():
    """Two of eight experts a token: one that gets every token has four times its part; a rank with four, twice."""
    assert most_imbalance(group(2, 2), 3) == 4 and most_imbalance(group(2, 2), 4 * 3) == 2
    roomy, tight = group(2, 2), group(2, 2, on=cluster(2, 2, memory=1.5105e9))
    assert imbalance_that_fits(roomy, 2, 12, 4) == 2
    fits = imbalance_that_fits(tight, 2, 12, 4)
    assert 1 < fits < 2
    assert member_memory(tight, 2, 12, 4, fits).total <= 1.5105e9 < member_memory(tight, 2, 12, 4, fits + 0.02).total


def test_the_most_experts_fit_and_one_more_does_not():
    priced = group(2, 2, on=cluster(2, 2, memory=1.676e9))
    most = most_experts(priced, 2, 4)
    assert 0 < most < 24
    assert member_memory(priced, 2, most, 4).total <= usable(priced, 2) < member_memory(priced, 2, most + 1, 4).total
    assert limits_of(group(2, 2, on=cluster(2, 2, memory=1e9)), 4).pairs == (-1,) * 4
    assert balance(priced, limits_of(group(2, 2, on=cluster(2, 2, memory=1e9)), 4), None) is None
