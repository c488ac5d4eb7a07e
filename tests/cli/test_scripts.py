"""The commands of the README's first lines, as a user runs them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy
import yaml

ROOT = Path(__file__).parents[2]


def test_no_python_says_what_is_missing(tmp_path):
    """A machine whose only Python is too old."""
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "env", "cksum", "cat", "dirname", "mktemp", "rm"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    old = tmp_path / "bin" / "python3"
    old.write_text("#!/bin/bash\ncase \"$*\" in *version_info*\\<*) exit 1;; *) echo 3.9.1;; esac\n")
    old.chmod(0o755)
    (tmp_path / "repo").mkdir()
    subprocess.run(["cp", "-r", ROOT / "scripts", ROOT / "setup.py", tmp_path / "repo"], check=True)
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv")}
    for script in ("quickstart.sh", "test.sh"):
        ended = subprocess.run(
            [tmp_path / "repo" / "scripts" / script], env=environment, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 2, ended.stderr
        assert "no Python 3.12 or newer" in ended.stderr and "3.9.1" in ended.stderr
        assert "pyenv install 3.12" in ended.stderr
    assert not (tmp_path / "repo" / ".venv").exists()


def unigram_entropy(data: Path) -> float:
    """What a model that only knows how frequent each byte is would reach, in nats."""
    counts = numpy.bincount(numpy.fromfile(data, dtype=numpy.uint16), minlength=257)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * numpy.log(shares)).sum())


def test_quick_start(tmp_path):
    """One command trains on real text. Its loss starts at chance and ends far below what the frequencies of bytes
    give, so attention and the experts that tokens are routed to have learned; then a second start reuses all."""
    command = [ROOT / "scripts" / "quickstart.sh", "--keep-logs", tmp_path / "logs", "--", "--save", tmp_path / "saved"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, last = map(float, re.search(r"loss +([\d.]+) at step 1, ([\d.]+) at step 140", ended.stdout).groups())
    assert first > math.log(257) - 0.1
    chance = unigram_entropy(ROOT / "runs/quickstart/data/stdlib.bin")
    assert last < chance - 0.4, f"{last} after training, {chance} by the frequencies of bytes alone"
    for said in ("tokens/s", "left", "expert", "16 experts, over all layers", str(tmp_path / "saved"), "to try next"):
        assert said in ended.stdout, said
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "140"
    again = subprocess.run(
        [*command, "--train-iters", "141", "--load", tmp_path / "saved", "--override-opt-param-scheduler",
         "--save-interval", "1000", "--log-interval", "1"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "installing" not in again.stdout and "wrote" not in again.stdout
    resumed = float(re.search(r"loss +([\d.]+) at step 141", again.stdout).group(1))
    assert resumed < chance - 0.4


def test_uneven_pools(tmp_path):
    """The benchmark of four fast and three slow GPUs stays below the bound that it prints, and above the sum of the pools."""
    figures = {"D1": {"flash": {25: {4096: 3.0}}, "efficient": {20: {4096: 7.0}},
                      "expert": {25: {1024: 0.8, 4096: 2.2}, 20: {1024: 0.8, 4096: 2.6}}}}
    (tmp_path / "figures.yaml").write_text(yaml.safe_dump(figures))
    ended = subprocess.run([sys.executable, ROOT / "scripts/bench/uneven_pools.py", "--figures", tmp_path / "figures.yaml",
                            "--lengths", "4096"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    _, _, over_ideal, bound, over_paper = map(float, ended.stdout.splitlines()[1].replace(",", "").split()[:5])
    assert 1 < over_ideal <= bound and over_paper >= 1
