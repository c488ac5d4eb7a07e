"""Pipeline stages, one ZP group each: the losses are those of stock Megatron without a pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parity_cases import placement_file
from ranks import Run, assert_same_steps

SHORT = {"num_layers": 4, "global_batch_size": 4}


def check(parity, m: int, n: int, g: int = 1, hetermoe=(), stages: int = 2, split=(), rel: float = 1e-5, **model) -> Run:
    """M and N of each stage. The last stage's ranks have the loss, all have the gradient norm."""
    model = {**SHORT, **model}
    reference = parity.stock(m * g, **model)
    run = parity.disaggregated(
        m * stages, n * stages, g, hetermoe, pipeline_model_parallel_size=stages, **dict(split), **model
    )
    losses = 0
    for rank, steps in enumerate(run.steps):
        pool, first = (m * g, 0) if rank < m * g * stages else (n * g, m * g * stages)
        if (rank - first) // pool == stages - 1:
            losses += 1
            assert_same_steps(steps, reference.steps[0], rel=rel)
            for ours, theirs in zip(run.evals[rank], reference.evals[0], strict=True):
                assert ours.loss == pytest.approx(theirs.loss, rel=rel)
        else:
            assert_same_steps([replace(step, loss={}) for step in steps],
                              [replace(step, loss={}) for step in reference.steps[0]], rel=rel)
    assert losses == (m + n) * g
    return run


@pytest.mark.parametrize("wave", [1, 2, None])
def test_waves(parity, wave):
    """1F1B of single microbatches, of pairs, and one wave of a step."""
    check(parity, 1, 1, hetermoe=["--hetermoe-wave", str(wave)] if wave else [])
