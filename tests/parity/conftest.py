"""What parity tests share: start weights by model, and stock runs to compare with, each made once a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matrix
import pytest
from models import tiny
from parity_cases import REL
from ranks import Run, assert_same_steps, run_ranks

# Flags that shape the weights; what else a case changes starts from the same checkpoint.
SHAPE = (
    "num_layers", "hidden_size", "num_experts", "moe_layer_freq", "untie_embeddings_and_output_weights",
    "moe_shared_expert_intermediate_size", "disable_bias_linear", "moe_router_enable_expert_bias",
    "moe_router_score_function", "qk_layernorm", "num_query_groups", "ffn_hidden_size", "moe_shared_expert_gate",
    "position_embedding_type", "normalization", "add_qkv_bias", "swiglu", "squared_relu", "quick_geglu",
    "no_bias_gelu_fusion", "moe_ffn_hidden_size", "group_query_attention", "mtp_num_layers",
)


class Parity:
    """Runs a model disaggregated and stock, from one checkpoint on the same data, and compares every step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._weights: dict[tuple, Path] = {}
        self._references: dict[tuple, Run] = {}

    def weights(self, **model: object) -> Path:
        """A stock checkpoint of a model: after one step, since a fresh router is nearly uniform."""
        shape = {name: model[name] for name in SHAPE if name in model}
        if model.get("moe_router_load_balancing_type") == "quantile_balancing":  # its router has a buffer of its own
            shape["moe_router_load_balancing_type"] = "quantile_balancing"
        key = tuple(sorted((name, str(value)) for name, value in shape.items()))
        if key not in self._weights:
            path = self.folder / f"weights{len(self._weights)}"
            run_ranks(
                tiny(train_iters=1, save=path, save_interval=1, no_save_optim=True, no_save_rng=True, **shape), 1,
                cwd=self.folder,
            ).check()
            self._weights[key] = path
        return self._weights[key]

    def flags(self, **model: object) -> list[str]:
        """Megatron's flags of a run that starts from the model's weights."""
        return tiny(load=self.weights(**model), finetune=True, no_load_optim=True, no_load_rng=True, **model)

    def stock(self, world: int, env: Mapping[str, str] | None = None, **model: object) -> Run:
        """Stock Megatron on so many ranks, as tensor-parallel as ours and as expert-parallel as experts allow.

        Its attention without transformer-engine knows no context parallelism, so there are fewer ranks in its place.
        Experts are whole: where stock Megatron splits them it gathers uneven numbers of tokens, which gloo refuses.
        """
        world //= int(model.get("context_parallel_size", 1))
        model = {name: value for name, value in model.items() if name != "context_parallel_size"}
        expert_parallel = world if int(model.get("num_experts", 8)) % world == 0 else 1
        flags = self.flags(**{
            "expert_model_parallel_size": expert_parallel, **model, "expert_tensor_parallel_size": 1,
        })
        key = (world, *(env or {}).items(), *flags)
        if key not in self._references:
            self._references[key] = run_ranks(flags, world, cwd=self.folder, env=env).check()
        return self._references[key]

    def disaggregated(
        self, m: int, n: int, g: int = 1, hetermoe: Sequence[str] = (), env: Mapping[str, str] | None = None,
        **model: object,
    ) -> Run:
        """The same, with G ZP groups of M attention and N expert ranks."""
        layout = ["--hetermoe", "--hetermoe-attention-ranks", str(m * g), "--hetermoe-expert-ranks", str(n * g)]
        groups = ["--hetermoe-groups", str(g)] if g > 1 else []
        return run_ranks(
            [*layout, *groups, *hetermoe, *self.flags(**model)], (m + n) * g, cwd=self.folder, env=env
        ).check()

    def check(
        self, m: int, n: int, g: int = 1, hetermoe: Sequence[str] = (), rel: float = REL, **model: object
    ) -> Run:
        """Loss and gradient norm of every step on every rank against stock Megatron on the attention ranks."""
        reference = self.stock(m * g, **model)
        run = self.disaggregated(m, n, g, hetermoe, **model)
        for rank, steps in enumerate(run.steps):
            assert_same_steps(steps, reference.steps[0], rel=rel)
            for ours, theirs in zip(run.evals[rank], reference.evals[0], strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=rel)
        assert len(run.steps[0]) == int(model.get("train_iters", 20) or len(reference.steps[0]))
        return run


@pytest.fixture(scope="session")
def parity(tmp_path_factory) -> Parity:
    return Parity(tmp_path_factory.mktemp("parity"))


def pytest_terminal_summary(terminalreporter) -> None:
    """What the matrix found, by precision."""
    found: dict[str, list[tuple]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == matrix.DEVIATION and report.when == "call":
                    found.setdefault(value[0], []).append(value[1:])
    for precision, values in found.items():
        loss, norm, *_ = map(max, zip(*values))
        taken = sum(value[4] for value in values)
        share = max(max(value[0] / value[2], value[1] / value[3]) for value in values)
        terminalreporter.write_line(f"matrix, {precision}: {len(values)} combinations; largest differences {loss:.1e} of the "
                                    f"loss, {norm:.1e} of the gradient norm; at most {share:.2f} of what is allowed")
        if taken:
            terminalreporter.write_line(f"matrix, {precision}: {taken} choices of routers within rounding would have been others")
