"""2,000 steps with all that a long run has: memory stays, and so does the loss's agreement with stock Megatron.

Two runs that compute the same in another order drift apart as rounding grows, so the loss is compared as a curve:
the mean of each 50 steps. Memory is compared as the median of each 200 steps, so that a save does not count.
"""

from __future__ import annotations

import statistics

import pytest
import yaml
from models import tiny
from ranks import assert_same_steps, run_ranks
from unit.pricing import group, profile, shape

from megatron_hetermoe.planner.asym_ea import balance, limits_of, placement_of

STEPS = 2000
ROUTING = "0:2,1:1,6:-4"  # logits: expert 0 gets most tokens, expert 6 hardly one
EXACT, REL = 20, 1e-5  # the first steps, one by one
WINDOW, CURVE = 50, 0.01  # each mean of so many steps, relative to stock Megatron's
SETTLED, MEMORY = 200, 0.02  # memory after so many steps, and how much it may change


def asym_ea(folder) -> str:
    """A placement file with experts on attention ranks, as the planner balances two fast and one slow rank."""
    of = shape(layers=2, experts=8, hidden=32, sequence=32)
    costs = group(2, 1, of, old=profile(of, expert=(8e-4, 16e-4)))
    placement = placement_of(balance(costs, limits_of(costs, 4), 4).experts)
    assert placement.experts_held(0) and placement.experts_held(2), placement
    names = ("a0", "a1", "e0")
    layers = {layer: {name: list(placement.held(layer, member)) for member, name in enumerate(names)}
              for layer in (1, 2)}
    path = folder / "placement.yaml"
    path.write_text(yaml.safe_dump({"experts": 8, "layers": layers}))
    return str(path)


def medians(steps, window):
    """Of memory in use, in bytes, window by window."""
    resident = [step.resident for step in steps]
    return [statistics.median(resident[start:start + window]) for start in range(0, len(resident), window)]


def means(steps, window):
    losses = [step.loss["lm loss"] for step in steps]
    return [statistics.fmean(losses[start:start + window]) for start in range(0, len(losses), window)]


@pytest.mark.slow
def test_memory_and_loss_stay(tmp_path):
    weights, env = tmp_path / "weights", {"HETERMOE_TEST_ROUTING": ROUTING}
    run_ranks(tiny(train_iters=1, save=weights, save_interval=1), 1, cwd=tmp_path, env=env).check()
    flags = tiny(
        load=weights, finetune=True, no_load_optim=True, no_load_rng=True, train_iters=STEPS, save_interval=STEPS // 5,
        eval_iters=2, eval_interval=STEPS // 10, moe_aux_loss_coeff=0.001,
    )
    layout = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "1", "--hetermoe-wave", "3",
              "--hetermoe-placement", asym_ea(tmp_path)]
    stock = run_ranks([*flags, "--save", str(tmp_path / "stock"), "--expert-model-parallel-size", "2"], 2,
                      cwd=tmp_path, env=env, timeout=7200).check()
    run = run_ranks([*layout, *flags, "--save", str(tmp_path / "run")], 3, cwd=tmp_path, env=env, timeout=7200).check()
    for rank in range(3):
        assert_same_steps(run.steps[rank][:EXACT], stock.steps[0][:EXACT], rel=REL)
        early, *later = medians(run.steps[rank][SETTLED:], SETTLED)
        print(f"rank {rank}: {early / 1e6:.1f} MB, then {[round(one / 1e6, 1) for one in later]}")
        assert all(abs(one / early - 1) <= MEMORY for one in later)
    ours, theirs = means(run.steps[0], WINDOW), means(stock.steps[0], WINDOW)
    print(f"loss {ours[0]:.4f} to {ours[-1]:.4f}, the most apart "
          f"{max(abs(one / other - 1) for one, other in zip(ours, theirs)):.2e} of it")
    assert theirs[-1] < theirs[0] - 1
    assert ours == pytest.approx(theirs, rel=CURVE)
    assert [one.loss["lm loss"] for one in run.evals[0]] == pytest.approx(
        [one.loss["lm loss"] for one in stock.evals[0]], rel=CURVE)
    assert len(run.steps[0]) == len(stock.steps[0]) == STEPS
