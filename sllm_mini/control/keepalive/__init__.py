"""How long an idle model stays and what is kept ready: the providers' ways and the papers', one object each. Pure.

A policy's `stay`, `on_arrival` and `rank` are all that differs between a platform that forgets at once and one that shares
runtimes between functions. Taught in chapter 09.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive.fixed import Buffered, FixedKeepAlive, Forever
from sllm_mini.control.keepalive.greedy_dual import GreedyDual
from sllm_mini.control.keepalive.histogram import HybridHistogram
from sllm_mini.control.keepalive.oracle import Clairvoyant
from sllm_mini.control.keepalive.rainbowcake import RainbowCake, layer_ttl
from sllm_mini.control.keepalive.snapshot import from_snapshot
from sllm_mini.control.keepalive.stem_cells import StemCells
from sllm_mini.control.policy import KeepAlive

POLICIES: Mapping[str, Callable[[Estimator], KeepAlive]] = MappingProxyType(
    {
        "scale-to-zero": lambda _: FixedKeepAlive(0.0),
        "fixed-10min": lambda _: FixedKeepAlive(600.0),
        "fixed-20min": lambda _: FixedKeepAlive(1200.0),
        "forever": lambda _: Forever(),
        "buffered": lambda _: Buffered(FixedKeepAlive(600.0)),
        "stem-cells": lambda _: StemCells(FixedKeepAlive(600.0)),
        "hybrid-histogram": lambda _: HybridHistogram(),
        "greedy-dual": GreedyDual,
        "rainbowcake": lambda _: RainbowCake(),
    }
)
"""What the command line and the chapters call them, each made with the estimator that the controller teaches; `Clairvoyant`,
which needs the future, is made by whoever has it."""

__all__ = [
    "POLICIES", "Buffered", "Clairvoyant", "FixedKeepAlive", "Forever", "GreedyDual", "HybridHistogram", "RainbowCake", "StemCells", "from_snapshot",
    "layer_ttl",
]  # fmt: skip
