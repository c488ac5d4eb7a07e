"""A router that has collapsed trains as in stock Megatron, and is named once in a while."""

from __future__ import annotations

import pytest
from models import tiny
from ranks import assert_same_steps, run_ranks

from megatron_hetermoe.mcore.load import limit

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]
CASES = [
    # Logits added. All tokens to expert 5, each with another one of its rank, and so none to the first expert rank.
    ("0:-99,1:-99,2:-99,3:-99,5:99", "expert 5 of layer 1, on rank 3 (expert), gets 100% of all tokens, 4.0 times its part"),
    pytest.param("0:-99,1:-99,2:-99,3:-99", "no token of layer 1 goes to rank 2 (expert)", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("routing, said", CASES, ids=["all-to-one", "none-to-a-holder"])
def test_training_goes_on_as_stock(tmp_path, routing, said):
    env = {"HETERMOE_TEST_ROUTING": routing}
    weights = tmp_path / "weights"
    run_ranks(tiny(train_iters=1, save=weights, save_interval=1), 1, cwd=tmp_path, env=env).check()
    flags = tiny(load=weights, finetune=True, no_load_optim=True, no_load_rng=True, train_iters=22)
    stock = run_ranks([*flags, "--expert-model-parallel-size", "2"], 2, cwd=tmp_path, env=env).check()
    run = run_ranks([*LAYOUT, *flags], 4, cwd=tmp_path, env=env).check()
    for steps in run.steps:
        assert_same_steps(steps, stock.steps[0], rel=1e-5)
    assert run.output[0].count("uneven load") == 1 and said in run.output[0], run.output[0][-2000:]
    assert not any("uneven load" in output for output in run.output[1:])


def test_an_even_router_is_not_named(tmp_path):
    run = run_ranks([*LAYOUT, *tiny(train_iters=2)], 4, cwd=tmp_path).check()
    assert not any("uneven load" in output for output in run.output)


@pytest.mark.parametrize("topk, experts, share", [(2, 8, 0.625), (8, 128, 0.25), (1, 2, 0.75), (8, 64, 0.5)])
def test_the_limit_is_above_an_experts_part_and_below_all(topk, experts, share):
    assert limit(topk / experts) == share
