"""What the two ends of a move say to each other, and the report of it. Explained in chapter 07.

The source asks and the destination answers. Every request carries the next number of its conversation, and its answer the
same: a request that was not answered in time is sent again under its number, and the destination answers a number that it
has served already from memory. So a message that is lost, on either way, is said twice and done once.

    Begin       prepare(session)                               → Has
    Tokens      absorb the next tokens (mode "tokens")         → Has       any number of times, while the source decodes on
    Blocks      put KV of the next tokens in place (mode "kv") → Has       likewise
    HandOver    the final session, and what KV is missing      → Took
    Await       when did the first token come?                 → Resumed

Any request may be answered `Failed`, which ends the move; a source that changes its mind closes the channel. One
conversation moves one request.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sllm_mini.inference.ownership.messages import Count, OwnerName, RequestName
from sllm_mini.wire import Message

Mode = Literal["tokens", "kv", "stop_and_copy"]
"""Recompute in rounds, copy in rounds, or stop, copy all of the KV cache and go on."""

Outcome = Literal["moved", "stayed", "ended"]
"""Another engine has the request; this one still has it; or its text ended (or was cancelled) before it could move."""

MAX_TOKENS = 1 << 16
"""Tokens in one message."""
Sequence = Annotated[int, Meta(ge=1, le=2**53 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=8192)]


class Begin(Message, frozen=True):
    """A request wants to come. Payload: its session as of now."""

    sequence: Sequence
    request_id: RequestName


class Tokens(Message, frozen=True):
    """Tokens `[start, start + len(token_ids))` of the sequence."""

    sequence: Sequence
    start: Count
    token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_TOKENS)]


class Blocks(Message, frozen=True):
    """Payload: the KV of tokens `[start, start + count)`, laid out as `Engine.read_kv` says."""

    sequence: Sequence
    start: Count
    count: Count


class HandOver(Message, frozen=True):
    """The source has stopped. Payload: the final session in `session_nbytes`, then the KV of tokens `[start, start + count)`.
    The request is the destination's if it can claim `epoch` + 1."""

    sequence: Sequence
    epoch: Count
    session_nbytes: Count
    start: Count = 0
    count: Count = 0


class Await(Message, frozen=True):
    sequence: Sequence


Request = Begin | Tokens | Blocks | HandOver | Await


class Has(Message, frozen=True):
    """The destination has the KV of that many tokens."""

    sequence: Sequence
    length: Count


class Took(Message, frozen=True):
    """`owner`, the destination, has the request since `epoch`; None if somebody else claimed it first, and the guest is forgotten."""

    sequence: Sequence
    owner: OwnerName
    epoch: Count | None


class Resumed(Message, frozen=True):
    """When the destination gave its first token, on the machine's monotonic clock; None if it has not yet."""

    sequence: Sequence
    at: Seconds | None


class Failed(Message, frozen=True):
    """One sentence: why the request cannot come. The destination has forgotten the guest, and does not run the request even
    where the register says that it is `owner`'s, its own: the answer to its claim may have been lost."""

    sequence: Sequence
    owner: OwnerName
    message: Text


Answer = Has | Took | Resumed | Failed


class Phase(Message, frozen=True):
    """One stretch of a move on the machine's monotonic clock, and what was sent in it.

    "begin", any number of "round", "stop" (the source holds the request and its last tokens reach the ledger), "copy" (what
    is sent after the stop besides the hand-over), "hand over", "resume" (until the destination's first token).
    """

    name: Literal["begin", "round", "stop", "copy", "hand over", "resume"]
    start: Seconds
    end: Seconds
    tokens: Count = 0
    nbytes: Count = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Report(Message, frozen=True):
    """How a move went: who owns the request at its end, since which epoch, and why, with every phase of it.

    `last_step_at` is the end of the source's last step of this request, `first_token_at` of the destination's first.
    """

    request_id: RequestName
    mode: Mode
    outcome: Outcome
    owner: OwnerName | None
    epoch: Count
    reason: Text
    phases: list[Phase]
    last_step_at: Seconds | None = None
    first_token_at: Seconds | None = None

    @property
    def rounds(self) -> int:
        """Rounds before the stop."""
        return sum(phase.name == "round" for phase in self.phases)

    @property
    def nbytes(self) -> int:
        """Session, tokens and KV that were sent, without framing."""
        return sum(phase.nbytes for phase in self.phases)

    @property
    def pause_seconds(self) -> float | None:
        """From the source's last step of the request to the destination's first; None if it did not move."""
        if self.last_step_at is None or self.first_token_at is None:
            return None
        return self.first_token_at - self.last_step_at
