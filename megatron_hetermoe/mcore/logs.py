"""Losses in both pools: attention ranks have them, and the last rank, an expert rank, prints them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MetricEntry, get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.topology.layout import ATTENTION


def share_losses(losses: list[dict[str, torch.Tensor]], session: Session) -> list[dict[str, torch.Tensor]]:
    """Gives expert ranks what attention ranks report, so that Megatron's reduction inside a pool ends in the same.

    A report is a sum and its number of tokens, which Megatron adds up over the pool and divides, or a mean, which it
    takes as it is.

    Args:
        losses: an attention rank's reports, one for each microbatch; empty on expert ranks and before the last stage.
        session: this rank's.

    Returns:
        On attention ranks what was given. On expert ranks one report: of sums, the whole on the first rank of the
        last stage and zeros on the others; of means, the attention pool's mean.
    """
    names = [[(name, value.numel()) for name, value in losses[0].items()] if losses else []]
    first = session.layout.stage_ranks(ATTENTION, session.layout.stages - 1)[0]
    dist.broadcast_object_list(names, src=first, group=session.control)
    if not names[0]:
        return losses
    table = torch.zeros(len(names[0]), 2, dtype=torch.float32)
    for row, (name, numel) in zip(table, names[0]):
        if session.reports:
            values = torch.stack([report[name].detach().view(-1).float().cpu() for report in losses])
            row[:numel] = values.sum(dim=0) if numel == 2 else values.mean() / session.layout.replicas
    dist.all_reduce(table, group=session.control)
    if session.is_attention:
        return losses
    report = {}
    for row, (name, numel) in zip(table, names[0]):
        value = row[:numel] if numel == 1 or session.speaks_in_last_stage else torch.zeros(2)
        report[name] = value.to(session.device)
    return [report]


def share_aux_losses(session: Session) -> None:
    """Gives expert ranks each router's losses as Megatron's reduction on attention ranks will have them, since the
    last rank prints them. Megatron then averages over the expert pool, where all have the same.

    That reduction sums over the ranks that share a microbatch, or for some losses over more, and averages the rest.
    """
    metrics = get_moe_metrics_tracker().metrics
    sizes = [{name: len(entry.values) for name, entry in metrics.items()}]
    dist.broadcast_object_list(sizes, src=0, group=session.control)
    if not sizes[0]:
        return
    tracker = get_moe_metrics_tracker()
    for name, size in sizes[0].items():
        tracker.ensure_initialized(name, size)
    shared = torch.cat([
        _share_of_log(metrics[name], session) if session.is_attention else torch.zeros(size)
        for name, size in sizes[0].items()
    ])
    dist.all_reduce(shared, group=session.control)
    if not session.is_attention:
        for name, values in zip(sizes[0], shared.split(list(sizes[0].values()))):
            # Stages are summed in the expert pool too, and this is the sum already.
            metrics[name].values.copy_(values if session.in_last_stage else torch.zeros_like(values))


def _share_of_log(entry: MetricEntry, session: Session) -> torch.Tensor:
    """What an attention rank adds to the number that is logged, for each layer."""
    summed_over = 1 if entry.reduce_group is None else entry.reduce_group.size()
    return entry.values.float().cpu() * summed_over * session.layout.stages / session.layout.attention_ranks


_MTP_VALUES = ("loss_values", "correct_values", "total_values")  # in Megatron's tracker, each by further token


def share_mtp_losses(session: Session) -> None:
    """Gives expert ranks what Megatron's reduction on attention ranks will have of the predictions of further tokens: the
    mean of their losses, the sums of right ones and of all.

    Each rank keeps that of its own microbatches until it is logged, where Megatron reduces it inside a pool. An expert
    rank names no group for that.
    """
    if not session.plan.model.mtp_layers:
        return
    tracker = MTPLossLoggingHelper.tracker
    table = torch.zeros(len(_MTP_VALUES), session.plan.model.mtp_layers)
    if session.reports and "loss_values" in tracker:
        for row, name in zip(table, _MTP_VALUES):
            row.copy_(tracker[name] / (session.layout.replicas if name == "loss_values" else 1))
    dist.all_reduce(table, group=session.control)
    if not session.is_attention:
        tracker |= {name: row.to(session.device) for name, row in zip(_MTP_VALUES, table)}
