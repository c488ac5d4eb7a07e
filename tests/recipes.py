"""Recipes of tests, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml


def recipe_of(argv: Sequence[str], hetermoe: Mapping[str, object]) -> str:
    """The recipe with the flags of a command line, and a section HETERMOE."""
    flags: dict[str, object] = {}
    for word in argv:
        if word.startswith("--"):
            flags[name := word] = True
        else:
            flags[name] = word
    return yaml.safe_dump({"MODEL_ARGS": flags, "HETERMOE": dict(hetermoe)})
