"""Imports point down, and the pure floors stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_hetermoe"
FLOORS = ("config", "topology", "schedule", "cost", "simulator", "planner", "runtime", "mcore", "cli")
PURE = FLOORS[: FLOORS.index("runtime")]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    floor = path.relative_to(PACKAGE).parts[0]
    assert floor in FLOORS
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "megatron_hetermoe" and rest and rest[0] in FLOORS:
            assert FLOORS.index(rest[0]) <= FLOORS.index(floor), f"{floor} imports {name}"
        if floor in PURE:
            assert top not in ("torch", "megatron"), f"{floor} imports {name}"
        if floor == "runtime":
            assert top != "megatron", f"runtime imports {name}"


def test_pure_floors_import_neither_torch_nor_anything_heavy():
    names = [
        ".".join(["megatron_hetermoe", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in modules() if path.relative_to(PACKAGE).parts[0] in PURE
    ]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n" \
           "print([name for name in ('torch', 'megatron', 'numpy', 'scipy') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr
