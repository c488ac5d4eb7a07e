"""A recipe: the YAML file that users already have for Megatron, with one optional section for HeterMoE."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import PREFIX, Flags

SECTIONS = ("ENV_VARS", "MODEL_ARGS", "HETERMOE")
HETERMOE_KEYS = tuple(field.name.replace("_", "-") for field in fields(Flags) if field.name not in ("enabled", "dry_run"))

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FLAG = re.compile(r"--[A-Za-z][A-Za-z0-9_-]*")
_TRUE = ("true", "True", "TRUE")
_ABSENT = ("false", "False", "FALSE", "null", "Null", "NULL", "~", "")


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for.

    Attributes:
        env: environment variables for every rank.
        argv: the command line for ``pretrain_gpt``: Megatron's flags, then the ``--hetermoe`` flags.
        places: for each flag of ``argv``, ``file:line`` where it is said.
    """

    env: dict[str, str] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)


def load_recipe(path: str | Path, environ: Mapping[str, str]) -> Recipe:
    """Reads a recipe file.

    Values become text exactly as they are written, so ``1e-2`` and ``1.0`` reach Megatron unchanged. An
    unquoted ``true`` is a bare flag, an unquoted ``false``, ``null`` or nothing leaves the flag out, a list
    gives a flag several values. This is decided after ``${VAR}`` is replaced, so a variable may switch a
    flag on or off. A variable is looked up in the recipe's ENV_VARS first, as if they had been exported.

    Args:
        path: the YAML file.
        environ: where ``${VAR}`` is looked up.

    Raises:
        UsageError: with everything that is wrong in the file, each with its line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError([f"cannot read the recipe {path}: {reason}"]) from None
    return parse_recipe(text, str(path), environ)


def parse_recipe(text: str, origin: str, environ: Mapping[str, str]) -> Recipe:
    """Reads a recipe's text; ``origin`` is its file's name for messages. Otherwise as ``load_recipe``."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UsageError([_syntax_problem(error, text, origin)]) from None
    except RecursionError:
        raise UsageError([f"{origin} is not a recipe: it is nested too deeply"]) from None
    return _Reader(origin, environ).recipe(root)


def located(problem: str, places: Mapping[str, str]) -> str:
    """A problem with the place of the first flag that it names, where that has one.

    Args:
        problem: a sentence that may name flags.
        places: ``file:line`` of flags.
    """
    flag = next((flag for flag in _FLAG.findall(problem) if flag in places), None)
    return problem if flag is None else f"{places[flag]}: {problem}"


@contextlib.contextmanager
def locating(places: Mapping[str, str]) -> Iterator[None]:
    """Has every UsageError from within say where in the recipe a flag stands."""
    try:
        yield
    except UsageError as error:
        raise UsageError([located(problem, places) for problem in error.problems]) from None


def places_left(recipe: Recipe, overrides: Sequence[str]) -> dict[str, str]:
    """The recipe's places without those of flags that the command line replaces."""
    replaced = {name for name, _ in by_flag(overrides, Problems())}
    return {flag: place for flag, place in recipe.places.items() if flag not in replaced}


def override(argv: Sequence[str], extra: Sequence[str], drop: Iterable[str] = ()) -> list[str]:
    """Merges flags from the command line over those of a recipe.

    Args:
        argv: the recipe's command line.
        extra: the overriding one; each of its flags replaces the same flag of the recipe, whatever number of
            values either has, in the forms ``--flag value`` and ``--flag=value``.
        drop: flags of the recipe to leave out, with or without their dashes.

    Raises:
        UsageError: for a value that belongs to no flag, or a flag to drop that the recipe does not have.
    """
    problems = Problems()
    base = list(by_flag(argv, problems))
    over = list(by_flag(extra, problems))
    names = {name for name, _ in base}
    gone = {name for name, _ in over}
    for flag in drop:
        name = "--" + flag.lstrip("-")
        gone.add(name)
        if name not in names:
            problems.add(f"--drop {flag}: the recipe has no {name}{hint(name, names)}")
    problems.raise_if_any()
    kept = [words for name, words in base if name not in gone]
    return [word for words in [*kept, *(words for _, words in over)] for word in words]


def by_flag(argv: Sequence[str], problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Cuts a command line into (flag's name, the flag with its values)."""
    words: list[str] = []
    name = ""
    for word in argv:
        if word.startswith("--"):
            if words:
                yield name, words
            name, words = word.partition("=")[0], [word]
        elif words:
            words.append(word)
        else:
            problems.add(f"{word!r} after `--` belongs to no flag; write `--flag value`")
    if words:
        yield name, words


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag in either spelling, None where it is not given; the last one counts, as for argparse."""
    value = None
    for word, following in zip(argv, (*argv[1:], "")):
        name, joined, rest = word.partition("=")
        if name == flag:
            value = rest if joined else following
    return value


class _Reader:
    """Walks the nodes of one recipe and notes what is wrong with them."""

    def __init__(self, origin: str, environ: Mapping[str, str]):
        self.origin = origin
        self.variables = dict(environ)
        self.problems = Problems()
        self.places: dict[str, str] = {}

    def recipe(self, root: yaml.Node | None) -> Recipe:
        """The whole document."""
        sections: dict[str, yaml.Node] = {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError([f"{self.origin}: a recipe is a mapping with the sections {', '.join(SECTIONS)}"])
        for name, key, value in self._pairs(root):
            if name in SECTIONS:
                sections[name] = value
            else:
                self._note(key, f"unknown section {name!r}{hint(name, SECTIONS)}; a recipe has {', '.join(SECTIONS)}")
        if "MODEL_ARGS" not in sections:
            self._note(root, "there is no section MODEL_ARGS with Megatron's flags")
        env = self._env(sections.get("ENV_VARS"))
        self.variables |= env
        argv = self._model_args(sections.get("MODEL_ARGS"))
        if "HETERMOE" in sections:
            argv += self._hetermoe(sections["HETERMOE"], argv)
        self.problems.raise_if_any()
        return Recipe(env, argv, self.places)

    def _env(self, section: yaml.Node | None) -> dict[str, str]:
        env = {}
        for name, key, value in self._section(section, "ENV_VARS"):
            if not _NAME.fullmatch(name):
                self._note(key, f"{name!r} is not a name for an environment variable")
            elif not isinstance(value, yaml.ScalarNode):
                self._note(value, f"{name}: an environment variable has one value")
            elif value.tag != "tag:yaml.org,2002:null":
                env[name] = self._substituted(name, value)
        return env

    def _model_args(self, section: yaml.Node | None) -> list[str]:
        argv: list[str] = []
        for name, key, value in self._section(section, "MODEL_ARGS"):
            if not name.startswith("--") or len(name) == 2 or set(name) & set("= \t"):
                self._note(key, f"{name!r} is not a flag; write its name with two dashes, as --num-layers")
            self.places[name] = self._place(key)
            argv += self._flag(name, value)
        return argv

    def _hetermoe(self, section: yaml.Node, argv: Sequence[str]) -> list[str]:
        result = [PREFIX] if PREFIX not in argv else []
        for name, key, value in self._section(section, "HETERMOE"):
            flag = f"{PREFIX}-{name}"
            if name not in HETERMOE_KEYS:
                self._note(key, f"unknown key {name!r} in HETERMOE{hint(name, HETERMOE_KEYS)}; "
                                f"it has {', '.join(HETERMOE_KEYS)}")
            elif flag in argv:
                self._note(key, f"{name} in HETERMOE and {flag} in MODEL_ARGS say the same; keep one")
            self.places.setdefault(flag, self._place(key))
            words = self._flag(flag, value)
            if words == [flag]:
                self._note(value, f"{name} in HETERMOE needs a value")
            result += words
        return result

    def _flag(self, flag: str, value: yaml.Node) -> list[str]:
        """The words on the command line for one key and its value."""
        if isinstance(value, yaml.SequenceNode):
            if not value.value:
                self._note(value, f"{flag} has an empty list; leave it out with `false`")
            words = [flag]
            for item in value.value:
                if not isinstance(item, yaml.ScalarNode):
                    self._note(item, f"{flag}: a list holds plain values only")
                elif not (word := self._substituted(flag, item)):
                    self._note(item, f"{flag}: a value of the list is empty")
                else:
                    words.append(word)
            return words
        if not isinstance(value, yaml.ScalarNode):
            self._note(value, f"{flag} takes a value or a list of values, not a mapping")
            return []
        word = self._substituted(flag, value)
        if value.style is None and word.strip() in _TRUE:
            return [flag]
        if value.style is None and word.strip() in _ABSENT:
            return []
        # argparse takes a value that begins with dashes for a flag, unless it is joined to its own
        return [f"{flag}={word}"] if word.startswith("--") else [flag, word]

    def _section(self, node: yaml.Node | None, title: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"):
            return iter(())
        if not isinstance(node, yaml.MappingNode):
            self._note(node, f"the section {title} is a mapping of names to values")
            return iter(())
        return self._pairs(node)

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """(key as written, its node, its value's node); refuses a key that is there twice."""
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._note(key, "a key is a plain name")
                continue
            if key.value in lines:
                self._note(key, f"{key.value} is here a second time, after line {lines[key.value]}; keep one")
                continue
            lines[key.value] = key.start_mark.line + 1
            yield key.value, key, value

    def _substituted(self, name: str, node: yaml.ScalarNode) -> str:
        """The text of a key's value with each ``${VAR}`` replaced."""

        def value_of(match: re.Match[str]) -> str:
            variable = match[1]
            if not _NAME.fullmatch(variable):
                self._note(node, f"{name}: {match[0]} is not a variable; write ${{NAME}}")
            elif variable not in self.variables:
                self._note(node, f"{name}: the variable {variable} is not set; `export {variable}=...`, or write the value "
                                 "here")
            return self.variables.get(variable, "")

        return _VARIABLE.sub(value_of, node.value)

    def _note(self, node: yaml.Node, text: str) -> None:
        self.problems.add(f"{self._place(node)}: {text}")

    def _place(self, node: yaml.Node) -> str:
        return f"{self.origin}:{node.start_mark.line + 1}"


def hint(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to one that is not known, if one is near."""
    # case and underscores are the usual slips, so they do not count for the distance
    folded = {other.lower().replace("_", "-"): other for other in known}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), folded, n=1)
    return f"; did you mean {folded[near[0]]}?" if near else ""


def _syntax_problem(error: yaml.YAMLError, text: str, origin: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{origin} is not YAML: {error}"
    # what was begun there ends nowhere, or another line begins before it has ended
    if (error.context or "").startswith(("while scanning a simple key", "while scanning a quoted", "while parsing a flow")):
        mark = error.context_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    way_out = ""
    if line[:len(line) - len(line.lstrip())].count("\t"):
        way_out = "; indent with spaces, not with tabs"
    elif "[" in line and "${" in line:
        way_out = "; in a list within [ ], write \"${NAME}\" with quotes"
    elif not re.search(r":(\s|$)", line):
        way_out = "; a key and its value are written as `key: value`"
    return f"{origin}:{mark.line + 1}: not YAML: {error.problem or error}, in {line.strip()!r}{way_out}"
