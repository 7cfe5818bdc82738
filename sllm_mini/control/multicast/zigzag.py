"""ZigZag execution: how an instance that is still loading helps one that is overloaded. BlitzScale (OSDI'25), section 5.2.

Two instances, the old one with all layers and the new one with layers that arrive one by one. Time is counted in layer
computations: one layer of one request takes 1, loading a layer takes `load`. The clock starts when the new instance has its
first layer, so k layers are there from (k − 1) · load on. Sending activations costs nothing.

**Best effort**: the new instance takes each request once, in order of arrival, runs the layers it has (at most half) and hands
the request on; the old one does the rest. **ZigZag**: the new instance comes back; whenever it is free it runs one layer of the
earliest request that has a loaded, unexecuted one, and the old instance, when free, pulls the earliest request and finishes it.

The paper's example: 7 layers, load = 6. Its text gives no arrivals; it says that "request 3's latency is 17" and that the time of
"request 7" falls from 32 to 22. If one request arrives per unit, from 0 on, request 3 ends at 17, and the sixth request, which
arrives at 5, takes 32 (to 37) by best effort and 22 (to 27) by ZigZag. That is the simplest reading that gives all three figures, not
the paper's own words; the seventh then takes 36 and 23. Were time counted from 0 for seven requests that all wait, no schedule
could reach 22: 7 · 7 layers keep two instances busy for 24.5 units.

Pure; O(requests · layers · requests). Taught in chapters 04 and 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Where each layer ran: `new[i]` and `old[i]` count request i's layers on either instance, `ends[i]` is when its last ended."""

    ends: tuple[int, ...]
    new: tuple[int, ...]
    old: tuple[int, ...]

    def times(self, arrivals: Sequence[int]) -> tuple[int, ...]:
        """From each request's arrival to its end."""
        return tuple(end - arrival for end, arrival in zip(self.ends, arrivals, strict=True))


def best_effort(arrivals: Sequence[int], *, layers: int, load: int) -> Run:
    """Each request runs on the new instance once, with the layers that are there when its turn comes, at most half; then on the old.

    `arrivals` ascend, in layer computations. Raises ValueError otherwise, and for fewer than 2 layers or a load below 1. Pure.
    """
    _require(arrivals, layers, load)
    new_free = old_free = 0
    ends, news = [], []
    for arrival in arrivals:
        start = max(new_free, arrival)
        there = min(1 + start // load, layers // 2)
        new_free = start + there
        old_free = max(old_free, new_free) + layers - there
        ends.append(old_free)
        news.append(there)
    return Run(tuple(ends), tuple(news), tuple(layers - there for there in news))


def zigzag(arrivals: Sequence[int], *, layers: int, load: int) -> Run:
    """BlitzScale's rule, without its integer program: see the module. Arguments and errors as for `best_effort`. Pure."""
    _require(arrivals, layers, load)
    done, news, ends = [0] * len(arrivals), [0] * len(arrivals), [0] * len(arrivals)
    pulled: int | None = None
    time = 0
    while not all(ends):
        waiting = [request for request, arrival in enumerate(arrivals) if arrival <= time and not ends[request] and request != pulled]
        if pulled is None and waiting:
            pulled = waiting.pop(0)
        loaded = min(1 + time // load, layers)
        back = next((request for request in waiting if done[request] < loaded), None)
        if back is not None:
            news[back] += 1
        for request in (pulled, back):
            if request is not None:
                done[request] += 1
                if done[request] == layers:
                    ends[request] = time + 1
        if pulled is not None and ends[pulled]:
            pulled = None
        time += 1
    return Run(tuple(ends), tuple(news), tuple(layers - count for count in news))


def _require(arrivals: Sequence[int], layers: int, load: int) -> None:
    if list(arrivals) != sorted(arrivals) or (arrivals and arrivals[0] < 0):
        raise ValueError("requests are served in order of arrival; give arrivals that ascend from 0 or more")
    if layers < 2 or load < 1:
        raise ValueError(f"{layers} layers of which one takes {load} layer computations to load; give at least 2 layers and 1")
