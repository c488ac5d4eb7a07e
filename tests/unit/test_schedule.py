"""Schedules: the paper's orders, and what holds for any of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hetermoe.config.plan import SCHEDULES, WEIGHT_GRADIENTS
from megatron_hetermoe.schedule.checks import violations
from megatron_hetermoe.schedule.orders import Schedule, build, sequential, zebra
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement

EVEN = Placement(((1, 1), (1, 1)), 2)


@st.composite
def schedules(draw):
    """Any placement, with dense layers, holders without experts, and experts on attention ranks."""
    m, n, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, 5))
    holders = st.lists(st.integers(0, m + n - 1), min_size=experts, max_size=experts).map(tuple)
    placement = Placement(
        tuple(draw(st.one_of(st.just(()), holders, holders)) for _ in range(layers)), m + n
    )
    name = draw(st.sampled_from(SCHEDULES))
    shared = frozenset(draw(st.sets(st.sampled_from([Kind.ATTENTION, Kind.EXPERT]))))
    return build(
        name, layers, placement, m, draw(st.integers(1, 7)), draw(st.none() | st.integers(1, 8)), draw(st.booleans()),
        draw(st.sampled_from(WEIGHT_GRADIENTS)), shared,
    )


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_any_schedule_can_run(schedule):
    """Every dependency holds, both ends of a channel see one order, and nothing waits for itself."""
    assert violations(schedule) == []


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_whatever_holds_a_queue_is_queued_in_one_order(schedule):
    """On every member, transfers and tasks that ranks share are queued in the issue order, whatever threads do."""
    position = {task: index for index, task in enumerate(schedule.issue_order())}
    for member in range(schedule.placement.members):
        orders = schedule.member(member)
        before = {task: set(orders.waits[task]) | set(orders.issued_before.get(task, ())) for task in orders.waits}
        for order in orders.streams.values():
            for task, following in zip(order, order[1:]):
                before[following].add(task)
        attention = member < schedule.attention_members
        # An attention rank's experts are its own, even where expert ranks share theirs.
        held = sorted(
            (task for task in before if task.stream is not Stream.COMPUTE
             or schedule.is_shared(task) and not (attention and task.kind is Kind.EXPERT)), key=position.__getitem__
        )
        for task, following in zip(held, held[1:]):
            assert task in reached(following, before), f"member {member} may queue {following} before {task}"


def reached(task: Task, before: dict[Task, set[Task]]) -> set[Task]:
    """All that comes before a task."""
    found, left = set(), [task]
    while left:
        for earlier in before[left.pop()] - found:
            found.add(earlier)
            left.append(earlier)
    return found


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_each_task_once_where_it_belongs(schedule):
    head, wants = schedule.layers + 1, {Pass.FORWARD} if schedule.forward_only else {Pass.FORWARD, Pass.BACKWARD}
    weights = "together" if schedule.forward_only else schedule.weight_gradients
    computed = wants | {Pass.WEIGHT} if weights == "delayed" else wants
    microbatches = {microbatch for wave in schedule.waves for microbatch in wave}
    assert microbatches == set(range(len(microbatches))) and schedule.last_microbatch == max(microbatches)
    for member in range(schedule.placement.members):
        tasks = [task for order in schedule.member(member).streams.values() for task in order]
        assert len(tasks) == len(set(tasks)) and schedule.tasks_of(member) == set(tasks)
        attention = {task for task in tasks if task.kind is Kind.ATTENTION}
        expected = len(computed) * head * len(microbatches) if member < schedule.attention_members else 0
        assert len(attention) == expected
        for kind in (Kind.DISPATCH, Kind.EXPERT, Kind.COMBINE):
            layers = schedule.placement.layers_of(member)
            if kind is not Kind.EXPERT and member < schedule.attention_members:
                layers = schedule.moe_layers
            assert {task for task in tasks if task.kind is kind} == {
                Task(kind, direction, layer, microbatch)
                for direction in (computed if kind is Kind.EXPERT else wants)
                for layer in layers for microbatch in microbatches
            } | {
                Task(kind, Pass.WEIGHT, layer, wave[-1]) for layer in layers for wave in schedule.waves
                if kind is Kind.EXPERT and weights == "merged"
            }


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_w_tasks_do_what_b_tasks_left(schedule):
    """Each B task's weights once, and none before its B task."""
    done, left = [], []
    for task in schedule.issue_order():
        if task.direction is Pass.WEIGHT:
            assert set(schedule.left_to(task)) <= set(done) and len(schedule.left_to(task)) == schedule.microbatches_of(task)
            left += schedule.left_to(task)
        done.append(task)
    kinds = {"together": (), "delayed": (Kind.ATTENTION, Kind.EXPERT), "merged": (Kind.EXPERT,)}[schedule.weight_gradients]
    assert sorted(left) == sorted(task for task in done if task.kind in kinds and task.direction is Pass.BACKWARD)


def order(schedule: Schedule, member: int, stream: Stream = Stream.COMPUTE) -> str:
    return " ".join(map(str, schedule.member(member).streams[stream]))


def test_the_papers_optimal_orders():
    """Two layers, two microbatches: the paper's L is 3."""
    schedule = zebra(2, EVEN, 1, 2, None)
    assert order(schedule, 0) == (
        "AF_1,1 AF_1,2 AF_2,1 AF_2,2 AF_3,1 AB_3,1 AF_3,2 AB_3,2 AB_2,1 AB_2,2 AB_1,1 AB_1,2"
    )
    assert order(schedule, 1) == "EF_1,1 EF_1,2 EF_2,1 EF_2,2 EB_2,1 EB_2,2 EB_1,1 EB_1,2"
    assert order(schedule, 0, Stream.OUT) == "DF_1,1 DF_1,2 DF_2,1 DF_2,2 CB_2,1 CB_2,2 CB_1,1 CB_1,2"
    assert order(schedule, 1, Stream.BACK) == "CF_1,1 CF_1,2 CF_2,1 CF_2,2 DB_2,1 DB_2,2 DB_1,1 DB_1,2"


def test_weights_gradients_come_after_those_that_are_waited_for():
    """Each W directly behind its B, but in the first layer behind all B of expert ranks; nothing else moves."""
    schedule = zebra(2, EVEN, 1, 2, None, weight_gradients="delayed")
    assert order(schedule, 0) == (
        "AF_1,1 AF_1,2 AF_2,1 AF_2,2 AF_3,1 AB_3,1 AW_3,1 AF_3,2 AB_3,2 AW_3,2 AB_2,1 AW_2,1 AB_2,2 AW_2,2 "
        "AB_1,1 AW_1,1 AB_1,2 AW_1,2"
    )
    assert order(schedule, 1) == (
        "EF_1,1 EF_1,2 EF_2,1 EF_2,2 EB_2,1 EW_2,1 EB_2,2 EW_2,2 EB_1,1 EB_1,2 EW_1,1 EW_1,2"
    )
    for stream in (Stream.OUT, Stream.BACK):
        assert order(schedule, 1, stream) == order(zebra(2, EVEN, 1, 2, None), 1, stream)


def test_weights_gradients_of_a_wave_are_one_task():
    """Behind all B of its layer; attention ranks have none."""
    schedule, plain = zebra(2, EVEN, 1, 4, 2, weight_gradients="merged"), zebra(2, EVEN, 1, 4, 2)
    assert order(schedule, 0) == order(plain, 0)
    assert order(schedule, 1) == (
        "EF_1,1 EF_1,2 EF_2,1 EF_2,2 EB_2,1 EB_2,2 EW_2,2 EB_1,1 EB_1,2 EW_1,2 "
        "EF_1,3 EF_1,4 EF_2,3 EF_2,4 EB_2,3 EB_2,4 EW_2,4 EB_1,3 EB_1,4 EW_1,4"
    )
    for stream in (Stream.OUT, Stream.BACK):
        assert order(schedule, 1, stream) == order(plain, 1, stream)


def test_sequential_is_one_microbatch_at_a_time():
    assert order(sequential(2, EVEN, 1, 2), 0) == (
        "AF_1,1 AF_2,1 AF_3,1 AB_3,1 AB_2,1 AB_1,1 AF_1,2 AF_2,2 AF_3,2 AB_3,2 AB_2,2 AB_1,2"
    )


@pytest.mark.parametrize("wave, waves", [(None, [8]), (8, [8]), (9, [8]), (4, [4, 4]), (3, [2, 3, 3]), (1, [1] * 8)])
def test_waves_are_as_equal_as_can_be(wave, waves):
    assert [len(part) for part in zebra(2, EVEN, 1, 8, wave).waves] == waves


def test_experts_on_an_attention_rank_run_after_all_attention_of_the_layer():
    schedule = zebra(1, Placement(((0, 1),), 2), 1, 2, None, forward_only=True)
    assert order(schedule, 0) == "AF_1,1 AF_1,2 EF_1,1 EF_1,2 AF_2,1 AF_2,2"


def test_a_member_waits_for_its_own_tasks_only():
    """An attention rank's combine needs what others compute; here it waits for its own dispatch, which precedes."""
    waits = zebra(1, Placement(((1,),), 2), 1, 1, None).member(0).waits
    combine, dispatch = Task(Kind.COMBINE, Pass.FORWARD, 1, 0), Task(Kind.DISPATCH, Pass.FORWARD, 1, 0)
    assert waits[combine] == (dispatch,)


def broken(schedule: Schedule, member: int, stream: Stream, change) -> Schedule:
    """A schedule one of whose members has another order."""

    class Broken(Schedule):
        def member(self, index):
            orders = super().member(index)
            if index == member:
                orders.streams[stream] = change(orders.streams[stream])
            return orders

    return Broken(
        schedule.layers, schedule.placement, schedule.attention_members, schedule.waves, schedule.forward_only
    )


@pytest.mark.parametrize(
    "member, stream, change, said",
    [
        (1, Stream.OUT, lambda tasks: tasks[1::-1] + tasks[2:], "different orders"),
        (0, Stream.COMPUTE, lambda tasks: tasks[:1] + tasks, "twice"),
        (0, Stream.COMPUTE, lambda tasks: tasks[::-1], "stuck"),
        (1, Stream.COMPUTE, lambda tasks: tasks[::-1], "stuck"),
        (0, Stream.COMPUTE, lambda tasks: tasks[1:], "no member has"),
    ],
)
def test_the_checks_find_what_is_broken(member, stream, change, said):
    schedule = broken(zebra(2, EVEN, 1, 2, None), member, stream, change)
    assert any(said in problem for problem in violations(schedule))


def test_waits_of_a_member_that_lacks_most_layers_are_found_at_once():
    """Between its tasks lie layers that it has no part in, through which there are twice as many ways for each."""
    layers = 40
    holders = tuple((2,) if layer in (1, layers) else (1,) for layer in range(1, layers + 1))
    member = zebra(layers, Placement(holders, 3), 1, 2, None).member(2)
    dispatch = Task(Kind.DISPATCH, Pass.FORWARD, layers, 0)
    assert member.waits[dispatch] == (Task(Kind.COMBINE, Pass.FORWARD, 1, 0),)
