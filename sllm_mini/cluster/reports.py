"""What a cluster's nodes look like from outside, read from what its controller knows. Pure; chapter 08."""

from __future__ import annotations

from collections.abc import Mapping

from sllm_mini.cluster.api import InstanceReport, NodeReport
from sllm_mini.control.cluster import Cluster as Known
from sllm_mini.control.messages import NodeSpec

_NONE: Mapping[int, int] = {}


def node_reports(known: Known, joined: Mapping[str, tuple[NodeSpec, int]], reasons: Mapping[str, str], private: Mapping[int, int] = _NONE) -> list[NodeReport]:
    """One for each node that ever joined, in order of the first time. `joined` has the spec and how often, `reasons` why those
    that are gone are, `private` the memory of instances where it was measured."""
    reports = []
    for name, (spec, incarnation) in joined.items():
        node = known.nodes.get(name)
        if node is None:
            reports.append(NodeReport(name, False, incarnation, spec, reason=reasons.get(name, "it was lost")))
            continue
        instances = tuple(
            InstanceReport(each.id, each.model, each.warmth, each.target if each.climbing else None, len(each.requests), private.get(each.id, 0))
            for each in node.instances.values()
        )
        reports.append(NodeReport(name, True, incarnation, spec, instances, dict(node.cached)))
    return reports
