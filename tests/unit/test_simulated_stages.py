"""Pipeline stages in the event simulator."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pricing import cluster, group, of_stages, profile, shape

from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.orders import zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.simulator.events import simulate, simulate_stages
from megatron_hetermoe.simulator.summary import CAUSES, STAGE, summarise
from megatron_hetermoe.topology.placement import Placement

FREE = dict(bandwidth=1e18, latency=0.0)


def tasks_end(results):
    return max(end for result in results for member in result.members for _, end in member.times.values())


def test_one_stage_is_the_schedule_by_itself():
    priced = group(2, 2, microbatches=5)
    placement = spread(priced, [2, 3])
    (schedule, costs), = stages = of_stages(priced, (3,), wave=2)
    assert schedule == zebra(3, placement, 2, 5, 2) and costs.group is priced
    assert simulate_stages(stages) == (simulate(schedule, costs),)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("waves", [1, 2, 5, 8])
def test_equal_stages_with_free_handover_are_1f1b(stages, waves):
    """With waves of one microbatch each stage takes F + B for one; 1F1B ends after (waves + stages - 1) (F + B)."""
    of = shape(layers=stages)
    priced = group(1, 1, of, microbatches=waves, on=cluster(1, 1, **FREE), new=profile(of, (1e-3, 2e-3)), old=profile(of))
    parts = of_stages(priced, (1,) * stages, wave=1)
    costs = parts[0][1]
    per_wave = [costs.seconds(member, Task(kind, way, 1, 0)) for way in (Pass.FORWARD, Pass.BACKWARD)
                for kind, member in ((Kind.ATTENTION, 0), (Kind.EXPERT, 1))]
    assert tasks_end(simulate_stages(parts)) == pytest.approx((waves + stages - 1) * sum(per_wave))


@pytest.mark.parametrize("stages, chunks, waves", [(2, 2, 2), (2, 2, 8), (4, 2, 8), (2, 3, 6), (4, 3, 4)])
def test_equal_chunks_with_free_handover_are_interleaved_1f1b(stages, chunks, waves):
    """Each chunk takes F + B for a wave; the first chunks of the other stages are all that a stage waits for."""
    of = shape(layers=stages * chunks)
    priced = group(1, 1, of, microbatches=waves, on=cluster(1, 1, **FREE), new=profile(of, (1e-3, 2e-3)), old=profile(of))
    parts = of_stages(priced, (1,) * stages * chunks, wave=1, virtual=chunks)
    costs = parts[0][1]
    per_wave = [costs.seconds(member, Task(kind, way, 1, 0)) for way in (Pass.FORWARD, Pass.BACKWARD)
                for kind, member in ((Kind.ATTENTION, 0), (Kind.EXPERT, 1))]
    assert tasks_end(simulate_stages(parts)) == pytest.approx((chunks * waves + stages - 1) * sum(per_wave))


@st.composite
def pipelines(draw):
    m, n, experts = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    virtual = draw(st.integers(1, 2))
    split = draw(st.lists(st.integers(1, 2), min_size=2, max_size=4)) * virtual
    layers = sum(split)
    holders = st.lists(st.integers(0, m + n - 1), min_size=experts, max_size=experts).map(tuple)
    placement = Placement(tuple(draw(holders) for _ in range(layers)), m + n)
    bandwidth = draw(st.sampled_from([1e6, 1e9]))
    priced = group(m, n, shape(layers=layers, experts=experts), microbatches=draw(st.integers(1, 5)),
                   on=cluster(m, n, bandwidth=bandwidth))
    return of_stages(priced, split, draw(st.none() | st.integers(1, 3)), placement, virtual)


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_every_task_waits_for_its_dependencies_and_its_neighbours(stages):
    results = simulate_stages(stages)
    assert len({result.seconds for result in results}) == 1
    for stage, ((schedule, costs), result) in enumerate(zip(stages, results)):
        ends = {}
        for member in result.members:
            for task, (_, end) in member.times.items():
                ends[task] = max(end, ends.get(task, 0.0))
        for number, member in enumerate(result.members):
            assert member.times.keys() == {task for order in schedule.member(number).streams.values() for task in order}
            for task, (start, end) in member.times.items():
                for wait in schedule.dependencies(task):
                    if task.kind in (Kind.ATTENTION, Kind.EXPERT, Kind.HANDOVER):
                        if wait in member.times:
                            assert member.times[wait][1] <= start + 1e-12, (task, wait)
                    else:
                        assert ends[wait] <= start + 1e-12, (task, wait)
                if task.kind is Kind.HANDOVER:
                    assert end - start == pytest.approx(costs.group.handover_seconds(number))
                    part, is_end = schedule.place(task)
                    other = (stage + (1 if is_end else -1)) % len(stages)
                    there = [(times, both) for both, times in results[other].members[number].times.items()
                             if (both.kind, both.direction, both.microbatch) == (task.kind, task.direction, task.microbatch)
                             and stages[other][0].place(both) == (part + (1 if is_end else -1), not is_end)]
                    assert [times for times, _ in there] == [(start, end)]
                    assert costs.sent(number, task) > 0 or stages[other][1].sent(number, there[0][1]) > 0
                    assert not (costs.sent(number, task) and stages[other][1].sent(number, there[0][1]))


def test_time_lost_to_other_stages_is_said_so():
    priced = group(1, 2, shape(layers=4), microbatches=4, on=cluster(1, 2, bandwidth=1e6))
    results = simulate_stages(of_stages(priced, (2, 2), wave=2))
    summary = summarise(*results)
    assert summary.bound <= summary.seconds and summary.roles["attention"].bubbles[STAGE] > 0
    for role in summary.roles.values():
        filled = role.busy * summary.seconds + sum(role.bubbles[cause] for cause in CAUSES) + summary.after
        assert filled == pytest.approx(summary.seconds)


def test_only_the_ends_have_embedding_and_head():
    of = replace(shape(layers=4), tied_embeddings=True)
    priced = group(2, 2, of, new=profile(of, head=(5e-3, 1e-2)))
    first, middle, last = priced.of_stages((1, 2, 1))
    matrix = 1000 * of.hidden
    layer = (priced.dense - matrix - of.hidden) / 4
    assert [one.dense for one in (first, middle, last)] == pytest.approx(
        [layer + matrix, 2 * layer, layer + matrix + of.hidden])
    assert middle.attention[0][0][-1] == 0.0 and last.attention[0][0][-1] == pytest.approx(5e-3)
    # The tied embedding is on both, and its gradients are added up.
    assert first.reduction(0, 0) > middle.reduction(0, 0)
    assert first.reduction(2, 4) == middle.reduction(2, 4)


def test_chunks_are_a_stage_in_parts():
    """A stage of two chunks has what two stages have, and the embedding and the head once."""
    of = replace(shape(layers=4, moe_layers=(1, 3, 4)), tied_embeddings=True)
    priced = group(2, 2, of, new=profile(of, head=(5e-3, 1e-2)))
    parts, (first, last) = priced.of_stages((1, 1, 1, 1)), priced.of_stages((1, 1, 1, 1), 2)
    assert first.dense == parts[0].dense + parts[2].dense and last.dense == parts[1].dense + parts[3].dense
    for way in (0, 1):
        assert first.attention[0][way] == (*parts[0].attention[0][way], *parts[2].attention[0][way])
        assert last.attention[0][way] == (*parts[1].attention[0][way], *parts[3].attention[0][way])
    assert (first.shape.layers, first.shape.moe_layers, last.shape.moe_layers) == (2, (1, 2), (2,))
    placement = spread(priced, [2, 3]).of_chunks((range(2, 3), range(4, 5)))
    typical = TaskCosts(last, placement).typical()
    assert typical.expert_forward == pytest.approx(4 * last.expert[2][0] + last.expert_task[2][0]) and typical.handover > 0
