"""Where device time and memory went: GPU-seconds and byte-seconds by warmth, idle, busy or climbing. Taught in chapter 09.

An instance's time is counted when its state changes. A climbing instance is counted at the warmth it climbs to, as it holds
what that needs; a climb that no request used before the instance descended (or the run ended) is also counted as waste. What no instance holds is free; it is integrated apart, so that the two can be checked against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from sllm_mini.types import Tier, Warmth

IDLE, BUSY, CLIMBING = range(3)
MODES = ("idle", "busy", "climbing")
SLOTS = len(MODES) * len(Warmth)


class InstanceSpan(Struct, frozen=True, gc=False):
    """A stretch of an instance's life, for a Gantt chart. `what`: "process", "runtime", "queue", "load" or "ready" (rungs of
    a climb), "idle", "run" (one request, `request`), "move" (a request on its way here) or "held" (kept for one that ended,
    or was lost, on its way), "cut" (the rest of a climb that was given up, or that the run's end cut off). `warmth` is what it was or climbed to; `model` is "" for a process without one."""

    instance: int
    node: str
    model: str
    what: str
    warmth: Warmth
    start: float
    end: float
    devices: tuple[int, ...] = ()
    request: int = -1


def slot(warmth: Warmth, mode: int) -> int:
    """Where in the lists of `Account` such time is counted."""
    return warmth * len(MODES) + mode


@dataclass(slots=True)
class Account:
    """Sums over the run. `gpu_seconds` and `byte_seconds` are lists by `slot`; `free_gpu_seconds` is what no instance held,
    `total_gpu_seconds` devices times the time their node was there. `unused_climb_gpu_seconds` and `unused_climb_byte_seconds`
    are the part of both in climbs that no request used: of instances that were warmed in advance, or whose request was served
    elsewhere meanwhile. `lost_seconds` is work thrown away by preemptions and
    failures; `moved_seconds` live migrations from begin to end, `paused_seconds` the pauses in them."""

    gpu_seconds: list[float] = field(default_factory=lambda: [0.0] * SLOTS)
    byte_seconds: list[float] = field(default_factory=lambda: [0.0] * SLOTS)
    free_gpu_seconds: float = 0.0
    total_gpu_seconds: float = 0.0
    unused_climb_gpu_seconds: float = 0.0
    unused_climb_byte_seconds: float = 0.0
    starts: list[int] = field(default_factory=lambda: [0] * len(Warmth))
    """By the warmth they climbed from."""
    loads: list[int] = field(default_factory=lambda: [0] * len(Tier))
    """Finished loads by the tier their bytes came from."""
    migrations: int = 0
    failed_migrations: int = 0
    preemptions: int = 0
    lost_seconds: float = 0.0
    moved_seconds: float = 0.0
    paused_seconds: float = 0.0

    def gpu_table(self) -> dict[str, float]:
        """GPU-seconds by "warmth mode", those that are not 0, and "free"."""
        return {**_table(self.gpu_seconds, 1.0), "free": self.free_gpu_seconds}

    def memory_table(self) -> dict[str, float]:
        """MB-seconds of host memory held by instances, by "warmth mode"."""
        return _table(self.byte_seconds, 1e-6)

    @property
    def idle_gpu_seconds(self) -> float:
        """Of devices that an idle instance held: what keep-alive costs."""
        return sum(self.gpu_seconds[IDLE :: len(MODES)])

    @property
    def idle_mb_seconds(self) -> float:
        """Of host memory that idle instances held."""
        return sum(self.byte_seconds[IDLE :: len(MODES)]) * 1e-6

    @property
    def wasted_gpu_seconds(self) -> float:
        """Of devices that were held for no request: by idle instances and in climbs that nothing used."""
        return self.idle_gpu_seconds + self.unused_climb_gpu_seconds

    @property
    def wasted_mb_seconds(self) -> float:
        """The same of host memory: what chapter 09 calls waste, idle layers as RainbowCake counts them and unused climbs."""
        return self.idle_mb_seconds + self.unused_climb_byte_seconds * 1e-6


def _table(sums: list[float], scale: float) -> dict[str, float]:
    names = [f"{warmth.name.lower()} {mode}" for warmth in Warmth for mode in MODES]
    return {name: total * scale for name, total in zip(names, sums, strict=True) if total}
