"""Live migration: a request goes on in another engine, and whoever reads its text notices a short pause. Explained in chapter 07.

    report = migrate(engine, "request-7", "/run/…/worker-2.sock", owner="worker-1", register=register, feed=feed)

While the source decodes on, the destination is brought near: in rounds of tokens that it recomputes ("tokens": the way of
ServerlessLLM, OSDI'24) or in rounds of KV blocks that are put in place ("kv": Llumnix, OSDI'24). When the gap is small the
source stops the request, sends its final session and what is still missing, and the destination claims it at the register
of epochs and goes on. "stop_and_copy", the baseline, stops first and copies then. The two ends are in `source`
and `target`, what they say in `messages` and over `link`, and which way is faster in `choice`.

Whoever dies, one owner is left, by the register's word: a source that hears nothing claims the request back, and of two
claims one wins. A process that is killed is noticed at once, because its connection ends; for a destination that hangs in the
hand-over see `OWNER_SECONDS`, for an owner that hangs `workers.WorkerOptions.silent_seconds`.
Costs, beside what is sent: the source's steps wait while its KV is read, one block at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.migration.choice import (
    Speeds,
    break_even_bytes_per_second,
    choose_mode,
    copy_seconds,
    recompute_seconds,
    resolve_mode,
)
from sllm_mini.inference.migration.link import AnswerChannel
from sllm_mini.inference.migration.messages import Answer, Mode, Phase, Report
from sllm_mini.inference.migration.source import SETTLE_QUESTIONS, MoveOptions, Source
from sllm_mini.inference.migration.target import MigrationServer, MigrationTarget
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.register import Register
from sllm_mini.inference.ownership.server import ANSWER_SECONDS, TRIES
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel, connect

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine

__all__ = [
    "OWNER_SECONDS",
    "MigrationServer",
    "MigrationTarget",
    "Mode",
    "MoveOptions",
    "Phase",
    "Report",
    "Speeds",
    "break_even_bytes_per_second",
    "choose_mode",
    "copy_seconds",
    "migrate",
    "recompute_seconds",
    "should_hand_over",
]

OWNER_SECONDS = MoveOptions().stopped_seconds + SETTLE_QUESTIONS * TRIES * ANSWER_SECONDS
"""With the usual patience, how long after a hand-over was sent it is settled at most who owns its request: the source waits
`stopped_seconds` for an answer, then asks the register up to `SETTLE_QUESTIONS` questions, each `TRIES` times at most. A
register that answers at once settles it after `stopped_seconds`. An owner that hangs later is the parent's to notice."""
_CONNECT_SECONDS = 5.0
_moving: set[tuple[int, str, Epoch]] = set()
"""Engine, request and epoch of every move out of this process: in one epoch a request is moved by one caller at a time."""
_moving_lock = threading.Lock()


def should_hand_over(gap_tokens: int, previous_gap_tokens: int | None, *, rounds_left: int, target_gap_tokens: int) -> bool:
    """Whether the source stops now rather than sending another round while it decodes on. Pure; the rule of live migration.

    `gap_tokens` is what the destination lacks, `previous_gap_tokens` what it lacked before the last round (None before the
    first). True once the gap is at most `target_gap_tokens`, once it shrinks no more (the destination catches up no faster than
    the source writes), and when no round is left. ServerlessLLM (OSDI'24) goes on while the gap is more than 20 tokens.
    """
    if gap_tokens <= target_gap_tokens or rounds_left <= 0:
        return True
    return previous_gap_tokens is not None and gap_tokens >= previous_gap_tokens


def migrate(
    engine: Engine,
    request_id: str,
    destination: str | os.PathLike[str] | AnswerChannel,
    *,
    owner: str,
    register: Register,
    mode: Mode | Literal["auto"] = "tokens",
    speeds: Speeds | None = None,
    feed: TokenFeed | None = None,
    options: MoveOptions | None = None,
) -> Report:
    """Moves a running request of `engine`, which `owner` owns at the register, to the engine behind `destination`.

    `destination` is the address of a `MigrationServer`, or a channel to a `MigrationTarget`, closed at the end. `feed` is what
    takes this engine's pieces to the client: it is emptied before the hand-over. The mode "auto" is the faster of "tokens" and
    "kv" by `speeds`, what was measured of destination and link (`choose_mode`). To be called from any thread but the one that
    steps the engine; several requests may move at once. A destination that refuses, dies or is silent is no error: the
    report says who owns the request at the end, and why.

    Raises ModelError for a request that this engine does not run, that `owner` does not own or that is being moved already,
    WireError if the register cannot be asked, and ValueError for a mode that there is not and for "auto" without `speeds`.
    """
    options = options or MoveOptions()
    chosen = resolve_mode(mode, speeds, lambda: len(engine.session(request_id).token_ids))
    held, epoch = register.owner(request_id)
    if held != owner:
        raise ModelError(f"request {request_id!r} is {held or 'nobody'}'s and cannot be moved by {owner}; ask the register for its owner")
    if request_id not in engine.requests or (feed is not None and feed.epoch(request_id) != epoch):
        raise ModelError(f"request {request_id!r} is {owner}'s and does not run: its text has ended, or has yet to begin; there is nothing to move")
    with _one_at_a_time(engine, request_id, epoch):
        try:
            channel = destination if isinstance(destination, Channel) else _connected(destination)
        except WireError as error:
            return Report(request_id, chosen, "stayed", owner, epoch, f"the source goes on: {error}", [])
        try:
            return Source(
                engine, request_id, channel, owner=owner, epoch=epoch, register=register, feed=feed, mode=chosen, options=options, decide=should_hand_over
            ).run()
        finally:
            channel.close()


@contextmanager
def _one_at_a_time(engine: Engine, request_id: str, epoch: Epoch) -> Iterator[None]:
    move = id(engine), request_id, epoch
    with _moving_lock:
        if move in _moving:
            raise ModelError(f"request {request_id!r} is being moved already; wait for the report of that move")
        _moving.add(move)
    try:
        yield
    finally:
        with _moving_lock:
            _moving.discard(move)


def _connected(address: str | os.PathLike[str]) -> AnswerChannel:
    return Channel(connect(address, timeout=_CONNECT_SECONDS), Answer, name="the destination")
