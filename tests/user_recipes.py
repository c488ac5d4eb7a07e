"""Where the recipes are that users wrote; tests read them there and have no copies."""

from pathlib import Path

import pytest

_FOLDERS = [parent / "shared" / "recipes" for parent in Path(__file__).parents]
RECIPES = next(filter(Path.is_dir, _FOLDERS), None)
needs_recipes = pytest.mark.skipif(RECIPES is None, reason="no folder shared/recipes beside or above the repository")
