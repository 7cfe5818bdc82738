"""How many instances a model should have: what the platforms do, each as a small object. Pure. Taught in chapter 10."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sllm_mini.control.autoscale.knative import KnativePodAutoscaler
from sllm_mini.control.autoscale.simple import BoundedQueue, PerRequest, QueueLength, TargetConcurrency
from sllm_mini.control.policy import Autoscaler

POLICIES: Mapping[str, Callable[[], Autoscaler]] = MappingProxyType(
    {
        "per-request": PerRequest,
        "target-concurrency": TargetConcurrency,
        "knative": KnativePodAutoscaler,
        "queue-length": QueueLength,
        "bounded-queue": BoundedQueue,
    }
)
"""What the command line and the chapters call them."""

__all__ = ["POLICIES", "BoundedQueue", "KnativePodAutoscaler", "PerRequest", "QueueLength", "TargetConcurrency"]
