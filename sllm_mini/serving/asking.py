"""A request becomes one `Ask` for each prompt and choice, in the order of the answer's indices, or is refused. Chapter 11."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from sllm_mini.cluster.api import Ask
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.serving.chat_protocol import ChatRequest
from sllm_mini.serving.common_protocol import duration
from sllm_mini.serving.errors import ApiError, invalid, unsupported
from sllm_mini.serving.options import Limits
from sllm_mini.serving.text_protocol import CompletionRequest
from sllm_mini.serving.texts import ModelText

_TEXT_TOKENS = 16
"""What OpenAI's /v1/completions writes unless told."""
_GREEDY_BELOW = 1e-3
"""A temperature below is greedy: the likeliest token has all the probability there, and a division by it might overflow."""
_SEEDS = 1 << 64
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,),
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "suffix": (None, ""),
}  # fmt: skip
"""Values with which a field that is not supported asks for nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request as asks: prompts x n. `prompt_tokens` counts each prompt once, as OpenAI does; `echo` is what each choice begins with."""

    asks: tuple[Ask, ...]
    prompt_tokens: int
    echo: tuple[str, ...]


def refuse_unsupported(request: ChatRequest | CompletionRequest) -> None:
    """Raises ApiError(400) that names the first field which asks for what this server has not."""
    for field, neutral in _neutral(type(request)):
        value = getattr(request, field)
        if not any(type(value) is not bool and value == each for each in neutral):
            raise unsupported(field)
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs is only for answers with logprobs; set logprobs to true, or leave it out", "top_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise unsupported("logprobs", "with echo is not supported here: the prompt's own are not computed")
    if isinstance(request, CompletionRequest) and request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "other than n is not supported here")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only for a stream; set stream, or leave it out", "stream_options")


@cache
def _neutral(kind: type[ChatRequest | CompletionRequest]) -> tuple[tuple[str, tuple[object, ...]], ...]:
    """Of the fields that a request of this kind has: to ask it for others costs more than all of the check."""
    return tuple((field, neutral) for field, neutral in _NEUTRAL.items() if field in kind.model_fields)


def logprobs_of(request: ChatRequest | CompletionRequest) -> int | None:
    """As an `Ask` has it."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs


def keep_alive_of(given: float | str | None) -> float | None:
    """As an `Ask` has it. Raises ApiError(400)."""
    try:
        return duration(given)
    except ValueError as error:
        raise invalid(str(error), "keep_alive") from None


def asks_of(
    request: ChatRequest | CompletionRequest, model: ModelText, prompts: Sequence[Sequence[int]], limits: Limits, answer_id: str, draw: Callable[[], int],
) -> Asked:  # fmt: skip
    """`prompts` are the token ids of each; `draw` gives a seed where the request has none. Choice i draws from seed + i, so that they differ and a
    seed repeats them all. Raises ApiError(400)."""
    choices = request.n or 1
    if choices > limits.choices:
        raise invalid(f"n is {choices}; at most {limits.choices} are given", "n")
    if len(prompts) * choices > limits.prompts:
        raise invalid(f"{len(prompts)} prompts with {choices} choices each are more than {limits.prompts} answers; send several requests", "prompt")
    seed = (draw() if request.seed is None else request.seed) % _SEEDS
    keep_alive = keep_alive_of(request.keep_alive)
    asks: list[Ask] = []
    for ids in prompts:
        tokens = _room(request, model, ids, limits)
        prefix = hashlib.blake2b(b"".join(token.to_bytes(8, "little") for token in ids), digest_size=16).hexdigest() if choices > 1 else ""
        for _ in range(choices):
            asks.append(Ask(
                model.name, ids, tokens, _sampling(request, (seed + len(asks)) % _SEEDS), request.stops, prefix=prefix,
                request_id=f"{answer_id}-{len(asks)}", keep_alive=keep_alive, logprobs=logprobs_of(request),
            ))  # fmt: skip
    echo = isinstance(request, CompletionRequest) and bool(request.echo)
    return Asked(tuple(asks), sum(map(len, prompts)), tuple(model.decode(ids) if echo else "" for ids in prompts for _ in range(choices)))


def embedding_asks(model: ModelText, prompts: Sequence[Sequence[int]], keep_alive: float | None, answer_id: str) -> Asked:
    """One for each prompt. Raises ApiError(400)."""
    for ids in prompts:
        _left(model, ids, 1, "input")
    asks = (Ask(model.name, ids, 1, request_id=f"{answer_id}-{index}", keep_alive=keep_alive, embed=True) for index, ids in enumerate(prompts))
    return Asked(tuple(asks), sum(map(len, prompts)), ("",) * len(prompts))


def _room(request: ChatRequest | CompletionRequest, model: ModelText, ids: Sequence[int], limits: Limits) -> int:
    """How many tokens may be written to this prompt."""
    where = "messages" if isinstance(request, ChatRequest) else "prompt"
    field = "max_completion_tokens" if isinstance(request, ChatRequest) and request.max_completion_tokens is not None else "max_tokens"
    wanted = getattr(request, field)
    left = _left(model, ids, wanted, where)
    if wanted is None:
        return min(limits.output_tokens if left is None else left, limits.output_tokens if isinstance(request, ChatRequest) else _TEXT_TOKENS)
    if wanted > limits.output_tokens:
        raise invalid(f"{field} is {wanted}; at most {limits.output_tokens} are written", field)
    return int(wanted)


def _left(model: ModelText, ids: Sequence[int], wanted: int | None, where: str) -> int | None:
    """How many tokens the context holds after this prompt; None where nobody knows."""
    if not ids:
        raise invalid("a prompt is empty; give at least one token, or one empty prompt alone to load the model", where)
    if model.vocabulary is not None and max(ids) >= model.vocabulary:
        raise invalid(f"the prompt has the token {max(ids)}; {model.name} has those below {model.vocabulary}", where)
    if model.context_tokens is None:
        return None
    left = model.context_tokens - len(ids)
    if (wanted or 1) > left:
        asked = f" and {wanted} to be written" if wanted is not None else ""
        raise ApiError(
            400, "context_length_exceeded", f"the context of {model.name} holds {model.context_tokens} tokens; {len(ids)} of the prompt{asked} are too many", param=where,
        )  # fmt: skip
    return left


def _sampling(request: ChatRequest | CompletionRequest, seed: int) -> SamplingOptions:
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingOptions(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature, top_k=request.top_k or 0, top_p=1.0 if request.top_p is None else request.top_p, seed=seed,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
    )  # fmt: skip
