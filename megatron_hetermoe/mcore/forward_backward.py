"""The schedule that Megatron's training loop calls in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.core.utils import get_model_config, unwrap_model

from megatron_hetermoe.config.plan import MERGED, TOGETHER
from megatron_hetermoe.mcore.dry_run import Measurements
from megatron_hetermoe.mcore.experts import experts_of
from megatron_hetermoe.mcore.graphs import AttentionGraphs
from megatron_hetermoe.mcore.logs import share_aux_losses, share_losses, share_mtp_losses
from megatron_hetermoe.mcore.meter import Meter
from megatron_hetermoe.mcore.numbers import UNEXPECTED, report
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.step_checks import Checker, StepChecks
from megatron_hetermoe.mcore.tasks import AttentionTasks, ExpertTasks, StepInputs
from megatron_hetermoe.mcore.weights import WeightGradients, delay, delay_experts
from megatron_hetermoe.runtime import executor
from megatron_hetermoe.runtime.handover import Handover
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.runtime.streams import Observer, Queued, streams_for
from megatron_hetermoe.runtime.stretch import stretched
from megatron_hetermoe.schedule.orders import MemberSchedule, Schedule
from megatron_hetermoe.schedule.tasks import Kind, Stream, Task


class ForwardBackward:
    """Runs one step, or one evaluation step, of a plan's schedule on this rank.

    Called as Megatron calls ``forward_backward_func``; all ranks of both pools call it together.

    Args:
        session: this rank's.
        marks: told what runs.
        meter: told of training steps; its recorder of their tasks.
        measurements: of a dry run, told of tasks too.
        slow_down: how many times as long this rank's tasks take, by kind; only without a GPU.
        self_check: training steps from one comparison of what was sent with what came to the next; None for never.
        graphs: of an attention rank; None without them.
    """

    def __init__(
        self, session: Session, marks: Marks, meter: Meter, measurements: Measurements | None = None,
        slow_down: Mapping[Kind, float] | None = None, self_check: int | None = None,
        graphs: AttentionGraphs | None = None,
    ):
        self._session = session
        self._checker = Checker(session, marks, self_check)
        self._marks = marks
        marks.numbering = session.numbering
        self._meter = meter
        self._measurements = measurements
        self._slow_down = slow_down or {}
        self._graphs = graphs
        self._streams = streams_for(session.device)
        observers = [one.observe for one in (meter.recorder, measurements) if one]
        self._recorded = streams_for(session.device, partial(_tell, observers)) if observers else self._streams
        self._weights: WeightGradients | None = None
        self._schedules: dict[tuple[int, bool], tuple[Schedule, MemberSchedule]] = {}

    def __call__(
        self, *, forward_step_func: Callable[..., Any], data_iterator: Any, model: Any, num_microbatches: int,
        seq_length: int, micro_batch_size: int, forward_only: bool = False, collect_non_loss_data: bool = False,
        force_all_reduce: bool = False, **unused: Any,
    ) -> list[dict[str, torch.Tensor]]:
        """As ``megatron.core.pipeline_parallel.schedules.forward_backward_no_pipelining``.

        What it takes and does not use describes Megatron's own communicators between stages.

        Returns:
            On attention ranks of the last pipeline stage what the loss function reports for each microbatch; on expert ranks
            the same for the whole step, since the last rank prints; elsewhere nothing.
        """
        wrapped = model if isinstance(model, list) else [model]
        config = get_model_config(wrapped[0])
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        schedule, member = self._schedule(num_microbatches, forward_only)
        count, no_sync = len(wrapped), config.no_sync_func
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator] * count
        inputs = [
            StepInputs(unwrap_model(chunk), config, schedule, forward_step_func, iterator, own_no_sync, forward_only,
                       collect_non_loss_data, None if forward_only else self._delayed(wrapped),
                       None if forward_only else self._graphs)
            for chunk, iterator, own_no_sync in zip(
                wrapped, iterators, no_sync if isinstance(no_sync, list) else [no_sync] * count, strict=True)
        ]
        self._marks.enter("evaluation" if forward_only else "a training step")
        checks = self._checker.evaluation_step() if forward_only else self._checker.training_step()
        if not forward_only:
            if self._graphs is not None:
                self._graphs.begin_step(member, wrapped[0].ddp_config.overlap_grad_reduce)
            self._meter.begin_step(num_microbatches)
        try:
            losses, tokens = self._run(inputs, member, checks, (seq_length, micro_batch_size))
            self._checker.after(checks)
            if not forward_only:
                self._finalize(wrapped, tokens, force_all_reduce)
        except RuntimeError as error:
            if UNEXPECTED in str(error):
                report(checks.numbers, wrapped, self._session)
            raise
        machine = get_rerun_state_machine()
        if machine.rerun_requested and machine.state is RerunState.INITIAL_RUN:  # it runs a step again that went wrong
            report(checks.numbers, wrapped, self._session)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        share_aux_losses(self._session)
        share_mtp_losses(self._session)
        shared = share_losses(losses, self._session)
        self._marks.enter("what follows an evaluation step" if forward_only else "what follows a step's gradients")
        return shared

    def _delayed(self, chunks: Sequence[Any]) -> WeightGradients | None:
        """What W tasks do, if there are any. The model is told once, when it has all its wrappers."""
        how = self._session.plan.weight_gradients
        if how != TOGETHER and self._weights is None:
            self._weights = WeightGradients()
            for chunk in chunks:
                (delay_experts if how == MERGED else delay)(unwrap_model(chunk), self._weights)
        return self._weights

    def _finalize(self, chunks: Sequence[Any], tokens: torch.Tensor, force_all_reduce: bool) -> None:
        """After a training step's last task: Megatron's reduction of gradients."""
        self._marks.enter("the reduction of gradients")
        config = get_model_config(chunks[0])
        if self._measurements:
            self._measurements.end_step()
        with self._meter.reduction():
            config.finalize_model_grads_func(
                list(chunks),
                self._tokens_of_pool(tokens) if config.calculate_per_token_loss else None,
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
                force_all_reduce=force_all_reduce,
            )

    def _schedule(self, microbatches: int, forward_only: bool) -> tuple[Schedule, MemberSchedule]:
        """Made once for each number of microbatches: a step repeats the last one's."""
        key = (microbatches, forward_only)
        if key not in self._schedules:
            schedule = self._session.schedule(microbatches, forward_only)
            self._schedules[key] = schedule, schedule.member(self._session.holder)
        return self._schedules[key]

    def _run(
        self, inputs: Sequence[StepInputs], member: MemberSchedule, checks: StepChecks, batch: tuple[int, int]
    ) -> tuple[list[Any], torch.Tensor]:
        """The tasks of a step whose microbatches are of a sequence length and a number of sequences, with a model's chunks."""
        session, config = self._session, inputs[0].config
        numbering = session.numbering

        def row_order(layer: int) -> Sequence[int]:
            chunk = numbering.chunk_of(layer)
            return experts_of(inputs[chunk].model, layer - numbering.firsts[chunk] + 1).row_order

        recorder = None if inputs[0].forward_only else self._meter.recorder
        transfers = session.transfers(
            config.hidden_size, checksums=checks.checksums, row_order=row_order, recorder=recorder)
        streams = self._streams if inputs[0].forward_only else self._recorded
        experts = [ExpertTasks(of, transfers, partial(experts_of, of.model), first)
                   for of, first in zip(inputs, numbering.firsts, strict=True)]
        table = {**transfers.table(), **self._by_chunk([tasks.table() for tasks in experts])}
        if not session.is_attention:
            executor.run(member, stretched(table, self._slow_down), streams, self._marks, transfers.preparations())
            return [], torch.zeros([], dtype=torch.int, device=session.device)
        handover = self._handover(config, batch, recorder) if session.stages else None
        attention = [AttentionTasks(of, first, len(layers), transfers, checks.numbers, handover, checks.load)
                     for of, first, layers in zip(inputs, numbering.firsts, session.chunks, strict=True)]
        table |= self._by_chunk([tasks.table() for tasks in attention]) | (handover.table() if handover else {})
        executor.run(member, stretched(table, self._slow_down), streams, self._marks, transfers.preparations())
        return attention[-1].losses, attention[-1].tokens

    def _by_chunk(self, tables: Sequence[executor.Table]) -> executor.Table:
        """What the executor calls, from the same for the tasks of each chunk."""
        if len(tables) == 1:
            return tables[0]
        chunk_of = self._session.numbering.chunk_of
        return {key: lambda task, key=key: tables[chunk_of(task.layer)][key](task) for key in tables[0]}

    def _handover(self, config: Any, batch: tuple[int, int], recorder: Recorder | None) -> Handover:
        """The hidden states between stages, as Megatron's pipelines have them (schedules.py, get_tensor_shapes)."""
        session = self._session
        parts = session.layout.context * (session.layout.tensor if config.sequence_parallel else 1)
        shape = batch[0] // parts, batch[1], config.hidden_size
        return Handover(
            session.stages, session.stage, session.layout.stages, session.numbering.firsts, shape,
            config.pipeline_dtype or config.params_dtype, session.device, recorder,
        )

    def _tokens_of_pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """What this rank gives to its pool's sum of tokens, so that both pools' sums are the attention pool's.

        Megatron divides gradients by the tokens of all ranks of a pool, and expert ranks have none of their own.
        """
        total = tokens.cpu() * self._session.reports
        dist.all_reduce(total, group=self._session.control)
        if self._session.is_attention or not self._session.speaks_in_last_stage:
            return tokens
        return total.to(tokens.device)


def _tell(observers: Sequence[Observer], stream: Stream, task: Task, start: float, end: float, queued: Queued) -> None:
    for observe in observers:
        observe(stream, task, start, end, queued)
