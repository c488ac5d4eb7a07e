"""Megatron's torch_dist checkpoints, written and read piece by piece.

A save of Megatron's holds the whole model in memory. Here a tensor is made when its place in the file has come, so that
memory is bounded by what one file holds.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from torch.distributed.checkpoint import (
    FileSystemReader, FileSystemWriter, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.saved import TRACKER, iteration_folder
from megatron_hetermoe.mcore.checkpoints import damage_here
from megatron_hetermoe.mcore.convert.model import Entry, content_metadata
from megatron_hetermoe.mcore.trust import distrusted, foreign_in_metadata, foreign_in_objects, load_weights_only

RELEASE = "release"  # Megatron's name of a checkpoint that is of no iteration
FILE_BYTES = 2 * 10**9  # of tensors in one file, and so in memory
READ_BYTES = 2 * 10**9  # of tensors that are read together


def pieces(entry: Entry) -> list[ShardedTensor]:
    """The tensors that an entry is in the checkpoint: of a gated network's first matrix both halves are apart."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    return list(built) if isinstance(built, Sequence) else [built]


def chunk(piece: ShardedTensor) -> ChunkStorageMetadata:
    """Where a piece is in its global tensor."""
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(shape))


# ---------------------------------------------------------------------------------------------------- write


class _Planner(SavePlanner):
    """Knows what to write where, and has each tensor made when it is asked for.

    Args:
        entries: by the parameter's name, without data.
        objects: beside them, by key.
        dtype: of a parameter.
        make: a parameter's tensor.
        advance: told the bytes that were written.
    """

    def __init__(self, entries: Mapping[str, Entry], objects: Mapping[str, Any], dtype: Callable[[str], torch.dtype],
                 make: Callable[[str], torch.Tensor], advance: Callable[[int], None]):
        self._entries, self._objects, self._make, self._advance = entries, objects, make, advance
        self._source: dict[tuple[str, torch.Size], tuple[str, int]] = {}
        self._made: tuple[str, list[ShardedTensor]] | None = None
        self.plans: list[SavePlan] = []
        items: list[WriteItem] = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
        size = 0
        for name, entry in entries.items():
            kind = dtype(name)
            for number, piece in enumerate(pieces(entry)):
                where = chunk(piece)
                if size and size + where.sizes.numel() * kind.itemsize > FILE_BYTES:
                    self.plans.append(SavePlan(items))
                    items, size = [], 0
                size += where.sizes.numel() * kind.itemsize
                self._source[piece.key, where.offsets] = (name, number)
                data = TensorWriteData(where, TensorProperties(dtype=kind), torch.Size(piece.global_shape))
                items.append(WriteItem(MetadataIndex(piece.key, where.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plans.append(SavePlan(items))

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], buffer)
            return buffer
        name, number = self._source[write_item.index.fqn, write_item.index.offset]
        if self._made is None or self._made[0] != name:  # the halves of a matrix follow each other
            self._made = name, pieces(_with_data(self._entries[name], self._make(name)))
        tensor = self._made[1][number].data.reshape(write_item.tensor_data.chunk.sizes)
        self._advance(tensor.nbytes)
        return tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("what is written is known from the start")

    create_local_plan = create_global_plan = finish_plan = set_up_planner


class _Writer(FileSystemWriter):
    """One that does not write down where it wrote: the folder gets another name, and a path is no plain data."""

    def storage_meta(self) -> None:
        return None


def _with_data(entry: Entry, tensor: torch.Tensor) -> Entry:
    return replace(entry, data=tensor) if isinstance(entry, ShardedTensorFactory) else replace(
        entry, data=tensor, dtype=tensor.dtype)


def write(folder: Path, args: argparse.Namespace, entries: Mapping[str, Entry], objects: Sequence[ShardedObject],
          dtype: Callable[[str], torch.dtype], make: Callable[[str], torch.Tensor], advance: Callable[[int], None]) -> None:
    """Writes a checkpoint of weights that stock and disaggregated runs load as one of no iteration.

    Args:
        folder: an empty one, for ``--load``.
        args: Megatron's, which stand in the checkpoint.
        entries, objects: of the model.
        dtype: of each parameter, by name.
        make: each parameter's tensor.
        advance: told the bytes that were written.
    """
    release = folder / RELEASE
    metadata = content_metadata()
    del metadata["dp_cp_group"]  # of this process
    common = ShardedObject("common_state", None, (1,), (0,)).unique_key
    beside: dict[str, Any] = {one.unique_key: [one.data] for one in objects}
    beside[common] = [{"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": metadata}]
    planner = _Planner(entries, beside, dtype, make, advance)
    # with nothing copied ahead it does not ask for a GPU
    writer = _Writer(release, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(planner.plans[0])
    plans, index = create_default_global_save_plan(planner.plans)
    plans = writer.prepare_global_plan(plans)
    writer.finish(index, [writer.write_data(plan, planner).wait() for plan in plans])
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    save_integrity_manifest(str(release))
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was looked at: whole, and without programs.

    Attributes:
        folder: of its iteration.
        tensors: for each key the whole tensor's shape and the type of its numbers.
    """

    folder: Path
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def missing(self, entries: Mapping[str, Entry], problems: Problems) -> None:
        """Notes what of a model is not in the checkpoint as the recipe says, and what is there beside it."""
        wanted = {piece.key: piece for entry in entries.values() for piece in pieces(entry)}
        wrong = [f"{key} is not there" for key in wanted if key not in self.tensors]
        for key, piece in wanted.items():
            shape = self.tensors.get(key, (piece.global_shape, None))[0]
            if shape != tuple(piece.global_shape) and not piece.allow_shape_mismatch:
                wrong.append(f"{key} is {_times(shape)}, by the recipe {_times(piece.global_shape)}")
        wrong += [f"{key} is there, and the recipe's model has none" for key in self.tensors
                  if key not in wanted and not key.startswith(("optimizer.", "chained_"))]
        if wrong:
            problems.add(f"{self.folder} holds another model than the recipe's: {several(wrong)}")

    def read(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter by name with its tensor, in the type that was saved, READ_BYTES at a time."""
        together: dict[str, torch.Tensor] = {}
        places: list[ShardedTensor] = []
        size = 0
        for name, entry in entries.items():
            first = pieces(entry)[0]
            shape = self.tensors[first.key][0] if first.allow_shape_mismatch else entry.data.shape
            tensor = torch.empty(shape, dtype=self.tensors[first.key][1])
            if together and size + tensor.nbytes > READ_BYTES:
                self._fill(places)
                yield from together.items()
                together, places, size = {}, [], 0
            together[name] = tensor
            places += pieces(_with_data(entry, tensor))  # views of it
            size += tensor.nbytes
        self._fill(places)
        yield from together.items()

    def _fill(self, places: Sequence[ShardedTensor]) -> None:
        reader = FileSystemReader(self.folder)
        metadata = reader.read_metadata()
        planner = _Filler(places, metadata)
        reader.set_up_storage_reader(metadata, True)
        (plan,) = reader.prepare_global_plan([reader.prepare_local_plan(planner.plan)])
        reader.read_data(plan, planner).wait()


class _Filler(LoadPlanner):
    """Has pieces of a checkpoint's tensors read into memory that is there, however they were cut when they were saved.

    Args:
        places: with the memory as their data.
        metadata: the checkpoint's.
    """

    def __init__(self, places: Sequence[ShardedTensor], metadata: Metadata):
        self._targets: dict[tuple[str, torch.Size], torch.Tensor] = {}
        items: list[ReadItem] = []
        for place in places:
            where = chunk(place)
            self._targets[place.key, where.offsets] = place.data.view(where.sizes)
            items += create_read_items_for_chunk_list(place.key, metadata.state_dict_metadata[place.key], [where])
        self.plan = LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[read_item.dest_index.fqn, read_item.dest_index.offset]
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It is where it belongs."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("what is read is known from the start")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


def open_saved(folder: Path, iteration: int | None) -> Saved:
    """Looks at a checkpoint.

    Args:
        folder: Megatron's ``--save``, or an iteration's own.
        iteration: which one; the last if None.

    Raises:
        UsageError: where there is none, or it is damaged, or holds more than data.
    """
    place = _iteration(folder, iteration)
    problems = Problems()
    for said in damage_here(place):
        problems.add(f"the checkpoint is damaged: {said}: take another one with --iteration")
    problems.raise_if_any()
    if load_weights_only():
        foreign = foreign_in_metadata(place)
        named = [f".metadata names {foreign}"] if foreign else foreign_in_objects(place, 0, 1)
        if named:
            raise UsageError([distrusted(place, named)])
    metadata: Metadata = FileSystemReader(place).read_metadata()
    return Saved(place, {
        key: (tuple(stored.size), stored.properties.dtype) for key, stored in metadata.state_dict_metadata.items()
        if not isinstance(stored, BytesStorageMetadata)
    })


def _iteration(folder: Path, iteration: int | None) -> Path:
    if iteration is None and (folder / ".metadata").is_file():
        return folder
    if iteration is None:
        try:
            text = (folder / TRACKER).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise UsageError([f"{folder} is no checkpoint: it has no {TRACKER}, nor .metadata"]) from None
        place = iteration_folder(folder, int(text)) if text.isdecimal() else folder / RELEASE
    else:
        place = iteration_folder(folder, iteration)
    if not (place / ".metadata").is_file():
        there = sorted(path.name for path in folder.glob("iter_*")) if folder.is_dir() else []
        raise UsageError([f"{place} is no torch_dist checkpoint: there is no .metadata in it"
                          + (f"; beside it are {', '.join(there)} (--iteration N)" if there else "")])
    return place


def several(found: Sequence[str]) -> str:
    """The first ones of many, and how many more there are."""
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    return "; ".join(found[:8]) + more


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
