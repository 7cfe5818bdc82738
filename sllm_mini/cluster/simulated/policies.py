"""Policies by name: what the command line and the chapters say instead of making the objects. Taught in chapter 08."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sllm_mini.control import autoscale, keepalive, placement
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.policy import Autoscaler, KeepAlive, Placement
from sllm_mini.errors import SllmError

PLACEMENTS = tuple(placement.POLICIES)
KEEP_ALIVES = tuple(keepalive.POLICIES)
AUTOSCALERS = tuple(autoscale.POLICIES)


@dataclass(frozen=True, slots=True)
class Policies:
    """The three of one run, and what they are called."""

    placement: Placement
    keep_alive: KeepAlive
    autoscaler: Autoscaler
    names: Mapping[str, str]


def make_policies(where: Placement | str, how_long: KeepAlive | str, how_many: Autoscaler | str, estimator: Estimator) -> Policies:
    """New policies for names, given ones as they are. Raises SllmError for a name that nobody has, and for what is no policy."""
    roles = {"placement": where, "keep_alive": how_long, "autoscaler": how_many}
    return Policies(
        _made("placement", where, placement.POLICIES, Placement, estimator),
        _made("keep-alive", how_long, keepalive.POLICIES, KeepAlive, estimator),
        _made("autoscaler", how_many, autoscale.POLICIES, Autoscaler),
        {role: given if isinstance(given, str) else type(given).__name__ for role, given in roles.items()},
    )


def _made(role: str, given: Any, registry: Mapping[str, Any], protocol: type, *arguments: Any) -> Any:
    if not isinstance(given, str):
        missing = [name for name in vars(protocol) if not name.startswith("_") and not hasattr(given, name)]
        if missing or isinstance(given, type):
            lacks = f", which has no {missing[0]}" if missing else ", a class"
            raise SllmError(f"the {role} policy is {given!r:.60}{lacks}; give a name ({', '.join(registry)}) or an object with all of {protocol.__name__}")
        return given
    if given not in registry:
        raise SllmError(f"there is no {role} policy {given!r}; choose one of {', '.join(registry)}")
    return registry[given](*arguments)
