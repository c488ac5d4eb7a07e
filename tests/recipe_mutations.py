"""Good recipes made bad in one place, each as users do it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
_LINE = re.compile(r"^( +)([a-z-]+): (\S+)$")


@dataclass(frozen=True)
class Mutation:
    """A bad recipe.

    Attributes:
        kind: what was done.
        text: the recipe.
        line: where, from 1 on.
        key: what the message must name.
        near: what it must suggest, if anything.
    """

    kind: str
    text: str
    line: int
    key: str
    near: str | None = None


def mutations(count: int) -> list[Mutation]:
    """So many, always the same; every kind in turn, at places drawn by its number."""
    names = sorted(path for path in RECIPES.glob("*.yaml") if "MODEL_ARGS" in path.read_text())
    kinds = list(KINDS.items())
    result = []
    for number in range(count):
        kind, make = kinds[number % len(kinds)]
        draw = random.Random(number)
        needs_section = kind.endswith("HETERMOE")
        texts = [text for text in (name.read_text() for name in names) if not needs_section or "attention-ranks:" in text]
        result.append(Mutation(kind, *make(draw.choice(texts).splitlines(), draw)))
    return result


def _pick(lines: list[str], draw: random.Random, wanted: Callable[[str, str], bool], section: str = "MODEL_ARGS"):
    """(index of a line, its key, its value), of those in a section that are wanted."""
    begin = lines.index(f"{section}:")
    found = []
    for index in range(begin + 1, len(lines)):
        if lines[index][:1].isalpha():
            break
        match = _LINE.match(lines[index])
        if match and wanted(match[2], match[3]):
            found.append((index, match[2], match[3]))
    return draw.choice(found)


def _typo(word: str, draw: random.Random) -> str:
    """One slip of the finger, not in the first letters."""
    at = draw.randrange(4, len(word) - 1)
    slips = [word[:at] + word[at + 1:], word[:at] + word[at] + word[at:], word[:at] + word[at + 1] + word[at] + word[at + 2:],
             word.replace("-", "_").replace("__", "--", 1)]
    return draw.choice([slip for slip in slips if slip != word])


def _with(lines: list[str], index: int, line: str, key: str, near: str | None = None):
    return "\n".join([*lines[:index], line, *lines[index + 1:]]) + "\n", index + 1, key, near


def _long(key: str, value: str) -> bool:
    return len(key) > 12


def _number(key: str, value: str) -> bool:
    return value.isdigit() and key not in ("--split", "--attention-dropout")


def _bare(key: str, value: str) -> bool:
    return value == "true"


def _valued(key: str, value: str) -> bool:
    return value != "true"


def _misspelt_flag(lines, draw):
    index, key, value = _pick(lines, draw, _long)
    slip = _typo(key, draw)
    return _with(lines, index, f"  {slip}: {value}", slip, f"did you mean {key}?")


def _misspelt_section(lines, draw):
    slip = _typo("MODEL_ARGS", draw)
    return _with(lines, lines.index("MODEL_ARGS:"), f"{slip}:", slip, "did you mean MODEL_ARGS?")


def _misspelt_key(lines, draw):
    index, key, value = _pick(lines, draw, _long, "HETERMOE")
    slip = _typo(key, draw)
    return _with(lines, index, f"  {slip}: {value}", slip, f"did you mean {key}?")


def _replaced(wanted, make, near=None, section="MODEL_ARGS"):
    """A kind that writes a line anew."""

    def mutate(lines, draw):
        index, key, value = _pick(lines, draw, wanted, section)
        return _with(lines, index, make(key, value), key, near)

    return mutate


def _no_dashes(lines, draw):
    index, key, value = _pick(lines, draw, _long)
    return _with(lines, index, f"  {key[2:]}: {value}", key[2:], "with two dashes")


def _twice(lines, draw):
    index, key, value = _pick(lines, draw, _valued)
    later = next((at for at in range(index + 1, len(lines)) if lines[at][:1].isalpha()), len(lines))
    text = "\n".join([*lines[:later], f"  {key}: {value}", *lines[later:]]) + "\n"
    return text, later + 1, key, f"after line {index + 1}"


def _section_as_list(lines, draw):
    begin = lines.index("HETERMOE:")
    return "\n".join([*lines[:begin], "HETERMOE:", "  - attention-ranks", "  - 2"]) + "\n", begin + 2, "HETERMOE", None


def _both(lines, draw):
    index, key, value = _pick(lines, draw, lambda key, value: True, "HETERMOE")
    begin = lines.index("MODEL_ARGS:")
    text = "\n".join([*lines[:begin + 1], f"  --hetermoe-{key}: {value}", *lines[begin + 1:]]) + "\n"
    return text, index + 2, key, "keep one"


KINDS: dict[str, Callable] = {
    "misspelt flag": _misspelt_flag,
    "misspelt flag, again": _misspelt_flag,
    "misspelt section": _misspelt_section,
    "misspelt key in HETERMOE": _misspelt_key,
    "no dashes": _no_dashes,
    "tab": _replaced(_valued, lambda key, value: f"\t{key}: {value}", "with spaces"),
    "twice": _twice,
    "unset variable": _replaced(_valued, lambda key, value: f"  {key}: ${{NO_SUCH_SIZE}}", "export NO_SUCH_SIZE"),
    "no variable": _replaced(_valued, lambda key, value: f"  {key}: ${{NO-SUCH}}", "write ${NAME}"),
    "text for a number": _replaced(_number, lambda key, value: f"  {key}: four"),
    "fraction for a whole number": _replaced(
        lambda key, value: key in ("--num-layers", "--hidden-size", "--seq-length", "--num-experts"),
        lambda key, value: f"  {key}: {value}.5"),
    "list for a scalar": _replaced(_number, lambda key, value: f"  {key}: [{value}, {value}]", "one value"),
    "mapping for a value": _replaced(_valued, lambda key, value: f"  {key}: {{value: {value}}}"),
    "empty list": _replaced(_valued, lambda key, value: f"  {key}: []", "`false`"),
    "list in a list": _replaced(_valued, lambda key, value: f"  {key}: [[{value}]]"),
    "value for a bare flag": _replaced(_bare, lambda key, value: f"  {key}: 3", "write `true`"),
    "no value for a flag": _replaced(_number, lambda key, value: f"  {key}: true", "expected one argument"),
    "no such choice": _replaced(
        lambda key, value: key in ("--normalization", "--position-embedding-type", "--lr-decay-style", "--tokenizer-type"),
        lambda key, value: f"  {key}: {value}X", "choose from"),
    "open quote": _replaced(_valued, lambda key, value: f'  {key}: "{value}'),
    "open bracket": _replaced(_valued, lambda key, value: f"  {key}: [{value}"),
    "no colon": _replaced(_long, lambda key, value: f"  {key} {value}", "`key: value`"),
    "no space": _replaced(_long, lambda key, value: f"  {key}:{value}", "`key: value`"),
    "two colons": _replaced(_valued, lambda key, value: f"  {key}: {value}: 1"),
    "deeper": _replaced(_valued, lambda key, value: f"   {key}: {value}"),
    "true in HETERMOE": _replaced(lambda *_: True, lambda key, value: f"  {key}: true", "needs a value", "HETERMOE"),
    "text in HETERMOE": _replaced(lambda *_: True, lambda key, value: f"  {key}: many", "a whole number", "HETERMOE"),
    "list as HETERMOE": _section_as_list,
    "in both, MODEL_ARGS and HETERMOE": _both,
}
