"""What to throw out when memory is short: eviction policies as pure functions, for the store and for FaaS caches alike.

The owner of a cache describes each model in it by a `Resident`; `choose_victims` answers which bytes go. Nothing here
keeps state, reads a clock or moves a byte, so the same policies run in the store, in a simulator and in control.
Taught in chapter 03. Costs O(n log n) for n residents.

The owner of a greedy-dual cache holds one number more, the clock: `clock = next_clock(clock, victims)` after each
eviction, and a model's `Resident.clock` is the clock at its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Resident:
    """One model in one cache. Raises ValueError for figures that cannot be.

    `nbytes` are the bytes of it that are there, and `evictable_nbytes` those at its tail that may go: 0 while all of it
    is leased or pinned. `uses` counts its requests; whether the count outlives an eviction is the owner's choice.
    `cost_seconds` is what loading these `nbytes` again would take.
    """

    name: str
    nbytes: int
    evictable_nbytes: int
    last_used: float
    uses: int
    cost_seconds: float
    clock: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.evictable_nbytes <= self.nbytes:
            raise ValueError(f"{self.name} has {self.nbytes} bytes and cannot give up {self.evictable_nbytes}; give 0 up to all of them")
        if not (self.uses >= 0 and self.cost_seconds >= 0):  # so that a NaN is refused too: it has no place in an order
            raise ValueError(f"{self.name} was used {self.uses} times and costs {self.cost_seconds} seconds; neither may be negative")
        if isnan(self.last_used) or isnan(self.clock):
            raise ValueError(f"{self.name} was last used at {self.last_used}, at clock {self.clock}; give numbers, which have an order")


@dataclass(frozen=True, slots=True)
class Victim:
    """The last `nbytes` of a model are to go. `priority` is what its policy gave it."""

    name: str
    nbytes: int
    priority: float


@dataclass(frozen=True, slots=True)
class Policy:
    """An order of eviction: the lowest `priority` goes first; among equals the one used longest ago, then by name.

    Whole models go, unless `prefix_nbytes` is set: then only as much as is needed, from the tail (see `keep_prefix`).
    """

    name: str
    priority: Callable[[Resident], float]
    prefix_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.prefix_nbytes is not None and self.prefix_nbytes < 0:
            raise ValueError(f"a prefix of {self.prefix_nbytes} bytes cannot be kept; give 0 (one granule) or more")


def greedy_dual_priority(resident: Resident) -> float:
    """The clock at its last use + uses × seconds / bytes: what its bytes save, aged by every eviction since.

    Greedy-dual-size-frequency (Cherkasova, 1998), with FaasCache's terms (ASPLOS'21). Needs `nbytes` above 0.
    """
    return resident.clock + resident.uses * resident.cost_seconds / resident.nbytes


LRU = Policy("lru", lambda resident: resident.last_used)
"""Least recently used."""
LFU = Policy("lfu", lambda resident: float(resident.uses))
"""Least frequently used."""
GDSF = Policy("gdsf", greedy_dual_priority)
"""Greedy-dual-size-frequency."""


def keep_prefix(policy: Policy, prefix_nbytes: int = 0) -> Policy:
    """The order of `policy`, but tails go first: a model whose first layers stay starts at once and streams the rest.

    Every model is cut down to its first `prefix_nbytes` (rounded up to granules, at least one) before any loses more,
    then to one granule, and the last granules go only when every model is down to its own. Raises ValueError for a
    negative prefix.
    """
    return replace(policy, name=f"prefix of {policy.name}", prefix_nbytes=prefix_nbytes)


POLICIES: Mapping[str, Policy] = MappingProxyType({"lru": LRU, "lfu": LFU, "gdsf": GDSF, "prefix": keep_prefix(GDSF)})
"""What the command line and the chapters call them."""


def choose_victims(residents: Sequence[Resident], needed_nbytes: int, policy: Policy, granule_nbytes: int = 1) -> list[Victim]:
    """The bytes to evict, at least `needed_nbytes`, one `Victim` per model in the order of `policy`; [] if that cannot be met.

    What stays of a model is a multiple of `granule_nbytes`, or all of it. Either the need is met or nothing goes. Names
    must differ. Raises ValueError for a need or a granule below 1, so [] has one meaning. Pure; safe from any thread.
    """
    if needed_nbytes < 1 or granule_nbytes < 1:
        raise ValueError(f"cannot evict {needed_nbytes} bytes in granules of {granule_nbytes}; give at least 1 for both")
    ranked = sorted((r for r in residents if r.evictable_nbytes), key=lambda r: (policy.priority(r), r.last_used, r.name))
    stays = {r.name: r.nbytes for r in ranked}
    missing = needed_nbytes
    for floor in _floors(policy, granule_nbytes):
        for r in ranked:
            if missing <= 0:
                break
            keep = max(floor, _round_up(r.nbytes - r.evictable_nbytes, granule_nbytes))
            if policy.prefix_nbytes is not None:
                keep = max(keep, (stays[r.name] - missing) // granule_nbytes * granule_nbytes)
            if keep < stays[r.name]:
                missing -= stays[r.name] - keep
                stays[r.name] = keep
    victims = [Victim(r.name, r.nbytes - stays[r.name], policy.priority(r)) for r in ranked if stays[r.name] < r.nbytes]
    return victims if missing <= 0 else []


def _floors(policy: Policy, granule_nbytes: int) -> tuple[int, ...]:
    """How much of each model stays in the first pass over all of them, in the second, in the third."""
    if policy.prefix_nbytes is None:
        return (0,)
    return (max(granule_nbytes, _round_up(policy.prefix_nbytes, granule_nbytes)), granule_nbytes, 0)


def _round_up(nbytes: int, granule_nbytes: int) -> int:
    return -(-nbytes // granule_nbytes) * granule_nbytes


def next_clock(clock: float, victims: Iterable[Victim]) -> float:
    """Greedy-dual's clock after an eviction: the highest priority that went. It never runs backwards."""
    return max((clock, *(victim.priority for victim in victims)))
