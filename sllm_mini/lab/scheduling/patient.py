"""A policy in a few lines, to test a reason: ServerlessLLM's choice, but never over the network while some machine has the weights. Chapter 08."""

from __future__ import annotations

from dataclasses import dataclass

from sllm_mini.control.cluster import Cluster
from sllm_mini.control.placement import StartupTimeOptimised
from sllm_mini.control.policy import Plan
from sllm_mini.control.state import ModelState
from sllm_mini.types import Tier


@dataclass(slots=True)
class Patient(StartupTimeOptimised):
    """Waits where the soonest start would fetch from afar what lies near somebody else's devices."""

    def choose_node(self, model: ModelState, cluster: Cluster, now: float) -> Plan | None:
        plan = StartupTimeOptimised.choose_node(self, model, cluster, now)
        far = plan is not None and plan.tier is Tier.REMOTE and bool(model.cached_on)
        return None if far else plan
