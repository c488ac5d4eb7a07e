"""What the wheel of megatron-core lacks next to a source checkout, on every device.

Both gaps meet GPU ranks too: the first always, the second wherever transformer-engine is missing (V100).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable


def rebind(original: Callable, replacement: Callable) -> None:
    """Puts ``replacement`` where any imported module of Megatron holds ``original``.

    Megatron's modules import functions by name, so changing the defining module alone would miss the callers.
    """
    assert original is not replacement, "a function cannot replace itself"
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "megatron" or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if value is original:
                setattr(module, attribute, replacement)


def install() -> None:
    """Fills the gaps. Imports Megatron; may be called again."""
    _keep_compiled_helpers()
    _checkpoint_without_transformer_engine()


def _keep_compiled_helpers() -> None:
    """The wheel ships the compiled dataset helpers but no Makefile, and rank 0 exits when ``make`` fails."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    if getattr(utils.compile_helpers, "hetermoe", False):
        return
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return  # a source checkout that has not been built: let Megatron build it

    def compile_helpers() -> None:
        """Nothing to do: the wheel's helpers are compiled."""

    compile_helpers.hetermoe = True
    rebind(utils.compile_helpers, compile_helpers)


def _checkpoint_without_transformer_engine() -> None:
    """``CheckpointWithoutOutput`` takes its default ``fp8=False`` for True and then uses transformer-engine.

    There is no fp8 without transformer-engine, so its flag is false there whatever was asked for.
    """
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    cls = random.CheckpointWithoutOutput
    if random.HAVE_TE or getattr(cls.__init__, "hetermoe", False):
        return
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.fp8 = False

    __init__.hetermoe = True
    cls.__init__ = __init__
