"""Seconds at sizes that nobody measured, between sizes that somebody did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property


class Notes:
    """What an answer rests on beside measurements, each said once, in the order in which it came up."""

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}

    def add(self, note: str) -> None:
        self._notes.setdefault(note)

    def __iter__(self):
        return iter(self._notes)

    def __len__(self) -> int:
        return len(self._notes)


class Curve:
    """A rising positive function through measured points.

    Between points it is PCHIP on logarithms: monotone where the points are, and exact for a power law, which attention
    (linear to quadratic in the sequence) and matrix products (linear in tokens) are close to. Measured points that fall
    are noise: they are raised to the one before. Below the first point the value stays, since kernels have a least
    time; above the last the last slope goes on, at least in proportion. Both are noted.

    Args:
        name: what is measured, for notes.
        unit: of the sizes, for notes.
        points: seconds by size, both positive, at least one.
        notes: gets a line for each size asked for beyond the points.
    """

    def __init__(self, name: str, unit: str, points: Mapping[float, float], notes: Notes):
        assert points and all(size > 0 and value > 0 for size, value in points.items())
        self._name, self._unit, self._notes = name, unit, notes
        self._sizes = sorted(points)
        self._values: list[float] = []
        for size in self._sizes:
            self._values.append(max(points[size], self._values[-1] if self._values else 0.0))
        self._known: dict[float, float] = {}

    def __call__(self, size: float) -> float:
        """Seconds at a size; nothing takes no time."""
        if size <= 0:
            return 0.0
        if size not in self._known:
            self._known[size] = self._at(size)
        return self._known[size]

    @property
    def sizes(self) -> list[float]:
        """The measured sizes, ascending."""
        return self._sizes

    def _at(self, size: float) -> float:
        first, last = self._sizes[0], self._sizes[-1]
        if size < first:
            self._notes.add(f"{self._name}: {size:,.0f} {self._unit} is below the measured {first:,.0f}; "
                            f"taken as there")
            return self._values[0]
        if size > last:
            self._notes.add(f"{self._name}: {size:,.0f} {self._unit} is above the measured {last:,.0f}; "
                            f"extended at slope {self._last_slope:.2f}")
            return self._values[-1] * (size / last) ** self._last_slope
        if len(self._sizes) == 1:
            return self._values[0]
        return math.exp(float(self._between(math.log(size))))

    @property
    def _last_slope(self) -> float:
        """Of the last piece, in logarithms; a single point says nothing, so its seconds grow in proportion."""
        if len(self._sizes) == 1:
            return 1.0
        (x0, x1), (y0, y1) = self._sizes[-2:], self._values[-2:]
        return max(1.0, math.log(y1 / y0) / math.log(x1 / x0))

    @cached_property
    def _between(self) -> Callable[[float], float]:
        from scipy.interpolate import PchipInterpolator

        return PchipInterpolator([math.log(size) for size in self._sizes], [math.log(value) for value in self._values])
