"""Ends this rank, with a message, when a peer has died, failed or stopped.

A collective whose peer is gone waits until its communicator's time-out, minutes later, and then blames the wrong
rank. So every rank says in the run's store that it is alive, and reads there of the others:

    peer/R      who rank R is          beat/R     changes as long as it lives, or says that it has ended
    verdict     the first culprit that any rank found    seen/R    rank R has read it

Two threads: one talks to the store, and may block there when the store's own host is what has stopped; the other one
talks to nobody and so always runs. A rank that works for long but lives is left in peace (``peers.state``).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_hetermoe.config.errors import PEER_LOST_CODE
from megatron_hetermoe.runtime.marks import Marks
from megatron_hetermoe.runtime.peers import ENDED, Peer, Silences, listener, state, this_process

NEIGHBOURS = 8  # ranks that each rank listens to, the next ones round the ring; so the store's load grows as the world
_FAILED_CODE = 1
# Words of the errors that communicators raise when the fault is another rank's.
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "socket", "timed out",
         "connection was likely closed", "connection refused")


class Watch:
    """One rank's.

    Args:
        rank: this one.
        roles: of all ranks, by rank.
        timeout: seconds within which all ranks must have ended after one of them is gone.
        address: host and port of the run's store.
        store_rank: the rank whose process has the store; None where it is a launcher's.
        prefix: of the keys, for a store that outlives this attempt to run.
    """

    def __init__(self, rank: int, roles: Sequence[str], timeout: float, address: tuple[str, int],
                 store_rank: int | None, prefix: str):
        self.marks = Marks()
        self._me = this_process(rank, roles[rank])
        self._roles = tuple(roles)
        self._timeout = timeout
        self._period = min(1.0, timeout / 12)
        self._limit = timeout * 0.6  # of silence; what is left is for the verdict to get round
        self._store_rank = store_rank
        self._address = address
        self._prefix = prefix
        world = len(roles)
        neighbours = {(rank + step) % world for step in range(1, min(NEIGHBOURS, world - 1) + 1)}
        self._listening = sorted(neighbours | {store_rank} - {None, rank})
        self._peers: dict[int, Peer] = {}
        self._launcher: Peer | None = None  # the process that has the store, if it is a launcher on this machine
        self._silences = Silences(longest=2 * self._period)
        self._round = 0
        self._verdict: dict | None = None
        self._store_lost = False
        self._closing, self._closed = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._heard = threading.Event()  # a verdict is there
        self._store: dist.Store | None = None
        self._threads = [
            threading.Thread(target=self._talk, name="hetermoe-beat", daemon=True),
            threading.Thread(target=self._guard, name="hetermoe-guard", daemon=True),
        ]

    def start(self) -> None:
        """From now on peers see this rank, and this rank ends when one of them is gone."""
        self._store = self._connect()
        if self._store_rank is None:
            self._launcher = listener(self._address)
        for thread in self._threads:
            thread.start()

    def close(self, code: int = 0) -> None:
        """This rank is through; its silence means nothing from now on. The store's host waits for the others.

        Args:
            code: the process's exit code. With another one than 0 the others are expected to end likewise, as when
                Megatron's training loop decides so; one that does not within the time-out takes it for a failure.
        """
        self._closing.set()
        self._threads[0].join(self._timeout)
        try:
            self._store.set(f"beat/{self._me.rank}", f"{ENDED} {code}")
            if self._me.rank == self._store_rank:
                self._await_others(lambda rank: self._store.get(f"beat/{rank}").startswith(ENDED.encode()))
        except RuntimeError:
            pass  # the store's host has ended already, and with it all there is to say
        self._closed.set()

    def failed(self, error: BaseException) -> None:
        """Ends this process, whose main thread raised; says why, here and to the others. Does not return.

        An error of a communicator is mostly another rank's fault: then that one's name is awaited for as long as it
        may take the others to find it.
        """
        text = " ".join(str(error).split()) or type(error).__name__
        is_peers = isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or (
            isinstance(error, (RuntimeError, ConnectionError)) and any(word in text.lower() for word in _LOST))
        if is_peers and self._heard.wait(self._timeout):
            self._end()
        self._ending.acquire()  # for good: the verdict on this rank is not for its own guard to read
        traceback.print_exception(error)
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        self._publish(self._me, f"failed: {type(error).__name__}: {text[:500]}{notes}")
        self._leave(_FAILED_CODE)

    # ------------------------------------------------------------------------------------------- threads

    def _talk(self) -> None:
        """Beats and listens, until this rank ends."""
        me = self._me
        last = time.monotonic()
        try:
            self._store.set(f"peer/{me.rank}", me.to_json())
            while not self._closing.is_set():
                self._store.set(f"beat/{me.rank}", str(self._round))
                if self._store.check(["verdict"]):
                    self._hear(json.loads(self._store.get("verdict")))
                now = time.monotonic()
                for rank in self._listening:
                    self._listen(rank, now - last)
                last = now
                self._round += 1
                self._closing.wait(self._period)
        except RuntimeError as error:  # torch's errors of a store derive from it
            if not self._closing.is_set():
                self._lost_store(f"its store's connection broke: {' '.join(str(error).split())[:120]}")

    def _listen(self, rank: int, passed: float) -> None:
        if rank not in self._peers:
            if not self._store.check([f"peer/{rank}", f"beat/{rank}"]):
                return
            self._peers[rank] = Peer(**json.loads(self._store.get(f"peer/{rank}")))
        beat = self._store.get(f"beat/{rank}").decode()
        silent = self._silences.note(rank, beat, passed)
        peer = self._peers[rank]
        if silent == 0 or beat == f"{ENDED} 0":
            return
        if beat.startswith(ENDED):
            if silent > self._limit:
                self._publish(peer, f"has ended with exit code {beat.removeprefix(ENDED).strip()}")
            return
        now = state(peer, self._me)
        # Read again: a rank may have ended in good order after its beat was read and before the kernel was asked.
        if now == "dead" and not self._store.get(f"beat/{rank}").startswith(ENDED.encode()):
            self._publish(peer, "has died: its process is gone")
        elif silent > self._limit and now == "stopped":
            self._publish(peer, f"is stopped: no sign of life for {silent:.1f} s")
        elif silent > self._limit and now == "unknown" and not self._has_witness(peer):
            self._publish(peer, f"is gone: no sign of life for {silent:.1f} s")

    def _has_witness(self, peer: Peer) -> bool:
        """Whether a rank of the silent one's machine still speaks, which can ask the kernel and will accuse it."""
        return any(
            other.space == peer.space and other.rank != peer.rank and self._silences.of(other.rank) < self._limit / 2
            for other in self._peers.values()
        )

    def _guard(self) -> None:
        """Ends this rank when there is a verdict, or when the store does not answer any more."""
        seen, blocked, last = -1, 0.0, time.monotonic()
        while not self._closed.is_set():
            self._heard.wait(self._period)
            now = time.monotonic()
            blocked = 0.0 if seen != self._round else blocked + min(now - last, 2 * self._period)
            seen, last = self._round, now
            if self._heard.is_set() and not self._closing.is_set():
                self._end()
            if blocked > self._limit and self._store_is_gone():
                self._lost_store(f"is stopped: the run's store in it has not answered for {blocked:.1f} s")

    def _store_is_gone(self) -> bool:
        """Whether a store that does not answer is that of a process that will not go on; it needs no interpreter."""
        if self._store_rank == self._me.rank:
            return False
        peer = self._launcher if self._store_rank is None else self._peers.get(self._store_rank)
        return peer is None or state(peer, self._me) != "running"

    # ------------------------------------------------------------------------------------------- verdicts

    def _publish(self, culprit: Peer, what: str) -> None:
        """Names a culprit to all ranks, unless another rank has named one; then that one counts here too."""
        mine = json.dumps({"rank": culprit.rank, "culprit": str(culprit), "what": what})
        try:
            self._hear(json.loads(self._store.compare_set("verdict", "", mine)))
        except RuntimeError:
            self._hear(json.loads(mine))  # no store, so no other opinion

    def _lost_store(self, what: str) -> None:
        self._store_lost = True
        host, port = self._address
        if self._store_rank is None:
            self._hear({"rank": None, "culprit": f"the launcher's store at {host}:{port}", "what": what})
            return
        peer = self._peers.get(self._store_rank)
        name = str(peer) if peer else f"rank {self._store_rank} ({self._roles[self._store_rank]}, host {host})"
        if peer and state(peer, self._me) == "dead":
            what = "has died: its process is gone"
        self._hear({"rank": self._store_rank, "culprit": name, "what": what})

    def _hear(self, verdict: dict) -> None:
        self._verdict = self._verdict or verdict
        self._heard.set()

    def _end(self) -> None:
        """Says who is gone and what this rank waited for, and ends the process. Does not return."""
        with self._ending:  # held for good: one message, whichever thread comes first
            verdict = self._verdict
            if verdict["rank"] != self._me.rank:
                print(f"hetermoe: {verdict['culprit']} {verdict['what']}\n"
                      f"hetermoe: {self._me} awaited {self.marks.awaited()}, and ends with exit code {PEER_LOST_CODE}",
                      file=sys.stderr, flush=True)
            else:
                print(f"hetermoe: {self._me} {verdict['what']}: the others took it for gone and have ended",
                      file=sys.stderr, flush=True)
            self._leave(PEER_LOST_CODE)

    def _leave(self, code: int) -> None:
        """Ends the process without unwinding: threads may be stuck inside a communicator, and would stay so."""
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        if self._store_rank is not None and not self._store_lost:
            # So that the store's host outlives all readers. On a thread, since the store may not answer.
            farewell = threading.Thread(target=self._farewell, daemon=True)
            farewell.start()
            farewell.join(self._limit / 2)
        os._exit(code)

    def _farewell(self) -> None:
        culprit = (self._verdict or {}).get("rank")
        try:
            self._store.set(f"seen/{self._me.rank}", "1")
            if self._me.rank == self._store_rank:
                self._await_others(lambda rank: rank == culprit or self._store.check([f"seen/{rank}"]))
        except RuntimeError:
            return

    def _await_others(self, ready: Callable[[int], bool]) -> None:
        """Waits until all other ranks that are here are ready, or have died, or for the time that all have to end."""
        deadline = time.monotonic() + self._timeout
        left = {rank for rank in range(len(self._roles)) if rank != self._me.rank}
        while left and time.monotonic() < deadline:
            left = {rank for rank in left if self._store.check([f"beat/{rank}"]) and not ready(rank)
                    and not (rank in self._peers and state(self._peers[rank], self._me) == "dead")}
            time.sleep(self._period / 4)

    def _connect(self) -> dist.Store:
        """A connection of this watch's own: others' requests may block theirs."""
        host, port = self._address
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False,
                              timeout=timedelta(seconds=self._timeout))
        return dist.PrefixStore(self._prefix, store)
