"""Multi-token prediction: layers that predict further tokens have experts like others, and Megatron's losses."""

from __future__ import annotations

import pytest
from parity_cases import placement_file

BASE = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.3}
PREDICTED = ("loss", "acceptance_rate", "cumulative_acceptance_rate")


def check(parity, m: int, n: int, g: int = 1, hetermoe=(), rel: float = 1e-5, **model) -> None:
    """Loss and gradient norm of every step, and what is logged of each further token, from the last rank alone."""
    model = {**BASE, "tensorboard_dir": "tensorboard", **model}
    run = parity.check(m, n, g, hetermoe, rel, **model)
    stock = parity.stock(m * g, **model).scalars[-1]
    names = [name for name, _ in stock if name.startswith("mtp_")]
    assert len(names) == 20 * len(PREDICTED) * model["mtp_num_layers"]
    for (name, step), value in stock.items():
        if name.startswith("mtp_"):
            assert run.scalars[-1][name, step] == pytest.approx(value, rel=rel), (name, step)
    assert not any(run.scalars[:-1])


def test_two_further_tokens_uneven_experts_waves(parity):
    """Experts of the first further layer on an attention rank too, of the second on one expert rank alone."""
    placement = placement_file(parity, experts=8, layers={
        "all": {"e0": ["0-4"], "e1": ["5-7"]}, 3: {"a1": [0, 5], "e0": [1, 2], "e1": [3, 4, 6, 7]}, 4: {"e1": ["0-7"]},
    })
    check(parity, 2, 2, hetermoe=["--hetermoe-placement", placement, "--hetermoe-wave", "2"], mtp_num_layers=2,
          log_params_norm=True, eval_interval=10, eval_iters=2)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_embeddings(parity, layers, tied):
    check(parity, 1, 2, mtp_num_layers=layers, untie_embeddings_and_output_weights=not tied, use_distributed_optimizer=True,
          overlap_grad_reduce=True, overlap_param_gather=True)
