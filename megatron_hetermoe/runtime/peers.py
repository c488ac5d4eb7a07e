"""Who is alive: a key per rank in the run's store, and for ranks of the same machine what the kernel says."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ENDED = "ended"  # in place of a beat, before an exit code: the rank is through, and its silence means nothing


@dataclass(frozen=True)
class Peer:
    """A rank, as the others know it.

    Attributes:
        rank: global.
        role: attention or expert.
        host: its machine's name.
        pid: its process.
        space: what tells whether the pid means something here: machine, boot and pid namespace.
    """

    rank: int
    role: str
    host: str
    pid: int
    space: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.role}, host {self.host}, pid {self.pid})"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def this_process(rank: int, role: str) -> Peer:
    """The rank that calls."""
    return Peer(rank, role, socket.gethostname(), os.getpid(), _space())


def listener(address: tuple[str, int]) -> Peer | None:
    """The process that listens at an address, where that is on this machine and the kernel says which one it is.

    Args:
        address: host and port. A connection is made, since that tells whether the host is this machine.
    """
    with socket.create_connection(address) as probe:
        if probe.getsockname()[0] != probe.getpeername()[0]:
            return None
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr.port == address[1] and one.pid:
            return Peer(-1, "launcher", socket.gethostname(), one.pid, _space())
    return None


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # equal to no other rank's: its silence alone will count


def state(peer: Peer, me: Peer) -> str:
    """"running", "stopped" or "dead"; "unknown" where the peer is on another machine.

    A living process may be silent for long: a thread can beat only while no other holds the interpreter's lock,
    and building a data set's index or pickling a checkpoint holds it for minutes. The kernel knows better.
    """
    if peer.space != me.space:
        return "unknown"
    try:
        text = Path(f"/proc/{peer.pid}/stat").read_text(encoding="utf-8", errors="replace")
        letter = text.rpartition(")")[2].split()[0]  # the name before it may hold anything
    except (OSError, IndexError):
        return "dead"
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "running")


class Silences:
    """For each rank, for how long its beat has not changed, in seconds in which this rank itself was awake.

    Args:
        longest: the most that one round adds; a round that took longer was one in which this rank slept or was
            stopped, and says nothing of others.
    """

    def __init__(self, longest: float):
        self._longest = longest
        self._beats: dict[int, str] = {}
        self._silent: dict[int, float] = {}

    def note(self, rank: int, beat: str, passed: float) -> float:
        """One round's reading. Returns the seconds of silence."""
        changed = self._beats.get(rank) != beat
        self._beats[rank] = beat
        self._silent[rank] = 0.0 if changed else self._silent[rank] + min(passed, self._longest)
        return self._silent[rank]

    def of(self, rank: int) -> float:
        """The seconds of silence, as of the last round; 0 of a rank that has not been heard yet."""
        return self._silent.get(rank, 0.0)
