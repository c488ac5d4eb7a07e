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
from typing import TYPE_CHECKING

from megatron_hetermoe.cost.tasks import GroupCosts, TaskCosts
from megatron_hetermoe.planner.memory import most_experts
from megatron_hetermoe.schedule.orders import build
from megatron_hetermoe.simulator.events import simulate
from megatron_hetermoe.simulator.fast import step_seconds
from megatron_hetermoe.topology.placement import Placement

if TYPE_CHECKING:
    import numpy as np

_SEARCH_MICROBATCHES = 8  # that the local search simulates; more change the ramps' share, not which neighbour is best
LONG = 300  # layers x microbatches of a step from which on the event simulator takes more than a moment
_ROUNDS = 40  # of local search, each with all neighbours
_FAMILY = 96  # totals that are tried before it


@dataclass(frozen=True)
class Limits:
    """Memory bounds.

    Attributes:
        pairs: for each member, the most (layer, expert) pairs that fit; negative when nothing does.
    """

    pairs: tuple[int, ...]

    def total(self, members: range) -> int:
        return sum(max(0, self.pairs[member]) for member in members)


def limits_of(group: GroupCosts, wave: int) -> Limits:
    """The bounds with that many microbatches on their way."""
    known: dict[tuple[bool, str], int] = {}
    pairs = []
    for member, seat in enumerate(group.seats):
        key = (member < group.attention_members, seat.pool.name)
        if key not in known:
            known[key] = most_experts(group, member, wave)
        pairs.append(known[key])
    return Limits(tuple(pairs))


def feasible(experts: np.ndarray, limits: Limits) -> np.ndarray:
    """Which of [..., K, members] fit."""
    import numpy as np

    return (experts.sum(axis=-2) <= np.array(limits.pairs)).all(axis=-1)


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
    expert = max(sum(group.expert[member]) * held[member] for member in range(m, group.members))
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


@dataclass(frozen=True)
class Assignment:
    """A judged assignment.

    Attributes:
        experts: [K, members].
        seconds: of the step, by the event simulator.
        origin: where it came from: "even", "gather-and-squeeze" or "balance".
        paper_seconds: of the step under gather-and-squeeze, None where that does not fit.
        even_seconds: of the step with all experts on expert ranks, None where that does not fit.
    """

    experts: np.ndarray
    seconds: float
    origin: str
    paper_seconds: float | None
    even_seconds: float | None


def balance(group: GroupCosts, limits: Limits, wave: int | None, thorough: bool = True) -> Assignment | None:
    """The best assignment found, never worse than gather-and-squeeze by the simulator.

    Args:
        group: the ZP group's costs.
        limits: memory bounds.
        wave: R of the plan; None for all microbatches.
        thorough: whether neighbours of the best are searched, and the event simulator judges.

    Returns:
        None when no assignment fits.
    """
    import numpy as np

    search = _Search(group, limits, wave)
    shape = group.shape
    everything = shape.experts * len(shape.moe_layers)
    totals = sorted({round(everything * step / _FAMILY) for step in range(_FAMILY + 1)})
    starts = [search.evenly(total) for total in totals]
    # As many as fit all layers alike, which an even spread of a total does not always give.
    starts += [tuple(count if layer in shape.moe_layers else 0 for layer in range(1, shape.layers + 1))
               for count in range(1, min(shape.experts, _FAMILY) + 1)]
    starts = list(dict.fromkeys(starts))
    paper = gather_and_squeeze(group, limits)
    starts.append(tuple(int(count) for count in paper[:, :group.attention_members].sum(axis=1)))
    seconds = search.seconds(starts)
    found = [starts[index] for index in np.argsort(seconds)[:3] if np.isfinite(seconds[index])]
    if thorough and found:
        found.insert(0, search.improve(found[0], float(seconds.min())))
    named = [("even", search.experts(starts[0])), ("gather-and-squeeze", paper)]
    named += [("balance", search.experts(moved)) for moved in dict.fromkeys(found[:2])]
    fitting = [(name, experts) for name, experts in named if feasible(experts, limits)]
    if not fitting:
        return None
    times = _judge(group, [experts for _, experts in fitting], wave, thorough)
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


def _judge(group: GroupCosts, candidates: list[np.ndarray], wave: int | None, by_events: bool) -> list[float]:
    """Seconds of a step under each candidate: by the event simulator if asked to and unless a step is long, else by
    ``long_step_seconds``."""
    import numpy as np

    if not by_events or group.shape.layers * group.step.microbatches > LONG:
        return [float(value) for value in long_step_seconds(group, np.array(candidates, float), wave)]
    result = []
    for experts in candidates:
        placement = placement_of(experts)
        orders = build("zebra", group.shape.layers, placement, group.attention_members, group.step.microbatches, wave)
        result.append(simulate(orders, TaskCosts(group, placement)).seconds)
    return result


def long_step_seconds(group: GroupCosts, experts: np.ndarray, wave: int | None) -> np.ndarray:
    """Seconds of a step with many microbatches, [candidates], without simulating each of them.

    After a few microbatches every further one of a wave takes as long as the one before, and attention ranks end a wave
    last. So a wave is a short one and a multiple of that, and a step is the sum of its waves. What
    follows the last task counts once.
    """
    import numpy as np

    total = group.step.microbatches
    sizes = [len(one) for one in build("zebra", 0, Placement((), 1), 1, total, wave).waves]
    short, longer = _SEARCH_MICROBATCHES // 2, _SEARCH_MICROBATCHES

    def alone(microbatches: int) -> np.ndarray:
        return step_seconds(group, experts, "zebra", None, microbatches)

    known: dict[int, np.ndarray] = {}
    for size in {*sizes} - {0}:
        if size <= longer:
            known[size] = alone(size)
        else:
            first, second = known.setdefault(short, alone(short)), known.setdefault(longer, alone(longer))
            known[size] = second + (second - first) / (longer - short) * (size - longer)
    held = experts.sum(axis=1)
    once = np.array([max(group.reduction(member, int(count)) + group.optimizer(member, int(count))
                         for member, count in enumerate(row)) for row in held])
    return sum(known[size] for size in sizes) - once * (len(sizes) - 1)


class _Search:
    """Local search over how many experts of each layer attention ranks hold together: a tuple of K numbers."""

    def __init__(self, group: GroupCosts, limits: Limits, wave: int | None):
        self._group, self._limits = group, limits
        self._microbatches = min(wave or group.step.microbatches, group.step.microbatches, _SEARCH_MICROBATCHES)
        m = group.attention_members
        self._units = [sum(pair) for pair in group.expert]
        self._roles = (range(m), range(m, group.members))
        self._spreads: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._known: dict[tuple[int, ...], float] = {}

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

        shape = self._group.shape
        rows, turns = [], [0, 0]
        for layer, count in enumerate(moved, start=1):
            row: list[int] = []
            for role, number in enumerate((count, shape.experts - count if layer in shape.moe_layers else 0)):
                row += self._spread(role, number, turns[role])
                turns[role] = (turns[role] + number) % max(1, len(self._roles[role]))
            rows.append(row)
        return np.array(rows, int)

    def _spread(self, role: int, number: int, turn: int) -> tuple[int, ...]:
        """Experts one by one to the member that would have least with it: the least longest time, as they are alike.
        Of equals the turn's first. Members that are full get none while others are not."""
        members = self._roles[role]
        # Ranks that differ are simulated one by one, so large groups rotate only where some ranks would get all.
        turn = turn if self._group.members <= 12 or number % len(members) * 2 >= number else 0
        key = (role, number, turn)
        if key not in self._spreads:
            held = dict.fromkeys(members, 0)
            ranked = {member: (index - turn) % len(members) for index, member in enumerate(members)}
            equal = len({self._units[member] for member in members}) == 1
            if equal:
                base, extra = divmod(number, len(members))
                held = {member: base + (ranked[member] < extra) for member in members}
            else:
                for _ in range(number):
                    best = min(members, key=lambda member: ((held[member] + 1) * self._units[member], ranked[member]))
                    held[best] += 1
            self._spreads[key] = tuple(held.values())
        return self._spreads[key]

    def seconds(self, candidates: list[tuple[int, ...]]) -> np.ndarray:
        """Of a step with each candidate; infinite where memory does not suffice."""
        import numpy as np

        new = [moved for moved in dict.fromkeys(candidates) if moved not in self._known]
        if new:
            experts = np.array([self.experts(moved) for moved in new], float)
            fits = feasible(experts, self._limits)
            self._known.update(dict.fromkeys(new, float("inf")))
            if fits.any():
                seconds = step_seconds(self._group, experts[fits], "zebra", None, self._microbatches)
                chosen = [moved for moved, fit in zip(new, fits) if fit]
                self._known.update(zip(chosen, map(float, seconds)))
        return np.array([self._known[moved] for moved in candidates])

    def improve(self, moved: tuple[int, ...], seconds: float) -> tuple[int, ...]:
        """Goes to the best neighbour while there is a better one."""
        for _ in range(_ROUNDS):
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
        sizes = {1, len(self._roles[0]), max(1, len(self._roles[1]))}
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
