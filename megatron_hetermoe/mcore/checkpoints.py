"""Checkpoints that were cut off or damaged are found before anything is loaded, and the one before is named.

Megatron writes files of tensors, then ``metadata.json``, then the iteration into the tracker file: a save counts from
that last word on. What it leaves open is closed here. The tracker is not replaced at once, so a kill may leave it
empty; and nothing tells a damaged file, so every save gets Megatron's own ``integrity.json`` (its
``--verify-integrity``, for which rank 0 reads all files; here each rank reads its share), and every load reads it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.mcore.session import Session

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "integrity.json"  # as megatron.core.dist_checkpointing.validation writes it
COMPLETE = "metadata.json"  # written when all tensors are
_ITERATION = re.compile(r"iter_(\d+)")
_OFFERS = 3  # earlier checkpoints that are read in search of one that is whole


def sealing(original: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """``megatron.core.dist_checkpointing.save``, with a manifest of what it wrote."""

    def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(checkpoint_dir)
        kwargs["verify_integrity"] = False  # else rank 0 would read all files after this has
        try:
            if session.rank == 0:
                (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier save of this iteration
            request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
            if request is None:
                seal(folder, session)
            else:
                request.finalize_fns.append(lambda: seal(folder, session))
            return request
        except Exception as error:
            if not _is_full(error):
                raise
            raise OSError(
                errno.ENOSPC, f"no space is left for the checkpoint in {folder}; make space and start again from the "
                              f"one before, which {folder.parent / TRACKER} names"
            ) from error

    return save


def seal(folder: Path, session: Session) -> None:
    """Writes the manifest. All ranks call it, when all files are there."""
    names = _share(sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST), session)
    parts: list[Any] = [None] * session.layout.world_size
    dist.all_gather_object(parts, {name: _sha256(folder / name) for name in names}, group=session.control)
    if session.rank == 0:
        files = {name: digest for part in parts for name, digest in part.items()}
        _replace(folder / MANIFEST, json.dumps({"algorithm": "sha256", "files": files}, indent=2))


def check_load(load: str | None, step: int | None, session: Session) -> None:
    """Reads the checkpoint that a run is about to load. All ranks call it, and find the same.

    A tracker file that a kill has emptied is written anew, to name the newest checkpoint that is whole.

    Args:
        load: Megatron's ``--load``.
        step: Megatron's ``--ckpt-step``.
        session: this rank's.

    Raises:
        UsageError: naming each damaged file, and a checkpoint that can be loaded in its place.
    """
    found: list[Any] = [_look(Path(load)) if load and session.rank == 0 else None]
    dist.broadcast_object_list(found, src=0, group=session.control)
    if found[0] is None:
        return  # nothing is there; what that means Megatron's flags say
    folder = Path(load)
    tracker, iterations = found[0]
    if tracker == "release" and step is None:
        return
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
        return
    wanted = step if step is not None else int(tracker)
    problems = _damage(_of(folder, wanted), session)
    if not problems:
        return
    before = _newest_whole(folder, [iteration for iteration in iterations if iteration < wanted], session)
    way_out = f"load iteration {before}, which is whole: add --ckpt-step {before}" if before is not None else \
        "there is none before it that is whole: start without --load, or give another folder"
    raise UsageError([f"the checkpoint of iteration {wanted} is damaged: {'; '.join(problems)}. {way_out}"])


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
        if not _damage(_of(folder, iteration), session):
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


def _of(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


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


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is at the root of an error; torch's of a checkpoint holds those of other ranks as text."""
    if error is None:
        return False
    full = os.strerror(errno.ENOSPC)
    return getattr(error, "errno", None) == errno.ENOSPC or full in str(error) or _is_full(error.__cause__)
