"""From a prompt to a stream of text: our own prefill and decode loop over a transformers decoder model.

Prefill runs the whole prompt once and gives the first token; each decode step runs one token and gives the next. Per
token the host waits for the device once, to learn the token's id. The loop's own cost beside the model's forward pass
is some tens of microseconds a token. `transformers.generate` is the oracle it is tested against. Taught in chapters
00 and 04.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.device.base import Device
from sllm_mini.errors import ModelError
from sllm_mini.inference.overlap import StreamedModel, stream_model
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.sampler import SamplingOptions, choose_token
from sllm_mini.inference.text import Detokenizer, TextDecoder, load_tokenizer
from sllm_mini.types import SpanRecorder, Warmth

if TYPE_CHECKING:
    import torch

GREEDY = SamplingOptions()


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token. `text` is what it completes ("" inside a character or without a tokenizer), `seconds` the time
    since the request, `position` its place in the sequence, prompt included."""

    token_id: int
    text: str
    seconds: float
    position: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in seconds; the consumer's own time between two tokens is in none of them
    but `first_token_seconds`, which counts from the request to the first token."""

    tokenize_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_steps: int = 0

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a decode step, 0 where there was none."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """All that was generated, without the prompt; `finish` says whether the model ended the text or the limit did."""

    text: str
    token_ids: tuple[int, ...]
    timings: Timings
    finish: Literal["eos", "length"]


class Generation(Iterator[Piece]):
    """One request in progress: an iterator of its pieces. The first `next` is the prefill, each other one decode step.

    `token_ids` is the sequence so far, prompt included; the cache holds one token fewer. `finish` is None until it
    ends by itself. `close()`, the end, an error, or dropping the object frees the cache. One thread at a time.
    """

    def __init__(
        self,
        runner: Runner,
        detokenizer: Detokenizer | None,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingOptions,
        stop_ids: frozenset[int],
        requested: float,
    ) -> None:
        self.token_ids = list(prompt_ids)
        self.prompt_length = len(prompt_ids)
        self.sampling = sampling
        self.finish: Literal["eos", "length"] | None = None
        self._runner = runner
        self._detokenizer = detokenizer
        self._end = self.prompt_length + max_new_tokens
        self._stop_ids = stop_ids
        self._requested = requested
        self._tokenize_seconds = time.perf_counter() - requested
        self._prefill_seconds = self._decode_seconds = self._first_token_seconds = 0.0
        self._cache: Any | None = runner.new_cache()
        self._input: torch.Tensor | None = None

    @property
    def timings(self) -> Timings:
        """What it took so far."""
        steps = max(len(self.token_ids) - self.prompt_length - 1, 0)
        return Timings(self._tokenize_seconds, self._prefill_seconds, self._decode_seconds, self._first_token_seconds, steps)

    def __next__(self) -> Piece:
        if self._cache is None:
            raise StopIteration
        started = time.perf_counter()
        try:
            token_id, text = self._step(self._cache)
        except BaseException:
            self.close()
            raise
        now = time.perf_counter()
        if len(self.token_ids) == self.prompt_length + 1:
            self._prefill_seconds = now - started
            self._first_token_seconds = now - self._requested
        else:
            self._decode_seconds += now - started
        return Piece(token_id, text, now - self._requested, len(self.token_ids) - 1)

    def _step(self, cache: Any) -> tuple[int, str]:
        """Runs the tokens that the cache lacks and takes the next one into the sequence."""
        import torch

        if self._input is None:
            self._input = torch.tensor([self.token_ids], device=self._runner.device)
        logits = self._runner.forward(self._input, cache, len(self.token_ids))
        chosen = choose_token(logits, self.sampling, len(self.token_ids))
        token_id = int(chosen)  # the one wait for the device
        if token_id >= logits.shape[0]:
            raise ModelError(
                f"{self._runner.name} gave logits that are not finite at position {len(self.token_ids)}; "
                "verify the checkpoint, or load it in bfloat16 or float32 if it was in float16"
            )
        self.token_ids.append(token_id)
        text = self._detokenizer.push(token_id) if self._detokenizer else ""
        if token_id in self._stop_ids:
            self.finish = "eos"
        elif len(self.token_ids) == self._end:
            self.finish = "length"
        if self.finish is None:
            # The token is on its device already, so the next step needs no copy from the host.
            self._input = chosen.to(self._runner.device).view(1, 1)
        else:
            text += self._detokenizer.flush() if self._detokenizer else ""
            self.close()
        return token_id, text

    def close(self) -> None:
        """Frees the cache; a further `next` ends the iteration. May be called again."""
        self._cache = None
        self._input = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Engine:
    """A model, with its tokenizer if it has one, ready to answer prompts.

    `streamed` is the load that an engine with overlap began with, None for any other. Raises ModelError for a model it
    cannot run exactly (see `Runner`). One thread at a time; several generations may be
    open and interleaved, each with its own cache.
    """

    def __init__(self, model: Any, tokenizer: Any | None = None) -> None:
        self.runner = Runner(model)
        self.tokenizer = tokenizer
        self.streamed: StreamedModel | None = None
        self._decoder = None if tokenizer is None else TextDecoder(tokenizer)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Checkpoint,
        device: str | Device = "cpu",
        *,
        verify: bool = True,
        overlap: bool = False,
        recorder: SpanRecorder | None = None,
    ) -> Engine:
        """An engine for a checkpoint of ours, on `device`; without tokenizer files, prompts are token ids.

        Reads the tokenizer first, so that a directory that cannot work fails before its weights are read. `recorder`
        gets the span "tokenizer" beside those of `load_model`. With `overlap` it returns while bytes are still being
        read, and each layer of the first prefill waits for its own: `streamed` tells how far the load has come and
        can wait for it or end it; `recorder` gets the spans of `start_load` and `stream_model`. Raises what
        `open_checkpoint` and `load_model` raise, and ModelError; what goes wrong with an overlapped load later is
        raised by the generation.
        """
        from sllm_mini.checkpoint import open_checkpoint
        from sllm_mini.loading import load_model, start_load

        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        with recorder.span("tokenizer", warmth=Warmth.DRAM) if recorder is not None else nullcontext():
            tokenizer = load_tokenizer(checkpoint)
        if not overlap:
            return cls(load_model(checkpoint, device, verify=verify, recorder=recorder), tokenizer)
        loading = start_load(checkpoint, device, verify=verify, recorder=recorder)
        try:
            streamed = stream_model(loading, recorder=recorder)
            engine = cls(streamed.model, tokenizer)
        except BaseException:
            loading.cancel()
            raise
        engine.streamed = streamed
        return engine

    @property
    def model(self) -> Any:
        return self.runner.model

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt; an empty one becomes the model's beginning-of-text token.

        Raises ModelError for text without a tokenizer, ids that are not whole numbers, or an empty prompt where the
        model names no such token.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ModelError("this model came without a tokenizer; give the prompt as token ids")
            token_ids = [int(token_id) for token_id in self.tokenizer(prompt)["input_ids"]]
        else:
            try:
                token_ids = [operator.index(token_id) for token_id in prompt]
            except TypeError as error:
                raise ModelError(f"a prompt is a text or a sequence of token ids; this one is not ({error})") from error
        if not token_ids:
            if self.runner.bos_id is None:
                raise ModelError("the prompt is empty and this model names no beginning-of-text token; give at least one token")
            token_ids = [self.runner.bos_id]
        return token_ids

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingOptions = GREEDY,
        stop_at_eos: bool = True,
    ) -> Generation:
        """Starts a request: an iterator that gives each token as soon as it is known.

        The prompt is checked here and the model first runs at the first `next`. Ends with the model's end-of-text
        token (given as the last piece) or after `max_new_tokens`. Of the model's generation settings only its end and
        beginning tokens count. Raises ModelError for a prompt the model cannot take, ValueError for a bad limit.
        """
        requested = time.perf_counter()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        prompt_ids = self.encode(prompt)
        self.runner.check_prompt(prompt_ids, max_new_tokens)
        return Generation(
            self.runner,
            None if self._decoder is None else Detokenizer(self._decoder, prompt_ids),
            prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self.runner.eos_ids if stop_at_eos else frozenset(),
            requested=requested,
        )

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingOptions = GREEDY,
        stop_at_eos: bool = True,
    ) -> Completion:
        """Runs a request to its end; arguments and errors as for `generate`."""
        generation = self.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_at_eos=stop_at_eos)
        text = "".join(piece.text for piece in generation)
        finish = cast(Literal["eos", "length"], generation.finish)  # it ran to its end, so it has one
        return Completion(text, tuple(generation.token_ids[generation.prompt_length :]), generation.timings, finish)
