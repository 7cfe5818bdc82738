"""Who has asked a node for which block of a plan: where the receivers' asks and the node's own order of sending meet.

One for each plan at each node, made by whoever comes first, an ask or the node's part. Safe from several threads. Taught in chapter 10.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from sllm_mini.cluster.block_messages import Request, Step
from sllm_mini.storage.incoming import BlockSource
from sllm_mini.wire import Channel


@dataclass(eq=False)
class Board:
    """See the module. The fields are guarded by `changed`."""

    image: BlockSource | None = None
    channels: set[Channel[Request]] = field(default_factory=set)
    asked: dict[tuple[int, int], Channel[Request] | None] = field(default_factory=dict)
    passed: set[tuple[int, int]] = field(default_factory=set)
    """Turns that went by without an ask: such an ask is answered when it comes."""
    gone: set[int] = field(default_factory=set)
    ended: bool = False
    """Nobody will ask any more."""
    busy: set[int] = field(default_factory=set)
    """Receivers that a block is on its way to: a node's blocks go out in order."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def next(self, steps: list[Step]) -> Step | None:
        """Takes the first step to a receiver that none is on its way to; None when all are taken."""
        with self.changed:
            while steps:
                free = next((step for step in steps if step.peer not in self.busy), None)
                if free is not None:
                    steps.remove(free)
                    self.busy.add(free.peer)
                    return free
                self.changed.wait()
            return None

    def turn(self, step: Step, patience: float) -> Channel[Request] | None:
        """Waits until the receiver has asked for its block; None where nothing is to be sent now."""
        key = step.peer, step.block
        with self.changed:
            self.changed.wait_for(lambda: key in self.asked or step.peer in self.gone or self.ended, patience)
            if key not in self.asked:
                self.gone.add(step.peer)
                self.passed.add(key)
            return self.asked.pop(key, None)
