"""Weights that do not depend on which rank draws them: all ways to train a model begin with the same."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel


def begin_alike() -> None:
    """From here on dense weights of GPT models are drawn by their names. Those of experts are already (``mcore.experts``);
    Megatron draws dense ones from a stream for each pipeline stage, so that they differ with the split."""
    original = GPTModel.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for name, weight in _dense(self):
            # What ends a branch of a layer is smaller, as Megatron has it.
            smaller = (2 * self.config.num_layers) ** 0.5 if "linear_proj" in name else 1.0
            _draw(weight, self.config.init_method_std / smaller, zlib.crc32(name.encode()))

    GPTModel.__init__ = __init__


def _dense(model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The matrices of a model, or of a stage of one, that are no expert's, by their names in the whole model."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or ".experts." in name:
            continue
        layer = re.match(r"(decoder\.layers\.\d+)\.(.*)", name)
        yield f"layer {model.get_submodule(layer[1]).layer_number}, {layer[2]}" if layer else name, weight


@torch.no_grad()
def _draw(weight: torch.nn.Parameter, deviation: float, seed: int) -> None:
    weight.copy_(deviation * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
