"""Whatever the order in which streams and ranks come to run, losses are the same to the last bit."""

from __future__ import annotations

import json

import pytest
from models import tiny
from ranks import assert_same_steps, run_ranks

PLACEMENT = {"experts": 8, "layers": {1: {"e0": ["0-3"], "a1": [4], "e1": ["5-7"]}, 2: {"e1": ["0-7"]}}}
LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2"]


# Each step draws delays of its own, so a run of twenty steps is twenty seeds; after a step that differed all would.
@pytest.mark.parametrize("wave, steps", [(None, 20), pytest.param(None, 100, marks=pytest.mark.slow),
                                         pytest.param(2, 100, marks=pytest.mark.slow)])
def test_bit_equal(tmp_path, wave, steps):
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps(PLACEMENT))
    flags = [*LAYOUT, "--hetermoe-placement", str(placement), *(["--hetermoe-wave", str(wave)] if wave else []),
             *tiny(train_iters=steps)]
    plain = run_ranks(flags, 4, cwd=tmp_path).check()
    delayed = run_ranks(flags, 4, cwd=tmp_path, env={"HETERMOE_TEST_DELAYS": "7"}).check()
    for rank in range(4):
        assert_same_steps(delayed.steps[rank], plain.steps[rank])
    assert len(plain.steps[0]) == steps
