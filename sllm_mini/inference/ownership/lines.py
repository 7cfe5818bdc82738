"""A straight way for requests from whoever decides to the process that becomes their owner: `Lines` at one end, `Line` at the other. Chapter 08.

An order that goes by way of a machine's agent passes four threads and a process more: 0.6 ms of a warm request on two cores. So an owner that serves
calls the arbiter once more and takes its requests over that connection. Nothing rests on it: what finds no line, meets a full one, is not taken, or is
not answered when its line ends, goes the other way; to be told of a request twice in one epoch is to be told once.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from contextlib import suppress

from sllm_mini.errors import WireError
from sllm_mini.inference.ownership import messages
from sllm_mini.inference.session import Session
from sllm_mini.wire import Channel, connect

MAX_NBYTES = 64 << 10
"""Of the sessions that are on their way over a line: so many fit into what a socket holds, and whoever sends need not wait for its reader."""
_SECONDS = 2.0
"""How long the arbiter may take to answer a call, and to take an answer."""


class Lines:
    """The lines of those that have called, by owner. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[str, _Callee] = {}

    def give(self, owner: str, epoch: int, session: bytes, otherwise: Callable[[], object]) -> None:
        """A request begins at `owner`; never waits. `otherwise` is called where it is not known to have been taken: before this returns, or later on
        another thread."""
        with self._lock:
            line = self._lines.get(owner)
        if line is None or not line.begin(epoch, session, otherwise):
            otherwise()

    def serve(self, owner: str, channel: Channel[messages.Request]) -> None:
        """A line, until it ends. Raises WireError then."""
        line = _Callee(channel)
        with self._lock:
            self._lines[owner] = line
        try:
            line.hear()
        finally:
            with self._lock:
                if self._lines.get(owner) is line:
                    del self._lines[owner]
            line.end()


class _Callee:
    """This end of a line."""

    def __init__(self, channel: Channel[messages.Request]) -> None:
        self._channel, self._numbers, self._lock = channel, itertools.count(), threading.Lock()
        self._unanswered: dict[int, tuple[int, Callable[[], object]]] = {}
        """With its bytes, and what is called where it must go another way."""
        self._nbytes = 0
        self._ended = False

    def begin(self, epoch: int, session: bytes, otherwise: Callable[[], object]) -> bool:
        """False where it goes another way."""
        with self._lock:
            if self._ended or self._nbytes + len(session) > MAX_NBYTES:
                return False
            number = next(self._numbers)
            self._unanswered[number] = len(session), otherwise
            self._nbytes += len(session)
        try:
            self._channel.send(messages.Begin(number, epoch), payload=session, timeout=0.0)
        except WireError:
            return self._answered(number) is None  # the end of the line may have been before
        return True

    def hear(self) -> None:
        while True:
            answer = self._channel.receive().message
            if not isinstance(answer, messages.Begun):
                raise WireError(f"{type(answer).__name__} came over a line; use one sllm_mini on both sides")
            otherwise = self._answered(answer.number)
            if otherwise is not None and not answer.done:
                otherwise()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            left, self._unanswered = self._unanswered, {}
        for _, otherwise in left.values():
            otherwise()

    def _answered(self, number: int) -> Callable[[], object] | None:
        with self._lock:
            nbytes, otherwise = self._unanswered.pop(number, (0, None))
            self._nbytes -= nbytes
            return otherwise


class Line:
    """The owner's end: calls the arbiter at `address`, and from then on `run(session, epoch)` for each request, on a thread of its own. What `run` raises
    is not told: the request comes another way then, where an error is. A line that breaks stays so."""

    def __init__(self, address: str | os.PathLike[str], owner: str, run: Callable[[Session, int], object]) -> None:
        self._address, self._owner, self._run = address, owner, run
        self._lock = threading.Lock()
        self._channel: Channel[messages.Begin] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="sllm-line", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Nothing comes over it any more; returns at once."""
        with self._lock:
            self._closed = True
            channel = self._channel
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Likewise, and waits for a `run` under way. Safe to call twice."""
        self.cut()
        self._thread.join()

    def _serve(self) -> None:
        with suppress(WireError), Channel(connect(self._address, timeout=_SECONDS), messages.Begin, name="line to the arbiter") as channel:
            with self._lock:
                if self._closed:
                    return
                self._channel = channel
            channel.send(messages.Serve(self._owner), timeout=_SECONDS)
            while True:
                received = channel.receive(into=_memory)
                try:
                    self._run(Session.from_bytes(received.payload or b""), received.message.epoch)
                except Exception:  # noqa: BLE001 - whoever brings it the other way is told
                    done = False
                else:
                    done = True
                channel.send(messages.Begun(received.message.number, done), timeout=_SECONDS)


def _memory(_begin: messages.Begin, nbytes: int) -> bytearray:
    if nbytes > MAX_NBYTES:
        raise WireError(f"a session of {nbytes:,} bytes came over a line; use one sllm_mini on both sides")
    return bytearray(nbytes)
