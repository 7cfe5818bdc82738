"""What a simulation assumes about machines, and how much of its run it remembers. Taught in chapter 08."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from sllm_mini.control.messages import SpecError
from sllm_mini.eviction import LRU, Policy

Links = Literal["node", "link", "shared"]
Leases = Literal["load", "instance"]
Keep = Literal["everything", "requests", "summary"]


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Raises SpecError, a ValueError, for what no machine can do.

    `links`: loads wait for each other in one queue per node (ServerlessLLM), in one queue per node and link, or share each
    link evenly. `store_dram_nbytes` and `store_disk_nbytes` are what a node's store may cache of models, beside the memory
    that instances hold (None: no limit); `eviction` says what goes first. What lies in its memory cannot go while it is read (`leases`
"load": instances have copies on their devices) or while an instance serves from it ("instance": the device is that memory, as
on a live node without GPUs). With b requests in one instance a decode step
    takes 1 + `batch_slowdown` * (b - 1) times as long. A live migration costs `move_seconds` beside its rounds and stops the
    source when at most `move_gap_tokens` are missing. `jitter` is the spread (sigma of a logarithm) of each load's bytes a
    second, drawn from `seed`.

    `keep`: spans of instances and a row per request; rows alone (104 bytes each); or neither, so that memory does not grow
    with the trace. The run ends when every request is answered, or at `until` seconds if that is later. Requests that
    nothing but timers happens to for `patience_seconds` after the last arrival are given up as unanswered.
    """

    links: Links = "node"
    store_dram_nbytes: int | None = 0
    store_disk_nbytes: int | None = None
    eviction: Policy = LRU
    leases: Leases = "load"
    batch_slowdown: float = 0.0
    move_seconds: float = 0.1
    move_gap_tokens: int = 20
    jitter: float = 0.0
    keep: Keep = "everything"
    until: float = 0.0
    patience_seconds: float = 86_400.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("links", get_args(Links)), ("leases", get_args(Leases)), ("keep", get_args(Keep))):
            if getattr(self, field) not in choices:
                raise SpecError(f"{field} is {getattr(self, field)!r}; give {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")
        for field in ("store_dram_nbytes", "store_disk_nbytes"):
            nbytes = getattr(self, field)
            if nbytes is not None and not (type(nbytes) is int and nbytes >= 0):
                raise SpecError(f"{field} is {nbytes!r}; give a whole number of 0 or more, or None for no limit")
        if not isinstance(self.eviction, Policy):
            raise SpecError(f"eviction is {self.eviction!r:.60}; give a policy of sllm_mini.eviction")
        if self.eviction.prefix_nbytes is not None:
            raise SpecError(f"the eviction policy {self.eviction.name!r} keeps parts of models, and a simulated store keeps whole ones; choose another")
        for field in ("batch_slowdown", "move_seconds", "jitter", "until", "patience_seconds"):
            seconds = getattr(self, field)
            if not (isinstance(seconds, int | float) and 0 <= seconds < inf):
                raise SpecError(f"{field} is {seconds!r}; give a number of 0 or more")
        if not self.patience_seconds:
            raise SpecError("patience_seconds is 0; give a number above 0")
        for field in ("move_gap_tokens", "seed"):
            number = getattr(self, field)
            if not (type(number) is int and number >= 0):
                raise SpecError(f"{field} is {number!r}; give a whole number of 0 or more")
