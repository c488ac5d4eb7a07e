"""``hetermoe train --emulate`` with stand-ins for the service, nvidia-smi and the GPU: what it starts, it ends.

On a GPU: tests/gpu/test_gpu_emulate.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_mps
import pytest
from fake_mps import GPU
from models import tiny
from recipes import recipe_of

from megatron_hetermoe.cli.main import main
from megatron_hetermoe.runtime import mps, mps_keeper, seen_gpu
from megatron_hetermoe.runtime.seen_gpu import LinearLayers, SeenGpu

ROOT = Path(__file__).parents[2]
SHARES = "attention=2x25%,expert=1x20%"

# The command, in a process that takes a file in the service's folder for a GPU whose shares hold, with or without real ranks.
COMMAND = """
import os, sys
from dataclasses import replace
from pathlib import Path
from fake_mps import GPU
from megatron_hetermoe.cli import launch, train
from megatron_hetermoe.cli.main import main
from megatron_hetermoe.runtime import seen_gpu

def seen(environments, layers=None):
    found = []
    for environment in environments:
        share = environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
        served = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", "/none"), "control").exists()
        assert served or share is None
        wrong = ("4096 x 1024 by 1024 x 24",) if layers and share in ("20", "26", "27", "29") else ()
        found.append(replace(GPU, multiprocessors=GPU.multiprocessors * int(share or 100) // 100, wrong_products=wrong))
    return found

if __name__ == "__main__":
    seen_gpu.seen = seen
    if os.environ["FAKE_RANKS"]:
        train.OWN_ENTRY, launch.PRELOAD = "emulated_rank", "json"
    sys.exit(main(sys.argv[1:]))
"""
# A rank that says what it got: it ends, fails, or stays.
RANK = """
import json, os, sys, time

def main(argv):
    with open({pids!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    names = ("RANK", "CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
             "NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_MAX_CTAS", "CUDA_DEVICE_MAX_CONNECTIONS")
    print("environment", json.dumps({{name: os.environ.get(name) for name in names}}), flush=True)
    if os.environ["FAKE_RANKS"] == "fail":
        if os.environ["RANK"] == "1":
            return 7
        time.sleep(2)
        return 3
    if os.environ["FAKE_RANKS"] == "stay":
        time.sleep(60)
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


class Command:
    """Starts the command in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls = fake_mps.install(folder / "bin")
        (folder / "command.py").write_text(COMMAND)
        (folder / "emulated_rank.py").write_text(RANK.format(pids=f"{self.calls}.ranks"))
        self.temporary = folder / "t"
        self.temporary.mkdir()

    def start(self, ranks: str, *argv: str, **env: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(self.temporary),
            "PYTHONPATH": f"{self.folder}:{ROOT}:{ROOT / 'tests'}", "FAKE_RANKS": ranks, "CUDA_VISIBLE_DEVICES": "0", **env,
        }
        return subprocess.Popen(
            [sys.executable, "command.py", "train", "recipe.yaml", "--keep-logs", "logs", *argv], cwd=self.folder,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def folders(self) -> list[Path]:
        """The service's, that are there."""
        return [*self.temporary.glob(f"{mps_keeper.PREFIX}*"), *Path("/tmp").glob(f"{mps_keeper.PREFIX}*")]

    def environments(self) -> list[dict[str, str]]:
        """What the ranks that have said so got."""
        texts = [log.read_text() for log in sorted(self.folder.glob("logs/rank*.log"))]
        return [json.loads(found) for text in texts for found in re.findall(r"environment (.*)\n", text)]

    def has_stayed(self) -> None:
        """Waits for ranks that stay."""
        deadline = time.monotonic() + 30
        while len(self.environments()) < 3:
            assert time.monotonic() < deadline, "the ranks did not come"
            time.sleep(0.05)

    def is_over(self) -> None:
        """Fails unless the service was started and ended once, after all ranks, and has left nothing."""
        start, quit = self.calls.read_text().splitlines()
        folder = re.fullmatch(r"start (\S+) gpu=GPU-0123", start)[1]
        assert quit == f"quit -t 10 {folder} ranks=0"
        assert len(folder) < 90 and not Path(folder).exists()
        assert not mps_keeper._of_service(Path(folder))


@pytest.fixture
def command(tmp_path):
    # pytest's folders have names that are too long for a socket
    made = Command(tmp_path)
    (tmp_path / "recipe.yaml").write_text("MODEL_ARGS:\n  --transformer-impl: local\n  --bf16: true\n")
    before = set(Path("/tmp").glob(f"{mps_keeper.PREFIX}*"))
    yield made
    assert set(made.folders()) <= before


def test_each_rank_has_its_share_of_one_gpu_and_the_user_his_other_service(command, tmp_path):
    other = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path), "CUDA_MPS_LOG_DIRECTORY": str(tmp_path)}
    control = str(tmp_path / "bin" / "nvidia-cuda-mps-control")
    subprocess.run([control, "-d"], env=other, check=True)
    command.calls.unlink()
    try:
        process = command.start("end", "--emulate", SHARES, CUDA_MPS_PIPE_DIRECTORY=str(tmp_path), NCCL_MAX_CTAS="4")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert mps_keeper._of_service(tmp_path), "the user's service is gone"
    finally:
        subprocess.run([control], env=other, input="quit\n", text=True, check=True)
        command.calls.write_text("".join(command.calls.read_text().splitlines(True)[:2]))
    assert "NVIDIA H200 stands for 2 attention ranks of 25% (33 of 132 multiprocessors) and 1 expert rank of 20% (26" in output
    command.is_over()
    found = command.environments()
    assert [one["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for one in found] == ["25", "25", "20"]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == {"GPU-0123"}
    assert len({one["CUDA_MPS_PIPE_DIRECTORY"] for one in found} - {str(tmp_path)}) == 1
    assert {(one["NCCL_MULTI_RANK_GPU_ENABLE"], one["NCCL_MAX_CTAS"], one["CUDA_DEVICE_MAX_CONNECTIONS"]) for one in found} == {
        ("1", "4", "16")}  # what the user has set stays
    assert "a line of the service" in (tmp_path / "logs" / "control.log").read_text()


def test_a_rank_that_fails(command):
    process = command.start("fail", "--emulate", SHARES)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 7 and "rank 1 ended with exit code 7" in errors
    assert "logs/control.log and logs/server.log" in errors
    command.is_over()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_is_ended(command, number):
    process = command.start("stay", "--emulate", SHARES)
    command.has_stayed()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    deadline = time.monotonic() + 30  # a killed command waits for nothing, but its keeper ends the service
    while command.folders() and time.monotonic() < deadline:
        time.sleep(0.05)
    if number != signal.SIGKILL:
        command.is_over()
    else:
        assert [line.split()[0] for line in command.calls.read_text().splitlines()] == ["start", "quit"]


def test_a_service_that_does_not_start(command):
    process = command.start("end", "--emulate", SHARES, FAKE_MPS_FAILS="1")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and errors.startswith("hetermoe: 1 problem:") and "Traceback" not in errors
    assert "does not start: nvidia-cuda-mps-control -d ended with exit code 1: An instance of this daemon" in errors
    assert "control.log: a line of the service)" in errors and not command.environments()


def test_real_ranks_train_the_same(command, tmp_path):
    """Without a GPU they are on the CPU, and shares change nothing."""
    (tmp_path / "recipe.yaml").write_text(recipe_of(tiny(train_iters=2), {}))
    said = []
    for argv in (["--emulate", "attention=1x50%,expert=1x50%"],
                 ["--", "--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"]):
        process = command.start("", *argv, CUDA_VISIBLE_DEVICES="")
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append(re.search(r"loss +(\S+) at step 1, (\S+) at step 2", output).groups())
    assert said[0] == said[1]
    command.is_over()


def test_one_that_does_not_quit_is_killed(tmp_path, monkeypatch, capsys):
    """And no other: its environment names the folder."""
    fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(mps_keeper, "_FORCED", 0.2)
    folders = [tmp_path / "one", tmp_path / "other"]
    environments = []
    for folder in folders:
        folder.mkdir()
        environments.append({**os.environ, **mps_keeper.variables(str(folder), str(folder))})
        assert not mps_keeper._start(folder, environments[-1])
    assert mps_keeper._stop(folders[0], {**environments[0], "FAKE_MPS_DEAF": "1"})
    deadline = time.monotonic() + 10
    while mps_keeper._of_service(folders[0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not mps_keeper._of_service(folders[0]) and mps_keeper._of_service(folders[1])
    assert not mps_keeper._stop(folders[1], environments[1])


def test_a_long_place_for_temporary_files_is_not_used(tmp_path, monkeypatch):
    fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    place = tmp_path / ("long" * 20)
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    with mps.Service("GPU-0123", tmp_path) as service:
        assert service.variables["CUDA_MPS_PIPE_DIRECTORY"].startswith(f"/tmp/{mps_keeper.PREFIX}")


def test_the_lab_of_the_benchmarks_divides_by_the_same_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    import lab

    calls = fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(seen_gpu, "seen", lambda environments, layers=None: [GPU for _ in environments])
    names = ("RANK", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "NCCL_MAX_CTAS", "NCCL_MULTI_RANK_GPU_ENABLE", "CUDA_VISIBLE_DEVICES")
    code = f"import os, sys; print(*map(os.environ.get, {names})); sys.exit(int(os.environ['RANK']) == 1)"
    ended = lab.run([lab.Rank(25, "flash", "fast"), lab.Rank(20, "efficient", "slow")], lambda rank: ["-c", code], 30, blocks=1)
    assert ended.codes == [0, 1] and ended.failure
    assert ended.logs == ["0 25 1 1 GPU-0123\n", "1 20 1 1 GPU-0123\n"]
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["start", "quit"]


def test_the_lab_names_shares_in_which_products_are_wrong(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    import lab

    def seen(environments, layers=None):
        shares = [environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for environment in environments]
        return [replace(GPU, wrong_products=("a by b",) if share == "31" and layers.rows == 64 else ()) for share in shares]

    fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(seen_gpu, "seen", seen)
    layers = [LinearLayers("bfloat16", rows, 8, (8,)) for rows in (32, 64)]
    ranks = [lab.Rank(31, "flash", "fast"), lab.Rank(31, "flash", "fast"), lab.Rank(25, "efficient", "slow")]
    assert lab.wrong_shares(ranks, layers) == ["with 31% (132 multiprocessors) products are wrong at 64 rows: a by b"]


# --------------------------------------------------------------------------------------------- refusals

LOCAL = "MODEL_ARGS:\n  --transformer-impl: local\n"
BOTH = "attention=2x25%,expert=2x25%"
NO_GPU = SeenGpu(nccl=GPU.nccl, problem="Found no NVIDIA driver")


@pytest.mark.parametrize("shares, gpu, said", [
    ("attention=2x25%,expert=2x30%", GPU, ["gives away 110%"]),
    ("attention=2x25%,experts=2x20%", GPU, ["the role 'experts'"]),
    (BOTH, NO_GPU, ["torch can use none here (Found no NVIDIA driver)"]),
    (BOTH, replace(GPU, nccl=(2, 28, 9)), ["2.28.9 is loaded (/lib/libnccl.so.2)", "LD_PRELOAD=DIR/nvidia/nccl/lib"]),
    (BOTH, replace(GPU, nccl=()), ["this torch has none"]),
    (BOTH, replace(GPU, name="NVIDIA H100 MIG 1g.10gb"), ["divided by MIG"]),
    (BOTH, replace(GPU, name="Tesla P100", capability=(6, 0)), ["capability 6.0", "7.0 (Volta)"]),
    ("attention=3x25%,expert=1x25%", replace(GPU, nccl=(2, 29, 1)), [
        "3 attention ranks, --hetermoe-attention-ranks has 2", "1 expert ranks, --hetermoe-expert-ranks has 2", "2.29.1",
        "hetermoe: 3 problems"]),
])
def test_refused(tmp_path, monkeypatch, capsys, shares, gpu, said):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(LOCAL + "HETERMOE:\n  attention-ranks: 2\n  expert-ranks: 2\n")
    assert_refused(["train", str(recipe), "--emulate", shares], gpu, said, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("mode, mig, said", [("Prohibited", "[N/A]", "compute mode Prohibited"),
                                             ("Default", "Enabled", "divided by MIG")])
def test_modes_that_are_refused(tmp_path, monkeypatch, capsys, mode, mig, said):
    (tmp_path / "r.yaml").write_text(LOCAL)
    assert_refused(["train", str(tmp_path / "r.yaml"), "--emulate", BOTH], GPU, [said], tmp_path, monkeypatch, capsys,
                   mode=mode, mig=mig)


def test_no_service(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(LOCAL)
    assert_refused(["train", str(tmp_path / "r.yaml"), "--emulate", BOTH], GPU,
                   ["nvidia-cuda-mps-control is not on PATH"], None, monkeypatch, capsys)


SEQUENTIAL = ["--hetermoe-experts", "sequential"]


@pytest.mark.parametrize("shares, words, said", [
    ("attention=1x26%,expert=1x20%", [], [
        "attention ranks have 26%, 34 multiprocessors of an NVIDIA H200", "some products in bfloat16 wrongly",
        "give them one of 22%, 23%, 24%, 25%, 28%, 30%\n"]),
    ("attention=1x25%,expert=1x20%", SEQUENTIAL, ["expert ranks have 20%", "or --hetermoe-experts grouped"]),
])
def test_shares_in_which_cublas_is_wrong(command, shares, words, said):
    process = command.start("end", "--emulate", shares, "--", *words)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and all(text in errors for text in said), errors
    command.is_over()
    assert not command.environments()


def test_a_plan_with_other_ranks(tmp_path, monkeypatch, capsys):
    from test_page import PLAN

    (tmp_path / "plan.json").write_text(PLAN.to_json())
    (tmp_path / "r.yaml").write_text(LOCAL)
    argv = ["train", str(tmp_path / "r.yaml"), "--emulate", "attention=1x5%,expert=1x5%", "--", "--hetermoe-plan",
            str(tmp_path / "plan.json")]
    assert_refused(argv, GPU, [f"--hetermoe-plan has {PLAN.expert_ranks}"], tmp_path, monkeypatch, capsys)


def test_a_launchers_rank_divides_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "r.yaml", "--emulate", BOTH]) == 2
    assert "--emulate: a launcher has started this" in capsys.readouterr().err


def assert_refused(argv, gpu, said, folder, monkeypatch, capsys, **modes):
    """The command ends with one message, with each of these texts, and starts no service."""
    calls = fake_mps.install(folder / "bin", **modes) if folder else None
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}" if folder else "/nowhere")
    monkeypatch.setattr(seen_gpu, "seen", lambda environments, layers=None: [gpu for _ in environments])
    assert main(argv) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("hetermoe: ") and all(text in errors for text in said), errors
    assert calls is None or not calls.exists()


def test_shares_that_do_not_hold(tmp_path, monkeypatch, capsys):
    """Where the service cannot be reached CUDA goes on without it, and all ranks would have all of the GPU."""
    calls = fake_mps.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(seen_gpu, "seen", lambda environments, layers=None: [GPU for _ in environments])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(LOCAL)
    assert main(["train", "r.yaml", "--emulate", BOTH]) == 2
    assert "sees all 132 multiprocessors" in capsys.readouterr().err
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["start", "quit"]


def test_what_a_process_here_sees():
    """Really asked, with the environment as it is."""
    import importlib.metadata

    import torch

    (found,) = seen_gpu.seen([os.environ])
    assert bool(found.name) == torch.cuda.is_available() and bool(found.problem) != bool(found.name)
    if "LD_PRELOAD" not in os.environ and found.nccl_file:
        cuda = torch.version.cuda.partition(".")[0]
        assert ".".join(map(str, found.nccl)) == importlib.metadata.version(f"nvidia-nccl-cu{cuda}")
