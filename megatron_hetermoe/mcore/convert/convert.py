"""A Hugging Face model to a checkpoint of Megatron's, and back. In one process, on the CPU."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.mcore.convert import checkpoint
from megatron_hetermoe.mcore.convert.checkpoint import Saved, several
from megatron_hetermoe.mcore.convert.families import FAMILIES, Family, unified
from megatron_hetermoe.mcore.convert.folder import CONFIG, Model, Writer, new_folder, read_config
from megatron_hetermoe.mcore.convert.model import Entry, alone, arguments, entries
from megatron_hetermoe.mcore.convert.tensors import Heads, Rule

Progress = Callable[[str, int], Callable[[int], None]]

_EMBEDDING = "embedding.word_embeddings.weight"
_ROWS = (_EMBEDDING, "output_layer.weight")  # one for each token
_COMPUTED = ".rotary_emb.inv_freq"  # older versions of Hugging Face saved what they compute
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Done:
    """What was converted.

    Attributes:
        family: the model's ``model_type``.
        tensors, bytes: that were written.
        rows: of the embedding.
    """

    family: str
    tensors: int
    bytes: int
    rows: int


def import_model(folder: Path, argv: Sequence[str], impl: str, out: Path, problems: Problems, progress: Progress) -> Done:
    """Writes a checkpoint of a Hugging Face model.

    Args:
        folder: the model's.
        argv: the recipe's flags of Megatron, as the CPU can do them.
        impl: its ``--transformer-impl``.
        out: the checkpoint's, for ``--load``. It appears when all is written.
        problems: what was found so far.
        progress: is told what will be done and how many bytes that is, and gives what takes bytes that are done.

    Raises:
        UsageError: with all that keeps the model from being the recipe's.
    """
    model = None
    with problems.taking():
        model = Model(folder)
    args = arguments(argv, problems)
    problems.raise_if_any()
    config = unified(model.config)
    family = _named_family(model.config, str(folder / CONFIG))
    family.compare(args, config, str(folder / CONFIG), problems)
    rows = model.shape("model.embed_tokens.weight")[0] if "model.embed_tokens.weight" in model else config["vocab_size"]
    if args.padded_vocab_size not in (None, rows):
        problems.add(f"--padded-vocab-size {args.padded_vocab_size}, and the model has {rows} rows in its embedding: set it to "
                     f"{rows}")
    problems.raise_if_any()
    args.padded_vocab_size = rows
    with alone():
        tensors, objects = entries(args, impl, rows)
        parts = _parts(family, tensors, problems)
        problems.raise_if_any()
        heads = Heads.of(args)
        _check_parts(model, tensors, parts, heads, problems)
        problems.raise_if_any()
        dtypes = {name: reduce(torch.promote_types, map(model.dtype, used)) for name, (used, _) in parts.items()}
        size = sum(entry.data.numel() * dtypes[name].itemsize for name, entry in tensors.items())
        check_space(out, size, problems)
        problems.raise_if_any()

        def make(name: str) -> torch.Tensor:
            used, rule = parts[name]
            return rule.form.join([model.tensor(part).to(dtypes[name]) for part in used], heads)

        with new_folder(out) as staged:
            checkpoint.write(staged, args, tensors, objects, dtypes.__getitem__, make, progress("writing", size))
    return Done(family.model_type, len(tensors), size, rows)


def export_model(saved: Saved, argv: Sequence[str], impl: str, reference: Path | None, dtype: str | None, out: Path,
                 problems: Problems, progress: Progress) -> Done:
    """Writes a folder of Hugging Face's from a checkpoint.

    Args:
        saved: the checkpoint.
        reference: a model's folder, whose ``config.json`` and tokenizer the new one gets; its weights are not read.
        dtype: of the new weights, one of fp32, fp16, bf16; as they were saved if None.
        argv, impl, out, problems, progress: as of ``import_model``.

    Raises:
        UsageError: with all that keeps the checkpoint from being the recipe's model, or one of Hugging Face.
    """
    args = arguments(argv, problems)
    problems.raise_if_any()
    family = _fitting_family(args) if reference is None else None
    config: dict[str, Any] = {}
    if reference is not None:
        config = read_config(reference)
        family = _named_family(config, str(reference / CONFIG))
        family.compare(args, unified(config), str(reference / CONFIG), problems)
    there = saved.tensors[_EMBEDDING][0][0] if _EMBEDDING in saved.tensors else 1
    rows = config.get("vocab_size") or args.padded_vocab_size or there
    if rows > there:
        problems.add(f"the checkpoint's embedding has {there} rows, and the model is to have {rows}: give another --reference "
                     "or --padded-vocab-size")
    problems.raise_if_any()
    args.padded_vocab_size = there
    with alone():
        tensors, _ = entries(args, impl, there)
        parts = _parts(family, tensors, problems)
        saved.missing(tensors, problems)
        problems.raise_if_any()
        kept = {saved.tensors[piece.key][1] for entry in tensors.values() for piece in checkpoint.pieces(entry)}
        kind = _DTYPES[dtype] if dtype else reduce(torch.promote_types, kept)
        size = sum(entry.data.numel() * kind.itemsize for entry in tensors.values())
        check_space(out, size, problems)
        problems.raise_if_any()
        heads, advance = Heads.of(args), progress("writing", size)
        with new_folder(out) as staged:
            writer = Writer(staged)
            count = 0
            for name, tensor in saved.read(tensors):
                used, rule = parts[name]
                tensor = (tensor[:rows] if name in _ROWS else tensor).to(_DTYPES[dtype] if dtype else tensor.dtype)
                for part, value in zip(used, rule.form.split(tensor, heads), strict=True):
                    writer.add(part, value)
                    count += 1
                advance(tensor.nbytes)
            writer.finish(_config(config, family, args, rows, kind), reference)
    return Done(family.model_type, count, size, rows)


def _config(reference: dict[str, Any], family: Family, args: argparse.Namespace, rows: int, kind: torch.dtype
            ) -> dict[str, Any]:
    """The new folder's ``config.json``: the reference's, or else the recipe's."""
    name = str(kind).removeprefix("torch.")
    if not reference:
        return family.config(args, rows, name)
    key = "dtype" if "dtype" in reference else "torch_dtype"
    return {**reference, key: name}


def _named_family(config: dict[str, Any], origin: str) -> Family:
    kind = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    raise UsageError([f"{origin}: model_type {kind} cannot be converted; those that can are "
                      f"{', '.join(family.model_type for family in FAMILIES)}"])


def _fitting_family(args: argparse.Namespace) -> Family:
    """The family of a recipe; no recipe fits two."""
    found = {family.model_type: family.obstacles(args) for family in FAMILIES}
    for family in FAMILIES:
        if not found[family.model_type]:
            return family
    raise UsageError([f"the recipe's model is not a {name}, which needs {', '.join(obstacles)}"
                      for name, obstacles in found.items()])


def _parts(family: Family, tensors: Iterable[str], problems: Problems) -> dict[str, tuple[tuple[str, ...], Rule]]:
    """For each parameter the names of what it is made of, and how."""
    found: dict[str, tuple[tuple[str, ...], Rule]] = {}
    strange = []
    for name in tensors:
        for rule in family.rules:
            if (named := rule.named(name)) is not None:
                found[name] = named, rule
                break
        else:
            strange.append(name)
    if strange:
        problems.add(f"the recipe's model has what a {family.model_type} model has not: {several(strange)}: leave out the "
                     "flags that ask for it")
    return found


def _check_parts(model: Model, tensors: dict[str, Entry], parts: dict[str, tuple[tuple[str, ...], Rule]], heads: Heads,
                 problems: Problems) -> None:
    """What of a model is missing, has another shape than the recipe says, or would be left behind."""
    missing, other = [], []
    used: set[str] = set()
    for name, (names, rule) in parts.items():
        used.update(names)
        for part, shape in zip(names, rule.form.shapes(tensors[name].data.shape, heads), strict=True):
            if part not in model:
                missing.append(part)
            elif model.shape(part) != tuple(shape):
                other.append(f"{part} is {list(model.shape(part))}, by the recipe {list(shape)}")
    if model.config.get("tie_word_embeddings"):
        used.add("lm_head.weight")  # the embedding a second time
    left = [name for name in model.names() if name not in used and not name.endswith(_COMPUTED)]
    if missing:
        problems.add(f"{model.folder} lacks {len(missing)} tensors: {several(missing)}")
    if other:
        problems.add(f"{model.folder} has tensors of other shapes: {several(other)}")
    if left:
        problems.add(f"{model.folder} has {len(left)} tensors that the recipe's model has no place for: {several(left)}")


def check_space(out: Path, size: int, problems: Problems) -> None:
    """Notes when a file system has not room for what is to be written, which is known before."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < size:
        problems.add(f"{out} will have {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: make space, or write "
                     "elsewhere")
