"""The batch sizes of a run whose batch grows (``--step-batch-size-schedule``), read as Megatron reads them."""

from __future__ import annotations

from megatron_hetermoe.config.errors import UsageError

FLAG = "--step-batch-size-schedule"
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def scheduled_batches(schedule: str, sequence: int) -> list[tuple[int, int]]:
    """From which sequence on a step has how many.

    Args:
        schedule: the flag's value, TOKENS:SEQUENCES by blanks or commas, where ``1.5K`` is 1500.
        sequence: tokens of one.

    Returns:
        Pairs of sequences, ascending: those that were trained on before, and those of a step from there on.

    Raises:
        UsageError: the schedule cannot be read, or two batches begin with one sequence.
    """
    batches = sorted(map(_entry, schedule.replace(",", " ").split()))
    if not batches or batches[0][0]:
        raise UsageError(["--step-batch-size-schedule has no batch for the first step: begin with 0:SEQUENCES"])
    batches = [(tokens // sequence, batch) for tokens, batch in batches]
    for (before, _), (after, _) in zip(batches, batches[1:]):
        if before == after:
            raise UsageError([f"--step-batch-size-schedule has two batches from sequence {after} on: what stands before a colon "
                              f"is tokens, {sequence} in a sequence"])
    return batches


def _entry(text: str) -> tuple[int, int]:
    """Tokens and sequences of one entry."""
    try:
        tokens, batch = map(_number, text.split(":"))
    except (ValueError, OverflowError):
        raise UsageError([f"--step-batch-size-schedule has {text!r}: write TOKENS:SEQUENCES, as in 0:256 2M:512"]) from None
    if tokens < 0 or batch < 1:
        raise UsageError([f"--step-batch-size-schedule has {text!r}: tokens are from 0 on, sequences from 1 on"])
    return tokens, batch


def _number(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper())
    return int(float(text[:-1]) * unit if unit else float(text))
