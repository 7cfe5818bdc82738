"""What is asked of the arbiter and of the ledger over their socket. Explained in chapter 07.

Each request is answered once, on its own connection and in order. All may be asked twice with the effect of once, which
is why a client whose connection broke opens another and asks again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sllm_mini.wire import Message

RequestName = Annotated[str, Meta(min_length=1, max_length=200)]
OwnerName = Annotated[str, Meta(min_length=1, max_length=200)]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Text = Annotated[str, Meta(max_length=16384)]
Finish = Literal["eos", "length", "stop", "cancelled"]
Verdict = Literal["taken", "had", "stale", "refused"]
"""What the ledger says to a token: "had" to an exact repeat, "stale" to one of an epoch that is over, "refused" to one that
leaves a gap, contradicts an earlier one, or comes after the end."""

MAX_VECTOR_NBYTES = 1 << 16
MAX_TOKENS = 256
"""Tokens in one delivery; the texts of so many stay far below what a channel takes."""


class Token(Message, frozen=True, omit_defaults=True):
    """One token of a request's text, as the owner in `epoch` gave it; the last one says how the text ended. Where the request asks for it: the
    natural logarithm of its probability and of those of the likeliest tokens, or the prompt's embedding (see `inference.requests`)."""

    request_id: RequestName
    epoch: Count
    position: Count
    token_id: Count
    text: Text
    finish: Finish | None = None
    logprob: float | None = None
    top: Annotated[tuple[tuple[Count, float], ...], Meta(max_length=20)] = ()
    vector: Annotated[bytes, Meta(max_length=MAX_VECTOR_NBYTES)] | None = None


class Owner(Message, frozen=True):
    """Answered by `Owned`."""

    request_id: RequestName


class Claim(Message, frozen=True):
    """Answered by `Claimed`."""

    request_id: RequestName
    owner: OwnerName
    expected_epoch: Count
    ticket: Count | None


class Release(Message, frozen=True):
    """Answered by `Released`."""

    request_id: RequestName
    owner: OwnerName
    epoch: Count


class Deliver(Message, frozen=True):
    """Tokens for the ledger, of any requests. Answered by `Verdicts`, one each."""

    tokens: Annotated[list[Token], Meta(max_length=MAX_TOKENS)]


class GiveUp(Message, frozen=True):
    """The owner in `epoch` cannot go on. Answered by `Released`, as `TokenLedger.give_up` says."""

    request_id: RequestName
    epoch: Count
    reason: Annotated[str, Meta(max_length=8192)]


class Serve(Message, frozen=True):
    """This connection is a line of `owner`'s from now on: requests that become its own come over it, as `Begin`, and nothing else is asked."""

    owner: OwnerName


class Begun(Message, frozen=True):
    """The answer to the `Begin` of that number: the owner has taken the request, or (`done` is False) could not."""

    number: Count
    done: bool


Request = Owner | Claim | Release | Deliver | GiveUp | Serve | Begun


class Owned(Message, frozen=True):
    owner: OwnerName | None
    epoch: Count


class Claimed(Message, frozen=True):
    """The new epoch; None for whoever came too late."""

    epoch: Count | None


class Released(Message, frozen=True):
    done: bool


class Verdicts(Message, frozen=True):
    verdicts: Annotated[list[Verdict], Meta(max_length=MAX_TOKENS)]


Answer = Owned | Claimed | Released | Verdicts


class Begin(Message, frozen=True):
    """Over a line: a request begins at its owner, or begins again, in that epoch. Payload: its session. Answered by `Begun`."""

    number: Count
    epoch: Count
