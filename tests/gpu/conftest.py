"""The GPU that tests divide, and the service by which several ranks compute on it at once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from gpu_sharing import sharing

from megatron_hetermoe.cli.emulate import gpu_to_divide
from megatron_hetermoe.config.errors import Problems, UsageError


@pytest.fixture(scope="session")
def gpu() -> str:
    """The GPU's name in CUDA_VISIBLE_DEVICES."""
    problems = Problems()
    found = gpu_to_divide(os.environ, problems)
    try:
        problems.raise_if_any()
    except UsageError as error:
        pytest.skip(error.message())
    return found.uuid


@pytest.fixture(scope="module")
def shared(gpu, tmp_path_factory) -> Iterator[dict[str, str]]:
    """``sharing`` for a module's tests."""
    with sharing(gpu, tmp_path_factory.mktemp("service")) as environment:
        yield environment
