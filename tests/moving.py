"""Two ends of a move in one process, and what can go wrong between them: what the tests of chapter 07 share.

A `Side` is an engine with its feed, its step loop and its name at the register; killing one cuts its channel and lets nothing
of it reach the register or the ledger any more, which is all that a kill -9 of its process would be to the others. A `World`
has the register, the ledger and the sides, and notices deaths as a router would.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sllm_mini.errors import WireError
from sllm_mini.inference import migration
from sllm_mini.inference.migration.messages import Answer, Report, Request
from sllm_mini.inference.migration.target import MigrationTarget
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.messages import Token, Verdict
from sllm_mini.inference.ownership.register import EpochRegister, Ownership
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel, Received

Deed = Literal["drop", "twice", None]


class Killed(BaseException):
    """This side's process is dead; nothing after this runs."""


@dataclass(frozen=True)
class Event:
    """A moment of a move at which something may happen: `who` is about to send, has sent or has received the `number`-th
    message of a kind, or is about to claim or has claimed."""

    who: str
    what: Literal["sending", "sent", "received", "claiming", "claimed"]
    kind: str
    number: int


Hook = Callable[[Event], Deed]


class Side:
    """One engine; see the module."""

    def __init__(self, name: str, engine: Any, register: EpochRegister, ledger: TokenLedger) -> None:
        self.name = name
        self.engine = engine
        self.alive = True
        self.hook: Hook = lambda event: None
        self.channels: list[Channel[Any]] = []
        self.register = _Register(register, self)
        self.feed = TokenFeed(engine, _Ledger(ledger, self), wake=self.wake)
        self._awake = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        self._awake.set()

    def start(self) -> None:
        """Steps the engine from now on, on a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=f"steps of {self.name}", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while not self._over:
            worked = self.alive and self.engine.step()
            self.feed.report_failures()
            if not worked:
                self._awake.wait(0.05)
                self._awake.clear()

    def kill(self) -> None:
        self.alive = False
        for channel in self.channels:
            channel._end("its process was killed")

    def close(self) -> None:
        self._over = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        self.feed.close()


class _Register:
    """The register as one side sees it, while it lives."""

    def __init__(self, register: EpochRegister, side: Side) -> None:
        self._register = register
        self._side = side
        self._claims = 0

    def owner(self, request_id: str) -> Ownership:
        self._check()
        return self._register.owner(request_id)

    def claim(self, request_id: str, owner: str, expected_epoch: int, *, ticket: int | None = None) -> Epoch | None:
        self._check()
        number, self._claims = self._claims, self._claims + 1
        self._side.hook(Event(owner, "claiming", "claim", number))
        self._check()
        epoch = self._register.claim(request_id, owner, expected_epoch, ticket=ticket)
        self._side.hook(Event(owner, "claimed", "claim", number))
        self._check()
        return epoch

    def release(self, request_id: str, owner: str, epoch: int) -> bool:
        self._check()
        return self._register.release(request_id, owner, epoch)

    def _check(self) -> None:
        if not self._side.alive:
            raise Killed


class _Ledger:
    def __init__(self, ledger: TokenLedger, side: Side) -> None:
        self._ledger = ledger
        self._side = side

    def deliver(self, tokens: Sequence[Token]) -> list[Verdict]:
        if not self._side.alive:
            raise WireError("the process is dead")
        return self._ledger.deliver(tokens)

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
        return self.alive() and self._ledger.give_up(request_id, epoch, reason)

    def alive(self) -> bool:
        return self._side.alive


class FaultyChannel(Channel[Any]):
    """A channel at whose every message something may happen."""

    def __init__(self, sock: socket.socket, message_type: Any, side: Side) -> None:
        super().__init__(sock, message_type, name=side.name)
        self._side = side
        self._counts: dict[tuple[str, str], int] = {}
        side.channels.append(self)

    def send(self, message: Any, **options: Any) -> None:
        deed = self._happens("sending", message)
        for _ in range({"drop": 0, "twice": 2, None: 1}[deed]):
            super().send(message, **options)
        self._happens("sent", message)

    def receive(self, timeout: float | None = None, *, into: Any = None) -> Received[Any]:
        received = super().receive(timeout, into=into)
        self._happens("received", received.message)
        return received

    def _happens(self, what: Any, message: Any) -> Deed:
        if not self._side.alive:
            raise Killed
        kind = type(message).__name__
        number = self._counts.get((what, kind), 0)
        self._counts[what, kind] = number + 1
        deed = self._side.hook(Event(self._side.name, what, kind, number))
        if not self._side.alive:
            raise Killed
        return deed


class World:
    """A register, a ledger, and engines by name. `make` gives each its engine."""

    def __init__(self, make: Callable[[str], Any], names: Sequence[str] = ("source", "destination")) -> None:
        self.register = EpochRegister()
        self.ledger = TokenLedger(self.register)
        self.sides = {name: Side(name, make(name), self.register, self.ledger) for name in names}

    def __getitem__(self, name: str) -> Side:
        return self.sides[name]

    def submit(self, name: str, session: Session) -> None:
        epoch = self.register.claim(session.request_id, name, 0)
        assert epoch is not None
        self.ledger.open(session)
        self[name].feed.adopt(session, epoch)

    def move(
        self, request_id: str, source: str = "source", destination: str = "destination", *, mode: Any = "tokens", **options: Any
    ) -> Report | None:
        """The report, None if the source was killed. Returns once both ends have left the conversation."""
        here, there = self[source], self[destination]
        ours, theirs = socket.socketpair()
        far = FaultyChannel(theirs, Request, there)
        near = FaultyChannel(ours, Answer, here)

        def serve() -> None:
            try:
                with far:
                    MigrationTarget(far, owner=there.name, register=there.register, feed=there.feed).serve()
            except (WireError, Killed):
                return

        thread = threading.Thread(target=serve, name="target", daemon=True)
        thread.start()
        try:
            return migration.migrate(here.engine, request_id, near, owner=source, register=here.register, mode=mode, feed=here.feed, **options)
        except Killed:
            return None
        finally:
            near.close()
            thread.join()

    def notice(self, name: str) -> None:
        """What a router does when a worker dies: its requests begin again with a survivor, from the last token in the ledger."""
        survivors = [side for side in self.sides.values() if side.alive]
        for request_id, epoch in self.register.retire(name).items():
            new = random.Random(request_id).choice(survivors)
            begun = self.ledger.restart(request_id, new.name, epoch)
            if begun is not None:
                new.feed.adopt(*begun)

    def read(self, request_id: str, timeout: float = 5.0) -> tuple[tuple[int, ...], str, str | None]:
        """The whole text as a client gets it: token ids, text, finish."""
        pieces = list(self.ledger.stream(request_id, timeout=timeout))
        return tuple(piece.token_id for piece in pieces), "".join(piece.text for piece in pieces), self.ledger.finish(request_id)

    def start(self) -> None:
        for side in self.sides.values():
            side.start()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self.sides.values():
            side.close()
