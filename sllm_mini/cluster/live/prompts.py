"""Prompts become token ids in the driver's process, by the tokenizer of each deployment, read when the first text comes. Chapter 08.

The tokenizers of the sources that were asked last are kept: some megabytes each.
"""

from __future__ import annotations

import operator
import threading
import uuid
from collections.abc import Iterable
from typing import Any

from sllm_mini.cluster.api import Ask
from sllm_mini.errors import ModelError
from sllm_mini.inference.session import Session, request_problem
from sllm_mini.inference.text import load_tokenizer, tokenize

_MOST_TOKENIZERS = 128


class Prompts:
    """Makes sessions of requests. Safe from several threads; reading a tokenizer makes the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: dict[str, Any] = {}

    def session(self, ask: Ask, source: str, digest: str) -> Session:
        """`source` has the tokenizer; `digest` names the weights. Raises ValueError for a request that cannot be, ModelError for a prompt that cannot be
        read. What the model's context cannot hold its worker says."""
        request_id = uuid.uuid4().hex if ask.request_id is None else ask.request_id
        problem = request_problem(request_id, ask.max_new_tokens, ask.sampling, ask.stop, ask.stop_at_eos, ask.logprobs, ask.embed)
        if problem:
            raise ValueError(problem)
        ids = self._encode(ask, source)
        if not ids:
            raise ModelError("the prompt is empty; give at least one token")
        return Session(request_id, digest, tuple(ids), len(ids), ask.max_new_tokens, ask.sampling, ask.stop, ask.stop_at_eos, logprobs=ask.logprobs, embed=ask.embed)

    def keep(self, sources: Iterable[str]) -> None:
        """Nothing of any other source: what was deployed from there is gone."""
        kept = frozenset(sources)
        with self._lock:
            self._tokenizers = {source: tokenizer for source, tokenizer in self._tokenizers.items() if source in kept}

    def _encode(self, ask: Ask, source: str) -> list[int]:
        if isinstance(ask.prompt, bytes | bytearray | memoryview):
            raise ModelError("a prompt is a text or a sequence of token ids; these are bytes: decode them to a text first")
        if not isinstance(ask.prompt, str):
            try:
                return [operator.index(token_id) for token_id in ask.prompt]
            except TypeError as error:
                raise ModelError(f"a prompt is a text or a sequence of token ids; this one is not ({error})") from error
        with self._lock:
            if source in self._tokenizers:
                tokenizer = self._tokenizers.pop(source)
            else:
                tokenizer = None if "://" in source else load_tokenizer(source)
            self._tokenizers[source] = tokenizer  # the last: asked latest
            if len(self._tokenizers) > _MOST_TOKENIZERS:
                del self._tokenizers[next(iter(self._tokenizers))]
        if tokenizer is None:
            raise ModelError(f"{source} has no tokenizer that can be read here; give the prompt as token ids")
        return tokenize(tokenizer, ask.prompt)
