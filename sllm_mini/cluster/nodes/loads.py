"""A model on its way into a node's memory, for one climb. Explained in chapter 08.

The agent loads and the worker maps: the store lends the model, and the lease is kept until the worker has its own. What must be
moved for that waits its turn, one load at a time, as the controller's estimates have it; what lies in memory takes no turn.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Protocol

from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.adapted import AdaptedModels
from sllm_mini.cluster.nodes.fetching import Fetching
from sllm_mini.errors import SllmError
from sllm_mini.inference.turns import Turns
from sllm_mini.storage import Store
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.types import Tier

_TIERS = {"remote": Tier.REMOTE, "disk": Tier.DISK}


class LoadHome(Protocol):
    """What a load needs of the agent; see `NodeAgent`."""

    store: Store
    loads: Turns
    fetching: Fetching
    adapted: AdaptedModels

    @property
    def ended(self) -> bool: ...

    def tier(self, model: str) -> Tier: ...


class Load:
    """See the module. Runs on a thread of its own, which has the node's turn as long as bytes move; `attached` must follow `lend`, whatever
    happens between. Once it is over `tier` is where the bytes came from (of what other nodes sent, the one that the order names),
    `queued_seconds` how long they waited for their turn and `seconds` how long they moved."""

    def __init__(self, home: LoadHome, order: node.Climb) -> None:
        self._home, self._order = home, order
        self.tier, self.queued_seconds, self.seconds = order.tier, 0.0, 0.0
        self.lease: Lease | None = None
        self._lent, self._attached, self._over = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=f"sllm-load-{order.instance}", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether all bytes are there, or no more will come."""
        return self._over.is_set()

    def lend(self) -> Lease | None:
        """Waits until the worker may attach: with `overlap` while the bytes come, else until they are there. None where the store has no
        room, and the worker is to read the model itself. Raises the load's error."""
        self._lent.wait()
        if self._error is not None:
            raise self._error
        return self.lease

    def attached(self) -> None:
        """The worker has it, or will not."""
        self._attached.set()

    def wait(self) -> None:
        """Until it is over. Raises its error."""
        self._over.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        asked = time.monotonic()
        try:
            with self._home.loads if self._home.tier(self._order.model) < Tier.DRAM else nullcontext():
                self.queued_seconds = time.monotonic() - asked
                self._bring()
        except BaseException as error:  # noqa: BLE001 - it is raised to whoever waits for the load
            self._error = error
        self._over.set()
        self._lent.set()

    def _bring(self) -> None:
        begun = time.monotonic()
        way = self._home.fetching.way(self._order.plan) if self._order.plan else None
        lease = self._arrived()
        if lease is None:
            self._lent.set()
            self._attached.wait()  # the worker reads it: this is its turn
        elif way is not None and way.begun is not None:
            begun = way.begun  # others have sent it, perhaps while the worker was still being launched
            self.tier = self._order.tier
        self.seconds = max(0.0, (time.monotonic() if way is None or way.ended is None else way.ended) - begun)

    def _arrived(self) -> Lease | None:
        """Lent, and every byte there. What others were to bring and did not is asked for once more, which reads the source."""
        while True:
            lease = self._home.store.lend(self._home.adapted.stored(self._order.model), DRAM)
            if not isinstance(lease, Lease):
                self.tier = Tier.REMOTE if "://" in lease.source else Tier.DISK
                return None
            arriving = lease.arriving
            shared = lease.found_in == DRAM and not arriving.done
            self.tier = self._order.tier if shared else _TIERS.get(lease.found_in, Tier.DRAM)
            self.lease = lease
            if self._order.overlap:
                self._lent.set()
            try:
                arriving.wait()
                return lease
            except SllmError:
                lease.close()
                if not shared or self._lent.is_set() or self._home.ended:
                    raise
