"""A listener's view of one request: its pieces in order, each once, and its report at the end, whichever thread they come on. Chapter 08."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from sllm_mini.cluster.api import Listener, RequestReport
from sllm_mini.inference.ownership.ledger import LedgerPiece


class Subscription:
    """`read(start)` gives the pieces from `start` on, and the report where there will be no more. Whoever knows that something has
    changed calls `look`: `listener` is called for it by one thread at a time, with no lock held. One that raises is called no
    more, and its error goes where that of a thread would. Safe from several threads."""

    def __init__(self, read: Callable[[int], tuple[Sequence[LedgerPiece], RequestReport | None]], listener: Listener) -> None:
        self._read, self._listener = read, listener
        self._lock = threading.Lock()
        self._count = 0
        self._changed = self._looking = self._ended = False

    def look(self) -> None:
        """Tells what is new. Where another thread is telling, that one does."""
        with self._lock:
            self._changed = True
            if self._looking:
                return
            self._looking = True
        while self._goes_on():
            pieces, report = self._read(self._count)
            self._count += len(pieces)
            if report is not None:
                self.end()
            if pieces or report is not None:
                try:
                    self._listener(pieces, report)
                except Exception as error:  # noqa: BLE001 - it is the listener's, and whoever delivers must go on
                    self.end()
                    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread())))

    def end(self) -> None:
        """The listener is called no more, but for what is being told just now."""
        with self._lock:
            self._ended = True

    @property
    def ended(self) -> bool:
        return self._ended

    def _goes_on(self) -> bool:
        with self._lock:
            self._looking = self._changed and not self._ended
            self._changed = False
            return self._looking
