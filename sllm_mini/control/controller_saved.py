"""What a controller knows beside its cluster, as plain data and back: its timers, what is to be pre-warmed, unfinished plans.

Part of `controller`; taught in chapter 08.
"""

from __future__ import annotations

from typing import Any

from msgspec import convert, to_builtins

from sllm_mini.control.controller_plans import Pending, Plans
from sllm_mini.control.controller_timers import Timer, Timers, Wake
from sllm_mini.control.controller_warmth import Warming
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.policy import Plan
from sllm_mini.types import Warmth


def save(timers: Timers, warming: Warming, plans: Plans) -> dict[str, Any]:
    return {
        "timers": {"count": timers.count, "pending": [[id, *map(to_builtins, timer)] for id, timer in timers.pending.items()]},
        "prewarms": [[model, int(warmth), *due] for (model, warmth), due in warming.prewarms.items()],
        "plans": [
            [to_builtins(each.plan), each.model, each.booked, to_builtins(each.before), list(each.leaving), list(each.targets)]
            for each in plans.pending.values()
        ],
    }


def load(data: dict[str, Any], timers: Timers, warming: Warming, plans: Plans) -> None:
    timers.count = data["timers"]["count"]
    for id, wake, key, at, warmth in data["timers"]["pending"]:
        timers.pending[id] = Timer(Wake(wake), key, at, warmth)
    for model, warmth, timer, at, count in data["prewarms"]:
        warming.prewarms[model, Warmth(warmth)] = timer, at, count
    for plan, model, booked, before, leaving, targets in data["plans"]:
        spec = convert(before, ModelSpec)
        plans.pending[booked] = Pending(convert(plan, Plan), model, booked, spec, tuple(leaving), tuple(targets))
