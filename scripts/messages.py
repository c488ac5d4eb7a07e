#!/usr/bin/env python3
"""Lists every message for users in docs/trouble.md, from the source: ``scripts/messages.py`` writes the list anew.

A message is found where it is made: as an argument of Problems.add or UsageError, of an error that is raised in a run,
of a print that begins with "hetermoe: ", or in one of the functions that only make messages. A call whose text cannot
be followed to such a place is an error, so that none is missing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_hetermoe"
PAGE = ROOT / "docs" / "trouble.md"
START, END = "<!-- messages: written by scripts/messages.py -->", "<!-- end of messages -->"
HOLE = "…"  # what the message fills in

# Functions that make sentences, which their callers add.
MAKERS = re.compile(r"\w*_(problems?|obstacle)|nothing_fits|unmet|_other_shards|distrusted")
RAISED = {"RuntimeError", "OSError", "ValueError"}

# Where a message comes from, and what it is about. A module that is not here is described by its own first line.
PARTS = {
    "config/recipe.py": "The recipe cannot be read. Nothing was started",
    "config/flags.py": "A `--hetermoe` flag, or a key of a recipe's HETERMOE section, is not as it must be. Nothing was "
                       "started",
    "config/batches.py": "The schedule of a batch that grows cannot be read, as Megatron reads it. Nothing was started",
    "config/plan.py": "A plan file is not as `hetermoe plan` writes it",
    "topology/layout.py": "The numbers of ranks and groups do not make a layout",
    "topology/placement.py": "The placement file does not give each expert of each layer one holder",
    "planner/resolve.py": "Flags, recipe, plan and the number of ranks that were started contradict each other. All ranks "
                          "find the same, before any of them meets another",
    "planner/advice.py": "The planner finds no layout; the second line says what would fit",
    "mcore/arguments.py": "Megatron's flags contradict each other or the plan, or ask for a batch that the layout cannot "
                          "divide",
    "mcore/unsupported.py": "Megatron's flags ask for what a disaggregated run does not do",
    "mcore/script.py": "A training script asks Megatron for what a disaggregated run does not do. No process group exists "
                       "yet",
    "script.py": "A training script was not found, has the two lines too far down, or has trained nothing",
    "cli/rank.py": "The files of `hetermoe train` and `hetermoe rank` are not as they must be, or no launcher has said which rank "
                   "this is",
    "mcore/checkpoints.py": "A checkpoint is damaged, or there is no room for one. Nothing was loaded",
    "mcore/trust.py": "A checkpoint holds what may run a program. Nothing was loaded",
    "mcore/patches.py": "The installed Megatron is not the one that this plugin was written for",
    "mcore/numbers.py": "A number is not finite; the first layer and expert in which it was seen are named",
    "mcore/data.py": "`hetermoe data` cannot read its input or write its output",
    "mcore/documents.py": "`hetermoe data` cannot read documents from a file. Nothing was written",
    "mcore/tokenized.py": "`hetermoe data` cannot tokenise what it was given. Nothing was written",
    "mcore/sdpa.py": "The attention kernel that was asked for is not there",
    "mcore/platform/flags.py": "On the CPU, flags that need a GPU are left out and named. No error",
    "runtime/transfers.py": "Two ranks do not agree on what is sent: a fault of this package, or ranks that run different "
                            "versions of it. Please report it",
    "mcore/stages.py": "The pipeline that Megatron's flags ask for cannot be",
    "runtime/handover.py": "Two pipeline stages do not agree on what they hand over: a fault of this package, or ranks that "
                           "run different versions of it. Please report it",
    "runtime/roll_call.py": "Processes of a run or of `hetermoe doctor` do not find each other. No process group exists yet",
    "runtime/watch.py": "A rank died, stopped or failed, and all others end; see above",
    "cost/cluster.py": "The cluster file cannot be used",
    "cost/profile.py": "A profile cannot be used",
    "simulator/planned.py": "The plan cannot be priced on this cluster",
    "simulator/recorded.py": "The recorded folder cannot be read as one run",
    "schedule/trace.py": "A file of a recorded folder cannot be read",
    "cli/trace.py": "`hetermoe trace` cannot draw what was asked",
    "cli/simulate.py": "`hetermoe simulate` cannot read its input",
    "cli/train.py": "`hetermoe train` does not know how many ranks to start",
    "cli/emulate.py": "`hetermoe train --emulate` cannot divide this machine's GPU. Nothing is left running",
    "config/shares.py": "What `--emulate` was given cannot be read",
    "runtime/mps.py": "The Multi-Process Service of `--emulate` does not start or end as it should",
    "cli/output.py": "The file that a command is to write cannot be made",
    "cli/plan.py": "`hetermoe plan` cannot answer",
    "cli/profile.py": "`hetermoe profile` cannot measure what was asked",
    "cli/network.py": "`hetermoe profile --network` cannot measure what was asked",
    "cli/data.py": "`hetermoe data` was asked for two things at once, or for none",
    "cli/convert.py": "`hetermoe convert` was asked for what it does not do. Nothing was written",
    "mcore/convert/folder.py": "`hetermoe convert` cannot read or write a Hugging Face folder",
    "mcore/convert/families.py": "The recipe of `hetermoe convert` is of another model. Nothing was written",
    "mcore/convert/checkpoint.py": "`hetermoe convert` cannot read a checkpoint. Nothing was written",
    "mcore/convert/convert.py": "`hetermoe convert` cannot make a recipe's model of what it was given. Nothing was written",
    "mcore/convert/model.py": "Megatron does not build the recipe's model for `hetermoe convert`",
}


def messages(path: Path) -> list[str]:
    """The messages that a module makes, in the order of the source; what a message fills in is HOLE."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        for argument in _arguments(node):
            values = list(_expanded(argument, tree))
            texts = [text for value in values for text in _texts(value)]
            if not texts and not any(map(_is_found_elsewhere, values)):
                raise SystemExit(f"{path.relative_to(ROOT)}, line {node.lineno}: the text of this message cannot be "
                                 f"followed: {ast.unparse(node)}")
            found |= dict.fromkeys(" ".join(text.split()) for text in texts)
    # what has fewer than two words is a part of a message, or all of it comes from elsewhere
    return [text for text in found if len(re.findall("[A-Za-z]{2,}", text)) > 1 and text[0] != ";"]


def _arguments(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that hold a message, of a node that makes one."""
    if isinstance(node, ast.FunctionDef) and MAKERS.fullmatch(node.name):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and inner.value and list(_texts(inner.value)):
                yield inner.value
            elif isinstance(inner, (ast.Call, ast.Assign, ast.AugAssign)):
                value = inner.args[0] if isinstance(inner, ast.Call) and inner.args else getattr(inner, "value", None)
                is_growing = not isinstance(inner, ast.Call) or getattr(inner.func, "attr", "") in ("append", "add")
                if is_growing and value is not None and any(len(text) > 30 for text in _texts(value)):
                    yield value
    if not isinstance(node, ast.Call):
        return
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    owner = getattr(getattr(node.func, "value", None), "id", "")
    if name == "add" and owner in ("problems", "found") or name == "UsageError":
        yield node.args[0]
    elif name in RAISED and node.args and any(_texts(node.args[-1])):  # others hand on what a library said
        yield node.args[-1]
    elif name == "print" and node.args and next(_texts(node.args[0]), "").startswith("hetermoe: "):  # no log line
        yield node.args[0]


def _texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        rights = list(_texts(node.right)) or [HOLE]
        yield from (f"{left}{right}" for left in _texts(node.left) for right in rights)
    elif isinstance(node, ast.IfExp):
        yield from (text for branch in (node.body, node.orelse) for text in _texts(branch))
    elif isinstance(node, (ast.List, ast.Tuple)):
        yield from (text for element in node.elts for text in _texts(element))
    elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        yield from _texts(node.elt)


def _expanded(node: ast.expr, tree: ast.Module, seen: frozenset[str] = frozenset()) -> Iterator[ast.expr]:
    """An expression and those that it stands for in its module: what its names were assigned, what a loop goes through,
    what ranks gave each other."""
    yield node
    inner: list[ast.expr] = []
    if isinstance(node, ast.Name) and node.id not in seen:
        seen |= {node.id}
        inner = _assigned(node.id, tree)
    elif isinstance(node, (ast.Subscript, ast.Starred)):
        inner = [node.value]
    elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        inner = [node.elt, *(part.iter for part in node.generators)]
    elif isinstance(node, (ast.List, ast.Tuple)):
        inner = node.elts
    elif isinstance(node, ast.IfExp):
        inner = [node.body, node.orelse]
    for value in inner:
        yield from _expanded(value, tree, seen)


def _assigned(name: str, tree: ast.Module) -> list[ast.expr]:
    """What a name is given somewhere in its module."""
    values = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "all_gather_object":
            targets, value = node.args[:1], node.args[1]
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            values.append(value)
    return values


def _is_found_elsewhere(node: ast.expr) -> bool:
    """Whether an expression holds messages that are found where they are made: by MAKERS, or collected by another
    check."""
    inner = getattr(node, "func", node)
    name = getattr(inner, "attr", getattr(inner, "id", ""))
    return isinstance(node, (ast.Call, ast.Attribute)) and (name == "problems" or bool(MAKERS.fullmatch(name)))


def written() -> str:
    """The list, as it stands in the page."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name == "config/errors.py" or not (found := messages(path)):
            continue
        about = PARTS.get(name) or (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
        lines += [f"**{about.rstrip('.')}.** (`{name}`)", "", *(f"- {_escaped(text)}" for text in found), ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    for sign in "\\`*_<>":
        text = text.replace(sign, "\\" + sign)
    return text


def page_with(list_of_messages: str) -> str:
    """The page's text with this list."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{list_of_messages}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Writes the list into the page."""
    PAGE.write_text(page_with(written()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
