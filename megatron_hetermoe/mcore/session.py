"""What a rank of a disaggregated run knows of the run: its plan, its place, its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.runtime.channels import Channel
from megatron_hetermoe.runtime.recorder import Recorder
from megatron_hetermoe.runtime.selfcheck import Checksums
from megatron_hetermoe.runtime.transfers import Transfers
from megatron_hetermoe.schedule.interleaved import schedule_of
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.tasks import Kind
from megatron_hetermoe.topology.layout import ATTENTION, Layout, layout_of
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
        activation_again: whether experts compute the output of their activation again in the backward.
        stages: channel to the ranks at this place of each pipeline stage; None where there is one stage, and on expert
            ranks.
        expert_impl: whose linear layers experts have, whichever rank they are on: local or transformer_engine.
        draws_alike: whether all ranks' devices make the same initial weights of a seed.
    """

    plan: Plan
    rank: int
    control: dist.ProcessGroup
    out: Channel
    back: Channel
    device: torch.device
    activation_again: bool = False
    stages: Channel | None = None
    expert_impl: str = "local"
    draws_alike: bool = True

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.plan)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.plan.placement, self.layout.holders)

    @property
    def stage(self) -> int:
        """The pipeline stage that this rank is in, from 0 on."""
        return self.layout.stage_of(self.rank)

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """The layers of each model chunk of this rank's stage, from 1 on. Tasks number them from 1 in each stage, and have a
        number that is no layer between two chunks."""
        return self.plan.chunks_of_stage(self.stage)

    @cached_property
    def numbering(self) -> Numbering:
        """How tasks of this rank number layers."""
        return Numbering(self.chunks)

    def decoder_layers(self, chunk: int) -> range:
        """Those layers of a chunk that do not predict further tokens."""
        layers = self.chunks[chunk]
        return range(layers.start, min(layers.stop, self.plan.model.decoder_layers + 1))

    def mtp_layers(self, chunk: int) -> range:
        """Those that do: the last ones of the model's last chunk."""
        return range(self.decoder_layers(chunk).stop, self.chunks[chunk].stop)

    @cached_property
    def stage_placement(self) -> Placement:
        """The placement of this stage's layers, as tasks number them."""
        return self.placement.of_chunks(self.chunks)

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

    @property
    def holder(self) -> int:
        """The holder that this rank is, or is a part of."""
        return self.layout.holder_of(self.rank)

    @property
    def reports(self) -> bool:
        """Whether this rank reports the losses of its tokens: it is of the last stage, and of a tensor-parallel group,
        which has the same, one does."""
        return self.is_attention and self.in_last_stage and self.rank % self.layout.tensor == 0

    @property
    def in_last_stage(self) -> bool:
        return self.stage == self.layout.stages - 1

    @property
    def speaks_in_last_stage(self) -> bool:
        """Whether this rank is the first of its role in the last stage."""
        return self.rank == self.layout.stage_ranks(self.role, self.layout.stages - 1)[0]

    @property
    def holds(self) -> bool:
        """Whether this rank holds an expert of any layer."""
        return bool(self.placement.layers_of(self.holder))

    def held(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer, from 1 on, that this rank holds."""
        return self.placement.held(layer, self.holder)

    def over_pools(self, value: float) -> float:
        """The sum of both pools' values, of which each pool's ranks have one; all ranks call it together."""
        speaks = self.rank == self.layout.pool(self.role)[0]
        total = torch.tensor([float(value) if speaks else 0.0], dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.item()

    def transfers(
        self, hidden: int, kind: type[Transfers] = Transfers, checksums: Checksums | None = None,
        recorder: Recorder | None = None, row_order: Callable[[int], Sequence[int]] | None = None,
    ) -> Transfers:
        """This member's transfers of one step, of tokens that are so wide; all else as for Transfers."""
        layout = self.layout
        return kind(
            self.stage_placement, layout.m, self.member, self.out, self.back, hidden, self.wire_dtype, self.device,
            tuple(map(layout.members_of, range(layout.holders))), checksums, recorder=recorder, row_order=row_order,
        )

    def schedule(self, microbatches: int, forward_only: bool) -> Schedule:
        """The ZP group's schedule for so many microbatches of each attention rank."""
        return schedule_of(
            self.plan, self.placement, self.layout.m, self.stage, microbatches, forward_only, self._shared_kinds
        )

    @property
    def _shared_kinds(self) -> frozenset[Kind]:
        """Tasks in which ranks that share weights or a sequence talk to each other."""
        sizes = {Kind.ATTENTION: self.layout.tensor * self.layout.context, Kind.EXPERT: self.layout.expert_tensor}
        return frozenset(kind for kind, size in sizes.items() if size > 1)
