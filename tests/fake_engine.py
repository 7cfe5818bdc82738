"""An engine that moves, without a model: the next token is a hash of all tokens and the seed, and the KV of a token is a hash of
the tokens up to it. So a token or a byte that is lost, doubled or out of place changes everything after it, and the
whole text that a request must give is known beforehand: `whole_text`.

It keeps the contract of `Engine` to the letter and fails on any call that breaks it. Run as a program it is a worker
around such an engine, in a process of its own, that can be told at which message to die (`sllm_mini.lab.moving.dying`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import ModelError
from sllm_mini.inference.session import Session
from sllm_mini.inference.turns import Turns

if TYPE_CHECKING:
    import torch

KV_NBYTES = 16
VOCABULARY = 251
EOS = 0


@functools.lru_cache(maxsize=1 << 16)
def next_token(token_ids: tuple[int, ...], seed: int) -> int:
    return int.from_bytes(_hash(b"token%d" % seed, token_ids)[:4], "little") % VOCABULARY


@functools.lru_cache(maxsize=1 << 16)
def kv_of(token_ids: tuple[int, ...]) -> bytes:
    return _hash(b"kv", token_ids)[:KV_NBYTES]


def _hash(kind: bytes, token_ids: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(kind + b"".join(token.to_bytes(4, "little") for token in token_ids)).digest()


def text_of(new_ids: tuple[int, ...], *, ended: bool) -> str:
    """What has been said after these tokens: one character a token, but one token in five waits for the next, as the first
    bytes of a character do."""
    shown = len(new_ids)
    while not ended and shown and new_ids[shown - 1] % 5 == 1:
        shown -= 1
    return "".join(chr(0xE0 + token % 60) for token in new_ids[:shown])


def scores_of(token_ids: tuple[int, ...], seed: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """What is told of the probability of the token that follows these, and of the `count` likeliest: it is the second of them."""
    token = next_token(token_ids, seed)
    scored = [((token + 7 * place - 7) % VOCABULARY, -(place + 1) - _hash(b"score", token_ids)[0] / 256) for place in range(max(count, 2))]
    return scored[1][1], tuple(scored[:count])


def whole_text(session: Session) -> tuple[tuple[int, ...], str, str]:
    """The new tokens, the text and the finish of a request that nothing disturbs."""
    token_ids = session.token_ids
    while True:
        token_ids = (*token_ids, next_token(token_ids, session.sampling.seed))
        new_ids = token_ids[session.prompt_length :]
        if session.stop_at_eos and new_ids[-1] == EOS:
            return new_ids, text_of(new_ids, ended=True), "eos"
        if len(new_ids) == session.max_new_tokens:
            return new_ids, text_of(new_ids, ended=True), "length"


@dataclass(frozen=True)
class FakePiece:
    token_id: int
    text: str
    seconds: float
    position: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    vector: bytes | None = None


@dataclass
class FakeGeneration(Iterator[FakePiece]):
    request_id: str
    token_ids: list[int]
    prompt_length: int
    finish: str | None = None
    error: Exception | None = None

    def __next__(self) -> FakePiece:
        if self.error is not None:
            raise self.error
        raise StopIteration


@dataclass
class _Request:
    session: Session
    kv: bytearray = field(default_factory=bytearray)
    generation: FakeGeneration | None = None
    """None for a guest."""
    on_piece: Callable[[Any], None] | None = None
    held: bool = False

    @property
    def cached(self) -> int:
        return len(self.kv) // KV_NBYTES


class FakeEngine:
    """See the module. `calls` counts what a move did here; `step_seconds` is what a step takes."""

    kv_nbytes_per_token = KV_NBYTES

    def __init__(self, name: str = "fake", *, step_seconds: float = 0.0) -> None:
        self.name = name
        self.step_seconds = step_seconds
        self.kv_at_adoption: dict[str, tuple[int, bytes]] = {}
        self._turn = Turns()
        self._all: dict[str, _Request] = {}

    @property
    def requests(self) -> tuple[str, ...]:
        with self._turn:
            return tuple(name for name, request in self._all.items() if request.generation)

    @property
    def guests(self) -> tuple[str, ...]:
        with self._turn:
            return tuple(name for name, request in self._all.items() if not request.generation)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        with self._turn:
            yield

    def encode(self, prompt: str) -> list[int]:
        return [ord(character) % VOCABULARY for character in prompt]

    def step(self) -> bool:
        with self._turn:
            ready = [request for request in self._all.values() if request.generation and not request.held]
            if ready and self.step_seconds:
                time.sleep(self.step_seconds)
            for request in ready:
                self._decode(request)
        return bool(ready)

    def _decode(self, request: _Request) -> None:
        session, generation = request.session, request.generation
        assert generation is not None and request.on_piece is not None
        self._compute(request, session.token_ids)
        before = text_of(session.new_ids, ended=False)
        token = next_token(session.token_ids, session.sampling.seed)
        token_ids = (*session.token_ids, token)
        new_ids = token_ids[session.prompt_length :]
        if session.stop_at_eos and token == EOS:
            generation.finish = "eos"
        elif len(new_ids) == session.max_new_tokens:
            generation.finish = "length"
        text = text_of(new_ids, ended=generation.finish is not None)
        request.session = replace(session, token_ids=token_ids, emitted_text_nchars=len(text), held_text="")
        generation.token_ids.append(token)
        if generation.finish:
            del self._all[session.request_id]
        scores = () if session.logprobs is None else scores_of(session.token_ids, session.sampling.seed, session.logprobs)
        request.on_piece(FakePiece(token, text[len(before) :], 0.0, len(token_ids) - 1, *scores))

    def _compute(self, request: _Request, token_ids: tuple[int, ...]) -> None:
        for end in range(request.cached + 1, len(token_ids) + 1):
            request.kv += kv_of(token_ids[:end])

    def session(self, request_id: str) -> Session:
        with self._turn:
            return self._running(request_id).session

    def hold(self, request_id: str) -> None:
        with self._turn:
            self._running(request_id).held = True

    def release(self, request_id: str) -> None:
        with self._turn:
            request = self._running(request_id)
            assert request.held, "released, and was not held"
            request.held = False

    def kv_length(self, request_id: str) -> int:
        with self._turn:
            return self._all[request_id].cached

    def read_kv(self, request_id: str, start: int, stop: int) -> torch.Tensor:
        import torch

        with self._turn:
            request = self._running(request_id)
            assert 0 <= start < stop <= request.cached, (start, stop, request.cached)
            return torch.frombuffer(bytearray(request.kv[start * KV_NBYTES : stop * KV_NBYTES]), dtype=torch.uint8)

    def prepare(self, session: Session) -> None:
        with self._turn:
            if session.model != self.name:
                raise ModelError(f"the session is of {session.model!r} and this engine runs {self.name!r}")
            if session.request_id in self._all:
                raise ModelError(f"request {session.request_id!r} is here already")
            self._all[session.request_id] = _Request(replace(session, token_ids=session.token_ids))

    def absorb(self, request_id: str, token_ids: list[int]) -> None:
        with self._turn:
            guest = self._guest(request_id)
            known = guest.session.token_ids[: guest.cached]
            self._compute(guest, (*known, *token_ids))
            # A guest's session is replaced by the final one; until then it shows what was absorbed.
            guest.session = replace(guest.session, token_ids=(*known, *token_ids), prompt_length=1, max_new_tokens=1 << 20)

    def write_kv(self, request_id: str, start: int, data: torch.Tensor) -> None:
        with self._turn:
            guest = self._guest(request_id)
            assert start == guest.cached and data.numel() and data.numel() % KV_NBYTES == 0
            guest.kv += bytes(data.numpy())

    def adopt(self, session: Session, *, on_piece: Callable[[Any], None] | None = None) -> Any:
        with self._turn:
            guest = self._all.pop(session.request_id, None) or _Request(session)
            assert guest.generation is None, "adopted, and ran already"
            ids = session.token_ids
            self.kv_at_adoption[session.request_id] = (guest.cached, bytes(guest.kv))
            assert guest.cached < len(ids) and guest.kv == b"".join(kv_of(ids[:end]) for end in range(1, guest.cached + 1)), "another request's KV"
            said = len(text_of(session.new_ids, ended=False))
            assert session.emitted_text_nchars == said, (session.emitted_text_nchars, said)
            if session.new_ids:
                self._compute(guest, ids[:-1])
            generation = FakeGeneration(session.request_id, list(ids), session.prompt_length)
            self._all[session.request_id] = _Request(session, guest.kv, generation, on_piece)
            return generation

    def drop(self, request_id: str, finish: str = "cancelled") -> bool:
        with self._turn:
            request = self._all.pop(request_id, None)
            if request is not None and request.generation:
                request.generation.finish = finish
            return request is not None

    def _running(self, request_id: str) -> _Request:
        request = self._all.get(request_id)
        if request is None or request.generation is None:
            raise ModelError(f"request {request_id!r} does not run here")
        return request

    def _guest(self, request_id: str) -> _Request:
        request = self._all.get(request_id)
        if request is None or request.generation:
            raise ModelError(f"request {request_id!r} is no guest here")
        return request


def make(begin: Any) -> Any:
    """The engine of a worker process: its step takes what a small model's would. Named after the weights that a rung names."""
    if "WITH_TORCH" in os.environ:  # else the first block would wait for seconds until it is imported
        import torch  # noqa: F401
    return FakeEngine(getattr(begin, "digest", "") or "fake", step_seconds=0.002)


if __name__ == "__main__":
    from sllm_mini.lab.moving.dying import main

    main(sys.argv[1:], make)
