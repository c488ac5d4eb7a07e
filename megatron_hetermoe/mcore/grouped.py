"""A holder's experts as grouped matrix products by torch: one kernel for all of them, where there is one.

Weights stay one parameter for each expert, as optimizer, gradient buckets and checkpoints know them. The kernel wants
them at equal distances in memory, and there they are: the constructor lays them out so, and a distributed optimizer
lays them out so itself. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import grouped_mm

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.mcore.activation import expert_again, kept
from megatron_hetermoe.mcore.experts import HeldExperts
from megatron_hetermoe.mcore.session import Session

# GPUs for which torch 2.11 to 2.14 has the kernel. Elsewhere it runs one group after the other and copies their
# sizes to the host, for which the host then waits.
_CAPABILITIES = (9, 10)
_ALIGNMENT = 16  # bytes, of a row
Leave = Callable[[Sequence[torch.nn.Parameter], Callable[[Sequence[Any]], Sequence[torch.Tensor]], Any], None]


def grouped_obstacle(plan: Plan, has_biases: bool, capability: tuple[int, int] | None) -> str | None:
    """Why a device cannot run a plan's experts as grouped matrix products; None when it can.

    Args:
        plan: the run's.
        has_biases: whether linear layers have biases.
        capability: of the GPU; None for the CPU, which runs one group after the other in every precision.
    """
    shape, precision = plan.model, plan.expert_precision
    if has_biases:
        return "experts have biases, which --disable-bias-linear leaves out"
    size = 4 if precision == "fp32" else 2
    inner = shape.expert_ffn // plan.expert_tensor_parallel
    if any(width * size % _ALIGNMENT for width in (shape.hidden, inner)):
        return f"hidden sizes {shape.hidden} and {inner} in {precision} are not multiples of " \
               f"{_ALIGNMENT} bytes"
    if capability is None:
        return None
    if capability[0] not in _CAPABILITIES:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, torch's kernel is for 9.x and 10.x"
    return None if precision == "bf16" else f"torch's kernel is for bf16, experts are in {precision}"


def build_held(
    builder: Any, config: TransformerConfig, session: Session, layer: int, seed: int,
    pg_collection: ProcessGroupCollection,
) -> HeldExperts:
    """The experts of a layer that this rank holds, which are some.

    Args:
        builder: ``MoESubmodules.experts`` of the stock layer, whose submodules are used.
    """
    assert isinstance(builder, partial) and builder.func is SequentialMLP, builder
    kernel = session.plan.expert_kernel
    if kernel == "auto":
        kernel = "grouped" if _is_native(session, config.add_bias_linear) else "sequential"
    kind = GroupedExperts if kernel == "grouped" else HeldExperts
    config = copy(config)
    config.params_dtype = session.expert_dtype
    config.fp16, config.bf16 = config.params_dtype is torch.float16, config.params_dtype is torch.bfloat16
    return kind(config, builder.keywords["submodules"], layer, session.held(layer), seed, pg_collection,
                session.activation_again)


def _is_native(session: Session, has_biases: bool) -> bool:
    """Whether this rank's GPU has the kernel for the plan's experts."""
    if not torch.empty(0, device=session.device).is_cuda:
        return False
    return grouped_obstacle(session.plan, has_biases, torch.cuda.get_device_capability(session.device)) is None


class GroupedExperts(HeldExperts):
    """Experts that run together. As HeldExperts, but for how rows are ordered (``row_order``) and multiplied."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Takes weights and a function for their gradients, where these are to be computed later (``mcore.weights``).
        self.leave: Leave | None = None
        experts = self.local_experts
        # A gradient buffer holds parameters from the last to the first, so rows and weights follow that order.
        self.row_order = tuple(reversed(range(len(experts))))
        self._linears = tuple(
            tuple(getattr(experts[position], name) for position in self.row_order)
            for name in ("linear_fc1", "linear_fc2")
        )
        for linears in self._linears:
            together = torch.stack([linear.weight.data for linear in linears])
            for linear, weight in zip(linears, together):
                linear.weight.data = weight
                # Calling the module is then how to get at its weight, past the hook that waits until it is gathered.
                linear.forward = partial(getattr, linear, "weight")

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """As SequentialMLP's.

        Args:
            permuted_local_hidden_states: [rows, hidden], in ``row_order``.
            tokens_per_expert: int64 on the CPU, in ``row_order``.
            permuted_probs: [rows].
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            rows = (probs.unsqueeze(-1) * rows).to(rows.dtype)
            probs = torch.ones_like(probs)
        groups = _Groups.of(tokens_per_expert, rows.device)
        fc1, fc2 = (_GroupedLinear(linears, groups, self.leave) for linears in self._linears)
        # What an expert does between its two products is done to the rows of all.
        expert = SimpleNamespace(
            config=self.config, activation_func=self.local_experts[0].activation_func, linear_fc1=fc1, linear_fc2=fc2
        )
        return (expert_again if self.activation_again else MLP.forward)(expert, rows, probs)


@dataclass(frozen=True)
class _Groups:
    """Which rows are whose: consecutive, and maybe none.

    Attributes:
        ends: for each expert, one past its last row, on the host.
        ends_on_device: the same, int32.
    """

    ends: list[int]
    ends_on_device: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, device: torch.device) -> _Groups:
        """From the rows of each expert, on the CPU. The host does not wait for the device."""
        ends = counts.cumsum(0).to(torch.int32)
        return cls(ends.tolist(), ends.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else ends)

    def start(self, expert: int) -> int:
        """The first row of an expert, or one past the last of those before."""
        return self.ends[expert - 1] if expert else 0

    def rows_of(self, expert: int) -> slice:
        """An expert's rows."""
        return slice(self.start(expert), self.ends[expert])


class _GroupedLinear(torch.nn.Module):
    """The linear layers of all experts, as Megatron calls one; without biases."""

    def __init__(self, linears: Sequence[torch.nn.Module], groups: _Groups, leave: Leave | None):
        super().__init__()
        self._weights = [linear() for linear in linears]
        self._groups = groups
        self._leave = leave

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[rows, in] to [rows, out]."""
        weights, groups, leave = self._weights, self._groups, self._leave
        if leave is None or not torch.is_grad_enabled():
            return _GroupedProduct.apply(rows, groups, *weights), None
        output = _GroupedProduct.apply(rows, groups, *(weight.detach() for weight in weights))
        rows = kept(rows)
        output.register_hook(
            lambda grad: leave(weights, partial(_weight_grads_of, weights), (grad.contiguous(), rows(), groups)))
        return output, None


class _GroupedProduct(torch.autograd.Function):
    """Each group of rows times the transpose of its own weight."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, groups: _Groups, *weights: torch.Tensor) -> torch.Tensor:
        """[rows, in] and [out, in] for each group to [rows, out]."""
        ctx.save_for_backward(rows, *weights)
        ctx.groups = groups
        return joined([
            _product(rows[part], stacked.transpose(1, 2), ends) for part, ends, stacked in _runs(groups, weights)
        ])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows and, where they are asked for, of weights."""
        rows, *weights = ctx.saved_tensors
        groups, grad = ctx.groups, grad.contiguous()
        row_grads = [_product(grad[part], stacked, ends) for part, ends, stacked in _runs(groups, weights)]
        wanted = any(ctx.needs_input_grad[2:])
        weight_grads = _weight_grads(grad, rows, groups, weights) if wanted else [None] * len(weights)
        return joined(row_grads), None, *weight_grads


@torch.no_grad()
def _weight_grads_of(
    weights: Sequence[torch.Tensor], parts: Sequence[tuple[torch.Tensor, torch.Tensor, _Groups]]
) -> list[torch.Tensor]:
    """``_weight_grads`` of the rows of several microbatches, whose gradients, rows and groups are a part each."""
    if len(parts) == 1:
        return _weight_grads(*parts[0], weights)
    ends = torch.tensor([groups.ends for _, _, groups in parts]).sum(dim=0)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))

    def of_all(which: int) -> torch.Tensor:
        return torch.cat([part[which][part[2].rows_of(expert)] for expert in range(len(weights)) for part in parts])

    grad, rows = of_all(0), of_all(1)
    return _weight_grads(grad, rows, _Groups.of(counts, rows.device), weights)


@torch.no_grad()
def _weight_grads(
    grad: torch.Tensor, rows: torch.Tensor, groups: _Groups, weights: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """[rows, out] and [rows, in] to [out, in] for each group. The kernel may leave an empty group's as it found it."""
    weight_grads: list[torch.Tensor] = []
    for part, ends, stacked in _runs(groups, weights):
        weight_grads += (
            grouped_mm(grad[part].t(), rows[part], offs=ends) if grad[part].numel() else torch.empty_like(stacked)
        ).unbind()
    for expert, weight_grad in enumerate(weight_grads):
        if groups.start(expert) == groups.ends[expert]:
            weight_grad.zero_()
    return weight_grads


def _product(rows: torch.Tensor, stacked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[rows, in] and [experts, in, out] to [rows, out]; of no row without asking the kernel."""
    return grouped_mm(rows, stacked, offs=ends) if rows.shape[0] else rows.new_empty(0, stacked.shape[-1])


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[rows, width] of each part to those of all; one part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _runs(
    groups: _Groups, weights: Sequence[torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Divides the experts where their weights do not go on at the same distance: where a bucket of gradients ends.

    Yields:
        A run's rows, the ends of its groups among them, and its weights as one tensor, [experts, out, in].
    """
    addresses = [weight.data_ptr() for weight in weights]
    first = 0
    while first < len(weights):
        weight = weights[first]
        distance = addresses[first + 1] - addresses[first] if first + 1 < len(weights) else 0
        last = first + 1
        if distance >= weight.nbytes and distance % _ALIGNMENT == 0:
            storage = weight.untyped_storage().data_ptr()
            while (
                last < len(weights) and addresses[last] - addresses[last - 1] == distance
                and weights[last].untyped_storage().data_ptr() == storage
            ):
                last += 1
        step = distance // weight.element_size() if last > first + 1 else weight.numel()
        stacked = weight.detach().as_strided((last - first, *weight.shape), (step, *weight.stride()))
        start = groups.start(first)
        ends = groups.ends_on_device[first:last]
        yield slice(start, groups.ends[last - 1]), ends - start if start else ends, stacked
        first = last
