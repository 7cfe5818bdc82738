"""Routes /v1/chat/completions and /v1/completions: read, ask, and answer whole or as a stream. Chapter 11.

Bodies are read here, once and strictly, and answers written here: the framework's own parsing would echo input in its errors and
hand each request to another thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sllm_mini.cluster.api import RequestReport, Stream
from sllm_mini.errors import CheckpointError, ModelError, RemoteError
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.serving import errors, sse
from sllm_mini.serving.answers import AnswerFormat, ChatAnswer, TextAnswer, WholeFormat, Written, timing_headers
from sllm_mini.serving.asking import Asked, asks_of, keep_alive_of, logprobs_of, refuse_unsupported
from sllm_mini.serving.buckets import Buckets
from sllm_mini.serving.chat_protocol import ChatCompletion, ChatRequest, Message, Part
from sllm_mini.serving.common_protocol import Done, StreamOptions, Usage, error_answers
from sllm_mini.serving.logprobs import TokenNames
from sllm_mini.serving.preload import preload
from sllm_mini.serving.reading import DirectRoute, body_document, read_body
from sllm_mini.serving.relay import Relay, until_gone
from sllm_mini.serving.state import State, state_of
from sllm_mini.serving.text_protocol import CompletionRequest, TextCompletion
from sllm_mini.serving.texts import SHORT_NCHARS, ModelText

router = APIRouter(route_class=DirectRoute)
_FIELDS = {name for model in (Message, Part, StreamOptions) for name in model.model_fields}
_ANSWERS = {200: {"content": {"text/event-stream": {}}}, **error_answers(400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)}
_LONG = 3600.0
_QUIET_SECONDS = 10.0
"""Between comments once the first token has come."""


@dataclass(slots=True)
class _Work:
    """One request on its way."""

    asked: Asked
    hold_seconds: float
    key: str
    """Whose rate it counts for."""
    tokens: Buckets | None
    streams: list[Stream] = field(default_factory=list)
    charged: int = 0

    def charge(self) -> None:
        """For its prompts and all that may be written. Raises ApiError(429), or (400) where no minute allows so many."""
        wanted = self.asked.prompt_tokens + sum(ask.max_new_tokens for ask in self.asked.asks)
        if self.tokens is None:
            return
        if wanted > self.tokens.per_minute:
            raise errors.invalid(f"prompts and answers of up to {wanted} tokens are more than the {self.tokens.per_minute} that a minute allows; ask for fewer", "max_tokens", "tokens_limit_exceeded")
        seconds = self.tokens.take(self.key, wanted)
        if seconds:
            raise errors.ApiError(429, "tokens_limit_exceeded", f"more than {self.tokens.per_minute} tokens a minute were asked for with this key", retry_after=seconds)
        self.charged = wanted

    def usage(self, reports: Sequence[RequestReport]) -> Usage:
        return Usage.of(self.asked.prompt_tokens, sum(each.output_tokens for each in reports))

    def end(self) -> None:
        """Cancels those that are not over, and gives back what was charged for tokens that nobody wrote. Safe to call twice."""
        for stream in self.streams:
            stream.cancel()
        if self.tokens is not None and self.charged:
            used = self.asked.prompt_tokens * bool(self.streams) + sum(map(_written, self.streams))
            self.tokens.give_back(self.key, max(0, self.charged - used))
            self.charged = 0


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ANSWERS, openapi_extra=body_document(ChatRequest))
async def chat_completions(http: Request) -> Response:
    """An answer to a chat, whole or as a stream of server-sent events."""
    state, request = state_of(http), await read_body(http, ChatRequest, _FIELDS)
    refuse_unsupported(request)
    model = await find_model(state, request.model)
    form = ChatAnswer(f"chatcmpl-{secrets.token_hex(12)}", model.name, int(time.time()), request.include_usage, _names(request, model))
    if not request.messages:
        return await _load(http, state, request, form)
    text = await state.templates.render(model, request.messages)
    ids = await encode_text(state, model, text, special=False)
    return await _answer(http, state, bool(request.stream), request.include_usage, asks_of(request, model, [ids], state.limits, form.id, _draw), form)


@router.post("/v1/completions", response_model=TextCompletion, responses=_ANSWERS, openapi_extra=body_document(CompletionRequest))
async def completions(http: Request) -> Response:
    """Goes on with a text, whole or as a stream of server-sent events."""
    state, request = state_of(http), await read_body(http, CompletionRequest, _FIELDS)
    refuse_unsupported(request)
    model = await find_model(state, request.model)
    form = TextAnswer(f"cmpl-{secrets.token_hex(12)}", model.name, int(time.time()), request.include_usage, _names(request, model))
    if not request.prompt:
        return await _load(http, state, request, form)
    given = request.prompt if isinstance(request.prompt, list) and not isinstance(request.prompt[0], int) else [request.prompt]
    if len(given) > state.limits.prompts:
        raise errors.invalid(f"there are {len(given)} prompts; at most {state.limits.prompts} are taken", "prompt")
    prompts = [await encode_text(state, model, each, special=True) if isinstance(each, str) else each for each in given]
    return await _answer(http, state, bool(request.stream), request.include_usage, asks_of(request, model, prompts, state.limits, form.id, _draw), form)


async def find_model(state: State, name: str) -> ModelText:
    """Raises ApiError(404), and (503) where what lies beside its weights cannot be read now. Who asks for one that is being read waits for that."""
    try:
        while (found := state.texts.find(name)) is None:
            if name not in state.reading:
                state.reading[name] = asyncio.ensure_future(state.read(name))
                state.reading[name].add_done_callback(partial(_read, state, name))
            await asyncio.shield(state.reading[name])
    except (RemoteError, CheckpointError, OSError) as error:
        raise errors.ApiError(503, "model_unreachable", f"what belongs to the weights of {name} cannot be read: {error}", param="model", retry_after=5.0) from error
    return found


def _read(state: State, name: str, reading: asyncio.Future[ModelText]) -> None:
    del state.reading[name]
    reading.cancelled() or reading.exception()  # it is theirs who wait, if anybody does still


def _names(request: ChatRequest | CompletionRequest, model: ModelText) -> TokenNames | None:
    """Where the answer is to tell of probabilities."""
    return None if logprobs_of(request) is None else model.names


async def encode_text(state: State, model: ModelText, text: str, *, special: bool) -> list[int]:
    """`ModelText.encode`; a long one beside the loop."""
    if len(text) <= SHORT_NCHARS:
        return model.encode(text, special=special)
    return await state.aside(lambda: model.encode(text, special=special))


async def _load(http: Request, state: State, request: ChatRequest | CompletionRequest, form: AnswerFormat) -> Response:
    """An empty prompt: the model is made ready, or with keep_alive 0 put away, and no token is written."""
    seconds = keep_alive_of(request.keep_alive)
    reason = await until_gone(http.receive, preload(state, request.model, seconds, hold_seconds=_hold_seconds(http, state)))
    done = Done(done_reason=reason or "load")
    if not request.stream:
        return _json(form.whole([Written("", done)], Usage.of(0, 0)), {})
    chunks = [form.first(0, ""), form.last(0, done), form.usage(Usage.of(0, 0)) if request.include_usage else ""]

    async def frames() -> AsyncGenerator[bytes, None]:
        for chunk in filter(None, chunks):
            yield sse.event(chunk)
        yield sse.DONE

    return sse.EventStream(frames(), state.limits.stall_seconds, {})


async def _answer(http: Request, state: State, stream: bool, include_usage: bool, asked: Asked, form: AnswerFormat) -> Response:
    if not stream:
        return await answer_whole(http, state, asked, form)
    work = _begin(http, state, asked)
    return sse.EventStream(_frames(state, work, form, include_usage), state.limits.stall_seconds, {}, on_end=work.end)


async def answer_whole(http: Request, state: State, asked: Asked, form: WholeFormat) -> Response:
    """Asks and waits, for the texts or for the client to go. Raises ApiError where one of them is not answered."""
    work = _begin(http, state, asked)
    try:
        written = await until_gone(http.receive, _whole(work))
    finally:
        work.end()
    if written is None:
        return Response(status_code=499)  # nobody reads it
    reports = [each.report for each in written if isinstance(each.report, RequestReport)]
    return _json(form.whole(written, work.usage(reports)), timing_headers(reports[0]))


def _begin(http: Request, state: State, asked: Asked) -> _Work:
    """All are submitted, or none."""
    work = _Work(asked, _hold_seconds(http, state), http.scope["sllm_mini.key"], state.tokens)
    work.charge()
    try:
        for ask in asked.asks:
            work.streams.append(state.cluster.submit(ask))
    except Exception as error:
        work.end()
        raise errors.of_submit(error) from error
    return work


async def _whole(work: _Work) -> list[Written]:
    texts, reports = list(work.asked.echo), dict[int, RequestReport]()
    told: list[list[LedgerPiece]] = [[] for _ in texts]
    end = time.monotonic() + work.hold_seconds
    async with Relay(work.streams, whole=True) as relay:
        while relay.open:
            come = await relay.next(max(0.0, end - time.monotonic()) if relay.waiting else _LONG)
            if not come and relay.waiting and time.monotonic() >= end:
                raise _held(work)
            for choice, pieces, report in come:
                texts[choice] += "".join(piece.text for piece in pieces)
                told[choice] += pieces
                if report is not None:
                    reports[choice] = _answered(report)
    return [Written(text, reports[index], told[index]) for index, text in enumerate(texts)]


async def _frames(state: State, work: _Work, form: AnswerFormat, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The events of a stream, those that come together in one."""
    begun, opened, reports = time.monotonic(), set[int](), list[RequestReport]()
    try:
        async with Relay(work.streams) as relay:
            yield sse.comment("queued")
            while relay.open:
                left = work.hold_seconds - (time.monotonic() - begun)
                if relay.waiting and left <= 0:
                    raise _held(work)
                come = await relay.next(min(state.options.comment_seconds, left) if relay.waiting else _QUIET_SECONDS)
                if not come:
                    yield sse.comment(_waiting(work, relay, time.monotonic() - begun))
                    continue
                chunks: list[str] = []
                ended = [report for _, _, report in come if report is not None]
                for choice, pieces, report in come:
                    if choice not in opened:
                        chunks.append(form.first(choice, work.asked.echo[choice]))
                        opened.add(choice)
                    if (text := "".join(piece.text for piece in pieces)) or (pieces and form.names is not None):
                        chunks.append(form.text(choice, text, pieces))
                    if report is not None and report.outcome == "answered":
                        chunks.append(form.last(choice, report))
                if out := b"".join(sse.event(chunk) for chunk in chunks if chunk):
                    yield out
                reports += [_answered(report) for report in ended]
        if include_usage:
            yield sse.event(form.usage(work.usage(reports)))
        yield sse.DONE
    except errors.ApiError as error:
        state.meter.refused(error.code)
        yield sse.failure(error)


def _waiting(work: _Work, relay: Relay, waited: float) -> str:
    """What a client may show while nothing has come."""
    waiting = relay.waiting
    if not waiting:
        return ""
    report = work.streams[waiting[0]].report
    if report.assigned != report.assigned:
        return f"waiting for an instance of {report.model}, {waited:.1f} s"
    tier = "" if report.tier is None else f", its weights read from {report.tier.name.lower()} in {report.load_seconds:.2f} s"
    return f"{report.model} runs from {report.rung.name.lower()}{tier}; {waited:.1f} s"


def _written(stream: Stream) -> int:
    """Tokens, so far; all that it might have where it was forgotten over a slow reader."""
    try:
        return stream.report.output_tokens
    except ModelError:
        return 1 << 62


def _answered(report: RequestReport) -> RequestReport:
    if report.outcome != "answered":
        raise errors.of_report(report)
    return report


def _held(work: _Work) -> errors.ApiError:
    return errors.ApiError(503, "held_too_long", f"no instance came within {work.hold_seconds:g} s, and the request was given up", retry_after=10.0)


def _hold_seconds(http: Request, state: State) -> float:
    """A client may want to be held for less: header x-sllm-hold, in seconds."""
    most, given = state.limits.hold_seconds, http.headers.get("x-sllm-hold")
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise errors.invalid("the header x-sllm-hold is no time; give seconds", "x-sllm-hold")
    return min(most, seconds)


def _json(body: str, headers: dict[str, str]) -> Response:
    return Response(body, media_type="application/json", headers=headers)


def _draw() -> int:
    return secrets.randbits(63)


