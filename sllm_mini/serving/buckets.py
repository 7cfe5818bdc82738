"""Rates: who has a key may ask for so much a minute. Pure but for the clock it is given. Chapter 11.

A token bucket for each name: it holds what one minute allows, so that so much may come at once, and fills evenly. What was taken
and not needed is given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MINUTE = 60.0


@dataclass(slots=True)
class _Bucket:
    amount: float
    at: float


class Buckets:
    """One for each name, from whoever asks first; names are bounded by who calls. `now` gives seconds. For one thread."""

    def __init__(self, per_minute: int, now: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def take(self, name: str, amount: int = 1) -> float:
        """Takes it all and returns 0, or takes nothing and returns the seconds after which it would be there. Raises ValueError for more than a
        bucket ever holds."""
        if amount > self.per_minute:
            raise ValueError(f"{amount} are more than the {self.per_minute} that a minute allows")
        bucket = self._filled(name)
        if bucket.amount < amount:
            return (amount - bucket.amount) * _MINUTE / self.per_minute
        bucket.amount -= amount
        return 0.0

    def give_back(self, name: str, amount: int) -> None:
        bucket = self._filled(name)
        bucket.amount = min(float(self.per_minute), bucket.amount + amount)

    def _filled(self, name: str) -> _Bucket:
        """As it is now."""
        now = self._now()
        bucket = self._buckets.setdefault(name, _Bucket(float(self.per_minute), now))
        bucket.amount = min(float(self.per_minute), bucket.amount + (now - bucket.at) * self.per_minute / _MINUTE)
        bucket.at = now
        return bucket
