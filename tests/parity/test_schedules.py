"""Schedules change when things happen, never what: each is equal to stock Megatron."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("wave", [2, 8, *(pytest.param(wave, marks=pytest.mark.slow) for wave in (1, 3, 4))])
def test_zebra_waves(parity, wave):
    """Eight microbatches of each attention rank, in waves of so many; 3 makes them uneven."""
    parity.check(2, 2, hetermoe=["--hetermoe-wave", str(wave)], global_batch_size=16)


@pytest.mark.parametrize("batch", [2, 4])
def test_zebra_with_few_microbatches(parity, batch):
    """One or two microbatches, all on the way."""
    parity.check(2, 2, global_batch_size=batch)


def test_sequential(parity):
    parity.check(2, 2, hetermoe=["--hetermoe-schedule", "sequential"])
