"""The inside of a rank of a test. Loaded once in the fork server, so that a rank starts with Megatron imported.

Nothing here may start a thread when it is imported: a forked process has only the thread that forked it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import pickle
import queue
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HETERMOE_PLATFORM"] = "cpu"

import torch

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Megatron has to say about missing GPU libraries, on every import
    from megatron_hetermoe.mcore.platform import cpu

    cpu.install()
    from recording import record_steps
    import megatron_hetermoe.mcore.gpt
    import megatron_hetermoe.pretrain_gpt as pretrain_gpt
    import megatron_hetermoe.script as training_script

    # What a run would import later, at a second or more a rank: torch's optimizers want the compiler.
    import megatron.core.datasets.helpers
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text
    import torch._dynamo
    from megatron.core.dist_checkpointing.strategies import cached_metadata_filesystem_reader, filesystem_async
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

_read_help = ArgumentGroupFactory._get_field_docstrings
_help: dict[type, dict[str, str]] = {}


def _help_of(self, configuration: type) -> dict[str, str]:
    if configuration not in _help:
        _help[configuration] = _read_help(self, configuration)
    return _help[configuration]


# Megatron parses the source of its configurations for the texts of --help, most of a second a rank.
ArgumentGroupFactory._get_field_docstrings = _help_of
add_megatron_arguments(argparse.ArgumentParser())

gc.freeze()  # keeps the collector of each rank away from what was imported

STACKS = signal.SIGUSR1  # has a rank write the stacks of its threads to its output
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def enter(rank: int, world: int, port: int, folder: Path, cwd: Path, env: Mapping[str, str]) -> None:
    """Makes this process rank ``rank``: its own session, its output in a file, the launcher's environment."""
    os.setsid()  # the whole of a rank, with what it forks, can be killed by its number
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)  # the fork server goes with pytest
    output = os.open(output_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(2)
    faulthandler.register(STACKS, 2, all_threads=True)
    os.chdir(cwd)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # pytest holds the store, see ranks.py
        GLOO_SOCKET_IFNAME="lo",
    )
    os.environ.update(env)


def output_file(folder: Path, rank: int) -> Path:
    return folder / f"output.{rank}"


def record_file(folder: Path, rank: int) -> Path:
    return folder / f"record.{rank}"


def result_file(folder: Path, rank: int) -> Path:
    return folder / f"result.{rank}"


def pretrain(
    rank: int, world: int, port: int, folder: Path, cwd: Path, env: Mapping[str, str], argv: Sequence[str],
    script: Path | None,
):
    """A rank that trains with the flags ``argv``, by a training script if one is given."""
    enter(rank, world, port, folder, cwd, env)
    record_steps(record_file(folder, rank))
    if "--async-save" not in argv:
        # Megatron starts a process that imports torch, seconds a rank, for a queue that a save in the
        # foreground reads and writes in one process.
        filesystem_async._results_queue = queue.Queue()
    if any(name.startswith("HETERMOE_TEST_") for name in env):
        import fault_injection

        fault_injection.install_all(env, rank, cwd)
    sys.argv = ["pretrain_gpt", *argv]
    before = _megatrons_callables()
    code = pretrain_gpt.main(argv) if script is None else training_script.main([str(script), *argv])
    changed = sorted(name for name, value in _megatrons_callables().items() if before.get(name, value) is not value)
    with record_file(folder, rank).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "changed", "names": changed}) + "\n")
    sys.exit(code)


def _megatrons_callables() -> dict[str, object]:
    """Every function and method of Megatron's imported modules and classes, by full name."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "megatron" or module is None:
            continue
        for name, value in list(vars(module).items()):
            if callable(value):
                found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                found.update(
                    (f"{module_name}.{name}.{attribute}", method) for attribute, method in vars(value).items()
                    if callable(method)
                )
    return found


def call(
    rank: int, world: int, port: int, folder: Path, cwd: Path, env: Mapping[str, str], function: Callable, args: tuple
):
    """A rank that calls ``function`` inside a process group of gloo, and keeps the result."""
    enter(rank, world, port, folder, cwd, env)
    torch.distributed.init_process_group("gloo")
    result = function(rank, world, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    result_file(folder, rank).write_bytes(pickle.dumps(result))
