"""Pipeline stages: 1F1B whose unit is a wave, for every stream of every member of a stage's ZP group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_hetermoe.schedule.orders import Order, Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task


class Unit(NamedTuple):
    """What a stage does without turning to another wave.

    Attributes:
        forward, backward: the waves' numbers; None for neither. Only the last stage has both, of one wave: there the
            head's backward follows its forward microbatch by microbatch.
    """

    forward: int | None
    backward: int | None


def units(stage: int, stages: int, waves: int, forward_only: bool) -> tuple[Unit, ...]:
    """1F1B of waves: as many forward as there are stages behind, then forward and backward in turn, then the rest.

    Megatron's order (pipeline_parallel/schedules.py, forward_backward_pipelining_without_interleaving) with a wave for a
    microbatch; with waves of one it is the same.

    Args:
        stage: from 0 on.
        stages: P.
        waves: of the step.
        forward_only: no backward.
    """
    if forward_only:
        return tuple(Unit(wave, None) for wave in range(waves))
    if stage == stages - 1:
        return tuple(Unit(wave, wave) for wave in range(waves))
    ahead = min(stages - 1 - stage, waves)
    found = [Unit(wave, None) for wave in range(ahead)]
    for wave in range(ahead, waves):
        found += [Unit(wave, None), Unit(None, wave - ahead)]
    return (*found, *(Unit(None, wave) for wave in range(waves - ahead, waves)))


@dataclass(frozen=True)
class StageSchedule(Schedule):
    """One step of a stage's ZP group.

    Its layers are numbered from 1; A_1 continues what H_1 brought, and A_{K+1} ends layer K for H_{K+1} to take away.

    Attributes:
        stage: from 0 on.
        stages: P.
    """

    stage: int = 0
    stages: int = 1

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What this stage does, in order."""
        return units(self.stage, self.stages, len(self.waves), self.forward_only)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def dependencies(self, task: Task) -> Order:
        """As Schedule's, and what neighbours hand over."""
        end = self.layers + 1
        if task.kind is Kind.HANDOVER:
            leaves = (task.layer == end) == (task.direction is Pass.FORWARD)
            return (Task(Kind.ATTENTION, task.direction, task.layer, task.microbatch),) if leaves else ()
        waits = super().dependencies(task)
        if task.kind is not Kind.ATTENTION:
            return waits
        comes = task.layer == 1 and not self.is_first if task.direction is Pass.FORWARD else \
            task.layer == end and not self.is_last and task.direction is Pass.BACKWARD
        return (*waits, Task(Kind.HANDOVER, task.direction, task.layer, task.microbatch)) if comes else waits

    def issue_order(self) -> Iterator[Task]:
        """As Schedule's, over all stages: an order of this stage's tasks so that, if each stage's are issued one after the
        other and a transfer between stages when both are at it, all get through (``schedule.checks``).

        A stage that has as many waves forward as there are stages behind, and then one backward, takes the gradients before
        it hands over what it has, since the next stage has given them before it takes more.
        """
        following = (*self.units[1:], Unit(None, None))
        held_back: tuple[Task, ...] = ()
        for unit, after in zip(self.units, following):
            if unit.backward is not None and not self.is_last:
                yield from self.handovers(Pass.BACKWARD, self.layers + 1, unit.backward)
            yield from held_back
            held_back = ()
            turns_back = after.backward is not None and unit.forward == after.backward + self.stages - 1 - self.stage
            if unit.forward is not None and not self.is_first:
                # All of them: on a compute stream, all attention of a wave may come before the first one's experts.
                yield from self.handovers(Pass.FORWARD, 1, unit.forward)
            for task in self.issue_wave_of(unit):
                if not is_of(task, unit):
                    continue
                yield task
                if not self._hands_over(task):
                    continue
                handover = Task(Kind.HANDOVER, task.direction, task.layer, task.microbatch)
                if turns_back:
                    held_back += (handover,)
                else:
                    yield handover

    def _hands_over(self, task: Task) -> bool:
        """Whether a task's result goes to another stage."""
        if task.kind is not Kind.ATTENTION or task.direction is Pass.WEIGHT:
            return False
        if task.direction is Pass.FORWARD:
            return task.layer > self.layers and not self.is_last
        return task.layer == 1 and not self.is_first

    def place(self, task: Task) -> tuple[int, bool]:
        """Of a handover, this stage and whether it is behind the stage's layers."""
        return self.stage, task.layer > self.layers

    def issue_wave_of(self, unit: Unit) -> Iterator[Task]:
        """All tasks of a unit's wave, as issued."""
        return self._issue_wave(self._wave_of(unit))

    def compute_wave_of(self, unit: Unit) -> Iterator[Task]:
        """A and E tasks of a unit's wave, as computed."""
        return self._wave_order(self._wave_of(unit))

    def handovers(self, direction: Pass, layer: int, wave: int) -> Iterator[Task]:
        """A wave's H tasks at a layer."""
        return (Task(Kind.HANDOVER, direction, layer, microbatch) for microbatch in self.waves[wave])

    def _wave_of(self, unit: Unit) -> tuple[int, ...]:
        return self.waves[unit.backward if unit.forward is None else unit.forward]

    def _compute_order(self) -> Iterator[Task]:
        for unit in self.units:
            yield from (task for task in self.compute_wave_of(unit) if is_of(task, unit))

    def _transfer_order(self) -> Iterator[Task]:
        yield from super()._transfer_order()
        yield from (task for task in self.issue_order() if task.kind is Kind.HANDOVER)


def is_of(task: Task, unit: Unit) -> bool:
    """Whether a task of a unit's wave is the unit's."""
    return (unit.forward if task.direction is Pass.FORWARD else unit.backward) is not None
