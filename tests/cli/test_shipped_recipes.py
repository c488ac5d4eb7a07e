"""The recipes under scripts/recipes/: their flags are Megatron's, they agree with their plans, and the planner still
makes these plans."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from ranks import run_function

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import parse_flags
from megatron_hetermoe.config.plan import plan_from_json
from megatron_hetermoe.config.recipe import load_recipe
from megatron_hetermoe.cost.cluster import read_cluster

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "recipes"
PLANS = sorted(path.name.removesuffix(".plan.json") for path in FOLDER.glob("*.plan.json"))
NAMES = [name.partition(".")[0] for name in PLANS]


def test_each_recipe_has_a_plan():
    recipes = {path.stem for path in FOLDER.glob("*.yaml") if not path.name.endswith(".cluster.yaml")}
    assert recipes == {*NAMES, "quickstart"} and len(PLANS) == 5


def _accepted(rank: int, world: int, root: str) -> dict[str, str]:
    """For each recipe, what is wrong with its flags and plan in a run on the plan's ranks; nothing if nothing is."""
    from megatron_hetermoe.config.errors import UsageError
    from megatron_hetermoe.mcore.arguments import disaggregated_arguments
    from megatron_hetermoe.mcore.platform.flags import for_cpu

    os.chdir(root)
    said = {}
    for name in NAMES:
        recipe = load_recipe(FOLDER / f"{name}.yaml", {})
        problems = Problems()
        flags, rest = parse_flags(recipe.argv, problems)
        plan = plan_from_json(Path(flags.plan).read_text(), flags.plan)
        os.environ["WORLD_SIZE"] = str(plan.attention_ranks + plan.expert_ranks)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                disaggregated_arguments(flags, for_cpu(rest)[0], problems)
            said[name] = ""
        except UsageError as error:
            said[name] = error.message()
    return said


def test_flags_are_megatrons_and_those_of_the_plan():
    assert run_function(_accepted, 1, str(ROOT))[0] == dict.fromkeys(NAMES, "")


@pytest.mark.parametrize("name", PLANS)
def test_the_cluster_is_the_plans(name):
    recipe, _, cluster = name.partition(".")
    plan = plan_from_json((FOLDER / f"{name}.plan.json").read_text(), name)
    pools = read_cluster(FOLDER / f"{cluster}.cluster.yaml").pools
    used = {pool: plan.pools.count(pool) * plan.groups for pool in plan.pools}
    assert used and all(count <= pools[pool].gpus for pool, count in used.items())
    assert f"  plan: scripts/recipes/{name}.plan.json\n" in (FOLDER / f"{recipe}.yaml").read_text()


def _planned(rank: int, world: int, name: str, out: str) -> int:
    from megatron_hetermoe.cli.main import main

    recipe, _, cluster = name.partition(".")
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["plan", str(FOLDER / f"{recipe}.yaml"), "--cluster", str(FOLDER / f"{cluster}.cluster.yaml"),
                     "--out", out])


@pytest.mark.parametrize("name", [
    name if "-v100" in name else pytest.param(name, marks=pytest.mark.slow) for name in PLANS
])
def test_the_planner_makes_it_today(tmp_path, name):
    """When this fails, the planner has learned something: run scripts/recipes/plan.sh, and look at the difference."""
    out = tmp_path / "plan.json"
    assert run_function(_planned, 1, name, str(out), timeout=600) == [0]
    made, shipped = (json.loads(text.read_text()) for text in (out, FOLDER / f"{name}.plan.json"))
    seconds = [plan.pop("predicted")["step_seconds"] for plan in (made, shipped)]
    assert made == shipped
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)
