"""The door into rank_process.py that pytest's process can import without importing Megatron."""

from __future__ import annotations


def start(kind: str, *args) -> None:
    """Runs ``rank_process.<kind>``. In a rank, where the fork server has imported that module."""
    import rank_process

    getattr(rank_process, kind)(*args)
