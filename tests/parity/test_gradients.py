"""Gradients one by one: Adam forgives a factor, and experts are a small part of the norm of all gradients."""

from __future__ import annotations

import re

import pytest
from parity_cases import placement_file

LOCAL = re.compile(r"\.local_experts\.\d+")


def squares(gradients: list[dict[str, float]], copies: int) -> dict[str, float]:
    """By parameter, with all experts of a layer taken together.

    Args:
        gradients: of each rank, in all of which together each expert is there ``copies`` times.
    """
    result = {name: value for name, value in gradients[0].items() if not LOCAL.search(name)}
    for of_rank in gradients:
        for name, value in of_rank.items():
            if LOCAL.search(name):
                name = LOCAL.sub("", name)
                result[name] = result.get(name, 0.0) + value / copies
    return result


@pytest.mark.parametrize(
    "m, n, g, per_token",
    [(2, 2, 1, False), (4, 1, 1, False), (2, 3, 1, False), (2, 3, 1, True), (2, 2, 2, False), (2, 2, 2, True)],
)
def test_every_parameters_gradient(parity, m, n, g, per_token):
    model = {"train_iters": 1, "calculate_per_token_loss": per_token}
    theirs = squares(parity.stock(m * g, **model).gradients, 1)
    ours = squares(parity.disaggregated(m, n, g, **model).gradients, g)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert sum("experts" in name for name in theirs) == 4 and all(theirs.values())


@pytest.mark.parametrize(
    "m, n, g, per_token, sizes",
    [
        pytest.param(2, 1, 1, False, {"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        (4, 3, 1, False, {"tensor_model_parallel_size": 2, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}),
        pytest.param(
            2, 1, 2, True, {"tensor_model_parallel_size": 2, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param(1, 4, 1, False, {"expert_tensor_parallel_size": 2}, marks=pytest.mark.slow),
        (4, 2, 1, True, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    ],
)
def test_tensor_parallel_parts(parity, m, n, g, per_token, sizes):
    """The first rank's parts of the dense weights, and all parts of all experts."""
    model = {"train_iters": 1, "calculate_per_token_loss": per_token, "sequence_parallel": True, **sizes}
    theirs = squares(parity.stock(m * g, **model).gradients, 1)
    ours = squares(parity.disaggregated(m, n, g, **model).gradients, g)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert sum("experts" in name for name in theirs) == 4 and all(theirs.values())


def test_experts_on_both_roles(parity):
    placement = placement_file(
        parity, experts=8, layers={1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}}
    )
    model = {"train_iters": 1}
    theirs = squares(parity.stock(2, **model).gradients, 1)
    ours = squares(parity.disaggregated(2, 2, 1, ["--hetermoe-placement", placement], **model).gradients, 1)
    assert ours == pytest.approx(theirs, rel=1e-5)
