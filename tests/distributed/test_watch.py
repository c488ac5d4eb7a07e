"""A launcher's store that does not answer ends a rank where its process is stopped or out of sight, not where it is slow."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

TIMEOUT = 1.0  # seconds; a store is silent for too long after 0.6 of them
# A launcher: its store, behind a door that can be shut while the process goes on.
LAUNCHER = """
import signal, socket, threading
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
door, is_open = socket.create_server(("127.0.0.1", 0)), threading.Event()

def relay(source, target):
    while data := source.recv(65536):
        is_open.wait()
        target.sendall(data)

def let_in():
    while True:
        caller, _ = door.accept()
        inside = socket.create_connection(("127.0.0.1", store.port))
        for pair in ((caller, inside), (inside, caller)):
            threading.Thread(target=relay, args=pair, daemon=True).start()

is_open.set()
threading.Thread(target=let_in, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print(door.getsockname()[1], flush=True)
while True:
    signal.sigwait({signal.SIGUSR1})
    is_open.clear() if is_open.is_set() else is_open.set()
    print("open" if is_open.is_set() else "shut", flush=True)
"""
RANK = f"""
import sys
from megatron_hetermoe.runtime.watch import Watch

watch = Watch(0, ["attention"], {TIMEOUT}, ("127.0.0.1", int(sys.argv[1])), None, "test")
watch.start()
print("watching", flush=True)
sys.stdin.read()
watch.close()
print("through", flush=True)
"""


def start(program, *args):
    return subprocess.Popen([sys.executable, "-c", program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture
def launcher_and_rank():
    with start(LAUNCHER) as launcher, start(RANK, launcher.stdout.readline().strip()) as rank:
        try:
            assert rank.stdout.readline() == "watching\n"
            yield launcher, rank
        finally:
            launcher.kill()
            rank.kill()


def test_a_store_in_a_stopped_launcher(launcher_and_rank):
    launcher, rank = launcher_and_rank
    launcher.send_signal(signal.SIGSTOP)
    assert rank.wait(60) == 3
    assert "hetermoe: the launcher's store at 127.0.0.1:" in (said := rank.stderr.read()) and "is stopped: " in said


def test_a_store_in_a_slow_launcher(launcher_and_rank):
    launcher, rank = launcher_and_rank
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.stdout.readline() == "shut\n"
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(4 * TIMEOUT)  # a stopped one is judged in 0.6 of one
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.stdout.readline() == "open\n"
    rank.stdin.close()
    assert rank.wait(60) == 0, rank.stderr.read()
    assert rank.stdout.read() == "through\n"
