"""What a cluster's nodes look like from outside, read from what its controller knows. Pure; chapter 08."""

from __future__ import annotations

from collections.abc import Mapping

from sllm_mini.cluster.api import InstanceReport, NodeReport, StoreReport, keep_alive_seconds
from sllm_mini.control.cluster import Cluster as Known
from sllm_mini.control.messages import AnyEvent, KeepAliveAsked, NodeSpec, PrewarmAsked
from sllm_mini.types import Warmth

_NONE: Mapping[int, int] = {}
_UNSAID: Mapping[str, StoreReport] = {}
_NEVER: Mapping[str, float] = {}


def asked_warm(model: str, warmth: Warmth, keep_alive: float | None) -> list[AnyEvent]:
    """What the controller is told of a pre-warming. The keep-alive comes second: before, 0 would end what is there. Raises ValueError."""
    if warmth == Warmth.COLD:
        raise ValueError("nothing is warmed as far as COLD; give PROCESS or more, or unload the model")
    seconds = keep_alive_seconds(keep_alive)
    return [PrewarmAsked(model, warmth), *([] if seconds is None else [KeepAliveAsked(model, seconds)])]


def node_reports(
    known: Known, joined: Mapping[str, tuple[NodeSpec, int]], reasons: Mapping[str, str], private: Mapping[int, int] = _NONE, stores: Mapping[str, StoreReport] = _UNSAID,
    returning: Mapping[str, float] = _NEVER,
) -> list[NodeReport]:  # fmt: skip
    """One for each node that ever joined, in order of the first time. `joined` has the spec and how often, `reasons` why those
    that are gone are, `returning` when they are started again, `private` the memory of instances where it was measured, `stores` what those that live said of theirs."""
    reports = []
    for name, (spec, incarnation) in joined.items():
        node = known.nodes.get(name)
        if node is None:
            reports.append(NodeReport(name, False, incarnation, spec, reason=reasons.get(name, "it was lost"), returns_at=returning.get(name)))
            continue
        instances = tuple(
            InstanceReport(each.id, each.model, each.warmth, each.target if each.climbing else None, len(each.requests), private.get(each.id, 0), each.warm_until)
            for each in node.instances.values()
        )
        reports.append(NodeReport(name, True, incarnation, spec, instances, dict(node.cached), store=stores.get(name)))
    return reports
