"""``hetermoe train --emulate``: one GPU stands for a mixed cluster, each rank with its share of the multiprocessors."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX, Flags
from megatron_hetermoe.config.plan import read_plan
from megatron_hetermoe.config.recipe import value_of
from megatron_hetermoe.config.shares import ROLES, Shares
from megatron_hetermoe.planner.diagnosis import NCCL_SHARING
from megatron_hetermoe.runtime import seen_gpu
from megatron_hetermoe.runtime.mps import Service, defaults, share
from megatron_hetermoe.runtime.mps_keeper import CONTROL
from megatron_hetermoe.runtime.seen_gpu import LinearLayers, SeenGpu

_SHARES = (7, 0)  # compute capability from which on the service limits multiprocessors: Volta
_NEARBY = 4  # percent more and less that are tried where cuBLAS is wrong
_GROUPED_BY_ITSELF = (9, 10)  # compute capabilities on which experts in bf16 are grouped unless the user says otherwise
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Emulation:
    """A GPU that can be divided as was asked.

    Attributes:
        shares: what was asked.
        gpu: what a process without a share sees of it.
        layers: what ranks multiply matrices for.
        by_cublas: the roles that do it by cuBLAS.
    """

    shares: Shares
    gpu: SeenGpu
    layers: LinearLayers
    by_cublas: tuple[str, ...]


def with_layout(argv: Sequence[str], shares: Shares) -> list[str]:
    """A command line with the roles and numbers of ranks of ``--emulate``, where nothing else says them."""
    argv = list(argv)
    if PREFIX not in argv:
        argv.append(PREFIX)
    if value_of(argv, f"{PREFIX}-plan") is None:
        for role in ROLES:
            if value_of(argv, flag := f"{PREFIX}-{role}-ranks") is None:
                argv += [flag, str(shares.ranks[role])]
    return argv


def emulation(
    shares: Shares, flags: Flags, argv: Sequence[str], env: Mapping[str, str], problems: Problems
) -> Emulation | None:
    """Looks whether this machine can do it, before anything is started.

    Args:
        shares: what was asked.
        flags: the run's.
        argv: all of its command line.
        env: environment variables of the recipe.
        problems: gets all that is in the way.

    Returns:
        None where something is.
    """
    before = len(problems)
    kernel, impl = flags.experts, flags.expert_impl
    numbers = {role: (f"{PREFIX}-{role}-ranks", getattr(flags, f"{role}_ranks")) for role in ROLES}
    if flags.plan is not None:
        with problems.taking():
            plan = read_plan(flags.plan)
            kernel, impl = plan.expert_kernel, plan.expert_impl
            numbers = {role: (f"{PREFIX}-plan", getattr(plan, f"{role}_ranks")) for role in ROLES}
    for role, (flag, count) in numbers.items():
        if count not in (None, shares.ranks[role]):
            problems.add(f"--emulate has {shares.ranks[role]} {role} ranks, {flag} has {count}: make them the same")
    gpu = gpu_to_divide({**os.environ, **env}, problems)
    if len(problems) > before:
        return None
    layers = linear_layers(argv)
    if impl in (None, "auto"):
        impl = value_of(argv, "--transformer-impl")
    is_grouped = kernel == "grouped" or (
        impl == "local" and kernel in (None, "auto") and layers.dtype == "bfloat16" and gpu.capability[0] in _GROUPED_BY_ITSELF)
    return Emulation(shares, gpu, layers, ROLES[:1] if is_grouped else ROLES)


def linear_layers(argv: Sequence[str]) -> LinearLayers:
    """What a command line's model multiplies matrices for: attention's projections, the router, the head, an expert. Of what it
    does not say, or not as a number, some size stands for it."""

    def number(flag: str, otherwise: int) -> int:
        text = value_of(argv, flag) or ""
        return int(text) if text.isdecimal() and int(text) else otherwise

    hidden = number("--hidden-size", 1024)
    inner = number("--moe-ffn-hidden-size", number("--ffn-hidden-size", 4 * hidden))
    widths = (hidden, 2 * hidden, 3 * hidden, inner, number("--num-experts", 24), number("--vocab-size", 32_000))
    dtype = "bfloat16" if "--bf16" in argv else "float16" if "--fp16" in argv else "float32"
    return LinearLayers(dtype, number("--seq-length", 4096) * number("--micro-batch-size", 1), hidden, widths)


def gpu_to_divide(environment: Mapping[str, str], problems: Problems) -> SeenGpu:
    """The first GPU that a process with this environment sees; ``problems`` gets what keeps ranks from sharing it."""
    (found,) = seen_gpu.seen([{**defaults(environment), **environment}])
    for problem in (*_gpu_problems(found, environment), *_nccl_problems(found)):
        problems.add(problem)
    visible = environment.get(_VISIBLE, "")
    # The user's own name for one GPU stays, which may be a part of its UUID.
    return replace(found, uuid=visible) if visible.startswith("GPU-") and "," not in visible else found


@contextlib.contextmanager
def divided(emulated: Emulation, env: Mapping[str, str], logs: Path) -> Iterator[tuple[dict[str, str], list[dict[str, str]]]]:
    """Starts the service for the time of a run, and sees to it that shares hold.

    Args:
        emulated: what to do.
        env: environment variables of the recipe.
        logs: folder for the service's logs.

    Yields:
        Environment variables for all ranks, over those of this process, and for each rank.

    Raises:
        UsageError: when the service does not start, or gives processes more than their shares, or where products of
            matrices are wrong with a share.
    """
    shares = emulated.shares
    with Service(emulated.gpu.uuid, logs) as service:
        common = {**defaults(os.environ), **env, **service.variables}

        def with_share(percent: int) -> dict[str, str]:
            return {**os.environ, **common, **share(percent)}

        found = seen_gpu.seen([with_share(shares.percent[role]) for role in ROLES], emulated.layers)
        parts = []
        for role, one in zip(ROLES, found, strict=True):
            if one.problem:
                raise UsageError([f"a process with {shares.percent[role]}% of the GPU cannot use it: {one.problem} "
                                  f"(the Multi-Process Service's logs are in {logs})"])
            # One role has no more than half; the other one's share may be rounded up to all.
            if shares.percent[role] <= 50 and one.multiprocessors >= emulated.gpu.multiprocessors:
                raise UsageError([f"a process with {shares.percent[role]}% of the GPU sees all "
                                  f"{one.multiprocessors} multiprocessors: the Multi-Process Service does not reach it "
                                  f"(its logs are in {logs})"])
            parts.append(f"{shares.ranks[role]} {role} rank{'s' * (shares.ranks[role] > 1)} of {shares.percent[role]}% "
                         f"({one.multiprocessors} of {emulated.gpu.multiprocessors} multiprocessors)")
        problems = Problems()
        for problem in _product_problems(emulated, dict(zip(ROLES, found)), with_share):
            problems.add(problem)
        problems.raise_if_any()
        print(f"{emulated.gpu.name} stands for {' and '.join(parts)}", flush=True)
        yield common, [share(percent) for percent in shares.by_rank]


def _gpu_problems(found: SeenGpu, environment: Mapping[str, str]) -> list[str]:
    """What keeps the first GPU from being divided."""
    problems = []
    if shutil.which(CONTROL, path=environment.get("PATH")) is None:
        problems.append(f"--emulate needs NVIDIA's Multi-Process Service, and {CONTROL} is not on PATH: it comes with the "
                        "driver (a container has it with NVIDIA_DRIVER_CAPABILITIES=compute,utility)")
    if environment.get("HETERMOE_PLATFORM") == "cpu":
        problems.append("--emulate divides a GPU, and HETERMOE_PLATFORM=cpu wants none: leave one of them out")
        return problems
    if not found.name:
        problems.append(f"--emulate divides a GPU, and torch can use none here ({found.problem}): train without it, on the CPU, "
                        "or look with `hetermoe doctor`")
        return problems
    mode, has_instances = _modes(found.uuid)
    if has_instances or " MIG " in found.name or environment.get(_VISIBLE, "").startswith("MIG-"):
        problems.append(f"{found.name} is divided by MIG already: name another GPU in {_VISIBLE}, or have MIG switched off "
                        "(nvidia-smi -mig 0)")
    if mode == "Prohibited":
        problems.append(f"{found.name} is in compute mode Prohibited, which takes no process: have it changed "
                        "(nvidia-smi -c DEFAULT)")
    if found.capability < _SHARES:
        problems.append(f"{found.name} has compute capability {'.'.join(map(str, found.capability))}, and GPUs give processes "
                        "shares from 7.0 (Volta) on")
    return problems


def _modes(uuid: str) -> tuple[str, bool]:
    """Compute mode as nvidia-smi names it, empty where it does not say, and whether MIG is on."""
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=compute_mode,mig.mode.current", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", False
    mode, _, mig = said.strip().partition(",")
    return mode.strip(), mig.strip() == "Enabled"


def _nccl_problems(found: SeenGpu) -> list[str]:
    """What keeps ranks that share a GPU from talking."""
    if found.nccl >= NCCL_SHARING or (found.problem and not found.nccl):  # a process that failed has not come to it
        return []
    if not found.nccl:
        return ["--emulate needs NCCL, and this torch has none: install a build of torch with it"]
    version, needed = ".".join(map(str, found.nccl)), ".".join(map(str, NCCL_SHARING))
    return [f"--emulate needs NCCL {needed} or newer, which takes several ranks on one GPU, and {version} is loaded "
            f"({found.nccl_file or 'of torch'}): pip install --no-deps --target DIR 'nvidia-nccl-cu13>={needed}' (cu12 for a "
            "torch of CUDA 12), and start this with LD_PRELOAD=DIR/nvidia/nccl/lib/libnccl.so.2"]


def _product_problems(
    emulated: Emulation, found: Mapping[str, SeenGpu], with_share: Callable[[int], dict[str, str]]
) -> list[str]:
    """Roles whose share has products of matrices come out wrong, and shares in which they are right."""
    problems = []
    for role in emulated.by_cublas:
        percent, seen, layers = emulated.shares.percent[role], found[role], emulated.layers
        if not seen.wrong_products:
            continue
        near = [other for other in range(max(1, percent - _NEARBY), min(100, percent + _NEARBY) + 1) if other != percent]
        right = [f"{other}%" for other, one in zip(near, seen_gpu.seen(list(map(with_share, near)), layers))
                 if not one.problem and not one.wrong_products]
        advice = f"one of {', '.join(right)}" if right else "quite another share"
        problems.append(
            f"{role} ranks have {percent}%, {seen.multiprocessors} multiprocessors of an {seen.name}, and there cuBLAS computes "
            f"some products in {layers.dtype} wrongly ({seen.wrong_products[0]}, for one): give them "
            f"{advice}{'; or --hetermoe-experts grouped (bf16 on Hopper and Blackwell), which does without cuBLAS' * (role == 'expert')}")
    return problems
