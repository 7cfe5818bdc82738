"""Where a request goes and where an instance starts: the policies of the papers and the platforms, one object each. Pure.

All see the same cluster and the same estimates; they differ in what they look at. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sllm_mini.control.estimate import Estimator
from sllm_mini.control.placement.affinity import Affinity
from sllm_mini.control.placement.deepserve import PrefixOrLeastLoaded
from sllm_mini.control.placement.fit import Candidate, choose_node
from sllm_mini.control.placement.migrating import StartupTimeOptimised
from sllm_mini.control.placement.preempting import Preempting
from sllm_mini.control.placement.simple import Anywhere, AvailabilityFirst, LocalityFirst
from sllm_mini.control.placement.split import SplitFetch
from sllm_mini.control.policy import Placement

POLICIES: Mapping[str, Callable[[Estimator], Placement]] = MappingProxyType(
    {
        "random": Anywhere,
        "availability": AvailabilityFirst,
        "locality": LocalityFirst,
        "shepherd": Preempting,
        "serverlessllm": StartupTimeOptimised,
        "affinity": Affinity,
        "deepserve": PrefixOrLeastLoaded,
        "hydraserve": SplitFetch,
    }
)
"""What the command line and the chapters call them; each is made with the estimator that the controller teaches."""

__all__ = [
    "POLICIES",
    "Affinity",
    "Anywhere",
    "AvailabilityFirst",
    "Candidate",
    "LocalityFirst",
    "Preempting",
    "PrefixOrLeastLoaded",
    "SplitFetch",
    "StartupTimeOptimised",
    "choose_node",
]  # fmt: skip
