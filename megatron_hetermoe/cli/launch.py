"""Starts the ranks of a run on this machine, watches them, and leaves none behind.

With a GPU each rank is a fresh interpreter, because CUDA does not survive a fork. Without one the ranks are forked
from one process that has imported Megatron already: a cold import costs some seconds of CPU time a rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hetermoe.cli.interrupt import handling
from megatron_hetermoe.cli.output import writing
from megatron_hetermoe.config.errors import EXIT_CODE, OWN_LOG, PEER_LOST_CODE, UsageError

PRELOAD = "megatron_hetermoe.mcore.platform.preload"
GRACE = 10.0  # seconds between TERM and KILL; Megatron may be writing a checkpoint
_PR_SET_PDEATHSIG = 1


def has_gpu() -> bool:
    """Whether a GPU may be here, judged without importing torch; a wrong True costs start-up time only."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd"))


class Ranks:
    """The processes of one run. A context manager: when it is left, however, every rank has ended.

    Args:
        world: number of ranks.
        argv: their command line.
        env: environment variables for them, over those of this process.
        logs: folder for their output, ``rank{k}.log``; made if it is not there, older logs in it are removed.
        entry: module with ``main(argv) -> exit code``.
        fork: fork them from a process that has imported Megatron; if None, where there is no GPU.
        grace: seconds between TERM and KILL.
        watched: the ranks watch each other, so when one has failed the others end by themselves and say why; they are
            given ``grace`` to do so.
        each: further environment variables of each rank.

    Raises:
        UsageError: when the folder cannot be made, or Megatron not be imported.
    """

    def __init__(self, world: int, argv: Sequence[str], env: Mapping[str, str], logs: Path, *, entry: str,
                 fork: bool | None = None, grace: float = GRACE, watched: bool = False,
                 each: Sequence[Mapping[str, str]] = ()):
        self.logs = logs
        self.grace = grace
        self.watched = watched
        self.failed: int | None = None  # the rank that failed first
        self.witness: int | None = None  # a rank that ended because that one did, and has said so
        self._processes: list[multiprocessing.process.BaseProcess | _Spawned] = []
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)
            for old in logs.glob("rank*.log"):
                old.unlink()
        assert len(each) in (0, world)
        common = {**env, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(_free_port()), OWN_LOG: "1"}
        fork = not has_gpu() if fork is None else fork
        if fork and "OMP_NUM_THREADS" not in {**os.environ, **env}:
            common["OMP_NUM_THREADS"] = "1"  # the ranks share the cores; torch would start one thread a core in each
        try:
            context = _forkserver(common, logs) if fork else None
            for rank, own in enumerate(each or [{}] * world):
                of_rank = {**common, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                start = functools.partial(_forked, context) if context else _Spawned
                self._processes.append(start(entry, list(argv), of_rank, self.log(rank)))
        except BaseException:
            self.end()
            raise

    def log(self, rank: int) -> Path:
        """The file with a rank's output."""
        return self.logs / f"rank{rank}.log"

    def wait(self, seconds: float) -> bool:
        """Waits until all ranks have ended or one has failed, for some seconds at most.

        Returns:
            Whether there is more to wait for.
        """
        deadline = time.monotonic() + seconds
        while True:
            codes = self.exit_codes()
            if any(codes):
                # of ranks that fail together the lowest speaks; they mostly say the same
                self.failed = next(rank for rank, code in enumerate(codes) if code)
                return False
            if None not in codes:
                return False
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.05)

    def exit_codes(self) -> list[int | None]:
        """Exit code of each rank as a shell gives it (128 + signal), None while it runs."""
        codes = [process.exitcode for process in self._processes]
        return [128 - code if code is not None and code < 0 else code for code in codes]

    def exit_code(self) -> int:
        """The run's: that of the rank that failed first, or 0."""
        return 0 if self.failed is None else self.exit_codes()[self.failed] or 1

    def end(self) -> None:
        """Ends every rank that is still running, with the processes that it started."""
        if self.watched and self.failed is not None and self.exit_codes()[self.failed] != EXIT_CODE:
            self._await_witness()
        with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)):
            running = [process for process in self._processes if process.exitcode is None]
            _signal(running, signal.SIGTERM)
            _signal(running, signal.SIGCONT)  # one that was stopped takes no other signal
            deadline = time.monotonic() + self.grace
            while any(process.exitcode is None for process in running) and time.monotonic() < deadline:
                time.sleep(0.05)
            _signal(running, signal.SIGKILL)
            for process in self._processes:
                process.join()

    def _await_witness(self) -> None:
        deadline = time.monotonic() + self.grace
        while self.witness is None and None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(0.05)
            self._look_for_witness()
        self._look_for_witness()

    def _look_for_witness(self) -> None:
        codes = self.exit_codes()
        self.witness = codes.index(PEER_LOST_CODE) if PEER_LOST_CODE in codes else None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()


def _signal(processes: Sequence[multiprocessing.process.BaseProcess | _Spawned], number: int) -> None:
    for process in processes:
        # A rank leads a process group of its own, so this reaches its data loaders too, also when the rank itself
        # has ended. One that has not yet made its group is signalled by itself.
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _forkserver(env: Mapping[str, str], logs: Path) -> multiprocessing.context.BaseContext:
    """The process that imports Megatron once. What it prints meanwhile goes to ``preload.log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    before = dict(os.environ)
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ.update(env)  # libraries read theirs, OMP_NUM_THREADS first, while they are loaded
    target = os.open(logs / "preload.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, target):
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(before)
    return context


def _forked(context: multiprocessing.context.BaseContext, entry: str, argv: list[str], env: dict[str, str],
            log: Path) -> multiprocessing.process.BaseProcess:
    process = context.Process(target=_run_rank, args=(entry, argv, env, str(log)))
    try:
        process.start()
    except (EOFError, ConnectionError):
        said = (log.parent / "preload.log").read_text(errors="replace").strip().splitlines()[-1:]
        raise UsageError([f"importing Megatron failed: {' '.join(said) or 'it said nothing'} "
                          f"(all of it is in {log.parent / 'preload.log'})"]) from None
    return process


def _run_rank(entry: str, argv: list[str], env: dict[str, str], log: str) -> None:
    """What a forked rank does."""
    os.setsid()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    sys.stdout.flush()  # what was printed while importing belongs into preload.log
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(env)
    # A rank starts processes as a fresh interpreter would, not as it was started: torch's data loaders are forked.
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [entry, *argv]
    sys.exit(importlib.import_module(entry).main(argv))


def _end_with_launcher() -> None:
    """For when the launcher is killed and cannot end its ranks. (A forked rank's parent is the fork server.)"""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


class _Spawned(subprocess.Popen):
    """A rank as a fresh interpreter, with the names that a forked one has."""

    def __init__(self, entry: str, argv: list[str], env: dict[str, str], log: Path):
        with open(log, "ab") as target:
            super().__init__([sys.executable, "-u", "-m", entry, *argv], stdin=subprocess.DEVNULL, stdout=target,
                             stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True,
                             preexec_fn=_killed_with_parent if sys.platform == "linux" else None)

    @property
    def exitcode(self) -> int | None:
        """As ``multiprocessing.Process.exitcode``."""
        return self.poll()

    def join(self) -> None:
        """As ``multiprocessing.Process.join``."""
        self.wait()


def _killed_with_parent() -> None:
    """Asks the kernel to end this process when the launcher is killed and cannot."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
