"""The schedule that Megatron's training loop calls in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args

from megatron_hetermoe.mcore.experts import ExpertModel, HeldExperts
from megatron_hetermoe.mcore.logs import share_aux_losses, share_losses
from megatron_hetermoe.mcore.meter import Meter
from megatron_hetermoe.mcore.numbers import UNEXPECTED, Numbers, report
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.tasks import AttentionTasks, ExpertTasks, StepInputs
from megatron_hetermoe.runtime import executor
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.streams import streams_for
from megatron_hetermoe.runtime.transfers import Transfers
from megatron_hetermoe.schedule.orders import MemberSchedule, Schedule


class ForwardBackward:
    """Runs one step, or one evaluation step, of a plan's schedule on this rank.

    Called as Megatron calls ``forward_backward_func``; all ranks of both pools call it together.

    Args:
        session: this rank's.
        marks: told what runs.
        meter: told of training steps; its recorder of their tasks.
    """

    def __init__(self, session: Session, marks: Marks, meter: Meter):
        self._session = session
        self._marks = marks
        self._meter = meter
        self._streams = streams_for(session.device)
        self._recorded = self._streams
        if meter.recorder:
            self._recorded = streams_for(session.device, meter.recorder.observe)
        self._schedules: dict[tuple[int, bool], tuple[Schedule, MemberSchedule]] = {}

    def __call__(
        self, *, forward_step_func: Callable[..., Any], data_iterator: Any, model: Any, num_microbatches: int,
        forward_only: bool = False, collect_non_loss_data: bool = False, force_all_reduce: bool = False,
        **unused: Any,
    ) -> list[dict[str, torch.Tensor]]:
        """As ``megatron.core.pipeline_parallel.schedules.forward_backward_no_pipelining``.

        What it takes and does not use describes pipelines: shapes and communicators between stages.

        Returns:
            On attention ranks what the loss function reports for each microbatch; on expert ranks the same for the
            whole step, since the last rank prints.
        """
        (wrapped,) = model if isinstance(model, list) else [model]
        config = get_model_config(wrapped)
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        schedule, member = self._schedule(num_microbatches, forward_only)
        inputs = StepInputs(
            unwrap_model(wrapped), config, schedule, forward_step_func,
            data_iterator[0] if isinstance(data_iterator, list) else data_iterator,
            forward_only, collect_non_loss_data,
        )
        self._marks.enter("evaluation" if forward_only else "a training step")
        if not forward_only:
            self._meter.begin_step(num_microbatches)
        numbers = Numbers(self._session, get_args().check_for_nan_in_loss_and_grad and not forward_only)
        try:
            losses, tokens = self._run(inputs, member, numbers)
            if not forward_only:
                self._finalize(wrapped, tokens, force_all_reduce)
        except RuntimeError as error:
            if UNEXPECTED in str(error):
                report(numbers, wrapped, self._session)
            raise
        machine = get_rerun_state_machine()
        if machine.rerun_requested and machine.state is RerunState.INITIAL_RUN:  # it runs a step again that went wrong
            report(numbers, wrapped, self._session)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        share_aux_losses(self._session)
        shared = share_losses(losses, self._session)
        self._marks.enter("what follows an evaluation step" if forward_only else "what follows a step's gradients")
        return shared

    def _finalize(self, wrapped: Any, tokens: torch.Tensor, force_all_reduce: bool) -> None:
        """After a training step's last task: Megatron's reduction of gradients."""
        self._marks.enter("the reduction of gradients")
        config = get_model_config(wrapped)
        with self._meter.reduction():
            config.finalize_model_grads_func(
                [wrapped],
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

    def _run(self, inputs: StepInputs, member: MemberSchedule, numbers: Numbers) -> tuple[list[Any], torch.Tensor]:
        session, config = self._session, inputs.config
        transfers = Transfers(
            session.placement, session.layout.m, session.member, session.out, session.back, config.hidden_size,
            config.params_dtype, session.device, tuple(map(session.layout.members_of, range(session.layout.holders))),
            recorder=None if inputs.forward_only else self._meter.recorder,
        )
        streams = self._streams if inputs.forward_only else self._recorded
        table = {**transfers.table(), **ExpertTasks(inputs, transfers, _experts_of(inputs.model)).table()}
        if not session.is_attention:
            executor.run(member, table, streams, self._marks)
            return [], torch.zeros([], dtype=torch.int, device=session.device)
        attention = AttentionTasks(inputs, transfers, numbers)
        executor.run(member, {**table, **attention.table()}, streams, self._marks)
        return attention.losses, attention.tokens

    def _tokens_of_pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """What this rank gives to its pool's sum of tokens, so that both pools' sums are the attention pool's.

        Megatron divides gradients by the tokens of all ranks of a pool, and expert ranks have none of their own.
        """
        total = tokens.cpu() * self._session.owns_microbatches
        dist.all_reduce(total, group=self._session.control)
        first = self._session.layout.pool(self._session.role)[0]
        if self._session.is_attention or self._session.rank != first:
            return tokens
        return total.to(tokens.device)


def _experts_of(model: Any) -> Callable[[int], HeldExperts]:
    if isinstance(model, ExpertModel):
        return model.experts
    return lambda layer: model.decoder.layers[layer - 1].mlp.experts
