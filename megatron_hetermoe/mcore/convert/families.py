"""The model families that can be converted: names of tensors, and what a recipe has to say to be the same model.

Each setting of Hugging Face's ``config.json`` that changes what a model computes stands here once, with the flag of
Megatron that says it. From the same lines a recipe is checked against a model, and a model's ``config.json`` is written
from a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hetermoe.config.errors import Problems
from megatron_hetermoe.mcore.convert.tensors import GROUPED, STACKED, Rule

Args = argparse.Namespace
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A setting of ``config.json``.

    Attributes:
        key: its name there.
        flag: Megatron's that says the same.
        of: its value for a recipe's arguments.
        read: its value in a ``config.json``, in which keys of older and newer versions are (``unified``).
    """

    key: str
    flag: str
    of: Callable[[Args], Any]
    read: Callable[[Config], Any]


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        model_type, architecture: as ``config.json`` has them.
        rules: for all parameters.
        settings: what a recipe and a ``config.json`` must agree on.
        demands: what a recipe must be otherwise: a flag in words, and whether it is so.
        fixed: further keys of a ``config.json``.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    settings: tuple[Setting, ...]
    demands: tuple[tuple[str, Callable[[Args], bool]], ...]
    fixed: Mapping[str, Any]

    def obstacles(self, args: Args) -> list[str]:
        """What of a recipe no model of this family does."""
        return [words for words, is_met in self.demands if not is_met(args)]

    def compare(self, args: Args, config: Config, origin: str, problems: Problems) -> None:
        """Notes each setting on which a recipe and a model's ``config.json`` differ.

        Args:
            args: Megatron's.
            config: a ``unified`` one.
            origin: of what file it is.
            problems: gets what differs, with the flag to change.
        """
        for words in self.obstacles(args):
            problems.add(f"a {self.model_type} model needs {words}")
        for setting in self.settings:
            ours, theirs = setting.of(args), setting.read(config)
            if ours != theirs:
                problems.add(f"{setting.flag}: the recipe stands for {setting.key} {_shown(ours)}, {origin} has "
                             f"{_shown(theirs)}: change the flag")

    def config(self, args: Args, rows: int, dtype: str) -> dict[str, Any]:
        """A ``config.json`` for a recipe.

        Args:
            args: Megatron's.
            rows: of the embedding.
            dtype: of the weights, as ``bfloat16``.
        """
        return {
            "architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": dtype, "vocab_size": rows,
            "max_position_embeddings": args.max_position_embeddings,
            **{setting.key: value for setting in self.settings if (value := setting.of(args)) is not None}, **self.fixed,
        }


def unified(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with what newer versions keep in ``rope_parameters`` where older ones have it."""
    config = dict(config)
    rope = config.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ settings


def _plain(key: str, flag: str, of: Callable[[Args], Any], default: Any = None, *others: str) -> Setting:
    """A setting that is a key of its own, which other versions call ``others``."""

    def read(config: Config) -> Any:
        found = (config[name] for name in (key, *others) if config.get(name) is not None)
        return next(found, default)

    return Setting(key, flag, of, read)


def _groups(args: Args) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _expert_width(args: Args) -> int:
    return args.moe_ffn_hidden_size or args.ffn_hidden_size


def _dense_layers(args: Args) -> tuple[int, ...]:
    """Layers without experts, from 0."""
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(layer for layer in range(args.num_layers) if layer % frequency)
    return tuple(layer for layer, has_experts in enumerate(frequency) if not has_experts)


def _qwen_dense_layers(config: Config) -> tuple[int, ...]:
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
    return tuple(layer for layer in range(config["num_hidden_layers"]) if layer in dense or (layer + 1) % step)


def _head_width(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


_SHAPE = (
    _plain("hidden_size", "--hidden-size", lambda args: args.hidden_size),
    _plain("num_hidden_layers", "--num-layers", lambda args: args.num_layers),
    _plain("num_attention_heads", "--num-attention-heads", lambda args: args.num_attention_heads),
    _plain("rms_norm_eps", "--norm-epsilon", lambda args: args.layernorm_epsilon, 1e-6),
    _plain("rope_theta", "--rotary-base", lambda args: float(args.rotary_base), 10000.0),
    _plain("hidden_act", "--swiglu", lambda args: "silu" if args.swiglu else "another", "silu"),
    _plain("tie_word_embeddings", "--untie-embeddings-and-output-weights",
           lambda args: not args.untie_embeddings_and_output_weights, False),
    _plain("num_experts_per_tok", "--moe-router-topk", lambda args: args.moe_router_topk),
)
_GROUPED_ATTENTION = (
    _plain("num_key_value_heads", "--num-query-groups", _groups),
    Setting("head_dim", "--kv-channels", lambda args: args.kv_channels, _head_width),
)
_UNSCALED = _plain("rope_scaling", "--use-rope-scaling", lambda args: None)
_FULL_ATTENTION = _plain("sliding_window", "--window-size", lambda args: None)
_SCALED_TO_ONE = _plain("norm_topk_prob", "--moe-router-pre-softmax", lambda args: not args.moe_router_pre_softmax, False)
_QWEN_LAYERS = (
    Setting("mlp_only_layers", "--moe-layer-freq", _dense_layers, _qwen_dense_layers),
    Setting("intermediate_size", "--ffn-hidden-size",  # of dense layers, so where there are some
            lambda args: args.ffn_hidden_size if _dense_layers(args) else None,
            lambda config: config["intermediate_size"] if _qwen_dense_layers(config) else None),
)


def _is_off(name: str) -> Callable[[Args], bool]:
    return lambda args: not getattr(args, name)


_DEMANDS = (
    ("--num-experts", lambda args: bool(args.num_experts)),
    ("--position-embedding-type rope", lambda args: args.position_embedding_type == "rope"),
    ("--rotary-percent 1.0 and no --rotary-seq-len-interpolation-factor",
     lambda args: args.rotary_percent == 1.0 and not args.rotary_seq_len_interpolation_factor),
    ("no --rotary-interleaved", _is_off("rotary_interleaved")),
    ("no --use-rope-scaling", _is_off("use_rope_scaling")),
    ("no --no-rope-freq", _is_off("no_rope_freq")),
    ("no --qk-l2-norm", _is_off("qk_l2_norm")),
    ("--normalization RMSNorm", lambda args: args.normalization == "RMSNorm"),
    ("no --apply-layernorm-1p", _is_off("layernorm_zero_centered_gamma")),
    ("--disable-bias-linear", lambda args: not args.add_bias_linear),
    ("no --window-size", _is_off("window_size")),
    ("--moe-router-score-function softmax", lambda args: args.moe_router_score_function == "softmax"),
    ("no --moe-router-enable-expert-bias", _is_off("moe_router_enable_expert_bias")),
    ("no --mtp-num-layers", _is_off("mtp_num_layers")),
)
_NO_SHARED = ("no --moe-shared-expert-intermediate-size", _is_off("moe_shared_expert_intermediate_size"))
_NO_GROUPS = ("no --moe-router-group-topk and no --moe-router-topk-scaling-factor",
              lambda args: not args.moe_router_group_topk and args.moe_router_topk_scaling_factor in (None, 1.0))
_NO_LATENT = ("no --multi-latent-attention", _is_off("multi_latent_attention"))
_NO_QUERY_NORM = ("no --qk-layernorm", _is_off("qk_layernorm"))
_NO_QUERY_BIAS = ("no --add-qkv-bias", _is_off("add_qkv_bias"))


# -------------------------------------------------------------------------------------------------- names

_HERE, _THERE = "decoder.layers.{layer}.", "model.layers.{layer}."


def _layer(ours: str, *theirs: str, form: Any = None) -> Rule:
    parts = tuple(_THERE + name for name in theirs)
    return Rule(_HERE + ours, parts, form) if form else Rule(_HERE + ours, parts)


def _gated(ours: str, theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """A gated feed-forward network."""
    return (_layer(f"{ours}.linear_fc1.weight", f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight", form=STACKED),
            _layer(f"{ours}.linear_fc2.weight", f"{theirs}.{down}.weight"))


_OUTSIDE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",)),
    _layer("input_layernorm.weight", "input_layernorm.weight"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)
_QKV = tuple(
    _layer(f"self_attention.linear_qkv.{kind}", *(f"self_attn.{name}_proj.{kind}" for name in "qkv"), form=GROUPED)
    for kind in ("weight", "bias")
)
_NORMED_QK = tuple(_layer(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight") for name in "qk")
_EXPERTS = (
    _layer("mlp.router.weight", "mlp.gate.weight"),
    *_gated("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}"),
    *_gated("mlp", "mlp"),
)

MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM",
    rules=(
        *_OUTSIDE, *_QKV, _layer("mlp.router.weight", "block_sparse_moe.gate.weight"),
        *_gated("mlp.experts.local_experts.{expert}", "block_sparse_moe.experts.{expert}", "w1", "w3", "w2"),
    ),
    settings=(
        *_SHAPE, *_GROUPED_ATTENTION, _UNSCALED, _FULL_ATTENTION,
        _plain("num_local_experts", "--num-experts", lambda args: args.num_experts, 8, "num_experts"),
        _plain("intermediate_size", "--moe-ffn-hidden-size", _expert_width),
    ),
    demands=(
        *_DEMANDS, _NO_SHARED, _NO_GROUPS, _NO_LATENT, _NO_QUERY_NORM, _NO_QUERY_BIAS,
        ("no --moe-router-pre-softmax", _is_off("moe_router_pre_softmax")),
        ("experts in each layer (--moe-layer-freq 1)", lambda args: not _dense_layers(args)),
    ),
    fixed={},
)


def _qwen(model_type: str, architecture: str, rules: Sequence[Rule], settings: Sequence[Setting],
          demands: Sequence[tuple[str, Callable[[Args], bool]]], fixed: Mapping[str, Any]) -> Family:
    return Family(
        model_type, architecture, rules=(*_OUTSIDE, *_QKV, *_EXPERTS, *rules),
        settings=(
            *_SHAPE, *_GROUPED_ATTENTION, _UNSCALED, _SCALED_TO_ONE, *_QWEN_LAYERS,
            _plain("num_experts", "--num-experts", lambda args: args.num_experts, None, "num_local_experts"),
            _plain("moe_intermediate_size", "--moe-ffn-hidden-size", _expert_width),
            _plain("use_sliding_window", "--window-size", lambda args: False, False),
            *settings,
        ),
        demands=(*_DEMANDS, _NO_GROUPS, _NO_LATENT, *demands), fixed={"decoder_sparse_step": 1, **fixed},
    )


QWEN3_MOE = _qwen(
    "qwen3_moe", "Qwen3MoeForCausalLM", rules=_NORMED_QK,
    settings=(_plain("attention_bias", "--add-qkv-bias", lambda args: bool(args.add_qkv_bias), False),),
    demands=(_NO_SHARED, _NO_QUERY_BIAS, ("--qk-layernorm", lambda args: bool(args.qk_layernorm))), fixed={},
)
QWEN2_MOE = _qwen(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    rules=(
        *_gated("mlp.shared_experts", "mlp.shared_expert"),
        _layer("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
    ),
    settings=(
        _plain("shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size",
               lambda args: args.moe_shared_expert_intermediate_size),
        _plain("qkv_bias", "--add-qkv-bias", lambda args: bool(args.add_qkv_bias), True),
    ),
    demands=(_NO_QUERY_NORM, ("--moe-shared-expert-gate", lambda args: bool(args.moe_shared_expert_gate))), fixed={},
)

FAMILIES = (MIXTRAL, QWEN3_MOE, QWEN2_MOE)
