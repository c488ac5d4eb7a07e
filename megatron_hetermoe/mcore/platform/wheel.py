"""What the wheel of megatron-core lacks next to a source checkout.

Part of the CPU platform. On GPUs stock Megatron is left as it is; a disaggregated run there has the gaps in the data
set helpers and in the distributed optimizer's resume filled by listed patches.
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
    _resume_distributed_optimizer()


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


def with_step(original: Callable[..., None]) -> Callable[..., None]:
    """``DistributedOptimizer._set_main_param_and_optimizer_states`` for torch's Adam, where the original copies a
    placeholder over the restored step, and in fp32 writes into a view of a parameter, which autograd refuses."""

    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self, model_param, tensors):
        torch = importlib.import_module("torch")
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            # The loaded state has one tensor for all parameters, and Adam counts each parameter's steps in place.
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"].clone()}
        with torch.no_grad():
            original(self, model_param, tensors)

    return _set_main_param_and_optimizer_states


def initialise_adam(optimizer) -> None:
    """Gives torch's Adam the state that its first step would, since DistributedOptimizer reads a step before it."""
    torch = importlib.import_module("torch")
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def _resume_distributed_optimizer() -> None:
    """Without transformer-engine and apex, stock Megatron resumes its distributed optimizer wrongly or not at all."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    cls = module.DistributedOptimizer
    if module.HAVE_APEX_OR_TE or getattr(cls.state_dict, "hetermoe", False):
        return
    original = cls.state_dict

    @functools.wraps(original)
    def state_dict(self):
        initialise_adam(self.optimizer)
        return original(self)

    state_dict.hetermoe = True
    cls.state_dict = state_dict
    cls._set_main_param_and_optimizer_states = with_step(cls._set_main_param_and_optimizer_states)
