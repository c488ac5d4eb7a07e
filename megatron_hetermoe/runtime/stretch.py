"""Tasks that take longer than they do: slower GPUs, on a machine that has none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatron_hetermoe.runtime.executor import Table
from megatron_hetermoe.schedule.tasks import Kind, Task


def stretched(table: Table, factors: Mapping[Kind, float]) -> Table:
    """A table whose A and E tasks wait after their work until they took ``factor`` times as long.

    What a task takes by itself is its thread's processor time, so that waiting for a core, which ranks that share a
    machine do, is not stretched too. Waiting needs no core.

    Args:
        table: what the executor would call.
        factors: by kind of task, from 1 on; tasks of other kinds stay as they are.
    """
    def wrapped(call: Callable[[Task], None], factor: float) -> Callable[[Task], None]:
        def run(task: Task) -> None:
            start = time.thread_time()
            call(task)
            time.sleep((factor - 1) * (time.thread_time() - start))

        return run

    return {
        (kind, direction): wrapped(call, factors[kind]) if factors.get(kind, 1.0) > 1 else call
        for (kind, direction), call in table.items()
    }
