"""A holder's experts as grouped matrix products by torch: one kernel for all of them, where there is one.

Weights stay one parameter for each expert, as optimizer, gradient buckets and checkpoints know them. The kernel wants
them at equal distances in memory, and there they are: the constructor lays them out so, and a distributed optimizer
lays them out so itself. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import grouped_mm

from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.mcore.activation import activation_of, expert_again, kept
from megatron_hetermoe.mcore.experts import HeldExperts
from megatron_hetermoe.mcore.implementation import ENGINE, LOCAL, expert_config, expert_submodules
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.runtime.device import is_gpu

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
    config: TransformerConfig, session: Session, layer: int, seed: int, pg_collection: ProcessGroupCollection
) -> HeldExperts:
    """The experts of a layer that this rank holds, which are some.

    Args:
        config: the model's.
        session: this rank's.
        layer: from 1 on.
        seed: of the run.
        pg_collection: groups of this rank's pool.
    """
    kernel = session.plan.expert_kernel
    if kernel == "auto":
        grouped = session.plan.expert_impl != ENGINE and _is_native(session, config.add_bias_linear)
        kernel = "grouped" if grouped else "sequential"
    kind, impl = (GroupedExperts, LOCAL) if kernel == "grouped" else (HeldExperts, session.expert_impl)
    config = expert_config(config, impl)
    config.params_dtype = session.expert_dtype
    config.fp16, config.bf16 = config.params_dtype is torch.float16, config.params_dtype is torch.bfloat16
    return kind(config, expert_submodules(impl), layer, session.held(layer), seed, pg_collection,
                session.activation_again)


def _is_native(session: Session, has_biases: bool) -> bool:
    """Whether this rank's GPU has the kernel for the plan's experts."""
    return is_gpu(session.device) and grouped_obstacle(
        session.plan, has_biases, torch.cuda.get_device_capability(session.device)) is None


class GroupedExperts(HeldExperts):
    """Experts that run together. As HeldExperts, but for how rows are ordered (``row_order``) and multiplied."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Takes weights and a function for their gradients, where these are to be computed later (``mcore.weights``).
        self.leave: Leave | None = None
        experts = self.local_experts
        # A gradient buffer holds parameters from the last to the first, so rows and weights follow that order.
        self.row_order = tuple(reversed(range(len(experts))))
        self._fc1, self._fc2 = (
            _Linears([getattr(experts[position], name) for position in self.row_order])
            for name in ("linear_fc1", "linear_fc2")
        )
        self._activate = activation_of(self.config, experts[0].activation_func)

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
        # What an expert does between its two products is done to the rows of all.
        fc1, fc2 = (partial(linears, groups, self.leave) for linears in (self._fc1, self._fc2))
        if not self.activation_again:
            return fc2(self._activate(fc1(rows)[0], probs))
        expert = SimpleNamespace(
            config=self.config, activation_func=self.local_experts[0].activation_func, linear_fc1=fc1, linear_fc2=fc2
        )
        return expert_again(expert, rows, probs)


class _Linears:
    """One linear layer of each expert.

    Args:
        linears: without biases; their weights are laid out one behind the other, in this order.
    """

    def __init__(self, linears: Sequence[torch.nn.Module]):
        self._linears = linears
        self._addresses: tuple[int, ...] = ()
        self._stacks: tuple[_Stack, ...] = ()
        for linear, weight in zip(linears, torch.stack([linear.weight.data for linear in linears])):
            linear.weight.data = weight
            # Calling the module is then how to get at its weight, past a hook that waits until it is gathered.
            linear.forward = partial(getattr, linear, "weight")

    def __call__(self, groups: _Groups, leave: Leave | None, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        """All of them, as Megatron calls one: [rows, in] to [rows, out] and no bias.

        Args:
            groups: which rows are whose.
            leave: takes what gradients of weights need, where those are computed later.
            rows: [rows, in].
        """
        # A module's call takes the host as long as a launch, so it is made only where a hook waits for it.
        weights = [linear() if linear._forward_pre_hooks else linear.weight for linear in self._linears]
        stacks = self._stacked(weights)
        if leave is None or not torch.is_grad_enabled():
            return _GroupedProduct.apply(rows, groups, stacks, *weights), None
        output = _GroupedProduct.apply(rows, groups, stacks)
        rows = kept(rows)
        output.register_hook(
            lambda grad: leave(weights, partial(_weight_grads_of, stacks), (grad.contiguous(), rows(), groups)))
        return output, None

    def _stacked(self, weights: Sequence[torch.Tensor]) -> tuple[_Stack, ...]:
        """The weights as they lie, which changes only when an optimizer makes its buffers."""
        addresses = tuple(weight.data_ptr() for weight in weights)
        if addresses != self._addresses:
            self._addresses, self._stacks = addresses, _stacks(weights)
        return self._stacks


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

    def of_stack(self, stack: _Stack) -> tuple[slice, torch.Tensor]:
        """The rows of some consecutive experts, and the ends of each one's among them, int32 on the device."""
        first, last = stack.first, stack.first + len(stack.weights)
        start, ends = self.start(first), self.ends_on_device
        if len(stack.weights) < len(self.ends):
            ends = ends[first:last] - start
        return slice(start, self.ends[last - 1]), ends


class _Stack(NamedTuple):
    """Weights of consecutive experts, which lie at equal distances in memory.

    Attributes:
        first: the first one's number among all.
        weights: [experts, out, in], where they are.
    """

    first: int
    weights: torch.Tensor


class _GroupedProduct(torch.autograd.Function):
    """Each group of rows times the transpose of its own weight. Weights that are to get gradients here follow the stacks."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, groups: _Groups, stacks: Sequence[_Stack], *weights: torch.Tensor
    ) -> torch.Tensor:
        """[rows, in] and [out, in] for each group to [rows, out]."""
        ctx.save_for_backward(rows)
        ctx.groups, ctx.stacks = groups, stacks
        return joined([
            _product(rows[part], stack.weights.transpose(1, 2), ends)
            for stack in stacks for part, ends in [groups.of_stack(stack)]
        ])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows and, where they are asked for, of weights."""
        rows, = ctx.saved_tensors
        groups, stacks, grad = ctx.groups, ctx.stacks, grad.contiguous()
        row_grads = joined([
            _product(grad[part], stack.weights, ends) for stack in stacks for part, ends in [groups.of_stack(stack)]
        ])
        wanted = any(ctx.needs_input_grad[3:])
        weight_grads = _weight_grads(grad, rows, groups, stacks) if wanted else [None] * len(ctx.needs_input_grad[3:])
        return row_grads, None, None, *weight_grads


@torch.no_grad()
def _weight_grads_of(
    stacks: Sequence[_Stack], parts: Sequence[tuple[torch.Tensor, torch.Tensor, _Groups]]
) -> list[torch.Tensor]:
    """``_weight_grads`` of the rows of several microbatches, whose gradients, rows and groups are a part each."""
    if len(parts) == 1:
        return _weight_grads(*parts[0], stacks)
    ends = torch.tensor([groups.ends for _, _, groups in parts]).sum(dim=0)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))

    def of_all(which: int) -> torch.Tensor:
        return torch.cat([part[which][part[2].rows_of(expert)] for expert in range(len(counts)) for part in parts])

    grad, rows = of_all(0), of_all(1)
    return _weight_grads(grad, rows, _Groups.of(counts, rows.device), stacks)


@torch.no_grad()
def _weight_grads(
    grad: torch.Tensor, rows: torch.Tensor, groups: _Groups, stacks: Sequence[_Stack]
) -> list[torch.Tensor]:
    """[rows, out] and [rows, in] to [out, in] for each group. The kernel may leave an empty group's as it found it."""
    weight_grads: list[torch.Tensor] = []
    for stack in stacks:
        part, ends = groups.of_stack(stack)
        weight_grads += (
            grouped_mm(grad[part].t(), rows[part], offs=ends) if grad[part].numel() else torch.empty_like(stack.weights)
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


def _stacks(weights: Sequence[torch.Tensor]) -> tuple[_Stack, ...]:
    """Divides the experts where their weights do not go on at the same distance: where a bucket of gradients ends."""
    addresses = [weight.data_ptr() for weight in weights]
    stacks, first = [], 0
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
        stacks.append(_Stack(first, weight.detach().as_strided((last - first, *weight.shape), (step, *weight.stride()))))
        first = last
    return tuple(stacks)
