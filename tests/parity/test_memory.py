"""Each rank builds its share of the model and nothing else; Megatron is changed where the inventory says."""

from __future__ import annotations

import re

from parity_cases import placement_file

from megatron_hetermoe.mcore import patches

EXPERT = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.")


def shares(parameters: dict[str, int]) -> tuple[int, dict[int, int], int]:
    """Elements that are no expert's, the experts of each layer (from 1), and elements of one expert at most."""
    experts: dict[tuple[int, int], int] = {}
    dense = 0
    for name, elements in parameters.items():
        if match := EXPERT.search(name):
            key = int(match[1]) + 1, int(match[2])
            experts[key] = experts.get(key, 0) + elements
        else:
            dense += elements
    layers = {layer: sum(1 for other, _ in experts if other == layer) for layer, _ in experts}
    return dense, layers, max(experts.values(), default=0)


def test_parameters_are_exactly_each_ranks_share(parity):
    placement = placement_file(
        parity, experts=8, layers={1: {"e0": ["0-4"], "e1": ["5-7"]}, 2: {"a1": [7], "e0": ["0-6"]}}
    )
    whole_dense, whole_experts, expert = shares(parity.stock(1, train_iters=1, global_batch_size=2).parameters[0])
    assert whole_experts == {1: 8, 2: 8} and whole_dense > 0
    assert expert == 3 * 32 * 32
    run = parity.disaggregated(
        2, 2, hetermoe=["--hetermoe-placement", placement], train_iters=1, global_batch_size=2
    )
    assert [shares(parameters) for parameters in run.parameters] == [
        (whole_dense, {}, 0), (whole_dense, {2: 1}, expert), (0, {1: 5, 2: 7}, expert), (0, {1: 3}, expert),
    ]


def test_exactly_what_the_inventory_lists_is_changed(parity):
    asked = ["--hetermoe-on-save-failure", "continue"]  # else saving stays as it is
    run = parity.disaggregated(1, 1, hetermoe=asked, train_iters=1, global_batch_size=1)
    for changed in run.changed:
        assert set(changed) == {patch.symbol for patch in patches.RUN}


def test_plain_megatron_is_left_alone(parity):
    assert parity.stock(1, train_iters=1, global_batch_size=2).changed == [[]]
