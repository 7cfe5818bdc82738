"""Where processes of chapters and benches are forked: one that has imported what they need, made for the first of them (chapter 05)."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from typing import Any

from sllm_mini.cluster.zygote import Child, ForkOptions, Zygote, ZygoteGoneError


class Nursery:
    """A zygote that has imported `imports` and forks `entries`; it is kept to the end of this process. Safe from several threads."""

    def __init__(self, imports: Sequence[str], entries: Sequence[str]) -> None:
        self._imports, self._entries = imports, entries
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None

    def fork(self, *arguments: Any, options: ForkOptions) -> Child:
        """A process that runs the first of `entries` with these. Raises ZygoteError where it cannot be forked."""
        with self._lock:
            try:
                return self._ready().fork(self._entries[0], *arguments, options=options)
            except ZygoteGoneError:  # somebody killed it
                self._end()
                return self._ready().fork(self._entries[0], *arguments, options=options)

    def zygote(self) -> Zygote:
        """For others to fork from. Raises ZygoteError where it cannot be started."""
        with self._lock:
            return self._ready()

    def _ready(self) -> Zygote:
        if self._zygote is None:
            self._zygote = Zygote(self._imports, self._entries)
            atexit.register(self._end)
        return self._zygote

    def _end(self) -> None:
        zygote, self._zygote = self._zygote, None
        atexit.unregister(self._end)
        if zygote is not None:
            zygote.close()
