"""Model shapes for tests that need one and care for little of it."""

from megatron_hetermoe.config.shape import ModelShape


def shape(experts: int = 8, layers: int = 2, **others) -> ModelShape:
    """A small Mixtral-like shape with experts in every layer, unless ``moe_layers`` says otherwise."""
    values = dict(
        layers=layers, moe_layers=tuple(range(1, layers + 1)), experts=experts, topk=2, hidden=32, expert_ffn=32,
        dense_ffn=64, shared_expert_ffn=0, gated=True, heads=4, query_groups=2, head_dim=8, tied_embeddings=False,
        sequence=32,
    )
    return ModelShape(**{**values, **others})
