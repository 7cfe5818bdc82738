"""The source's end of a conversation: numbered requests, said again until they are answered. Explained in chapter 07."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from sllm_mini.errors import WireError
from sllm_mini.inference.migration import messages
from sllm_mini.wire import Channel, WireTimeout
from sllm_mini.wire.channel import BytesLike

TRIES = 3
"""How often a request is said before its conversation is given up."""
_A = TypeVar("_A", bound=messages.Answer)

AnswerChannel = Channel[messages.Answer]


class MoveRefused(WireError):
    """The destination, `owner` at the register, does not take the request, for the reason given."""

    def __init__(self, reason: str, owner: str) -> None:
        super().__init__(reason)
        self.owner = owner


class Link:
    """Asks over `channel`, which serves this one conversation. One thread at a time."""

    def __init__(self, channel: AnswerChannel) -> None:
        self._channel = channel
        self._sequence = 0

    def next(self) -> int:
        """The number that the next request must carry."""
        self._sequence += 1
        return self._sequence

    def ask(self, request: messages.Request, kind: type[_A], *, seconds: float, payload: Sequence[BytesLike] | None = None) -> _A:
        """The answer, after as many as `TRIES` tries that share the time.

        Raises MoveRefused for `Failed`, WireError for an answer of another kind, for silence, and for a destination that is gone.
        """
        end = time.monotonic() + seconds
        tries_left = TRIES
        while True:
            patience = max(end - time.monotonic(), 0.0) / tries_left
            tries_left -= 1
            try:
                self._channel.send(request, payload=payload, timeout=patience)
                answer = self._receive(request.sequence, patience)
            except WireTimeout as timeout:
                if timeout.ended or not tries_left:
                    raise
                continue
            if isinstance(answer, messages.Failed):
                raise MoveRefused(answer.message, answer.owner)
            if not isinstance(answer, kind):
                raise WireError(f"the destination answered {type(answer).__name__} to {type(request).__name__}; use one sllm_mini on both sides")
            return answer

    def _receive(self, sequence: int, patience: float) -> messages.Answer:
        deadline = time.monotonic() + patience
        while True:
            answer = self._channel.receive(max(deadline - time.monotonic(), 0.0)).message
            if answer.sequence == sequence:
                return answer
            if answer.sequence > sequence:
                raise WireError(f"the destination answered request {answer.sequence}, which was not asked yet")
            # An answer that was slow and then repeated: it has served its turn.
