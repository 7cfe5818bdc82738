"""The destination of a move: takes a guest in, claims it, and goes on with it. Explained in chapter 07.

A guest has a slot and grows a KV cache, by recomputing tokens or by being given blocks, between the steps of the requests
that run. It begins to decode only once the register has said that it belongs here. Whatever goes wrong before, the guest
is forgotten and the source goes on; a conversation that breaks off forgets it too. Memory: the guest's KV cache, and one
message of it at a time.
"""

from __future__ import annotations

import os
from contextlib import suppress

from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.migration import messages
from sllm_mini.inference.ownership.feed import Speaker, TokenFeed
from sllm_mini.inference.ownership.register import Register
from sllm_mini.inference.session import Session
from sllm_mini.types import Epoch
from sllm_mini.wire import Channel, Connections

GUEST_SECONDS = 60.0
"""A source that is silent for so long is given up, and its guest forgotten."""
SEND_SECONDS = 10.0
FIRST_TOKEN_SECONDS = 10.0
"""How long `Await` is answered late for; the source asks again if it wants to."""
MAX_PAYLOAD_NBYTES = 1 << 30
"""The largest payload that is taken: a source splits what is larger into several messages."""

RequestChannel = Channel[messages.Request]


class MigrationTarget:
    """One conversation that may end with a request running on the engine of `feed`, owned by `owner`.

    `serve` runs until the conversation is over. One thread; the engine may be stepped by another.
    """

    def __init__(self, channel: RequestChannel, *, owner: str, register: Register, feed: TokenFeed) -> None:
        self._channel = channel
        self._owner = owner
        self._register = register
        self._feed = feed
        self._engine = feed.engine
        self._guest: Session | None = None
        """As it came last; None before it came, once it is adopted, and after it was forgotten."""
        self._length = 0
        self._speaker: Speaker | None = None
        self._served: messages.Answer | None = None

    def serve(self) -> None:
        """Answers until the source closes the channel. Raises WireError for a conversation that breaks its protocol."""
        try:
            while True:
                received = self._channel.receive(GUEST_SECONDS, into=self._memory)
                request = received.message
                if self._served is None or request.sequence != self._served.sequence:
                    expected = 1 if self._served is None else self._served.sequence + 1
                    if request.sequence != expected:
                        raise WireError(f"request {request.sequence} came where {expected} was expected; the source lost its place")
                    self._served = self._serve(request, received.payload or memoryview(b""))
                self._channel.send(self._served, timeout=SEND_SECONDS)
        finally:
            self._forget()

    def _serve(self, request: messages.Request, payload: memoryview) -> messages.Answer:
        try:
            return self._answer(request, payload)
        except Exception as error:  # noqa: BLE001 - it is told to the source, whose request goes on there
            self._forget()
            return messages.Failed(request.sequence, self._owner, str(error)[:8000])

    def _answer(self, request: messages.Request, payload: memoryview) -> messages.Answer:
        number = request.sequence
        if isinstance(request, messages.Begin):
            self._begin(request, payload)
        elif isinstance(request, messages.Tokens):
            self._absorb(request.start, request.token_ids)
        elif isinstance(request, messages.Blocks):
            self._write(request.start, request.count, payload)
        elif isinstance(request, messages.HandOver):
            return messages.Took(number, self._owner, self._take(request, payload))
        else:
            if self._speaker is None:
                raise WireError("the source waits for the first token of a request that it did not hand over")
            return messages.Resumed(number, self._speaker.wait(FIRST_TOKEN_SECONDS))
        return messages.Has(number, self._length)

    def _begin(self, request: messages.Begin, payload: memoryview) -> None:
        session = Session.from_bytes(bytes(payload))
        if self._guest is not None or self._speaker is not None:
            raise WireError("a conversation moves one request; open another for the next")
        if session.request_id != request.request_id:
            raise WireError(f"request {request.request_id!r} came with the session of {session.request_id!r}")
        if session.request_id in self._engine.requests and self._register.owner(session.request_id).owner == self._owner:
            raise ModelError(f"request {session.request_id!r} is there already: it is {self._owner}'s; name another destination")
        self._engine.prepare(session)
        self._guest = session

    def _absorb(self, start: int, token_ids: list[int]) -> None:
        guest = self._expect(start)
        self._engine.absorb(guest.request_id, token_ids)
        self._length += len(token_ids)

    def _write(self, start: int, count: int, payload: memoryview) -> None:
        guest = self._expect(start)
        if payload.nbytes != count * self._engine.kv_nbytes_per_token:
            raise WireError(f"the KV of {count} tokens came as {payload.nbytes:,} bytes; this model has {self._engine.kv_nbytes_per_token:,} a token")
        if count:
            import torch

            self._engine.write_kv(guest.request_id, start, torch.frombuffer(payload, dtype=torch.uint8))
            self._length += count

    def _take(self, request: messages.HandOver, payload: memoryview) -> Epoch | None:
        """Completes the guest, claims it, and lets it decode; None if somebody else has claimed it."""
        guest = self._expect(request.start if request.count else self._length)
        final = Session.from_bytes(bytes(payload[: request.session_nbytes]))
        if final.request_id != guest.request_id or final.token_ids[: len(guest.token_ids)] != guest.token_ids:
            raise WireError(f"the final session does not go on from the one that request {guest.request_id!r} came with")
        self._write(request.start, request.count, payload[request.session_nbytes :])
        epoch = self._register.claim(final.request_id, self._owner, request.epoch)
        if epoch is None:
            self._forget()
            return None
        try:
            self._speaker = self._feed.adopt(final, epoch, guest=True)
        except BaseException:
            with suppress(WireError):  # the source, which is told that this failed, claims it back in any case
                self._register.release(final.request_id, self._owner, epoch)
            raise
        self._guest = None
        return epoch

    def _expect(self, start: int) -> Session:
        if self._guest is None:
            raise WireError("there is no guest; a move begins with Begin and ends with its hand-over")
        if start != self._length:
            raise WireError(f"tokens from {start} came where {self._length} was expected; the source lost its place")
        return self._guest

    def _memory(self, request: messages.Request, nbytes: int) -> bytearray:
        if nbytes > MAX_PAYLOAD_NBYTES or not isinstance(request, (messages.Begin, messages.Blocks, messages.HandOver)):
            raise WireError(f"{type(request).__name__} came with {nbytes:,} bytes; split it, or use one sllm_mini on both sides")
        return bytearray(nbytes)

    def _forget(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        with self._engine.between_steps():
            if guest.request_id not in self._engine.requests:  # else it was begun again here, without this conversation
                self._engine.drop(guest.request_id)


class MigrationServer:
    """Takes moves in at `address` until `close`: each connection is one move, several at a time. Raises WireError if the
    address cannot be had. `register` and `feed` are the caller's; any thread may call `close`."""

    def __init__(self, address: str | os.PathLike[str], *, owner: str, register: Register, feed: TokenFeed) -> None:
        def talk(channel: RequestChannel) -> None:
            MigrationTarget(channel, owner=owner, register=register, feed=feed).serve()

        self._connections: Connections[messages.Request] = Connections(address, messages.Request, talk, name="sllm-move")
        self.address = self._connections.address
        self.close = self._connections.close

    def __enter__(self) -> MigrationServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
