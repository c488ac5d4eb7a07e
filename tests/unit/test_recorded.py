"""A recorded step is described as a simulated one is."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest
from pricing import PRECISION, cluster, group, profile, shape

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.step import Step
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.cost.profile import Profiled
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.schedule.orders import zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.schedule.trace import Span
from megatron_hetermoe.simulator.baselines import spread
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.host import HostCost, host_costs
from megatron_hetermoe.simulator.planned import predict
from megatron_hetermoe.simulator.recorded import from_start, results_of
from megatron_hetermoe.simulator.summary import CHANNEL, OTHER_POOL, summarise, summarise_members


@pytest.fixture(scope="module")
def simulated():
    """A step of 2 attention and 2 expert ranks, one of the former a holder, with its plan."""
    priced = group(2, 2, microbatches=4)
    placement = spread(priced, [1, 2, 3])
    costs = TaskCosts(priced, placement)
    result = simulate(zebra(3, placement, 2, 4, 2), costs)
    plan = Plan(shape(), 2, 2, 1, placement.holders, "zebra", 2, PRECISION, PRECISION)
    return result, costs, plan


def test_a_trace_of_a_simulated_step_has_its_summary(simulated):
    result, costs, plan = simulated
    spans = [replace(span, start=span.start + 7, end=span.end + 7) for span in result.spans(lambda member: member, costs)]
    (read,) = results_of(from_start(spans), plan)
    expected, found = summarise(result), summarise(read)
    assert found.seconds == pytest.approx(expected.seconds) and found.bound == pytest.approx(expected.bound)
    for role, summary in expected.roles.items():
        assert found.roles[role].busy == pytest.approx(summary.busy)
        assert found.roles[role].bubbles == pytest.approx(summary.bubbles, abs=1e-9)


def test_waiting_for_a_slow_peer_is_not_the_channels_fault(simulated):
    """Every rank is at each transfer from the step's start on; but the time until the last one comes is the pool's."""
    result, costs, plan = simulated
    early = [
        replace(span, start=0.0) if span.stream in ("out", "back") and span.rank in (2, 3) else span
        for span in result.spans(lambda member: member, costs)
    ]
    (read,) = results_of(early, plan)
    for found, expected in zip(summarise_members(read), summarise_members(result)):
        assert found.bubbles[CHANNEL] == pytest.approx(expected.bubbles[CHANNEL], abs=1e-9)
        assert found.bubbles[OTHER_POOL] == pytest.approx(expected.bubbles[OTHER_POOL], abs=1e-9)


def test_zp_groups_are_described_one_by_one(simulated):
    result, costs, plan = simulated
    both = replace(plan, attention_ranks=4, expert_ranks=4, groups=2)
    spans = [
        replace(span, rank=rank, start=span.start * slow, end=span.end * slow)
        for slow, ranks in ((1, (0, 1, 4, 5)), (2, (2, 3, 6, 7)))
        for member, rank in enumerate(ranks)
        for span in result.spans(lambda member: member, costs) if span.rank == member
    ]
    first, second = results_of(spans, both)
    assert first.seconds == second.seconds == pytest.approx(2 * result.seconds)
    for one, other in zip(summarise_members(first), summarise_members(second)):
        assert other.work == pytest.approx(2 * one.work)


def test_a_pipelines_trace_has_its_summary():
    """Also where the ranks of a stage wait for the other one in a transfer between them: the time until both are there is not
    the link's."""
    plan = Plan(shape(layers=4), 4, 4, 1, spread(group(2, 2, shape(layers=4)), [2, 3]).holders, "zebra", 2, PRECISION, PRECISION,
                stage_layers=(2, 2), pools=("new", "new", "old", "old"), step=Step(1, 4, 1000))
    kinds = {name: Profiled(profile(plan.model), plan.model, PRECISION, Notes()) for name in ("new", "old")}
    predicted = predict(plan, cluster(), "plan.json", Notes(), kinds)
    names = {span.task for span in predicted.spans}
    assert {"AF_1,1", "AF_5,1", "HF_3,1", "DB_4,4"} <= names and "HF_1,1" not in names
    waiting = [replace(span, start=0.0) if span.stream == "stages" and span.task[1] == "F" and span.rank in (2, 3) else span
               for span in predicted.spans]
    expected, found = summarise(*predicted.results), summarise(*results_of(waiting, plan))
    assert found.seconds == pytest.approx(expected.seconds)
    for name, summary in expected.by_name.items():
        assert found.by_name[name].busy == pytest.approx(summary.busy)
        assert found.by_name[name].bubbles == pytest.approx(summary.bubbles, abs=1e-9)
    assert list(found.by_name) == [f"{role}{stage}" for role in ("attention", "expert") for stage in ("", ", stage 1", ", stage 2")]


def test_a_trace_of_another_run_is_refused(simulated):
    result, costs, plan = simulated
    spans = result.spans(lambda member: member, costs)
    with pytest.raises(UsageError, match="what rank 0 recorded is not what plan.json has for 4 microbatches"):
        results_of(spans[1:], plan)


def test_what_transfers_move_by_hand(simulated):
    """128 tokens of each attention rank go to 2 of 8 experts, 64 wide in bf16: each once to a holder of one of these, with a
    probability and an index for each expert, which 32 tokens go to."""
    _, costs, _ = simulated
    dispatch, combine = Task(Kind.DISPATCH, Pass.FORWARD, 1, 0), Task(Kind.COMBINE, Pass.FORWARD, 1, 0)
    held = costs.experts(1)

    def sent(experts: int, each: int) -> float:
        return 128 * (1 - comb(8 - experts, 2) / comb(8, 2)) * 64 * 2 + 32 * experts * each

    back = Task(Kind.DISPATCH, Pass.BACKWARD, 1, 0)
    assert sum(held) == 8 and held[0] == 0 and held[1] > 0
    assert costs.sent(0, dispatch) == round(sum(sent(experts, 8) for experts in held))
    assert costs.sent(1, dispatch) == round(sent(held[2], 8) + sent(held[3], 8)), "what it keeps is not sent"
    assert costs.sent(2, dispatch) == 0
    assert costs.sent(2, combine) == round(2 * sent(held[2], 0)) and costs.sent(1, combine) == round(sent(held[1], 0))
    assert costs.sent(2, back) == round(2 * sent(held[2], 4))
    assert costs.received(3, dispatch) == (64,) * held[3] and costs.received(3, combine) == ()


def test_the_hosts_part_by_hand():
    """Of 20 tasks the host queues the i-th in i ms; the GPU comes to it 8 ms later, but to the last one 1 ms before."""
    def span(index: int, lead: float) -> Span:
        return Span(1, "compute", f"AF_1,{index}", index + lead, index + 0.5, queued=(index - index / 1e3, index))

    spans = [*(span(index, 0.008) for index in range(1, 20)), span(20, -0.001), Span(0, "compute", "EF_1,1", 0, 1)]
    assert host_costs(spans[-1:], {0: "expert"}) == {}, "on the CPU the host runs the tasks"
    found = host_costs(spans, {0: "expert", 1: "attention"})
    assert found.keys() == {"attention"}
    assert vars(found["attention"]) == pytest.approx(vars(HostCost(20, 0.0105, 0.020, 0.008, 0.05)))
    assert str(found["attention"]) == (
        "the host queues a task in 10,500 µs (95% of 20 within 20,000 µs), 8,000 µs before the GPU comes to it; the GPU came to "
        "5.0% before they were queued")


def test_tasks_are_read_as_they_are_written():
    tasks = [Task(kind, way, layer, microbatch) for kind in Kind for way in Pass for layer in (1, 12) for microbatch in (0, 9)]
    assert [Task.parse(str(task)) for task in tasks] == tasks
    assert {Task.parse(text) for text in ("optimizer", "reduce", "AF_1", "XF_1,1", "")} == {None}
    assert {task.stream for task in tasks} == set(Stream)
