"""Asymmetric expert assignment: which share of each layer's experts moves to attention ranks.

Two ways. ``gather_and_squeeze`` is the paper's (section 4), which moves whole chunks and looks at one pass.
``balance`` starts from it among others, has no chunks and no rule for M and N, and asks the simulator: it counts the
ramps of the first and last layers, both passes, channels and what remains when experts do not divide.

Both say how many experts each member holds in each layer, as an array [K, members]; routing is taken to be balanced, so
which ones does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from megatron_hetermoe.config.plan import MERGED, TOGETHER
from megatron_hetermoe.cost.group import GroupCosts
from megatron_hetermoe.cost.tasks import TaskCosts
from megatron_hetermoe.planner.memory import most_experts
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_ends
from megatron_hetermoe.topology.placement import Placement

if TYPE_CHECKING:
    import numpy as np

_SEARCH_MICROBATCHES = 8  # that the local search simulates; more change the ramps' share, not which neighbour is best
_SEARCH_OVERLAPPED = 4  # of each of three waves
LONG = 300  # layers x microbatches of a step from which on the event simulator takes more than a moment
_ROUNDS = 40  # of local search, each with all neighbours
_DEEP = 16  # layers from which on there are fewer of them: a layer's neighbours are a smaller part of a step, and are more
_ROTATED = 12  # members of a ZP group up to which what does not divide goes round in every case
_FAMILY = 96  # totals that are tried before it,
_COARSE = 8  # at first every eighth


@dataclass(frozen=True)
class Limits:
    """Memory bounds.

    Attributes:
        pairs: for each member, the most (layer, expert) pairs that fit; negative when nothing does.
    """

    pairs: tuple[int, ...]

    def total(self, members: range) -> int:
        return sum(max(0, self.pairs[member]) for member in members)


def limits_of(group: GroupCosts, wave: float, weight_gradients: str = TOGETHER) -> Limits:
    """The bounds with that many microbatches on their way, as ``memory.in_flight`` counts them."""
    pairs = [0] * group.members
    for (is_attention, _), members in group.alike.items():
        most = most_experts(group, members[0], wave, weight_gradients)
        if is_attention and group.expert_tensor > 1:
            most = min(most, 0)
        for member in members:
            pairs[member] = most
    return Limits(tuple(pairs))


def feasible(experts: np.ndarray, limits: Limits, schedule: str = "zebra") -> np.ndarray:
    """Which of [..., K, members] fit. The limits of overlapped waves are those of experts that are spread evenly over
    layers; others may have more of two waves at once, their first layers' of both, than these count."""
    import numpy as np

    pairs = np.array(limits.pairs)
    fits = (experts.sum(axis=-2) <= pairs).all(axis=-1)
    if schedule != "overlapped":
        return fits
    layers = experts.shape[-2]
    first = experts.cumsum(axis=-2)  # [..., layer, members]: held in the layers up to this one
    both = first + np.flip(first, axis=-2)  # layers 1 to l of the last wave beside 1 to K+1-l of the next
    return fits & (both.max(axis=-2) <= pairs * (1 + 1 / layers)).all(axis=-1)


def gather_and_squeeze(group: GroupCosts, limits: Limits) -> np.ndarray:
    """The paper's assignment.

    A chunk is the smallest move that keeps the ranks of each pool equal: lcm(M, N) experts, taken evenly off the expert
    ranks and put evenly on the attention ranks. From layer to layer the bubble of attention ranks grows by
    T_E^Exp - T_A^Attn. Moving a chunk shrinks it by the time taken off an expert rank and the time put on an
    attention rank; each layer moves as many as the gathered bubble pays for. Of all layers together no fewer than
    n_min chunks move, or the expert ranks do not fit, and no more than n_max, or the attention ranks do not.
    """
    import numpy as np

    shape, m = group.shape, group.attention_members
    n = group.members - m
    chunk = math.lcm(m, n)
    off, on = chunk // n, chunk // m  # experts of one rank
    base, extra = divmod(shape.experts, n)
    most_a_layer = base // off
    held = np.array([0] * m + [base + (index < extra) for index in range(n)])
    start = int(held[m:].max()) * len(shape.moe_layers)
    least = max((-(-(start - limits.pairs[member]) // off) for member in range(m, group.members)), default=0)
    most = min(max(0, limits.pairs[member]) // on for member in range(m))
    expert = max(sum(group.expert_seconds(member, way, held[member]) for way in (0, 1)) for member in range(m, group.members))
    gain = off * max(sum(group.expert[member]) for member in range(m, group.members)) \
        + on * max(sum(group.expert[member]) for member in range(m))
    bubble, moved = 0.0, dict.fromkeys(shape.moe_layers, 0)
    for layer in shape.moe_layers:
        attention = max(forward[layer - 1] + backward[layer - 1] for forward, backward in group.attention)
        bubble = max(0.0, bubble + expert - attention)
        moved[layer] = max(0, min(int(bubble / gain + 1e-6) if gain else 0, most_a_layer, most - sum(moved.values())))
        bubble -= moved[layer] * gain
    while sum(moved.values()) < min(least, most) and min(moved.values()) < most_a_layer:
        moved[min(moved, key=lambda layer: moved[layer])] += 1
    result = np.zeros((shape.layers, group.members), int)
    for layer, chunks in moved.items():
        result[layer - 1] = held
        result[layer - 1, :m] += chunks * on
        result[layer - 1, m:] -= chunks * off
    return result


def by_memory(group: GroupCosts, limits: Limits) -> np.ndarray | None:
    """[K, members]: each expert to the member that has most room left, which finds room whenever there is some; None
    where there is none."""
    import numpy as np

    room = np.array(limits.pairs)
    experts = np.zeros((group.shape.layers, group.members), int)
    for layer in group.shape.moe_layers:
        for _ in range(group.shape.experts):
            most = int(room.argmax())
            experts[layer - 1, most] += 1
            room[most] -= 1
    return experts if room.min() >= 0 else None


@dataclass(frozen=True)
class Assignment:
    """A judged assignment.

    Attributes:
        experts: [K, members].
        seconds: of the step, by the event simulator, or where that takes long by ``long_step_seconds``.
        origin: where it came from: "even", "gather-and-squeeze", "balance", or "memory" where none of these fit.
        paper_seconds: of the step under gather-and-squeeze, None where that does not fit.
        even_seconds: of the step with all experts on expert ranks, None where that does not fit.
    """

    experts: np.ndarray
    seconds: float
    origin: str
    paper_seconds: float | None
    even_seconds: float | None


def balance(
    group: GroupCosts, limits: Limits, wave: int | None, thorough: bool = True, schedule: str = "zebra",
    weight_gradients: str = TOGETHER,
) -> Assignment | None:
    """The best assignment found, never worse than gather-and-squeeze by the simulator.

    Args:
        group: the ZP group's costs.
        limits: memory bounds.
        wave: R of the plan; None for all microbatches.
        thorough: whether neighbours of the best are searched, and the event simulator judges.
        schedule: of the plan, "zebra" or "overlapped".
        weight_gradients: of the plan, TOGETHER or MERGED.

    Returns:
        None when no assignment fits.
    """
    import numpy as np

    searched = group.amortised(wave or group.step.microbatches) if weight_gradients == MERGED else group
    search = _Search(searched, limits, schedule, wave)
    paper = gather_and_squeeze(searched, limits)
    starts = search.family()
    starts.append(tuple(int(count) for count in paper[:, :group.attention_members].sum(axis=1)))
    seconds = search.seconds(starts)
    found = [starts[index] for index in np.argsort(seconds)[:3] if np.isfinite(seconds[index])]
    if thorough and found:
        found.insert(0, search.improve(found[0], float(seconds.min())))
    named = [("even", search.experts(search.evenly(0))), ("gather-and-squeeze", paper)]
    named += [("balance", search.experts(moved)) for moved in dict.fromkeys(found[:2])]
    fitting = [(name, experts) for name, experts in named if feasible(experts, limits, schedule)]
    if not fitting:
        full = by_memory(group, limits)
        if full is None or not feasible(full, limits, schedule):
            return None
        fitting = [("memory", full)]
    candidates = [experts for _, experts in fitting]
    if thorough and group.shape.layers * group.step.microbatches <= LONG:
        times = [_by_events(group, experts, schedule, wave, weight_gradients) for experts in candidates]
    else:
        times = [float(value) for value in long_step_seconds(searched, np.array(candidates, float), wave, schedule)]
    judged = [(seconds, name, experts) for seconds, (name, experts) in zip(times, fitting)]
    by_name = {name: seconds for seconds, name, _ in reversed(judged)}
    best = min(judged, key=lambda entry: entry[0])
    return Assignment(best[2], best[0], best[1], by_name.get("gather-and-squeeze"), by_name.get("even"))


def placement_of(experts: np.ndarray) -> Placement:
    """A placement with these numbers, experts in blocks by member."""
    return Placement(
        tuple(tuple(member for member, count in enumerate(layer) for _ in range(int(count))) for layer in experts),
        experts.shape[1],
    )


def counts_of(placement: Placement) -> np.ndarray:
    """The reverse of placement_of, as one candidate: [1, K, members]."""
    import numpy as np

    return np.array([[[layer.count(member) for member in range(placement.members)] for layer in placement.holders]],
                    float)


def _by_events(
    group: GroupCosts, experts: np.ndarray, schedule: str, wave: int | None, weight_gradients: str
) -> float:
    """Seconds of a step by the event simulator."""
    placement = placement_of(experts)
    orders = build(schedule, group.shape.layers, placement, group.attention_members, group.step.microbatches, wave,
                   weight_gradients=weight_gradients)
    return simulate(orders, TaskCosts(group, placement, weight_gradients)).seconds


def long_step_seconds(
    group: GroupCosts, experts: np.ndarray, wave: int | None, schedule: str = "zebra"
) -> np.ndarray:
    """Seconds of a step with many microbatches, [candidates], without simulating each of them.

    After a few microbatches every further one of a wave takes as long as the one before. Zebra's next wave begins when attention
    ranks have ended the last one; what follows the last task counts once. Of overlapped waves each further one takes as long as
    the third.
    """
    total = group.step.microbatches
    sizes = [len(one) for one in build("zebra", 0, Placement((), 1), 1, total, wave).waves]
    if schedule == "overlapped" and len(sizes) > 1:
        two, three = (
            sum(_longer(group, experts, schedule, size, waves)[1] * sizes.count(size) for size in {*sizes}) / len(sizes)
            for waves in (2, 3)
        )
        return two + (three - two) * (len(sizes) - 2)
    known = {size: _longer(group, experts, "zebra", size, 1) for size in {*sizes} - {0}}
    return sum(known[size][0] for size in sizes[:-1]) + known[sizes[-1]][1]


def _longer(group: GroupCosts, experts: np.ndarray, schedule: str, wave: int, waves: int) -> np.ndarray:
    """``step_ends``, [2, candidates], of so many waves of that size; what is beyond a few microbatches as long as the last ones."""
    short, longer = _SEARCH_MICROBATCHES // 2, _SEARCH_MICROBATCHES
    if wave <= longer:
        return _simulated(group, experts, schedule, wave, wave * waves)
    first, second = (_simulated(group, experts, schedule, size, size * waves) for size in (short, longer))
    return second + (second - first) / (longer - short) * (wave - longer)


@lru_cache(maxsize=4)
def _known_steps(group: GroupCosts) -> dict[tuple[str, int, int, bytes], tuple[float, float]]:
    """When the steps of a ZP group that were simulated end, by schedule, wave, microbatches and experts: a search tries one
    wave after the other, and simulates the same few microbatches of all long ones."""
    return {}


def _simulated(group: GroupCosts, experts: np.ndarray, schedule: str, wave: int, microbatches: int) -> np.ndarray:
    """``step_ends``, [2, candidates], which simulates what is not known."""
    import numpy as np

    known = _known_steps(group)
    keys = [(schedule, wave, microbatches, one.tobytes()) for one in experts]
    new = [index for index, key in enumerate(keys) if key not in known]
    if new:
        ends = step_ends(group, experts[new], schedule, wave, microbatches)
        known.update(zip((keys[index] for index in new), zip(*ends.tolist())))
    return np.array([known[key] for key in keys]).T


@dataclass(frozen=True)
class _Class:
    """Members of one role that are alike.

    Attributes:
        members: in order.
        unit: seconds of one expert on one of them.
        room: experts of each layer that fit on all of them together, if every layer has as many.
    """

    members: tuple[int, ...]
    unit: float
    room: float


class _Search:
    """Local search over how many experts of each layer attention ranks hold together: a tuple of K numbers."""

    def __init__(self, group: GroupCosts, limits: Limits, schedule: str, wave: int | None):
        self._group, self._limits, self._schedule = group, limits, schedule
        total = group.step.microbatches
        self._wave = min(wave or total, total, _SEARCH_MICROBATCHES if schedule == "zebra" else _SEARCH_OVERLAPPED)
        self._microbatches = self._wave if schedule == "zebra" else min(total, 3 * self._wave)
        m = group.attention_members
        self._sizes = (m, group.members - m)
        self._classes = tuple(_classes(group, limits, role) for role in (range(m), range(m, group.members)))
        self._shares: dict[int, list[tuple[int, ...]]] = {}
        self._moe_layers = frozenset(group.shape.moe_layers)
        self._rows: dict[tuple[int, bool, tuple[int, ...]], tuple[list[int], tuple[int, ...]]] = {}
        self._known: dict[tuple[int, ...], float] = {}

    def family(self) -> list[tuple[int, ...]]:
        """Where the search begins: totals spread evenly, some at first and then all around the best of these, and as
        many as fit all layers alike, which an even spread of a total does not always give."""
        shape = self._group.shape
        everything = shape.experts * len(shape.moe_layers)
        totals = sorted({round(everything * step / _FAMILY) for step in range(_FAMILY + 1)})
        starts = [self.evenly(total) for total in totals[::_COARSE]]
        seconds = self.seconds(starts)
        best = int(seconds.argmin()) * _COARSE
        narrow = totals[max(0, best - _COARSE):best + _COARSE + 1] if seconds.min() < float("inf") else totals
        starts += [self.evenly(total) for total in narrow]
        starts += [tuple(count if layer in shape.moe_layers else 0 for layer in range(1, shape.layers + 1))
                   for count in range(1, min(shape.experts, _FAMILY) + 1)]
        return list(dict.fromkeys(starts))

    def evenly(self, total: int) -> tuple[int, ...]:
        """A total of moved experts, spread evenly over the layers."""
        layers = self._group.shape.moe_layers
        cuts = [total * index // len(layers) for index in range(len(layers) + 1)]
        moved = dict(zip(layers, (last - first for first, last in zip(cuts, cuts[1:]))))
        return tuple(moved.get(layer, 0) for layer in range(1, self._group.shape.layers + 1))

    def experts(self, moved: tuple[int, ...]) -> np.ndarray:
        """[K, members]: each role's experts spread so that its slowest rank ends first; what does not divide goes to
        another rank in each layer, so that no rank gets more than its part of memory and time."""
        import numpy as np

        rows, turns = [], (0,) * sum(map(len, self._classes))
        for layer, count in enumerate(moved, start=1):
            key = count, layer in self._moe_layers, turns
            if key not in self._rows:
                self._rows[key] = self._row(*key)
            row, turns = self._rows[key]
            rows.append(row)
        return np.array(rows, int)

    def _row(self, count: int, has_experts: bool, turns: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        """A layer's experts by member, so many of them on attention ranks, and whose turns the next layer's are."""
        rest = self._group.shape.experts - count if has_experts else 0
        shares, row, following = self._share(0, count) + self._share(1, rest), [0] * self._group.members, []
        for one, number, turn in zip(chain.from_iterable(self._classes), shares, turns):
            self._deal(one, number, turn, row)
            following.append((turn + number) % len(one.members))
        return row, tuple(following)

    def _share(self, role: int, number: int) -> tuple[int, ...]:
        """How many of a layer's experts each class of a role gets: one by one, to the class that would be done first
        with one more. Classes that are full get none while others are not."""
        classes = self._classes[role]
        known = self._shares.setdefault(role, [(0,) * len(classes)])
        while len(known) <= number:
            held = known[-1]
            best = min(range(len(classes)), key=lambda index: (
                held[index] + 1 > classes[index].room,
                (held[index] // len(classes[index].members) + 1) * classes[index].unit))
            known.append((*held[:best], held[best] + 1, *held[best + 1:]))
        return known[number]

    def _deal(self, one: _Class, number: int, turn: int, row: list[int]) -> None:
        """Puts a class's experts of a layer on its members; the turn's first gets what does not divide."""
        size = len(one.members)
        base, extra = divmod(number, size)
        # Ranks that differ are simulated one by one, so large groups rotate only where some ranks would get all, or
        # more than fits.
        if self._group.members > _ROTATED and extra * 2 < number and (base + (extra > 0)) * size <= one.room:
            turn = 0
        for index, member in enumerate(one.members):
            row[member] = base + ((index - turn) % size < extra)

    def seconds(self, candidates: list[tuple[int, ...]]) -> np.ndarray:
        """Of a step with each candidate; infinite where memory does not suffice."""
        import numpy as np

        new = [moved for moved in dict.fromkeys(candidates) if moved not in self._known]
        if new:
            experts = np.array([self.experts(moved) for moved in new], float)
            fits = feasible(experts, self._limits, self._schedule)
            self._known.update(dict.fromkeys(new, float("inf")))
            if fits.any():
                seconds = _simulated(self._group, experts[fits], self._schedule, self._wave, self._microbatches)[1]
                chosen = [moved for moved, fit in zip(new, fits) if fit]
                self._known.update(zip(chosen, map(float, seconds)))
        return np.array([self._known[moved] for moved in candidates])

    def improve(self, moved: tuple[int, ...], seconds: float) -> tuple[int, ...]:
        """Goes to the best neighbour while there is a better one."""
        for _ in range(_ROUNDS * _DEEP // max(_DEEP, len(self._group.shape.moe_layers))):
            neighbours = self._neighbours(moved)
            if not neighbours:
                break
            times = self.seconds(neighbours)
            best = int(times.argmin())
            if times[best] >= seconds * (1 - 1e-6):
                break
            moved, seconds = neighbours[best], float(times[best])
        return moved

    def _neighbours(self, moved: tuple[int, ...]) -> list[tuple[int, ...]]:
        """One expert, and as many as go round a pool, more or less in one layer, in all layers from or up to one;
        and the same from a layer to one of the next two or to the first or last."""
        layers = self._group.shape.moe_layers
        sizes = {1, self._sizes[0], max(1, self._sizes[1])}
        steps = sorted({sign * size for size in sizes for sign in (1, -1)})
        result = []
        for position, layer in enumerate(layers):
            for step in steps:
                result.append(self._changed(moved, {layer: step}))
                result.append(self._changed(moved, dict.fromkeys(layers[position:], step)))
                result.append(self._changed(moved, dict.fromkeys(layers[:position + 1], step)))
            for other in {*layers[position + 1:position + 3], layers[0], layers[-1]} - {layer}:
                for step in steps:
                    result.append(self._changed(moved, {layer: step, other: -step}))
        return [candidate for candidate in dict.fromkeys(result) if candidate is not None]

    def _changed(self, moved: tuple[int, ...], by: dict[int, int]) -> tuple[int, ...] | None:
        """With these layers changed; None when a layer has not that many."""
        result = tuple(count + by.get(layer, 0) for layer, count in enumerate(moved, start=1))
        return result if all(0 <= count <= self._group.shape.experts for count in result) else None


def _classes(group: GroupCosts, limits: Limits, role: range) -> tuple[_Class, ...]:
    """The members of a role, put together where speed and memory are the same."""
    alike: dict[tuple[float, int], list[int]] = {}
    for member in role:
        alike.setdefault((sum(group.expert[member]), max(0, limits.pairs[member])), []).append(member)
    layers = len(group.shape.moe_layers)
    return tuple(_Class(tuple(members), unit, len(members) * pairs / layers) for (unit, pairs), members in alike.items())
