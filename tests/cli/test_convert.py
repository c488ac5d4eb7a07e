"""``hetermoe convert``: models of Hugging Face train as they compute there, and come back bit by bit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from models import tiny
from ranks import run_function, run_ranks

LENGTH = 32
PERIOD = [(7 * i * i + 3 * i + 1) % 250 for i in range(LENGTH)]  # the data is this, again and again

_SHAPE = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}

# For each family transformers' names of its configuration and model, what stands in the former, and Megatron's flags.
FAMILIES = {
    "mixtral": (
        "Mixtral", {"intermediate_size": 24, "num_local_experts": 8, "rope_theta": 1e6},
        {"moe_ffn_hidden_size": 24, "rotary_base": 1000000},
    ),
    "qwen3_moe": (
        "Qwen3Moe", {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 16,
                     "norm_topk_prob": True, "mlp_only_layers": [0]},
        {"moe_ffn_hidden_size": 24, "ffn_hidden_size": 48, "kv_channels": 16, "qk_layernorm": True,
         "moe_layer_freq": "([0]+[1])"},
    ),
    "qwen2_moe": (
        "Qwen2Moe", {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 8,
                     "tie_word_embeddings": True},
        {"moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True,
         "add_qkv_bias": True, "moe_router_pre_softmax": True, "untie_embeddings_and_output_weights": False},
    ),
}


def flags(family: str, **others: object) -> list[str]:
    return tiny(**{**FAMILIES[family][2], **others})


def make(folder: Path, family: str) -> None:
    """A folder as transformers saves it, of random weights, also where a new model has zeros or ones."""
    transformers = pytest.importorskip("transformers")
    name, settings, _ = FAMILIES[family]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**_SHAPE, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(folder / family)


def loss(folder: Path) -> float:
    """What transformers' own model makes of PERIOD, each token followed by the next and the last by the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PERIOD])).logits[0]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(PERIOD).roll(-1)))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def command(*words: object) -> tuple[int, str]:
    """Runs ``hetermoe`` in a rank of its own. Returns its exit code and what it said."""
    from megatron_hetermoe.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in words])
    return code, said.getvalue()


# ------------------------------------------------------------------------------------- inside a rank of its own


def _there_and_back(rank: int, world: int, folder: str) -> list[str]:
    from megatron_hetermoe.mcore.convert import checkpoint
    from megatron_hetermoe.mcore.convert import folder as folders

    os.chdir(folder)
    checkpoint.FILE_BYTES = checkpoint.READ_BYTES = folders.PART_BYTES = 50_000  # as those of a large model: in parts
    said = []
    of_ranks = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
                "pipeline_model_parallel_layout": "Et|tL", "context_parallel_size": 2}  # none of which a checkpoint knows
    for family in FAMILIES:
        for words in (("import", family, "--out", f"{family}.megatron"),
                      ("export", f"{family}.megatron", "--out", f"{family}.back")):
            code, text = command("convert", *words, "--", *flags(family, **of_ranks))
            assert code == 0, text
            said.append(text)
    code, text = command("convert", "export", "mixtral.megatron", "--out", "half", "--reference", "mixtral", "--dtype", "bf16",
                         "--", *flags("mixtral"))
    assert code == 0, text
    numbers = " ".join(map(str, PERIOD * 300))
    Path("period.txt").write_text(numbers)
    code, text = command("data", "--out", "period", "period.txt", "--workers", "1", "--", "--tokenizer-type", "NullTokenizer",
                         "--vocab-size", "255")
    assert code == 0, text
    return said


def _refused(rank: int, world: int, folder: str) -> dict[str, tuple[int, str]]:
    """What is wrong with a folder or a recipe, and what is said of it."""
    os.chdir(folder)
    said = {}
    said["settings"] = command("convert", "import", "mixtral", "--out", "x", "--", *flags("mixtral", moe_router_topk=3,
                                                                                        rotary_base=5, padded_vocab_size=384))
    said["family"] = command("convert", "import", "mixtral", "--out", "x", "--", *flags("qwen3_moe"))
    said["tensors"] = command("convert", "import", "broken", "--out", "x", "--", *flags("mixtral"))
    said["unknown"] = command("convert", "import", "unknown", "--out", "x", "--", *flags("mixtral"))
    said["flags"] = command("convert", "import", "mixtral", "--out", "x", "--", *flags("mixtral"), "--no-such-flag")
    said["shapes"] = command("convert", "export", "mixtral.megatron", "--out", "x", "--", *flags("mixtral", hidden_size=64))
    said["damage"] = command("convert", "export", "damaged", "--out", "x", "--", *flags("mixtral"))
    assert not list(Path().glob("x*"))
    return said


def _ended(rank: int, world: int, folder: str, direction: str) -> dict[str, tuple[int, list[str]]]:
    """A conversion that a signal ends half-way: how it ended, and what is left."""
    os.chdir(folder)
    source = {"import": "mixtral", "export": "mixtral.megatron"}[direction]
    found = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        out = f"{direction}-{number}"
        child = os.fork()
        if child == 0:
            os._exit(_convert_until(number, direction, source, out))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found[number.name] = status, [path.name for path in Path().glob(f"{out}*")]
    return found


def _convert_until(number: int, direction: str, source: str, out: str) -> int:
    from megatron_hetermoe.mcore.convert import tensors as forms

    asked = []

    def counting(original):
        def call(*args):
            asked.append(1)
            if len(asked) == 20:
                os.kill(os.getpid(), number)
            return original(*args)
        return call

    forms.Whole.join, forms.Whole.split = counting(forms.Whole.join), counting(forms.Whole.split)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return command("convert", direction, source, "--out", out, "--", *flags("mixtral"))[0]
    except SystemExit as end:
        return end.code


# ------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, the checkpoints that they became, and the models that those became."""
    folder = tmp_path_factory.mktemp("convert")
    for family in FAMILIES:
        make(folder, family)
    (said,) = run_function(_there_and_back, 1, str(folder), timeout=300)
    assert "--padded-vocab-size 256" in said[0] and "a mixtral model" in said[0]
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_by_bit(folder, family):
    before, after = tensors(folder / family), tensors(folder / f"{family}.back")
    assert before.keys() == after.keys()
    assert len(list((folder / f"{family}.megatron/release").glob("*.distcp"))) > 2
    assert len(list((folder / f"{family}.back").glob("model-*-of-*.safetensors"))) > 2
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert loss(folder / f"{family}.back") == loss(folder / family)  # by the config.json that we wrote


def test_a_reference_gives_what_stands_beside_the_weights(folder):
    before, after = tensors(folder / "mixtral"), tensors(folder / "half")
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())
    assert (folder / "half/generation_config.json").is_file()
    config = json.loads((folder / "half/config.json").read_text())
    assert config == {**json.loads((folder / "mixtral/config.json").read_text()), "dtype": "bfloat16"}


DISAGGREGATED = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "2"]


@pytest.mark.parametrize("family, layout, world", [
    ("mixtral", DISAGGREGATED, 3),
    *(pytest.param(family, layout, world, marks=pytest.mark.slow)
      for family in FAMILIES for layout, world in ((DISAGGREGATED, 3), (["--expert-model-parallel-size", "2"], 2))
      if (family, world) != ("mixtral", 3)),
])
def test_training_begins_where_the_model_is_and_what_it_saves_is_a_model(folder, tmp_path, family, layout, world):
    """Loss of the first step is transformers' own, and so is, after an export, that of the step after a save."""
    argv = flags(family, load=folder / f"{family}.megatron", save=tmp_path / "saved", save_interval=2, train_iters=3,
                 global_batch_size=2, mock_data=None, data_path=folder / "period", data_cache_path=tmp_path / "cache",
                 split="100,0,0", use_distributed_optimizer=True)
    run = run_ranks([*layout, *argv], world, cwd=tmp_path).check()
    losses = [step.loss["lm loss"] for step in run.steps[0]]
    assert losses[0] == pytest.approx(loss(folder / family), rel=1e-5)
    run_function(_export_step, 1, str(tmp_path), family)
    assert losses[2] == pytest.approx(loss(tmp_path / "trained"), rel=1e-5)
    assert losses[2] < losses[0]


def _export_step(rank: int, world: int, folder: str, family: str) -> None:
    os.chdir(folder)
    code, said = command("convert", "export", "saved", "--iteration", "2", "--out", "trained", "--", *flags(family))
    assert code == 0, said


def test_what_cannot_be_converted_is_named_whole(folder):
    from safetensors.torch import save_file

    shutil.copytree(folder / "mixtral", folder / "broken")
    kept = tensors(folder / "broken")
    del kept["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    kept["model.norm.weight"] = torch.ones(31)
    kept["model.layers.0.extra.weight"] = torch.ones(2)
    save_file(kept, folder / "broken/model.safetensors", metadata={"format": "pt"})
    (folder / "unknown").mkdir()
    shutil.copy(folder / "mixtral/model.safetensors", folder / "unknown")
    (folder / "unknown/config.json").write_text('{"model_type": "bert"}')
    shutil.copytree(folder / "mixtral.megatron", folder / "damaged")
    with (folder / "damaged/release/__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (said,) = run_function(_refused, 1, str(folder))
    for name, parts in {
        "settings": ("3 problems", "--moe-router-topk: the recipe stands for num_experts_per_tok 3, mixtral/config.json has 2",
                     "--rotary-base: the recipe stands for rope_theta 5.0", "has 256 rows in its embedding: set it to 256"),
        "family": ("a mixtral model needs no --qk-layernorm", "experts in each layer"),
        "tensors": ("3 problems", "lacks 1 tensors: model.layers.1.block_sparse_moe.experts.3.w2.weight",
                    "model.norm.weight is [31], by the recipe [32]", "has no place for: model.layers.0.extra.weight"),
        "unknown": ("model_type bert cannot be converted; those that can are mixtral, qwen3_moe, qwen2_moe",),
        "flags": ("--no-such-flag",),
        "shapes": ("decoder.final_layernorm.weight is 32, by the recipe 64",),
        "damage": ("__0_0.distcp is not what was saved",),
    }.items():
        code, text = said[name]
        assert code == 2, text
        for part in parts:
            assert part in text, name


@pytest.mark.parametrize("direction", ["import", pytest.param("export", marks=pytest.mark.slow)])
def test_what_is_cut_off_leaves_nothing_that_looks_whole(folder, direction):
    (found,) = run_function(_ended, 1, str(folder), direction)
    assert found["SIGTERM"] == (128 + signal.SIGTERM, [])
    assert found["SIGINT"] == (130, [])
    code, left = found["SIGKILL"]
    assert code == -signal.SIGKILL
    assert len(left) == 1 and left[0].startswith(f"{direction}-{int(signal.SIGKILL)}.part-")


def test_what_can_be_known_before_is_said_at_once(tmp_path, monkeypatch, capsys):
    from megatron_hetermoe.cli import convert
    from megatron_hetermoe.cli.main import main

    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "out").mkdir()
    assert main(["convert", "import", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--dtype", "fp16",
                 "--recipe", "none.yaml"]) == 2
    said = capsys.readouterr().err
    for part in ("5 problems", "out is there already", "none is no folder", "cannot read the recipe none.yaml", "are for export",
                 "pip install 'megatron-hetermoe[convert]'"):
        assert part in said
