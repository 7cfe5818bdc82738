"""Messages between a driver and a node that each arrive once and in order, whatever becomes of the frames. Explained in chapter 08.

Each message has the next number and is kept until the other end has said that it has taken all up to it, which every frame says
that goes there; what is not acknowledged goes again. So a message that is lost, late, doubled or overtaken is handled here, and
nothing above knows of it. `Mailbox` is one end of that and pure; `Conversation` is one over a channel. Costs some 30 bytes a
frame, and the memory of what has been sent and not acknowledged: that of a beat or two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from sllm_mini.errors import WireError
from sllm_mini.wire import Channel, ChannelClosed, Message, WireTimeout

_AHEAD = 1024
"""How many messages that came before their time are kept; the others come again."""
M = TypeVar("M", bound=Message)
T = TypeVar("T", bound=Message)


@dataclass(slots=True, eq=False)
class Letter(Generic[M]):
    """A message to the other end. `sent` is when it last went there."""

    number: int
    message: M | None
    """None where it could not be said: its number must be taken all the same."""
    payload: bytes
    sent: float = -inf


class Mailbox(Generic[M, T]):
    """One end: sends `M`, takes `T`. What is not acknowledged goes again `again_seconds` after it went. One thread at a time."""

    def __init__(self, again_seconds: float) -> None:
        self.taken = 0
        """All messages of the other end up to this number have been taken: its acknowledgement."""
        self._again_seconds = again_seconds
        self._posted = 0
        self._waiting: dict[int, Letter[M]] = {}
        self._ahead: dict[int, tuple[T | None, bytes]] = {}

    def post(self, message: M, payload: bytes = b"") -> None:
        """It is due at once."""
        self._posted += 1
        self._waiting[self._posted] = Letter(self._posted, message, payload)

    def due(self, now: float) -> list[Letter[M]]:
        """What is to go now, in order: what never went, and what went too long ago."""
        due = [letter for letter in self._waiting.values() if letter.sent <= now - self._again_seconds]
        for letter in due:
            letter.sent = now
        return due

    def acknowledge(self, taken: int) -> None:
        """The other end has taken all up to this number. Raises WireError for what was never sent."""
        if taken > self._posted:
            raise WireError(f"message {taken} was acknowledged and {self._posted} were sent; use one sllm_mini on both sides")
        for number in list(self._waiting):  # in order
            if number > taken:
                break
            del self._waiting[number]

    def take(self, number: int, message: T | None, payload: bytes = b"") -> list[tuple[T, bytes]]:
        """A message has come, or the number of one that could not be said: all those whose turn it is now. One that has been taken before
        is nobody's."""
        if self.taken < number <= self.taken + _AHEAD:
            self._ahead.setdefault(number, (message, payload))
        found = []
        while self.taken + 1 in self._ahead:
            self.taken += 1
            next_one, with_it = self._ahead.pop(self.taken)
            if next_one is not None:
                found.append((next_one, with_it))
        return found


class Conversation(Generic[M, T]):
    """One end over a channel. `frame(number, taken, message)` makes what goes over it, and what comes has these fields; a frame
    without a message is a beat, which goes every `beat_seconds` where nothing else does. What comes may have `max_payload_nbytes`
    with it. `on_refused` is told of a message that breaks its schema or is too large, which is left out; without, it ends `speak`. `post`,
    `last` and `end` from any thread; `speak` and `hear` from one each."""

    def __init__(
        self, frame: Callable[[int, int, M | None], Message], beat_seconds: float, silent_seconds: float, *, max_payload_nbytes: int = 0,
        on_refused: Callable[[M, WireError], object] | None = None,
    ) -> None:  # fmt: skip
        self._frame, self._max_payload_nbytes, self._on_refused = frame, max_payload_nbytes, on_refused
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._mailbox: Mailbox[M, T] = Mailbox(2 * beat_seconds)
        self._changed = threading.Condition()
        self._fresh = self._ended = False

    def post(self, message: M, payload: bytes = b"") -> None:
        """Goes as soon as `speak` comes to it; never waits, never raises."""
        with self._changed:
            self._mailbox.post(message, payload)
            self._fresh = True
            self._changed.notify_all()

    def speak(self, channel: Channel) -> None:
        """Sends what is due, until `end`. Raises WireError: ChannelClosed where the other end is gone, WireTimeout where it reads
        nothing, and others for what cannot be said."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fresh or self._ended, self._beat_seconds)
                if self._ended:
                    return
                self._fresh = False
                letters, taken = self._mailbox.due(time.monotonic()), self._mailbox.taken
            for letter in letters:
                self._say(channel, letter, taken)
            if not letters:
                channel.send(self._frame(0, taken, None), timeout=self._silent_seconds)

    def last(self, channel: Channel, message: M) -> None:
        """Says it past everything that waits, once. Raises WireError."""
        channel.send(self._frame(0, self._mailbox.taken, message), timeout=self._silent_seconds)

    def hear(self, channel: Channel, patience: float) -> list[tuple[T, bytes]]:
        """Waits for a frame: the messages whose turn it is with it. Raises WireTimeout where none comes for `patience` seconds, and
        WireError."""
        received = channel.receive(patience, into=self._memory)
        frame = received.message
        payload = b"" if received.payload is None else bytes(received.payload)
        with self._changed:
            self._mailbox.acknowledge(frame.taken)
            if frame.number:
                return self._mailbox.take(frame.number, frame.message, payload)
            return [] if frame.message is None else [(frame.message, payload)]

    def end(self) -> None:
        """`speak` returns."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _say(self, channel: Channel, letter: Letter[M], taken: int) -> None:
        try:
            channel.send(self._frame(letter.number, taken, letter.message), payload=letter.payload, timeout=self._silent_seconds)
        except (ChannelClosed, WireTimeout):
            raise
        except WireError as error:
            refused, letter.message, letter.payload = letter.message, None, b""
            if self._on_refused is None or refused is None:
                raise
            channel.send(self._frame(letter.number, taken, None), timeout=self._silent_seconds)  # it raises where the channel has ended
            self._on_refused(refused, error)

    def _memory(self, _frame: Message, nbytes: int) -> bytearray:
        if nbytes > self._max_payload_nbytes:
            raise WireError(f"a payload of {nbytes:,} bytes was announced and at most {self._max_payload_nbytes:,} are taken; use one sllm_mini on both sides")
        return bytearray(nbytes)
