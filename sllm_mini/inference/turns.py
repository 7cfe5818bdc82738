"""Whose turn it is: a lock that is fair, so that a thread that steps in a loop lets others in between two steps.

Python's own locks are not fair: a thread that gives one back and takes it again at once nearly always wins. Here each
release hands the turn to whoever has waited longest. Costs about a microsecond. Taught in chapter 07.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A reentrant lock, first come, first served. Safe from several threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Turns:
        me = threading.get_ident()
        with self._mutex:
            if self._owner == me or self._owner is None:
                self._owner = me
                self._depth += 1
                return self
            ticket = me, threading.Lock()
            ticket[1].acquire()
            self._waiting.append(ticket)
        try:
            ticket[1].acquire()  # given back by whoever hands the turn over
        except BaseException:
            with self._mutex:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                    raise
            self.__exit__(None, None, None)  # the turn came at the same moment
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._mutex:
            self._depth -= 1
            if self._depth:
                return
            if self._waiting:
                self._owner, ticket = self._waiting.popleft()
                self._depth = 1
                ticket.release()
            else:
                self._owner = None

    def enter_if_free(self) -> bool:
        """Takes the turn if nobody has it, this thread neither; never waits, so a finaliser may call it anywhere."""
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            if self._owner is not None:
                return False
            self._owner, self._depth = threading.get_ident(), 1
            return True
        finally:
            self._mutex.release()
