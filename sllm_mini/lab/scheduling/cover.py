"""Which instances must leave so that enough devices are free: the dynamic programme beside all subsets, and beside greed. Chapter 08."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from sllm_mini.control.placement.migrating import cheapest_cover
from sllm_mini.lab.table import Table

Choose = Callable[[Sequence[float], Sequence[int], int], "list[int] | None"]


@dataclass(frozen=True, slots=True)
class Busy:
    """An instance that could leave: what it runs, its devices, and the seconds until it has left."""

    name: str
    devices: int
    seconds: float


EXAMPLE = (Busy("D", 2, 6.0), Busy("E", 1, 2.5), Busy("F", 2, 5.5), Busy("G", 1, 3.5), Busy("H", 1, 4.0), Busy("I", 1, 3.0))
"""Eight devices, all busy; a model comes that needs four."""
NEEDED = 4


def every_subset(costs: Sequence[float], devices: Sequence[int], needed: int) -> list[int] | None:
    """By brute force: 2^n sums."""
    covers = [
        list(subset)
        for size in range(len(costs) + 1)
        for subset in combinations(range(len(costs)), size)
        if sum(devices[item] for item in subset) >= needed
    ]
    return min(covers, key=lambda subset: sum(costs[item] for item in subset), default=None)


def cheapest_first(costs: Sequence[float], devices: Sequence[int], needed: int) -> list[int] | None:
    """By greed: the cheapest, then the next."""
    taken: list[int] = []
    for item in sorted(range(len(costs)), key=lambda item: costs[item]):
        if needed <= 0:
            break
        taken.append(item)
        needed -= devices[item]
    return taken if needed <= 0 else None


WAYS: dict[str, Choose] = {"dynamic programme": cheapest_cover, "every subset": every_subset, "cheapest first": cheapest_first}


def cover_table(busy: Sequence[Busy] = EXAMPLE, needed: int = NEEDED) -> Table:
    """What each way takes of one example."""
    rows = []
    for name, choose in WAYS.items():
        taken = choose([one.seconds for one in busy], [one.devices for one in busy], needed) or []
        freed, seconds = sum(busy[item].devices for item in taken), sum(busy[item].seconds for item in taken)
        rows.append((name, ", ".join(busy[item].name for item in sorted(taken)), str(freed), f"{seconds:.1f} s"))
    offer = ", ".join(f"{one.name} ({one.devices} devices, {one.seconds} s)" for one in busy)
    return Table(("chosen by", "victims", "devices freed", "sum of seconds"), tuple(rows), caption=f"{needed} devices are needed", note=f"On offer: {offer}.", numeric=frozenset({2, 3}))


def compared(count: int, seed: int = 8) -> str:
    """Random cases: how often each way's sum is the least."""
    chance = Random(seed)
    equal, worse, dearer = 0, 0, 0.0
    for _ in range(count):
        costs = [chance.uniform(0.5, 10) for _ in range(chance.randint(2, 8))]
        devices = [chance.choice((1, 1, 2, 4)) for _ in costs]
        needed = chance.randint(1, sum(devices))
        sums = [sum(costs[item] for item in choose(costs, devices, needed) or ()) for choose in WAYS.values()]
        equal += abs(sums[0] - sums[1]) < 1e-9
        if sums[2] > sums[1] + 1e-9:
            worse += 1
            dearer = max(dearer, sums[2] / sums[1])
    return f"of {count} random cases the programme finds the least sum in {equal}; cheapest first pays more in {worse}, up to {dearer:.1f} times as much"
