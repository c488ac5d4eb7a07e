"""Nothing that a downloaded checkpoint names is called, and no secret of the environment is written down."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.mcore import trust

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"]


class Program:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_ranks([*LAYOUT, *tiny(global_batch_size=2, train_iters=1, save=folder / "run", save_interval=1)], 2,
              cwd=folder).check()
    return folder / "run"


@pytest.fixture
def copy(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "iter_0000001" / "integrity.json").unlink()  # as who writes a program would do, or renew it
    return folder


def load(folder, copy, env=None, **flags):
    return run_ranks([*LAYOUT, *tiny(global_batch_size=2, train_iters=1, **(flags or {"load": copy}))], 2, cwd=folder, env=env)


def in_metadata(folder, program):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = program
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_an_object(folder, program):
    """In place of the random state, which lies beside the tensors."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, stored = next((index, stored) for index, stored in metadata.storage_data.items() if "rng_state" in index.fqn)
    path = folder / stored.relative_path
    data = path.read_bytes()
    torch.save(program, folder / "program")
    stored.offset, stored.length = len(data), (folder / "program").stat().st_size
    path.write_bytes(data + (folder / "program").read_bytes())
    (folder / "program").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("place, said", [(in_metadata, "holds more than data: .metadata names posix.system"),
                                         (in_an_object, "/shard_0.0_1.1 names posix.system. Loading")])
def test_a_program_is_not_run(tmp_path, copy, place, said):
    place(copy / "iter_0000001", Program(tmp_path / "ran"))
    run = load(tmp_path, copy)
    assert run.exit_codes == [2, 2], run.output[0][-3000:]
    assert said in run.output[0] and "set TORCH_FORCE_WEIGHTS_ONLY_LOAD=0" in run.output[0]
    assert not (tmp_path / "ran").exists()


def test_what_training_begins_with_is_looked_at_too(tmp_path, copy):
    """--pretrained-checkpoint, which is loaded until the run has saved one of its own."""
    flags = {"pretrained_checkpoint": copy, "load": tmp_path / "none yet"}
    assert load(tmp_path, copy, **flags).exit_codes == [0, 0]
    in_metadata(copy / "iter_0000001", Program(tmp_path / "ran"))
    run = load(tmp_path, copy, **flags)
    assert run.exit_codes == [2, 2] and "holds more than data: .metadata names posix.system" in run.output[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", [in_metadata, in_an_object])
def test_who_trusts_it_says_so(tmp_path, copy, place):
    place(copy / "iter_0000001", Program(tmp_path / "ran"))
    run = load(tmp_path, copy, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"})
    assert "a checkpoint may run a program" in run.output[0]
    assert (tmp_path / "ran").exists(), "the test's program does nothing"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.distributed.checkpoint.filesystem.os.system",
             "torch.distributed.checkpoint.filesystem.FileSystemWriter", "torch.distributed.checkpoint.metadata.open"])
def test_names_that_are_no_data(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    if attribute == "system" and "filesystem" in module:  # protocol 4 walks dots in a name
        module, attribute = "torch.distributed.checkpoint.filesystem", "os.system"
    text = pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    text += pickle.SHORT_BINUNICODE + bytes([len(attribute)]) + attribute.encode() + pickle.STACK_GLOBAL + pickle.STOP
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + text)
    assert trust.foreign_in_metadata(tmp_path) == f"{module}.{attribute}"


def test_what_a_run_saves_is_data(saved):
    assert trust.foreign_in_metadata(saved / "iter_0000001") is None


def test_no_secret_is_written_down(tmp_path):
    """Neither in logs, nor in a trace, nor in a checkpoint."""
    flags = ["--hetermoe-trace", str(tmp_path / "trace"), *tiny(
        global_batch_size=2, train_iters=2, save=tmp_path / "run", save_interval=2)]
    run = run_ranks([*LAYOUT, *flags], 2, cwd=tmp_path, env={"WANDB_API_KEY": "hunter2-of-the-test"}).check()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.parent.name == "trace" for path in files) and len(files) > 6
    assert not [path for path in files if b"hunter2-of-the-test" in path.read_bytes()]
    assert run.output[0]
