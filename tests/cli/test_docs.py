"""Every command of README and docs works as written, and docs/trouble.md has every message.

A command is a line of a code block that begins with one of COMMANDS. Those of a page run in its order in one folder, in
which the files are that the page takes for granted. What would train is not started: its recipe and flags are read to the
end as each rank reads them, up to where ranks would meet.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from ranks import run_function

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import messages  # noqa: E402  (a script)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("hetermoe ", "scripts/", "pytest", "torchrun ", ".venv/bin/")

# What does not run here, and why.
NOT_RUN = {
    r"scripts/quickstart\.sh\b.*": "tests/cli/test_scripts.py runs it",
    r"scripts/test\.sh": "it is what runs this test",
    r"torchrun .*pretrain_gpt .*": "tests/parity starts the same module on ranks of its own",
    r"(torchrun|srun) .* rank .*": "tests/slurm runs it",
    r"hetermoe train \S+\.py .*": "tests/cli/test_script.py runs it with a script and with a checkout",
    r"hetermoe submit .* --yes": "tests/slurm submits to a real Slurm",
    r"(torchrun .*)?hetermoe doctor.*": "tests/cli/test_doctor.py runs it; what it finds is the machine's",
    r"torchrun .* -m megatron_hetermoe doctor .*": "tests/cli/test_doctor.py runs it on several ranks",
    r"torchrun .*profile --network .*": "tests/cli/test_profile.py runs it under torchrun",
    r"hetermoe train .* --emulate .*": "tests/cli/test_emulate.py runs it with stand-ins, tests/gpu/test_gpu_emulate.py on a GPU",
    r"hetermoe profile .*": "tests/cli/test_profile.py runs it",
}


def commands(page: Path) -> list[str]:
    """The commands of a page, without comments, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and line.strip().startswith(COMMANDS):
            found.append(" ".join(line.split("  #")[0].split()))
    return found


def is_run(command: str) -> bool:
    return not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def words_of(command: str) -> list[str]:
    """Without what stands for more of the same, such as ``...Megatron's own flags...``."""
    return shlex.split(re.sub(r"\s\.\.\.[^.]+\.\.\.", "", command))


# ------------------------------------------------------------------------------------- inside a rank of its own


class Started(Exception):
    """Ranks would have been started: how many, with what."""


class Unstarted:
    """Takes the place of ``launch.Ranks``."""

    def __init__(self, world, argv, env, *others, **settings):
        raise Started(world, list(argv), env)


def run_commands(rank: int, world: int, pages: list[tuple[str, list[str]]], folder: Path) -> list[str]:
    """Runs the ``hetermoe`` commands of each page; returns what went wrong, one text a command."""
    from megatron_hetermoe.cli import launch

    launch.Ranks = Unstarted
    plans: dict[str, str] = {}
    wrong = []
    for name, lines in pages:
        place = folder / name
        shutil.copytree(folder / "given", place, symlinks=True)
        os.chdir(place)
        # A user's shell; this process has been started as a rank.
        before = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        for line in lines:
            os.environ.clear()
            os.environ.update(before)
            words = words_of(line)[1:]
            try:
                said = plans.get(line)
                if said:  # a search takes seconds, and README and docs have the same one
                    Path(words[words.index("--out") + 1]).write_text(said, encoding="utf-8")
                    continue
                _run(words)
                if words[0] == "plan":
                    plans[line] = Path(words[words.index("--out") + 1]).read_text(encoding="utf-8")
                for flag in ("--out", "--timeline"):
                    if flag in words:
                        out = words[words.index(flag) + 1]
                        assert any(Path().glob(f"{out}*")), f"{out} was not written"
            except BaseException:
                wrong.append(f"{name}: {line}\n{traceback.format_exc(limit=-4)}")
    return wrong


def _run(words: list[str]) -> None:
    from megatron_hetermoe.cli.main import main

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(words)
    except Started as started:
        _read_flags(*started.args)
        return
    assert code == 0, said.getvalue()[-2000:]
    assert words[0] != "train", "a training would have been started"


def _read_flags(world: int, argv: list[str], env: dict[str, str]) -> None:
    """What each rank does with its flags before it meets others."""
    from megatron.training.arguments import parse_args

    from megatron_hetermoe.config.errors import Problems
    from megatron_hetermoe.config.flags import parse_flags
    from megatron_hetermoe.mcore.arguments import disaggregated_arguments
    from megatron_hetermoe.mcore.platform.flags import for_cpu

    os.environ.update(env)
    os.environ.update(WORLD_SIZE=str(world), RANK="0", LOCAL_RANK="0")
    problems = Problems()
    flags, rest = parse_flags(argv, problems)
    rest, _ = for_cpu(rest)
    if flags.enabled:
        disaggregated_arguments(flags, rest, problems)
        return
    sys.argv = ["rank", *rest]
    parse_args()


# ------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``given`` has what a reader of any page has: a clone, files of the names that pages use, a recorded run."""
    from test_page import PLAN, POOL

    from megatron_hetermoe.cost.cluster import read_cluster
    from megatron_hetermoe.cost.curves import Notes
    from megatron_hetermoe.schedule.trace import write_jsonl
    from megatron_hetermoe.simulator.planned import predict

    folder = tmp_path_factory.mktemp("docs")
    given = folder / "given"
    given.mkdir()
    (given / "scripts").symlink_to(ROOT / "scripts")
    recipe = yaml.safe_load((ROOT / "scripts/recipes/quickstart.yaml").read_text(encoding="utf-8"))
    (given / "RECIPE.yaml").write_text(yaml.safe_dump(recipe))
    del recipe["HETERMOE"]
    (given / "STOCK.yaml").write_text(yaml.safe_dump(recipe))
    pools = {"new": {"kind": "A40", **POOL}, "old": {"kind": "V100-SXM2", **POOL}}
    (given / "CLUSTER.yaml").write_text(yaml.safe_dump({"pools": pools}))
    (given / "plan.json").write_text(PLAN.to_json())
    (given / "text").mkdir()
    (given / "text" / "a.txt").write_text("7 8 9")
    (given / "notes.jsonl").write_text('{"title": "1 2", "text": "3 4 5"}\n')
    _write_mixtral(given / "HF_DIR")
    notes = Notes()
    shutil.copy(ROOT / "scripts/recipes/a40-v100.cluster.yaml", given / "cluster.yaml")
    predicted = predict(PLAN, read_cluster(str(given / "CLUSTER.yaml"), notes), "plan.json", notes)
    for name in ("runs/trace", "runs/planned", "DIR"):
        (given / name).mkdir(parents=True)
        (given / name / "plan.json").write_text(PLAN.to_json())
        for step in (2, 5):
            for group, ranks in enumerate(predicted.layout.zp_groups()):
                for member, rank in enumerate(ranks):
                    write_jsonl(
                        [span.__class__(**{**vars(span), "rank": rank}) for span in predicted.spans
                         if span.rank == predicted.layout.zp_group(0)[member]],
                        given / name / f"step{step:05d}.rank{rank:05d}.jsonl")
    return folder


def _write_mixtral(folder: Path) -> None:
    """The model of RECIPE.yaml as Hugging Face keeps it."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary, layers, experts = 96, 192, 257, 4, 8
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden),
              "model.norm.weight": (hidden,)}
    for layer in range(layers):
        here = f"model.layers.{layer}."
        shapes |= {here + name: shape for name, shape in {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (hidden // 2, hidden),
            "self_attn.v_proj.weight": (hidden // 2, hidden), "self_attn.o_proj.weight": (hidden, hidden),
            "block_sparse_moe.gate.weight": (experts, hidden),
        }.items()}
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                shapes[f"{here}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    folder.mkdir()
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": experts,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }))


def test_every_command_of_hetermoe_runs(folder):
    pages = []
    for page in PAGES:
        lines = [line for line in commands(page) if line.startswith("hetermoe ") and is_run(line)]
        if lines:
            pages.append((page.stem, lines))
    assert sum(len(lines) for _, lines in pages) > 15, "the pages' commands were not found"
    (wrong,) = run_function(run_commands, 1, pages, folder, timeout=300)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_other_commands_name_what_is_there(page):
    """Scripts take the flags that they are given, and tests that are to be run exist."""
    for line in filter(is_run, commands(page)):
        program, *words = words_of(line)
        if program == ".venv/bin/python":
            program, *words = words
            assert not os.access(ROOT / program, os.X_OK), f"{line}: it needs no python before it"
        else:
            assert not program.startswith("scripts/") or os.access(ROOT / program, os.X_OK), f"{line}: not executable"
        paths = [word for word in words if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), line
        if program.startswith("scripts/"):
            source = (ROOT / program).read_text(encoding="utf-8")
            assert all(word in source for word in words if word.startswith("--")), line
        elif program == "pytest":
            assert paths and set(words) - set(paths) <= {"-m", "slow"}, line
        else:
            assert program == "hetermoe", f"{line}: run it here, or say in NOT_RUN why not"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_line_tool_is_in_the_readme():
    from megatron_hetermoe.cli.main import COMMANDS as modules

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        assert f"`hetermoe {name}" in readme, f"README's table of commands lacks {name}"


def test_the_page_of_trouble_has_every_message():
    page = messages.PAGE.read_text(encoding="utf-8")
    assert page == messages.page_with(messages.written()), "run scripts/messages.py"
    found = page.partition(messages.START)[2]
    # of three floors, found by other means than the script's
    for words in ("the recipe has no section HETERMOE", "each a mapping as in the README", "took it for gone",
                  "cannot be patched", "what fits and how long a step takes depends on it"):
        assert words in found


def test_a_message_that_cannot_be_followed_is_an_error(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("def check(problems, texts):\n    problems.add(texts[0])\n")
    ended = subprocess.run([sys.executable, "-c", "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import messages; "
                            "messages.ROOT = pathlib.Path(sys.argv[2]).parent; messages.messages(pathlib.Path(sys.argv[2]))",
                            str(ROOT / "scripts"), str(source)], capture_output=True, text=True)
    assert ended.returncode == 1 and "module.py, line 2: the text of this message cannot be followed" in ended.stderr
    source.write_text('def check(problems, n):\n    problems.add(f"{n} ranks " + ("are too many" if n else "are none"))\n')
    assert messages.messages(source) == ["… ranks are too many", "… ranks are none"]
