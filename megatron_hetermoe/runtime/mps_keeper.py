"""The process that starts NVIDIA's Multi-Process Service for one run, and ends it when the run has ended in whatever way.

``python -I mps_keeper.py GPU LOGS`` makes a private folder, starts the service's daemon there and prints one line of JSON:
``{"folder": ...}``, or ``{"failed": ...}`` and ends. When its standard input ends, since the run closed it or was killed, it
ends the daemon and removes the folder. It is a session of its own, which Ctrl-C does not reach, and imports nothing that a
path could hide.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PREFIX = "hetermoe-mps-"
_LONGEST = 60  # characters of the folder's place; the system allows 107 for a socket's path, which the service adds to
_START, _QUIT = 60, 60  # seconds
_FORCED = 10  # seconds after which the service ends servers that still have clients


def variables(folder: str, logs: str) -> dict[str, str]:
    """What leads a process to the service in a folder."""
    return {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": logs}


def main(gpu: str, logs: str) -> int:
    """Keeps the service. The exit code is 1 when it did not start or had to be killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The run's end decides. A handler that does nothing, unlike SIG_IGN, is not handed down to the daemon.
        signal.signal(number, lambda *_: None)
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place if len(place) <= _LONGEST else "/tmp"))
    environment = {**os.environ, **variables(str(folder), logs), "CUDA_VISIBLE_DEVICES": gpu}
    environment.pop("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", None)  # the user's would be the most for every rank
    try:
        failure = _start(folder, environment)
        _say({"failed": failure} if failure else {"folder": str(folder)})
        if not failure:
            sys.stdin.buffer.read()
        return int(bool(failure) | _stop(folder, environment))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, environment: dict[str, str]) -> str:
    """Starts the daemon; returns what went wrong, or nothing."""
    said = folder / "said"  # a file, since a daemon that keeps a pipe open would never let it end
    with said.open("wb") as output:
        try:
            ended = subprocess.run([CONTROL, "-d"], env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, timeout=_START)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    text = " ".join(said.read_text(errors="replace").split())
    return f"{CONTROL} -d ended with exit code {ended.returncode}: {text or 'it said nothing'}" if ended.returncode else ""


def _stop(folder: Path, environment: dict[str, str]) -> bool:
    """Ends the daemon and its servers; returns whether some had to be killed."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([CONTROL], env=environment, input=f"quit -t {_FORCED}\n", text=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, timeout=_QUIT)
    deadline = time.monotonic() + _FORCED
    while (left := _of_service(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(left)


def _of_service(folder: Path) -> list[int]:
    """The processes of the service in this folder, and of no other: their environment names it."""
    wanted = f"CUDA_MPS_PIPE_DIRECTORY={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # the system keeps 15 characters of a name
            if (process / "comm").read_text().startswith("nvidia-cuda-mps"):
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        except OSError:
            continue
    return found


def _say(document: dict[str, str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(document), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
