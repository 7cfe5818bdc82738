"""An engine that serves: stepped by a thread of its own, fed to the ledger, open to moves in and out. Explained in chapter 07.

Whoever has an engine has no more to do than to run requests on it: their tokens go to the ledger that `arbiter` names, and a
request that another engine has taken over is dropped here. Threads: one steps, one sends tokens, one listens for moves and
one more takes in each; idle, the first looks ten times a second.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sllm_mini.errors import SllmError, WireError
from sllm_mini.inference.migration import MoveOptions, migrate
from sllm_mini.inference.migration.messages import Mode, Report
from sllm_mini.inference.migration.target import MigrationServer
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.lines import Line
from sllm_mini.inference.ownership.messages import Token, Verdict
from sllm_mini.inference.ownership.server import OwnershipClient
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine

_IDLE_SECONDS = 0.1
_MOVES_OUT_SECONDS = 10.0


class EngineService:
    """See the module. Safe from several threads. `owner` is its name at the register, which no other may have had; moves are taken
    in at `address`; `pace_seconds` is slept after each step, so that a text can be watched; `interval_seconds` is the feed's.

    `on_error` is called once, on the thread that steps, with an error of a step that is no request's own, or with the feed's once
    the ledger cannot be told any more: nothing is stepped after it. `whole` says whether every byte of the weights is there, and raises
    what ended their load: an error of no request's own either. With `line` the arbiter may give it requests itself.
    Raises WireError if the address cannot be had.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        owner: str,
        address: str | os.PathLike[str],
        arbiter: str,
        on_error: Callable[[BaseException], object],
        pace_seconds: float = 0.0,
        interval_seconds: float = 0.0,
        whole: Callable[[], bool] = lambda: True,
        line: bool = False,
    ) -> None:
        self.engine = engine
        self.owner = owner
        self._pace_seconds = pace_seconds
        self._on_error = on_error
        self._whole = whole
        self._whole_since: float | None = None
        self._step_since: float | None = None
        self._awake = threading.Event()
        self._closed = threading.Event()
        self._leaving = 0
        self._left = threading.Condition()
        self._register = OwnershipClient(arbiter)
        self._ledger = _Ledger(arbiter)
        self._feed = TokenFeed(engine, self._ledger, wake=self._awake.set, interval_seconds=interval_seconds)
        try:
            self._moves = MigrationServer(address, owner=owner, register=self._register, feed=self._feed)
        except BaseException:
            self._feed.close()
            raise
        self.address = self._moves.address
        self._thread = threading.Thread(target=self._step, name="sllm-steps", daemon=True)
        self._thread.start()
        self._line = Line(arbiter, owner, self.run) if line else None

    def run(self, session: Session, epoch: int) -> None:
        """A request begins here, or begins again, and speaks in that epoch. Raises what `TokenFeed.adopt` raises."""
        self._feed.adopt(session, Epoch(epoch))

    def move(self, request_id: str, address: str, *, mode: Mode = "tokens", target_gap_tokens: int = 4) -> Report:
        """Moves a request to the engine that takes moves in at `address`, and returns when that is over. Raises as `migrate` does."""
        with self._left:
            self._leaving += 1
        try:
            options = MoveOptions(target_gap_tokens=target_gap_tokens)
            return migrate(self.engine, request_id, address, owner=self.owner, register=self._register, mode=mode, feed=self._feed, options=options)
        finally:
            with self._left:
                self._leaving -= 1
                self._left.notify_all()

    def drop(self, request_id: str, epoch: int) -> None:
        """Nobody wants the request in that epoch any more; does nothing if it does not speak here in it."""
        self._feed.leave(request_id, Epoch(epoch))

    def go_on_with(self, engine: Engine) -> None:
        """All that it runs goes on in another engine of the same weights, from the last token, and whatever comes from now on. Waits for moves
        out. The one before is the caller's to close. Raises WireError where such a move does not end, and what `TokenFeed.go_on_with` raises."""
        with self._left:
            if not self._left.wait_for(lambda: not self._leaving, _MOVES_OUT_SECONDS):
                raise WireError(f"{self._leaving} requests of {self.owner} are still being moved; end its process")
            self._feed.go_on_with(engine)
            self.engine = engine
        self._awake.set()

    def stuck_seconds(self) -> float:
        """For how long the step under way has not ended, waiting for its turn and telling of failures included; 0 between steps, and
        while bytes are missing that it may be waiting for. A step that has nothing to do ends at once."""
        now = time.monotonic()
        try:
            if not self._look_whole():
                return 0.0
        except SllmError:
            return 0.0  # the thread that steps tells it
        begun = self._step_since
        return 0.0 if begun is None or self._whole_since is None else now - max(begun, self._whole_since)

    def _look_whole(self) -> bool:
        if self._whole_since is None and self._whole():
            self._whole_since = time.monotonic()
        return self._whole_since is not None

    def cut(self) -> None:
        """From now on nothing more is said to the ledger and nothing is stepped, as if the machine had failed; returns at once, and
        `close` frees what is left. A claim that is on its way to the register may still arrive."""
        self._ledger.cut = True
        self._closed.set()
        self._awake.set()
        if self._line is not None:
            self._line.cut()

    def close(self) -> None:
        """Ends moves in, the steps and the feed, which sends what is left, and drops all requests: nothing of the service's holds the
        engine then. Waits for the step under way. Safe to call twice, but not on the thread that steps. Raises WireError if a
        move out of here does not end."""
        self._closed.set()
        self._awake.set()
        if self._line is not None:
            self._line.close()
        self._moves.close()
        self._thread.join()
        self._feed.close()
        for request_id in self.engine.requests:
            self.engine.drop(request_id, finish="moved")
        with self._left:
            if not self._left.wait_for(lambda: not self._leaving, _MOVES_OUT_SECONDS):
                raise WireError(f"{self.owner} was closed and {self._leaving} of its requests are still being moved; end its process")
        self._register.close()
        self._ledger.close()

    def _step(self) -> None:
        try:
            while not self._closed.is_set():
                self._step_since = time.monotonic()
                worked = self.engine.step()
                self._look_whole()
                self._feed.report_failures()
                self._step_since = None
                if self._feed.error is not None:
                    raise self._feed.error  # nobody hears what is said here
                if not worked:
                    self._awake.wait(_IDLE_SECONDS)
                    self._awake.clear()
                elif self._pace_seconds:
                    self._closed.wait(self._pace_seconds)
                else:
                    time.sleep(0)
        except BaseException as error:  # noqa: BLE001 - it is told to whoever made the service
            self._step_since = None
            if not self._closed.is_set():
                self._on_error(error)


class _Ledger(OwnershipClient):
    """The ledger, until the service is cut off from it. A connection of its own: tokens wait for no claim."""

    cut = False

    def deliver(self, tokens: Sequence[Token]) -> list[Verdict]:
        self._check()
        return super().deliver(tokens)

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
        self._check()
        return super().give_up(request_id, epoch, reason)

    def _check(self) -> None:
        if self.cut:
            raise WireError("this engine was cut off from the ledger; its requests begin again elsewhere")
