"""The event simulator, and the planner's fast path against it."""

import numpy as np
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pricing import cluster, group, pool, profile, shape

from megatron_hetermoe.config.plan import SCHEDULES
from megatron_hetermoe.cost.cluster import Cluster, Link
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.orders import build, sequential, zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.simulator.baselines import (
    expert_parallel_seconds, ideal_seconds, pipeline, spread, zebra_seconds,
)
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_seconds
from megatron_hetermoe.simulator.summary import CAUSES, summarise
from megatron_hetermoe.topology.placement import Placement


def placement_of(counts, members):
    """The placement in which each member holds that many experts, in blocks; counts is [layer][member]."""
    return Placement(tuple(tuple(member for member, held in enumerate(layer) for _ in range(held))
                           for layer in counts), members)


def test_one_rank_each_by_hand():
    """One microbatch has no overlap: the step is the sum of its tasks."""
    priced = group(1, 1, microbatches=1)
    placement = spread(priced, [1])
    costs = TaskCosts(priced, placement)
    schedule = zebra(3, placement, 1, 1, None)
    tasks = {task for member in (0, 1) for order in schedule.member(member).streams.values() for task in order}
    expected = sum(
        costs.seconds(0 if task.kind is Kind.ATTENTION else 1, task) if task.stream is Stream.COMPUTE
        else costs.transfer(task).latency + costs.transfer(task).seconds
        for task in tasks
    )
    assert simulate(schedule, costs).seconds == pytest.approx(expected)


def test_zebra_hides_the_other_pool_and_sequential_does_not():
    priced = group(2, 2, microbatches=8)
    placement = spread(priced, [2, 3])
    assert zebra_seconds(priced, placement) < 0.75 * zebra_seconds(priced, placement, "sequential")


def test_bubbles_and_work_fill_the_step():
    priced = group(2, 2, microbatches=4)
    placement = spread(priced, [2, 3])
    result = simulate(zebra(3, placement, 2, 4, 2), TaskCosts(priced, placement))
    summary = summarise(result)
    for role in summary.roles.values():
        assert set(role.bubbles) == set(CAUSES)
        assert all(seconds >= -1e-12 for seconds in role.bubbles.values())
        filled = role.busy * summary.seconds + sum(role.bubbles.values()) + summary.after
        assert filled == pytest.approx(summary.seconds)
    assert summary.bound <= summary.seconds


def test_every_task_waits_for_its_dependencies():
    priced = group(2, 3, microbatches=3, of=shape(experts=7))
    placement = spread(priced, [0, 2, 3, 4])
    schedule = zebra(3, placement, 2, 3, None)
    result = simulate(schedule, TaskCosts(priced, placement))
    ends = {}
    for member in result.members:
        for task, (_, end) in member.times.items():
            ends[task] = max(end, ends.get(task, 0))
    for member in result.members:
        for task, (start, _) in member.times.items():
            own = member.times if task.stream is Stream.COMPUTE else {}
            mine = {wait: own[wait][1] if wait in own else ends[wait]
                    for wait in schedule.dependencies(task)}
            assert all(end <= start + 1e-12 for end in mine.values()), (task, mine)


def test_opposite_transfers_share_the_links_of_a_holder_with_attention():
    """With experts on attention ranks only, both channels fill the same links, and each slows down."""
    slow = group(2, 2, microbatches=4, on=cluster(2, 2, bandwidth=2e6))
    placement = spread(slow, [0, 1])
    counts = np.array([[[layer.count(member) for member in range(4)] for layer in placement.holders]], float)
    assert zebra_seconds(slow, placement) > step_seconds(slow, counts)[0] * 1.001


def test_spans_have_every_task_of_every_rank():
    priced = group(2, 1, microbatches=2)
    placement = spread(priced, [2])
    schedule = sequential(3, placement, 2, 2)
    spans = simulate(schedule, TaskCosts(priced, placement)).spans(lambda member: 10 + member, TaskCosts(priced, placement))
    for member in range(3):
        tasks = {str(task) for order in schedule.member(member).streams.values() for task in order}
        assert {span.task for span in spans if span.rank == 10 + member} - {"reduce", "optimizer"} == tasks


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    moe = tuple(sorted(draw(st.sets(st.integers(1, layers), min_size=1))))
    experts = draw(st.integers(1, 9))
    with_attention = draw(st.booleans())
    first = 0 if with_attention else m
    counts = []
    for _ in range(draw(st.integers(1, 3))):
        candidate = []
        for layer in range(1, layers + 1):
            held = [0] * (m + n)
            for _ in range(experts if layer in moe else 0):
                held[draw(st.integers(first, m + n - 1))] += 1
            candidate.append(held)
        counts.append(candidate)
    seconds = st.floats(1e-4, 1e-2)
    of = shape(layers=layers, experts=experts, moe_layers=moe)
    profiles = [profile(of, (draw(seconds), draw(seconds)), (draw(seconds), draw(seconds)), head=(1e-4, 2e-4),
                        optimizer=1e-9, expert_task=draw(st.sampled_from([None, (2e-4, 5e-4)]))) for _ in range(2)]
    microbatches = draw(st.integers(1, 5))
    wave = draw(st.one_of(st.none(), st.integers(1, microbatches)))
    # Without attention ranks as holders nothing shares a link; with them only a fast network makes sharing nothing.
    bandwidth = 1e18 if with_attention else draw(st.floats(1e7, 1e10))
    on = cluster(m, n, bandwidth=bandwidth)
    schedule = draw(st.sampled_from(SCHEDULES))
    return group(m, n, of, microbatches, *profiles, on, groups=draw(st.integers(1, 2))), counts, schedule, wave


def test_a_task_of_few_experts_takes_longer_for_each():
    of = shape(layers=1, experts=8)
    with_part = group(1, 1, of, old=profile(of, expert_task=(1e-3, 3e-3)), new=profile(of))
    costs = TaskCosts(with_part, placement_of([[1, 7]], 2))
    plain = TaskCosts(group(1, 1, of), placement_of([[1, 7]], 2))
    for way, part in ((Pass.FORWARD, 1e-3), (Pass.BACKWARD, 3e-3)):
        task = Task(Kind.EXPERT, way, 1, 0)
        assert costs.seconds(1, task) == pytest.approx(plain.seconds(1, task) + part)
        assert costs.seconds(0, task) == plain.seconds(0, task)
    assert TaskCosts(with_part, placement_of([[8, 0]], 2)).seconds(1, Task(Kind.EXPERT, Pass.FORWARD, 1, 0)) == 0


@settings(max_examples=60, deadline=None)
@given(cases())
def test_fast_path_is_the_event_simulator(case):
    priced, counts, schedule, wave = case
    fast = step_seconds(priced, np.array(counts, float), schedule, wave)
    for index, candidate in enumerate(counts):
        placement = placement_of(candidate, priced.members)
        orders = build(schedule, priced.shape.layers, placement, priced.attention_members,
                       priced.step.microbatches, wave)
        assert fast[index] == pytest.approx(simulate(orders, TaskCosts(priced, placement)).seconds, rel=1e-9)


def test_a_holder_reduces_its_gradients_after_its_last_transfer():
    """With a slow network and costly reduction the expert rank is the last one, and what it sends last counts."""
    of = shape(layers=2, experts=4, moe_layers=(1, 2))
    slow = group(1, 1, of, 1, on=cluster(1, 1, bandwidth=1e7), groups=2)
    counts = [[0, 4], [0, 4]]
    placement = placement_of(counts, 2)
    result = simulate(zebra(2, placement, 1, 1, None), TaskCosts(slow, placement))
    holder = result.members[1]
    assert holder.reduced[0] == max(end for task, (_, end) in holder.times.items() if task.stream is not Stream.COMPUTE)
    assert step_seconds(slow, np.array([counts], float))[0] == pytest.approx(result.seconds)


def test_baselines_of_equal_pools():
    """Two pools of one kind: the ideal sum is expert parallelism over half the ranks, twice."""
    priced = group(2, 2, microbatches=4)
    assert ideal_seconds(priced) <= expert_parallel_seconds(priced) * 1.01
    found = pipeline(priced)
    assert sum(found.layers) == 3 and len(found.layers) == sum(found.stages)


def test_expert_parallelism_waits_for_the_slowest():
    of = shape()
    slow = profile(of, attention=(1e-2, 2e-2))
    assert expert_parallel_seconds(group(2, 2, of, old=slow)) > 3 * expert_parallel_seconds(group(2, 2, of))


@pytest.mark.parametrize("further", [0, 1])
def test_a_pipeline_is_no_faster_than_the_ideal_sum_where_links_are_free(further):
    """Both have the same ranks at the same work: reduction and optimizer, heads and embeddings of further tokens too."""
    of = replace(shape(layers=6 + further), mtp_layers=further)
    part = profile(of, head=(4e-3, 8e-3))
    priced = group(4, 4, of, microbatches=16, new=part, old=part, on=cluster(4, 4, bandwidth=1e15, latency=0.0))
    assert ideal_seconds(priced) < pipeline(priced).seconds < 1.5 * ideal_seconds(priced)


def test_a_stage_on_two_nodes_waits_for_the_link_between_them():
    of = shape(layers=4)
    seconds = [
        pipeline(group(4, 4, of, on=Cluster({
            name: replace(pool(name, 4 // nodes, nodes), inter=Link(1e7, 1e-5)) for name in ("new", "old")}))).seconds
        for nodes in (1, 4)
    ]
    assert seconds[0] < seconds[1]


def test_a_pipeline_gives_the_faster_pool_more_layers():
    of = shape(layers=8)
    slow = profile(of, attention=(3e-3, 6e-3), expert=(3e-4, 6e-4))
    found = pipeline(group(2, 2, of, old=slow))
    assert sum(found.layers[:found.stages[0]]) > sum(found.layers[found.stages[0]:])


@pytest.mark.parametrize("expert, microbatches, gain", [(2e-4, 1, 0.15), (2e-4, 4, 0.004), (5e-4, 3, 0.02)])
def test_weight_tasks_shorten_the_step(expert, microbatches, gain):
    """Most with one microbatch, where each rank waits for the other one's gradients of activations."""
    of = shape(layers=8)
    part = profile(of, (1e-3, 2e-3), (expert, 2 * expert))
    priced = group(2, 2, of, microbatches=microbatches, new=part, old=part, on=cluster(2, 2, bandwidth=2e8))
    placement = spread(priced, [2, 3])
    seconds = [
        simulate(zebra(8, placement, 2, microbatches, None, weight_gradients=how), TaskCosts(priced, placement, how)).seconds
        for how in ("together", "delayed")
    ]
    assert seconds[1] < seconds[0] * (1 - gain)


def test_weight_tasks_change_no_work():
    """B and W tasks together take what B tasks took, on every member."""
    priced = group(2, 2, of=shape(layers=2))
    placement = Placement(((0, 2, 2, 2, 2, 3, 3, 3), (2, 2, 2, 2, 3, 3, 3, 3)), 4)

    def busy(how: str) -> list[float]:
        schedule, costs = zebra(2, placement, 2, 3, None, weight_gradients=how), TaskCosts(priced, placement, how)
        return [sum(costs.seconds(member, task, schedule.microbatches_of(task)) for task in schedule.member(member).streams[Stream.COMPUTE])
                for member in range(4)]

    assert busy("delayed") == pytest.approx(busy("together"))
    weights = TaskCosts(priced, placement, "delayed").seconds(2, Task(Kind.EXPERT, Pass.WEIGHT, 1, 0))
    assert weights == pytest.approx(4 * priced.expert[2][1] / 2)


def test_one_weight_task_for_a_wave_reads_and_adds_once():
    """An expert whose backward takes 1 s of itself and 1 s for 64 tokens: four microbatches have the half of 4 s of weights'
    products, and 3 s of what is there once; attention has no W tasks."""
    of = shape(layers=2)
    fixed = replace(profile(of), parts={**profile(of).parts, "expert": {
        tokens: (1.0, 1 + tokens / 64) for tokens in (1.0, 64.0, 128.0, 256.0, 1024.0)}})
    priced = group(2, 2, of, new=fixed, old=fixed)
    placement = spread(priced, [2, 3])
    schedule, costs = zebra(2, placement, 2, 4, None, weight_gradients="merged"), TaskCosts(priced, placement, "merged")
    together = TaskCosts(priced, placement)
    backward, weights = Task(Kind.EXPERT, Pass.BACKWARD, 1, 0), Task(Kind.EXPERT, Pass.WEIGHT, 1, 3)
    assert schedule.microbatches_of(weights) == 4 and weights in schedule.member(2).waits
    assert priced.expert_tokens == 64
    assert together.seconds(2, backward) == pytest.approx(4 * 2.0)
    assert costs.seconds(2, backward) == pytest.approx(4 * 1.0)
    assert costs.seconds(2, weights, 4) == pytest.approx(4 * (1 + 4) / 2)
    attention = Task(Kind.ATTENTION, Pass.BACKWARD, 1, 0)
    assert costs.seconds(0, attention) == together.seconds(0, attention)
    assert simulate(schedule, costs).seconds < simulate(zebra(2, placement, 2, 4, None), together).seconds


@pytest.mark.parametrize("expert, bandwidth, wave, how, gain", [
    (2e-4, 1e10, 1, "together", 0.28), (3.5e-4, 1e10, 1, "together", 0.28), (2e-4, 1e8, 1, "together", 0.30),
    (2e-4, 1e10, 2, "together", 0.04), (3.5e-4, 1e10, 2, "together", 0.04), (2e-4, 8e7, 2, "together", 0.10),
    (3.5e-4, 1e8, 4, "together", 0.01), (2e-4, 1e10, 1, "delayed", 0.24), (3.5e-4, 1e10, 1, "delayed", 0.18),
    (2e-4, 1e8, 1, "delayed", 0.35), (3.5e-4, 1e10, 2, "delayed", 0.01), (2e-4, 8e7, 2, "delayed", 0.07),
])
def test_overlapped_waves_shorten_the_step(expert, bandwidth, wave, how, gain):
    """Most where waves are small: their ramps are most of them, and one microbatch alone has no overlap at all."""
    of = shape(layers=6)
    part = profile(of, (1e-3, 2e-3), (expert, 2 * expert))
    priced = group(2, 2, of, microbatches=8, new=part, old=part, on=cluster(2, 2, bandwidth=bandwidth))
    placement = spread(priced, [2, 3])
    apart, over = (
        simulate(build(name, 6, placement, 2, 8, wave, weight_gradients=how), TaskCosts(priced, placement, how)).seconds
        for name in ("zebra", "overlapped")
    )
    assert over < apart * (1 - gain), over / apart


def test_overlapped_waves_with_experts_on_attention_ranks():
    of = shape(layers=6)
    part = profile(of, (1e-3, 2e-3), (4e-4, 8e-4))
    priced = group(2, 2, of, microbatches=8, new=part, old=part, on=cluster(2, 2, bandwidth=1e9))
    placement = spread(priced, [0, 2, 2, 2, 1, 3, 3, 3])
    seconds = {name: simulate(build(name, 6, placement, 2, 8, 1), TaskCosts(priced, placement)).seconds
               for name in ("zebra", "overlapped")}
    assert seconds["overlapped"] < 0.8 * seconds["zebra"]


def test_bubbles_of_overlapped_waves_are_counted_once():
    priced = group(2, 2, microbatches=6)
    placement = spread(priced, [2, 3])
    apart, over = (summarise(simulate(build(name, 3, placement, 2, 6, 1), TaskCosts(priced, placement)))
                   for name in ("zebra", "overlapped"))
    for role, summary in over.roles.items():
        filled = summary.busy * over.seconds + sum(summary.bubbles.values()) + over.after
        assert filled == pytest.approx(over.seconds)
        assert summary.bubbles["ramp"] <= apart.roles[role].bubbles["ramp"] + 1e-12
