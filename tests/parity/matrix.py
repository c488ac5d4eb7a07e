"""The combinations of the matrix: options by axis, what cannot stand together, and how rows are picked. No torch here.

**Picking.** Faults of combinations are nearly all between two options, so the rows are an all-pairs design: each option of
an axis stands beside each option of each other axis in at least one row, except where ``EXCLUSIONS`` says that they
cannot. (The generators on PyPI lose allowed pairs where exclusions leave them a dead end.) These rows are in fp32, where a
comparison is sharp. Twice the fewest of them in which all options stand are repeated in half precision. The sample is the
fewest of the rows in fp32 in which every option stands: a row in half precision takes five stock runs to compare with, so for
every change ``test_precision.py`` looks at these. All is chosen greedily, so it is few rows, not the fewest that there are,
and the same ones on every machine.

**Adding.** An option is one line in ``AXES``: its name, and its flags with underscores, those of ``--hetermoe`` too. What
cannot stand together is one line in ``EXCLUSIONS``. An axis in ``LATER`` leaves the rows of those before it as they were,
numbers too, and has rows of its own behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations

BATCH = 12  # sequences of a step: divides by all numbers of attention ranks
_UNGATED = {"swiglu": None, "no_bias_gelu_fusion": True}
_DENSE = {"num_layers": 3, "ffn_hidden_size": 64}

AXES: dict[str, dict[str, dict[str, object]]] = {
    "ranks": {name: {} for name in ("2+2", "2+1", "1+2", "3+2", "2+3", "4+2", "1+1 x2")},
    "tensor": {"1": {}, "2": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "context": {"1": {}, "2": {"context_parallel_size": 2}},
    "expert tensor": {"1": {}, "2": {"expert_tensor_parallel_size": 2}},
    "placement": {name: {} for name in ("even", "uneven", "on attention ranks", "a holder without experts")},
    "order": {
        "one wave": {}, "waves of 1": {"hetermoe_wave": 1}, "waves of 3": {"hetermoe_wave": 3},
        "sequential": {"hetermoe_schedule": "sequential"},
    },
    "weight gradients": {"together": {}, "delayed": {"hetermoe_weight_gradients": "delayed"}},
    "experts": {"one by one": {}, "grouped": {"hetermoe_experts": "grouped"}},
    "attention": {"auto": {}, "flash": {"hetermoe_attention": "flash"}, "math": {"hetermoe_attention": "math"}},
    "heads": {
        "grouped": {}, "all": {"group_query_attention": None, "num_query_groups": None}, "normed": {"qk_layernorm": True},
    },
    "positions": {
        "rotary": {}, "learned": {"position_embedding_type": "learned_absolute"}, "none": {"position_embedding_type": "none"},
        "partly rotary": {"rotary_percent": 0.5, "rotary_interleaved": True},
    },
    "activation": {
        "swiglu": {}, "gelu": _UNGATED, "squared relu": {"squared_relu": True, **_UNGATED},
        "quick geglu": {"quick_geglu": True, **_UNGATED},
    },
    "biases": {"none": {}, "of attention": {"add_qkv_bias": True}},
    "norm": {"rms": {}, "layer": {"normalization": "LayerNorm"}},
    "embeddings": {"untied": {}, "tied": {"untie_embeddings_and_output_weights": None}},
    "dense layers": {
        "none": {}, "first": {"moe_layer_freq": "[0,1,1]", **_DENSE}, "between": {"moe_layer_freq": "[1,0,1]", **_DENSE},
        "last": {"moe_layer_freq": "[1,1,0]", **_DENSE},
    },
    "shared expert": {
        "none": {}, "plain": {"moe_shared_expert_intermediate_size": 32},
        "gated": {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
    },
    "scores": {
        "softmax": {}, "softmax first": {"moe_router_pre_softmax": True}, "sigmoid": {"moe_router_score_function": "sigmoid"},
        "sigmoid and bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
                             "moe_router_bias_update_rate": 0.01},
    },
    "topk": {"2": {}, "1": {"moe_router_topk": 1}, "4": {"moe_router_topk": 4}},
    "balancing": {
        "aux": {"moe_aux_loss_coeff": 0.1},
        "none": {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0},
        "sequence": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
        "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        "several": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
                    "moe_aux_loss_coeff": [0.1, 0.1, 0.1], "moe_per_layer_logging": True},
        "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0},
        "quantile": {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0},
    },
    "z loss": {"no": {}, "yes": {"moe_z_loss_coeff": 0.1}},
    "router groups": {"no": {}, "best 2 of 4": {"moe_router_num_groups": 4, "moe_router_group_topk": 2}},
    "router scaling": {"no": {}, "2.5": {"moe_router_topk_scaling_factor": 2.5}},
    "router dtype": {"model's": {}, "fp32": {"moe_router_dtype": "fp32"}, "fp64": {"moe_router_dtype": "fp64"}},
    "capacity": {
        "any": {}, "least probable go": {"moe_expert_capacity_factor": 1.0},
        "last go": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "position"},
        "padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    },
    "probabilities on": {"outputs": {}, "inputs": {"moe_apply_probs_on_input": True}},
    "random": {"no": {}, "dropout and jitter": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "moe_input_jitter_eps": 0.05}},
    "optimizer": {
        "adam": {}, "reduction overlapped": {"overlap_grad_reduce": True}, "distributed": {"use_distributed_optimizer": True},
        "all overlapped": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
                           "ddp_bucket_size": 2000},
        "sgd": {"optimizer": "sgd", "sgd_momentum": 0.9, "lr": 1e-2},
    },
    "clip and decay": {"weak": {}, "strong": {"clip_grad": 0.1, "weight_decay": 0.1}},
    "loss": {"of sequences": {}, "of tokens": {"calculate_per_token_loss": True}},
    "recomputation": {
        "none": {}, "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        "of attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
        "of experts": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "shared_experts", "moe"]},
    },
    "evaluation": {"no": {}, "yes": {"eval_interval": 10, "eval_iters": 2}},
    "batch": {
        "constant": {},
        "growing": {"train_iters": None, "train_samples": 372, "step_batch_size_schedule": "0:12 5760:24",  # sequence 180
                    "global_batch_size": None, "eval_global_batch_size": 24},
    },
    "further tokens": {"none": {}, "1": {"mtp_num_layers": 1}, "2": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3}},
    "sequences at once": {"1": {}, "2": {"micro_batch_size": 2}},
}
LATER = ("further tokens", "sequences at once")

FP32 = "fp32"
DEVIATION = "deviation"  # under which a test reports: precision, of losses and norms what was found and what may be
HALVES: dict[str, dict[str, object]] = {
    "fp16, fixed scale": {"fp16": True, "loss_scale": 1024},
    "fp16, dynamic scale": {"fp16": True, "initial_loss_scale": 2.0**28, "hysteresis": 1},
    "bf16": {"bf16": True},
    "bf16, experts in fp16": {"bf16": True, "hetermoe_expert_precision": "fp16", "loss_scale": 1024},
    "bf16, experts in fp32": {"bf16": True, "hetermoe_expert_precision": "fp32"},
}

# Options that round otherwise than stock Megatron with its own kernels, so that other steps overflow.
ROUNDING = {
    "attention": ("flash", "math"), "context": ("2",), "expert tensor": ("2",), "experts": ("grouped",),
    "precision": ("bf16, experts in fp16", "bf16, experts in fp32"),
}


# Options whose sums are of other rounded parts than in any layout of stock Megatron on the CPU: of a sequence, of an expert, of
# what a holder's experts make of a token, which it adds up in fp32 and in their precision.
OTHER_SUMS = {
    "context": ("2",), "expert tensor": ("2",), "topk": ("4",),
    "precision": ("bf16, experts in fp16", "bf16, experts in fp32"),
}


def sums_otherwise(row: Mapping[str, str]) -> bool:
    """Whether the row has one of ``OTHER_SUMS``."""
    return any(row[axis] in options for axis, options in OTHER_SUMS.items())


def given_to_stock(row: Mapping[str, str]) -> dict[str, str]:
    """What of a row is no option of stock Megatron's, and changes its numbers: as a test gives it to that
    (``fault_injection.py``), by environment variables."""
    attention = {"auto": "math" if row["context"] == "2" else None}.get(row["attention"], row["attention"])
    flags = HALVES.get(row["precision"], {})
    given = {
        "HETERMOE_TEST_ATTENTION": attention, "HETERMOE_TEST_EXPERTS": flags.get("hetermoe_expert_precision"),
        "HETERMOE_TEST_ONE_LOSS_SCALE": "initial_loss_scale" in flags,
    }
    return {name: str(value) for name, value in given.items() if value}


@dataclass(frozen=True)
class Exclusion:
    """Options that cannot stand together: for some axes, those of which no combination can.

    Attributes:
        of: options by axis.
        why: part of the message of who refuses them, or else why such runs cannot be compared.
        refused: whether flags of it are refused at start.
    """

    of: Mapping[str, tuple[str, ...]]
    why: str
    refused: bool = True

    def has(self, row: Mapping[str, str]) -> bool:
        return all(axis in row and row[axis] in options for axis, options in self.of.items())


_HALF = tuple(HALVES)
_ONE_SIZE = "stock Megatron has one expert-parallel size on the attention ranks"

EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion({"ranks": ("1+2", "3+2", "1+1 x2"), "tensor": ("2",)}, "attention ranks"),
    Exclusion({"ranks": ("1+2", "3+2", "1+1 x2"), "context": ("2",)}, "attention ranks"),
    Exclusion({"ranks": ("2+2", "2+1", "2+3"), "tensor": ("2",), "context": ("2",)}, "attention ranks"),
    Exclusion({"ranks": ("2+1", "2+3", "1+1 x2"), "expert tensor": ("2",)}, "expert ranks"),
    Exclusion({"expert tensor": ("2",), "placement": ("on attention ranks",)}, "has experts on attention ranks"),
    Exclusion({"tensor": ("2",), "weight gradients": ("delayed",)}, "test_tensor_parallel.py has them together", refused=False),
    Exclusion({"capacity": ("least probable go", "last go", "padded"), "balancing": ("sinkhorn", "quantile")},
              "moe_expert_capacity_factor only works with"),
    Exclusion({"topk": ("1",), "scores": ("softmax",)}, "use --moe-router-pre-softmax when topk is 1"),
    Exclusion({"topk": ("2", "4"), "probabilities on": ("inputs",)}, "--moe-apply-probs-on-input does not take"),
    Exclusion({"balancing": ("quantile",), "router groups": ("best 2 of 4",)}, "does not take --moe-router-group-topk"),
    Exclusion({"topk": ("1",), "router groups": ("best 2 of 4",)}, "an expert of two groups cannot be one", refused=False),
    Exclusion({"ranks": ("2+1", "1+1 x2"), "placement": ("uneven", "a holder without experts")},
              "one holder has all experts", refused=False),
    Exclusion({"expert tensor": ("2",), "placement": ("uneven", "a holder without experts")},
              "one holder has all experts", refused=False),
    Exclusion({"order": ("one wave", "waves of 1", "waves of 3"), "random": ("dropout and jitter",)},
              "random numbers are drawn in another order", refused=False),
    Exclusion({"attention": ("flash", "math"), "random": ("dropout and jitter",)}, "torch's kernels draw other random numbers",
              refused=False),
    # Stock Megatron's attention without transformer-engine knows no context parallelism, so it has whole sequences here.
    Exclusion({"context": ("2",), "random": ("dropout and jitter",)}, "numbers are drawn for whole sequences", refused=False),
    Exclusion({"context": ("2",), "capacity": ("least probable go", "last go", "padded")},
              "capacity is that of whole sequences", refused=False),
    Exclusion({"context": ("2",), "balancing": ("sinkhorn",)}, "whole sequences are balanced", refused=False),
    Exclusion({"further tokens": ("1", "2"), "positions": ("learned",)}, "not supported with learned_absolute"),
    Exclusion({"further tokens": ("1", "2"), "context": ("2",)}, "a loss is a mean over the ranks' means", refused=False),
    Exclusion({"ranks": ("4+2",), "tensor": ("1",), "context": ("1",), "sequences at once": ("2",)},
              "does not divide by micro batch size"),
    Exclusion({"ranks": ("1+2", "3+2"), "precision": _HALF}, _ONE_SIZE, refused=False),
    Exclusion({"ranks": ("2+2", "2+1", "2+3"), "context": ("2",), "precision": _HALF}, _ONE_SIZE, refused=False),
    Exclusion({"balancing": ("global", "several"), "precision": _HALF},
              "stock Megatron's losses depend on its data-parallel size", refused=False),
    Exclusion({"random": ("dropout and jitter",), "precision": _HALF},
              "stock Megatron's random numbers depend on its data-parallel size", refused=False),
    *(Exclusion({"precision": ("fp16, dynamic scale",), axis: options}, "other steps overflow", refused=False)
      for axis, options in ROUNDING.items() if axis != "precision"),
)

Row = dict[str, str]  # the option of each axis, and "precision"
Pair = tuple[tuple[str, str], tuple[str, str]]  # two axes, in the order of AXES, each with one of its options


def sizes(row: Mapping[str, str]) -> tuple[int, int, int]:
    """M, N and G."""
    ranks, _, groups = row["ranks"].partition(" x")
    m, n = map(int, ranks.split("+"))
    return m, n, int(groups or 1)


def flags(row: Mapping[str, str]) -> dict[str, object]:
    """A row's flags, but for those that make its ranks and its placement."""
    given: dict[str, object] = {"global_batch_size": BATCH}
    for axis, option in row.items():
        given.update(HALVES.get(option, {}) if axis == "precision" else AXES[axis][option])
    if "loss_scale" in given and row["loss"] == "of tokens":
        # Gradients then are sums over a step's tokens, up to 24 sequences of 32, until they are divided by these: scaled by
        # as much as means are by the scale, and beyond fp16 by both, in stock Megatron too.
        given["loss_scale"] = 1
    return given


def placement(row: Mapping[str, str]) -> dict[object, dict[str, list[int]]] | None:
    """The layers of its placement's file; None for the default."""
    m, n, _ = sizes(row)
    holders = [f"e{index}" for index in range(n // int(row["expert tensor"]))]
    if row["placement"] == "even":
        return None
    of_attention = {}
    if row["placement"] == "on attention ranks":
        of_attention = {"a0": [0, 5], f"a{m - 1}": [3]} if m > 1 else {"a0": [0, 3, 5]}
    left = [expert for expert in range(8) if not any(expert in experts for experts in of_attention.values())]
    first = len(left) - len(holders) + 1
    layers: dict[object, dict[str, list[int]]] = {
        "all": {**of_attention, holders[0]: left[:first],
                **{holder: [expert] for holder, expert in zip(holders[1:], left[first:])}},
    }
    if row["placement"] == "a holder without experts":
        layers[2 if row["dense layers"] == "first" else 1] = {holders[-1]: list(range(8))}
    return layers


def name(row: Mapping[str, str]) -> str:
    """What distinguishes a row, in a few words: its number."""
    return f"{rows().index(row) + 1}-{row['ranks'].replace(' ', '')}-{row['precision'].replace(', ', '-').replace(' ', '-')}"


def allowed(row: Mapping[str, str]) -> bool:
    """Whether the options that are chosen so far can stand together."""
    return not any(exclusion.has(row) for exclusion in EXCLUSIONS)


@cache
def rows() -> tuple[Row, ...]:
    """The whole matrix."""
    without = {axis: next(iter(AXES[axis])) for axis in LATER}
    axes = [axis for axis in AXES if axis not in LATER]
    there = [{**row, **without, "precision": FP32} for row in all_pairs(axes)]
    found = [*there, *_in_half(there)]
    for axis in LATER:
        axes.append(axis)
        later = [{**without, **row, "precision": FP32} for row in all_pairs(axes, there)]
        there += later
        found += later
    return tuple(found)


def all_pairs(axes: Iterable[str], there: Iterable[Row] = ()) -> list[Row]:
    """Rows in which each option stands beside each of other axes, greedily few, beside rows that are ``there``.

    A row begins with a pair that is missing. Axis by axis it gets the option that makes the most missing pairs with what
    it has, or of several such options the one that was used least.
    """
    missing = dict.fromkeys(
        ((first, one), (second, other))
        for first, second in combinations(axes, 2) for one in AXES[first] for other in AXES[second]
    )
    used: Counter[tuple[str, str]] = Counter()
    for row in there:
        for pair in _pairs(row):
            missing.pop(pair, None)
        used.update(row.items())
    found = []
    while missing:
        pair = next(iter(missing))
        row = _completed(dict(pair), axes, missing, used)
        if row is None:  # what is left of some axis excludes it
            del missing[pair]
            continue
        for pair in _pairs(row):
            missing.pop(pair, None)
        used.update(row.items())
        found.append(row)
    return found


def _completed(
    row: Row, axes: Iterable[str], missing: Mapping[Pair, None], used: Counter[tuple[str, str]]
) -> Row | None:
    """The row with an option of every axis, None where there is no way. The axis with the least choice comes next."""
    if not allowed(row):
        return None
    choices = {axis: [option for option in AXES[axis] if allowed({**row, axis: option})]
               for axis in axes if axis not in row}
    if not choices:
        return row
    axis = min(choices, key=lambda axis: len(choices[axis]) if len(choices[axis]) < len(AXES[axis]) else len(AXES))

    def merit(option: str) -> tuple[int, int]:
        made = sum(pair in missing for pair in _pairs({**row, axis: option}) if (axis, option) in pair)
        return -made, used[axis, option]

    candidates = ({**row, axis: option} for option in sorted(choices[axis], key=merit))
    return next(filter(None, (_completed(candidate, axes, missing, used) for candidate in candidates)), None)


def _pairs(row: Row) -> Iterable[Pair]:
    return combinations(((axis, row[axis]) for axis in AXES if axis in row), 2)


def _in_half(full: list[Row]) -> list[Row]:
    """Twice the fewest rows with every option that can be there, dealt to the half precisions; two for each at least."""
    able = [row for row in full if any(allowed({**row, "precision": precision}) for precision in HALVES)]
    some = fewest(able)
    dealt = []
    for number, row in enumerate([*some, *fewest([row for row in able if row not in some])]):
        turned = [*list(HALVES)[number % len(HALVES):], *HALVES]
        dealt.append(next(filter(allowed, ({**row, "precision": precision} for precision in turned))))
    for precision in HALVES:
        fit = [row for row in ({**row, "precision": precision} for row in able) if allowed(row) and row not in dealt]
        dealt += fit[: max(0, 2 - sum(row["precision"] == precision for row in dealt))]
    return dealt


def fewest(candidates: Iterable[Row]) -> list[Row]:
    """Rows that together have every option that the candidates have: always the one with the most that are missing."""
    left = list(candidates)
    missing = {option for row in left for option in row.items()}
    chosen = []
    while missing:
        best = max(left, key=lambda row: len(missing & row.items()))
        chosen.append(best)
        missing -= best.items()
    return chosen


@cache
def sample() -> tuple[Row, ...]:
    """For every change: each option at least once, in fp32."""
    return tuple(fewest(row for row in rows() if row["precision"] == FP32))
