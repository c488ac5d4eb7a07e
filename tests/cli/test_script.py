"""Training scripts that are not this package's: they train disaggregated as they are, or say why they cannot."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import yaml
from models import tiny
from ranks import assert_same_steps, run_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "training_script.py"
LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "1"]
PAIR = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"]
CHECKOUT = os.environ.get("HETERMOE_MEGATRON_LM")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> list[str]:
    """Flags that begin with the weights of one step of the script's."""
    folder = tmp_path_factory.mktemp("start")
    flags = tiny(train_iters=1, save=folder / "weights", save_interval=1, no_save_optim=True, no_save_rng=True)
    run_ranks(flags, 1, cwd=folder, script=SCRIPT).check()
    return tiny(load=folder / "weights", finetune=True, no_load_optim=True, no_load_rng=True, eval_iters=1,
                every_second=0.25)


def test_a_script_trains_as_it_does_with_stock_megatron(tmp_path, start):
    """Its data, forward step, loss and own flag are used; an expert rank builds no data."""
    stock = run_ranks(start, 2, cwd=tmp_path, script=SCRIPT).check()
    ours = run_ranks([*LAYOUT, *start], 3, cwd=tmp_path, script=SCRIPT).check()
    assert len(stock.steps[0]) == 20 and stock.steps[0][0].loss.keys() == {"weighted loss"}
    for steps, evals in zip(ours.steps, ours.evals):
        assert_same_steps(steps, stock.steps[0], rel=1e-5)
        assert evals[0].loss == pytest.approx(stock.evals[0][0].loss, rel=1e-5)
    assert ["this rank has data" in output for output in ours.output] == [True, True, False]
    assert "this rank has no data" in ours.output[2]
    assert "training_script.py runs with Megatron-Core" in ours.output[0] and "runs with" not in ours.output[1]


def test_its_own_flag_reaches_it(tmp_path, start):
    half, quarter = (
        run_ranks([*PAIR, *start, "--train-iters", "1", "--every-second", weight], 2, cwd=tmp_path, script=SCRIPT).check()
        for weight in ("0.5", "0.25")
    )
    assert half.steps[0][0].loss != quarter.steps[0][0].loss


@pytest.mark.parametrize("old, new, said", [
    ("store=store)", "model_provider=datasets)", "given a function that builds the model, which cannot be split"),
    ("gpt_config_from_args(args))", "None)", "give it a configuration with a model"),
    ("store=store)", "get_embedding_ranks=lambda ranks: [])", "get_embedding_ranks that names other pipeline stages"),
    ("store=store)", "non_loss_data_func=print)", "non_loss_data_func, which is not supported: it runs the model"),
    ("pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step, store=store)", "print(config)",
     "has ended without calling megatron.training.pretrain"),
    ("extra_args_provider=add_own_arguments", "ignore_unknown_args=True", "has Megatron ignore flags"),
])
def test_a_script_that_cannot_be_split(tmp_path, old, new, said):
    text = SCRIPT.read_text()
    assert text.count(old) == 1
    (tmp_path / "script.py").write_text(text.replace(old, new))
    run = run_ranks([*PAIR, *tiny(train_iters=1)], 2, cwd=tmp_path, script=tmp_path / "script.py", timeout=60)
    assert run.exit_codes == [2, 2], run.output
    assert said in run.output[0] and "hetermoe: 1 problem:" in run.output[0]
    assert not any("Traceback" in output for output in run.output) and "problem:" not in run.output[1]


def test_bad_flags_of_a_script_come_in_one_message(tmp_path):
    run = run_ranks([*PAIR, "--hetermoe-wavs", "2", *tiny(delay_wgrad_compute=True)], 2, cwd=tmp_path, script=SCRIPT, timeout=60)
    assert run.exit_codes == [2, 2]
    assert "hetermoe: 2 problems:" in run.output[0] and "did you mean --hetermoe-wave?" in run.output[0]


def ended(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HETERMOE_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def recipe(folder: Path, **flags: object) -> str:
    """A recipe with these flags, as a file."""
    path = folder / "recipe.yaml"
    words = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    path.write_text(yaml.safe_dump({"MODEL_ARGS": words, "HETERMOE": {"attention-ranks": 1, "expert-ranks": 1}}))
    return str(path)


HETERMOE = [sys.executable, "-m", "megatron_hetermoe"]


def test_a_checkout_shadows_the_installed_megatron(tmp_path):
    """``hetermoe train`` with a script beside a megatron of its own, and a recipe's flags."""
    checkout = tmp_path / "Megatron-LM"
    checkout.mkdir()
    (checkout / "megatron").symlink_to(Path(megatron.core.__path__[0]).parent)
    (checkout / "script.py").write_text(SCRIPT.read_text())
    flags = tiny(train_iters=None, lr=None)
    run = ended([*HETERMOE, "train", str(checkout / "script.py"), recipe(tmp_path, train_iters=2, lr="1e-3"), "--", *flags],
                tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(rf"megatron +Megatron-Core \S+ of {checkout}/megatron/core, not the installed \d", run.stdout)
    log = (tmp_path / "runs" / "recipe" / "logs" / "rank1.log").read_text()
    assert "iteration        2/       2" in log and "weighted loss: " in log


def test_under_torchrun(tmp_path):
    """One command for each rank; and a script that has the two lines, without any command of ours."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    entry = tmp_path / "hetermoe"
    entry.write_text(f'#!/bin/sh\nexec {shlex.join(HETERMOE)} "$@"\n')
    entry.chmod(0o755)
    run = ended([*torchrun, "--no-python", str(entry), "train", str(SCRIPT), "--", *PAIR, *tiny(train_iters=1)], tmp_path)
    assert run.returncode == 0 and "weighted loss: " in run.stdout, run.stdout + run.stderr
    lines = "import megatron_hetermoe.script\nmegatron_hetermoe.script.activate()\n"
    (tmp_path / "script.py").write_text(lines + SCRIPT.read_text())
    run = ended([*torchrun, "script.py", *PAIR, *tiny(train_iters=1)], tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'hetermoe plan: {"schedule": "zebra"' in run.stdout and "weighted loss: " in run.stdout


def test_the_two_lines_come_first(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys\nsys.modules['megatron.training'] = sys\n"
        "import megatron_hetermoe.script\nmegatron_hetermoe.script.activate()\n")
    run = ended([sys.executable, "script.py", "--hetermoe"], tmp_path)
    assert run.returncode == 2 and "move the two lines up, above all other imports" in run.stderr


@pytest.mark.parametrize("files, said", [
    (["none.py"], "there is no training script none.py"), (["a.yaml", "b.yaml"], "2 files are each a recipe"),
    ([str(SCRIPT)], "give --nproc N"),
])
def test_what_is_no_script(tmp_path, files, said):
    run = ended([*HETERMOE, "train", *files], tmp_path)
    assert run.returncode == 2 and said in run.stderr and run.stdout == ""


@pytest.mark.skipif(CHECKOUT is None, reason="HETERMOE_MEGATRON_LM names no checkout of Megatron-LM (core_v0.19.0)")
@pytest.mark.parametrize("layout", ["1 + 1", "2 + 1"])
def test_megatrons_own_script_unmodified(tmp_path, layout):
    """Digit by digit the losses and gradient norms of ``python -m megatron_hetermoe.pretrain_gpt``, over 20 steps.

    The checkout compiles its data set helpers on first use, for which pybind11 has to be installed.
    """
    attention, expert = layout.split(" + ")
    flags = ["--", "--hetermoe", "--hetermoe-attention-ranks", attention, "--hetermoe-expert-ranks", expert, *tiny()]
    (tmp_path / "empty.yaml").write_text("MODEL_ARGS: {}\n")
    said = {}
    for name, file in (("theirs", str(Path(CHECKOUT, "pretrain_gpt.py"))), ("ours", "empty.yaml")):
        run = ended([*HETERMOE, "train", file, "--keep-logs", name, *flags], tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        log = (tmp_path / name / f"rank{int(attention) + int(expert) - 1}.log").read_text()
        said[name] = re.findall(r"(lm loss: \S+ \|.*grad norm: \S+ )", log)
    assert f"of {Path(CHECKOUT).resolve()}/megatron/core" in (tmp_path / "theirs" / "rank0.log").read_text()
    assert len(said["ours"]) == 20 and said["theirs"] == said["ours"]
