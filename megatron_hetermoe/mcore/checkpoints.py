"""Checkpoints that were cut off or damaged are found before anything is loaded, and the one before is named.

Megatron writes files of tensors, then ``metadata.json``, then the iteration into the tracker file: a save counts from
that last word on. What it leaves open is closed here. The tracker is not replaced at once, so a kill may leave it
empty; and nothing tells a damaged file, so every save gets Megatron's own ``integrity.json`` (its
``--verify-integrity``, for which rank 0 reads all files; here each rank reads its share), and every load reads it.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_content_metadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.config.saved import PLAN, TRACKER, iteration_folder
from megatron_hetermoe.mcore.session import Session
from megatron_hetermoe.mcore.trust import distrusted, foreign_in_metadata, foreign_in_objects, load_weights_only

MANIFEST = "integrity.json"  # as megatron.core.dist_checkpointing.validation writes it
COMPLETE = "metadata.json"  # written when all tensors are
_ITERATION = re.compile(r"iter_(\d+)")
_OFFERS = 3  # earlier checkpoints that are read in search of one that is whole


class SaveFailed(UsageError):
    """A checkpoint could not be written. All ranks raise it together, with the same text."""


def sealing(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """``megatron.core.dist_checkpointing.save``, with a manifest of what it wrote; it raises SaveFailed."""

    def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(checkpoint_dir)
        kwargs["verify_integrity"] = False  # else rank 0 would read all files after this has
        if session.rank == 0:
            (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier save of this iteration
        with _told_apart(folder, session):
            request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if request is None:
            seal(folder, session)
            return None
        steps = list(request.finalize_fns)

        def finish() -> None:
            with _told_apart(folder, session):
                for step in steps:
                    step()
            seal(folder, session)

        request.finalize_fns[:] = [finish]
        return request

    return save


def going_on(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """``megatron.training.training.save_checkpoint``, for a run that trains on when it fails."""

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except SaveFailed as error:
            if session.rank == 0:
                print(f"hetermoe: warning: {error}; training goes on", flush=True)
            return None

    return save_checkpoint


@contextmanager
def _told_apart(folder: Path, session: Session) -> Iterator[None]:
    """Turns what a save raises into words: what all ranks raise, since one of them could not write, into SaveFailed."""
    try:
        yield
    except CheckpointException as error:
        failures = {rank: str(failure[0]) for rank, failure in error.failures.items()}  # known to rank 0 only
        _give_up(folder, failures, session)
    except OSError as error:  # of rank 0 alone, as it completes the checkpoint; it ends, and so the others do
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, f"no space is left for the checkpoint in {folder}; make space and start again: "
                                    f"{_last_whole(folder)} is the last one that is whole") from error


def _give_up(folder: Path, failures: dict[int, str], session: Session) -> None:
    """Raises SaveFailed, with what rank 0 knows; before, the half-written checkpoint goes, since it takes space."""
    said = [None]
    if session.rank == 0:
        whose = "; ".join(f"rank {rank} ({session.layout.role(rank)}): {_plain(text)}"
                          for rank, text in sorted(failures.items()))
        if _last_whole(folder) != folder.name:
            shutil.rmtree(folder, ignore_errors=True)
        said = [f"the checkpoint {folder.name} could not be written to {folder.parent}: {whose}. "
                f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB are free there now; make space, or save "
                f"elsewhere (--save). The last one that is whole is {_last_whole(folder)}"]
    dist.broadcast_object_list(said, src=0, group=session.control)
    raise SaveFailed(said)


def _plain(text: str) -> str:
    """An error of a writing thread without what Megatron puts around it. Of some it passes on the class only."""
    text = " ".join(text.split()).removeprefix("Worker failure: ")
    if match := re.search(r"error: <class '(\w+)'>", text):
        return f"{match[1]}, of which this rank's log says more"
    return re.sub(r"\[Errno \d+\] ", "", text)[:300]


def _last_whole(folder: Path) -> str:
    """What the tracker beside a checkpoint names."""
    try:
        text = (folder.parent / TRACKER).read_text(encoding="utf-8").strip()
    except OSError:
        return "none"
    return iteration_folder(folder.parent, int(text)).name if text.isdecimal() else text or "none"


def seal(folder: Path, session: Session) -> None:
    """Writes the plan and the manifest. All ranks call it, when all of Megatron's files are there.

    Raises:
        SaveFailed: on all ranks, where one could not read its share or rank 0 could not write.
    """
    listed: list[Any] = [_with_plan(folder, session.plan) if session.rank == 0 else None]
    dist.broadcast_object_list(listed, src=0, group=session.control)
    names, unlisted = listed[0]
    digests: dict[str, str] = {}
    problem = unlisted if session.rank == 0 else None
    if unlisted is None:
        try:
            digests = {name: _sha256(folder / name) for name in _share(names, session)}
        except OSError as error:
            problem = str(error)
    parts: list[Any] = [None] * session.layout.world_size
    dist.all_gather_object(parts, (digests, problem), group=session.control)
    failures = {rank: problem for rank, (_, problem) in enumerate(parts) if problem}
    if session.rank == 0 and not failures:
        files = {name: digest for part, _ in parts for name, digest in part.items()}
        try:
            _replace(folder / MANIFEST, json.dumps({"algorithm": "sha256", "files": files}, indent=2))
        except OSError as error:
            failures = {0: str(error)}
    found = [failures]
    dist.broadcast_object_list(found, src=0, group=session.control)
    if found[0]:
        _give_up(folder, found[0], session)


def _with_plan(folder: Path, plan: Plan) -> tuple[list[str], str | None]:
    """Writes the plan beside a checkpoint's files. Returns the names of all of them, and what went wrong."""
    try:
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST), None
    except OSError as error:
        return [], str(error)


def check_load(args: argparse.Namespace, session: Session) -> None:
    """Reads the checkpoint that a run is about to load. All ranks call it, and find the same.

    A tracker file that a kill has emptied is written anew, to name the newest checkpoint that is whole.

    Args:
        args: Megatron's.
        session: this rank's.

    Raises:
        UsageError: naming each damaged file, and a checkpoint that can be loaded in its place; or what else keeps it
            from being loaded.
    """
    # As Megatron takes them: the second one is where a run begins that has saved none yet.
    folders = [Path(folder) for folder in (args.load, args.pretrained_checkpoint) if folder]
    found: list[Any] = [None]
    if session.rank == 0:
        found[0] = next(((folder, *there) for folder in folders if (there := _look(folder))), None)
    dist.broadcast_object_list(found, src=0, group=session.control)
    if found[0] is None:
        return  # nothing is there; what that means Megatron's flags say
    given, tracker, iterations = found[0]
    folder = _whole(given, args.ckpt_step, tracker, iterations, session)
    if load_weights_only():
        _check_trust(folder, session)
    goes_on = bool(args.load) and given == Path(args.load) and not args.finetune
    other = [_other_shards(folder, args, session.plan) if goes_on and session.rank == 0 else None]
    dist.broadcast_object_list(other, src=0, group=session.control)
    if other[0]:
        raise UsageError([other[0]])


def _whole(folder: Path, step: int | None, tracker: str, iterations: list[int], session: Session) -> Path:
    """The folder of the checkpoint that is to be loaded, which is not damaged."""
    if tracker == "release" and step is None:
        if problems := _damage(folder / tracker, session):
            raise UsageError([f"the checkpoint {folder / tracker} is damaged: {'; '.join(problems)}. Make it anew, or give "
                              "another folder"])
        return folder / tracker
    if step is None and not tracker.isdecimal():
        step = _newest_whole(folder, iterations, session)
        if step is None:
            raise UsageError([f"{folder / TRACKER} is damaged (it says {tracker[:20]!r}), and no checkpoint in "
                              f"{folder} is whole: start without --load, or give another folder"])
        if session.rank == 0:
            print(f"hetermoe: {folder / TRACKER} was cut off; it now names iteration {step}, the newest that is whole",
                  flush=True)
            _replace(folder / TRACKER, str(step))
        dist.barrier(group=session.control)
        return iteration_folder(folder, step)
    wanted = step if step is not None else int(tracker)
    problems = _damage(iteration_folder(folder, wanted), session)
    if problems:
        before = _newest_whole(folder, [iteration for iteration in iterations if iteration < wanted], session)
        way_out = f"load iteration {before}, which is whole: add --ckpt-step {before}" if before is not None else \
            "there is none before it that is whole: start without --load, or give another folder"
        raise UsageError([f"the checkpoint of iteration {wanted} is damaged: {'; '.join(problems)}. {way_out}"])
    return iteration_folder(folder, wanted)


def _check_trust(folder: Path, session: Session) -> None:
    """Refuses a checkpoint that names what is no data; each rank looks at its share of the objects."""
    named = [foreign_in_metadata(folder) if session.rank == 0 else None]
    dist.broadcast_object_list(named, src=0, group=session.control)
    found = [f".metadata names {named[0]}"] if named[0] else []
    if not found:
        parts: list[Any] = [None] * session.layout.world_size
        mine = foreign_in_objects(folder, session.rank, session.layout.world_size)
        dist.all_gather_object(parts, mine, group=session.control)
        found = sorted(said for part in parts for said in part)
    if found:
        raise UsageError([distrusted(folder, found)])


def _other_shards(folder: Path, args: argparse.Namespace, plan: Plan) -> str | None:
    """What to say when the optimizer's state is wanted and is of another layout, in a form that only that one reads."""
    wanted = args.use_distributed_optimizer and not args.no_load_optim
    try:
        if not wanted or not (folder / PLAN).is_file() or _same_shards(folder, plan):
            return None
    except UsageError as error:  # of the file, which another version may have written; for all ranks to raise
        return "; ".join(error.problems)
    sharding = (load_content_metadata(str(folder)) or {}).get("distrib_optim_sharding_type")
    if sharding != "dp_reshardable":
        return None
    return (f"the optimizer's state in {folder} is of another layout ({PLAN} there says which), and was saved in a "
            "form that no other reads: go on in that layout and save once with --dist-ckpt-optim-fully-reshardable, or "
            "load without it (--no-load-optim)")


def _same_shards(folder: Path, plan: Plan) -> bool:
    """Whether a checkpoint was saved by a plan whose ranks have the same parts of the optimizer's state."""
    saved = read_plan(folder / PLAN)
    return all(getattr(saved, field) == getattr(plan, field)
               for field in ("attention_ranks", "expert_ranks", "groups", "placement", "tensor_parallel",
                             "context_parallel", "expert_tensor_parallel", "stage_layers", "virtual_stages"))


def _look(folder: Path) -> tuple[str, list[int]] | None:
    """The tracker's text and the iterations that are in a folder; None without a tracker."""
    try:
        tracker = (folder / TRACKER).read_bytes().decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    matches = (_ITERATION.fullmatch(path.name) for path in folder.iterdir())
    return tracker, sorted(int(match[1]) for match in matches if match)


def _newest_whole(folder: Path, iterations: Iterable[int], session: Session) -> int | None:
    for iteration in sorted(iterations, reverse=True)[:_OFFERS]:
        if not _damage(iteration_folder(folder, iteration), session):
            return iteration
    return None


def _damage(folder: Path, session: Session) -> list[str]:
    """What is wrong with a checkpoint, one phrase a file; the same on all ranks, each of which reads its share."""
    first: list[Any] = [_manifest(folder) if session.rank == 0 else None]
    dist.broadcast_object_list(first, src=0, group=session.control)
    files, problem = first[0]
    mine = [] if problem is None else [problem]
    for name in _share(sorted(files), session):
        if said := _differs(folder / name, files[name]):
            mine.append(said)
    parts: list[Any] = [None] * session.layout.world_size
    dist.all_gather_object(parts, mine, group=session.control)
    return sorted({said for part in parts for said in part})


def damage_here(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one phrase a file, as one process finds it that reads them all."""
    files, problem = _manifest(folder)
    found = [_differs(folder / name, digest) for name, digest in sorted(files.items())]
    return [said for said in (problem, *found) if said]


def _manifest(folder: Path) -> tuple[dict[str, str], str | None]:
    """The files of a checkpoint with their digests, none where it has no manifest, and what is wrong already."""
    if not folder.is_dir():
        return {}, f"{folder} is not there"
    if not (folder / COMPLETE).is_file():
        is_legacy = any(folder.glob("mp_rank_*"))  # Megatron's older format, which has neither
        return {}, None if is_legacy else f"{folder / COMPLETE} is not there: the save was cut off"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        assert all(isinstance(digest, str) and Path(name).name == name for name, digest in files.items())
    except FileNotFoundError:
        return {}, None  # stock Megatron's, saved without --verify-integrity
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return {}, f"{folder / MANIFEST} cannot be read"
    return files, None


def _differs(path: Path, digest: str) -> str | None:
    try:
        return None if _sha256(path) == digest else f"{path} is not what was saved"
    except FileNotFoundError:
        return f"{path} is not there"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def _share(names: list[str], session: Session) -> list[str]:
    return names[session.rank::session.layout.world_size]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
