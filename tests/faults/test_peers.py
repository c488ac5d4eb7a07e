"""A rank that dies, fails or stops ends all others, with its name; one that is slow ends nobody.

All faults over kind, victim and moment run with ``pytest -m slow tests/faults/test_peers.py``; a sample runs always. A
table of what came of them is printed at the end.
"""

from __future__ import annotations

import re
import socket
import time

import pytest
from models import tiny
from ranks import run_ranks

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "1"]
ROLES = ("attention", "attention", "expert")
TIMEOUT = 3  # seconds
SLACK = 12  # more seconds for a machine that has other work to do: what is shown is that nobody waits for minutes
MOMENTS = (
    "start", "building", "warm-up", "steady", "turn", "last-task", "transfer-out", "transfer-back", "optimizer-step",
    "save", "save-files", "save-written", "save-done", "load", "evaluation", "end",
)
# save-written: rank 0 alone writes what completes a checkpoint.
VICTIMS = {moment: (0, 1, 2) for moment in MOMENTS} | {"save-written": (0,)}
FATAL = ("kill", "stop", "raise", "exit", "sys-exit")
SAMPLE = [
    ("kill", 2, "steady"), ("stop", 2, "turn"), ("raise", 1, "optimizer-step"), ("kill", 0, "save"),
    ("stop", 0, "evaluation"),
    ("exit", 1, "end"), ("kill", 1, "start"), ("sys-exit", 2, "load"), ("busy", 1, "steady"), ("slow", 0, "save-files"),
]
ALL = [
    (kind, victim, moment)
    for kind in (*FATAL, "slow") for moment in MOMENTS for victim in VICTIMS[moment]
    if (kind, victim, moment) not in SAMPLE
] + [("late", victim, moment) for moment in ("warm-up", "steady", "turn", "evaluation") for victim in (0, 1, 2)]
SAID = {
    "kill": "has died: its process is gone", "exit": "has died: its process is gone", "stop": "is stopped: ",
    "raise": "failed: ValueError: injected", "sys-exit": "has ended with exit code 5",
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """What the faults of a load find."""
    folder = tmp_path_factory.mktemp("before")
    run_ranks([*LAYOUT, *tiny(train_iters=1, global_batch_size=4, save=folder / "saved", save_interval=1)], 3,
              cwd=folder).check()
    return folder / "saved"


def inject(kind, victim, moment, folder, checkpoint, summary):
    """Runs with one fault and checks all that must hold of it."""
    flags = tiny(
        train_iters=3, global_batch_size=4, save=folder / "saved", save_interval=2, eval_iters=1, eval_interval=2,
        load=checkpoint if moment == "load" else None, finetune=moment == "load",
    )
    run = run_ranks([*LAYOUT, "--hetermoe-stall-timeout", str(TIMEOUT), *flags], 3, cwd=folder, timeout=90,
                    env={"HETERMOE_TEST_FAULT": f"{kind}:{victim}:{moment}"})
    seconds = time.time() - float((folder / "fired").read_text())
    others = [rank for rank in range(3) if rank != victim]
    if kind not in FATAL:
        run.check()
        summary.append((kind, ROLES[victim], moment, 0.0, "all went on"))
        return
    assert seconds < TIMEOUT + SLACK
    host = re.escape(socket.gethostname())
    culprit = rf"hetermoe: rank {victim} \({ROLES[victim]}, host {host}, pid \d+\) {SAID[kind]}"
    for rank in others:
        output = run.output[rank]
        assert run.exit_codes[rank] == 3, output[-2000:]
        assert len(re.findall(culprit, output)) == 1, output[-2000:]
        awaited = r"^hetermoe: rank .* awaited (task|the end of).*, since \d\d:\d\d:\d\d"
        assert len(re.findall(awaited, output, re.M)) == 1, output[-2000:]
        assert "Traceback" not in output, output[-2000:]
    assert run.exit_codes[victim] == {"kill": -9, "stop": -9, "raise": 1, "exit": 7, "sys-exit": 5}[kind]
    assert run.output[victim].count("Traceback") == (kind == "raise")
    summary.append((kind, ROLES[victim], moment, seconds, f"rank {victim} named by ranks {others}"))


@pytest.mark.parametrize("kind, victim, moment", SAMPLE)
def test_sample(tmp_path, checkpoint, summary, kind, victim, moment):
    inject(kind, victim, moment, tmp_path, checkpoint, summary)


@pytest.mark.parametrize(
    "kind, victim, said",
    [("kill", 2, r"is gone: no sign of life for \d"), ("stop", 1, r"is gone: no sign of life for \d"),
     ("kill", 0, "its store's connection broke"), ("stop", 0, "is stopped: the run's store in it has not answered"),
     ("raise", 0, "failed: ValueError: injected")],
)
def test_on_machines_of_their_own(tmp_path, summary, kind, victim, said):
    """Where no rank can ask the kernel about another one, silence and connections must do; rank 0 has the store."""
    run = run_ranks(
        [*LAYOUT, "--hetermoe-stall-timeout", str(TIMEOUT), *tiny(train_iters=3, global_batch_size=4)], 3, cwd=tmp_path,
        env={"HETERMOE_TEST_FAULT": f"{kind}:{victim}:steady", "HETERMOE_TEST_APART": "1"}, timeout=90,
        own_store=victim == 0,
    )
    seconds = time.time() - float((tmp_path / "fired").read_text())
    assert seconds < TIMEOUT + SLACK
    for rank in {0, 1, 2} - {victim}:
        assert run.exit_codes[rank] == 3, run.output[rank][-2000:]
        assert len(re.findall(rf"^hetermoe: rank {victim} \({ROLES[victim]}, host .*{said}", run.output[rank], re.M)) == 1
        assert "Traceback" not in run.output[rank]
    summary.append((kind, ROLES[victim], "apart", seconds, f"rank {victim} named"))


@pytest.mark.slow
@pytest.mark.parametrize("kind, victim, moment", ALL)
def test_all(tmp_path, checkpoint, summary, kind, victim, moment):
    inject(kind, victim, moment, tmp_path, checkpoint, summary)
