"""Whatever flags and files a run is started with, it trains, or all ranks end with exit code 2 and one message.

200 runs: ``pytest -m slow tests/faults/test_fuzz_runs.py``. A run is drawn from its number alone, so that one that
fails can be repeated by its name.
"""

from __future__ import annotations

import json
import random

import pytest
from models import tiny
from ranks import run_ranks

RUNS, SAMPLE = 200, (3, 17, 42)

# For each of our flags values that may fit, and some that do not; a value is drawn from the first twice as often.
OURS = {
    "attention-ranks": (["1", "2"], ["3", "0", "-1", "two", ""]), "expert-ranks": (["1", "2"], ["3", "x"]),
    "groups": (["1", "2"], ["5", "0"]), "schedule": (["zebra", "sequential"], ["zebras"]), "wave": (["1", "2", "9"], ["0"]),
    "attention": (["auto", "math", "megatron"], ["flash3"]), "stall-timeout": (["5"], ["0.5", "inf"]),
    "self-check": (["1", "2"], ["never"]), "on-save-failure": (["stop", "continue"], ["ask"]), "colour": (["red"], []),
    "plan": ([], ["no-such-file", "."]), "trace": (["trace"], []),
}
MEGATRON = {
    "global_batch_size": (4, 6, 7, None), "micro_batch_size": (1, 2, 0), "num_layers": (1, 3, 0), "num_experts": (4, 7, None),
    "moe_router_topk": (1, 3, 99), "moe_layer_freq": ("[1,0]", "[0,0]", 2, "[1,0,1]", "x"), "moe_router_dtype": ("fp32", "fp64"),
    "moe_router_load_balancing_type": ("none", "seq_aux_loss", "sinkhorn", "zigzag"), "moe_router_pre_softmax": (True,),
    "moe_expert_capacity_factor": (1.0, -1.0), "moe_router_score_function": ("sigmoid",), "num_query_groups": (1, 3),
    "moe_shared_expert_intermediate_size": (16,), "recompute_granularity": ("full", "selective"), "swiglu": (None,),
    "recompute_method": ("uniform",), "recompute_num_layers": (1, 5), "use_distributed_optimizer": (True,), "bf16": (True,),
    "fp16": (True,), "tensor_model_parallel_size": (2,), "expert_model_parallel_size": (2, 3), "calculate_per_token_loss": (True,),
    "optimizer": ("sgd", "muon", "zzz"), "overlap_grad_reduce": (True,), "eval_iters": (1,), "eval_interval": (1,),
    "train_samples": (8,), "lr_decay_style": ("cosine", "zigzag"), "lr_warmup_iters": (1, 5), "seq_length": (16, 33),
    "qk_layernorm": (True,), "moe_z_loss_coeff": (0.01,), "load": ("nowhere",), "ckpt_step": (3,), "exit_interval": (1,),
    "rampup_batch_size": ([2, 2, 8],), "step_batch_size_schedule": ("0:2 128:4", "0:3", "4"), "moe_grouped_gemm": (True,), "position_embedding_type": ("learned_absolute", "none"),
    "num_attention_heads": (3, 0), "clip_grad": (0.0,), "async_save": (True,), "log_params_norm": (True,), "no_such_flag": (1,),
}
HOLDERS = ("a0", "a1", "e0", "e1", "e2")


def drawn(number: int, folder) -> tuple[list[str], int]:
    """A run's command line and its number of ranks."""
    draw = random.Random(number)
    attention, expert = draw.choice((1, 2)), draw.choice((1, 2))
    ours = {"attention-ranks": str(attention), "expert-ranks": str(expert)}
    for name in draw.sample(sorted(OURS), draw.choice((0, 1, 1, 2))):
        fitting, others = OURS[name]
        ours[name] = draw.choice([*fitting, *fitting, *others])
    if draw.random() < 0.4:
        path = folder / "placement.json"
        path.write_text(json.dumps(placement(draw, attention, expert)))
        ours["placement"] = str(path)
    flags: dict[str, object] = {"train_iters": 2, "global_batch_size": 4}
    for name in draw.sample(sorted(MEGATRON), draw.choice((0, 1, 2, 3))):
        flags[name] = draw.choice(MEGATRON[name])
    if flags.get("train_samples"):
        flags["train_iters"] = None
    if draw.random() < 0.3:
        flags |= {"save": folder / "run", "save_interval": 1}
    world = attention + expert if draw.random() < 0.95 else draw.choice((1, 2, 3))
    words = [word for name, value in ours.items() for word in (f"--hetermoe-{name}", value)]
    return ["--hetermoe", *words, *tiny(**flags)], world


def placement(draw: random.Random, attention: int, expert: int) -> object:
    """One of eight experts a layer, mostly with every expert once and with holders that are there."""
    names = HOLDERS if draw.random() < 0.1 else [*HOLDERS[:attention], *HOLDERS[2:2 + expert]]
    layers = {}
    for layer in ("all", "1", "2", "3")[:draw.choice((1, 2, 3))]:
        holders: dict[str, list[int]] = {}
        for one in range(8):
            holders.setdefault(draw.choice(names), []).append(one)
        if draw.random() < 0.1:
            holders[draw.choice(names)] = ["0-3"]
        layers[layer] = holders
    return {"experts": 8, "layers": layers} if draw.random() < 0.95 else draw.choice(([], {"layers": layers}, "x"))


def check(number: int, folder) -> str:
    """Starts a run; returns what came of it."""
    argv, world = drawn(number, folder)
    run = run_ranks(argv, world, cwd=folder, timeout=300)
    said = f"run {number}: {' '.join(argv[:20])}\n{run.output[0][-3000:]}"
    if run.exit_codes == [2] * world:
        assert len([output for output in run.output if "hetermoe: " in output and " problem" in output]) == 1, said
        assert "Traceback" not in "".join(run.output), said
        return "refused"
    assert run.exit_codes == [0] * world, f"{run.exit_codes} {said}"
    assert run.steps[0] and all(step.loss["lm loss"] > 0 for step in run.steps[0]), said
    return "trained"


@pytest.mark.parametrize("number", [
    number if number in SAMPLE else pytest.param(number, marks=pytest.mark.slow) for number in range(RUNS)])
def test_a_run_or_a_message(tmp_path, number):
    assert check(number, tmp_path) in ("trained", "refused")


def test_the_draw_is_varied(tmp_path):
    drawn_runs = [drawn(number, tmp_path) for number in range(RUNS)]
    assert {world for _, world in drawn_runs} == {1, 2, 3, 4}
    assert len({tuple(argv) for argv, _ in drawn_runs}) > RUNS * 0.9
