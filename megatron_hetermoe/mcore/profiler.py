"""Measures one kind of GPU (or the CPU): the tasks of attention and of experts, alone, as training runs them.

Modules, tasks, wrappers and optimizer are those of a training run; only the peers are missing. An attention rank's
tokens are answered at once with as many rows as it sent, a holder gets rows of balanced routing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.global_vars import set_global_variables

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import Flags
from megatron_hetermoe.config.plan import Plan
from megatron_hetermoe.cost.estimate import Seconds
from megatron_hetermoe.cost.profile import Points, Profile, taken_for
from megatron_hetermoe.cost.work import crossing_share
from megatron_hetermoe.mcore import gpt
from megatron_hetermoe.mcore.arguments import disaggregated_arguments, model_shape
from megatron_hetermoe.mcore.devices import capability_of, device_problems
from megatron_hetermoe.mcore.experts import experts_of
from megatron_hetermoe.mcore.graphs import AttentionGraphs
from megatron_hetermoe.mcore.implementation import choose_for_experts, engine_obstacle, is_installed
from megatron_hetermoe.mcore.numbers import Numbers
from megatron_hetermoe.mcore.platform import cpu
from megatron_hetermoe.mcore.pretrain import model_provider
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.tasks import AttentionTasks, ExpertTasks, StepInputs
from megatron_hetermoe.runtime.copies import Copies
from megatron_hetermoe.runtime.device import is_gpu
from megatron_hetermoe.runtime.graphs import graphs_for
from megatron_hetermoe.runtime.roll_call import started_here
from megatron_hetermoe.runtime.streams import Queued, streams_for
from megatron_hetermoe.runtime.transfers import Routed, SizesLater, Transfers, TransferSizes
from megatron_hetermoe.schedule.tasks import Kind, Pass, Stream, Task

LAYERS = 2  # of the model that is built: A tasks with an embedding, with none, and with the head
HELD = 8  # experts of a layer that are measured together, as a holder runs them
# Tasks are measured whole, whatever a recipe splits: the planner looks at no parallelism but of roles. What predicts further
# tokens is priced by the parts that it is made of.
_PLAIN = ("--tensor-model-parallel-size", "1", "--expert-tensor-parallel-size", "1",
          "--context-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--mtp-num-layers", "0")
_ATTENTION, _EXPERT = 0, 1  # ranks of the session, of which only one is there at a time
_WARM_UP = 2  # as many turns as attention is run without graphs
_LEAST = 1e-9  # seconds that a difference of two measurements may be
_CYCLES = 2.5e9  # that no GPU does in a second, with a quarter in reserve


class Measured(NamedTuple):
    """A task's seconds, forward and backward.

    Attributes:
        computed: on the device.
        queued: in which the host queued it; 0 where the host computes itself.
    """

    computed: Seconds
    queued: Seconds


@dataclass(frozen=True)
class Sizes:
    """What to measure at.

    Attributes:
        lengths: of sequences, in tokens, for attention, embedding and head.
        expert_tokens: that one expert gets.
        repeats: of which the median counts.
    """

    lengths: tuple[int, ...]
    expert_tokens: tuple[int, ...]
    repeats: int = 5


def arguments(rest: Sequence[str], flags: Flags, problems: Problems) -> tuple[argparse.Namespace, Plan]:
    """Megatron's arguments for LAYERS layers that all have experts, and a plan for them.

    The plan's first expert rank holds HELD experts of each layer, its second one, which is never there, the others.

    Args:
        rest: a recipe's command line without the ``--hetermoe`` flags; WORLD_SIZE must be 3.
        flags: the recipe's, for what they say of kernels.
        problems: what was found so far.

    Raises:
        UsageError: with all problems.
    """
    alone = Flags(enabled=True, attention_ranks=1, expert_ranks=2, attention=flags.attention, experts=flags.experts,
                  cuda_graphs=flags.cuda_graphs)
    args, plan = disaggregated_arguments(
        alone, [*rest, "--num-layers", str(LAYERS), "--moe-layer-freq", "1", *_PLAIN], problems)
    here = started_here(not cpu.needed(), args.local_rank, is_installed())
    for problem in device_problems(plan, args.add_bias_linear, args.transformer_impl, {_ATTENTION: here}):
        problems.add(problem)
    problems.raise_if_any()
    return args, _with_held(plan, HELD)


def _with_held(plan: Plan, held: int) -> Plan:
    """With so many experts of each layer on the first expert rank, if there are as many, and the others on the second."""
    layer = tuple(_EXPERT if expert < held else _EXPERT + 1 for expert in range(plan.model.experts))
    return replace(plan, placement=(layer,) * LAYERS)


def _apart(alone: Seconds, together: Seconds, held: int) -> tuple[Seconds, Seconds]:
    """Seconds of each expert of an E task, and of what the task takes beside them, forward and backward: the line through
    those of a task with one expert and of one with ``held``; where noise has it fall, experts are all that there is."""
    each = tuple((many - one) / (held - 1) if held > 1 and many > one else many / held for one, many in zip(alone, together))
    return each, tuple(max(0.0, many - held * one) for one, many in zip(each, together))


def _median(pairs: Sequence[Seconds]) -> Seconds:
    """Of forwards and of backwards."""
    return tuple(map(statistics.median, zip(*pairs)))


def measure(
    args: argparse.Namespace, plan: Plan, kind: str, sizes: Sizes, advance: Callable[[str], None], graphs: bool
) -> Profile:
    """Measures on this process's device.

    Args:
        args, plan: from ``arguments``, with the vocabulary's size in ``args.padded_vocab_size``.
        kind: name of what is measured.
        sizes: what to measure at.
        advance: told what comes next.
        graphs: attention will be queued by CUDA graphs, and is here.

    Returns:
        The profile: seconds of one sequence's attention, with and without recomputation of its core, of one expert,
        with and without that of its activation, of head and embedding, of the optimizer for a parameter; seconds in which the
        host queues these, alone in its process; on a GPU bytes of activations too.
    """
    device = _begin(args)
    shape = model_shape(args, Problems())
    assert shape is not None
    parts: dict[str, Points] = {}
    memory: dict[str, float] = {}
    host: dict[str, list[Seconds]] = {}
    args.recompute_granularity, args.recompute_modules = "selective", ["core_attn"]
    again = _Attention(args, plan, device, graphs=False)  # which recomputation does not go with
    args.recompute_granularity, args.recompute_modules = None, None
    attention = _Attention(args, plan, device, graphs)
    for length in sizes.lengths:
        advance(f"attention at {length:,} tokens")
        found = attention.measure(length, sizes.repeats)
        recomputed = again.measure(length, sizes.repeats)["attention"]
        # Attention is priced by the sequence, the others by the microbatch.
        for name, times in {**found, "attention_core_recomputed": recomputed}.items():
            sequences = args.micro_batch_size if "attention" in name else 1
            tokens = length * args.micro_batch_size / sequences
            parts.setdefault(name, {})[tokens] = tuple(seconds / sequences for seconds in times.computed)
            host.setdefault(name, []).append(times.queued)
    del again
    if attention.bytes_per_token:
        memory["attention_activation_per_token"] = attention.bytes_per_token
    experts, made_again = (_Experts(args, plan, device, attention.probs_dtype, again) for again in (False, True))
    alone = _Experts(args, _with_held(plan, 1), device, attention.probs_dtype, False)
    parts["expert"], parts["expert_activation_again"] = {}, {}
    beside: list[Seconds] = []
    for tokens in sizes.expert_tokens:
        advance(f"experts at {tokens:,} tokens each")
        together, again, single = (of.measure(tokens, sizes.repeats) for of in (experts, made_again, alone))
        each, task = _apart(single.computed, together.computed, experts.held)
        parts["expert"][float(tokens)] = each
        parts["expert_activation_again"][float(tokens)] = tuple(
            max(one, one + (longer - shorter) / experts.held)
            for one, longer, shorter in zip(each, again.computed, together.computed))
        beside.append(tuple(max(_LEAST, seconds) for seconds in task))
        for name, seconds in zip(("expert", "expert_task"), _apart(single.queued, together.queued, experts.held)):
            host.setdefault(name, []).append(seconds)
    if experts.bytes_per_row:
        memory["expert_activation_per_row"] = experts.bytes_per_row
        memory["expert_activation_again_per_row"] = made_again.bytes_per_row
    advance("optimizer")
    optimizer = _optimizer_seconds(args, [attention.model, experts.model], device, sizes.repeats)
    dist.destroy_process_group()
    return Profile(kind, taken_for(shape, plan.attention_precision), parts, optimizer, memory or None,
                   _median(beside), {name: _median(pairs) for name, pairs in host.items()})


def _begin(args: argparse.Namespace) -> torch.device:
    """A world of this process alone, and Megatron's globals."""
    args.tensorboard_dir, args.wandb_project, args.save, args.load = None, "", None, None
    args.world_size = args.data_parallel_size = 1
    torch.cuda.set_device(args.local_rank % torch.cuda.device_count())
    dist.init_process_group(args.distributed_backend, store=dist.HashStore(), rank=0, world_size=1)
    set_global_variables(args, build_tokenizer=False)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    torch.manual_seed(args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    return torch.device(torch.cuda.current_device())


class _Answered(Transfers):
    """Transfers of an attention rank whose holders are not there: the experts' outputs are its own tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._made: tuple[SizesLater, torch.Tensor, torch.Tensor] | None = None

    def route(
        self, task: Task, sizes: SizesLater, tokens: torch.Tensor, probs: torch.Tensor, labels: torch.Tensor
    ) -> None:
        self._made = sizes, tokens, probs

    def answer(self, task: Task) -> None:
        """What D and C tasks would bring before the next A task; waits until sizes are known, as a D task does."""
        sizes, *made = self._made
        routed = self.owned[task.layer, task.microbatch] = Routed(sizes(), *made)
        self._made = None
        routed.outputs = routed.tokens[:routed.rows].clone()
        routed.tokens.untyped_storage().resize_(0)

    def answer_backward(self, task: Task) -> None:
        """The same before an A task's backward."""
        routed = self.owned[task.layer, task.microbatch]
        grads = routed.output_grads
        routed.token_grads = grads.new_zeros(routed.made_rows, grads.shape[1])
        routed.token_grads[:routed.rows] = grads
        routed.prob_grads = torch.zeros_like(routed.probs)
        routed.output_grads = routed.probs = routed.tokens = None


class _Clock:
    """Runs tasks one by one on the compute stream, and collects their seconds.

    On a GPU a task is run both ways: queued before the GPU begins it, as in a step where other microbatches' tasks are before
    it, so that the GPU never waits for the host and its own seconds are all that counts; and with a GPU that waits, so that the
    host never waits for the GPU. The GPU is kept no longer than queueing takes: ranks that share one, and are profiled together,
    are to be in each other's way as when they train.

    Args:
        device: to run on.
    """

    def __init__(self, device: torch.device):
        self._computed: dict[tuple[int, Pass], list[float]] = {}
        self._queued: dict[tuple[int, Pass], list[float]] = {}
        self._streams = streams_for(device, self._observe)
        self._is_gpu = is_gpu(device)
        self._ahead = self._counts = False

    def turns(self, repeats: int) -> Iterator[None]:
        """The turns in which all tasks are to be run, of which the first ones do not count."""
        for _ in range(_WARM_UP):
            yield
        self._counts = True
        for self._ahead in (False, True) if self._is_gpu else (False,):
            for _ in range(repeats):
                yield

    def _observe(self, stream: Stream, task: Task, start: float, end: float, queued: Queued) -> None:
        key = task.layer, task.direction
        if self._counts and self._ahead == self._is_gpu:
            self._computed.setdefault(key, []).append(end - start)
        if self._counts and not self._ahead:
            began, ended = queued or (0.0, 0.0)
            self._queued.setdefault(key, []).append(ended - began)

    def run(self, task: Task, call: Callable[[Task], None]) -> None:
        if self._ahead:
            self._streams.tie_clocks()  # which waits for the GPU, so it comes before what keeps the GPU
            torch.cuda._sleep(round(_CYCLES * max(self._queued[task.layer, task.direction])))
        with self._streams.task(Stream.COMPUTE, task, ()):
            call(task)

    def finish(self) -> None:
        self._streams.finish()

    def median(self, layer: int) -> Measured:
        """Of a layer's task."""
        return Measured(*(
            tuple(statistics.median(seconds[layer, way]) for way in (Pass.FORWARD, Pass.BACKWARD))
            for seconds in (self._computed, self._queued)))


class _Part:
    """One role's model, wrapped as for training, and a step's inputs for its tasks."""

    rank: int

    def __init__(self, args: argparse.Namespace, plan: Plan, device: torch.device, activation_again: bool = False):
        self.args, self.device = args, device
        # No member is there to send to, so there are no channels and no control group.
        able = engine_obstacle(capability_of(device), is_installed()) is None
        impl = choose_for_experts(plan, args.transformer_impl, activation_again, able, None)
        self.session = Session(
            plan, self.rank, None, None, None, device, activation_again=activation_again, expert_impl=impl)
        (self.model,) = training.get_model(model_provider(gpt_config_from_args(args), args.seed, self.session))
        self.config = get_model_config(self.model)

    def inputs(self, data: Iterator[Any] | None, graphs: AttentionGraphs | None = None) -> StepInputs:
        # Two microbatches, of which the first is run: gradients are added up and not reduced.
        return StepInputs(
            unwrap_model(self.model), self.config, self.session.schedule(2, False), gpt.forward_step, data,
            self.model.no_sync, False, False, graphs=graphs,
        )


class _Attention(_Part):
    """The A tasks.

    Attributes:
        bytes_per_token: activations that a layer keeps of a token, of the longest sequence, since blocks of small tensors are
            rounded up; 0 where memory cannot be asked.
        probs_dtype: in which the router gives probabilities.
    """

    rank = _ATTENTION
    _kept = (0, 0.0)  # tokens, bytes of each
    probs_dtype = torch.float32

    def __init__(self, args: argparse.Namespace, plan: Plan, device: torch.device, graphs: bool):
        super().__init__(args, plan, device)
        self._graphs = graphs

    def measure(self, length: int, repeats: int) -> dict[str, Measured]:
        """The parts of a microbatch."""
        self.args.seq_length = length
        clock = _Clock(self.device)
        transfers = self.session.transfers(self.config.hidden_size, _Answered)
        graphs = AttentionGraphs(graphs_for(self.device)) if self._graphs else None
        for _ in clock.turns(repeats):
            inputs = self.inputs(self._batches(length), graphs)
            if graphs is not None:
                graphs.begin_step(inputs.schedule.member(_ATTENTION), overlapped=False)
            table = AttentionTasks(inputs, 1, LAYERS, transfers, Numbers(self.session, False)).table()
            self._step(clock, table, transfers, length)
            self.model.zero_grad_buffer()
        first, middle, head = (clock.median(layer) for layer in range(1, LAYERS + 2))
        # A_1 is the embedding and what every A task does, but for the sum that ends the layer before, which A_2 has.
        embedding = Measured(*(tuple(max(least, one - other) for one, other in zip(*pairs))
                               for least, *pairs in zip((_LEAST, 0.0), first, middle)))
        return {"attention": middle, "head": head, "embedding": embedding}

    def _step(self, clock: _Clock, table: Any, transfers: _Answered, length: int) -> None:
        tasks = [Task(Kind.ATTENTION, Pass.FORWARD, layer, 0) for layer in range(1, LAYERS + 2)]
        kept = []
        for task in tasks:
            clock.run(task, table[Kind.ATTENTION, Pass.FORWARD])
            if task.layer <= LAYERS:
                transfers.answer(task)
                self.probs_dtype = transfers.owned[task.layer, 0].probs.dtype
                kept.append(_allocated())
        for task in reversed(tasks):
            task = replace(task, direction=Pass.BACKWARD)
            if task.layer <= LAYERS:
                transfers.answer_backward(task)
            clock.run(task, table[Kind.ATTENTION, Pass.BACKWARD])
        clock.finish()
        tokens = length * self.args.micro_batch_size
        self._kept = max(self._kept, (tokens, (kept[1] - kept[0]) / tokens))

    @property
    def bytes_per_token(self) -> float:
        return self._kept[1]

    def _batches(self, length: int) -> Iterator[dict[str, torch.Tensor | None]]:
        shape = (self.args.micro_batch_size, length)
        tokens = torch.randint(0, self.args.padded_vocab_size - 1, shape)
        positions = torch.arange(length).expand(shape)
        mask = torch.ones(1, 1, length, length).tril() < 0.5 if self.args.create_attention_mask_in_dataloader else None
        while True:
            yield {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape),
                   "position_ids": positions, "attention_mask": mask}


class _Experts(_Part):
    """The E tasks of a holder.

    Attributes:
        bytes_per_row: what is kept for a row of an expert until its backward, of most rows; 0 where memory cannot be asked.
    """

    rank = _EXPERT
    _kept = (0, 0.0)  # rows, bytes of each

    def __init__(
        self, args: argparse.Namespace, plan: Plan, device: torch.device, probs_dtype: torch.dtype, activation_again: bool
    ):
        super().__init__(args, plan, device, activation_again)
        self._probs_dtype = probs_dtype

    def measure(self, tokens: int, repeats: int) -> Measured:
        """An E task with that many tokens for each expert."""
        clock = _Clock(self.device)
        for _ in clock.turns(repeats):
            self._step(clock, tokens)
            self.model.zero_grad_buffer()
        return clock.median(1)

    @property
    def bytes_per_row(self) -> float:
        return self._kept[1]

    @property
    def held(self) -> int:
        """Experts of the layer."""
        return len(self.session.held(1))

    def _step(self, clock: _Clock, tokens: int) -> None:
        copies, hidden, model = tokens * self.held, self.config.hidden_size, self.session.plan.model
        rows = max(tokens, round(tokens * model.experts / model.topk * crossing_share(model, self.held)))
        source = torch.arange(copies, dtype=torch.int32, device=self.device) % rows
        transfers = self.session.transfers(hidden)
        inputs = self.inputs(None)
        table = ExpertTasks(inputs, transfers, partial(experts_of, inputs.model)).table()
        before = _allocated()
        task = Task(Kind.EXPERT, Pass.FORWARD, 1, 0)
        given = torch.randn(rows, hidden, dtype=self.session.wire_dtype, device=self.device)
        probs = torch.full((copies,), 1 / self.config.moe_router_topk, dtype=self._probs_dtype, device=self.device)
        sizes = TransferSizes([rows], [[tokens] * self.held])
        routed = transfers.held[1, 0] = Routed(sizes, given, probs, copies=Copies.of(source, rows))
        del given, probs
        clock.run(task, table[Kind.EXPERT, Pass.FORWARD])
        routed.outputs.untyped_storage().resize_(0)  # as when a C task has sent them
        routed.outputs = None
        self._kept = max(self._kept, (copies, (_allocated() - before) / copies))
        routed.output_grads = torch.randn(rows, hidden, dtype=self.session.wire_dtype, device=self.device)
        clock.run(replace(task, direction=Pass.BACKWARD), table[Kind.EXPERT, Pass.BACKWARD])
        clock.finish()


def _allocated() -> float:
    """Bytes of tensors on the GPU; 0 on the CPU."""
    return float(torch.cuda.memory_allocated()) if is_gpu(torch.device(torch.cuda.current_device())) else 0.0


def _optimizer_seconds(
    args: argparse.Namespace, models: Sequence[Any], device: torch.device, repeats: int
) -> float:
    """Seconds a parameter of one optimizer step."""
    config, _ = training.get_megatron_optimizer_config(args)
    config.timers = None
    optimizer = training.get_megatron_optimizer(config, list(models), use_gloo_process_groups=False)
    seconds: list[float] = []
    streams = streams_for(device, lambda stream, task, start, end, queued: seconds.append(end - start))
    for _ in range(_WARM_UP + repeats):
        with streams.task(Stream.COMPUTE, Task(Kind.EXPERT, Pass.FORWARD, 1, 0), ()):
            optimizer.step()
        streams.finish()
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    return statistics.median(seconds[_WARM_UP:]) / parameters
