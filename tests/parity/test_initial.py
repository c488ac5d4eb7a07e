"""Initial weights where ranks' devices make other random numbers of the same seed."""

from __future__ import annotations

from functools import partial

import torch
from models import tiny
from ranks import run_ranks

from megatron_hetermoe.mcore.initial import draw

LAYOUT = ["--hetermoe", "--hetermoe-attention-ranks", "2", "--hetermoe-expert-ranks", "2",
          "--hetermoe-groups", "2"]


def test_replicas_begin_alike(tmp_path):
    """Two ZP groups, whose ranks are each other's replicas: Megatron compares their weights after each step."""
    flags = tiny(train_iters=2, global_batch_size=4, check_weight_hash_across_dp_replicas_interval=1)
    run_ranks([*LAYOUT, *flags], 4, cwd=tmp_path, env={"HETERMOE_TEST_KINDS": "1"}).check()


def test_a_long_weight_is_drawn_in_parts():
    """No longer than what any GPU draws in one go; a method that needs the weight's shape is given that."""
    seen = []

    def note(tensor, **kwargs):
        seen.append(tensor.shape)
        return tensor

    weight = torch.empty(300, 500)
    draw(weight, partial(torch.nn.init.normal_, std=0.5))
    assert 0.49 < weight.std() < 0.51 and not torch.equal(weight.view(-1)[:65536], weight.view(-1)[65536:131072])
    original, torch.nn.init.normal_ = torch.nn.init.normal_, note
    try:
        draw(weight, partial(torch.nn.init.normal_, std=0.5))
    finally:
        torch.nn.init.normal_ = original
    assert [len(shape) for shape in seen] == [1, 1, 1] and max(map(max, seen)) == 65536
    draw(weight, partial(torch.nn.init.xavier_uniform_))
    assert weight.abs().max() <= (6 / 800) ** 0.5
