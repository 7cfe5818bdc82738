"""Keys in order of a rank that changes often: a heap whose stale entries are dropped when they come up.

For orders of which a reader wants the first few. `add` costs O(log n), `discard` O(1) amortised, the first k of the order
O(k log k) more or less, since stale entries (never more than twice the keys) are walked over. Reading changes nothing.
One thread at a time. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

K = TypeVar("K", int, str)


class Ranked(Generic[K]):
    """Each key has one rank; equal ranks are in order of their keys, so the order never depends on the past."""

    __slots__ = ("_heap", "_rank")

    def __init__(self) -> None:
        self._rank: dict[K, Any] = {}
        self._heap: list[tuple[Any, K]] = []

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: K) -> bool:
        return key in self._rank

    def add(self, key: K, rank: float) -> None:
        """Also changes the rank of a key that is there."""
        heap, ranks = self._heap, self._rank
        ranks[key] = rank
        heappush(heap, (rank, key))
        if ranks.get(heap[0][1]) != heap[0][0]:
            self._prune()
        if len(heap) > 2 * len(ranks) + 16:
            self._heap = [(rank, key) for key, rank in ranks.items()]
            heapify(self._heap)

    def discard(self, key: K) -> None:
        self._rank.pop(key, None)
        self._prune()

    def _prune(self) -> None:
        """The root is never stale, so that those who want the first few do not walk over what was before them."""
        ranks, heap = self._rank, self._heap
        while heap and ranks.get(heap[0][1]) != heap[0][0]:
            heappop(heap)

    def rank(self, key: K) -> Any:
        return self._rank[key]

    def first(self) -> K | None:
        return next(iter(self), None)

    def __iter__(self) -> Iterator[K]:
        """Lowest rank first. Walks the heap from its root; what it changes meanwhile must not be this object."""
        heap, ranks = self._heap, self._rank
        if not heap:
            return
        ahead = [(heap[0], 0)]
        last = None
        while ahead:
            entry, place = heappop(ahead)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(ahead, (heap[child], child))
            rank, key = entry
            if entry != last and ranks.get(key) == rank:  # an entry that went and came again is there twice, side by side
                last = entry
                yield key

    def ranks(self) -> dict[K, Any]:
        """For printing and for checks."""
        return dict(sorted(self._rank.items()))
