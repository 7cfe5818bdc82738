"""What a simulation assumes about machines, and how much of its run it remembers. Taught in chapter 08."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from sllm_mini.eviction import LRU, Policy

Links = Literal["node", "link", "shared"]
Keep = Literal["everything", "requests", "summary"]


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Raises ValueError for what no machine can do.

    `links`: loads wait for each other in one queue per node (ServerlessLLM), in one queue per node and link, or share each
    link evenly. `store_dram_nbytes` and `store_disk_nbytes` are what a node's store may cache of models, beside the memory
    that instances hold (None: no limit); `eviction` says what goes first. With b requests in one instance a decode step
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
    batch_slowdown: float = 0.0
    move_seconds: float = 0.1
    move_gap_tokens: int = 20
    jitter: float = 0.0
    keep: Keep = "everything"
    until: float = 0.0
    patience_seconds: float = 86_400.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.links not in ("node", "link", "shared") or self.keep not in ("everything", "requests", "summary"):
            raise ValueError(f'links are "node", "link" or "shared", keep is "everything", "requests" or "summary"; not {self.links!r} and {self.keep!r}')
        if any(nbytes is not None and nbytes < 0 for nbytes in (self.store_dram_nbytes, self.store_disk_nbytes)):
            raise ValueError("a store caches 0 bytes or more; give None for no limit")
        if self.eviction.prefix_nbytes is not None:
            raise ValueError(f"the eviction policy {self.eviction.name!r} keeps parts of models, and a simulated store keeps whole ones; choose another")
        if not (0 <= self.batch_slowdown < inf and 0 <= self.move_seconds < inf and 0 <= self.jitter < inf and 0 <= self.until < inf):
            raise ValueError("batch_slowdown, move_seconds, jitter and until are 0 or more")
        if self.move_gap_tokens < 0 or not self.patience_seconds > 0:
            raise ValueError("move_gap_tokens is 0 or more, patience_seconds above 0")
