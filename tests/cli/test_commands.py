"""The console command: quick where it need not train, and clear about input that cannot be run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hetermoe.cli import train
from megatron_hetermoe.cli.main import main
from megatron_hetermoe.cli.train import world_size
from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.flags import Flags

ROOT = Path(__file__).parents[2]


def hetermoe(*argv, **options):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *options.pop("python", ()), "-m", "megatron_hetermoe", *argv],
                          capture_output=True, text=True, env=environ, timeout=60, **options)


def test_help_imports_nothing_heavy():
    result = hetermoe("--help", python=("-X", "importtime"))
    assert result.returncode == 0 and "train" in result.stdout and "data" in result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "megatron_hetermoe" in imported and not imported & {"torch", "megatron", "numpy", "rich"}


def test_a_bad_recipe_is_one_message(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("MODEL_ARG:\n  --lr: 1\nHETERMOE:\n  waves: 2\n")
    result = hetermoe("train", str(recipe))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("hetermoe: 3 problems:") and "Traceback" not in result.stderr
    assert "did you mean MODEL_ARGS?" in result.stderr and "did you mean wave?" in result.stderr


@pytest.mark.parametrize("argv, part", [
    (["train", "none.yaml"], "cannot read the recipe none.yaml"),
    (["train", "stock.yaml"], "--nproc N"),
    (["train", "stock.yaml", "--nproc", "0"], "--nproc is 0"),
    (["train", "stock.yaml", "--drop", "bf"], "did you mean --bf16?"),
    (["train", "stock.yaml", "--", "--hetermoe-wavs", "3"], "did you mean --hetermoe-wave?"),
    (["train", "stock.yaml", "--", "--hetermoe"], "how many attention ranks?"),
    (["train", "stock.yaml", "--nproc", "2", "--", "4"], "belongs to no flag"),
    (["data", "--out", "x"], "give either --stdlib or files"),
    (["data", "--out", "x", "--stdlib", "here"], "give either --stdlib or files"),
    (["data", "--out", "x", "none"], "none is not there"),
    (["data", "--out", "x", "--glob", "*.none", "."], "no file in . matches '*.none'"),
])
def test_what_cannot_be_run(tmp_path, monkeypatch, capsys, argv, part):
    (tmp_path / "stock.yaml").write_text("MODEL_ARGS:\n  --bf16: true\n")
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("found, started, words", [
    ("/bin/hetermoe", "x/hetermoe", ["hetermoe"]), (None, ".venv/bin/hetermoe", [".venv/bin/hetermoe"]),
    (None, "megatron_hetermoe/__main__.py", [sys.executable, "-m", "megatron_hetermoe"]),
])
def test_a_command_that_is_offered_can_be_started(monkeypatch, found, started, words):
    monkeypatch.setattr(train.shutil, "which", lambda name: found)
    monkeypatch.setattr(sys, "argv", [started])
    assert train._own_words() == words


def test_world_size(tmp_path):
    assert world_size(Flags(), 3) == 3
    assert world_size(Flags(enabled=True, attention_ranks=2, expert_ranks=3), None) == 5
    with pytest.raises(UsageError, match="--nproc is 4, but there are 2 attention and 3 expert ranks"):
        world_size(Flags(enabled=True, attention_ranks=2, expert_ranks=3), 4)
    with pytest.raises(UsageError, match="cannot read the plan"):
        world_size(Flags(enabled=True, plan=str(tmp_path / "plan.json")), None)


def test_data_reads_back_as_it_was(tmp_path, capsys):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    texts = {"a.txt": bytes(range(256)), "b.txt": b"", "c/d.txt": "Grüße\r\n".encode(), "c/e.bin": b"no"}
    for name, text in texts.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    prefix = tmp_path / "out" / "data"
    argv = ["data", "--out", str(prefix), "--glob", "*.txt", str(tmp_path / "in")]
    assert main(argv) == 0
    assert "3 documents, 268 tokens, 265 bytes" in capsys.readouterr().out
    dataset = indexed_dataset.IndexedDataset(str(prefix))
    documents = [dataset[index].tolist() for index in range(len(dataset))]
    assert documents == [[*texts[name], 256] for name in ("a.txt", "b.txt", "c/d.txt")]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    del dataset

    (tmp_path / "in" / "b.txt").write_bytes(b"more")
    (prefix / "cache").mkdir(parents=True)
    assert main(argv) == 0 and "are there already, with 268 tokens" in capsys.readouterr().out
    assert main([*argv, "--force"]) == 0 and "272 tokens" in capsys.readouterr().out
    assert not (prefix / "cache").exists()
    assert sorted(path.name for path in prefix.parent.iterdir() if path.is_file()) == ["data.bin", "data.idx"]
