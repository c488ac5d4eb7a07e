"""Folders of Hugging Face models, read and written tensor by tensor; and folders that appear when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_hetermoe.config.errors import Problems, UsageError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PART_BYTES = 5 * 10**9  # of one file; Hugging Face's own limit

# Of a folder that a new one is made like: what is not weights.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*")


class Model:
    """A model's folder, of which only the heads of its files have been read.

    Args:
        folder: with ``config.json`` and safetensors.

    Attributes:
        config: what ``config.json`` says.

    Raises:
        UsageError: with everything that is missing or cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self._open: tuple[Path, Any] | None = None
        problems = Problems()
        self._where: dict[str, Path] = {}
        self._heads: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in self._files(problems):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        head = file.get_slice(name)
                        self._where[name] = path
                        self._heads[name] = (tuple(head.get_shape()), _DTYPES[head.get_dtype()])
            except (SafetensorError, OSError) as error:
                problems.add(f"{path} cannot be read: {' '.join(str(error).split())}")
            except KeyError as error:
                problems.add(f"{path} holds numbers of type {error.args[0]}, which Megatron has no weights of: take the model "
                             "that is not quantised")
        problems.raise_if_any()

    def _files(self, problems: Problems) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            if (self.folder / SINGLE).is_file():
                return [self.folder / SINGLE]
            other = sorted(path.name for path in self.folder.glob("pytorch_model*"))
            problems.add(f"{self.folder} has neither {SINGLE} nor {INDEX}"
                         + (f", but {other[0]}: save the model with transformers' save_pretrained first" if other else ""))
            return []
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [self.folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            problems.add(f"{index} cannot be read: download it again")
            return []
        for path in paths:
            if not path.is_file():
                problems.add(f"{path} is not there, and {INDEX} names it: download it")
        return [path for path in paths if path.is_file()]

    def __contains__(self, name: str) -> bool:
        return name in self._heads

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._heads)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._heads[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._heads[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. One file is open at a time, so that what was read before can leave the memory."""
        path = self._where[name]
        if self._open is None or self._open[0] != path:
            self._open = path, safe_open(path, framework="pt")
        return self._open[1].get_tensor(name)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``.

    Raises:
        UsageError: if there is none, or no JSON object in it.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError([f"{path} is not there: give the folder of a Hugging Face model, downloaded as a whole"]) from None
    except (OSError, ValueError) as error:
        raise UsageError([f"{path} cannot be read: {' '.join(str(error).split())}"]) from None
    if not isinstance(config, dict):
        raise UsageError([f"{path} is no JSON object"])
    return config


class Writer:
    """Writes a model's folder: tensors collect in memory until a file is full.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[dict[str, int]] = []  # for each: its tensors' bytes by name

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor over."""
        if self._bytes and self._bytes + tensor.nbytes > PART_BYTES:
            self._flush()
        # a view of a larger one would be written once for each
        self._tensors[name] = tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone(
            memory_format=torch.contiguous_format)
        self._bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self._folder / f"part{len(self._files)}"
        save_file(self._tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors' files are their owner's alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._files.append({name: tensor.nbytes for name, tensor in self._tensors.items()})
        self._tensors, self._bytes = {}, 0

    def finish(self, config: Mapping[str, Any], like: Path | None) -> None:
        """Writes what was not yet, the index, ``config.json``, and what a folder ``like`` it has beside its weights."""
        self._flush()
        count = len(self._files)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names):
            (self._folder / f"part{number}").rename(self._folder / name)
        if count > 1:
            sizes = {name: size for file in self._files for name, size in file.items()}
            where = {tensor: name for name, file in zip(names, self._files, strict=True) for tensor in file}
            _write_json(self._folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        for pattern in _BESIDE if like else ():
            for path in like.glob(pattern):
                if path.is_file() and path.name not in (CONFIG, INDEX):
                    shutil.copyfile(path, self._folder / path.name)
        _write_json(self._folder / CONFIG, config)


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when all is written; whatever ends the block otherwise removes it.

    Raises:
        UsageError: if it cannot be written, or is there already.
    """
    staged = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        yield staged
        if path.exists():
            raise UsageError([f"{path} is there already: give another name to --out"])
        staged.rename(path)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError([f"{path} cannot be written: {said}"]) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
