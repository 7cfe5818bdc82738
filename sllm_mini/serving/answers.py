"""Pieces and reports become OpenAI's bodies and chunks: `ChatAnswer` and `TextAnswer`, one of either for each request. Chapter 11."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sllm_mini.cluster.api import RequestReport
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.serving.chat_protocol import Answer, ChatChunk, ChatCompletion, Choice, ChunkChoice, Delta, FinishReason
from sllm_mini.serving.common_protocol import Done, Timing, Usage
from sllm_mini.serving.logprobs import ChatLogprobs, TextLogprobs, TokenNames, chat_logprobs, text_logprobs
from sllm_mini.serving.text_protocol import TextChoice, TextCompletion


@dataclass(frozen=True, slots=True)
class Written:
    """One choice, whole: its text, and its report; or what became of the model instead."""

    text: str
    report: RequestReport | Done
    pieces: Sequence[LedgerPiece] = ()


class WholeFormat(Protocol):
    """How one endpoint writes an answer in one piece, as JSON."""

    def whole(self, choices: Sequence[Written], usage: Usage) -> str: ...


class AnswerFormat(WholeFormat, Protocol):
    """And as a stream. Each method gives JSON without line breaks. `names` are there where probabilities were asked for."""

    @property
    def names(self) -> TokenNames | None: ...

    def first(self, index: int, echo: str) -> str:
        """The chunk that opens a choice; "" for none."""
        ...

    def text(self, index: int, text: str, pieces: Sequence[LedgerPiece]) -> str:
        """`text` is that of `pieces`."""
        ...

    def last(self, index: int, report: RequestReport | Done) -> str: ...

    def usage(self, usage: Usage) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """`with_usage`: each chunk has `usage`, null but in the last."""

    id: str
    model: str
    created: int
    with_usage: bool = False
    names: TokenNames | None = None

    def first(self, index: int, echo: str) -> str:
        return self._chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=echo), logprobs=None, finish_reason=None)])

    def text(self, index: int, text: str, pieces: Sequence[LedgerPiece]) -> str:
        return self._chunk([ChunkChoice(index=index, delta=Delta(content=text), logprobs=self._logprobs(pieces), finish_reason=None)])

    def last(self, index: int, report: RequestReport | Done) -> str:
        return self._chunk([ChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=finish_reason(report), sllm=timing(report))])

    def usage(self, usage: Usage) -> str:
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Written], usage: Usage) -> str:
        made = [
            Choice(
                index=index, message=Answer(role="assistant", content=each.text, refusal=None), logprobs=self._logprobs(each.pieces), finish_reason=finish_reason(each.report),
                sllm=timing(each.report),
            )
            for index, each in enumerate(choices)
        ]  # fmt: skip
        return ChatCompletion(id=self.id, object="chat.completion", created=self.created, model=self.model, choices=made, usage=usage).model_dump_json(exclude_unset=True)

    def _logprobs(self, pieces: Sequence[LedgerPiece]) -> ChatLogprobs | None:
        return None if self.names is None else chat_logprobs(self.names, pieces)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        chunk = ChatChunk(id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices)
        if self.with_usage:
            chunk.usage = usage
        return chunk.model_dump_json(exclude_unset=True)


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """See `ChatAnswer`. `offsets` are the characters of each choice so far."""

    id: str
    model: str
    created: int
    with_usage: bool = False
    names: TokenNames | None = None
    offsets: Counter[int] = field(default_factory=Counter)

    def first(self, index: int, echo: str) -> str:
        return self.text(index, echo, ()) if echo else ""

    def text(self, index: int, text: str, pieces: Sequence[LedgerPiece]) -> str:
        made = self._chunk([TextChoice(index=index, text=text, logprobs=self._logprobs(pieces, self.offsets[index]), finish_reason=None)])
        self.offsets[index] += len(text)
        return made

    def last(self, index: int, report: RequestReport | Done) -> str:
        return self._chunk([TextChoice(index=index, text="", logprobs=None, finish_reason=finish_reason(report), sllm=timing(report))])

    def usage(self, usage: Usage) -> str:
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Written], usage: Usage) -> str:
        made = [
            TextChoice(index=index, text=each.text, logprobs=self._logprobs(each.pieces, 0), finish_reason=finish_reason(each.report), sllm=timing(each.report))
            for index, each in enumerate(choices)
        ]
        return TextCompletion(id=self.id, object="text_completion", created=self.created, model=self.model, choices=made, usage=usage).model_dump_json(exclude_unset=True)

    def _logprobs(self, pieces: Sequence[LedgerPiece], offset: int) -> TextLogprobs | None:
        return None if self.names is None else text_logprobs(self.names, pieces, offset)

    def _chunk(self, choices: list[TextChoice], usage: Usage | None = None) -> str:
        chunk = TextCompletion(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices)
        if self.with_usage:
            chunk.usage = usage
        return chunk.model_dump_json(exclude_unset=True)


def finish_reason(report: RequestReport | Done) -> FinishReason:
    """OpenAI knows no end token: what ends by it has stopped."""
    return "length" if isinstance(report, RequestReport) and report.finish == "length" else "stop"


def timing(report: RequestReport | Done) -> Timing | Done:
    if isinstance(report, Done):
        return report
    return Timing(
        request_id=report.request_id, rung=report.rung.name.lower(), tier=None if report.tier is None else report.tier.name.lower(), load_seconds=round(report.load_seconds, 6),
        queue_seconds=_seconds(report.queue_seconds), prefill_seconds=_seconds(report.prefill_seconds), decode_seconds=_seconds(report.decode_seconds),
        migrations=report.migrations, restarts=report.restarts,
    )  # fmt: skip


def timing_headers(report: RequestReport) -> dict[str, str]:
    """The same as headers of an answer that is no stream."""
    found = timing(report).model_dump()
    return {f"x-sllm-{name.replace('_', '-')}": str(value) for name, value in found.items() if value is not None}


def _seconds(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
