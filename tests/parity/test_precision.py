"""Experts in another precision than attention, on ranks of both roles."""

from __future__ import annotations

import pytest
from models import tiny
from parity_cases import placement_file
from ranks import assert_same_steps, largest_differences, run_ranks

MIXED = {1: {"a0": [0, 5], "e0": [1, 2, 3], "e1": [4, 6, 7]}, 2: {"e1": ["0-7"]}}


def experts_in(precision: str, parity) -> list[str]:
    return ["--hetermoe-expert-precision", precision, "--hetermoe-placement",
            placement_file(parity, experts=8, layers=MIXED)]


@pytest.mark.parametrize(
    "precision, flags",
    [pytest.param("fp16", {"loss_scale": 1024}, marks=pytest.mark.slow),
     ("fp16", {"loss_scale": 1024, "use_distributed_optimizer": True, "overlap_grad_reduce": True}),
     pytest.param("fp32", {"use_distributed_optimizer": True}, marks=pytest.mark.slow)],
    ids=["fp16", "fp16-distributed", "fp32"],
)
def test_attention_in_bf16(parity, precision, flags):
    """As near to stock Megatron whose experts are cast to that precision as this is to fp32.

    A holder sums what its experts make of a token before it casts, so these are not the same numbers.
    """
    scale = {"loss_scale": flags["loss_scale"]} if "loss_scale" in flags else {}
    cast = parity.stock(2, {"HETERMOE_TEST_EXPERTS": precision}, bf16=True, **scale).steps[0]
    bf16, fp32 = parity.stock(2, bf16=True).steps[0], parity.stock(2).steps[0]
    run = parity.disaggregated(2, 2, hetermoe=experts_in(precision, parity), bf16=True, **flags)
    found, allowed = largest_differences(run.steps[0], cast), largest_differences(cast, fp32)
    print(f"experts in {precision}: from stock with such experts {found}, that from fp32 {allowed}")
    assert found[0] <= allowed[0] and found[1] <= allowed[1]
    assert largest_differences(run.steps[0], bf16)[0] > 0, "experts were in bf16"
    for steps in run.steps[1:]:
        assert_same_steps(steps, run.steps[0])


def test_an_overflow_in_experts_skips_everywhere(parity):
    """bf16 attention could go on with any scale; it skips and sinks its scale with the experts."""
    flags = {"initial_loss_scale": 2.0**40, "hysteresis": 1, "train_iters": 30, "bf16": True}
    run = parity.disaggregated(2, 2, hetermoe=experts_in("fp16", parity), **flags)
    skipped = [step.skipped for step in run.steps[0]]
    assert 0 < sum(skipped) < len(skipped)
    for steps in run.steps[1:]:
        assert [step.skipped for step in steps] == skipped
        assert [step.loss_scale for step in steps] == [step.loss_scale for step in run.steps[0]]


def test_checkpoints(tmp_path, parity):
    """A resume is bit-equal, loss scale included, and stock Megatron goes on in bf16 from what was saved."""
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "1", "--hetermoe-expert-ranks", "2",
              "--hetermoe-expert-precision", "fp16", "--hetermoe-placement",
              placement_file(parity, experts=8, layers={1: {"e0": ["0-7"]}, 2: {"a0": [0], "e0": ["1-4"], "e1": ["5-7"]}})]
    flags = {"train_iters": 8, "save_interval": 4, "global_batch_size": 4, "bf16": True,
             "initial_loss_scale": 2.0**14, "loss_scale_window": 2, "use_distributed_optimizer": True}

    def run(**others):
        return run_ranks([*layout, *tiny(**flags, **others)], 3, cwd=tmp_path).check()

    unbroken = run(save=tmp_path / "unbroken")
    run(save=tmp_path / "broken", exit_interval=4)
    rest = run(load=tmp_path / "broken", save=tmp_path / "rest")
    for rank in range(3):
        assert_same_steps(rest.steps[rank], unbroken.steps[rank][4:])
        assert [step.loss_scale for step in rest.steps[rank]] == [step.loss_scale for step in unbroken.steps[0][4:]]
    assert rest.steps[0][0].loss_scale > 2.0**14
    stock = tiny(load=tmp_path / "broken", finetune=True, no_load_optim=True, no_load_rng=True,
                 **{**flags, "train_iters": 1, "save_interval": None})
    ours = run_ranks([*layout, *stock], 3, cwd=tmp_path).check().steps[0]
    theirs = run_ranks([*stock], 1, cwd=tmp_path).check().steps[0]
    assert_same_steps(ours, theirs, rel=2e-3)
