"""The plan that a recipe's own flags make, on a machine that need not be the one that trains."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hetermoe.cli.environment import environment
from megatron_hetermoe.cli.plan import flags_of
from megatron_hetermoe.cli.quiet import quiet
from megatron_hetermoe.cli.train import world_size
from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.config.flags import PREFIX, parse_flags
from megatron_hetermoe.config.plan import Plan, read_plan
from megatron_hetermoe.config.recipe import Recipe, locating, override, places_left


def plan_of(recipe: Recipe, argv: Sequence[str], overrides: Sequence[str]) -> tuple[Plan, list[str]]:
    """The plan, and the flags that a planner's plan needs. Megatron parses the recipe's flags, which takes seconds to
    import.

    Args:
        recipe: some flags are checked with its environment.
        argv: its flags, after what the command line changed.
        overrides: the flags of the command line.

    Raises:
        UsageError: with all that would keep the run from starting, as far as that can be told here, and where in the recipe it
            stands.
    """
    with locating(places_left(recipe, overrides)):
        return _plan_of(recipe, argv)


def _plan_of(recipe: Recipe, argv: Sequence[str]) -> tuple[Plan, list[str]]:
    problems = Problems()
    ours, rest = parse_flags(argv, problems)
    if not ours.enabled:
        problems.add(f"the recipe has no section HETERMOE; add one, or give {PREFIX} after --")
    problems.raise_if_any()
    world = world_size(ours, None)
    planned = _planned_flags(ours.plan) if ours.plan else []
    with quiet(), environment(recipe.env):
        from megatron_hetermoe.mcore.arguments import plan_elsewhere

        return plan_elsewhere(ours, override(rest, planned), world), planned


def _planned_flags(path: str) -> list[str]:
    """Megatron's flags that a plan was made with."""
    plan = read_plan(path)
    return flags_of(plan) if plan.step else []
