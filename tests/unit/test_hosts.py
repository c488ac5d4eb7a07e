"""What queueing tasks costs hosts: prices, the event simulator, the planner's fast path, plans."""

import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pricing import PRECISION, cluster, group, of_stages, profile, shape

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import SCHEDULES, Plan
from megatron_hetermoe.cost.cluster import cluster_from_document, kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import read_profile
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.asym_ea import long_step_seconds
from megatron_hetermoe.planner.options import Question
from megatron_hetermoe.planner.search import search
from megatron_hetermoe.schedule.orders import build, zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.baselines import expert_parallel_seconds, pipeline, spread
from megatron_hetermoe.simulator.events import simulate, simulate_stages
from megatron_hetermoe.simulator.fast import step_seconds
from megatron_hetermoe.simulator.host import HostCost, advice
from megatron_hetermoe.simulator.recorded import results_of
from megatron_hetermoe.simulator.summary import CAUSES, HOST, STAGE, summarise, summarise_members
from megatron_hetermoe.topology.placement import Placement

HOST_SECONDS = {"attention": (1e-3, 2e-3), "attention_core_recomputed": (1e-3, 3e-3), "expert": (1e-4, 2e-4),
                "expert_task": (3e-3, 4e-3), "head": (5e-3, 6e-3), "embedding": (7e-4, 8e-4)}
CHANNEL = (1e-2, 2e-2)
FREE = {name: (0.0, 0.0) for name in HOST_SECONDS}


def hosted(of=None, scale=1.0, m=2, n=2, microbatches=4, channel=CHANNEL, on=None, **profiled):
    """A ZP group whose hosts take those seconds, times ``scale``."""
    of = of or shape()
    seconds = {name: tuple(scale * one for one in pair) for name, pair in HOST_SECONDS.items()}
    part = profile(of, host=seconds, **profiled)
    on = on or cluster(m, n, channel_host=tuple(scale * one for one in channel))
    return group(m, n, of, microbatches, part, part, on)


def placement_of(counts, members):
    """The placement in which each member holds that many experts; counts is [layer][member]."""
    return Placement(tuple(tuple(member for member, held in enumerate(layer) for _ in range(held)) for layer in counts), members)


# ------------------------------------------------------------------------------------------------------------- files


def test_a_profile_without_hosts_is_read_as_one_that_costs_nothing(tmp_path):
    of = shape()
    for name, host in (("old", None), ("cpu", FREE), ("gpu", HOST_SECONDS)):
        (tmp_path / name).write_text(profile(of, host=host).to_json())
        assert read_profile(tmp_path / name).host == host
    for host in (None, FREE):
        assert not group(of=of, new=profile(of, host=host), old=profile(of, host=host)).has_host
    assert group(of=of, new=profile(of, host=HOST_SECONDS)).has_host
    assert group(of=of, on=cluster(2, 2, channel_host=CHANNEL)).has_host


def test_host_seconds_that_are_none_are_refused_together(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(replace(profile(shape()), host={"attention": [1, -1], "router": [1, 1], "head": [True, 1], "expert": 3}).to_json())
    with pytest.raises(UsageError) as error:
        read_profile(path)
    assert all(f"host has {name}" in str(error.value) for name in ("attention", "router", "head", "expert"))
    path.write_text(replace(profile(shape()), host=[1]).to_json())
    with pytest.raises(UsageError, match="host is no mapping"):
        read_profile(path)


@pytest.mark.parametrize("wrong", [3, [1], [1, "x"], [1, -1], [True, 1], [1, 2, 3]])
def test_a_cluster_lists_what_transfers_take_the_host(wrong):
    link = {"gb_per_s": 10, "latency_us": 10}
    pools = {"new": {"kind": "A40", "nodes": 1, "gpus_per_node": 1, "intra_node": link, "inter_node": link}}
    read = cluster_from_document({"pools": pools, "channel_host": [0, 1e-3]}, "here")
    assert read.pools["new"].channel_host == (0.0, 1e-3)
    with pytest.raises(UsageError, match="channel_host must list"):
        cluster_from_document({"pools": pools, "channel_host": wrong}, "here")


@pytest.mark.parametrize("host, channel, said", [
    (None, (), "(test)"), (FREE, (), None), (HOST_SECONDS, (), "(transfers)"), (HOST_SECONDS, CHANNEL, None)])
def test_what_is_not_counted_is_said(host, channel, said):
    notes, of = Notes(), shape()
    kinds_of(cluster(channel_host=channel), of, PRECISION, notes, {name: profile(of, host=host) for name in ("new", "old")})
    found = [note for note in notes if "host" in note]
    assert len(found) == (said is not None) and all(said in note for note in found)


# ------------------------------------------------------------------------------------------------------------ prices


def test_what_tasks_take_the_host():
    """A task of two sequences is queued as fast as one of one; what is recomputed is queued again; a W task's seconds are in its
    B task's."""
    of = shape(layers=2, moe_layers=(2,))
    priced = hosted(of)
    for micro_batch in (1, 2):
        priced = replace(priced, step=replace(priced.step, micro_batch=micro_batch))
        costs = TaskCosts(priced, placement_of([[0] * 4, [2, 0, 3, 3]], 4))
        seconds = {str(task): costs.host_seconds(0, task) for kind in Kind for way in Pass for layer in (1, 2, 3)
                   if (task := Task(kind, way, layer, 0)).layer != 3 or kind is Kind.ATTENTION}
        assert seconds["AF_1,1"] == pytest.approx(1e-3 + 7e-4) and seconds["AB_1,1"] == pytest.approx(2e-3 + 8e-4)
        assert seconds["AF_2,1"] == pytest.approx(1e-3 + 1e-4 + 3e-3)  # the dense part as an E task of one expert
        assert seconds["AB_3,1"] == pytest.approx(6e-3)
        assert seconds["EF_2,1"] == pytest.approx(3e-3 + 2 * 1e-4) and seconds["EF_1,1"] == 0
        assert [seconds[name] for name in ("DF_2,1", "DB_2,1", "CF_2,1", "CB_2,1")] == [2e-2, 2e-2, 1e-2, 1e-2]
        assert seconds["EW_2,1"] == seconds["AW_1,1"] == 0
    assert costs.host_seconds(1, Task(Kind.EXPERT, Pass.FORWARD, 2, 0)) == 0
    again = {how: replace(priced, step=replace(priced.step, recompute=how)) for how in ("core_attn", "full")}
    assert again["core_attn"].host_attention[0][1][0] == pytest.approx(3e-3 + 8e-4)
    assert again["full"].host_attention[0][1][0] == pytest.approx(2e-3 + 1e-3 + 8e-4)
    assert again["full"].host_expert(0, 1, 2) == pytest.approx(4e-3 + 2 * 2e-4 + 3e-3 + 2 * 1e-4)
    every = TaskCosts(priced, placement_of([[0] * 4, [2, 0, 3, 3]], 4))
    assert every.host_transfers(0) == every.host_transfers(2) == pytest.approx(6e-2)
    assert every.host_computes(2) == pytest.approx(3e-3 + 4e-3 + 3 * (1e-4 + 2e-4))


# --------------------------------------------------------------------------------------------------- event simulator


def test_one_rank_each_by_hand():
    """One layer and microbatch, GPUs and links that take no time: a host queues what the other one needs, and then it goes on."""
    of = shape(layers=1, experts=4)
    part = profile(of, (1e-9, 1e-9), (1e-9, 1e-9), host={"attention": (1.0, 2.0), "head": (4.0, 8.0), "expert_task": (16.0, 32.0)})
    priced = group(1, 1, of, 1, part, part, cluster(1, 1, bandwidth=1e18, latency=0.0, channel_host=(64.0, 128.0)))
    result = simulate(zebra(1, spread(priced, [1]), 1, 1, None), TaskCosts(priced, spread(priced, [1])))
    ends = {str(task): round(end) for member in result.members for task, (_, end) in member.times.items()}
    # The holder's host knows sizes at 1; it queues D, E, C, and then what goes backward, all before any of it runs.
    assert ends["DF_1,1"] == 1 + 128 and ends["EF_1,1"] == 129 + 16 and ends["CF_1,1"] == 145 + 64
    assert ends["CB_1,1"] == 209 + 64 and ends["EB_1,1"] == 273 + 32 and ends["DB_1,1"] == ends["AB_1,1"] == 305 + 128
    owner = result.members[0].queued
    assert [round(owner[task][1]) for task in sorted(owner, key=lambda task: owner[task])] == [
        1, 129, 193, 197, 205, 269, 397, 399]


@st.composite
def cases(draw):
    """Costs with hosts, a placement, and how it is scheduled."""
    m, n, layers, experts = (draw(st.integers(1, most)) for most in (3, 3, 3, 6))
    moe = tuple(sorted(draw(st.sets(st.integers(1, layers), min_size=1))))
    holders = st.lists(st.integers(draw(st.sampled_from([0, m])), m + n - 1), min_size=experts, max_size=experts)
    placement = Placement(tuple(tuple(draw(holders)) if layer in moe else () for layer in range(1, layers + 1)), m + n)
    of, seconds = shape(layers=layers, experts=experts, moe_layers=moe), st.floats(1e-4, 5e-3)
    host = {name: (draw(seconds), draw(seconds)) for name in HOST_SECONDS}
    part = profile(of, (draw(seconds), draw(seconds)), (draw(seconds) / 10, draw(seconds) / 10), host=host)
    on = cluster(m, n, bandwidth=draw(st.sampled_from([1e8, 1e10])), channel_host=tuple(draw(seconds) for _ in range(2)))
    microbatches = draw(st.integers(1, 5))
    return (group(m, n, of, microbatches, part, part, on), placement, draw(st.sampled_from(SCHEDULES)),
            draw(st.none() | st.integers(1, microbatches)), draw(st.sampled_from(["together", "delayed", "merged"])))


def orders_of(case):
    priced, placement, name, wave, weights = case
    return build(name, priced.shape.layers, placement, priced.attention_members, priced.step.microbatches, wave,
                 weight_gradients=weights)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_hosts_that_cost_nothing_change_nothing(case):
    """With 0 for all that is measured a step is, bit by bit, what it is where nothing was."""
    priced, placement, name, wave, weights = case
    parts = {seat.pool.name: seat for seat in priced.seats}
    costless = {}
    for kind, host in (("unknown", None), ("zero", FREE)):
        part = replace(parts["new"].kind._profile, host=host)
        on = cluster(priced.attention_members, priced.members - priced.attention_members,
                     bandwidth=parts["new"].pool.intra.bandwidth, channel_host=(0.0,) * 2 if host else ())
        costless[kind] = group(priced.attention_members, priced.members - priced.attention_members, priced.shape,
                               priced.step.microbatches, part, part, on)
    unknown, zero = (simulate(orders_of(case), TaskCosts(of, placement, weights)) for of in costless.values())
    assert zero.seconds == unknown.seconds and zero.members == unknown.members
    counts = np.array([[[layer.count(member) for member in range(priced.members)] for layer in placement.holders]], float)
    assert (step_seconds(costless["zero"], counts, name, wave) == step_seconds(costless["unknown"], counts, name, wave)).all()
    if not any(map(placement.layers_of, range(priced.attention_members))):
        # Elsewhere a transfer that a host holds back may leave a link to one that matters more.
        assert simulate(orders_of(case), TaskCosts(priced, placement, weights)).seconds >= zero.seconds * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_hosts_queue_as_the_executor_does(case):
    """One task at a time, in each stream's order, behind what must be queued; a dispatch when its sizes are known; and nothing
    runs before it is queued."""
    priced, placement, _, _, weights = case
    schedule = orders_of(case)
    costs = TaskCosts(priced, placement, weights)
    result = simulate(schedule, costs)
    computed = {}
    for member in result.members:
        for task, (_, end) in member.times.items():
            computed[task] = max(end, computed.get(task, 0.0))
    for number, member in enumerate(result.members):
        orders = schedule.member(number)
        assert member.queued.keys() == member.times.keys()
        times = sorted(member.queued.values())
        assert all(one[1] <= other[0] + 1e-12 for one, other in zip(times, times[1:]))
        assert sum(end - start for start, end in times) == pytest.approx(sum(costs.host_seconds(number, task) for task in member.times))
        for order in orders.streams.values():
            assert sorted(order, key=lambda task: member.queued[task]) == list(order)
        for task, (start, end) in member.queued.items():
            assert end <= member.times[task][0] + 1e-12
            for before in (*orders.waits[task], *orders.issued_before.get(task, ())):
                assert member.queued[before][1] <= start + 1e-12
            if task.kind is Kind.DISPATCH and task.direction is Pass.FORWARD:
                assert computed[replace(task, kind=Kind.ATTENTION)] <= start + 1e-12


def test_larger_microbatches_help_where_the_host_binds():
    """As many sequences in half as many microbatches take GPUs as long, and hosts half as long."""
    single = hosted(microbatches=8)
    double = replace(single, step=replace(single.step, micro_batch=2, microbatches=4))
    placement = spread(single, [2, 3])
    seconds = [simulate(zebra(3, placement, 2, of.step.microbatches, None), TaskCosts(of, placement)).seconds
               for of in (single, double)]
    assert seconds[1] < 0.6 * seconds[0]


def test_stages_of_a_pipeline_have_hosts():
    of = shape(layers=4)
    free, bound = (hosted(of, scale) for scale in (0.0, 1.0))
    results = [simulate_stages(of_stages(priced, (2, 2), 2)) for priced in (free, hosted(of, 1e-6), bound)]
    unbound, hardly, _ = (summarise(*of_all).roles["attention"].bubbles for of_all in results)
    assert hardly[STAGE] == pytest.approx(unbound[STAGE], rel=0.02), "what waits for another stage waits for no host"
    seconds = [results[0][0].seconds, results[-1][0].seconds]
    (_, costs), _ = of_stages(bound, (2, 2), 2)
    busy = 4 * (costs.host_computes(0) + costs.host_transfers(0) + 2 * CHANNEL[0])
    assert seconds[1] > max(busy, seconds[0])


# ---------------------------------------------------------------------------------------------------------- summaries


def test_bubbles_of_a_step_that_hosts_bind():
    priced = hosted()
    placement = spread(priced, [2, 3])
    schedule = zebra(3, placement, 2, 4, 2)
    result = simulate(schedule, TaskCosts(priced, placement))
    summary = summarise(result)
    for role in summary.roles.values():
        assert all(seconds >= -1e-12 for seconds in role.bubbles.values())
        assert role.busy * summary.seconds + sum(role.bubbles.values()) + summary.after == pytest.approx(summary.seconds)
        assert max(CAUSES, key=role.bubbles.__getitem__) == HOST
    free = summarise(simulate(schedule, TaskCosts(priced, placement).without_hosts))
    assert all(role.bubbles[HOST] == 0 for role in free.roles.values())


def test_a_trace_of_it_has_its_bubbles():
    priced = hosted()
    placement = spread(priced, [1, 2, 3])
    costs = TaskCosts(priced, placement)
    result = simulate(zebra(3, placement, 2, 4, 2), costs)
    spans = result.spans(lambda member: member, costs)
    assert all((span.queued is not None) == (span.stream == Stream.COMPUTE.value) for span in spans)
    plan = Plan(shape(), 2, 2, 1, placement.holders, "zebra", 2, PRECISION, PRECISION)
    (read,) = results_of(spans, plan)
    for found, expected in zip(summarise_members(read), summarise_members(result)):
        assert found.bubbles == pytest.approx(expected.bubbles, abs=1e-9)


def test_who_waits_for_hosts_learns_what_to_do():
    ahead, behind = (HostCost(10, 1e-3, 1e-3, lead, late) for lead, late in ((1e-2, 0.0), (0.0, 0.5)))
    assert advice([ahead], 0.0) is None
    for hint in (advice([ahead, behind], 0.0), advice([], 0.2)):
        assert "--micro-batch-size" in hint and "--hetermoe-cuda-graphs" in hint and "sequences" in hint


# ------------------------------------------------------------------------------------------------------------ planner


def a_random_case(rng):
    """Costs with hosts, experts of a placement [K, members], and how it is scheduled. Where attention ranks hold some, links are
    free: what channels take from each other there is another difference."""
    m, n, layers, experts, microbatches = (rng.randint(1, most) for most in (3, 3, 5, 9, 8))
    moe = tuple(sorted(rng.sample(range(1, layers + 1), rng.randint(1, layers))))
    of, scale, on_attention = shape(layers=layers, experts=experts, moe_layers=moe), rng.choice([1e-4, 1e-3, 4e-3]), rng.random() < 0.6
    counts = np.zeros((layers, m + n))
    for layer in moe:
        first = 0 if on_attention and rng.random() < 0.7 else m
        for _ in range(experts):
            counts[layer - 1, rng.randint(first, m + n - 1)] += 1

    def pair(most):
        return rng.uniform(0.1, 1) * most, rng.uniform(0.1, 1) * most

    host = {name: pair(scale * share) for name, share in (
        ("attention", 1.5), ("expert", 0.1), ("expert_task", 1.5), ("head", 1.0), ("embedding", 0.3))}
    part = profile(of, pair(5e-3), pair(1e-3), host=host)
    on = cluster(m, n, bandwidth=1e18 if on_attention else 10 ** rng.uniform(7, 10),
                 channel_host=tuple(rng.uniform(0.2, 1.5) * scale for _ in range(2)))
    return group(m, n, of, microbatches, part, part, on), counts, rng.choice(SCHEDULES), rng.choice([None, rng.randint(1, microbatches)])


def test_the_fast_path_is_near_the_event_simulator():
    """Its hosts queue in one order, the simulator's what they can first. Free hosts are equal (test_simulator.py)."""
    rng, errors = random.Random(7), []
    for _ in range(80):
        priced, counts, name, wave = a_random_case(rng)
        placement = placement_of(counts.astype(int).tolist(), priced.members)
        expected = simulate(orders_of((priced, placement, name, wave, "together")), TaskCosts(priced, placement)).seconds
        # Beside a candidate of the other sort, which has an order of its own.
        other = np.zeros_like(counts)
        other[:, 0 if counts[:, priced.attention_members:].sum() == counts.sum() else -1] = counts.sum(axis=1)
        fast = step_seconds(priced, np.array([counts, other]), name, wave)[0]
        errors.append(abs(fast / expected - 1))
    assert statistics.mean(errors) < 0.005 and max(errors) < 0.08, (statistics.mean(errors), max(errors))


def test_long_steps_count_hosts_too():
    """Further microbatches take as long as the last ones, for hosts as for GPUs."""
    priced = hosted(microbatches=24)
    counts = np.array([[[0, 0, 4, 4]] * 3], float)
    placement = placement_of(counts[0].astype(int).tolist(), 4)
    expected = simulate(zebra(3, placement, 2, 24, None), TaskCosts(priced, placement)).seconds
    assert long_step_seconds(priced, counts, None)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
def test_the_best_plan_is_no_faster_than_its_bound_or_its_hosts(scale):
    of = shape(layers=2, experts=4)
    on = cluster(4, 4, channel_host=tuple(scale * one for one in CHANNEL))
    host = {name: tuple(scale * one for one in pair) for name, pair in HOST_SECONDS.items()}
    kinds = kinds_of(on, of, PRECISION, Notes(), {name: profile(of, host=host) for name in on.pools})
    found = search(Question(of, PRECISION, 1, 16, 1000, ("none",), (True,)), on, kinds)
    assert all(one.tokens_per_second <= one.option.bound * (1 + 1e-9) for one in found.best)
    shares = [found.best[0].queueing(role) for role in ("attention", "expert")]
    assert max(shares) <= 1 + 1e-9 and (max(shares) > 0.8 if scale == 1 else True) and (max(shares) > 0) == (scale > 0)


def test_ways_to_compare_with_are_no_faster_than_their_hosts():
    """Where queueing takes long, expert parallelism takes what its A and E tasks take hosts; its transfers are not ours."""
    free, slow = hosted(scale=0.0), hosted(scale=10.0)
    costs = TaskCosts(replace(slow, attention_members=4), spread(slow, range(4)))
    floor = slow.step.microbatches * costs.host_computes(0) * 2 / 4  # over all four ranks, in place of two
    assert expert_parallel_seconds(slow) == pytest.approx(floor, rel=0.05)
    assert expert_parallel_seconds(free) == expert_parallel_seconds(replace(slow, hosts_count=False))
    assert pipeline(slow).seconds > pipeline(free).seconds
