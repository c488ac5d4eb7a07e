"""What the wheel of megatron-core lacks next to a source checkout.

Part of the CPU platform. On GPUs stock Megatron is left as it is; a disaggregated run there has the first of the two
gaps filled by a listed patch.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path


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


def without_makefile(original: Callable[[], None]) -> Callable[[], None]:
    """``compile_helpers`` for the wheel, which ships the compiled dataset helpers but no Makefile: the original has rank
    0 exit when ``make`` fails."""

    def compile_helpers() -> None:
        """Makes the dataset helpers where there is something to make them from."""
        utils = importlib.import_module("megatron.core.datasets.utils")
        if (Path(utils.__file__).parent / "Makefile").exists():
            original()

    compile_helpers.hetermoe = True
    return compile_helpers


def _keep_compiled_helpers() -> None:
    utils = importlib.import_module("megatron.core.datasets.utils")
    if not getattr(utils.compile_helpers, "hetermoe", False):
        rebind(utils.compile_helpers, without_makefile(utils.compile_helpers))


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
