"""Whether two runs of one trace decided alike, and how far apart their means are: decisions before times. Pure; chapter 08."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

from sllm_mini.control import messages as m
from sllm_mini.control.replay import read_log
from sllm_mini.types import Warmth

_DRAWS = 1000
_BLOCK = 10


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a log decided: actions in order but for timers, each with its time, and for each request the node it went to and from what
    warmth the start climbed that it waited for (READY: it waited for none)."""

    actions: list[tuple[float, m.AnyAction]]
    requests: dict[int, tuple[str, Warmth]]


def decisions_of(log: Iterable[bytes]) -> Decisions:
    """Raises SllmError for what is no log."""
    actions: list[tuple[float, m.AnyAction]] = []
    requests: dict[int, tuple[str, Warmth]] = {}
    arrived: dict[int, float] = {}
    starts: dict[int, tuple[float, m.Start]] = {}
    for record in read_log(log):
        if isinstance(record.event, m.RequestArrived):
            arrived[record.event.request] = record.now
        for action in record.actions:
            if not isinstance(action, m.SetTimer):
                actions.append((record.now, action))
            if isinstance(action, m.Start):
                starts[action.instance] = record.now, action
            elif isinstance(action, m.Assign):
                began, start = starts[action.instance]
                requests.setdefault(action.request, (start.node, start.warmth if began >= arrived[action.request] else Warmth.READY))
    return Decisions(actions, requests)


def agreement(live: Decisions, simulated: Decisions, began: float) -> dict[str, Any]:
    """How many actions came before the first that differs, and that; and of all requests the shares that went to the same node, and
    that waited for the same kind of start. `began` is when the live trace did."""
    first, pair = 0, None
    for first, (mine, other) in enumerate(zip_longest(live.actions, simulated.actions)):  # noqa: B007 - it is what is looked for
        if mine is None or other is None or mine[1] != other[1]:
            pair = mine, other
            break
    both = [(place, simulated.requests[number]) for number, place in live.requests.items() if number in simulated.requests]
    return {
        "actions_live": len(live.actions), "actions_simulated": len(simulated.actions), "actions_alike": first if pair else len(live.actions),
        "first_different": None if pair is None else {"live": _told(pair[0], began), "simulated": _told(pair[1], 0.0)},
        "same_node": fmean(mine[0] == other[0] for mine, other in both) if both else None,
        "same_start": fmean(mine[1] == other[1] for mine, other in both) if both else None,
    }  # fmt: skip


def _told(done: tuple[float, m.AnyAction] | None, began: float) -> dict[str, Any] | None:
    return None if done is None else {"seconds": done[0] - began, "action": repr(done[1])}


def ratio_interval(pairs: Sequence[tuple[float, float]], seed: int, *, draws: int = _DRAWS, block: int = _BLOCK) -> tuple[float, float] | None:
    """Where 95 % of the ratios of means (second over first) lie when blocks of neighbouring pairs are drawn anew: requests that wait
    for one start are not independent (moving-block bootstrap, Künsch 1989). None for fewer pairs than two blocks."""
    if len(pairs) < 2 * block:
        return None
    chance = random.Random(seed)
    last, ratios = len(pairs) - block, []
    for _ in range(draws):
        drawn: list[tuple[float, float]] = []
        while len(drawn) < len(pairs):
            begin = chance.randint(0, last)
            drawn += pairs[begin : begin + block]
        del drawn[len(pairs) :]
        ratios.append(sum(other for _, other in drawn) / sum(mine for mine, _ in drawn))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]
