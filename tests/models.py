"""Flags of models small enough to train in a test."""

from __future__ import annotations

_TINY: dict[str, object] = {
    # Mixtral's shape.
    "transformer_impl": "local",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "swiglu": True,
    "disable_bias_linear": True,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    # Two runs have to be comparable.
    "seed": 1234,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 255,
    "split": "90,5,5",
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 1e-3,
    "min_lr": 0,
    "lr_decay_style": "constant",
    # What needs transformer-engine or apex.
    "no_gradient_accumulation_fusion": True,
    "no_masked_softmax_fusion": True,
    "no_bias_swiglu_fusion": True,
    "no_bias_dropout_fusion": True,
    "no_rope_fusion": True,
    "no_persist_layer_norm": True,
    # Fast: no processes for data, no evaluation, no mask that attention makes itself.
    "num_workers": 0,
    "no_create_attention_mask_in_dataloader": True,
    "eval_iters": 0,
    "eval_interval": 1000,
    "log_interval": 1,
}


def tiny(**overrides: object) -> list[str]:
    """Flags of a model like Mixtral, of two layers and 8 experts, trained for 20 steps in fp32 on made-up tokens.

    An override names a flag with underscores: True gives it bare, None or False leaves it out, a list gives it
    several values.
    """
    flags = []
    for name, value in {**_TINY, **overrides}.items():
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.extend(map(str, value if isinstance(value, (list, tuple)) else [value]))
    return flags
