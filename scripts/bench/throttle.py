"""Traffic as slow as a network's, on ranks whose links are faster.

Behind a transfer its stream waits for as long as its bytes, those that this rank sends or receives, whichever are more, would
have taken longer on the slower link; what waits for the transfer waits for that too, and all else goes on. Each rank has
a link of its own, both directions of it at once. Gradients and what is reduced over ranks is not slowed down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_hetermoe.runtime.channels import Channel

_FIRST_RATE = 1.7e9  # cycles a second, until one was measured
_LEAST = 1e-6  # seconds; launching a kernel takes longer


def longer(points: Mapping[float, float], gbps: float) -> float:
    """Seconds that each byte takes longer than measured, on a link of that speed.

    Args:
        points: seconds of a transfer by its bytes, as the channel was measured.
        gbps: 10^9 bits a second.

    Raises:
        SystemExit: the channel is no faster than that.
    """
    sizes = sorted(points)
    first, last = sizes[-2] if len(sizes) > 1 else 0.0, sizes[-1]
    own = (points[last] - points.get(first, 0.0)) / (last - first)
    more = 8 / (gbps * 1e9) - own
    if more <= 0:
        raise SystemExit(f"--throttle-gbps {gbps:g}: the channel was measured at {8e-9 / own:.0f} Gbit/s, which is no faster")
    return more


class Wait:
    """Keeps a stream waiting, by a kernel that counts the GPU's cycles.

    Their rate changes with the GPU's load, so the first wait after each ``settle`` is timed, and gives the rate for what
    follows.

    Args:
        spin: queues a kernel of so many cycles on the current stream.
        event: makes an event with a time.
    """

    def __init__(self, spin: Callable[[int], None] = torch.cuda._sleep,
                 event: Callable[[], torch.cuda.Event] = functools.partial(torch.cuda.Event, enable_timing=True)):
        self._spin, self._event = spin, event
        self._rate = _FIRST_RATE
        self._timed: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def seconds(self, seconds: float) -> None:
        """Queues a wait on the current stream."""
        if seconds < _LEAST:
            return
        cycles = round(seconds * self._rate)
        if self._timed is not None:
            self._spin(cycles)
            return
        start, end = self._event(), self._event()
        start.record()
        self._spin(cycles)
        end.record()
        self._timed = cycles, start, end

    def settle(self) -> None:
        """Takes the rate from the wait that was timed; the device must be idle."""
        if self._timed is not None:
            cycles, start, end = self._timed
            self._rate = cycles / (start.elapsed_time(end) / 1e3)
            self._timed = None


def throttle_channels(wait: Wait, longer: float) -> None:
    """From here on the plugin's channels take that many seconds a byte longer."""
    original = Channel.exchange

    @functools.wraps(original)
    def exchange(self, sends=(), receives=()):
        sent = original(self, sends, receives)
        wait.seconds(longer * max(
            sum(message.tensor.nbytes for message in messages if message.member != self._member and message.tensor.is_cuda)
            for messages in (sends, receives)))
        return sent

    Channel.exchange = exchange


def throttle_stock(wait: Wait, longer: float) -> None:
    """From here on stock Megatron's alltoalls, and what its pipeline stages hand over, take that many seconds a byte longer."""
    dist.all_to_all_single = _all_to_all(dist.all_to_all_single, wait, longer)
    dist.batch_isend_irecv = _handover(dist.batch_isend_irecv, wait, longer)


def _all_to_all(original: Callable, wait: Wait, longer: float) -> Callable:
    @functools.wraps(original)
    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        work = original(output, input, output_split_sizes, input_split_sizes, group, async_op)
        assert not async_op or work is None, "what goes on beside the compute stream is not slowed down"
        ranks, own = dist.get_world_size(group), dist.get_rank(group)
        wait.seconds(longer * max(
            _others(tensor, splits, ranks, own) for tensor, splits in ((output, output_split_sizes), (input, input_split_sizes))))
        return work

    return all_to_all_single


def _others(tensor: torch.Tensor, splits: Sequence[int] | None, ranks: int, own: int) -> float:
    """Bytes of a tensor that go to or come from other ranks."""
    rows = len(tensor)
    mine = rows / ranks if splits is None else splits[own]
    return tensor.nbytes * (rows - mine) / rows if rows else 0.0


class _Longer:
    """What ``batch_isend_irecv`` gave, and behind it a wait."""

    def __init__(self, work: dist.Work, wait: Wait, seconds: float):
        self._work, self._wait, self._seconds = work, wait, seconds

    def wait(self) -> None:
        self._work.wait()
        self._wait.seconds(self._seconds)


def _handover(original: Callable, wait: Wait, longer: float) -> Callable:
    @functools.wraps(original)
    def batch_isend_irecv(operations):
        seconds = longer * max(
            sum(operation.tensor.nbytes for operation in operations if (operation.op is dist.irecv) == receives)
            for receives in (False, True))
        works = original(operations)
        return [*works[:-1], _Longer(works[-1], wait, seconds)]

    return batch_isend_irecv
