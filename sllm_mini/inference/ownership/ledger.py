"""What a client has been told: one list of tokens per request, whichever engine they come from. Explained in chapter 07.

An engine that gives a token gives it to the ledger, with the epoch in which it owns the request. The ledger takes only the
register's present epoch and only the next position, so the client's stream has no gap and no repeat whoever dies or
lives on unnoticed; and since it holds all that the client has seen, a request can begin again anywhere from there
(ServerlessLLM's router keeps the tokens of a request that moves; OSDI'24). Costs some hundred bytes a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership.messages import Finish, Token, Verdict
from sllm_mini.inference.ownership.register import EpochRegister
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch

MAX_RESTARTS = 2
"""How often a request begins again without a new token in between: one that kills whoever runs it must not go through them all."""


@dataclass(frozen=True, slots=True)
class LedgerPiece:
    """One token as the client gets it. `arrived` is the moment it was accepted, in seconds of the monotonic clock; `epoch`
    tells which owner gave it."""

    position: int
    token_id: int
    text: str
    epoch: Epoch
    arrived: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    vector: bytes | None = None
    """These three as in `messages.Token`."""


class Journal(Protocol):
    """What the ledger tells before it shows it. Called with the ledger's lock held, so it calls nothing of the ledger."""

    def taken(self, tokens: Sequence[Token]) -> None:
        """These are the next ones of their requests; the last of a text says how it ended."""

    def ended(self, request_id: str, finish: Finish | None, error: str | None) -> None:
        """No token comes after it: it was ended with `finish`, or failed."""


@dataclass(slots=True)
class _Entry:
    session: Session
    """As the request began."""
    changed: threading.Condition
    pieces: list[LedgerPiece] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    listeners: tuple[Callable[[], object], ...] = ()
    restarts: int = 0
    restarted_at: int = -1
    """How many pieces there were at the last restart, and how many restarts there have been from there."""

    @property
    def next_position(self) -> int:
        return len(self.session.token_ids) + len(self.pieces)

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    def says_more_than(self, count: int) -> bool:
        return len(self.pieces) > count or self.over


class TokenLedger:
    """The tokens of every open request. `register` is the arbiter that says which epoch counts. Safe from several threads.

    `on_end(request_id)` is called once for each request, when its text has ended or it failed, on the thread that said so
    and with no lock held; not where it is closed before.
    """

    def __init__(
        self, register: EpochRegister, *, on_end: Callable[[str], object] | None = None, journal: Journal | None = None, max_restarts: int = MAX_RESTARTS,
    ) -> None:  # fmt: skip
        self._register, self._max_restarts = register, max_restarts
        self._on_end = on_end
        self._journal = journal
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def open(self, session: Session) -> None:
        """Begins a request in the state of `session`. Raises ValueError if it is open already."""
        with self._lock:
            if session.request_id in self._entries:
                raise ValueError(f"request {session.request_id!r} is in the ledger already; give each request an id of its own")
            self._entries[session.request_id] = _Entry(session, threading.Condition(self._lock))

    def reopen(self, session: Session, pieces: Sequence[LedgerPiece], finish: Finish | None, error: str | None) -> None:
        """Begins a request as it stood in a journal: with what it had said, and how it ended where it had. `on_end` is not
        called, and nothing is written. Raises ValueError if it is open already."""
        self.open(session)
        with self._lock:
            entry = self._entries[session.request_id]
            entry.pieces, entry.finish, entry.error = list(pieces), finish, error

    def accept(self, token: Token) -> Verdict:
        """Takes one token, or says why not; see `Verdict`."""
        return self.deliver([token])[0]

    def deliver(self, tokens: Sequence[Token]) -> list[Verdict]:
        """`accept` for each, in order; the journal has them in one piece."""
        verdicts: list[Verdict] = []
        taken: list[Token] = []
        with self._lock:
            for token in tokens:
                verdicts.append(self._accept(token))
                if verdicts[-1] == "taken":
                    taken.append(token)
            if taken and self._journal is not None:
                self._journal.taken(taken)
            listeners: dict[Callable[[], object], None] = {}
            for token in taken:
                entry = self._entries[token.request_id]
                entry.changed.notify_all()
                listeners |= dict.fromkeys(entry.listeners)
        for listener in listeners:
            listener()
        for token in taken:
            if token.finish is not None:
                self._ended(token.request_id)
        return verdicts

    def _accept(self, token: Token) -> Verdict:
        entry = self._entries.get(token.request_id)
        if entry is None:
            return "stale"  # the request is over for the client
        owner, epoch = self._register.owner(token.request_id)
        if owner is None or token.epoch != epoch:
            return "stale"
        behind = entry.next_position - token.position
        if 0 < behind <= len(entry.pieces):
            known = entry.pieces[-behind]
            last = entry.finish if behind == 1 else None
            same = (known.token_id, known.text, last) == (token.token_id, token.text, token.finish)
            return "had" if same else "refused"
        if behind or entry.over:
            return "refused"
        entry.pieces.append(LedgerPiece(token.position, token.token_id, token.text, epoch, time.monotonic(), token.logprob, token.top, token.vector))
        entry.finish = token.finish
        return "taken"

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
        """`fail`, said by the owner of that epoch; False, and nothing done, if it is not the owner any more."""
        with self._lock:
            entry = self._entries.get(request_id)
            owner, now = self._register.owner(request_id)
            if entry is None or owner is None or now != epoch:
                return False
            ended = self._end(entry, None, reason)
        if ended:
            self._ended(request_id)
        return True

    def end(self, request_id: str, finish: Finish = "cancelled") -> None:
        """Ends a request for the client before its text does; no token is taken any more."""
        with self._lock:
            ended = self._end(self._entry(request_id), finish, None)
        if ended:
            self._ended(request_id)

    def fail(self, request_id: str, reason: str) -> None:
        """Ends a request that nobody can carry on: whoever reads its stream gets ModelError(reason)."""
        with self._lock:
            ended = self._end(self._entry(request_id), None, reason)
        if ended:
            self._ended(request_id)

    def _end(self, entry: _Entry, finish: Finish | None, error: str | None) -> bool:
        """True where it was not over before. With the lock held."""
        if entry.over:
            return False
        if self._journal is not None:
            self._journal.ended(entry.session.request_id, finish, error)
        entry.finish, entry.error = finish, error
        entry.changed.notify_all()
        return True

    def _ended(self, request_id: str) -> None:
        if self._on_end is not None:
            self._on_end(request_id)

    def close(self, request_id: str) -> None:
        """Forgets a request, which frees its id at the register too; a stream that still reads it ends with ModelError."""
        with self._lock:
            entry = self._entries.pop(request_id, None)
            if entry is not None and entry.finish is None:
                entry.error = entry.error or "it was closed before its text ended"
                entry.changed.notify_all()
        self._register.forget(request_id)

    def stream(self, request_id: str, *, timeout: float | None = None) -> Iterator[LedgerPiece]:
        """The pieces of a request from its first to its last, each as soon as it is there; may be read several times.

        Raises ModelError for a request that is not open or that failed, TimeoutError if one piece takes longer than `timeout` seconds.
        """
        with self._lock:
            entry = self._entry(request_id)
        index = 0
        while True:
            with entry.changed:
                there = entry.changed.wait_for(partial(entry.says_more_than, index), timeout)
                if not there:
                    raise TimeoutError(f"request {request_id!r} gave no token for {timeout} seconds; its owner is {self._register.owner(request_id).owner}")
                pieces = entry.pieces[index:]
                if not pieces and entry.error:
                    raise ModelError(f"request {request_id!r} was given up: {entry.error}")
            yield from pieces
            index += len(pieces)
            if not pieces:
                return

    def listen(self, request_id: str, listener: Callable[[], object]) -> None:
        """From now on `listener()` is called after each delivery to the request, with no lock held, on the thread that delivered: it
        returns soon and raises nothing. Raises ModelError for a request that is not open."""
        with self._lock:
            self._entry(request_id).listeners += (listener,)

    def unlisten(self, request_id: str, listener: Callable[[], object]) -> None:
        """It is called no more, but for a delivery that is being told. Nothing where it does not listen."""
        with self._lock:
            entry = self._entries.get(request_id)
            if entry is not None:
                entry.listeners = tuple(each for each in entry.listeners if each != listener)

    def pieces(self, request_id: str, start: int = 0) -> tuple[LedgerPiece, ...]:
        """What has been accepted so far, from the piece `start` on. Raises ModelError for a request that is not open."""
        with self._lock:
            return tuple(self._entry(request_id).pieces[start:])

    def count(self, request_id: str) -> int:
        """How many pieces have been accepted. Raises ModelError for a request that is not open."""
        with self._lock:
            return len(self._entry(request_id).pieces)

    def finish(self, request_id: str) -> Finish | None:
        """How the text ended, None while it goes on. Raises ModelError for a request that is not open."""
        with self._lock:
            return self._entry(request_id).finish

    def error(self, request_id: str) -> str | None:
        """Why it failed, None if it has not. Raises ModelError for a request that is not open."""
        with self._lock:
            return self._entry(request_id).error

    def session(self, request_id: str) -> Session:
        """The request as the client knows it: an engine that adopts it gives the token after the last one accepted.

        Raises ModelError for a request that is not open.
        """
        with self._lock:
            entry = self._entry(request_id)
            return _advanced(entry.session, entry.pieces)

    def restart(self, request_id: str, owner: str, expected_epoch: int, *, blame: bool = True) -> tuple[Session, Epoch] | None:
        """Claims a request for a new owner and gives the state from which that one goes on; None if it is over or closed, or
        somebody else has claimed it. No token is taken meanwhile, so the session misses none.

        A request that was begun again `max_restarts` times and has given no token since fails instead; where the request cannot have
        been at fault (it begins, or was taken from an owner that lives), it does not count (`blame`).
        """
        with self._lock:
            entry = self._entries.get(request_id)
            epoch = None if entry is None else self._register.claim(request_id, owner, expected_epoch)
            if entry is None or epoch is None or entry.over:
                return None
            said = len(entry.pieces)
            if blame:
                entry.restarts = entry.restarts + 1 if said == entry.restarted_at else 1
                entry.restarted_at = said
            if entry.restarts <= self._max_restarts:
                return _advanced(entry.session, entry.pieces), epoch
            self._end(entry, None, f"it was begun again {self._max_restarts} times and gave no token; it may be what its workers died of")
        self._ended(request_id)
        return None

    def _entry(self, request_id: str) -> _Entry:
        entry = self._entries.get(request_id)
        if entry is None:
            raise ModelError(f"request {request_id!r} is not in the ledger; it was never opened, or was closed")
        return entry


def _advanced(session: Session, pieces: Sequence[LedgerPiece]) -> Session:
    """`session` after it has given `pieces`; what a stop string holds back is the engine's to find again."""
    if not pieces:
        return session
    return replace(
        session,
        token_ids=(*session.token_ids, *(piece.token_id for piece in pieces)),
        emitted_text_nchars=session.emitted_text_nchars + sum(len(piece.text) for piece in pieces),
        held_text=None,
    )
