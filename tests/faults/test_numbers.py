"""A number that is NaN is found in both pools alike, and said to be where it came from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.mcore.numbers import Numbers
from megatron_hetermoe.runtime.copies import labels_of
from megatron_hetermoe.runtime.transfers import Routed, TransferSizes
from megatron_hetermoe.schedule.numbering import Numbering
from megatron_hetermoe.topology.placement import Placement

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "2",
          "--hetermoe-stall-timeout", "5"]
EXPERT = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"  # the second expert rank's: expert 7
ATTENTION = "decoder.layers.1.self_attention.linear_proj.weight"
CASES = [
    (f"2:{EXPERT}", "layer 2, microbatch 1: in expert 7, on rank 2 (expert)"),
    (f"2:{EXPERT}:grad", "gradients of expert 7 of layer 2 (linear_fc1.weight)"),
    (f"0:{ATTENTION}", "layer 2, microbatch 1: in attention, or before it, on rank 0 (attention)"),
    (f"0:{ATTENTION}:grad", f"gradients of {ATTENTION}"),
]


@pytest.mark.parametrize("spoiled, said", CASES, ids=["expert", "expert-grad", "attention", "attention-grad"])
def test_all_ranks_end_and_the_place_is_named(tmp_path, spoiled, said):
    """As Megatron ends a step whose result stays wrong when it is run again: with its own exit code, on all ranks."""
    env = {"HETERMOE_TEST_NAN": spoiled}
    # Megatron saves before it exits.
    flags = tiny(train_iters=4, global_batch_size=2, save=tmp_path / "saved", save_interval=100)
    run = run_ranks([*LAYOUT, *flags], 3, cwd=tmp_path, env=env)
    assert len(set(run.exit_codes)) == 1 and run.exit_codes[0] in (16, 17), run.exit_codes
    culprit = int(spoiled[0])
    output = "".join(run.output)
    assert said in output, output[-3000:]
    assert "Traceback" not in output
    assert all(len(steps) == 2 for steps in run.steps)
    if spoiled.endswith("grad"):
        assert said in run.output[culprit]


def test_without_a_second_run_the_rank_is_named(tmp_path):
    flags = tiny(train_iters=4, global_batch_size=2, rerun_mode="disabled")
    run = run_ranks([*LAYOUT, *flags], 3, cwd=tmp_path, env={"HETERMOE_TEST_NAN": CASES[0][0]})
    assert run.exit_codes == [1, 3, 3]
    assert CASES[0][1] in run.output[0]
    for rank in (1, 2):
        assert "rank 0 (attention, host " in run.output[rank] and "found NaN in local forward loss" in run.output[rank]


def test_overflow_is_skipped_by_both_pools(tmp_path):
    """With a dynamic loss scale a gradient that is not finite skips the step everywhere, and training goes on."""
    flags = tiny(
        train_iters=4, global_batch_size=2, fp16=True, initial_loss_scale=2.0**10,
        no_check_for_nan_in_loss_and_grad=True,
    )
    run = run_ranks([*LAYOUT, *flags], 3, cwd=tmp_path, env={"HETERMOE_TEST_NAN": f"2:{EXPERT}:grad"}).check()
    assert [[step.skipped for step in steps] for steps in run.steps] == [[0, 1, 1, 1]] * 3


@pytest.mark.parametrize("spoiled, said", [
    ([0, 2], "expert 1, on rank 1"),  # rows of 1 and of both, not the one of 0
    ([2], "expert 0 or 1, on rank 1"),  # each has a row that is good
    ([3], "expert 2, on rank 2"),
])
def test_of_several_experts_those_are_named_that_made_nothing_good(spoiled, said):
    """Two holders of two experts; of the first one's three rows one goes to both of its experts."""
    layout = SimpleNamespace(
        group_of=lambda rank: 0, members_of=lambda holder: (holder,), rank_of=lambda group, member: member,
        role=lambda rank: "attention" if rank == 0 else "expert")
    session = SimpleNamespace(
        rank=0, layout=layout, numbering=Numbering((range(1, 2),)), stage_placement=Placement(((1, 1, 2, 2),), 3))
    sizes = TransferSizes([3, 1], [[2, 2], [1, 0]])
    index = torch.tensor([1, 2, 0, 2, 0, 9], dtype=torch.int32)  # the last one is not sent
    numbers = Numbers(session, True)
    routed = Routed(sizes, torch.ones(5, 2), torch.ones(6), labels_of(index, torch.ones(6)), outputs=torch.ones(4, 2))
    routed.outputs[spoiled] = torch.nan
    sent = torch.ones(5, 2)
    sent[4] = torch.nan  # nor is this
    numbers.sent(1, 0, sent)
    numbers.came(1, 0, routed)
    assert numbers.first() == f"layer 1, microbatch 1: in {said} (expert)"
