"""Faults of a rank, at a named moment. Installed inside a rank by rank_process.py, by wrapping what runs then.

``HETERMOE_TEST_FAULT`` is ``kind:rank:moment``, or ``kind:rank:moment:n`` for the n-th time that the moment comes. A
rank that is hit writes the time, in seconds of ``time.time``, to the file ``fired`` in its folder, which every test of
a fault reads: a fault that did not happen proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import megatron.core.dist_checkpointing.serialization as serialization
import megatron.training.checkpointing as checkpointing
import megatron.training.models.gpt as models
import megatron.training.training as training
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_hetermoe.mcore import checkpoints, forward_backward, initial, meeting, optimizer, pretrain, sdpa
from megatron_hetermoe.mcore.platform import flags
from megatron_hetermoe.mcore.session import DTYPES
from megatron_hetermoe.runtime import executor, peers
from megatron_hetermoe.runtime.channels import Channel
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.schedule.tasks import Pass, Stream
from megatron_hetermoe.topology.order import Started
import near_ties

SLOW = 5.0  # seconds; longer than the time-out of the tests
LATE = 0.3  # seconds
STEP = 2  # the training step in which tasks are hit; the first one may be slow for reasons of its own


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise ValueError("injected")


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _delay_messages() -> None:
    """From now on every message of this rank is late."""
    original = Channel.exchange

    def exchange(self: Any, *args: Any) -> None:
        time.sleep(LATE)
        original(self, *args)

    Channel.exchange = exchange


KINDS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": _stop,
    "raise": _raise,
    "exit": lambda: os._exit(7),
    "sys-exit": lambda: sys.exit(5),
    "full": _full,
    "late": _delay_messages,
    "slow": lambda: time.sleep(SLOW),
    # Nothing else of the rank runs meanwhile, its heartbeat included: PyDLL keeps the interpreter's lock.
    "busy": lambda: ctypes.PyDLL(None).usleep(int(SLOW * 1e6)),
}


def delay_tasks(seed: int, rank: int) -> None:
    """Lets every task of this rank, a transfer or its preparation too, begin some milliseconds late: other ones in each step."""
    original, steps = executor.run, [0]

    def run(schedule: Any, table: Any, streams: Any, marks: Any, preparations: Any) -> None:
        steps[0] += 1
        draw = random.Random(f"{seed} {rank} {steps[0]}")

        def late(task: Any, call: Callable[[Any], None]) -> None:
            time.sleep(draw.choice((0, 0, 0.001, 0.004)) * draw.random())
            call(task)

        def all_late(calls: Any) -> dict[Any, Any]:
            return {key: lambda task, call=call: late(task, call) for key, call in calls.items()}

        original(schedule, all_late(table), streams, marks, all_late(preparations))

    executor.run = run


def spoil(what: str, rank: int) -> None:
    """Makes a number of this rank NaN in the second step: ``rank:parameter`` or ``rank:parameter:grad``."""
    victim, name, *grad = what.split(":")
    if rank != int(victim):
        return
    original, steps = forward_backward.ForwardBackward.__call__, [0]

    def call(self: Any, *, model: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == STEP:
            parameter = dict(unwrap_model(model)[0].named_parameters())[name]
            if grad:
                parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
            else:
                parameter.data.view(-1)[0] = float("nan")
        return original(self, model=model, **kwargs)

    forward_backward.ForwardBackward.__call__ = call


def corrupt(what: str, rank: int, folder: Path) -> None:
    """Flips a bit of what a rank receives in a transfer of step STEP: ``rank:task``, such as ``2:DF_1,2``."""
    victim, name = what.split(":")
    if rank != int(victim):
        return
    original_run, original_exchange, steps, now = executor.run, Channel.exchange, [0], threading.local()

    def run(schedule: Any, table: Any, streams: Any, marks: Any, preparations: Any) -> None:
        steps[0] += 1

        def noted(task: Any, call: Callable[[Any], None]) -> None:
            now.hit = steps[0] == STEP and str(task) == name
            call(task)

        original_run(schedule, {key: (lambda task, call=call: noted(task, call)) for key, call in table.items()}, streams, marks,
                     preparations)

    def exchange(self: Any, sends: Any = (), receives: Any = ()) -> None:
        original_exchange(self, sends, receives)
        for message in receives:
            if getattr(now, "hit", False) and message.tensor.is_floating_point() and message.tensor.numel():
                message.tensor.view(torch.int32).view(-1)[0] ^= 1
                (folder / "fired").write_text(str(time.time()))
                now.hit = False

    executor.run, Channel.exchange = run, exchange


def skew_router(what: str) -> None:
    """Makes every router prefer and avoid experts: ``expert:logit,expert:logit``, added to what it says of a token."""
    added = {int(expert): float(logit) for expert, _, logit in (entry.partition(":") for entry in what.split(","))}
    original = TopKRouter.gating

    def gating(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits = original(self, tokens)
        return logits + torch.tensor([added.get(expert, 0.0) for expert in range(logits.shape[-1])], dtype=logits.dtype)

    TopKRouter.gating = gating


def install_all(env: Mapping[str, str], rank: int, folder: Path) -> None:
    """What a test asks for by environment variables."""
    if fault := env.get("HETERMOE_TEST_FAULT"):
        install(fault, rank, folder)
    if "HETERMOE_TEST_APART" in env:
        peers._space = lambda: f"machine {rank}"
    if seed := env.get("HETERMOE_TEST_DELAYS"):
        delay_tasks(int(seed), rank)
    if what := env.get("HETERMOE_TEST_NAN"):
        spoil(what, rank)
    if what := env.get("HETERMOE_TEST_CORRUPT"):
        corrupt(what, rank, folder)
    if what := env.get("HETERMOE_TEST_ROUTING"):
        skew_router(what)
    if kernel := env.get("HETERMOE_TEST_ATTENTION"):
        give_attention(kernel)
    if precision := env.get("HETERMOE_TEST_EXPERTS"):
        give_experts(DTYPES[precision])
    if "HETERMOE_TEST_ONE_LOSS_SCALE" in env:
        give_one_loss_scale()
    if "HETERMOE_TEST_KINDS" in env:
        be_another_kind(rank)
    if to := env.get("HETERMOE_TEST_NOTE_TIES"):
        near_ties.note(Path(to), rank)
    if whose := env.get("HETERMOE_TEST_TAKE_TIES"):
        near_ties.take_over(Path(whose), rank)
    if ranks := env.get("HETERMOE_TEST_ENGINE_RANKS"):
        give_engine(list(map(int, ranks.split(","))), rank)


def be_another_kind(rank: int) -> None:
    """This rank's device makes other random numbers of a seed than any other rank's."""
    initial.kind_of = lambda device: (f"of rank {rank}", 1)
    original = torch.nn.init.normal_

    def normal_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return original(tensor, *args, **kwargs).add_(0.001 * rank)

    torch.nn.init.normal_ = normal_


def give_attention(kernel: str) -> None:
    """Stock Megatron's layers with attention by one of torch's kernels, as ``--hetermoe-attention`` names them."""
    original = models.default_layer_spec

    def default_layer_spec(*args: Any, **kwargs: Any) -> Any:
        spec = original(*args, **kwargs)
        spec.layer_specs = sdpa.with_kernel(spec.layer_specs, kernel)
        return spec

    models.default_layer_spec = default_layer_spec


def give_experts(dtype: torch.dtype) -> None:
    """Stock Megatron's experts in a precision of their own: tokens are cast for them, and what they give is cast back."""
    built, run, moved = SequentialMLP.__init__, SequentialMLP.forward, SequentialMLP._apply

    def __init__(self: Any, number: int, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy(config)
        config.params_dtype, config.fp16, config.bf16 = dtype, dtype is torch.float16, dtype is torch.bfloat16
        built(self, number, config, *args, **kwargs)

    def forward(self: Any, tokens: torch.Tensor, *others: Any) -> tuple[torch.Tensor, Any]:
        output, bias = run(self, tokens.to(dtype), *others)
        return output.to(tokens.dtype), bias

    def _apply(self: Any, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return moved(self, lambda one: one if (other := function(one)).dtype != one.dtype else other, recurse)

    SequentialMLP.__init__, SequentialMLP.forward, SequentialMLP._apply = __init__, forward, _apply


def give_one_loss_scale() -> None:
    """Stock Megatron's two optimizers, for dense and for experts' parameters, with one loss scale.

    Its own have a dynamic scale each, which sinks with what this one has found. Where dense gradients overflow and experts' do
    not, the loss has another scale from then on than the one that experts' gradients are divided by.
    """
    look, update = ChainedOptimizer.prepare_grads, DynamicGradScaler.update

    def prepare_grads(self: Any) -> bool:
        DynamicGradScaler.update = lambda scaler, found_inf: None
        found_inf = look(self)
        DynamicGradScaler.update = update
        for optimizer in self.chained_optimizers:
            optimizer.grad_scaler.update(found_inf)
        return found_inf

    ChainedOptimizer.prepare_grads = prepare_grads


def give_engine(ranks: Sequence[int], rank: int) -> None:
    """Ranks that pass for GPUs with transformer-engine, which a stand-in is, and the others for GPUs without."""
    flags._REPLACED = {}
    found = {True: (8, 0), False: (7, 0)}
    meeting.started_here = lambda has_gpu, local_rank, engine: Started(capability=found[rank in ranks][0], engine=engine)
    pretrain.capability_of = lambda device: found[rank in ranks]


def install(fault: str, rank: int, folder: Path) -> None:
    """Makes this rank fail as ``fault`` says, if it is the one that is named."""
    kind, victim, moment, *nth = fault.split(":")
    if rank != int(victim):
        return
    lock = threading.Lock()
    left = [int(nth[0]) if nth else 1]

    def fire() -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
            (folder / "fired").write_text(str(time.time()))
        KINDS[kind]()

    MOMENTS[moment](fire)


def before(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """A moment: as a function is called."""

    def arm(fire: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            fire()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    return arm


def after(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    """A moment: as a function has returned."""

    def arm(fire: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            fire()
            return result

        setattr(owner, name, wrapped)

    return arm


def in_tasks(stream: Stream, choose: Callable[[tuple], Any], training: bool = True):
    """A moment: a task of a training step, or of an evaluation step."""

    def arm(fire: Callable[[], None]) -> None:
        original, steps = executor.run, [0]

        def run(schedule: Any, table: Any, streams: Any, marks: Any, preparations: Any) -> None:
            order = schedule.streams[stream] or schedule.streams[Stream.COMPUTE]
            is_training = any(task.direction is Pass.BACKWARD for task in order)
            steps[0] += is_training
            if is_training is training and steps[0] >= (STEP if training else 0):
                chosen = choose(order)

                def hit(task: Any, call: Callable[[Any], None]) -> None:
                    if task == chosen:
                        fire()
                    call(task)

                table = {key: (lambda task, call=call: hit(task, call)) for key, call in table.items()}
            original(schedule, table, streams, marks, preparations)

        executor.run = run

    return arm


def at_the_end(fire: Callable[[], None]) -> None:
    original = Marks.enter

    def enter(self: Marks, name: str) -> None:
        original(self, name)
        if name == "the end of all ranks":
            fire()

    Marks.enter = enter


def emptied_tracker(fire: Callable[[], None]) -> None:
    """Between the two system calls with which Megatron writes which checkpoint is the last."""
    original = checkpointing.maybe_msc.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(path, mode, *args, **kwargs)
        if str(path).endswith("latest_checkpointed_iteration.txt") and mode == "w":
            fire()
        return file

    checkpointing.maybe_msc.open = opened


def first_write(fire: Callable[[], None]) -> None:
    """As the first tensor of a save is written to its file; the n-th time is that of the n-th save."""
    original_save, original_write, is_new = checkpointing.dist_checkpointing.save, filesystem_async._write_item, [False]

    def save(*args: Any, **kwargs: Any) -> Any:
        is_new[0] = True
        return original_save(*args, **kwargs)

    @functools.wraps(original_write)  # Megatron looks at its signature
    def write(*args: Any, **kwargs: Any) -> Any:
        if is_new[0]:
            is_new[0] = False
            fire()
        return original_write(*args, **kwargs)

    checkpointing.dist_checkpointing.save, filesystem_async._write_item = save, write


def _turn(order: tuple) -> Any:
    return next(task for task in order if task.direction is Pass.BACKWARD)


MOMENTS: dict[str, Callable[[Callable[[], None]], None]] = {
    "start": before(pretrain, "join_pools"),
    "building": before(pretrain, "pretrain"),
    "warm-up": in_tasks(Stream.COMPUTE, lambda order: order[0]),
    "steady": in_tasks(Stream.COMPUTE, lambda order: order[len(order) // 3]),
    "turn": in_tasks(Stream.COMPUTE, _turn),
    "last-task": in_tasks(Stream.COMPUTE, lambda order: order[-1]),
    "transfer-out": in_tasks(Stream.OUT, lambda order: order[len(order) // 2]),
    "transfer-back": in_tasks(Stream.BACK, lambda order: order[len(order) // 2]),
    "optimizer-step": before(optimizer.PooledOptimizer, "get_grad_norm"),
    "save": before(checkpointing.dist_checkpointing, "save"),
    "save-write": first_write,
    "save-files": before(filesystem_async.FileSystemWriterAsync, "retrieve_write_results"),
    "save-written": before(serialization, "save_config"),
    "save-sealing": before(checkpoints, "_replace"),
    "save-tracker": emptied_tracker,
    "save-done": after(training, "save_checkpoint"),
    "load": before(checkpointing.dist_checkpointing, "load"),
    "evaluation": in_tasks(Stream.COMPUTE, lambda order: order[len(order) // 2], training=False),
    "end": at_the_end,
}
