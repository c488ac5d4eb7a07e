"""What A and E tasks do: walk Megatron's nodes on attention ranks, run experts on holders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss, set_current_microbatch
from megatron.core.tensor_parallel.mappings import all_to_all

from megatron_hetermoe.mcore.attention import ModelTasks, PlanningModel
from megatron_hetermoe.mcore.experts import HeldExperts
from megatron_hetermoe.mcore.graphs import AttentionGraphs
from megatron_hetermoe.mcore.load import Load
from megatron_hetermoe.mcore.numbers import Numbers
from megatron_hetermoe.mcore.recompute import experts_again, rerun
from megatron_hetermoe.mcore.weights import WeightGradients
from megatron_hetermoe.runtime.copies import Copies, by_expert
from megatron_hetermoe.runtime.executor import Table
from megatron_hetermoe.runtime.handover import Handover
from megatron_hetermoe.runtime.transfers import TransferSizes, Transfers
from megatron_hetermoe.schedule.orders import Schedule
from megatron_hetermoe.schedule.tasks import Kind, Pass, Task


@dataclass
class StepInputs:
    """What Megatron's training loop hands to a schedule for one step, as far as tasks need it.

    Attributes:
        model: this rank's, or a chunk of it, unwrapped.
        config: the transformer's, with the loop's callbacks.
        schedule: of the ZP group.
        forward_step: the user's.
        data_iterator: of this rank, for this chunk; None on expert ranks.
        no_sync: keeps DDP from reducing this chunk's gradients; None where nothing is reduced in the backward.
        forward_only: evaluation.
        collect_non_loss_data: passed through to the loss function.
        delayed: what B tasks leave to W tasks; None without these.
        graphs: of an attention rank in training; None without them.
    """

    model: Any
    config: Any
    schedule: Schedule
    forward_step: Callable[..., Any]
    data_iterator: Iterator[Any] | None
    no_sync: Callable[[], AbstractContextManager[None]] | None
    forward_only: bool
    collect_non_loss_data: bool
    delayed: WeightGradients | None = None
    graphs: AttentionGraphs | None = None

    @property
    def microbatches(self) -> int:
        return self.schedule.last_microbatch + 1

    def gradient_sync(self, task: Task) -> AbstractContextManager[None]:
        """Gradients may be reduced during a layer's last backward only; DDP's hooks fire for each microbatch."""
        if self.no_sync is None or task.microbatch == self.schedule.last_microbatch:
            return nullcontext()
        return self.no_sync()

    @contextmanager
    def backward_of(self, task: Task) -> Iterator[None]:
        """What a backward task runs in."""
        with self.gradient_sync(task), self.delayed.left_by(task) if self.delayed else nullcontext():
            yield

    def weights(self, task: Task) -> None:
        """A W task."""
        with self.gradient_sync(task):
            self.delayed.run(self.schedule.left_to(task))


@dataclass
class _Microbatch:
    """One microbatch on an attention rank.

    Attributes:
        tasks: Megatron's nodes.
        loss_function: what the user's forward_step returned beside the model's output.
        hidden: output of a dense layer's first part, until its end.
        grad: gradient on its way back to the next A task, where no transfer carries it.
        output, loss: of the head, until its backward.
    """

    tasks: ModelTasks
    loss_function: Callable[..., Any]
    hidden: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    output: torch.Tensor | None = None
    loss: torch.Tensor | None = None


@dataclass
class AttentionTasks:
    """The A tasks of one step, of one chunk of the model.

    Attributes:
        inputs: from the training loop.
        first: the number in tasks of the chunk's first layer.
        layers: that it has.
        transfers: this member's.
        numbers: shown what goes to experts and comes back.
        handover: this member's, to and from the stages beside this one; None where there is one stage.
        load: shown how many tokens go to each expert, in a step that is looked at.
        losses: for each microbatch, what the loss function reports, in the order of the heads.
        tokens: those that count in the loss, int.
    """

    inputs: StepInputs
    first: int
    layers: int
    transfers: Transfers
    numbers: Numbers
    handover: Handover | None = None
    load: Load | None = None
    losses: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = torch.zeros([], dtype=torch.int, device=self.transfers.device)
        self._microbatches: dict[int, _Microbatch] = {}
        self._planning_model = PlanningModel(self.inputs.model)
        self._begins, self._ends = self.inputs.model.pre_process, self.inputs.model.post_process
        self._end = self.first + self.layers
        self._moe_layers = self.inputs.schedule.moe_layers

    def table(self) -> Table:
        """What the executor calls for A tasks."""
        return {
            (Kind.ATTENTION, Pass.FORWARD): self._forward, (Kind.ATTENTION, Pass.BACKWARD): self._backward,
            (Kind.ATTENTION, Pass.WEIGHT): self.inputs.weights,
        }

    def _forward(self, task: Task) -> None:
        set_current_microbatch(self.inputs.model, task.microbatch)
        if task.layer == self.first:
            microbatch, hidden = self._begin(task)
        else:
            microbatch = self._microbatches[task.microbatch]
            hidden = self._end_layer(task.layer - 1, task.microbatch)
        if task.layer == self._end:
            if self._ends:
                self._head(microbatch, hidden)
            else:
                self._leave_stage(task, hidden)
            if self.inputs.forward_only:
                del self._microbatches[task.microbatch]
            return
        layer = microbatch.tasks.layer(task.layer - self.first + 1)
        result = layer.pre_dispatch_computation.forward(hidden)
        if not layer.has_experts:
            microbatch.hidden = result
            return
        tokens, probs = result
        self.numbers.sent(task.layer, task.microbatch, tokens)
        tokens = _sent_as(tokens, self.transfers.dtype)
        state = layer.dispatch_state
        self.transfers.route(task, state.sizes, tokens, probs.detach(), state.labels)

    def _begin(self, task: Task) -> tuple[_Microbatch, torch.Tensor]:
        """Reads the microbatch, makes its nodes and runs the embedding, or takes what the stage before has made of it."""
        if not self._begins:
            hidden = self.handover.take(task).requires_grad_(not self.inputs.forward_only)
            self.inputs.model.set_input_tensor([hidden])
        tasks, loss_function = self.inputs.forward_step(self.inputs.data_iterator, self._planning_model)
        tasks.record_current_stream()
        if self.inputs.graphs is not None:
            self.inputs.graphs.attach(tasks, self._moe_layers, task.microbatch)
        microbatch = self._microbatches[task.microbatch] = _Microbatch(tasks, loss_function)
        return microbatch, tasks.pre_process.forward()

    def _end_layer(self, layer: int, number: int) -> torch.Tensor:
        """The end of a layer: combine's sum and residual, or the dense feed-forward part."""
        microbatch = self._microbatches[number]
        if layer in self._moe_layers:
            routed = self.transfers.owned[layer, number]
            self.numbers.came(layer, number, routed)
            if self.load is not None:
                self.load.note(layer, routed.sizes.counts)
            outputs, routed.outputs, routed.labels = routed.outputs.to(self.inputs.config.params_dtype), None, None
            if self.inputs.forward_only:
                del self.transfers.owned[layer, number]
            else:
                outputs.requires_grad_()
        else:
            outputs, microbatch.hidden = microbatch.hidden, None
        return microbatch.tasks.layer(layer - self.first + 1).end.forward(outputs)

    def _leave_stage(self, task: Task, hidden: torch.Tensor) -> None:
        """What stands for the head where another stage follows: the hidden states go there. Routers' losses are scaled."""
        inputs = self.inputs
        if inputs.config.timers is not None:
            inputs.config.timers("forward-compute", log_level=2).start()  # forward_step_calc_loss stops it
        forward_step_calc_loss(
            inputs.model, hidden, None, inputs.config, None, inputs.collect_non_loss_data, inputs.microbatches, [],
            cp_group_size=inputs.config.context_parallel_size, is_last_stage=False,
        )
        self.handover.give(task, hidden.detach())

    def _head(self, microbatch: _Microbatch, hidden: torch.Tensor) -> None:
        """Output layer and loss. The loss starts from a leaf, so that its gradient can be handed to the node."""
        inputs = self.inputs
        output = microbatch.tasks.post_process.forward(hidden).detach()
        microbatch.output = output.requires_grad_(not inputs.forward_only)
        if inputs.config.timers is not None:
            inputs.config.timers("forward-compute", log_level=2).start()  # forward_step_calc_loss stops it
        microbatch.loss, tokens = forward_step_calc_loss(
            inputs.model, microbatch.output, microbatch.loss_function, inputs.config, None,
            inputs.collect_non_loss_data, inputs.microbatches, self.losses,
            cp_group_size=inputs.config.context_parallel_size, is_last_stage=True,
        )
        self.tokens += tokens

    def _backward(self, task: Task) -> None:
        with self.inputs.backward_of(task):
            microbatch = self._microbatches[task.microbatch]
            if task.layer == self._end:
                grad = self._head_backward(microbatch) if self._ends else self.handover.take(task)
            else:
                grad = self._layer_backward(task, microbatch)
            if task.layer > self.first:
                self._end_layer_backward(task.layer - 1, task.microbatch, microbatch, grad)
            else:
                if self._begins:
                    microbatch.tasks.pre_process.backward(grad)
                else:
                    self.handover.give(task, grad)
                microbatch.tasks.release_state()
                del self._microbatches[task.microbatch]

    def _head_backward(self, microbatch: _Microbatch) -> torch.Tensor:
        loss, microbatch.loss = microbatch.loss, None
        if self.inputs.config.grad_scale_func is not None:
            loss = self.inputs.config.grad_scale_func(loss)
        torch.autograd.backward(loss)
        grad, microbatch.output = microbatch.output.grad, None
        return microbatch.tasks.post_process.backward(grad)

    def _layer_backward(self, task: Task, microbatch: _Microbatch) -> torch.Tensor:
        """Attention and router; returns the gradient of the layer's input."""
        layer = microbatch.tasks.layer(task.layer - self.first + 1)
        if layer.has_experts:
            routed = self.transfers.owned.pop((task.layer, task.microbatch))
            token_grads = routed.token_grads.to(self.inputs.config.params_dtype)
            grad = layer.pre_dispatch_computation.backward((token_grads, routed.prob_grads))
        else:
            grad, microbatch.grad = microbatch.grad, None
            grad = layer.pre_dispatch_computation.backward(grad)
        layer.release_state()
        return grad

    def _end_layer_backward(self, layer: int, number: int, microbatch: _Microbatch, grad: torch.Tensor) -> None:
        """The end of the layer before; what it returns is the experts' to continue with, where there are some."""
        grad = microbatch.tasks.layer(layer - self.first + 1).end.backward(grad)
        if layer in self._moe_layers:
            self.transfers.owned[layer, number].output_grads = grad.to(self.transfers.dtype)
        else:
            microbatch.grad = grad


@dataclass
class ExpertTasks:
    """The E tasks of one step, on any rank that holds experts.

    Attributes:
        inputs: from the training loop.
        transfers: this member's.
        experts: those that this rank holds of a layer, by layer from 1 on in the chunk.
        first: the number in tasks of the chunk's first layer.
    """

    inputs: StepInputs
    transfers: Transfers
    experts: Callable[[int], HeldExperts]
    first: int = 1

    def __post_init__(self) -> None:
        # Of each forward: tokens and probabilities, which get gradients, and outputs.
        self._forwards: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def table(self) -> Table:
        """What the executor calls for E tasks."""
        return {
            (Kind.EXPERT, Pass.FORWARD): self._forward, (Kind.EXPERT, Pass.BACKWARD): self._backward,
            (Kind.EXPERT, Pass.WEIGHT): self.inputs.weights,
        }

    def _forward(self, task: Task) -> None:
        """Runs the experts; without a token too, since gradients of all experts are reduced together."""
        routed = self.transfers.held[task.layer, task.microbatch]
        experts = self.experts(task.layer - self.first + 1)
        run = partial(_run_shared, experts, routed.sharers, routed.copies)
        again = experts_again(self.inputs.config, task.layer - self.first + 1)
        if again:
            run = partial(rerun, run)
        wants_grad = not self.inputs.forward_only
        tokens, probs = routed.tokens.to(experts.dtype).requires_grad_(wants_grad), routed.probs.requires_grad_(wants_grad)
        outputs = run(tokens, probs)
        if not again:  # experts keep copies of what came
            tokens.untyped_storage().resize_(0)
            probs.untyped_storage().resize_(0)
        routed.outputs = _sent_as(outputs, self.transfers.dtype)
        routed.tokens = routed.probs = routed.copies = None
        if wants_grad:
            self._forwards[task.layer, task.microbatch] = tokens, probs, outputs

    def _backward(self, task: Task) -> None:
        routed = self.transfers.held[task.layer, task.microbatch]
        tokens, probs, outputs = self._forwards.pop((task.layer, task.microbatch))
        grads, routed.output_grads = routed.output_grads.to(self.experts(task.layer - self.first + 1).dtype), None
        with self.inputs.backward_of(task):
            torch.autograd.backward(outputs, grads)
        routed.token_grads, routed.prob_grads = tokens.grad.to(self.transfers.dtype), probs.grad


def _sent_as(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A node's result in the precision in which it is sent. Where that is a copy, the result's storage is freed: from
    here on its shape is read only, by the backward of what made it."""
    sent = result.detach().to(dtype)
    if sent.dtype != result.dtype:
        result.untyped_storage().resize_(0)
    return sent


def _run_shared(
    experts: HeldExperts, sharers: Sequence[TransferSizes], copies: Copies, tokens: torch.Tensor, probs: torch.Tensor
) -> torch.Tensor:
    """Experts of which each of the ranks that are one holder has a part.

    Every rank runs its part on the tokens of all. What the parts make of a token are addends, which go back to the rank
    that has received the token. What is sent for that, and the addends, stay inside the expert pool; between the pools, where
    the network is slow, each token crosses once each way. A rank sends as much as in a ring; sums are in one order.

    Args:
        experts: this holder's.
        sharers, copies: as in ``Routed``.
        tokens: [rows, hidden], those that this rank has received.
        probs: [copies], of these.

    Returns:
        [rows, hidden], in the order of ``tokens``.
    """
    counts = [of_owner for of_sharer in sharers for of_owner in of_sharer.counts]
    if len(sharers) == 1:
        return _run_copies(experts, counts, copies, tokens, probs)
    group, shape, ranks = experts.tp_group, tokens.shape, len(sharers)
    rows, sent = [sum(of_sharer.rows) for of_sharer in sharers], [len(tokens)] * ranks
    # The backward of sending the same to all is a sum, that of a sum sending the same to all.
    tokens = all_to_all(group, tokens.repeat(ranks, 1), rows, sent)
    probs = all_to_all(group, probs.repeat(ranks), [sum(of_sharer.copies) for of_sharer in sharers], [len(probs)] * ranks)
    outputs = _run_copies(experts, counts, copies, tokens, probs)
    return all_to_all(group, outputs, sent, rows).view(ranks, *shape).sum(dim=0)


def _run_copies(
    experts: HeldExperts, counts: Sequence[Sequence[int]], copies: Copies, tokens: torch.Tensor, probs: torch.Tensor
) -> torch.Tensor:
    """Experts on a copy of each row for each of them that it goes to.

    Args:
        experts: this holder's.
        counts: copies of each owner for each expert, [owners][experts].
        copies: of the rows.
        tokens: [rows, hidden].
        probs: [copies], by owner, then by expert; they are multiplied inside the experts.

    Returns:
        [rows, hidden], for each row the sum over its experts.
    """
    order = experts.row_order
    outputs, _ = experts(
        copies.expanded(tokens), torch.tensor(counts).sum(dim=0)[list(order)], by_expert(probs, counts, order))
    return copies.summed(outputs)
