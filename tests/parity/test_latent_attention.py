"""What the planner reckons with for multi-latent attention, against Megatron's own layer."""

from __future__ import annotations

import pytest
from ranks import run_function

SIZES = {"hidden": 64, "heads": 4, "kv": 24, "qk": 16, "position": 8, "value": 12, "tokens": 32}


def _counted(rank: int, world: int, q_lora_rank: int) -> tuple[int, int]:
    """Parameters of the layer's attention, and operations of its forward on a sequence."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_hetermoe.mcore.platform import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    class Core(torch.nn.Module):
        """Megatron's own takes one width for queries and values without transformer-engine."""

        def __init__(self, *args, **kwargs):
            super().__init__()

        def forward(self, query, key, value, *args, **kwargs):
            query, key, value = (one.transpose(0, 2) for one in (query, key, value))  # [heads, batch, sequence, width]
            mixed = torch.matmul(torch.softmax(torch.matmul(query, key.transpose(-1, -2)), dim=-1), value)
            return mixed.permute(2, 1, 0, 3).flatten(2)

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    sizes = SIZES
    config = MLATransformerConfig(
        num_layers=1, hidden_size=sizes["hidden"], num_attention_heads=sizes["heads"], kv_lora_rank=sizes["kv"],
        q_lora_rank=q_lora_rank or None, qk_head_dim=sizes["qk"], qk_pos_emb_head_dim=sizes["position"],
        v_head_dim=sizes["value"], rope_type="rope", add_bias_linear=False, use_cpu_initialization=True,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=True).submodules.self_attention
    spec.submodules.core_attention = Core
    layer = build_module(spec, config=config, layer_number=1)
    with FlopCounterMode(display=False) as flops:
        layer(torch.randn(sizes["tokens"], 1, sizes["hidden"]), attention_mask=None)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    parallel_state.destroy_model_parallel()
    return parameters, flops.get_total_flops()


@pytest.mark.parametrize("q_lora_rank", [0, 20])
def test_parameters_and_operations_are_megatrons(q_lora_rank):
    from megatron_hetermoe.config.shape import ModelShape
    from megatron_hetermoe.cost.work import attention_work, dense_parameters

    shape = ModelShape(
        1, (1,), 2, 1, SIZES["hidden"], 32, 32, 0, True, SIZES["heads"], SIZES["heads"], 99, False, SIZES["tokens"],
        kv_lora_rank=SIZES["kv"], q_lora_rank=q_lora_rank, qk_head_dim=SIZES["qk"], qk_position_dim=SIZES["position"],
        v_head_dim=SIZES["value"])
    [(parameters, operations)] = run_function(_counted, 1, q_lora_rank)
    assert shape.attention_weights == parameters
    norms, router, head = 3 * shape.hidden, shape.hidden * shape.experts, 2 * 1000 * shape.hidden
    assert dense_parameters(shape, 1000) == parameters + norms + router + head
    work = attention_work(shape, SIZES["tokens"])
    # Causal attention computes half of the scores that the layer here does.
    assert work.matmul - 2 * SIZES["tokens"] * router + 2 * work.core == operations
