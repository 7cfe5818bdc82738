"""A straight line through what was observed, learned one point at a time: what a migration takes by its tokens.

Part of `estimate`; taught in chapter 08. Pure; constant time and memory: five sums, in which a point weighs `FORGETTING`
of what it did when the next one comes.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGETTING = 0.95
"""So the last twenty count: two figures need more points than one."""
_LEAST_SPREAD = 0.1
"""Of the abscissas, as a share of their mean: points that lie closer tell no slope."""


@dataclass(slots=True)
class Line:
    """`slope * x + offset`; neither is ever below 0. Both are guesses until points that lie apart have been seen: what those
    at one place tell is by how much the guesses are too high or too low."""

    slope: float
    offset: float
    count: int = 0
    weight: float = 0.0
    x: float = 0.0
    """Weighted means, then weighted sums about them."""
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def at(self, x: float) -> float:
        return self.slope * x + self.offset

    def learn(self, x: float, y: float) -> None:
        """Least squares, weighted by age, over the lines that fall nowhere below 0 (x and y from 0 up)."""
        self.count += 1
        self.weight = FORGETTING * self.weight + 1
        share = 1 / self.weight
        dx, dy = x - self.x, y - self.y
        self.x += share * dx
        self.y += share * dy
        self.xx = FORGETTING * self.xx + (1 - share) * dx * dx
        self.xy = FORGETTING * self.xy + (1 - share) * dx * dy
        if self.xx <= (_LEAST_SPREAD * self.x) ** 2 * self.weight:
            expected = self.at(self.x)
            if expected > 0:
                self.slope, self.offset = self.slope * self.y / expected, self.offset * self.y / expected
            else:
                self.slope, self.offset = 0.0, self.y
            return
        slope = self.xy / self.xx
        offset = self.y - slope * self.x
        if slope < 0:
            slope, offset = 0.0, self.y
        elif offset < 0:
            slope, offset = (self.xy + self.weight * self.x * self.y) / (self.xx + self.weight * self.x**2), 0.0
        self.slope, self.offset = slope, offset
