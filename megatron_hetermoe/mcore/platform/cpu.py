"""Runs megatron.training on the CPU with gloo, by answering what it asks of CUDA.

This is the only module that knows that there may be no GPU. ``install()`` changes torch for the whole
process and cannot be taken back, so it belongs in processes that train and nowhere else:

* ``torch.cuda.is_available()`` is True afterwards, because Megatron skips all of its set-up otherwise. A
  library that then really uses CUDA (a compiled kernel, ``torch.load`` onto "cuda", ``torch.Generator("cuda")``)
  fails; one that only picks a device by it is given the CPU. torch's own choices are safe: they go
  by the tensor's device or by the C++ side (``torch.accelerator``), which still say CPU.
* Moving to the device returns the tensor itself where a GPU would return a copy, and so does ``.cpu()``.
* There is one random stream where a GPU rank has two. What is drawn from the host's (the seed of each data
  loader's iterator) moves the device's too, so dropout differs after a resume, which begins with a new iterator.
* Streams and events do nothing: all work is done in the order of the program. An event keeps the time.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import importlib
import logging
import os
import sys
import time
import types

PLATFORM_VARIABLE = "HETERMOE_PLATFORM"

_ENVIRONMENT = {
    # For those who got hold of torch.compile before install().
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # validate_args insists on it for tensor parallelism.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

_FACTORIES = (  # of torch, taking ``device=``
    "arange as_tensor asarray empty empty_like empty_strided eye full full_like linspace ones ones_like rand"
    " rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices"
    " zeros zeros_like"
).split()

_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros to".split()  # of torch.Tensor

_MEMORY = 16 << 30  # bytes; only ever printed, or divided by

_installed = False


def needed() -> bool:
    """Whether training here has to run on the CPU: there is no GPU, or HETERMOE_PLATFORM=cpu asks for it."""
    if _installed or os.environ.get(PLATFORM_VARIABLE) == "cpu":
        return True
    import torch

    return not torch.cuda.is_available()


def install() -> None:
    """Maps CUDA to the CPU. Call it before anything imports megatron.core; calling it again does nothing."""
    global _installed
    if _installed:
        return
    assert "megatron.core" not in sys.modules, "cpu.install() comes before the first import of megatron.core"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _map_torch()
    _adjust_megatron()
    _installed = True


# ---------------------------------------------------------------------------------------------- torch


def _is_cuda(device: object) -> bool:
    """Whether a ``device`` argument names a GPU. Megatron passes "cuda", "cuda:0", a torch.device or 0."""
    import torch

    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function):
    """``function`` with a GPU in ``device=`` replaced by the CPU, and no memory pinned, which needs a GPU's driver."""

    @functools.wraps(function)
    def mapped(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return mapped


def _map_torch() -> None:
    import torch

    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    loader = torch.utils.data.DataLoader
    loader.__init__ = _on_cpu(loader.__init__)
    to, type_name = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self, *args, **kwargs):
        # The device may come first and unnamed; an int there is a device, never a dtype.
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return to(self, *args, **kwargs)

    def tensor_type(self, *args, **kwargs):
        # The optimizers tell fp32 from half precision by "torch.cuda.FloatTensor" and the like.
        result = type_name(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    def itself(self, *args, **kwargs):
        return self

    torch.Tensor.to = tensor_to
    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = itself
    torch.Tensor.pin_memory = itself
    torch.Tensor.record_stream = _always(None)
    torch.nn.Module.cuda = itself
    for name, value in _cuda_table(torch).items():
        setattr(torch.cuda, name, value)
    # torch.cuda's functions of the same names are re-exports; Megatron calls these by the full name.
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    for name in ("range_push", "range_pop", "mark"):  # raise in a build of torch without NVTX
        setattr(torch.cuda.nvtx, name, _always(None))
    torch.compile = _uncompiled


def _uncompiled(model=None, **options):
    """``torch.compile``, also as a decorator with options. Megatron decorates many small functions with it, and
    the first use imports the compiler (seconds) whatever the environment says."""
    return model if model is not None else (lambda function: function)


def _always(value):
    """A function that answers ``value`` to whatever it is asked. A new one for each name it stands for: torch's
    compiler files torch's functions by identity, and refuses to be imported when one has two names."""
    return lambda *args, **kwargs: value


def _nothing(*args, **kwargs) -> None:
    """A method that has no meaning without a device."""


def _cuda_table(torch) -> dict[str, object]:
    """What ``torch.cuda`` answers: its attributes by name."""

    def seed(value):
        torch.default_generator.manual_seed(int(value))

    def get_rng_state(device=None):
        return torch.get_rng_state()

    def set_rng_state(state, device=None):
        torch.set_rng_state(state)

    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu", major=9, minor=0, multi_processor_count=1, total_memory=_MEMORY, warp_size=32
    )
    return {
        # One device a process, number 0. Megatron builds "cuda:0" from the number, so it must be an int.
        "is_available": _always(True),
        "is_initialized": _always(True),
        "_lazy_init": _always(None),
        "device_count": _always(1),
        "current_device": _always(0),
        "set_device": _always(None),
        "device": _Context,
        "get_device_name": _always("cpu"),
        "get_device_capability": _always((9, 0)),  # new enough that no feature is refused for the GPU's age
        "get_device_properties": _always(properties),
        # Work is done when the call returns, so there is nothing to wait for and nothing to order.
        "Stream": _Stream,
        "Event": _Event,
        "stream": _Context,
        "StreamContext": _Context,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "set_stream": _always(None),
        "synchronize": _always(None),
        "is_current_stream_capturing": _always(False),
        # Memory is the host's, which nobody counts by rank.
        "empty_cache": _always(None),
        "ipc_collect": _always(None),
        "reset_peak_memory_stats": _always(None),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
        "memory_reserved": _always(0),
        "max_memory_reserved": _always(0),
        "device_memory_used": _always(0),
        "memory_stats": lambda *args, **kwargs: collections.defaultdict(int),
        "mem_get_info": _always((_MEMORY, _MEMORY)),
        # The device draws from the host's generator. With the generator in its place, Megatron's own tracker
        # of random states needs no change.
        "default_generators": (torch.default_generator,),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
    }


class _Stream:
    """A queue that is always empty."""

    cuda_stream = stream_id = device_index = priority = 0

    def __init__(self, *args, **kwargs):
        import torch

        self.device = torch.device("cpu")

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event=None):
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


class _Event:
    """A point in the program, with its time."""

    def __init__(self, *args, **kwargs):
        self._seconds = time.perf_counter()

    def record(self, *args, **kwargs) -> None:
        self._seconds = time.perf_counter()

    wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._seconds - self._seconds) * 1e3


class _Context(contextlib.nullcontext):
    """``torch.cuda.stream(s)`` and ``torch.cuda.device(d)``: a block in which nothing is different."""


# ------------------------------------------------------------------------------------------- Megatron


def _adjust_megatron() -> None:
    """The few places that decide by the tensor's real device, or that need a library only GPUs have."""
    from megatron_hetermoe.mcore.platform import wheel

    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    torch_norm = importlib.import_module("megatron.core.transformer.torch_norm")
    wheel.install()
    # A warning for each weight, that drawing from the device's generator moved the host's: here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in str(record.msg)
    )

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        # The original asks ``is_cuda``; all_to_all wants its split sizes as numbers, not as a tensor.
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    wheel.rebind(moe_utils.maybe_move_tensor_to_cpu, maybe_move_tensor_to_cpu)
    norm = torch_norm.WrappedTorchNorm
    build = norm.__new__

    def build_norm(cls, config, *args, **kwargs):
        # Refused under sequence parallelism for want of the mark below, which has the gradients of the
        # weights summed over the tensor-parallel ranks. MoE with TP > 1 requires sequence parallelism.
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        config = copy.copy(config)
        config.sequence_parallel = False
        module = build(cls, config, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = True
        return module

    norm.__new__ = build_norm
