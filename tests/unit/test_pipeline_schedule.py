"""Pipeline stages: 1F1B of waves, and that stages get through together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hetermoe.config.plan import WEIGHT_GRADIENTS
from megatron_hetermoe.schedule.checks import handover_violations, violations
from megatron_hetermoe.schedule.interleaved import InterleavedSchedule, chunk_units
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.orders import zebra
from megatron_hetermoe.schedule.pipeline import StageSchedule, Unit, units
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.placement import Placement


def stage_of(stage: int, stages: int, placement: Placement, m: int, microbatches: int, wave: int | None, *options):
    base = zebra(len(placement.holders), placement, m, microbatches, wave, *options)
    return StageSchedule(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)},
                         stage=stage, stages=stages)


@st.composite
def pipelines(draw):
    """Stages of one to three layers, any placements, waves and kinds that ranks share."""
    m, n, stages = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(2, 5))
    experts = draw(st.integers(1, 3))
    holders = st.lists(st.integers(0, m + n - 1), min_size=experts, max_size=experts).map(tuple)
    placements = st.lists(st.just(()) | holders, min_size=1, max_size=3).map(lambda of: Placement(tuple(of), m + n))
    step = draw(st.integers(1, 7)), draw(st.none() | st.integers(1, 8)), draw(st.booleans()), \
        draw(st.sampled_from(WEIGHT_GRADIENTS))
    shared = frozenset(draw(st.sets(st.sampled_from([Kind.ATTENTION, Kind.EXPERT]))))
    return [stage_of(stage, stages, draw(placements), m, *step, shared) for stage in range(stages)]


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_any_pipeline_can_run(stages):
    """Each stage by itself, and all of them together where nothing that is handed over is buffered."""
    for stage in stages:
        assert violations(stage) == []
    assert handover_violations(stages) == []


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_both_ends_hand_over_in_one_order(stages):
    for before, after in zip(stages, stages[1:]):
        given_, taken = ([(task.direction, task.microbatch) for task in stage.member(0).streams[Stream.STAGES]
                          if (task.layer == 1) is is_behind]
                         for stage, is_behind in ((before, False), (after, True)))
        assert given_ == taken
        microbatches = sum(map(len, before.waves))
        assert len(taken) == len(set(taken)) == microbatches * (1 if before.forward_only else 2)


@st.composite
def interleaved_pipelines(draw):
    """Two to four stages of two or three chunks, of one or two layers each, and any number of waves."""
    m, n, stages, chunks = (draw(st.integers(*bounds)) for bounds in ((1, 2), (1, 2), (2, 4), (2, 3)))
    holders = st.just(()) | st.lists(st.integers(0, m + n - 1), min_size=2, max_size=2).map(tuple)
    step = draw(st.integers(1, 9)), draw(st.none() | st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())
    shared = frozenset(draw(st.sets(st.sampled_from([Kind.ATTENTION, Kind.EXPERT]))))
    found = []
    for stage in range(stages):
        sizes = draw(st.lists(st.integers(1, 2), min_size=chunks, max_size=chunks))
        bounds = [sum(sizes[:chunk]) for chunk in range(chunks + 1)]
        whole = Placement(tuple(draw(holders) for _ in range(sum(sizes))), m + n)
        placement = whole.of_chunks([range(first + 1, last + 1) for first, last in pairwise(bounds)])
        base = zebra(len(placement.holders), placement, m, *step, shared)
        found.append(InterleavedSchedule(
            **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)}, stage=stage, stages=stages,
            chunk_layers=tuple(sizes)))
    return found


@settings(max_examples=25, deadline=None)
@given(interleaved_pipelines())
def test_any_interleaved_pipeline_can_run(stages):
    """As without virtual stages; and each part of the model gets each microbatch once, forward and backward."""
    for stage in stages:
        assert violations(stage) == []
        ends = set(range(1, stage.layers + 2)) - {first + layer for first, layers in zip(stage.firsts, stage.chunk_layers)
                                                  for layer in range(layers)}
        done = [task for task in stage.member(0).streams[Stream.COMPUTE]
                if task.kind is Kind.ATTENTION and task.direction is not Pass.WEIGHT and task.layer in ends]
        microbatches = sum(map(len, stage.waves))
        assert len(ends) == len(stage.chunk_layers)
        assert len(done) == len(set(done)) == len(ends) * microbatches * (1 if stage.forward_only else 2)
    assert handover_violations(stages) == []


@pytest.mark.parametrize("stages, chunks, waves", [(2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 2, 2)])
def test_interleaved_waves_of_one_are_megatrons_order(stages, chunks, waves):
    """forward_backward_pipelining_with_interleaving: warm-up, one forward and one backward, cool-down; as many microbatches
    as stages go through a chunk before the next."""
    for stage in range(stages):
        def turn(index: int, forward: bool) -> tuple[str, int, int]:
            group = min(stages, waves)
            chunk = index % (group * chunks) // group
            return ("F", chunk, index // (group * chunks) * group + index % group) if forward else \
                ("B", chunks - 1 - chunk, index // (group * chunks) * group + index % group)

        total = chunks * waves
        warm_up = min(total, (stages - stage - 1) * 2 + (chunks - 1) * stages)
        expected = [turn(index, True) for index in range(warm_up)]
        for index in range(total - warm_up):
            expected += [turn(warm_up + index, True), turn(index, False)]
        expected += [turn(index, False) for index in range(total - warm_up, total)]
        flat = [(direction, chunk, wave) for chunk, unit in chunk_units(stage, stages, chunks, waves, False)
                for direction, wave in (("F", unit.forward), ("B", unit.backward)) if wave is not None]
        assert flat == expected


@settings(max_examples=30, deadline=None)
@given(pipelines() | interleaved_pipelines())
def test_the_models_numbers_of_a_stages_layers(stages):
    """Each task of a rank has one name, and both ends of a handover have the same."""
    count = len(stages)
    of_stages = [getattr(stage, "chunk_layers", (stage.layers,)) for stage in stages]
    ends = list(accumulate((layers for of_chunk in zip(*of_stages) for layers in of_chunk), initial=0))
    chunks = [range(first + 1, last + 1) for first, last in pairwise(ends)]
    handovers = Counter()
    for number, stage in enumerate(stages):
        numbering = Numbering(tuple(chunks[number::count]))
        named = {task: numbering.in_model(task) for task in stage.tasks_of(0)}
        assert len(set(named.values())) == len(named)
        assert all(numbering.in_stage(name) == task for task, name in named.items())
        layers = {layer for of_chunk in numbering.chunks for layer in of_chunk}
        assert {name.layer for name in named.values() if name.kind is Kind.DISPATCH} <= layers
        handovers.update(name for name in named.values() if name.kind is Kind.HANDOVER)
    assert set(handovers.values()) == {2} and {name.layer - 1 for name in handovers} == set(ends[1:-1])
    assert Numbering((chunks[0],)).in_stage(Task(Kind.ATTENTION, Pass.FORWARD, ends[-1] + 1, 0)) is None


@settings(max_examples=50, deadline=None)
@given(pipelines())
def test_expert_ranks_hand_over_nothing(stages):
    for stage in stages:
        for member in range(stage.attention_members, stage.placement.members):
            assert Stream.STAGES not in stage.member(member).streams


@pytest.mark.parametrize("stages, waves", [(2, 1), (2, 4), (4, 2), (4, 4), (4, 7)])
def test_waves_of_one_are_megatrons_order(stages, waves):
    """forward_backward_pipelining_without_interleaving: warm-up, one forward and one backward, cool-down."""
    for stage in range(stages):
        warm_up = min(stages - stage - 1, waves)
        expected = [("F", wave) for wave in range(warm_up)]
        for wave in range(waves - warm_up):
            expected += [("F", warm_up + wave), ("B", wave)]
        expected += [("B", wave) for wave in range(waves - warm_up, waves)]
        schedule = stage_of(stage, stages, Placement(((1,),), 2), 1, waves, 1)
        tasks = [task for task in schedule.member(0).streams[Stream.COMPUTE]
                 if task.layer == (1 if task.direction is Pass.FORWARD else 2)]
        assert [(task.direction.value, task.microbatch) for task in tasks] == expected


def test_a_wave_is_the_unit():
    """Two microbatches go on together, where stock Megatron has one; the first stage keeps two waves of three stages."""
    assert units(0, 3, 3, False) == (
        Unit(0, None), Unit(1, None), Unit(2, None), Unit(None, 0), Unit(None, 1), Unit(None, 2))
    assert units(2, 3, 2, False) == (Unit(0, 0), Unit(1, 1))
    schedule = stage_of(1, 3, Placement(((1,),), 2), 1, 4, 2)
    handed = [str(task) for task in schedule.member(0).streams[Stream.STAGES]]
    assert handed == [
        "HF_1,1", "HF_1,2", "HF_2,1", "HF_2,2",  # wave 1 comes and goes on
        "HF_1,3", "HF_1,4", "HB_2,1", "HB_2,2", "HF_2,3", "HF_2,4",  # gradients come before wave 2 goes on
        "HB_1,1", "HB_1,2", "HB_2,3", "HB_2,4", "HB_1,3", "HB_1,4",
    ]


def test_an_order_that_blocks_is_found():
    """Where the first stage gave before it took, both would give."""
    class Eager(StageSchedule):
        def issue_order(self):
            order = list(super().issue_order())
            gradients = [task for task in order if task.kind is Kind.HANDOVER and task.direction is Pass.BACKWARD]
            later = order.index(gradients[0])
            moved = order.pop(later)
            order.insert(order.index(Task(Kind.HANDOVER, Pass.FORWARD, 2, 1)) + 1 if later else 0, moved)
            return iter(order)

    first, last = (stage_of(stage, 2, Placement(((1,),), 2), 1, 3, 1) for stage in range(2))
    assert handover_violations([first, last]) == []
    eager = Eager(**{field.name: getattr(first, field.name) for field in dataclasses.fields(first)})
    assert handover_violations([eager, last]) == ["stage 0 is stuck before HF_2,2", "stage 1 is stuck before HB_1,1"]
