"""What a rank of a disaggregated run knows of the run: its plan, its place, its channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.runtime.channels import Channel
from megatron_hetermoe.schedule.orders import Schedule, build
from megatron_hetermoe.topology.layout import ATTENTION, Layout
from megatron_hetermoe.topology.placement import Placement


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Session:
    """One rank's view of the run. Made once, before Megatron sets anything up.

    Attributes:
        plan: what was decided.
        rank: this rank.
        control: gloo group over all ranks. All that crosses between the pools and is no token goes over it.
        out, back: this ZP group's channels.
        device: where this rank computes.
    """

    plan: Plan
    rank: int
    control: dist.ProcessGroup
    out: Channel
    back: Channel
    device: torch.device

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.plan.attention_ranks, self.plan.expert_ranks, self.plan.groups)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.plan.placement, self.layout.m + self.layout.n)

    @property
    def expert_dtype(self) -> torch.dtype:
        """Of experts, on whatever rank."""
        return DTYPES[self.plan.expert_precision]

    @property
    def wire_dtype(self) -> torch.dtype:
        """Of tokens on the channels: the experts', or attention's where that is smaller."""
        return min(self.expert_dtype, DTYPES[self.plan.attention_precision], key=lambda dtype: dtype.itemsize)

    @property
    def role(self) -> str:
        return self.layout.role(self.rank)

    @property
    def is_attention(self) -> bool:
        return self.role == ATTENTION

    @property
    def member(self) -> int:
        """This rank, as a member of its ZP group."""
        return self.layout.member_of(self.rank)

    def held(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer, from 1 on, that this rank holds."""
        return self.placement.held(layer, self.member)

    def over_pools(self, value: float) -> float:
        """The sum of both pools' values, of which each pool's ranks have one; all ranks call it together."""
        speaks = self.rank == self.layout.pool(self.role)[0]
        total = torch.tensor([float(value) if speaks else 0.0], dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.item()

    def schedule(self, microbatches: int, forward_only: bool) -> Schedule:
        """The ZP group's schedule for so many microbatches of each attention rank."""
        return build(
            self.plan.schedule, self.plan.model.layers, self.placement, self.layout.m, microbatches, self.plan.wave,
            forward_only, self.plan.delayed,
        )
