"""CUDA graphs of what an attention rank computes between two transfers.

At 4096 tokens the attention, router and permutation of one layer are some ninety kernels that a GPU runs faster than Python
can queue them. Their shapes are the same for every microbatch (experts' are not), so they are captured once for each layer
and each microbatch that can be on the way at the same time, and then queued by one launch, forward and backward.

Around a graph everything stays: to autograd it is one function whose inputs are the layer's input and its weights, so
Megatron's nodes and the dispatcher find what they find without graphs. Gradients of weights are added to DDP's buffers inside
the graph, and DDP is told so as by Megatron's fused products (``grad_added_to_main_grad``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.mcore.attention import LayerTasks, ModelTasks
from megatron_hetermoe.mcore.dispatcher import DispatchState
from megatron_hetermoe.runtime.graphs import CudaGraphs, HostGraphs, Work
from megatron_hetermoe.schedule.orders import MemberSchedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream

FLAG = "--hetermoe-cuda-graphs"
WARM_UP = 2  # training steps without graphs: what is compiled or allocated at its first use is there then

# What a node's function reads of the microbatch; the same tensors for every microbatch, or None.
_CONTEXT = ("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "packed_seq_params", "sequence_len_offset")
_BALANCING = {"aux_loss", "seq_aux_loss", "none"}

# What a graph cannot do: whether the arguments ask for it, and the way out.
_OBSTACLES: tuple[tuple[str, Callable[[argparse.Namespace], object], str], ...] = (
    ("--transformer-impl other than local", lambda args: args.transformer_impl != "local", "use local"),
    ("tensor, context or pipeline parallelism", lambda args: max(
        args.tensor_model_parallel_size, args.context_parallel_size, args.pipeline_model_parallel_size) > 1,
     "set their sizes to 1"),
    ("dropout", lambda args: args.attention_dropout or args.hidden_dropout,
     "set --attention-dropout and --hidden-dropout to 0"),
    ("--recompute-granularity", lambda args: args.recompute_granularity is not None
     and (args.recompute_granularity == "full" or not {"moe", "moe_act"}.issuperset(args.recompute_modules or ())),
     "leave it out, or recompute moe or moe_act alone, which run on holders"),
    ("--overlap-param-gather", lambda args: args.overlap_param_gather, "leave it out"),
    ("--gradient-accumulation-fusion", lambda args: args.gradient_accumulation_fusion,
     "add --no-gradient-accumulation-fusion"),
    ("--moe-input-jitter-eps", lambda args: args.moe_input_jitter_eps, "leave it out"),
    ("--moe-router-force-load-balancing", lambda args: args.moe_router_force_load_balancing, "leave it out"),
    (f"--moe-router-load-balancing-type other than {', '.join(sorted(_BALANCING))}",
     lambda args: not _BALANCING.issuperset(_listed(args.moe_router_load_balancing_type)), "change it"),
    ("--reset-position-ids and --reset-attention-mask",
     lambda args: args.reset_position_ids or args.reset_attention_mask, "leave them out"),
    ("--mtp-num-layers", lambda args: args.mtp_num_layers, "leave it out"),
    ("--step-batch-size-schedule", lambda args: args.step_batch_size_schedule, "use --global-batch-size"),
)


def graph_problems(args: argparse.Namespace, problems: Problems) -> None:
    """Adds what keeps a run from having graphs."""
    for name, asked, way_out in _OBSTACLES:
        if asked(args):
            problems.add(f"{name} is not supported with {FLAG}: {way_out}, or leave {FLAG} out")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


class _CapturedState(DispatchState):
    """What the dispatcher leaves in a graph: the totals stay on the device, and are copied after each replay."""

    totals: torch.Tensor
    experts_of_holder: Sequence[int]

    def count(self, totals: torch.Tensor, experts_of_holder: Sequence[int]) -> None:
        self.totals, self.experts_of_holder = totals, experts_of_holder


class _StandIn:
    """In place of Megatron's node, whose function is captured: takes what it leaves on the node."""

    def __init__(self, chunk_state: SimpleNamespace):
        self.chunk_state = chunk_state
        self.layer_state = SimpleNamespace()

    def detach(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where Megatron cuts a node's autograd from the next one's: ``_Part`` does it when it has replayed."""
        return tensor


@dataclass(frozen=True)
class _Sample:
    """How a layer's function was called without a graph.

    Attributes:
        layer: Megatron's.
        function: of its node.
        context: of some microbatch, with the names of _CONTEXT.
        hidden: of the shape and type of the layer's input; its values are not used.
    """

    layer: torch.nn.Module
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    context: SimpleNamespace
    hidden: torch.Tensor

    def __call__(self, hidden: torch.Tensor, state: DispatchState) -> tuple[torch.Tensor, torch.Tensor, SimpleNamespace]:
        """Routed tokens, their probabilities, and what the function leaves on its node."""
        node = _StandIn(self.context)
        with self.layer.mlp.token_dispatcher.lent(state):
            tokens, probs = self.function(node, hidden)
        return tokens, probs, node.layer_state

    def parameters(self) -> list[torch.nn.Parameter]:
        """All but those of experts that this rank holds."""
        return [parameter for name, parameter in self.layer.named_parameters()
                if parameter.requires_grad and not name.startswith("mlp.experts.")]


class _Buffers:
    """Tensors that one replay fills and its caller has read before the next: one for each name and shape."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The buffer for tensors like this one."""
        key = name, tensor.shape, tensor.dtype
        if key not in self._tensors:
            self._tensors[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)
        return self._tensors[key]

    def filled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The buffer, with a tensor's values."""
        return self.like(name, tensor).copy_(tensor.detach())


class _Part:
    """One layer's function for one of the microbatches that are on the way together, as two graphs.

    The forwards of a slot share memory: from one layer's forward to its backward only later layers' forwards run there, which
    were captured later. Backwards, of which other slots' run in between, share other memory, where nothing stays.

    Args:
        sample: of the layer.
        slot: which of these microbatches.
        graphs: captures.
        buffers: of all parts.
    """

    def __init__(self, sample: _Sample, slot: int, graphs: HostGraphs | CudaGraphs, buffers: _Buffers):
        self._sample = sample
        self._buffers = buffers
        self._hidden = torch.empty_like(sample.hidden, requires_grad=True)
        self.parameters = sample.parameters()
        self._saved: list[torch.Tensor] = []
        self._results: tuple[torch.Tensor, ...] = ()
        self._state = _CapturedState()
        self._forward: Work = graphs.capture(self._run_forward, slot)
        self._backward: Work = graphs.capture(self._run_backward, "backward")
        if isinstance(graphs, CudaGraphs):
            # What the backward reads is held by _saved; routed tokens are in a buffer by now, and need not be.
            self._results = ()

    def _run_forward(self) -> None:
        self._saved = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept):
            tokens, probs, left = self._sample(self._hidden, self._state)
        self._left = {name: value for name, value in vars(left).items()
                      if isinstance(value, torch.Tensor) and value.requires_grad}
        self._constant = {name: value for name, value in vars(left).items() if name not in self._left}
        self._results = tokens, probs, *self._left.values()
        self._sent = self._buffers.filled("tokens", tokens), self._buffers.filled("probs", probs)
        self._result_grads = [self._buffers.like(f"gradient of {name}", result)
                              for name, result in zip(("tokens", "probs", *self._left), self._results)]

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._saved.append(tensor)
        return tensor

    def _run_backward(self) -> None:
        grad, *grads = torch.autograd.grad(
            self._results, (self._hidden, *self.parameters), self._result_grads, allow_unused=True)
        self._grad = self._buffers.filled("gradient", grad)
        self._used = [grad is not None for grad in grads]
        for parameter, grad in zip(self.parameters, grads):
            if grad is not None:
                parameter.main_grad.add_(grad)

    def __call__(
        self, state: DispatchState, awaited: bool, node: Any, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the function of Megatron's node ``pre_dispatch_computation``; ``awaited`` as of ``backward``."""
        tokens, probs, *left = _Replay.apply(self, awaited, hidden, *self.parameters)
        for name, value in zip(self._left, left):
            setattr(node.layer_state, name, node.detach(value))
        for name, value in self._constant.items():
            setattr(node.layer_state, name, value)
        state.rows, state.hidden_shape = self._state.rows, self._state.hidden_shape
        state.labels = self._state.labels.clone()  # as what else is sent
        state.count(self._state.totals, self._state.experts_of_holder)
        return tokens, probs

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Replays the forward: [sequence, batch, hidden] to routed tokens, probabilities and what is left on the node."""
        self._hidden.detach().copy_(hidden)
        self._forward()
        # Storage of what is sent is freed by whoever sends it.
        return *(sent.clone() for sent in self._sent), *(value.detach() for value in self._left.values())

    def backward(self, result_grads: Sequence[torch.Tensor], awaited: bool) -> list[torch.Tensor | None]:
        """Replays the backward: gradients of what forward returned to that of its input; those of weights are added.

        Args:
            result_grads: of what forward returned.
            awaited: DDP wants to see a gradient of each weight, whatever is in it, to know that it is ready.
        """
        for buffer, grad in zip(self._result_grads, result_grads):
            buffer.copy_(grad)
        self._backward()
        seen: list[torch.Tensor | None] = []
        for parameter, used in zip(self.parameters, self._used):
            parameter.grad_added_to_main_grad = used
            seen.append(torch.empty_like(parameter) if used and awaited else None)
        return [self._grad.clone(), *seen]  # the next task reads it after another replay


class _Replay(torch.autograd.Function):
    """A part to autograd."""

    @staticmethod
    def forward(
        ctx: Any, part: _Part, awaited: bool, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.part, ctx.awaited = part, awaited
        return part.forward(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.part.backward(grads, ctx.awaited)


class AttentionGraphs:
    """The graphs of one attention rank.

    Args:
        graphs: of the device.
    """

    def __init__(self, graphs: HostGraphs | CudaGraphs):
        self._graphs = graphs
        self._buffers = _Buffers()
        self._steps = 0
        self._slots = 0
        self._overlapped = False
        self._samples: dict[int, _Sample] = {}
        self._parts: dict[tuple[int, int], _Part] = {}

    def begin_step(self, member: MemberSchedule, overlapped: bool) -> None:
        """Before a training step's first task: captures what the step needs and is not there yet.

        Args:
            member: this rank's schedule.
            overlapped: DDP reduces gradients while others are computed.
        """
        self._steps += 1
        self._overlapped = overlapped
        self._slots = on_the_way(member)
        missing = [(layer, slot) for slot in range(self._slots) for layer in sorted(self._samples)
                   if (layer, slot) not in self._parts]
        if self._steps <= WARM_UP or not missing:
            return
        with self._graphs.capturing():
            for layer in dict.fromkeys(layer for layer, _ in missing):
                _run_once(self._samples[layer])
            for layer, slot in missing:
                self._parts[layer, slot] = _Part(self._samples[layer], slot, self._graphs, self._buffers)

    def attach(self, tasks: ModelTasks, layers: Sequence[int], microbatch: int) -> None:
        """Has a microbatch's nodes replay, or in the first steps show how they are called.

        Args:
            tasks: the microbatch's.
            layers: those with experts, from 1 on in this stage.
            microbatch: its number in the step.
        """
        for layer in layers:
            of_layer = tasks.layer(layer)
            node = of_layer.pre_dispatch_computation
            part = self._parts.get((layer, microbatch % self._slots))
            if part is not None:
                node.submodule = partial(part, of_layer.dispatch_state, self._overlapped)
            elif layer not in self._samples:
                node.submodule = partial(self._sampled, layer, of_layer, node.submodule)

    def _sampled(self, layer: int, tasks: LayerTasks, function: Callable[..., Any], node: Any, hidden: torch.Tensor) -> Any:
        context = SimpleNamespace(**{name: getattr(node.chunk_state, name) for name in _CONTEXT})
        self._samples[layer] = _Sample(tasks.layer, tasks.attend, context, torch.empty_like(hidden, requires_grad=False))
        return function(node, hidden)


def on_the_way(member: MemberSchedule) -> int:
    """The most microbatches that have begun and not ended at any time; they begin and end in one order."""
    most = now = 0
    for task in member.streams[Stream.COMPUTE]:
        if task.kind is Kind.ATTENTION and task.layer == 1:
            now += {Pass.FORWARD: 1, Pass.BACKWARD: -1}.get(task.direction, 0)
            most = max(most, now)
    return most


def _run_once(sample: _Sample) -> None:
    """Runs a layer's function and its backward where it will be captured: what a first run compiles or allocates is no
    part of a graph then."""
    with _counting_nothing(sample.layer), torch.enable_grad():
        hidden = torch.zeros_like(sample.hidden, requires_grad=True)
        tokens, probs, left = sample(hidden, _CapturedState())
        results = [tokens, probs, *(value for value in vars(left).values()
                                    if isinstance(value, torch.Tensor) and value.requires_grad)]
        torch.autograd.grad(results, (hidden, *sample.parameters()), [torch.zeros_like(one) for one in results],
                            allow_unused=True)


@contextmanager
def _counting_nothing(layer: torch.nn.Module) -> Iterator[None]:
    """Whatever routers count inside, for the log or the expert bias, is as before afterwards."""
    counted = [*layer.buffers(), *(entry.values for entry in get_moe_metrics_tracker().metrics.values())]
    before = [tensor.clone() for tensor in counted]
    yield
    for tensor, value in zip(counted, before):
        tensor.copy_(value)
