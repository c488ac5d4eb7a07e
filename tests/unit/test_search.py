"""The search over layouts: what fits, what is left out, what to do where nothing fits."""

from dataclasses import replace

import numpy as np
import pytest
from pricing import PRECISION, cluster, group, pool, profile, shape

from megatron_hetermoe.config.plan import plan_from_json
from megatron_hetermoe.cost.cluster import Cluster, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.tasks import costs_of_plan
from megatron_hetermoe.planner.advice import alone, baselines, nothing_fits
from megatron_hetermoe.planner.asym_ea import counts_of, long_step_seconds
from megatron_hetermoe.planner.memory import member_memory, usable
from megatron_hetermoe.planner.options import Question, options
from megatron_hetermoe.planner.search import after_losing_a_node, left_out, search
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_seconds

OF = shape(layers=2, experts=4)


def question(of=OF, batch=16):
    return Question(of, PRECISION, 1, batch, 1000, ("none",), (True,))


def kinds(on, of=OF, old=None):
    """"new" as profiled, every other pool like ``old``."""
    slow = old or profile(of, (5e-3, 1e-2), (1.5e-4, 3e-4))
    return kinds_of(on, of, PRECISION, Notes(), {name: profile(of) if name == "new" else slow for name in on.pools})


def test_every_option_divides_the_batch_and_stays_within_the_pools():
    on = cluster(4, 3)
    found = list(options(question(), on, kinds(on)))
    assert found
    for option in found:
        assert 16 % (option.m * option.groups) == 0
        assert option.group.step.microbatches * option.m * option.groups == 16
        assert all(count <= on.pools[name].gpus for name, count in option.used().items())


def test_the_best_is_the_fastest_and_no_faster_than_its_bound():
    on = cluster(4, 4)
    found = search(question(), on, kinds(on))
    speeds = [one.tokens_per_second for one in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert all(one.tokens_per_second <= one.option.bound * (1 + 1e-9) for one in found.best)
    best = found.best[0]
    assert {name for name, _ in best.option.attention} == {"new"}  # attention is five times slower on "old"


def test_the_plan_of_the_best_says_what_the_simulator_says():
    on = cluster(4, 4)
    best = search(question(), on, kinds(on)).best[0]
    plan = plan_from_json(best.plan().to_json(), "plan.json")
    costs = costs_of_plan(plan, on, kinds(on))
    members = plan.attention_ranks // plan.groups
    orders = build("zebra", plan.model.layers, costs.placement, members, plan.step.microbatches, plan.wave)
    assert simulate(orders, costs).seconds == pytest.approx(plan.predicted.step_seconds)
    for member in range(costs.group.members):
        held = costs.placement.experts_held(member)
        assert member_memory(costs.group, member, held, plan.wave).total <= usable(costs.group, member)


def test_gpus_that_would_slow_a_step_are_left_out_with_a_reason():
    on = cluster(4, 4)
    crawling = profile(OF, (1.0, 2.0), (0.5, 1.0))
    found = search(question(), on, kinds(on, old=crawling))
    left = left_out(found, on)
    assert {one.pool for one in left} == {"old"} and sum(one.gpus for one in left) == 4
    assert all(one.reason for one in left)


def test_a_role_may_have_several_kinds():
    on = Cluster({name: pool(name, 2, 1) for name in ("new", "old", "older")})
    found = search(question(), on, kinds(on))
    assert any(len(one.option.expert) == 2 for one in found.best)


def test_small_memory_means_smaller_waves():
    roomy, tight = cluster(2, 2), cluster(2, 2, memory=1.672e9)
    waves = [search(question(), on, kinds(on)).best[0].wave for on in (roomy, tight)]
    assert waves[1] < waves[0]


def test_where_nothing_fits_the_nearest_is_named():
    of = shape(layers=40, experts=16)
    on = cluster(2, 2, memory=1.74e9)
    assert not search(question(of), on, kinds(on, of)).best
    text = " ".join(nothing_fits(question(of), on, kinds(on, of)))
    assert "GB" in text and "layers in place of 40" in text and "nodes of" in text
    odd = " ".join(nothing_fits(question(batch=1), cluster(1, 1).only("new"), kinds(cluster(1, 1))))
    assert "global batch" in odd


def test_what_is_left_without_a_node_and_without_the_other_pool():
    on = Cluster({"new": pool("new", 2, 2), "old": pool("old", 2, 1)})
    priced = kinds(on)
    lost = after_losing_a_node(question(), on, priced)
    assert lost["new"].option.used()["new"] <= 2
    assert lost["old"] is None or "old" not in lost["old"].option.used()
    assert {one.pool for one in alone(question(), on, priced)} == {"new", "old"}
    others = baselines(search(question(), on, priced).best[0])
    assert all(value > 0 for value in others.values())


@pytest.mark.parametrize("wave", [None, 7, 20])
def test_long_steps_are_extended_as_they_are(wave):
    priced = group(2, 2, microbatches=40, of=shape(layers=3))
    counts = counts_of(spread(priced, [2, 3]))
    exact = step_seconds(priced, counts, "zebra", wave)
    assert long_step_seconds(priced, counts, wave) == pytest.approx(exact, rel=1e-3)
    assert np.isfinite(exact).all()


def test_the_bound_counts_no_more_than_there_is():
    """Twice as fast GPUs, twice the bound."""
    on = cluster(2, 2, bandwidth=1e12, latency=0)
    slow = next(option for option in options(question(), on, kinds(on)) if option.m == 2)
    fast_profile = profile(OF, (2.5e-3, 5e-3), (0.75e-4, 1.5e-4))
    doubled = kinds_of(on, OF, PRECISION, Notes(), {
        "new": profile(OF, (5e-4, 1e-3), (5e-5, 1e-4)), "old": fast_profile})
    fast = next(option for option in options(question(), on, doubled)
                if (option.attention, option.expert, option.groups) == (slow.attention, slow.expert, slow.groups))
    assert fast.bound == pytest.approx(2 * slow.bound, rel=1e-3)
    assert replace(slow, groups=1).bound > 0


def test_gpus_without_bf16_take_experts_only_and_have_them_in_fp16():
    on, old = cluster(4, 4), profile(OF, (1e-4, 2e-4), (1e-4, 2e-4))
    without = replace(old, taken_for={**old.taken_for, "precision": "fp16"})
    for slow, precision in ((old, "bf16"), (without, "fp16")):
        found = search(question(), on, kinds(on, old=slow))
        attention = {name for one in found.best for name, _ in one.option.attention}
        assert ("old" in attention) == (slow is old)
        assert {one.plan().expert_precision for one in found.best if "old" in one.option.used()} == {precision}
        assert {one.plan().attention_precision for one in found.best} == {"bf16"}


def test_attention_in_bf16_needs_a_pool_that_has_it():
    old = profile(OF)
    without = replace(old, taken_for={**old.taken_for, "precision": "fp16"})
    on = Cluster({"old": pool("old", 4, 1)})
    [said] = nothing_fits(question(), on, kinds(on, old=without))
    assert "no pool has bf16" in said and "--fp16" in said
