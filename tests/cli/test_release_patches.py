"""patches/: two lines for a checkout's script, added where the file is known and nowhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "patches"
CHECKOUT = os.environ.get("HETERMOE_MEGATRON_LM")
LINES = "import megatron_hetermoe.script\nmegatron_hetermoe.script.activate()\n"


def _apply():
    spec = importlib.util.spec_from_file_location("apply", FOLDER / "apply.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


apply = _apply()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_patch_holds_no_line_of_megatrons():
    files = sorted(FOLDER.glob("*.patch"))
    assert [file.name for file in files] == sorted({release.patch for release in apply.RELEASES})
    for file in files:
        head, *added = file.read_text().splitlines(keepends=True)[1:]
        assert re.fullmatch(r"@@ -\d+,0 \+\d+,2 @@\n", added.pop(0)) and head == "+++ b/pretrain_gpt.py\n"
        assert "".join(line.removeprefix("+") for line in added) == LINES


@pytest.fixture
def checkout(tmp_path):
    """A folder with a script of 40 lines, and a release that it is."""
    text = "".join(f"line {number}\n" for number in range(1, 41))
    (tmp_path / "pretrain_gpt.py").write_text(text)
    patched = text.replace("line 20\n", f"line 20\n{LINES}")
    return tmp_path, apply.Release("a release", "core_v0.19.patch", digest(text), digest(patched)), text, patched


def test_adds_checks_and_reverses(checkout, capsys):
    folder, release, text, patched = checkout
    file = folder / "pretrain_gpt.py"

    def run(*option: str) -> int:
        return apply.main([str(folder), *option], (release,))

    assert run("--check") == 1 and run("--reverse") == 0 and file.read_text() == text
    assert run() == 0 and file.read_text() == patched
    assert run("--check") == 0 and run() == 0 and file.read_text() == patched
    assert run("--reverse") == 0 and file.read_text() == text
    assert capsys.readouterr().err == ""


def test_git_takes_it_too(checkout):
    folder, release, _, patched = checkout
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "apply", "--unidiff-zero", FOLDER / release.patch], cwd=folder, check=True)
    assert (folder / "pretrain_gpt.py").read_text() == patched


def test_a_patch_that_does_not_give_what_is_listed_changes_nothing(checkout):
    folder, release, text, _ = checkout
    with pytest.raises(AssertionError, match="does not give the file that is listed"):
        apply.main([str(folder)], (dataclasses.replace(release, after=digest("another")),))
    assert (folder / "pretrain_gpt.py").read_text() == text


def test_an_unknown_file_is_left_alone(checkout, capsys):
    folder, _, text, _ = checkout
    for option in ([], ["--check"], ["--reverse"]):
        assert apply.main([str(folder), *option]) == 2
        assert LINES in capsys.readouterr().err and (folder / "pretrain_gpt.py").read_text() == text
    (folder / "pretrain_gpt.py").write_text(LINES + text)
    assert [apply.main([str(folder), *option]) for option in ([], ["--check"], ["--reverse"])] == [0, 0, 2]
    assert (folder / "pretrain_gpt.py").read_text() == LINES + text


def test_no_checkout(tmp_path, capsys):
    assert apply.main([str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.skipif(CHECKOUT is None, reason="HETERMOE_MEGATRON_LM names no checkout of Megatron-LM (core_v0.19.0)")
def test_a_real_checkout_under_torchrun_alone(tmp_path):
    """The checkout itself is left as it is: its script is patched in a folder that has links to the rest."""
    for path in Path(CHECKOUT).iterdir():
        if path.name != "pretrain_gpt.py":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "pretrain_gpt.py").write_bytes(Path(CHECKOUT, "pretrain_gpt.py").read_bytes())
    assert apply.main([str(tmp_path)]) == 0
    flags = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1", *tiny(train_iters=2)]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_gpt.py", *flags], cwd=tmp_path,
        env={**os.environ, "HETERMOE_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )
    assert run.returncode == 0 and "iteration        2/       2" in run.stdout, run.stdout + run.stderr
    assert f"of {tmp_path}/megatron/core, not the installed" in run.stdout
