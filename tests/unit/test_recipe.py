"""Recipes: what is written is what Megatron gets, and every fault is named at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_recipes import RECIPES, needs_recipes

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.flags import parse_flags
from megatron_hetermoe.config.recipe import (
    HETERMOE_KEYS, load_recipe, located, locating, override, parse_recipe, places_left,
)


def parse(text, **environ):
    return parse_recipe(text, "r.yaml", environ)


def problems(text, **environ):
    with pytest.raises(UsageError) as caught:
        parse(text, **environ)
    return caught.value.problems


def flags_of(argv):
    found = Problems()
    flags, rest = parse_flags(argv, found)
    found.raise_if_any()
    return flags, rest


def test_values_stay_as_written():
    recipe = parse("MODEL_ARGS:\n  --a: 1e-2\n  --b: 4096\n  --c: 1.0\n  --d: 0x10\n  --e: on\n  --f: 99,1,0\n")
    assert recipe.argv == "--a 1e-2 --b 4096 --c 1.0 --d 0x10 --e on --f 99,1,0".split()


def test_bare_absent_and_list():
    recipe = parse("MODEL_ARGS:\n  --a: true\n  --b: false\n  --c: null\n  --d:\n  --e: [1, true]\n  --f: 'true'\n"
                   "  --g: ''\n")
    assert recipe.argv == ["--a", "--e", "1", "true", "--f", "true", "--g", ""]


def test_a_variable_switches_a_flag():
    text = "MODEL_ARGS:\n  --a: ${A}\n  --b: ${B}\n  --c: x${B}y${A}\n"
    assert parse(text, A="true", B="").argv == ["--a", "--c", "xytrue"]
    assert parse(text, A="false", B="2").argv == ["--b", "2", "--c", "x2yfalse"]


def test_env_vars_are_seen_by_the_arguments():
    recipe = parse("ENV_VARS:\n  N: 1\n  P: a:True\n  Q: ${R}/x\n  S:\nMODEL_ARGS:\n  --n: ${N}\n", N="7", R="r")
    assert recipe.env == {"N": "1", "P": "a:True", "Q": "r/x"}
    assert recipe.argv == ["--n", "1"]


def test_hetermoe_section_becomes_flags():
    recipe = parse("MODEL_ARGS:\n  --lr: 1\nHETERMOE:\n  attention-ranks: 2\n  expert-ranks: 3\n  wave: 4\n"
                   "  schedule: sequential\n  placement: false\n")
    flags, rest = flags_of(recipe.argv)
    assert (flags.enabled, flags.attention_ranks, flags.expert_ranks, flags.wave) == (True, 2, 3, 4)
    assert flags.schedule == "sequential" and flags.placement is None and rest == ["--lr", "1"]
    assert parse("MODEL_ARGS: {}\nHETERMOE:\n").argv == ["--hetermoe"]


def test_every_key_of_the_section_is_a_flag():
    for key in HETERMOE_KEYS:
        value = {
            "schedule": "zebra", "attention": "flash", "experts": "grouped", "expert-precision": "fp16",
            "weight-gradients": "delayed", "slow-down": "expert=2", "expert-impl": "local",
            "on-save-failure": "stop",
        }.get(key, "1")
        flags_of(parse(f"MODEL_ARGS:\nHETERMOE: {{{key}: {value}}}\n").argv)


def test_all_problems_in_one_message():
    found = problems("ENV_VAR:\n  A: 1\nMODEL_ARGS:\n  lr: 1\n  --a: ${TP}\n  --a: 2\n  --b: {c: 1}\n  --d: []\n"
                     "  --e: ${1x}\nHETERMOE:\n  attention_rank: 2\n  wave: true\n")
    assert found == (
        "r.yaml:1: unknown section 'ENV_VAR'; did you mean ENV_VARS?; a recipe has ENV_VARS, MODEL_ARGS, HETERMOE",
        "r.yaml:4: 'lr' is not a flag; write its name with two dashes, as --num-layers",
        "r.yaml:5: --a: the variable TP is not set; `export TP=...`, or write the value here",
        "r.yaml:6: --a is here a second time, after line 5; keep one",
        "r.yaml:7: --b takes a value or a list of values, not a mapping",
        "r.yaml:8: --d has an empty list; leave it out with `false`",
        "r.yaml:9: --e: ${1x} is not a variable; write ${NAME}",
        "r.yaml:11: unknown key 'attention_rank' in HETERMOE; did you mean attention-ranks?; it has "
        + ", ".join(HETERMOE_KEYS),
        "r.yaml:12: wave in HETERMOE needs a value",
    )


def test_a_problem_of_a_flag_has_its_place():
    recipe = parse("MODEL_ARGS:\n  --lr: 1\n  --num-layers: x\nHETERMOE:\n  wave: x\n")
    assert recipe.places == {"--lr": "r.yaml:2", "--num-layers": "r.yaml:3", "--hetermoe-wave": "r.yaml:5"}
    assert located("x --lr-decay and --num-layers", recipe.places) == "r.yaml:3: x --lr-decay and --num-layers"
    assert located("no flag", recipe.places) == "no flag"
    assert places_left(recipe, ["--num-layers=2", "--lr", "3"]) == {"--hetermoe-wave": "r.yaml:5"}
    with pytest.raises(UsageError, match="^r.yaml:5: --hetermoe-wave is 'x'"), locating(recipe.places):
        flags_of(recipe.argv)


@pytest.mark.parametrize("text, said", [
    ("MODEL_ARGS:\n\t--a: 1\n", "r.yaml:2: not YAML: found character '\\t' that cannot start any token, in '--a: 1'; "
                                "indent with spaces, not with tabs"),
    ("MODEL_ARGS:\n  --a: 1\n  --b 2\n  --c: 3\n", "r.yaml:3: not YAML: could not find expected ':', in '--b 2'; a key "
                                                  "and its value are written as `key: value`"),
    ("MODEL_ARGS:\n  --a: \"1\n  --b: 2\n", "r.yaml:2: not YAML: found unexpected end of stream, in '--a: \"1'"),
    ("MODEL_ARGS:\n  --a: [1, 2\n  --b: 2\n", "r.yaml:2: not YAML: "),
])
def test_what_is_no_yaml_is_said_where_it_begins(text, said):
    (problem,) = problems(text)
    assert problem.startswith(said)


def test_said_twice():
    assert "say the same" in problems("MODEL_ARGS: {--hetermoe-wave: 1}\nHETERMOE: {wave: 2}\n")[0]
    assert parse("MODEL_ARGS: {--hetermoe: true}\nHETERMOE: {wave: 2}\n").argv.count("--hetermoe") == 1


@pytest.mark.parametrize("text, part", [
    ("", "a recipe is a mapping"), ("- 1\n", "a recipe is a mapping"), ("ENV_VARS:\n", "no section MODEL_ARGS"),
    ("MODEL_ARGS:\n  --a: [${A}]\n", "r.yaml:2: not YAML"), ("MODEL_ARGS: 3\n", "is a mapping of names"),
    ("MODEL_ARGS:\n  --a: b: c\n", "r.yaml:2: not YAML"), ("ENV_VARS: {A: [1]}\nMODEL_ARGS:\n", "one value"),
    ("MODEL_ARGS: &a\n  --x: *b\n", "undefined alias"), ("\x00", "not YAML"),
])
def test_what_is_no_recipe(text, part):
    assert part in problems(text)[0]


def test_unreadable(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read the recipe"):
            load_recipe(path, {})


def test_override():
    argv = "--a 1 --b 2 3 --c --d=4 --e -1".split()
    assert override(argv, []) == argv
    assert override(argv, "--b 9 --d 5 --e=2 --new x".split()) == "--a 1 --c --b 9 --d 5 --e=2 --new x".split()
    assert override(argv, [], drop=["c", "--b"]) == "--a 1 --d=4 --e -1".split()
    with pytest.raises(UsageError) as caught:
        override(argv, ["x", "--a"], drop=["--dd"])
    assert len(caught.value.problems) == 2 and "did you mean" not in caught.value.problems[0]


words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(
    lambda word: not word.startswith("-") and "${" not in word)
names = st.from_regex(r"--[a-z][a-z0-9-]{0,15}", fullmatch=True)


@given(st.dictionaries(names, st.one_of(st.booleans(), words, st.lists(words, min_size=1, max_size=3)), max_size=6))
def test_round_trip(args):
    def quoted(word):
        return "'" + word.replace("'", "''") + "'"

    lines, argv = ["MODEL_ARGS:"], []
    for name, value in args.items():
        if isinstance(value, bool):
            lines.append(f"  {name}: {str(value).lower()}")
            argv += [name] if value else []
        elif isinstance(value, str):
            lines.append(f"  {name}: {quoted(value)}")
            argv += [name, value]
        else:
            lines += [f"  {name}:", *(f"  - {quoted(word)}" for word in value)]
            argv += [name, *value]
    recipe = parse("\n".join(lines) + "\n")
    assert recipe.argv == argv
    assert override(recipe.argv, recipe.argv) == argv


@given(st.one_of(st.floats(allow_nan=False).map(repr), st.integers().map(str), st.sampled_from(["1e-2", "01"])))
def test_numbers_are_not_reformatted(number):
    assert parse(f"MODEL_ARGS:\n  --x: {number}\n").argv == ["--x", number]


@needs_recipes
@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-30B-A3B"])
def test_the_users_recipes(name):
    path = RECIPES / f"{name}.yaml"
    with pytest.raises(UsageError) as caught:
        load_recipe(path, {})
    missing = {problem.split("the variable ")[1].split()[0] for problem in caught.value.problems}
    recipe = load_recipe(path, {**{variable: "1" for variable in missing}, "LAYERS_PER_VP": ""})
    text = " ".join(recipe.argv)
    assert "--moe-aux-loss-coeff 1e-" in text and text.endswith("--bf16") and "VPP1-MBS1GBS1-1" in text
    assert "--num-layers-per-virtual-pipeline-stage" not in recipe.argv and "pre-softmax" not in text
    assert recipe.env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
