"""Starts the ranks of a test, and is the only place that does.

Ranks are forked from a server that has imported Megatron (see rank_process.py), each in its own session, with its
output in a file. The rendezvous store lives in this process on a port the system chose, so no two runs can meet.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # this process imports torch too, and the ranks inherit it

TESTS = Path(__file__).parent
TAIL = 4000  # characters of a rank's output in a failure
TERMINATE = "TEST_TERMINATE"  # "rank:step" in the environment: that rank then gets SIGTERM after so many steps
GRACE = 20.0  # seconds the other ranks have to end once one has failed

_context = multiprocessing.get_context("forkserver")


class RanksFailed(AssertionError):
    """Ranks failed or hung; the message holds the ends of their outputs."""


@dataclass(frozen=True)
class Step:
    """What one ``train_step`` returned on a rank, at full precision."""

    loss: dict[str, float]
    grad_norm: float | None
    skipped: int
    num_zeros: int | None
    loss_scale: float
    resident: int  # bytes of the process that are in memory, after the step
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What one ``evaluate`` returned on a rank."""

    loss: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Run:
    """A finished run. Lists are by rank.

    exit_codes: as the system gives them; negative for a signal. -9 also for ranks that had to be killed.
    output: stdout and stderr together.
    params_norms: what ``--log-params-norm`` gave to the log, by step.
    scalars: what was written to TensorBoard, by name and step.
    parameters: elements of each parameter of the model that the rank built, by name.
    gradients: the sum of squares of each parameter's gradient in the first step, after clipping, by name.
    changed: functions and methods of Megatron that were others after the run than before.
    """

    exit_codes: list[int]
    output: list[str]
    steps: list[list[Step]]
    evals: list[list[Evaluation]]
    params_norms: list[list[float | None]]
    scalars: list[dict[tuple[str, int], float]]
    parameters: list[dict[str, int]]
    gradients: list[dict[str, float]]
    changed: list[list[str]]
    seconds: float

    def check(self) -> Run:
        """Itself, if every rank ended with 0; raises RanksFailed if not."""
        if any(self.exit_codes):
            raise RanksFailed(_report("a rank failed", self.exit_codes, self.output))
        return self


def run_ranks(
    argv: Sequence[str], world: int, *, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300,
    own_store: bool = False, script: Path | None = None,
) -> Run:
    """Runs ``megatron_hetermoe.pretrain_gpt``, or a training script, with the flags ``argv`` on ``world`` ranks, in the
    folder ``cwd``.

    With ``own_store`` rank 0 holds the rendezvous store, as under most launchers; its port is then only likely to be free.

    Ranks that fail are the caller's to look at (``Run.exit_codes``, ``Run.check()``); a hang is an error here.

    Raises:
        RanksFailed: ranks were still running after ``timeout`` seconds. Names them and shows their stacks.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=cwd))
    start = time.perf_counter()
    exit_codes = _run("pretrain", (list(argv), script), world, folder, cwd, env or {}, timeout, own_store)
    seconds = time.perf_counter() - start
    records = [_records(folder, rank) for rank in range(world)]

    def only(of_rank: list[tuple[str, dict]], wanted: str, field: str, default: Any) -> Any:
        return next((record[field] for kind, record in of_rank if kind == wanted), default)

    return Run(
        exit_codes=exit_codes,
        output=_outputs(folder, world),
        steps=[[Step(**record) for kind, record in of_rank if kind == "step"] for of_rank in records],
        evals=[[Evaluation(**record) for kind, record in of_rank if kind == "eval"] for of_rank in records],
        params_norms=[[record["params_norm"] for kind, record in of_rank if kind == "log"] for of_rank in records],
        scalars=[
            {(record["name"], record["step"]): record["value"] for kind, record in of_rank if kind == "scalar"}
            for of_rank in records
        ],
        parameters=[only(of_rank, "model", "parameters", {}) for of_rank in records],
        gradients=[only(of_rank, "gradients", "squares", {}) for of_rank in records],
        changed=[only(of_rank, "changed", "names", []) for of_rank in records],
        seconds=seconds,
    )


def run_function(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls ``function(rank, world, *args)`` on ``world`` ranks, inside a process group of gloo.

    ``function`` must be defined at the top of a module; ``args`` and the results are pickled. A function that asks
    for no process group of its own may use the default one, which is destroyed for it.

    Returns:
        the results by rank.

    Raises:
        RanksFailed: a rank raised, ended otherwise than with 0, or ran for more than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        exit_codes = _run("call", (function, args), world, folder, cwd or folder, env or {}, timeout)
        if any(exit_codes):
            raise RanksFailed(_report("a rank failed", exit_codes, _outputs(folder, world)))
        return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world)]


def assert_same_steps(steps: Sequence[Step], reference: Sequence[Step], rel: float = 0.0) -> None:
    """Fails unless losses, gradient norms and skips agree step by step; ``rel`` is the relative tolerance."""
    assert len(steps) == len(reference), f"{len(steps)} steps against {len(reference)}"
    assert steps, "no steps were recorded"
    for index, (ours, theirs) in enumerate(zip(steps, reference, strict=True)):
        assert ours.skipped == theirs.skipped, f"step {index}: skipped {ours.skipped} against {theirs.skipped}"
        assert ours.loss.keys() == theirs.loss.keys(), f"step {index}: {ours.loss} against {theirs.loss}"
        pairs = {name: (ours.loss[name], theirs.loss[name]) for name in ours.loss}
        if not theirs.skipped:
            pairs["grad norm"] = (ours.grad_norm, theirs.grad_norm)
        for name, (mine, other) in pairs.items():
            assert abs(mine - other) <= rel * abs(other), f"step {index}: {name} {mine!r} against {other!r}"


def largest_differences(steps: Sequence[Step], others: Sequence[Step]) -> tuple[float, float]:
    """Of losses and of gradient norms, relative to ``others``, over all steps that both took. They skip the same ones."""
    assert len(steps) == len(others) > 0, f"{len(steps)} steps against {len(others)}"
    assert [step.skipped for step in steps] == [step.skipped for step in others]
    pairs = [(ours, theirs) for ours, theirs in zip(steps, others) if not theirs.skipped]
    losses = [abs(ours.loss[name] / theirs.loss[name] - 1) for ours, theirs in pairs for name in theirs.loss]
    return max(losses), max(abs(ours.grad_norm / theirs.grad_norm - 1) for ours, theirs in pairs)


# ------------------------------------------------------------------------------------------- processes


def _run(
    kind: str, args: tuple, world: int, folder: Path, cwd: Path, env: Mapping[str, str], timeout: float,
    own_store: bool = False,
) -> list[int]:
    """Starts ``rank_process.<kind>`` on every rank and waits. Returns the exit codes; raises on a hang."""
    _start_server()
    import rank_process_entry
    import torch

    limit = timedelta(seconds=timeout)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
    port = store.port
    if own_store:
        del store
        store, env = None, {"TORCHELASTIC_USE_AGENT_STORE": "False", **env}
    ranks = []
    try:
        for rank in range(world):
            arguments = (kind, rank, world, port, folder, Path(cwd), dict(env), *args)
            ranks.append(_context.Process(target=rank_process_entry.start, args=arguments))
            ranks[-1].start()
        if running := _wait(ranks, time.monotonic() + timeout):
            _dump_stacks([ranks[rank] for rank in running])
            codes = [process.exitcode for process in ranks]
            head = f"after {timeout:.0f} s these ranks were still running: {', '.join(map(str, running))}"
            raise RanksFailed(_report(head, codes, _outputs(folder, world)))
    finally:
        for process in ranks:
            _kill(process)
        del store
    return [process.exitcode for process in ranks]


def _start_server() -> None:
    """Has the fork server import Megatron, once a session. It takes its environment from ours at its start."""
    folders = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        _context.set_forkserver_preload(["rank_process"])
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _wait(ranks: Sequence, deadline: float) -> list[int]:
    """Waits for all to end, or until ``deadline``, or until GRACE seconds after the first failure, when those left
    are killed. Returns the ranks that still run at the deadline."""
    failed = False
    while alive := [process for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            if not failed:
                return [rank for rank, process in enumerate(ranks) if process in alive]
            _dump_stacks(alive)
            for process in alive:
                _kill(process)
            return []
        connection.wait([process.sentinel for process in alive], min(left, 0.5))
        if not failed and any(process.exitcode for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE)
        if failed and all(process.exitcode is not None or _is_stopped(process.pid) for process in ranks):
            for process in alive:
                _kill(process)
    return []


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped, and so will not end by itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _dump_stacks(processes: Sequence) -> None:
    """Has each write its threads' stacks to its output, and gives it the time."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it may have just ended
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)


def _kill(process) -> None:
    """Ends a rank and all it started, whatever state it is in."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended with all its children, or has not made its session yet
    if process.exitcode is None:
        process.kill()
    process.join()


# ---------------------------------------------------------------------------------------------- files


def _outputs(folder: Path, world: int) -> list[str]:
    files = [folder / f"output.{rank}" for rank in range(world)]
    return [file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in files]


def _records(folder: Path, rank: int) -> list[tuple[str, dict]]:
    """(kind, fields) of all a rank wrote down; a line that was cut off by its end is left out."""
    file = folder / f"record.{rank}"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record.pop("kind"), record) for record in records]


def _report(head: str, exit_codes: Sequence[int | None], outputs: Sequence[str]) -> str:
    parts = [f"{head}; exit codes {list(exit_codes)}"]
    for rank, output in enumerate(outputs):
        parts.append(f"---------- rank {rank}, end of its output ----------\n{output[-TAIL:]}")
    return "\n".join(parts)
