"""The source of a move: brings the destination near while it decodes on, stops, hands over, and learns who owns the request.

Until the hand-over is sent nothing can go wrong that the source's own request would notice: it is released and goes on.
After that the register decides. Explained in chapter 07.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.migration import messages
from sllm_mini.inference.migration.link import AnswerChannel, Link, MoveRefused
from sllm_mini.inference.migration.messages import Mode, Outcome, Phase, Report
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.register import Register
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch
from sllm_mini.wire.channel import BytesLike

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine


SETTLE_QUESTIONS = 4
"""What a source asks the register at most, once it has stopped and the hand-over was not answered: claim, owner, and both again."""


@dataclass(frozen=True, slots=True)
class MoveOptions:
    """How patient a move is. Raises ValueError for what is no whole number of at least 1, or no finite time above 0.

    `target_gap_tokens` is the gap at which the source stops, `max_rounds` after how many rounds it stops anyway. An answer may take
    `answer_seconds` while the source decodes on, and `stopped_seconds` once it has stopped, all tries together.
    `block_nbytes` bounds the KV in one message, and so the time that the source's steps wait for a read.
    """

    target_gap_tokens: int = 4
    max_rounds: int = 32
    answer_seconds: float = 120.0
    stopped_seconds: float = 6.0
    block_nbytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name in ("target_gap_tokens", "max_rounds", "block_nbytes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; it must be a whole number of at least 1")
        for name in ("answer_seconds", "stopped_seconds"):
            if type(getattr(self, name)) not in (int, float) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; it must be a number of seconds, more than 0 and finite")


class _Gone(Exception):
    """The request is not in this engine any more: its text ended, or it was cancelled."""


class Source:
    """One move of one request out of `engine`; `run` once. `decide(gap, previous gap, rounds left, target)` says when to stop."""

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        channel: AnswerChannel,
        *,
        owner: str,
        epoch: Epoch,
        register: Register,
        feed: TokenFeed | None,
        mode: Mode,
        options: MoveOptions,
        decide: Callable[..., bool],
    ) -> None:
        self._engine = engine
        self._id = request_id
        self._link = Link(channel)
        self._owner = owner
        self._epoch = epoch
        self._register = register
        self._feed = feed
        self._mode = mode
        self._options = options
        self._decide = decide
        self._phases: list[Phase] = []
        self._sent = 0
        """Tokens whose KV the destination has."""
        self._held = False
        self._last_step_at: float | None = None

    def run(self) -> Report:
        """The move, whatever becomes of it. Raises WireError if the register does not answer when it must decide."""
        try:
            self._approach()
            final, cached = self._stop()
        except _Gone:
            return self._report("ended", *self._register.owner(self._id), "the text ended before the hand-over")
        except (WireError, ModelError) as error:
            self._go_on()
            return self._report("stayed" if self._here() else "ended", *self._register.owner(self._id), f"nothing was handed over: {error}")
        except BaseException:
            self._go_on()
            raise
        return self._hand_over(final, cached)

    def _approach(self) -> None:
        """Everything that happens while the source decodes on."""
        session, cached = self._look()
        state = session.to_bytes()
        with self._phase("begin", nbytes=len(state)):
            self._link.ask(messages.Begin(self._link.next(), self._id), messages.Has, seconds=self._options.answer_seconds, payload=[state])
        if self._mode == "stop_and_copy":
            return
        previous: int | None = None
        for rounds_left in reversed(range(self._options.max_rounds + 1)):
            gap = cached - self._sent
            if self._decide(gap, previous, rounds_left=rounds_left, target_gap_tokens=self._options.target_gap_tokens):
                return
            with self._phase("round", tokens=gap, nbytes=self._nbytes(gap)):
                self._bring(session, cached, self._options.answer_seconds)
            previous = gap
            session, cached = self._look()

    def _stop(self) -> tuple[Session, int]:
        """The final session and the tokens of it that have KV; from here on the source is silent."""
        with self._phase("stop"):
            with self._engine.between_steps():
                self._check()
                self._engine.hold(self._id)
                self._held = True
                self._last_step_at = time.monotonic()
            final, cached = self._look()
            if self._feed is not None:
                self._last_step_at = self._feed.last_at(self._id) or self._last_step_at
                self._feed.flush(self._id, self._options.stopped_seconds)
        late = self._late(cached - self._sent)
        if late:
            with self._phase("copy", tokens=late, nbytes=self._nbytes(late)):
                self._bring(final, self._sent + late, self._options.stopped_seconds)
        return final, cached

    def _late(self, gap: int) -> int:
        """How many of the tokens that are missing after the stop go before the hand-over, which carries one block at most."""
        if self._mode == "stop_and_copy":
            return gap
        return gap - gap % self._block_tokens if self._mode == "kv" and gap > self._block_tokens else 0

    def _hand_over(self, final: Session, cached: int) -> Report:
        try:
            with self._phase("hand over"):
                state = final.to_bytes()
                start, count = self._sent, cached - self._sent
                blocks = self._read(start, start + count) if count and self._mode != "tokens" else None
                request = messages.HandOver(self._link.next(), self._epoch, len(state), start, count if blocks is not None else 0)
                payload: list[BytesLike] = [state] if blocks is None else [state, blocks]
                self._note(tokens=count, nbytes=len(state) + (0 if blocks is None else blocks.nbytes))
                took = self._link.ask(request, messages.Took, seconds=self._options.stopped_seconds, payload=payload)
        except _Gone:
            return self._report("ended", *self._register.owner(self._id), "the request was cancelled before the hand-over")
        except MoveRefused as refusal:
            return self._settle(str(refusal), refused_by=refusal.owner)
        except (WireError, ModelError) as error:
            return self._settle(str(error))
        except BaseException:
            self._settle("the move was interrupted")
            raise
        if took.epoch is None:
            return self._settle("the destination came too late to claim the request")
        self._leave()
        first_at = None
        with suppress(WireError), self._phase("resume"):  # the move is done; only the report lacks something
            first_at = self._link.ask(messages.Await(self._link.next()), messages.Resumed, seconds=self._options.stopped_seconds * 2).at
        return self._report("moved", took.owner, Epoch(took.epoch), "the destination claimed the request", first_at)

    def _settle(self, reason: str, refused_by: str | None = None) -> Report:
        """The hand-over may have arrived or not. Whoever claims the epoch first has the request. Asks `SETTLE_QUESTIONS` at most.

        A destination that claimed the request and could not go on leaves it to nobody, or to `refused_by`, itself, where it
        does not know that it claimed it.
        """
        try:
            epoch = self._register.claim(self._id, self._owner, self._epoch)
            if epoch is None:
                owner, now = self._register.owner(self._id)
                if now > self._epoch and owner in (None, refused_by):
                    epoch = self._register.claim(self._id, self._owner, now)
        except WireError:
            self._go_on()  # harmless whoever owns it: the ledger takes the tokens of one epoch only
            raise
        if epoch is None:
            self._leave()
            owner, now = self._register.owner(self._id)
            return self._report("stayed" if owner == self._owner else "moved", owner, now, f"somebody else claimed the request ({reason})")
        with self._engine.between_steps():
            if self._feed is not None and self._here():
                self._feed.open(self._id, epoch)
            self._epoch = epoch
            self._go_on()
        return self._report("stayed", self._owner, epoch, f"the source claimed the request back: {reason}")

    def _bring(self, session: Session, end: int, seconds: float) -> None:
        """Sends what the destination lacks of the first `end` tokens: themselves, to compute over, or blocks to put in place."""
        step = messages.MAX_TOKENS if self._mode == "tokens" else self._block_tokens
        while self._sent < end:
            stop = min(self._sent + step, end)
            if self._mode == "tokens":
                request: messages.Request = messages.Tokens(self._link.next(), self._sent, list(session.token_ids[self._sent : stop]))
                payload = None
            else:
                payload = [self._read(self._sent, stop)]
                request = messages.Blocks(self._link.next(), self._sent, stop - self._sent)
            has = self._link.ask(request, messages.Has, seconds=seconds, payload=payload)
            if has.length != stop:
                raise WireError(f"the destination has {has.length} tokens and was given {stop}; use one sllm_mini on both sides")
            self._sent = stop

    @property
    def _block_tokens(self) -> int:
        return max(1, self._options.block_nbytes // self._engine.kv_nbytes_per_token)

    def _look(self) -> tuple[Session, int]:
        """The session as of the last step, and how many of its tokens have KV: all but the last, and none before the first step."""
        with self._engine.between_steps():
            self._check()
            return self._engine.session(self._id), self._engine.kv_length(self._id)

    def _read(self, start: int, stop: int) -> memoryview:
        with self._engine.between_steps():
            self._check()
            return self._engine.read_kv(self._id, start, stop).numpy().data

    def _check(self) -> None:
        if not self._here():
            raise _Gone

    def _here(self) -> bool:
        """Whether the engine still has the request that this move began with, and not one that was begun again since."""
        return self._id in self._engine.requests and (self._feed is None or self._feed.epoch(self._id) == self._epoch)

    def _nbytes(self, tokens: int) -> int:
        return tokens * (4 if self._mode == "tokens" else self._engine.kv_nbytes_per_token)

    def _go_on(self) -> None:
        with self._engine.between_steps():
            if self._held and self._here():
                self._engine.release(self._id)
            self._held = False

    def _leave(self) -> None:
        if self._feed is not None:
            self._feed.leave(self._id, self._epoch)
        elif self._here():
            self._engine.drop(self._id, finish="moved")

    @contextmanager
    def _phase(self, name: Any, *, tokens: int = 0, nbytes: int = 0) -> Iterator[None]:
        self._note(tokens, nbytes)
        start = time.monotonic()
        try:
            yield
        finally:
            self._phases.append(Phase(name, start, time.monotonic(), *self._noted))

    def _note(self, tokens: int, nbytes: int) -> None:
        self._noted = (tokens, nbytes)

    def _report(self, outcome: Outcome, owner: str | None, epoch: Epoch, reason: str, first_at: float | None = None) -> Report:
        last_at = self._last_step_at if outcome == "moved" else None
        return Report(self._id, self._mode, outcome, owner, epoch, reason[:8000], self._phases, last_at, first_at)
