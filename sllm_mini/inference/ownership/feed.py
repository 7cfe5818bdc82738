"""From an engine to the client's ledger: every piece of a request, with the epoch in which this engine owns it (chapter 07).

The step thread only puts a piece into a list; a thread of the feed's own sends what has gathered, in one message, so a
step never waits for the ledger. Where a CPU computes the steps, what is sent meanwhile slows them by a fifth; so pieces between
a request's first and its last may gather for `interval_seconds` (what vLLM calls a stream interval). `flush` waits until
the ledger has answered for all of a request's pieces: only then may the request be handed to somebody else. A request that
the ledger refuses is another owner's by now, and is dropped here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sllm_mini.errors import ModelError, SllmError, StageError, WireError
from sllm_mini.inference.ownership.messages import Token, Verdict
from sllm_mini.types import Epoch

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine
    from sllm_mini.inference.requests import Generation, Piece
    from sllm_mini.inference.session import Session


class Ledger(Protocol):
    """Who takes the tokens: a `TokenLedger`, or an `OwnershipClient` that asks one."""

    def deliver(self, tokens: Sequence[Token]) -> list[Verdict]: ...

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool: ...


class Speaker:
    """One request of an engine that speaks through a feed. `first_at` is when its first piece came, on the monotonic clock."""

    def __init__(self, feed: TokenFeed, request_id: str) -> None:
        self.request_id = request_id
        self.generation: Generation | None = None
        self.first_at: float | None = None
        self._feed = feed
        self._spoke = threading.Event()

    def __call__(self, piece: Piece) -> None:
        """Takes one piece, on the thread that steps the engine."""
        now = time.monotonic()
        generation = self.generation
        if generation is None:
            raise ModelError(f"request {self.request_id!r} gave a token before its engine had taken it in")
        self._feed.put(self.request_id, piece, generation.finish, now)
        if self.first_at is None:
            self.first_at = now
            self._spoke.set()

    def wait(self, seconds: float) -> float | None:
        """`first_at`, or None if no piece comes in time."""
        self._spoke.wait(seconds)
        return self.first_at


class TokenFeed:
    """Sends what `engine` says to `ledger`; neither is its own. `close` sends what is left. Safe from several threads.

    `wake` is called when a request has come to the engine and somebody should step it.
    """

    def __init__(self, engine: Engine, ledger: Ledger, *, wake: Any = None, interval_seconds: float = 0.0) -> None:
        self.engine = engine
        self._ledger = ledger
        self._interval_seconds = interval_seconds
        self._urgent = False
        """Whether what waits goes at once."""
        self._wake = wake
        self._changed = threading.Condition(threading.RLock())
        self._epochs: dict[str, Epoch] = {}
        self._speakers: dict[str, Speaker] = {}
        self._last_at: dict[str, float] = {}
        self._waiting: list[Token] = []
        self._sending: list[Token] = []
        self._error: WireError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._send, name="sllm-feed", daemon=True)
        self._thread.start()

    def adopt(self, session: Session, epoch: Epoch, *, guest: bool = False) -> Speaker:
        """Makes the session a running request of the engine that speaks in `epoch`. Raises what `Engine.adopt` raises.

        With `guest`, what the engine has prepared for it is used; otherwise whatever the engine still has under its id, from
        a move or from an earlier epoch, is dropped first, and the others wait while `Engine.adopt` computes: in one piece, so that
        a conversation that still fills the old guest cannot take the new one for it. One that speaks here in that epoch goes on as it does: it was
        ordered twice. Raises ModelError if the request speaks here in a later epoch already: the order was overtaken.
        """
        name = session.request_id
        speaker = Speaker(self, name)
        with self.engine.between_steps():  # no step before the speaker knows its generation
            spoken = self.epoch(name)
            if spoken is not None and spoken > epoch:
                raise ModelError(f"request {name!r} speaks here in epoch {spoken} already, and epoch {epoch} is over; nothing is left to do")
            known = self._speakers.get(name)
            if known is not None and spoken == epoch and name in self.engine.requests:
                return known
            if not guest:
                self.engine.drop(name, finish="moved")
            self.open(name, epoch)
            try:
                speaker.generation = self.engine.adopt(session, on_piece=speaker)
            except BaseException:
                self._forget(name)
                raise
            with self._changed:
                self._speakers[name] = speaker
        if self._wake is not None:
            self._wake()
        return speaker

    def go_on_with(self, engine: Engine) -> None:
        """From now on this is its engine, and its requests go on there from their last token, in the same epochs. The one before has none left.
        Raises what `Engine.adopt` raises."""
        before = self.engine
        with before.between_steps(), engine.between_steps():  # nobody sees a request that is in neither
            sessions = [before.session(name) for name in before.requests]
            for session in sessions:
                before.drop(session.request_id, finish="moved")
            self.engine = engine
            for session in sessions:
                epoch = self.epoch(session.request_id)
                if epoch is not None:
                    self.adopt(session, epoch)

    def open(self, request_id: str, epoch: Epoch) -> None:
        """From now on the request speaks in this epoch."""
        with self._changed:
            self._epochs[request_id] = epoch

    def put(self, request_id: str, piece: Piece, finish: Any, now: float) -> None:
        """Takes one piece that was given at `now`; the last one says how the text ended."""
        with self._changed:
            epoch = self._epochs.get(request_id)
            if epoch is None:
                return  # refused meanwhile, or gone: the engine is about to drop it
            self._urgent |= finish is not None or request_id not in self._last_at
            self._waiting.append(Token(request_id, epoch, piece.position, piece.token_id, piece.text, finish, piece.logprob, piece.top, piece.vector))
            self._last_at[request_id] = now
            if finish is not None:
                self._forget(request_id)
            if self._urgent or len(self._waiting) == 1:  # else its thread looks soon
                self._changed.notify_all()

    @property
    def error(self) -> WireError | None:
        """Why the ledger cannot be told any more what the engine says; None as long as it can. Final: a process whose feed has
        ended should end too, so that its requests begin again where their tokens are heard."""
        with self._changed:
            return self._error

    def last_at(self, request_id: str) -> float | None:
        """When the request's latest piece was given, on the monotonic clock."""
        with self._changed:
            return self._last_at.get(request_id)

    def flush(self, request_id: str, timeout: float) -> None:
        """Waits until the ledger has taken every piece of the request so far. Raises ModelError if it refused one, WireError if it
        does not answer."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._error or not any(token.request_id == request_id for token in (*self._waiting, *self._sending)), timeout)
            if self._error is not None:
                raise self._error
            if not done:
                raise WireError(f"the ledger did not take the tokens of request {request_id!r} within {timeout} seconds")
            if request_id not in self._epochs:
                raise ModelError(f"request {request_id!r} speaks no more: its text has ended, or another engine owns it")

    def epoch(self, request_id: str) -> Epoch | None:
        """The epoch in which the request speaks here; None if it does not."""
        with self._changed:
            return self._epochs.get(request_id)

    def leave(self, request_id: str, epoch: Epoch) -> None:
        """Drops the request if it still speaks here in that epoch: somebody else speaks for it now."""
        with self.engine.between_steps():
            if self.epoch(request_id) == epoch:
                self._forget(request_id)
                self.engine.drop(request_id, finish="moved")

    def report_failures(self) -> None:
        """Tells the ledger of requests that ended with an error: nobody else reads their generations. To be called after steps. Raises
        StageError where a stage of the engine is gone: the ledger is not told then."""
        running = self.engine.requests
        with self._changed:
            suspects = [speaker for name, speaker in self._speakers.items() if name not in running]
        for speaker in suspects:
            with self.engine.between_steps():
                epoch = self.epoch(speaker.request_id)
                if epoch is None or speaker.request_id in self.engine.requests or speaker.generation is None:
                    continue
                self._forget(speaker.request_id)
            try:
                for _ in speaker.generation:
                    pass
                reason = "its engine dropped it"
            except StageError:
                raise  # the engine's, and no request's own: all of them begin again elsewhere
            except SllmError as error:
                reason = str(error)
            try:
                self._ledger.give_up(speaker.request_id, epoch, reason)
            except WireError as error:
                with self._changed:
                    self._error = error

    def close(self) -> None:
        """Sends what is left and ends the thread; pieces that come later are not sent."""
        with self._changed:
            self._closed = True
            self._epochs.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> TokenFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self, request_id: str) -> None:
        with self._changed:
            self._epochs.pop(request_id, None)
            self._last_at.pop(request_id, None)
            self._speakers.pop(request_id, None)

    def _send(self) -> None:
        while True:
            with self._changed:
                self._sending = []
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._interval_seconds:
                    self._changed.wait_for(lambda: self._urgent or self._closed, self._interval_seconds)
                if not self._waiting:
                    return
                self._sending, self._waiting, self._urgent = self._waiting, [], False
            try:
                verdicts = self._ledger.deliver(self._sending)
            except WireError as error:  # there is no client any more
                with self._changed:
                    self._error = error
                    self._waiting, self._sending, self._closed = [], [], True
                    left = [*self._epochs.items()]
                    self._changed.notify_all()
                for request_id, epoch in left:
                    self.leave(request_id, epoch)
                return
            for token, verdict in zip(self._sending, verdicts, strict=True):
                if verdict in ("stale", "refused"):
                    self.leave(token.request_id, Epoch(token.epoch))
