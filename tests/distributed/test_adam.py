"""An optimizer's state that another implementation of Adam has written."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_function


class EngineAdam(torch.optim.Optimizer):
    """Counts steps in its groups, as transformer-engine's does."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {"lr": 1.0, "bias_correction": True})


def _fitted(rank: int, world: int, states: list[tuple[str, bool, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What becomes of states for torch's or the other Adam, of a distributed optimizer or not."""
    from megatron_hetermoe.mcore.optimizer import fit_to_adam

    kinds = {"torch": torch.optim.AdamW, "engine": EngineAdam}
    for kind, distributed, state in states:
        fit_to_adam(state, kinds[kind]([torch.nn.Parameter(torch.zeros(1))]), distributed)
    return [state for _, _, state in states]


def test_steps_and_groups():
    engine, torchs = {"lr": 2.0, "step": 3}, {"lr": 2.0, "amsgrad": False}
    [(to_torch, to_engine, same, to_torch_sharded, to_engine_sharded)] = run_function(_fitted, 1, [
        ("torch", False, {"optimizer": {"param_groups": [dict(engine)], "state": {0: {}}}}),
        ("engine", False, {"param_groups": [dict(torchs)], "state": {"common_step": torch.tensor(3.0)}}),
        ("torch", False, {"param_groups": [dict(torchs)], "state": {"common_step": torch.tensor(3.0)}}),
        ("torch", True, {"optimizer": {"param_groups": [dict(engine)]}}),
        ("engine", True, {"optimizer": {"param_groups": [{**torchs, "step": 3.0}]}}),
    ])
    assert to_torch["optimizer"]["state"] == {0: {}, "common_step": torch.tensor(3.0)}
    assert to_torch["optimizer"]["param_groups"][0]["decoupled_weight_decay"] is True
    [group] = to_engine["param_groups"]
    assert (group["lr"], group["bias_correction"], group["step"]) == (2.0, True, 3) and not to_engine["state"]
    assert same["state"] == {"common_step": torch.tensor(3.0)}
    assert to_torch_sharded["optimizer"]["param_groups"][0]["step"] == 3 and "state" not in to_torch_sharded["optimizer"]
    step = to_engine_sharded["optimizer"]["param_groups"][0]["step"]
    assert step == 3 and isinstance(step, int)
