"""Memory made ready before it is asked for: one thread that backs a pool's free chunks while nothing else moves.

A chunk that was lent is never used again, so after every eviction the next load has fresh memory to fault in, 0.3 s/GB of
4 KiB pages, and on a GPU's machine to pin. A stock does that between two loads instead; it costs the memory it keeps, which
nobody uses meanwhile, and as much of a processor's time as the faults would have cost. Taught in chapter 03.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sllm_mini.errors import OutOfMemoryError, SllmError

if TYPE_CHECKING:
    from sllm_mini.storage.shared_chunk import SharedChunk

QUIET_SECONDS = 0.1
"""It works once no chunk was taken or given back for so long."""
RETRY_SECONDS = 5.0
"""After memory was refused, until it is asked for again."""


class Stock:
    """See the module. `next_chunk` names the free chunk to be backed next, None if enough are; `busy` says whether somebody
    moves bytes now. `trouble` says why chunks are lacking: the sentence of the last error, "" once it is overcome.

    Raises OutOfMemoryError if no thread can be started. Safe from several threads."""

    def __init__(self, next_chunk: Callable[[], SharedChunk | None], busy: Callable[[], bool]) -> None:
        self.trouble = ""
        self._next_chunk, self._busy = next_chunk, busy
        self._touched = float("-inf")
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sllm-stock", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise OutOfMemoryError(f"no thread can be started to back memory ahead ({error}); end some threads, or back none") from error

    def touch(self) -> None:
        """Says that a chunk was taken or given back."""
        self._touched = time.monotonic()
        self._wake.set()

    def close(self) -> None:
        """Ends it, after the chunk that it is backing now. May be called twice."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._wake.clear()
            if self._closed:
                return
            quiet_in = QUIET_SECONDS if self._busy() else self._touched + QUIET_SECONDS - time.monotonic()
            if quiet_in > 0:
                self._wake.wait(quiet_in)
                continue
            try:
                chunk = self._next_chunk()
                if chunk is not None:
                    chunk.back()
                self.trouble = ""
            except SllmError as error:  # kept for whoever asks: loads still get their memory, or the same error
                self.trouble = str(error)
                self._wake.wait(RETRY_SECONDS)
                continue
            if chunk is None:
                self._wake.wait()
