"""One node's parts in plans that bring a model to several nodes: from other nodes into its store, and on to the next. Explained in chapter 10.

The driver says who sends what to whom; the store's memory takes the blocks as they come, and whoever asks the store for the model
meanwhile shares them. What nobody sends is read from the model's own source, so a plan that breaks costs time and no start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from sllm_mini.cluster.block_messages import Part
from sllm_mini.cluster.blocks import BlockPeer
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.errors import NoRoomError, StoreError
from sllm_mini.storage import Store
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.storage.incoming import BlockSource, HeldBlocks

_DECISION_SECONDS = 5.0
"""How long a climb waits to be told how its model comes, before it reads it itself."""
_KNOWN = 1024


@dataclass(slots=True, eq=False)
class Way:
    """How a plan's model comes here: `begun` when it has, `ended` when it is over; neither where the node reads it itself. `stages` serve it
    meanwhile, and `mine` are the numbers of those here; the last is told the others' `addresses` (`joined`)."""

    decided: threading.Event = field(default_factory=threading.Event)
    begun: float | None = None
    ended: float | None = None
    stages: Sequence[node.Stage] = ()
    mine: Sequence[int] = ()
    addresses: Sequence[str] = ()
    joined: threading.Event = field(default_factory=threading.Event)

    @property
    def last(self) -> bool:
        """Whether requests come here while it is served in stages."""
        return len(self.stages) - 1 in self.mine


class Fetching:
    """See the module. Listens at `address`; `bytes_per_second` limits what goes out and, apart from it, what comes in. `give` and `way` from
    any thread. `close` ends what is under way once the store is closed too, and `wait` waits for that."""

    def __init__(self, store: Store, address: str, answer: Callable[[node.Fetched], object], *, bytes_per_second: float | None = None) -> None:
        self._store, self._answer = store, answer
        self._peer = BlockPeer(address, bytes_per_second=bytes_per_second)
        self.address = self._peer.address
        self._lock = threading.Lock()
        self._ways: dict[str, Way] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def give(self, order: node.Fetch | node.Pipeline) -> None:
        """Takes an order; never waits, never raises."""
        way = self._way(order.plan)
        if isinstance(order, node.Pipeline):
            way.addresses = order.addresses
            way.joined.set()
            return
        if order.part is None:
            way.decided.set()
            return
        way.stages, way.mine = order.stages, [number for number, stage in enumerate(order.stages) if stage.node == order.part.node]
        thread = threading.Thread(target=self._run, args=(order, order.part, way), name="sllm-fetch", daemon=True)
        with self._lock:
            if self._closed:
                return
            self._threads.add(thread)
            thread.start()

    def way(self, plan: str) -> Way:
        """Once it is known how the plan's model comes here: asked for then, the store shares what is on its way."""
        way = self._way(plan)
        way.decided.wait(_DECISION_SECONDS)
        return way

    def known(self, plan: str) -> Way | None:
        """A plan's way if it is decided; None for any other, and for no plan."""
        with self._lock:
            way = self._ways.get(plan)
        return way if way is not None and way.decided.is_set() else None

    def close(self) -> None:
        """Sends and takes nothing more; nobody waits here any more."""
        with self._lock:
            self._closed = True
            ways = [*self._ways.values()]
        for way in ways:
            way.decided.set()
        self._peer.close()

    def wait(self) -> None:
        """Until all parts have ended; after `close`, and that of the store."""
        with self._lock:
            threads = [*self._threads]
        for thread in threads:
            thread.join()

    def _way(self, plan: str) -> Way:
        with self._lock:
            way = self._ways.setdefault(plan, Way())
            if self._closed:
                way.decided.set()
            while len(self._ways) > _KNOWN:
                del self._ways[next(iter(self._ways))]
            return way

    def _run(self, order: node.Fetch, part: Part, way: Way) -> None:
        fetched = node.Fetched(order.plan, order.model)
        begun = time.monotonic()
        try:
            with ExitStack() as held:
                image = self._image(order.model, part.block_nbytes, held)
                if part.whole:
                    way.begun = begun
                way.decided.set()
                report = self._peer.run(part, image)
            read = report.read + report.fell_back
            fetched = node.Fetched(order.plan, order.model, report.planned, report.begged, read, report.sent, time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001 - it would be told as a part that needed nothing
            fetched = node.Fetched(order.plan, order.model, seconds=time.monotonic() - begun, error=node.reason_of(error))
        finally:
            way.ended = time.monotonic()
            way.decided.set()
            with self._lock:
                self._threads.discard(threading.current_thread())
            self._answer(fetched)

    def _image(self, model: str, block_nbytes: int, held: ExitStack) -> BlockSource:
        """Where the blocks go, or come from if the store has them; until `held` ends. Raises StoreError."""
        try:
            return held.enter_context(self._store.receive(model, block_nbytes))
        except NoRoomError:
            raise
        except StoreError:
            lease = self._store.lend(model, DRAM)  # it is there, or on its way by a load of this node's own
        if not isinstance(lease, Lease):
            raise StoreError(lease.reason)
        held.enter_context(lease)
        lease.arriving.wait()
        return HeldBlocks(lease, block_nbytes)
