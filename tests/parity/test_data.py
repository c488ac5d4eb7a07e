"""A data set of files through the script's provider: the tokens that reach the model are those on disk."""

from __future__ import annotations

import numpy
import pytest
from models import tiny
from ranks import run_function, run_ranks


def _write(rank: int, world: int, prefix: str) -> None:
    """Forty documents of 50 tokens from a small alphabet, as Megatron's preprocessing would write them."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for start in range(40):
        builder.add_document(torch.tensor([(start + index) % 5 for index in range(50)]), [50])
    builder.finalize(prefix + ".idx")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "counting")
    run_function(_write, 1, path)
    return path


@pytest.mark.parametrize(
    "flags",
    [
        lambda prefix: {"data_path": prefix, "split": "90,5,5"},
        lambda prefix: {f"{part}_data_path": prefix for part in ("train", "valid", "test")} | {"split": None},
    ],
    ids=["data-path", "path-of-each-split"],
)
def test_training_on_files(tmp_path, prefix, flags):
    """Counting modulo five is learnt in 20 steps, far below what made-up tokens allow."""
    files = {**flags(prefix), "mock_data": None, "data_cache_path": tmp_path / "cache"}
    run = run_ranks(tiny(lr=1e-2, expert_model_parallel_size=2, **files), 2, cwd=tmp_path).check()
    assert run.steps[0][-1].loss["lm loss"] < 2
