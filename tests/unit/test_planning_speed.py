"""What makes planning fast changes no plan: the fast path is a plain walk over a schedule, in floats, one member at a time."""

import random
from dataclasses import replace

import numpy as np
import pytest
from pricing import PRECISION, cluster, profile, shape
from test_bench import modules
from test_hosts import FREE, HOST_SECONDS, a_random_case

from megatron_hetermoe.cost.cluster import kinds_of
from megatron_hetermoe.cost.curves import Notes
from megatron_hetermoe.planner import asym_ea
from megatron_hetermoe.planner.asym_ea import long_step_seconds
from megatron_hetermoe.planner.memory import member_memory, most_experts, usable
from megatron_hetermoe.planner.options import Question
from megatron_hetermoe.planner.search import search
from megatron_hetermoe.schedule.tasks import Kind, Pass
from megatron_hetermoe.simulator.fast import step_seconds
from megatron_hetermoe.simulator.program import PRICED, compile_program, compile_queueing
from megatron_hetermoe.simulator.queueing import waits_for_sizes

planning_time = modules("planning_time").planning_time


def walked_seconds(group, counts, schedule="zebra", wave=None, microbatches=None):
    """Seconds of a step of one placement, [K, members]."""
    return walked_ends(group, counts, schedule, wave, microbatches)[1]


def walked_ends(group, counts, schedule="zebra", wave=None, microbatches=None):
    """When attention ranks' last task and the step end, task after task and member after member."""
    m, of = group.attention_members, group.shape
    order = schedule, of.layers, of.moe_layers, microbatches or group.step.microbatches, wave
    on_attention = bool(counts[:, :m].any())
    program = compile_queueing(*order, on_attention) if group.has_host else compile_program(*order)
    computed, queued, channel = [0.0] * group.members, [0.0] * group.members, {}
    ends, reduced = {}, [0.0] * group.members
    for kind, which, layer, number, transfers, carried in program.operations:
        task = PRICED[which]
        way = int(task.direction is Pass.BACKWARD)
        holders = [member for member in range(group.members) if layer < of.layers and counts[layer, member]]
        before = max((ends[other] for other in (*transfers, *carried)), default=0.0)
        if kind in (Kind.ATTENTION, Kind.EXPERT):
            taking = range(m) if kind is Kind.ATTENTION else holders
            for member in taking:
                held = counts[layer, member] if kind is Kind.EXPERT else 0
                queued[member] += group.host_expert(member, way, held) if held else group.host_attention[member][way][layer]
                seconds = group.expert_seconds(member, way, held) if held else group.attention[member][way][layer]
                computed[member] = max(computed[member], before, queued[member]) + seconds
            ends[number] = max(computed[member] for member in taking)
            continue
        taking = {*range(m), *holders}
        for member in taking:
            known = before if waits_for_sizes(task) and group.has_host else 0.0
            queued[member] = max(queued[member], known) + group.host_transfer(member, kind)
        seconds = group.latency + group.link_seconds(kind, task.stream, counts[layer]).max()
        hosts = max(queued[member] for member in taking) if group.has_host else 0.0
        ends[number] = channel[task.stream] = max(channel.get(task.stream, 0.0), before, hosts) + seconds
        for member in holders:
            reduced[member] = max(reduced[member], ends[number])
    pairs = counts.sum(axis=0).astype(int).tolist()
    last = max(max(computed[member], reduced[member]) + group.reduction(member, pairs[member]) for member in range(group.members))
    return max(computed[:m]), last + max(group.optimizer(member, pairs[member]) for member in range(group.members))


def some_placements(rng, counts, m, number):
    """As many others with as many experts in each layer, half of them with none on attention ranks."""
    found = [counts]
    for _ in range(number):
        other, first = np.zeros_like(counts), rng.choice([0, m])
        for layer, row in enumerate(counts):
            for _ in range(int(row.sum())):
                other[layer, rng.randint(first, counts.shape[1] - 1)] += 1
        found.append(other)
    return np.array(found)


@pytest.mark.parametrize("hosts_count", [True, False])
def test_the_fast_path_is_a_plain_walk(hosts_count):
    rng = random.Random(11)
    for _ in range(40):
        priced, counts, name, wave = a_random_case(rng)
        priced = replace(priced, hosts_count=hosts_count)
        many = some_placements(rng, counts, priced.attention_members, rng.choice([0, 1, 6]))
        expected = [walked_seconds(priced, one, name, wave) for one in many]
        assert step_seconds(priced, many, name, wave) == pytest.approx(expected, rel=1e-12)


def test_a_step_takes_as_long_whatever_was_asked_before():
    rng = random.Random(12)
    for _ in range(20):
        priced, counts, name, wave = a_random_case(rng)
        priced = replace(priced, step=replace(priced.step, microbatches=3 * priced.step.microbatches))
        many = some_placements(rng, counts, priced.attention_members, 4)
        together = long_step_seconds(priced, many, wave, name)
        assert (long_step_seconds(priced, many[::-1], wave, name)[::-1] == together).all()
        for one, seconds in zip(many, together):
            asym_ea._known_steps.cache_clear()
            assert long_step_seconds(priced, one[None], wave, name)[0] == seconds


@pytest.mark.parametrize("seed", range(6))
def test_the_same_plans_are_found_by_walking(seed, monkeypatch):
    """All that a search simulated, with the same seconds and placements, in the same order."""
    rng = random.Random(seed)
    of = shape(layers=rng.randint(1, 3), experts=rng.choice([3, 4, 8]), topk=1)
    scale = rng.choice([0.0, 0.03, 0.2, 1.0])
    on = cluster(rng.choice([2, 4]), rng.choice([2, 3]), bandwidth=10 ** rng.uniform(8, 10),
                 channel_host=tuple(scale * one for one in (1e-3, 2e-3)))
    host = {name: tuple(scale * one for one in pair) for name, pair in HOST_SECONDS.items()} if scale else FREE
    attention, expert = rng.uniform(1e-3, 1e-2), rng.uniform(2e-4, 2e-3)
    profiles = {name: profile(of, (slow * attention, 2 * slow * attention), (slow * expert, 2 * expert), host=host)
                for name, slow in (("new", 1.0), ("old", rng.uniform(1, 4)))}
    question = Question(of, PRECISION, 1, 12, 1000, ("none",), (True,))

    def found():
        best = search(question, on, kinds_of(on, of, PRECISION, Notes(), profiles)).best
        return [(one.option.describe(), one.wave, one.schedule, one.assignment.experts.tolist(), one.assignment.seconds)
                for one in best]

    fast = found()

    def walking(group, experts, schedule, wave, microbatches):
        return np.array([walked_ends(group, one, schedule, wave, microbatches) for one in experts]).T

    monkeypatch.setattr(asym_ea, "_simulated", walking)
    walked = found()
    assert [one[:-1] for one in fast] == [one[:-1] for one in walked]
    assert [one[-1] for one in fast] == pytest.approx([one[-1] for one in walked], rel=1e-12)


@pytest.mark.parametrize("weight_gradients", ["together", "merged"])
def test_most_experts_are_the_most_that_fit(weight_gradients):
    rng = random.Random(13)
    for _ in range(20):
        priced = a_random_case(rng)[0]
        pairs = range(priced.shape.experts * len(priced.shape.moe_layers) + 1)
        for member in (0, priced.members - 1):
            wave = rng.choice([1, 2.5, 4])
            seat = priced.seats[member]
            room = member_memory(priced, member, rng.choice(pairs), wave, None, weight_gradients).total
            seats = [replace(seat, pool=replace(seat.pool, memory=room / 0.9)) if one == member else other
                     for one, other in enumerate(priced.seats)]
            tight = replace(priced, seats=tuple(seats))
            fits = [count for count in pairs
                    if member_memory(tight, member, count, wave, None, weight_gradients).total <= usable(tight, member)]
            assert most_experts(tight, member, wave, weight_gradients) == max(fits, default=-1)


@pytest.mark.slow
@pytest.mark.parametrize("gpus, hosts_known, best, wave, seconds", [
    (64, False, "4 x (8 old attention, 8 a microbatch, 8 new expert)", 2, 14.100250420866459),
    (64, True, "4 x (8 new attention, 2 a microbatch, 8 old expert)", 1, 16.268018692894938),
    (512, False, "32 x (8 old attention, 8 a microbatch, 8 new expert)", 2, 14.471499754016289),
    (512, True, "64 x (1 new attention, 3 new + 4 old expert)", 2, 16.118435362943107),
])
def test_the_plans_of_the_benchmark_stay(gpus, hosts_known, best, wave, seconds):
    """As they were found by a planner that simulated each placement as often as it came up."""
    found = search(*planning_time.asked(("new", "old"), gpus, hosts_known)).best[0]
    assert (found.option.describe(), found.wave) == (best, wave)
    assert found.assignment.seconds == pytest.approx(seconds, rel=1e-9)
