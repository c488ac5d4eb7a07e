"""Whatever is in a recipe, or in what a resume on other ranks starts from: the outcome is a value or a UsageError.

With 10,000 examples each: ``pytest -m slow tests/unit/test_fuzz_resume.py``.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st
from test_fuzz import fuzz, numbers, outcome, plans, scalars, words

from megatron_hetermoe.cli.elastic import fitted
from megatron_hetermoe.config.plan import read_plan
from megatron_hetermoe.config.recipe import override, parse_recipe
from megatron_hetermoe.topology.placement import Placement

words_of_recipes = st.one_of(
    scalars.map(str), st.sampled_from(["${HOME}", "${}", "${NO}", "true", "~", "'", '"', "[1, 2]", "{a: 1}", "- 1", "*x", "&x"]),
)


@st.composite
def recipes(draw):
    """Text of the sections of a recipe, good keys and others."""
    lines = []
    for section in draw(st.lists(st.sampled_from(["ENV_VARS", "MODEL_ARGS", "HETERMOE", "OTHER"]), max_size=4)):
        lines.append(f"{section}:")
        for key in draw(st.lists(st.sampled_from(["--num-layers", "wave", "groups", "A", "<<", "--", "self-check"]), max_size=3)):
            lines.append(f"  {key}: {draw(words_of_recipes)}")
    return "\n".join(lines)


@st.composite
def resumes(draw):
    """Ranks that are there, a batch, and a plan: what ``hetermoe elastic`` starts from."""
    flag = st.sampled_from(["--global-batch-size", "--micro-batch-size", "--load", "--ckpt-step"])
    argv = [word for name in draw(st.lists(flag, max_size=5)) for word in (name, draw(words))]
    argv = draw(st.sampled_from([argv, ["--global-batch-size", "24", "--micro-batch-size", "1", *argv]]))
    return argv, draw(numbers.filter(lambda number: number < 10**4)), draw(st.integers(-1, 9)), draw(plans())


def check_recipe(text):
    recipe = outcome(lambda: parse_recipe(text, "r.yaml", {"HOME": "/root"}))
    if recipe is not None:
        assert all(isinstance(word, str) for word in recipe.argv) and outcome(lambda: override(recipe.argv, [])) is not None


def check_resume(folder, case):
    argv, attention, expert, document = case
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    found = outcome(lambda: fitted(argv, attention, expert, read_plan(path)))
    if found is not None:
        assert 0 < found.plan.attention_ranks <= attention and 0 < found.plan.expert_ranks <= expert
        members = (found.plan.attention_ranks + found.plan.expert_ranks) // found.plan.groups
        Placement(found.plan.placement, members)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_recipes(examples):
    fuzz(check_recipe, recipes(), examples)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_resumes(tmp_path, examples):
    fuzz(lambda case: check_resume(tmp_path, case), resumes(), examples)
