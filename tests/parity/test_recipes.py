"""Recipes as their users have them train disaggregated on the CPU, with their sizes cut on the command line."""

from __future__ import annotations

import pytest
from ranks import assert_same_steps, run_function, run_ranks
from user_recipes import RECIPES, needs_recipes

from megatron_hetermoe.config.errors import UsageError
from megatron_hetermoe.config.recipe import load_recipe, override

pytestmark = needs_recipes

# What the scripts around those recipes export.
VARIABLES = {
    "TP": "1", "PP": "1", "CP": "1", "EP": "2", "VPP": "1", "LAYERS_PER_VP": "", "MBS": "1", "GBS": "8",
    "SEQ_LEN": "32", "MOE_GROUPED_GEMM": "true", "MOE_TOKEN_DISPATCHER": "alltoall", "TOKENIZER_MODEL": "none",
    "WANDB_PROJECT": "", "COMMENT": "test",
}
CUT = {
    "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 64, "num-attention-heads": 4, "num-query-groups": 2,
    "max-position-embeddings": 32, "num-experts": 8, "train-samples": 160, "lr-decay-samples": 160,
    "lr-warmup-samples": 16, "lr": 1e-3, "num-workers": 0, "eval-iters": 2, "eval-interval": 10, "split": "90,5,5",
    "tokenizer-type": "NullTokenizer", "vocab-size": 256, "make-vocab-size-divisible-by": 1,
}
OF_RECIPE = {
    "Mixtral-8x7B": {},
    "Qwen3-30B-A3B": {"kv-channels": 16, "moe-ffn-hidden-size": 32, "moe-router-topk": 4},
}
DROPPED = {
    "Mixtral-8x7B": ["--use-flash-attn", "--transformer-impl", "--moe-grouped-gemm", "--moe-permute-fusion"],
    "Qwen3-30B-A3B": ["--use-flash-attn", "--transformer-impl", "--moe-grouped-gemm", "--moe-permute-fusion",
                      "--moe-router-fusion", "--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl"],
}


def _write_data(rank: int, world: int, prefix: str) -> None:
    """Documents of all lengths from an alphabet of 250."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for start in range(200):
        builder.add_document(torch.tensor([(start * index) % 250 for index in range(60)]), [60])
    builder.finalize(prefix + ".idx")


@pytest.mark.parametrize("name", OF_RECIPE)
def test_recipe(tmp_path, monkeypatch, name):
    """In fp32 the same losses as stock Megatron with the same recipe; every flag that a CPU cannot do is named."""
    run_function(_write_data, 1, str(tmp_path / "data"))
    environ = {**VARIABLES, "WORKSPACE": str(tmp_path), "OUTPUT_PATH": str(tmp_path / "out"),
               "DATA_PATH": str(tmp_path / "data"), "LOAD_PATH": str(tmp_path / "out" / "checkpoints")}
    recipe = load_recipe(RECIPES / f"{name}.yaml", environ)
    cut = [word for flag, value in {**CUT, **OF_RECIPE[name]}.items() for word in (f"--{flag}", str(value))]
    argv = override(recipe.argv, cut)
    assert "--bf16" in argv
    in_fp32 = [word for word in argv if word != "--bf16"]

    start = run_ranks(
        override(in_fp32, ["--exit-interval", "1", "--save-interval", "1", "--eval-iters", "0"]), 2, cwd=tmp_path,
        env=recipe.env,
    ).check()
    assert len(start.steps[0]) == 1
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "1"]
    for precision, flags, rel in (("fp32", in_fp32, 1e-5), ("bf16", argv, 0.02)):
        flags = override(flags, ["--save", str(tmp_path / precision)])
        stock = run_ranks(flags, 2, cwd=tmp_path, env=recipe.env).check()
        ours = run_ranks([*layout, *flags], 3, cwd=tmp_path, env=recipe.env).check()
        assert len(ours.steps[0]) == 20
        for steps, evals in zip(ours.steps, ours.evals):
            assert_same_steps(steps, stock.steps[0], rel=rel)
            for evaluation, other in zip(evals, stock.evals[0], strict=True):
                assert evaluation.loss == pytest.approx(other.loss, rel=rel)
        named = [line.split()[1] for line in ours.output[0].splitlines() if " on the CPU: " in line]
        assert sorted(named) == sorted(DROPPED[name])


@pytest.mark.parametrize("name", OF_RECIPE)
def test_a_variable_that_is_not_set_is_named(name):
    with pytest.raises(UsageError, match=r"the variable WANDB_PROJECT is not set"):
        some = {key: value for key, value in VARIABLES.items() if key != "WANDB_PROJECT"}
        load_recipe(RECIPES / f"{name}.yaml", some)
