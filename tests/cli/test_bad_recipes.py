"""Bad recipes, made of good ones: one message with file, line, key and the way out; exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_function
from recipe_mutations import KINDS, RECIPES, mutations

COUNT = 140
CLUSTER = RECIPES / "a40-v100.cluster.yaml"


def _plan_all(rank: int, world: int, folder: str) -> list[tuple[int, str]]:
    """What ``hetermoe plan`` says of each, in one process that has imported Megatron."""
    from megatron_hetermoe.cli.main import main

    said = []
    for number in range(COUNT):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            code = main(["plan", f"{folder}/{number}.yaml", "--cluster", str(CLUSTER)])
        said.append((code, errors.getvalue()))
    return said


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for number, mutation in enumerate(mutations(COUNT)):
        (folder / f"{number}.yaml").write_text(mutation.text)
    return folder, run_function(_plan_all, 1, str(folder))[0]


@pytest.mark.parametrize(
    "number, mutation", list(enumerate(mutations(COUNT))), ids=lambda value: getattr(value, "kind", value)
)
def test_one_message(messages, number, mutation):
    folder, said = messages
    code, text = said[number]
    assert code == 2, text
    assert text.startswith("hetermoe: ") and "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith(f"  - {folder}/{number}.yaml:{mutation.line}: ")]
    assert lines and any(mutation.key in line for line in lines), (mutation, text)
    problems = [line.removeprefix("  - ") for line in text.splitlines()]
    assert not any(one.endswith(f": {other}") for one in problems for other in problems), f"said without its place too: {text}"
    if mutation.near:
        assert any(mutation.near in line for line in lines), (mutation, text)


def test_all_kinds_and_recipes_have_their_turn():
    made = mutations(COUNT)
    assert {mutation.kind for mutation in made} == KINDS.keys()
    assert len({mutation.text for mutation in made}) >= 100


def test_train_names_the_place_too(tmp_path):
    """Ranks know flags only; the launcher knows where they stand, and which were replaced after --."""
    text = (RECIPES / "quickstart.yaml").read_text()
    text = text.replace("--seq-length: 128", "--seq-lenght: 128").replace("--hidden-size: 96", "--hidden-size: wide")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "--seq-lenght" in line)
    run = subprocess.run(
        [sys.executable, "-m", "megatron_hetermoe", "train", str(recipe), "--", "--hidden-size", "large",
         "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "1"],
        cwd=tmp_path, env={**os.environ, "HETERMOE_PLATFORM": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("hetermoe: 2 problems:"), run.stderr
    assert f"  - {recipe}:{line}: " in run.stderr and "--seq-lenght; did you mean --seq-length?" in run.stderr
    assert "  - Megatron does not accept these flags: --hidden-size: invalid int value: 'large'" in run.stderr
