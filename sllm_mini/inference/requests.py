"""One request: its tokens, what it may still become, and the stream of pieces that a reader takes from it.

The engine steps requests, a `Generation` is what the caller holds of one. Pieces wait in the request until they are
read, so a slow reader delays nobody. Taught in chapters 04 and 07.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from sllm_mini.inference.sampler import SamplingOptions, choose_tokens, likeliest, penalise, seen_tokens
from sllm_mini.inference.session import Session, Timings
from sllm_mini.inference.stopping import TextStream

if TYPE_CHECKING:
    import torch

Finish = Literal["eos", "length", "stop", "cancelled", "moved"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token. `text` is what it lets out ("" inside a character, while a stop string may still come, or without a
    tokenizer), `seconds` the time since the request, `position` its place in the sequence, prompt included. Where the request asks for it: the
    `logprob` of the token and `top`, the likeliest ones (see `likeliest`), or the prompt's embedding (see `embedding`)."""

    token_id: int
    text: str
    seconds: float
    position: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    vector: bytes | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All that was generated, without the prompt; `finish` says what ended it."""

    text: str
    token_ids: tuple[int, ...]
    timings: Timings
    finish: Finish


OnPiece = Callable[[Piece], None]


class Request:
    """The engine's side of a request. Only the thread that has the engine's turn changes it; `row` is its slot, None
    while it waits or after its end."""

    def __init__(self, session: Session, stop_ids: frozenset[int], text: TextStream | None, on_piece: OnPiece | None, requested: float) -> None:
        self.request_id, self.model = session.request_id, session.model
        self.token_ids = list(session.token_ids)
        self.prompt_length, self.end = session.prompt_length, session.prompt_length + session.max_new_tokens
        self.sampling, self.stop, self.stop_at_eos = session.sampling, session.stop, session.stop_at_eos
        self.logprobs, self.embed = session.logprobs, session.embed
        self.stop_ids = frozenset[int]() if session.embed else stop_ids
        self.text = text
        self.on_piece = on_piece
        self.requested = requested
        self.row: int | None = None
        self.held = False
        self.late = False
        """Its row lacks more than the last token's keys and values: its next step computes them all in one pass."""
        self.seen: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        """Those of the next token until that is taken, where `logprobs` needs them."""
        self.vector: bytes | None = None
        self.pieces: deque[Piece] = deque()
        self.finish: Finish | None = None
        self.error: BaseException | None = None
        self.ended = False
        self.abandoned = False
        before = session.timings
        self.tokenize_seconds, self.queue_seconds, self.load_seconds = before.tokenize_seconds, before.queue_seconds, before.load_seconds
        self.prefill_seconds, self.decode_seconds = before.prefill_seconds, before.decode_seconds
        self.first_token_seconds, self.decode_steps = before.first_token_seconds, before.decode_steps

    @property
    def timings(self) -> Timings:
        return Timings(
            self.tokenize_seconds, self.prefill_seconds, self.decode_seconds, self.first_token_seconds, self.decode_steps, self.queue_seconds, self.load_seconds
        )

    def session(self) -> Session:
        return Session(
            request_id=self.request_id,
            model=self.model,
            token_ids=tuple(self.token_ids),
            prompt_length=self.prompt_length,
            max_new_tokens=self.end - self.prompt_length,
            sampling=self.sampling,
            stop=self.stop,
            stop_at_eos=self.stop_at_eos,
            emitted_text_nchars=self.text.emitted_nchars if self.text else 0,
            held_text=self.text.held if self.text else "",
            timings=self.timings,
            elapsed_seconds=time.perf_counter() - self.requested,
            logprobs=self.logprobs,
            embed=self.embed,
        )

    def take(self, token_id: int) -> Piece:
        """The next token, and what it means for the text and the end. Sets `finish` if this was the last."""
        self.token_ids.append(token_id)
        text = self.text.push(token_id) if self.text else ""
        if self.text and self.text.stopped:
            self.finish = "stop"
        elif token_id in self.stop_ids or len(self.token_ids) >= self.end:
            self.finish = "eos" if token_id in self.stop_ids else "length"
            text += self.text.flush() if self.text else ""
            if self.text and self.text.stopped:
                self.finish = "stop"
        position = len(self.token_ids) - 1
        seconds = time.perf_counter() - self.requested
        if position == self.prompt_length:
            self.first_token_seconds = seconds
        if self.logprobs is None or self.logits is None:
            return Piece(token_id, text, seconds, position, vector=self.vector)
        logits, self.logits = self.logits, None
        return Piece(token_id, text, seconds, position, *likeliest(logits, token_id, self.logprobs))


def next_tokens(requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
    """The next token of each, int64 `[requests]` on the device of `logits` `[requests, vocabulary]`; see `choose_token`."""
    import torch

    if any(request.sampling.repetition_penalty != 1 for request in requests):
        rows = []
        for request, row in zip(requests, logits, strict=True):
            penalty = request.sampling.repetition_penalty
            if penalty != 1:
                if request.seen is None:
                    request.seen = seen_tokens(request.token_ids, row.shape[0], row.device)
                row = penalise(row, request.seen, penalty)
            rows.append(row.float())
        logits = torch.stack(rows)
    return choose_tokens(logits, [request.sampling for request in requests], [len(request.token_ids) for request in requests])


def embedding(states: torch.Tensor) -> bytes:
    """Of a text whose last hidden states, after the final norm, are `states` `[tokens, width]`: their mean, of length 1, as little-endian
    float32. Waits for a GPU."""
    mean = states.float().mean(0)
    return bytes((mean / mean.norm().clamp_min(1e-12)).cpu().numpy().astype("<f4").tobytes())


class Driver(Protocol):
    """What a generation needs of its engine."""

    def pull(self, request: Request) -> Piece | None: ...

    def session(self, request_id: str) -> Session: ...

    def end(self, request: Request, finish: Finish | None) -> None: ...

    def abandon(self, request: Request) -> None: ...


class Generation(Iterator[Piece]):
    """One request in progress: an iterator of its pieces. Whoever asks for a piece that is not there yet runs the engine's
    next steps, for all requests; of several threads one at a time.

    `token_ids` is the sequence so far, prompt included; the cache holds one token fewer. `finish` is None until it
    ends. `close()`, the end, an error, or dropping the object (unless it has an `on_piece`) frees its slot. A request that
    is on hold lets `next` wait. One reader; `cancel`, `close` and `session` may be called from any thread.
    """

    def __init__(self, driver: Driver, request: Request) -> None:
        self._driver, self._request = driver, request

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def token_ids(self) -> list[int]:
        return self._request.token_ids

    @property
    def prompt_length(self) -> int:
        return self._request.prompt_length

    @property
    def sampling(self) -> SamplingOptions:
        return self._request.sampling

    @property
    def finish(self) -> Finish | None:
        return self._request.finish

    @property
    def timings(self) -> Timings:
        """What it took so far."""
        return self._request.timings

    def __next__(self) -> Piece:
        try:
            piece = self._driver.pull(self._request)
        except BaseException:
            self.close()
            raise
        if piece is None:
            raise StopIteration
        return piece

    def session(self) -> Session:
        """Its state as of the last step. Raises ModelError once it has ended."""
        return self._driver.session(self.request_id)

    def cancel(self) -> None:
        """Ends it with finish "cancelled", unless it has ended; pieces that were not read are gone."""
        self._driver.end(self._request, "cancelled")
        self._request.pieces.clear()

    def close(self) -> None:
        """Frees its slot; a further `next` ends the iteration. May be called again."""
        self._driver.end(self._request, None)
        self._request.pieces.clear()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        request: Request | None = getattr(self, "_request", None)
        if request is not None and not request.ended and request.on_piece is None:
            self._driver.abandon(request)


def starts_with(token_ids: Sequence[int], known: Sequence[int | None]) -> bool:
    """Whether a sequence begins with these tokens; None stands for one that is not known."""
    return len(known) <= len(token_ids) and all(one is None or one == other for one, other in zip(known, token_ids, strict=False))
