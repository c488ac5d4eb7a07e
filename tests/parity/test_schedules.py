"""Schedules change when things happen, never what: each is equal to stock Megatron."""

from __future__ import annotations

import pytest
from parity_cases import placement_file
from ranks import assert_same_steps


@pytest.mark.parametrize("wave", [8, *(pytest.param(wave, marks=pytest.mark.slow) for wave in (1, 2, 3, 4))])
def test_zebra_waves(parity, wave):
    """Eight microbatches of each attention rank, in waves of so many; 3 makes them uneven."""
    parity.check(2, 2, hetermoe=["--hetermoe-wave", str(wave)], global_batch_size=16)


@pytest.mark.parametrize("batch", [2, 4])
def test_zebra_with_few_microbatches(parity, batch):
    """One or two microbatches, all on the way."""
    parity.check(2, 2, global_batch_size=batch)


def test_sequential(parity):
    parity.check(2, 2, hetermoe=["--hetermoe-schedule", "sequential"])


OVERLAPPED = ["--hetermoe-schedule", "overlapped", "--hetermoe-wave"]


@pytest.mark.parametrize("wave", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_overlapped_waves(parity, wave):
    """The next wave goes forward while the last one goes backward; three of uneven size, and eight of one each."""
    parity.check(2, 2, hetermoe=[*OVERLAPPED, str(wave)], global_batch_size=16)


def test_overlapped_waves_are_zebra_bit_by_bit(parity):
    """With W tasks, experts on attention ranks, a dense layer, tied embeddings and reductions that overlap the last
    backward: nothing is added up in another order."""
    placement = placement_file(
        parity, experts=8, layers={2: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 3: {"a1": [3], "e1": ["0-2", "4-7"]}}
    )
    both = ["--hetermoe-placement", placement, "--hetermoe-weight-gradients", "delayed"]
    model = {"num_layers": 3, "moe_layer_freq": "[0,1,1]", "ffn_hidden_size": 64, "global_batch_size": 12,
             "untie_embeddings_and_output_weights": None, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
             "overlap_param_gather": True}
    zebra = parity.disaggregated(2, 2, 1, [*both, "--hetermoe-wave", "2"], **model)
    overlapped = parity.disaggregated(2, 2, 1, [*both, *OVERLAPPED, "2"], **model)
    for ours, theirs in zip(overlapped.steps, zebra.steps, strict=True):
        assert_same_steps(ours, theirs)


@pytest.mark.slow
def test_overlapped_waves_recompute(parity):
    """Tasks run again with the random state they had, though another wave's tasks have drawn since."""
    model = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "hidden_dropout": 0.1,
             "attention_dropout": 0.1, "global_batch_size": 4}
    zebra = parity.disaggregated(1, 1, 1, ["--hetermoe-wave", "1"], **model)
    overlapped = parity.disaggregated(1, 1, 1, [*OVERLAPPED, "1"], **model)
    for ours, theirs in zip(overlapped.steps, zebra.steps, strict=True):
        assert_same_steps(ours, theirs)
