"""The span of a run in which ranks watch each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_hetermoe.config.errors import EXIT_CODE, UsageError
from megatron_hetermoe.runtime.watch import Watch


def store_is_launchers() -> bool:
    """Whether the run's store is in a launcher: no rank's end closes it, and it outlives restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> str:
    """Prefix of this attempt's keys in a store that outlives it."""
    return f"hetermoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


@contextmanager
def watched(rank: int, roles: Sequence[str], timeout: float, store_rank: int | None) -> Iterator[Watch]:
    """A watch over all ranks, while the block runs. The run's store must be there (MASTER_ADDR, MASTER_PORT).

    What the block raises ends the process here, with a message for all ranks; but not what is no failure of this rank:
    a UsageError, which all ranks find alike, and an exit, which Megatron's training loop makes.

    Args:
        rank: this one.
        roles: of all ranks, by rank.
        timeout: seconds within which all ranks end when one is gone.
        store_rank: the rank whose process has the store; None where it is a launcher's.
    """
    watch = Watch(
        rank, roles, timeout, (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), store_rank, attempt()
    )
    watch.start()
    try:
        yield watch
    except UsageError:
        watch.close(EXIT_CODE)
        raise
    except SystemExit as end:
        watch.close(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException as error:
        watch.failed(error)
    watch.close()
