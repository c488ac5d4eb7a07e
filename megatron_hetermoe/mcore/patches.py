"""Every change to Megatron at run time, in one inventory: all of a part apply, or none does.

A patch replaces what no seam of Megatron's reaches. Each is written against what Megatron's source does, so each says
what it relies on, and that is looked for in the source that was imported; a version number is not the test. The
mapping of CUDA to the CPU (``mcore.platform``) is no part of this: it is there only without a GPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_hetermoe.config.errors import Problems

MOST = 12  # patches; a plugin that needs more should be a fork
_WRITTEN_FOR = "0.19.2"


@dataclass(frozen=True)
class Patch:
    """One replacement.

    Attributes:
        symbol: full name of what is replaced.
        reason: why there is no other way.
        relies_on: for functions of Megatron (full names), the expressions that their source must contain.
        removable_when: the condition under which it can go.
        test: the test that fails without it.
        written_for: the Megatron version that was read.
        also: other names by which Megatron offers the same object.
    """

    symbol: str
    reason: str
    relies_on: dict[str, tuple[str, ...]]
    removable_when: str
    test: str
    written_for: str = _WRITTEN_FOR
    also: tuple[str, ...] = ()


RUN: tuple[Patch, ...] = (  # in every run with --hetermoe
    Patch(
        symbol="megatron.training.training.get_forward_backward_func",
        reason="train() and evaluate() take the schedule from this name; there is no registry of schedules",
        relies_on={
            "megatron.training.training.train": ("get_forward_backward_func(",),
            "megatron.training.training.evaluate": ("get_forward_backward_func(",),
            "megatron.training.training.train_step": (
                "forward_backward_func(forward_step_func=forward_step_func, data_iterator=data_iterator, model=model",
            ),
        },
        removable_when="Megatron has a registry of schedules, or pretrain() takes one",
        test="tests/parity/test_layouts.py",
    ),
    Patch(
        symbol="megatron.training.training.get_megatron_optimizer",
        reason="gradient norm, overflow and loss scale must be agreed between pools before any of them steps",
        relies_on={
            "megatron.training.training.setup_model_and_optimizer": ("optimizer = get_megatron_optimizer(",),
            "megatron.core.optimizer.get_megatron_optimizer": ("ChainedOptimizer(optimizers)",),
            "megatron.core.optimizer.optimizer.ChainedOptimizer.step": (
                "found_inf_flag = self.prepare_grads()", "grad_norm = self.get_grad_norm()", "self.count_zeros()",
            ),
            "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup.start_grad_sync": (
                "bucket.gradient_scaling_factor",
            ),
        },
        removable_when="pretrain() takes a function that builds the optimizer",
        test="tests/parity/test_layouts.py",
    ),
    Patch(
        symbol="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
        reason="with torch's Adam it copies a placeholder over the restored step, so that a resumed run starts its "
               "bias correction anew; and in fp32 it writes into a view of a parameter, which autograd refuses",
        relies_on={
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": (
                "main_param = self.optimizer.param_groups[group_index]['params'][group_order]",
                "dst_tensors[key].copy_(tensors[key])",
            ),
        },
        removable_when="Megatron restores the step of an optimizer that is neither transformer-engine's nor apex'",
        test="tests/parity/test_checkpoint.py",
    ),
    Patch(
        symbol="megatron.training.training.calc_params_l2_norm",
        reason="--log-params-norm sums over one pool, and the last rank, which prints it, has experts only",
        relies_on={
            "megatron.training.training.train": ("params_norm = calc_params_l2_norm(model)",),
            "megatron.training.utils.common_utils.calc_params_l2_norm": (
                "_sum_reduce(norm_2, dense_reduce_group)", "_sum_reduce(moe_total_norm_2, expert_reduce_group)",
                "return norm_2.item() ** 0.5",
            ),
        },
        removable_when="Megatron asks the optimizer for the norm, as it does for the gradients'",
        test="tests/parity/test_capacity.py",
    ),
    Patch(
        symbol="megatron.core.datasets.utils.compile_helpers",
        reason="the wheel has the compiled helpers and no Makefile, and rank 0 exits when make fails",
        relies_on={"megatron.training.initialize._compile_dependencies": ("compile_helpers()",)},
        removable_when="the wheel's compile_helpers finds that there is nothing to compile",
        test="tests/parity/test_layouts.py",
    ),
    Patch(
        symbol="megatron.core.dist_checkpointing.save",
        reason="a checkpoint's files need a manifest, so that a load finds damage; for Megatron's, rank 0 reads all",
        relies_on={
            "megatron.training.checkpointing.save_checkpoint": ("dist_checkpointing.save(",),
            "megatron.core.dist_checkpointing.validation.verify_integrity_manifest": (
                "_verify_integrity_manifest_impl(checkpoint_dir)",
            ),
            "megatron.core.dist_checkpointing.validation._verify_integrity_manifest_impl": (
                "manifest_data['files']", "_HASH_ALGORITHM",
            ),
        },
        removable_when="--verify-integrity shares its reading between ranks, and can be on for saves alone",
        test="tests/faults/test_checkpoints.py",
    ),
    Patch(
        symbol="megatron.training.training.save_checkpoint",
        reason="a run that goes on when a disk is full (--hetermoe-on-save-failure continue) must leave it before it "
               "names the checkpoint as the last one; there is no callback between",
        relies_on={
            "megatron.training.training.save_checkpoint_and_time": ("save_checkpoint(iteration, model, optimizer",),
            "megatron.training.checkpointing.save_checkpoint": ("f.write('release' if release else str(iteration))",),
        },
        removable_when="save_checkpoint() returns whether it saved, or asks before it writes the tracker",
        test="tests/faults/test_full_disk.py",
    ),
    Patch(
        symbol="megatron.training.models.gpt.mtp_block_spec",
        reason="layers that predict further tokens are built from a specification that the builder makes itself, whatever it is "
               "given for the others; their experts would all be on attention ranks",
        relies_on={
            "megatron.training.models.gpt.GPTModelBuilder.build_model": (
                "mtp_spec = mtp_block_spec(self._model_config, transformer_layer_spec, vp_stage=vp_stage)",
            ),
            "megatron.core.models.gpt.gpt_layer_specs.get_gpt_mtp_block_spec_for_backend": (
                "MultiTokenPredictionBlockSubmodules(layer_specs=mtp_layer_specs)",
            ),
            "megatron.core.transformer.multi_token_prediction.get_mtp_layer_spec_for_backend": (
                "mtp_model_layer=mtp_model_layer_spec",
            ),
        },
        removable_when="GPTModelConfig takes a specification of these layers too",
        test="tests/parity/test_prediction.py",
    ),
)

SCRIPT: tuple[Patch, ...] = (  # in a run of a training script that is not this package's
    Patch(
        symbol="megatron.training.arguments.parse_and_validate_args",
        reason="a script asks here for its arguments, which must be those of the plan: experts have ranks of their own",
        relies_on={
            "megatron.training.arguments.parse_and_validate_args": (
                "def parse_and_validate_args(extra_args_provider=None, ignore_unknown_args=False, args_defaults={})",
                "args = parse_args(extra_args_provider, ignore_unknown_args)", "validate_args(args, args_defaults)",
                "set_global_variables(args)", "return args",
            ),
        },
        removable_when="Megatron has a hook between parsing and validation",
        test="tests/cli/test_script.py",
    ),
    Patch(
        symbol="megatron.training.training.pretrain",
        also=("megatron.training.pretrain",),
        reason="a script starts training here; before that ranks must meet in pools, and the model be split",
        relies_on={
            "megatron.training.training.pretrain": (
                "def pretrain(cfg_container: PretrainConfigContainer, train_valid_test_dataset_provider, model_type, "
                "forward_step_func, model_provider=None",
            ),
            "megatron.training.training.setup_model_and_optimizer": (
                "getattr(cfg_container, 'model', None) is not None", "get_model(model_provider_func, model_type",
            ),
        },
        removable_when="Megatron can be given a plugin by a flag",
        test="tests/cli/test_script.py",
    ),
)

INVENTORY = RUN + SCRIPT


def imported_megatron() -> str:
    """Which Megatron was imported, and from where."""
    core = importlib.import_module("megatron.core")
    return f"Megatron-Core {core.__version__} of {core.__path__[0]}"


def check(part: tuple[Patch, ...]) -> None:
    """Looks for what a part of the inventory relies on.

    Raises:
        UsageError: naming each symbol whose source is not as it was when its patch was written.
    """
    misfits = [(patch.symbol, misfit) for patch in part for misfit in unmet(patch)]
    problems = Problems()
    if misfits:
        problems.add(f"{imported_megatron()} is not one that this plugin can work with, which was written for {_WRITTEN_FOR}: "
                     f"install megatron-core=={_WRITTEN_FOR}, or take a checkout of core_v0.19.0")
    for symbol, misfit in misfits:
        problems.add(f"{symbol} cannot be patched: {misfit}")
    problems.raise_if_any()


def unmet(patch: Patch) -> list[str]:
    """What a patch relies on and the imported source does not have."""
    problems = []
    for name in dict.fromkeys((patch.symbol, *patch.also, *patch.relies_on)):
        try:
            _, _, target = _find(name)
        except (ImportError, AttributeError):
            problems.append(f"{name} does not exist")
            continue
        source = _normalised(target) if name in patch.relies_on else ""
        problems += [
            f"{name} in {inspect.getfile(target)} has no '{expression}'" for expression in patch.relies_on.get(name, ())
            if _squeezed(expression) not in source
        ]
    return problems


def apply(part: tuple[Patch, ...], replacements: dict[str, Callable[[Any], Any]]) -> None:
    """Applies a part of the inventory, whole.

    Args:
        part: RUN or SCRIPT.
        replacements: for each of its symbols, a function from the original to what replaces it.

    Raises:
        UsageError: if any check fails; then nothing was changed.
    """
    assert replacements.keys() == {patch.symbol for patch in part}
    assert len(INVENTORY) <= MOST
    check(part)
    prepared = []
    for patch in part:
        _, _, original = _find(patch.symbol)
        replacement = replacements[patch.symbol](original)
        prepared += [(*_find(symbol)[:2], replacement) for symbol in (patch.symbol, *patch.also)]
    for owner, name, replacement in prepared:
        setattr(owner, name, replacement)


def _find(symbol: str) -> tuple[ModuleType | type, str, Any]:
    """A symbol's owner, its name there and what it is."""
    owner_name, _, name = symbol.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        _, _, owner = _find(owner_name)
    return owner, name, getattr(owner, name)


def _normalised(target: Any) -> str:
    """A function's source without comments, layout and kind of quotes."""
    return _squeezed(ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(target)))))


def _squeezed(code: str) -> str:
    return "".join(code.split()).replace('"', "'")
