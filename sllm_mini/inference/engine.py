"""From a prompt to a stream of text: our own prefill and decode loop over a transformers decoder model.

Prefill runs the whole prompt once and gives the first token; each decode step runs one token of every request and gives
the next of each. `transformers.generate` is the oracle it is tested against. How requests share steps is in `scheduler`,
how they move in `movable`. Taught in chapters 00, 04 and 07.
"""

from __future__ import annotations

import operator
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.device import Device, get_device
from sllm_mini.errors import ModelError
from sllm_mini.inference.movable import Movable
from sllm_mini.inference.overlap import WAIT_LANE, StreamedModel, stream_model
from sllm_mini.inference.requests import Completion, Generation, OnPiece, Request
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session, request_problem
from sllm_mini.inference.stopping import TextStream
from sllm_mini.inference.text import TextDecoder, load_tokenizer, tokenize
from sllm_mini.types import SpanRecorder, Warmth

GREEDY = SamplingOptions()


class Engine(Movable):
    """A model, with its tokenizer if it has one, ready to answer prompts, several at a time.

    `name` says whose weights these are. `streamed` is the load that an engine with overlap began with, None for any
    other; `recorder` is what that load writes its waits into, so that a request's timings tell them from its prefill. Raises ModelError for a model it cannot run exactly (see `Runner`). Safe from several threads: they take
    turns, and every step serves all requests; at most `max_batch` of them decode together, others wait. With
    `decode_kernel` decode steps attend by our own CUDA kernel instead of torch's (see `attention`): UnsupportedError
    where there is no GPU or no kernel for the model. `kv_tokens`: the first pass gets memory for so many tokens' keys and
    values (see `warmup.pool_tokens`), the same share for each of `max_batch` rows, and keeps it; more is got where it is needed.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        max_batch: int = 8,
        name: str = "",
        decode_kernel: bool = False,
        kv_tokens: int = 0,
        recorder: SpanRecorder | None = None,
    ) -> None:
        super().__init__(model, max_batch, name, None if tokenizer is None else TextDecoder(tokenizer))
        if decode_kernel:
            self.runner.use_decode_kernel(get_device(self.runner.device))
        if kv_tokens < 0:
            raise ValueError(f"kv_tokens is {kv_tokens}; give how many tokens' keys and values to keep memory for")
        if kv_tokens:
            self.kv.keep(max_batch, kv_tokens // max_batch)
        if recorder is not None:
            self._wait_clock = lambda: sum(span.seconds for span in list(recorder.spans) if span.lane == WAIT_LANE)
        self.tokenizer = tokenizer
        self.streamed: StreamedModel | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Checkpoint,
        device: str | Device = "cpu",
        *,
        verify: bool = True,
        overlap: bool = False,
        recorder: SpanRecorder | None = None,
        max_batch: int = 8,
        decode_kernel: bool = False,
        kv_tokens: int = 0,
    ) -> Engine:
        """An engine for a checkpoint of ours, on `device`, named after the digest of its index; without tokenizer files,
        prompts are token ids.

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
        name = checkpoint.digest
        with recorder.span("tokenizer", warmth=Warmth.DRAM) if recorder is not None else nullcontext():
            tokenizer = load_tokenizer(checkpoint)
        if not overlap:
            return cls(load_model(checkpoint, device, verify=verify, recorder=recorder), tokenizer, max_batch=max_batch, name=name, decode_kernel=decode_kernel, kv_tokens=kv_tokens)
        recorder = recorder or SpanRecorder()
        loading = start_load(checkpoint, device, verify=verify, recorder=recorder)
        try:
            streamed = stream_model(loading, recorder=recorder)
            engine = cls(streamed.model, tokenizer, max_batch=max_batch, name=name, decode_kernel=decode_kernel, kv_tokens=kv_tokens, recorder=recorder)
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

        Raises ModelError for text without a tokenizer, bytes, ids that are not whole numbers, or an empty prompt where
        the model names no such token.
        """
        if isinstance(prompt, bytes | bytearray | memoryview):
            raise ModelError("a prompt is a text or a sequence of token ids; these are bytes: decode them to a text first")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ModelError("this model came without a tokenizer; give the prompt as token ids")
            token_ids = tokenize(self.tokenizer, prompt)
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
        stop: str | Sequence[str] = (),
        stop_at_eos: bool = True,
        request_id: str | None = None,
        on_piece: OnPiece | None = None,
        logprobs: int | None = None,
        embed: bool = False,
    ) -> Generation:
        """Starts a request: an iterator that gives each token as soon as it is known.

        The prompt is checked here and joins the batch at the next step, which is the first `next` unless somebody else
        steps. Ends with the model's end-of-text token (given as the last piece), before a `stop` string, or after
        `max_new_tokens`. Of the model's generation settings only its end and beginning tokens count. `on_piece` gets
        every piece on the thread that steps; what it raises ends the request. `logprobs` and `embed`: see `Session`. Raises ModelError for a prompt the model
        cannot take, ValueError for a bad limit, sampling that is no SamplingOptions, an empty stop string or a `request_id`
        that is taken or too long: none of them reaches the batch.
        """
        requested = time.perf_counter()
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if not isinstance(stop, str | Sequence):
            raise ValueError(f"stop is {stop!r:.60}; it must be a text or several, or be left out")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        problem = request_problem(request_id, max_new_tokens, sampling, stops, stop_at_eos, logprobs, embed)
        if problem:
            raise ValueError(problem)
        if stops and self._decoder is None:
            raise ModelError("this model came without a tokenizer, so there is no text to find a stop string in; leave the stop strings out")
        prompt_ids = self.encode(prompt)
        self.runner.check_prompt(prompt_ids, max_new_tokens)
        session = Session(
            request_id=request_id,
            model=self.name,
            token_ids=tuple(prompt_ids),
            prompt_length=len(prompt_ids),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stops,
            stop_at_eos=stop_at_eos,
            logprobs=logprobs,
            embed=embed,
        )
        text = None if self._decoder is None or embed else TextStream(self._decoder, prompt_ids, stops)
        request = Request(session, self.runner.eos_ids if stop_at_eos else frozenset(), text, on_piece, requested)
        request.tokenize_seconds = time.perf_counter() - requested
        self.enqueue(request)
        return Generation(self, request)

    submit = generate
    """The same call, named for those who do not read the stream themselves."""

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingOptions = GREEDY,
        stop: str | Sequence[str] = (),
        stop_at_eos: bool = True,
    ) -> Completion:
        """Runs a request to its end; arguments and errors as for `generate`. Raises ModelError if somebody drops it."""
        generation = self.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, stop_at_eos=stop_at_eos)
        text = "".join(piece.text for piece in generation)
        if generation.finish is None:
            raise ModelError(f"request {generation.request_id!r} was closed before its end")
        return Completion(text, tuple(generation.token_ids[generation.prompt_length :]), generation.timings, generation.finish)
