"""The two files of a data set, which appear when they are complete: written beside, under other names, then moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class DatasetFiles:
    """One data set on its way to ``PREFIX.bin`` and ``PREFIX.idx``.

    Args:
        prefix: path without the endings; its folder is made.

    Attributes:
        bin, idx: where to write.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, prefix: str | Path):
        self._prefix = Path(prefix)
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        self.bin, self.idx = (self._prefix.with_name(f"{self._prefix.name}.part-{os.getpid()}{end}")
                              for end in (".bin", ".idx"))

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        for path in (self.bin, self.idx):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Moves both files to their names. Whatever ends the process meanwhile, no index stands beside other data."""
        # Megatron keeps its shuffled indices beside the data under a name that does not depend on the content
        shutil.rmtree(self._prefix / "cache", ignore_errors=True)
        index = Path(f"{self._prefix}.idx")
        index.unlink(missing_ok=True)
        _sync_folder(index.parent)
        self.bin.replace(f"{self._prefix}.bin")
        _sync_folder(index.parent)
        self.idx.replace(index)
        _sync_folder(index.parent)

    def discard(self) -> None:
        """Removes what was not published."""
        for path in (self.bin, self.idx):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
