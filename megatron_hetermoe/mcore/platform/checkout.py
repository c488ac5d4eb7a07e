"""A checkout of Megatron-LM in place of the installed wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import megatron.core

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.mcore.patches import imported_megatron


def which_megatron() -> str:
    """Which Megatron a script has got: a checkout's own shadows the installed one."""
    installed = importlib.metadata.distribution("megatron-core")
    shadowed = Path(megatron.core.__path__[0]) != Path(installed.locate_file("megatron/core"))
    return imported_megatron() + (f", not the installed {installed.version}" if shadowed else "")


def check_dataset_helpers() -> None:
    """A checkout compiles its data set helpers when it is first trained with: has it find what it needs.

    ``make`` there asks ``python3`` and ``python3-config`` for the headers, which need not be those of this interpreter
    unless they come first on PATH.

    Raises:
        UsageError: if they are not compiled and cannot be.
    """
    folder = Path(megatron.core.__path__[0], "datasets")
    if not (folder / "Makefile").exists() or importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        return
    if importlib.util.find_spec("pybind11") is None:
        raise UsageError([f"the data set helpers of {folder} are not compiled, and pybind11, which they need for it, is "
                          f"not installed: {sys.executable} -m pip install pybind11"])
    own = [str(Path(sys.executable).parent), str(Path(sys.base_prefix, "bin"))]
    os.environ["PATH"] = os.pathsep.join([*own, os.environ.get("PATH", os.defpath)])
