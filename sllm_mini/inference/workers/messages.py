"""What the parent of a worker process says to it, and the answers. Explained in chapter 07.

Orders carry a number and are answered once, by what their docstring names or by `Failed`, in whatever order they are done:
a move takes as long as it takes. Tokens do not come this way but through the ledger.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sllm_mini.inference.migration.messages import MAX_TOKENS, Mode, Report, TokenId
from sllm_mini.inference.ownership.messages import Count, OwnerName, RequestName
from sllm_mini.wire import Message

Path = Annotated[str, Meta(min_length=1, max_length=4096)]
Seconds = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=1 << 19)]
Number = Annotated[int, Meta(ge=1, le=2**53 - 1)]


class Open(Message, frozen=True):
    """The first order: load `checkpoint` onto `device` and take moves in at `address`. `arbiter` is where the register and the
    ledger are asked, `owner` this worker's name there; `pace_seconds` is slept after each step, so that a text can be
    watched. Answered by `Opened`."""

    number: Number
    checkpoint: Path
    device: Annotated[str, Meta(min_length=1, max_length=64)]
    owner: OwnerName
    address: Path
    arbiter: Path
    threads: Annotated[int, Meta(ge=1, le=1024)]
    max_batch: Annotated[int, Meta(ge=1, le=4096)]
    pace_seconds: Seconds


class Encode(Message, frozen=True):
    """Answered by `Encoded`."""

    number: Number
    prompt: Text


class Run(Message, frozen=True):
    """A request begins here, or begins again, in that epoch. Payload: its session. Answered by `Done`."""

    number: Number
    epoch: Count


class Move(Message, frozen=True):
    """A request goes to the worker that takes moves in at `address`. Answered by `Moved`."""

    number: Number
    request_id: RequestName
    address: Path
    mode: Mode
    target_gap_tokens: Annotated[int, Meta(ge=1, le=1 << 20)]


class Drop(Message, frozen=True):
    """Nobody wants the request in that epoch any more. Answered by `Done`, also where it is not here."""

    number: Number
    request_id: RequestName
    epoch: Count


class Ping(Message, frozen=True):
    """Is the process alive? Answered by `Alive` at once, whatever else is being done."""

    number: Number


Order = Open | Encode | Run | Move | Drop | Ping


class Opened(Message, frozen=True):
    """The worker is ready. `model` names the weights."""

    number: Number
    model: Annotated[str, Meta(max_length=256)]


class Encoded(Message, frozen=True):
    number: Number
    token_ids: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]


class Moved(Message, frozen=True):
    number: Number
    report: Report


class Done(Message, frozen=True):
    number: Number


class Alive(Message, frozen=True):
    """The process answers. `stuck_seconds` says for how long a step has not ended that could have; see `EngineService`."""

    number: Number
    stuck_seconds: Seconds


class Failed(Message, frozen=True):
    """`kind` is the name of a class of `sllm_mini.errors`."""

    number: Number
    kind: Annotated[str, Meta(max_length=200)]
    message: Annotated[str, Meta(max_length=8192)]


Answer = Opened | Encoded | Moved | Done | Alive | Failed
