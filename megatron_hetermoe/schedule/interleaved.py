"""Virtual stages: a ZP group has several parts of the model, and turns from one to the other (interleaved 1F1B)."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.schedule.numbering import first_numbers
from megatron_hetermoe.schedule.orders import Order, Schedule, build
from megatron_hetermoe.schedule.pipeline import StageSchedule, Unit, is_of
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task
from megatron_hetermoe.topology.placement import Placement

_FORWARD, _BACKWARD = 1, 2  # how long a part takes of a wave, for the order of handovers


class Move(NamedTuple):
    """What a stage does next: a unit of one of its chunks, or the handovers of a wave that a neighbour takes part in.

    Attributes:
        chunk: from 0 on in the stage.
        unit: for a unit.
        direction, is_end: for handovers, forward or backward, behind the chunk or before it.
        wave: for handovers.
    """

    chunk: int
    unit: Unit | None = None
    direction: Pass | None = None
    is_end: bool = False
    wave: int = -1


def chunk_units(stage: int, stages: int, chunks: int, waves: int, forward_only: bool) -> list[tuple[int, Unit]]:
    """Interleaved 1F1B of waves: chunks with their units, in order.

    Megatron's order (pipeline_parallel/schedules.py, forward_backward_pipelining_with_interleaving) with a wave for a
    microbatch: as many waves as there are stages go through a chunk before the next chunk's turn. In the last part of the
    model, where a wave's backward follows its forward, both are one unit.

    Args:
        stage: from 0 on.
        stages: P.
        chunks: of each stage.
        waves: of the step.
        forward_only: no backward.
    """
    turns = [(chunk, wave) for first in range(0, waves, stages) for chunk in range(chunks)
             for wave in range(first, min(first + stages, waves))]
    forward = [(chunk, Unit(wave, None)) for chunk, wave in turns]
    if forward_only:
        return forward
    backward = [(chunks - 1 - chunk, Unit(None, wave)) for chunk, wave in turns]
    ahead = min(len(turns), 2 * (stages - 1 - stage) + (chunks - 1) * stages)
    found = forward[:ahead]
    for before, after in zip(forward[ahead:], backward):
        (chunk, one), (other, back) = before, after
        if stage == stages - 1 and chunk == other == chunks - 1 and one.forward == back.backward:
            found.append((chunk, Unit(one.forward, back.backward)))
        else:
            found += [before, after]
    return found + backward[len(turns) - ahead:]


@cache
def timeline(stages: int, chunks: int, waves: int, forward_only: bool) -> tuple[tuple[Move, ...], ...]:
    """For each stage what it does, in order: all stages' parts of one order of everything.

    In that order a handover stands once for both of its ends, after what it carries is made and before it is used. So
    stages get through together even if each does one thing after the other and nothing is buffered. The order is that of a
    run in which a backward takes twice as long as a forward. Where waves do not divide by the stages, all stages may come to
    wait for gradients; then the one that can does its next forward before.
    """
    queues = [chunk_units(stage, stages, chunks, waves, forward_only) for stage in range(stages)]
    free = [0] * stages
    there: dict[tuple[Pass, int, int], int] = {}  # direction, part of the model, wave: when it is done
    events: list[tuple[int, bool, int, Move]] = []  # when, whether a unit, stage, move

    def start(stage: int, chunk: int, unit: Unit) -> int | None:
        """When a stage could begin a unit; None before what it needs is known."""
        part = chunk * stages + stage
        needed = (Pass.FORWARD, part - 1, unit.forward) if unit.forward is not None else \
            (Pass.BACKWARD, part + 1, unit.backward)
        if needed[1] in (-1, stages * chunks):
            return free[stage]
        return max(free[stage], there[needed]) if needed in there else None

    def hand_over(direction: Pass, part: int, wave: int, when: int) -> None:
        there[direction, part, wave] = when
        before, after = (part, part + 1) if direction is Pass.FORWARD else (part - 1, part)
        if 0 <= before and after < stages * chunks:
            for one, is_end in ((before, True), (after, False)):
                events.append((when, False, one % stages, Move(one // stages, None, direction, is_end, wave)))

    while any(queues):
        heads = [(stage, 0) for stage in range(stages) if queues[stage]]
        forwards = [(stage, next(place for place, (_, unit) in enumerate(queue) if unit.forward is not None))
                    for stage, queue in enumerate(queues) if any(unit.forward is not None for _, unit in queue)]
        for candidates in (heads, forwards):
            begins = [(begin, stage, place) for stage, place in candidates
                      if (begin := start(stage, *queues[stage][place])) is not None]
            if begins:
                break
        begin, stage, place = min(begins)
        chunk, unit = queues[stage].pop(place)
        events.append((begin, True, stage, Move(chunk, unit)))
        free[stage] = begin
        for direction, wave, takes in ((Pass.FORWARD, unit.forward, _FORWARD), (Pass.BACKWARD, unit.backward, _BACKWARD)):
            if wave is not None:
                free[stage] += takes
                hand_over(direction, chunk * stages + stage, wave, free[stage])
    events.sort(key=lambda event: event[:2])  # keeps both ends of a handover in one place
    return tuple(tuple(move for _, _, of, move in events if of == stage) for stage in range(stages))


@dataclass(frozen=True)
class InterleavedSchedule(Schedule):
    """One step of a ZP group with several parts of the model, its chunks.

    Tasks number a chunk's layers behind those of the chunk before, whose last A task has a number of its own: there is no
    layer. So with chunks of 2 and 1 layers A_1 to A_3 are the first chunk's, A_4 and A_5 the second's.

    Attributes:
        stage: from 0 on.
        stages: P.
        chunk_layers: of each chunk.
    """

    stage: int = 0
    stages: int = 1
    chunk_layers: tuple[int, ...] = ()

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The number of each chunk's first layer."""
        return first_numbers(self.chunk_layers)

    @cached_property
    def chunks(self) -> tuple[StageSchedule, ...]:
        """Each chunk as a stage of its own."""
        return tuple(
            StageSchedule(
                layers, self.placement.of_layers(range(first, first + layers)), self.attention_members, self.waves,
                self.forward_only, self.weight_gradients, self.shared, chunk * self.stages + self.stage,
                self.stages * len(self.chunk_layers),
            )
            for chunk, (first, layers) in enumerate(zip(self.firsts, self.chunk_layers))
        )

    @cached_property
    def _moves(self) -> tuple[Move, ...]:
        return timeline(self.stages, len(self.chunk_layers), len(self.waves), self.forward_only)[self.stage]

    def _own(self, task: Task) -> tuple[int, Task]:
        """A task's chunk, and the task as it is numbered there."""
        chunk = bisect(self.firsts, task.layer) - 1
        return chunk, replace(task, layer=task.layer - self.firsts[chunk] + 1)

    def _numbered(self, chunk: int, task: Task) -> Task:
        return replace(task, layer=task.layer + self.firsts[chunk] - 1)

    def place(self, task: Task) -> tuple[int, bool]:
        """As ``StageSchedule.place``."""
        chunk, own = self._own(task)
        return self.chunks[chunk].place(own)

    def dependencies(self, task: Task) -> Order:
        """As ``StageSchedule.dependencies``."""
        chunk, own = self._own(task)
        return tuple(self._numbered(chunk, other) for other in self.chunks[chunk].dependencies(own))

    def issue_order(self) -> Iterator[Task]:
        """As ``StageSchedule.issue_order``; that all stages get through is by ``timeline``."""
        for move in self._moves:
            chunk = self.chunks[move.chunk]
            if move.unit is None:
                tasks = chunk.handovers(move.direction, chunk.layers + 1 if move.is_end else 1, move.wave)
            else:
                tasks = (task for task in chunk.issue_wave_of(move.unit) if is_of(task, move.unit))
            yield from (self._numbered(move.chunk, task) for task in tasks)

    def _compute_order(self) -> Iterator[Task]:
        for move in self._moves:
            if move.unit is not None:
                chunk = self.chunks[move.chunk]
                yield from (self._numbered(move.chunk, task) for task in chunk.compute_wave_of(move.unit)
                            if is_of(task, move.unit))

    def _transfer(self, task: Task) -> Iterator[Task]:
        chunk, own = self._own(task)
        yield from (self._numbered(chunk, transfer) for transfer in self.chunks[chunk]._transfer(own))

    def _transfer_order(self) -> Iterator[Task]:
        yield from super()._transfer_order()
        yield from (task for task in self.issue_order() if task.kind is Kind.HANDOVER)


def schedule_of(
    plan: Plan, placement: Placement, attention_members: int, stage: int, microbatches: int, forward_only: bool = False,
    shared: frozenset[Kind] = frozenset(),
) -> Schedule:
    """The schedule of one pipeline stage, or of the whole where there is one.

    Args:
        plan: the run's.
        placement: of all layers.
        attention_members: M.
        stage: from 0 on.
        microbatches: of the step.
        forward_only: no backward.
        shared: as ``Schedule.shared``.
    """
    chunks = plan.chunks_of_stage(stage)
    placement = placement.of_chunks(chunks)
    schedule = build(
        plan.schedule, len(placement.holders), placement, attention_members, microbatches, plan.wave, forward_only,
        plan.weight_gradients, shared,
    )
    if plan.stages == 1:
        return schedule
    if plan.virtual_stages > 1:
        return InterleavedSchedule(
            schedule.layers, schedule.placement, attention_members, schedule.waves, forward_only, plan.weight_gradients, shared, stage,
            plan.stages, tuple(map(len, chunks)),
        )
    return StageSchedule(
        schedule.layers, schedule.placement, attention_members, schedule.waves, forward_only, plan.weight_gradients, shared, stage,
        plan.stages,
    )
