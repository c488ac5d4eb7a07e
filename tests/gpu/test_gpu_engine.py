"""transformer-engine on GPUs: on attention ranks alone and on all, against stock Megatron with it on all."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from test_gpu_parity import MIXED, MODEL, WORLD, Stock, train

from megatron_hetermoe.cli.launch import has_gpu

pytestmark = pytest.mark.skipif(
    not has_gpu() or not importlib.util.find_spec("transformer_engine"), reason="needs a GPU, transformer-engine, NCCL "
    "2.30 and the Multi-Process Service")

EXPERTS_WITHOUT = {"GPU_RANKS_WITHOUT_ENGINE": "2,3"}
DISTRIBUTED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
SEQUENTIAL = ["--hetermoe-experts", "sequential"]
DELAYED = ["--hetermoe-weight-gradients", "delayed"]
# Megatron's precision, environment, our flags, Megatron's flags beside them, and the bound. In fp32 transformer-engine multiplies
# in TF32, and torch does not.
CASES = {
    "mixed": ({"bf16": True}, EXPERTS_WITHOUT, SEQUENTIAL, DISTRIBUTED, 5e-3),
    "mixed-fp32": ({}, EXPERTS_WITHOUT, SEQUENTIAL, {}, 2e-3),
    "mixed-fp16-experts": ({"bf16": True, "loss_scale": 1024}, EXPERTS_WITHOUT, ["--hetermoe-expert-precision", "fp16"],
                           DISTRIBUTED, 5e-3),
    "grouped": ({"bf16": True}, {}, ["--hetermoe-experts", "grouped"], DISTRIBUTED, 5e-3),
    "everywhere": ({"bf16": True}, {}, ["--hetermoe-expert-impl", "transformer_engine"], DISTRIBUTED, 5e-3),
    "delayed": ({"bf16": True}, EXPERTS_WITHOUT, [*SEQUENTIAL, *DELAYED], {**DISTRIBUTED, "overlap_grad_reduce": True}, 5e-3),
    "delayed-everywhere": ({"bf16": True}, {}, ["--hetermoe-expert-impl", "transformer_engine", *DELAYED],
                           {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}, 5e-3),
    "merged": ({"bf16": True}, EXPERTS_WITHOUT, ["--hetermoe-weight-gradients", "merged", "--hetermoe-wave", "2"],
               DISTRIBUTED, 5e-3),
    "tensor": ({"bf16": True}, {**EXPERTS_WITHOUT, **ONE_QUEUE}, SEQUENTIAL, {**DISTRIBUTED, **TENSOR}, 5e-3),
    "tensor-delayed": ({"bf16": True}, {**EXPERTS_WITHOUT, **ONE_QUEUE}, [*SEQUENTIAL, *DELAYED], {**DISTRIBUTED, **TENSOR},
                       5e-3),
    "selective": ({"bf16": True}, EXPERTS_WITHOUT, SEQUENTIAL,
                  {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}, 5e-3),
    "recompute": ({"bf16": True}, EXPERTS_WITHOUT, SEQUENTIAL,
                  {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 5e-3),
}


@pytest.fixture(scope="module")
def stock(shared, tmp_path_factory):
    return Stock(tmp_path_factory.mktemp("engine"), shared, transformer_impl="transformer_engine")


def layout(stock: Stock) -> list[str]:
    """Two attention and two expert ranks, with experts on both."""
    placement = stock.folder / "placement.yaml"
    placement.write_text(json.dumps(MIXED))
    return ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2",
            "--hetermoe-placement", str(placement)]


def assert_near(found: list[dict], reference: list[dict], rel: float) -> None:
    """Losses, and gradient norms less sharply."""
    assert len(found) == len(reference) > 0
    for step, (mine, other) in enumerate(zip(found, reference)):
        assert mine["loss"]["lm loss"] == pytest.approx(other["loss"]["lm loss"], rel=rel), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=20 * rel), f"step {step}"


@pytest.mark.parametrize("case", CASES)
def test_same_training(stock, case):
    precision, env, ours, model, rel = CASES[case]
    reference = stock.steps(**precision)
    found = train(stock.folder, f"ours-{case}", WORLD, [*layout(stock), *ours, *stock.flags(**precision, **model)], 29630,
                  {**stock.env, **env})
    assert_near(found, reference, rel)
    print(case, "seconds a step:", [round(step["seconds"], 3) for step in found])


@pytest.mark.parametrize("distributed", [False, True])
def test_a_resume_where_ranks_have_other_kinds_of_adam(stock, tmp_path, distributed):
    """Rank 0 has transformer-engine's, expert ranks torch's; then all have the former."""
    half = MODEL["train_iters"] // 2
    flags = {"bf16": True, **(DISTRIBUTED if distributed else {})}
    words = [*layout(stock), *SEQUENTIAL]
    saving = {"save": tmp_path / "saved", "save_interval": half}
    whole = train(stock.folder, f"whole-{distributed}", WORLD, [*words, *stock.flags(**flags, **saving)], 29640,
                  {**stock.env, **EXPERTS_WITHOUT})
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text(str(half))
    resumed = stock.flags(**flags, load=tmp_path / "saved", finetune=False, no_load_optim=False, no_load_rng=False)
    for name, env in (("same", EXPERTS_WITHOUT), ("other", {})):
        rest = train(stock.folder, f"rest-{name}-{distributed}", WORLD, [*words, *resumed], 29650, {**stock.env, **env})
        assert_near(rest, whole[half:], 5e-3)


def test_an_expert_without_rows():
    """A holder runs its experts on no token too."""
    from transformer_engine.pytorch import Linear

    layer = Linear(64, 32, bias=False, params_dtype=torch.bfloat16)
    rows = torch.empty(0, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(rows).sum().backward()
    assert rows.grad.shape == rows.shape and not layer.weight.grad.any()
