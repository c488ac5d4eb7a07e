"""Every layout trains as stock Megatron does: 20 steps from one checkpoint, within 1e-5."""

from __future__ import annotations

import pytest
from parity_cases import placement_file


@pytest.mark.parametrize(
    "m, n, g, batch",
    [(2, 2, 1, 8), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in (
        (2, 2, 2, 8), (2, 1, 1, 8), (1, 2, 1, 4), (3, 2, 1, 12), (2, 3, 1, 8), (1, 1, 2, 8),
    ))],
)
def test_layout(parity, m, n, g, batch):
    """Any M and N, with holders of different numbers of experts where they do not divide, and data parallelism."""
    parity.check(m, n, g, global_batch_size=batch)


@pytest.mark.slow
def test_seven_experts_on_three_holders(parity):
    """2, 2 and 3 experts, with the third holder an attention rank."""
    placement = placement_file(
        parity, experts=7, layers={"all": {"e0": ["0-1"], "e1": ["2-3"], "a1": ["4-6"]}}
    )
    parity.check(2, 2, hetermoe=["--hetermoe-placement", placement], num_experts=7)


def test_experts_on_attention_ranks_in_some_layers(parity):
    """Each attention rank routes tokens to experts of the other one, in one layer of three."""
    placement = placement_file(
        parity, experts=8,
        layers={"all": {"e0": ["0-4"], "e1": ["5-7"]}, 2: {"a0": [0], "a1": [1, 2], "e0": [3, 4], "e1": ["5-7"]}},
    )
    parity.check(2, 2, hetermoe=["--hetermoe-placement", placement], num_layers=3)


def test_a_holder_without_experts_in_a_layer(parity):
    """One expert rank has all experts of the first layer, the other those of the second."""
    placement = placement_file(parity, experts=8, layers={1: {"e0": ["0-7"]}, 2: {"e1": ["0-7"]}})
    parity.check(2, 2, hetermoe=["--hetermoe-placement", placement])


def test_groups_with_experts_on_attention_ranks(parity):
    """The same holder of both ZP groups reduces its experts' gradients, on attention ranks too."""
    placement = placement_file(parity, experts=8, layers={"all": {"a0": [0, 5], "e0": [1, 2, 3, 4, 6, 7]}})
    parity.check(1, 1, 2, hetermoe=["--hetermoe-placement", placement], use_distributed_optimizer=True)


def test_one_expert_takes_all(parity):
    """A router with one dominant expert: holders that receive no token still take part in every reduction."""
    placement = placement_file(parity, experts=8, layers={"all": {"e0": [0], "e1": [1], "e2": ["2-7"]}})
    parity.check(
        1, 3, hetermoe=["--hetermoe-placement", placement], global_batch_size=2, seq_length=8,
        moe_router_topk=1, moe_router_pre_softmax=True, overlap_grad_reduce=True,
    )
