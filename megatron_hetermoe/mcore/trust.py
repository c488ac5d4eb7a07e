"""A checkpoint that was downloaded holds data, and no program that runs as it is loaded.

Pickled data names what to call. torch loads tensors as weights only, but Megatron's torch_dist has two more places:
``.metadata``, which torch unpickles whatever it names, and objects beside the tensors, for which its planner asks for
no check. Both are looked at before a load: the first by an unpickler that knows plain data only, the second by torch's
own list of what is safe, to which Megatron adds its classes.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own; 0 is the user's way to say that a checkpoint is trusted
_METADATA = "torch.distributed.checkpoint."
_PLAIN = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
}


def load_weights_only() -> bool:
    """Has torch refuse all but weights from now on, unless the user's environment says otherwise. Returns whether."""
    return os.environ.setdefault(SWITCH, "1").lower() not in ("0", "", "false", "no", "n")


def distrusted(folder: Path, found: Sequence[str]) -> str:
    """The message that refuses a checkpoint, with what was found in it."""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (f"the checkpoint {folder} holds more than data: {found[0]}{more}. Loading it could run a program; if you trust its "
            f"origin, set {SWITCH}=0")


def foreign_in_metadata(folder: Path) -> str | None:
    """What the ``.metadata`` of a checkpoint names beside its own data classes; None when it is what it should be, or
    is not there."""
    try:
        _metadata(folder)
    except FileNotFoundError:
        return None
    except _Foreign as found:
        return str(found)
    except Exception as error:  # a damaged pickle raises anything
        return f"nothing that can be read ({type(error).__name__})"
    return None


def foreign_in_objects(folder: Path, part: int, parts: int) -> list[str]:
    """What the objects beside the tensors name that is not safe to load, one phrase an object.

    Args:
        folder: a checkpoint whose ``.metadata`` has been looked at.
        part, parts: which of them to look at, every ``parts``-th from ``part`` on.
    """
    if not (folder / ".metadata").is_file():
        return []
    metadata = _metadata(folder)
    objects = sorted(
        (index.fqn, stored) for index, stored in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
    )
    found = []
    for name, stored in objects[part::parts]:
        with (folder / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            data = io.BytesIO(file.read(stored.length))
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(data)
        except (ValueError, RuntimeError, pickle.UnpicklingError):
            foreign = ["what cannot be read"]
        if foreign:
            found.append(f"{name} names {', '.join(sorted(foreign))}")
    return found


def _metadata(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as file:
        return _Reader(file).load()


class _Foreign(Exception):
    """A name that is no data's."""


class _Reader(pickle.Unpickler):
    """Knows data classes of torch's checkpoints, and torch's types; everything else is _Foreign."""

    def find_class(self, module: str, name: str) -> Any:
        """As pickle's; a name with dots would reach into what a module imports."""
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith(_METADATA) and name.isidentifier():
            found = getattr(importlib.import_module(module), name, None)
            is_data = isinstance(found, type) and found.__module__.startswith(_METADATA) and (
                dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
            if is_data:
                return found
        raise _Foreign(f"{module}.{name}")
