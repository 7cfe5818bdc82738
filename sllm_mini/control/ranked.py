"""Keys in order of a rank that changes often and is read seldom: a sorted list that is brought up to date when somebody reads.

`add` and `discard` only note the key, in constant time: what goes and comes back between two readings leaves no work.
A reading first moves the keys that were noted, by bisection, O(log n) comparisons each and one move of memory; where many
were, all are sorted anew. One thread at a time. Taught in chapter 08.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K", int, str)


class Ranked(Generic[K]):
    """Each key has one rank; equal ranks are in order of their keys, so the order never depends on the past."""

    __slots__ = ("_noted", "_order", "_placed", "_rank")

    def __init__(self) -> None:
        self._rank: dict[K, Any] = {}
        self._order: list[tuple[Any, K]] = []
        self._placed: dict[K, Any] = {}
        """The ranks by which keys stand in `_order`."""
        self._noted: dict[K, None] = {}
        """Keys whose place may be wrong. Never many more than there are keys, so nothing grows without a reader."""

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: K) -> bool:
        return key in self._rank

    def add(self, key: K, rank: Any) -> None:
        """Also changes the rank of a key that is there."""
        self._rank[key] = rank
        self._noted[key] = None

    def discard(self, key: K) -> None:
        if self._rank.pop(key, None) is not None:
            noted = self._noted
            noted[key] = None
            if len(noted) > 2 * len(self._rank) + 16:
                self._settle()

    def rank(self, key: K) -> Any:
        return self._rank[key]

    def first(self) -> K | None:
        order = self.ordered()
        return order[0][1] if order else None

    def ordered(self) -> list[tuple[Any, K]]:
        """(rank, key), lowest rank first: to be read at once, and not to be changed."""
        if self._noted:
            self._settle()
        return self._order

    def __iter__(self) -> Iterator[K]:
        """Lowest rank first; what is done with the keys meanwhile must not change this object."""
        return iter([key for _, key in self.ordered()])

    def _settle(self) -> None:
        order, placed, ranks, noted = self._order, self._placed, self._rank, self._noted
        if len(noted) > 8 + len(order) // 8:
            self._order = sorted((rank, key) for key, rank in ranks.items())
            self._placed = ranks.copy()
        else:
            for key in noted:
                old, new = placed.get(key), ranks.get(key)
                if old != new:
                    if old is not None:
                        del order[bisect_left(order, (old, key))]
                    if new is None:
                        del placed[key]
                    else:
                        insort(order, (new, key))
                        placed[key] = new
        noted.clear()

    def ranks(self) -> dict[K, Any]:
        """For printing and for checks."""
        return dict(sorted(self._rank.items()))
