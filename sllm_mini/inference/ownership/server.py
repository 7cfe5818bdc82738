"""The arbiter and the ledger for other processes, on a Unix socket: the side that has them and the side that asks (chapter 07).

Costs one small message each way per question: about 0.1 ms. Tokens go in batches, so a batch of requests costs as much.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

from sllm_mini.errors import WireError
from sllm_mini.inference.ownership import messages
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.lines import Lines
from sllm_mini.inference.ownership.register import EpochRegister, Ownership
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel, Connections, connect

ANSWER_SECONDS = 2.0
"""How long an answer may take, finding the arbiter included; it only looks into a dictionary."""
_VECTORS_NBYTES = 256 << 10
"""Of embeddings that go in one message with one more."""
TRIES = 2
"""How often a question is asked."""
_A = TypeVar("_A", bound=messages.Answer)


class OwnershipServer:
    """Serves a register and a ledger, which it does not own, from the moment it is made until `close`; with `lines`, owners may be given
    requests over theirs.

    Any thread may call `close`. Raises WireError if the address cannot be had.
    """

    def __init__(self, register: EpochRegister, ledger: TokenLedger, address: str | os.PathLike[str], lines: Lines | None = None) -> None:
        self._register = register
        self._ledger = ledger
        self._lines = lines
        self._connections: Connections[messages.Request] = Connections(address, messages.Request, self._talk, name="sllm-arbiter")
        self.address = self._connections.address
        self.close = self._connections.close

    def __enter__(self) -> OwnershipServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _talk(self, channel: Channel[messages.Request]) -> None:
        while True:
            request = channel.receive().message
            if isinstance(request, messages.Serve) and self._lines is not None:
                return self._lines.serve(request.owner, channel)
            channel.send(self._answer(request), timeout=ANSWER_SECONDS)

    def _answer(self, request: messages.Request) -> messages.Answer:
        if isinstance(request, messages.Deliver):
            return messages.Verdicts(self._ledger.deliver(request.tokens))
        if isinstance(request, messages.Claim):
            return messages.Claimed(self._register.claim(request.request_id, request.owner, request.expected_epoch, ticket=request.ticket))
        if isinstance(request, messages.Release):
            return messages.Released(self._register.release(request.request_id, request.owner, request.epoch))
        if isinstance(request, messages.GiveUp):
            return messages.Released(self._ledger.give_up(request.request_id, request.epoch, request.reason))
        if isinstance(request, messages.Owner):
            return messages.Owned(*self._register.owner(request.request_id))
        raise WireError(f"nobody here takes {type(request).__name__}")


class OwnershipClient:
    """The register and the ledger of another process: the same questions, over its socket. Safe from several threads.

    Keeps one connection, and asks again on a new one, `TRIES` times in all, if it broke or was silent for `ANSWER_SECONDS`.
    Raises WireError if that fails too: then nobody knows whether what was asked for has happened.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.address = os.fspath(address)
        self._lock = threading.Lock()
        self._channel: Channel[messages.Answer] | None = None

    def owner(self, request_id: str) -> Ownership:
        """See `EpochRegister.owner`."""
        found = self._ask(messages.Owner(request_id), messages.Owned)
        return Ownership(found.owner, Epoch(found.epoch))

    def claim(self, request_id: str, owner: str, expected_epoch: int, *, ticket: int | None = None) -> Epoch | None:
        """See `EpochRegister.claim`; without a ticket it draws one, since it may have to ask twice."""
        ticket = secrets.randbits(52) if ticket is None else ticket
        epoch = self._ask(messages.Claim(request_id, owner, expected_epoch, ticket), messages.Claimed).epoch
        return None if epoch is None else Epoch(epoch)

    def release(self, request_id: str, owner: str, epoch: int) -> bool:
        """See `EpochRegister.release`."""
        return self._ask(messages.Release(request_id, owner, epoch), messages.Released).done

    def deliver(self, tokens: Sequence[messages.Token]) -> list[messages.Verdict]:
        """See `TokenLedger.deliver`."""
        verdicts: list[messages.Verdict] = []
        together: list[messages.Token] = []
        for token in tokens:
            if len(together) == messages.MAX_TOKENS or (token.vector is not None and sum(len(each.vector or b"") for each in together) > _VECTORS_NBYTES):
                verdicts += self._ask(messages.Deliver(together), messages.Verdicts).verdicts
                together = []
            together.append(token)
        return verdicts + self._ask(messages.Deliver(together), messages.Verdicts).verdicts if together else verdicts

    def give_up(self, request_id: str, epoch: int, reason: str) -> bool:
        """See `TokenLedger.give_up`."""
        return self._ask(messages.GiveUp(request_id, epoch, reason[:8000]), messages.Released).done

    def close(self) -> None:
        """Ends the connection; a later question opens another."""
        with self._lock:
            self._hang_up()

    def __enter__(self) -> OwnershipClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: messages.Request, kind: type[_A]) -> _A:
        with self._lock:
            for _ in range(TRIES - 1):
                with suppress(WireError):
                    return self._ask_once(request, kind)
            return self._ask_once(request, kind)

    def _ask_once(self, request: messages.Request, kind: type[_A]) -> _A:
        end = time.monotonic() + ANSWER_SECONDS
        try:
            if self._channel is None:
                self._channel = Channel(connect(self.address, timeout=ANSWER_SECONDS), messages.Answer, name="the arbiter")
            self._channel.send(request, timeout=max(end - time.monotonic(), 0.0))
            answer = self._channel.receive(max(end - time.monotonic(), 0.0)).message
            if not isinstance(answer, kind):
                raise WireError(f"the arbiter at {self.address} answered {type(answer).__name__} to {type(request).__name__}; use one sllm_mini on both sides")
            return answer
        except WireError:
            self._hang_up()  # an answer that comes late must not be taken for the next one
            raise

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
