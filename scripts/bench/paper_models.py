"""The models that are compared: Megatron's flags as a recipe has them, and the shape that the planner sees."""

from __future__ import annotations

from megatron_hetermoe.config.shape import ModelShape

VOCABULARY = 32_000
STEPS = 9  # that a cell trains

# The paper's models: layers, width, experts. Its file names no more; widths inside an expert are Mixtral's 3.5 x hidden.
MODELS = {"D1": (8, 1024, 24), "W1": (4, 2048, 12)}


def model_flags(
    model: str, length: int, batch: int, precision: str = "bf16", micro_batch: int = 1
) -> dict[str, object]:
    """Megatron's flags as a recipe has them.

    Args:
        model: of MODELS.
        length: tokens of a sequence.
        batch: sequences of a step.
        precision: "bf16", or "fp16" for GPUs older than Ampere.
        micro_batch: sequences of a microbatch.
    """
    layers, hidden, experts = MODELS[model]
    flags = {
        "num-layers": layers, "hidden-size": hidden, "num-experts": experts, "seq-length": length,
        "max-position-embeddings": length, "global-batch-size": batch, "num-attention-heads": hidden // 64,
        "num-query-groups": 8, "ffn-hidden-size": hidden * 7 // 2, "moe-router-topk": 2, "micro-batch-size": micro_batch,
        "moe-token-dispatcher-type": "alltoall", "moe-router-load-balancing-type": "aux_loss",
        "moe-aux-loss-coeff": 0.01, "position-embedding-type": "rope", "normalization": "RMSNorm",
        "transformer-impl": "local", "tokenizer-type": "NullTokenizer", "vocab-size": VOCABULARY, "split": "99,1,0",
        "train-iters": STEPS, "lr": 0.0001, "lr-decay-style": "constant", "log-interval": 100, "eval-iters": 0,
        "eval-interval": 1000, "num-workers": 0, "attention-dropout": 0, "hidden-dropout": 0, "seed": 1234,
    }
    bare = (
        "group-query-attention", "swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", precision,
        "mock-data", "no-create-attention-mask-in-dataloader", "no-persist-layer-norm", "no-masked-softmax-fusion",
        "no-gradient-accumulation-fusion", "no-rope-fusion", "no-check-for-nan-in-loss-and-grad", "overlap-grad-reduce",
        "cross-entropy-loss-fusion",
    )
    # Megatron would begin with 2^32 and skip steps until it has come down.
    scale = {"initial-loss-scale": 4096} if precision == "fp16" else {}
    return {f"--{name}": value for name, value in {**flags, **scale, **dict.fromkeys(bare, True)}.items()}


def model_shape(model: str, length: int) -> ModelShape:
    """The same as the planner sees it."""
    layers, hidden, experts = MODELS[model]
    return ModelShape(
        layers=layers, moe_layers=tuple(range(1, layers + 1)), experts=experts, topk=2, hidden=hidden,
        expert_ffn=hidden * 7 // 2, dense_ffn=hidden * 7 // 2, shared_expert_ffn=0, gated=True, heads=hidden // 64,
        query_groups=8, head_dim=64, tied_embeddings=False, sequence=length,
    )


def words(flags: dict[str, object]) -> list[str]:
    """Flags as a command line."""
    return [word for flag, value in flags.items() for word in ((flag,) if value is True else (flag, str(value)))]
