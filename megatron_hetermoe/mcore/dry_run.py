"""``--hetermoe-dry-run``: a plan on its real ranks for a few steps, what was predicted beside what was measured."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import repeat

import torch
import torch.distributed as dist

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.log_lines import DRY_RUN
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.config.step import TaskSeconds
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.planner.memory import OVERHEAD
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.network import measure_channel
from megatron_hetermoe.runtime.streams import Queued
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task
from megatron_hetermoe.topology.layout import ATTENTION, EXPERT

STEPS = 3  # the first warms up; a step is timed from the end of its tasks to the end of the next one's
_LINK_BYTES = 8 * 2**20  # of the transfer that measures the channels
_REPEATS = 5
_PASSES = {Pass.FORWARD: "forward", Pass.BACKWARD: "backward"}


def prepare(args: argparse.Namespace) -> None:
    """Turns Megatron's arguments into those of a run that ends after STEPS steps and reads and writes no file but data:
    no checkpoint, no evaluation, no boards."""
    args.load = args.pretrained_checkpoint = args.save = args.tensorboard_dir = None
    args.wandb_project = ""
    args.eval_iters = 0
    args.exit_interval = STEPS
    if args.train_iters is not None:
        args.train_iters = max(args.train_iters, STEPS)


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Goes on where Megatron's training loop has reached its exit interval and leaves the process."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise


def run(train: Callable[[], object], session: Session, measurements: Measurements) -> None:
    """Checks memory and channels, trains, and reports. All ranks call it.

    Args:
        train: Megatron's training loop, with arguments that ``prepare`` has changed.
        session: this rank's.
        measurements: told of each task meanwhile.

    Raises:
        UsageError: see ``check_memory``.
    """
    checks = [check_memory(session), *check_links(session)]
    with ended():
        train()
    report(session, measurements, checks)


class Measurements:
    """Collects the seconds of tasks; in the place of a ``runtime.recorder.Recorder``."""

    def __init__(self) -> None:
        self.tasks: dict[Task, list[float]] = {}
        self._ends: list[float] = []

    def observe(self, stream: Stream, task: Task, start: float, end: float, queued: Queued) -> None:
        """Notes one task; called from the thread of its stream."""
        if self._ends:
            self.tasks.setdefault(task, []).append(end - start)

    def end_step(self) -> None:
        self._ends.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """Of a step with everything that belongs to it."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def check_memory(session: Session) -> str:
    """Whether every rank's GPU has what the plan says that its role needs.

    Returns:
        What was found, for the report.

    Raises:
        UsageError: on all ranks, with each rank whose GPU is too small.
    """
    if not is_gpu(session.device):
        return "memory: not checked without a GPU"
    predicted = session.plan.predicted
    if predicted is None:
        return "memory: not checked, the plan predicts none"
    needed = predicted.attention_bytes if session.is_attention else predicted.expert_bytes
    free, total = torch.cuda.mem_get_info(session.device)
    problem = None
    if needed > free:
        problem = f"rank {session.rank} ({session.role}) needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} of its GPU's " \
                  f"{total / 1e9:.1f} GB are free: end what else runs there, or plan with memory_gb as it is"
    found: list[str | None] = [None] * session.layout.world_size
    dist.all_gather_object(found, problem, group=session.control)
    if any(found):
        raise UsageError([one for one in found if one])
    return "memory: every GPU has what the plan needs"


def check_links(session: Session) -> list[str]:
    """Carries some bytes on both channels of every ZP group; all ranks call it.

    Returns:
        A line for each channel of the slowest ZP group.
    """
    lines = []
    for name, channel in (("out", session.out), ("back", session.back)):
        measured = measure_channel(
            channel, session.layout.m, session.member, session.layout.m + session.layout.n, [_LINK_BYTES], _REPEATS,
            session.device)
        ((size, seconds),) = measured.items()
        slowest = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=session.control)
        lines.append(f"channel {name}: {size / 1e6:.1f} MB of the busiest rank in {slowest.item() * 1e3:.2f} ms, "
                     f"{size / slowest.item() / 1e9:.2f} GB/s")
    return lines


@dataclass(frozen=True)
class _OfRank:
    """What one rank measured.

    Attributes:
        role: ATTENTION or EXPERT.
        tasks: seconds by task, with the model's number for its layer, and step; only of each pipeline stage's first ZP
            group, as the others do the same.
        step: seconds of a step.
        memory: bytes that the GPU's allocator took at most, 0 without a GPU.
        stage: from 0 on.
        member: of its ZP group.
    """

    role: str
    tasks: dict[Task, list[float]]
    step: float
    memory: float
    stage: int = 0
    member: int = 0


def report(session: Session, measurements: Measurements, checks: Sequence[str]) -> None:
    """Prints on rank 0 what was predicted and measured; all ranks call it after the last step."""
    memory = float(torch.cuda.max_memory_reserved(session.device)) if is_gpu(session.device) else 0.0
    layout = session.layout
    in_first = layout.group_of(session.rank) % layout.groups == 0
    tasks = {session.numbering.in_model(task): seconds for task, seconds in measurements.tasks.items()}
    own = _OfRank(session.role, tasks if in_first else {}, measurements.step_seconds, memory, session.stage, session.member)
    ranks: list[_OfRank] | None = [own] * layout.world_size if session.rank == 0 else None
    dist.gather_object(own, ranks, dst=0, group=session.control)
    if ranks is not None:
        for line in (*checks, *_table(session.plan, ranks)):
            print(DRY_RUN + line, flush=True)


def _table(plan: Plan, ranks: Sequence[_OfRank]) -> Iterator[str]:
    """The lines of the comparison: tasks, of each pipeline stage, then step and memory."""
    for stage, measured in enumerate(typical(ranks)):
        where = f"median of a task, stage {stage + 1}" if plan.stages > 1 else "median of a task"
        yield f"{where:28}{'predicted':>12}{'measured':>12}"
        for field in fields(TaskSeconds):
            if field.name in measured:
                predicted = getattr(plan.tasks[stage], field.name) if plan.tasks else None
                yield _row(field.name.replace("_", " ").replace("moved", "moved expert"), predicted,
                           measured[field.name], 1e3, "ms")
    predicted = plan.predicted
    step = max(rank.step for rank in ranks)
    yield _row("step", predicted and predicted.step_seconds, step, 1e3, "ms")
    for role, expected in ((ATTENTION, predicted and predicted.attention_bytes),
                           (EXPERT, predicted and predicted.expert_bytes)):
        most = max(rank.memory for rank in ranks if rank.role == role)
        # What is measured is torch's allocator's, which the rest of a process is no part of.
        yield _row(f"memory of {role} ranks", expected and max(0.0, expected - OVERHEAD), most or None, 1e-9, "GB")
    if not plan.tasks:
        yield "nothing was predicted: `hetermoe plan` makes a plan that says what to expect, --hetermoe-plan takes it"


def _row(name: str, predicted: float | None, measured: float | None, scale: float, unit: str) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value * scale:.2f} {unit}"

    ratio = f"{measured / predicted:8.2f} x" if predicted and measured else ""
    return f"{name:28}{cell(predicted):>12}{cell(measured):>12}{ratio}"


def typical(ranks: Sequence[_OfRank]) -> list[dict[str, float]]:
    """For each pipeline stage the median of each kind and pass, named as in TaskSeconds.

    A transfer's time on a rank has in it what the rank waited for its peers, so of all that took part the shortest
    counts: the last to come waits for none.
    """
    found: list[dict[str, list[float]]] = [{} for _ in range(1 + max(rank.stage for rank in ranks))]
    transfers: dict[tuple[Task, int, int], list[tuple[float, int]]] = {}  # by task, where and step: seconds, stage
    for rank in ranks:
        weights = _weights(rank)
        for task, seconds in rank.tasks.items():
            if task.direction is Pass.WEIGHT:
                continue
            if task.direction is Pass.BACKWARD:  # prices are of a whole one
                seconds = [sum(both) for both in zip(seconds, weights.get((task.kind, task.layer), repeat(0.0)))]
            if task.stream is Stream.COMPUTE:
                found[rank.stage].setdefault(_name(task, rank.role), []).extend(seconds)
                continue
            where = rank.member if task.kind is Kind.HANDOVER else -1  # ranks at one place of two stages, or a ZP group
            for step, one in enumerate(seconds):
                transfers.setdefault((task, where, step), []).append((one, rank.stage))
    for (task, _, _), times in transfers.items():
        for stage in {stage for _, stage in times}:
            found[stage].setdefault(_name(task), []).append(min(times)[0])
    return [{name: statistics.median(seconds) for name, seconds in of_stage.items()} for of_stage in found]


def _name(task: Task, role: str = ATTENTION) -> str:
    """What TaskSeconds calls a task of a rank with that role."""
    if task.kind is Kind.HANDOVER:
        return "handover"
    kind = {Kind.ATTENTION: "attention", Kind.EXPERT: "expert" if role == EXPERT else "moved", Kind.DISPATCH: "dispatch",
            Kind.COMBINE: "combine"}[task.kind]
    return f"{kind}_{_PASSES[task.direction]}"


def _weights(rank: _OfRank) -> dict[tuple[Kind, int], list[float]]:
    """By kind and layer, what W tasks took for each microbatch, in each step: one may be for several microbatches."""
    found: dict[tuple[Kind, int], list[list[float]]] = {}
    for task, seconds in rank.tasks.items():
        if task.direction is Pass.WEIGHT:
            found.setdefault((task.kind, task.layer), []).append(seconds)
    backwards = Counter((task.kind, task.layer) for task in rank.tasks if task.direction is Pass.BACKWARD)
    return {of: [sum(step) / backwards[of] for step in zip(*tasks)] for of, tasks in found.items()}
