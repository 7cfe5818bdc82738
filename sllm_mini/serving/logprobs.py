"""Probabilities of tokens as OpenAI's clients read them: `ChatLogprobs` and `TextLogprobs`, and what a token is called in them. Chapter 11.

One entry for each token that `usage` counts: also for the one that ended the text, and for those of a stop string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.serving.common_protocol import Wire

_LEAST = -9999.0
"""What OpenAI writes for a token that cannot be: JSON has no infinity."""


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None
    """Null where the model's tokenizer cannot be read here."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Wire):
    """`text_offset` are the characters of the answer before each token; a character of several tokens counts for the one that completes it.
    `top_logprobs` have the chosen token too."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TokenNames:
    """Of one tokenizer; without one tokens are called "token_id:7". Costs some 20 us for each token that is new. Safe from several threads as far as
    the tokenizer is."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes | None]] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds = json.loads(backend.decoder.__getstate__()) if backend is not None and backend.decoder is not None else {}
        found = [each.get("type") for each in [kinds, *kinds.get("decoders", [])]]
        self._letters = _byte_letters() if "ByteLevel" in found else None

    def named(self, token_id: int) -> tuple[str, bytes | None]:
        """What a token is called, and its bytes: those of a whole text's tokens joined are the text. Bytes that are no characters by themselves are
        called as OpenAI does, "bytes:\\xf0\\x9f"."""
        known = self._known.get(token_id)
        if known is None:
            raw = self._bytes(token_id)
            known = self._known[token_id] = (f"token_id:{token_id}" if raw is None else _readable(raw), raw)
        return known

    def _bytes(self, token_id: int) -> bytes | None:
        tokenizer = self._tokenizer
        if tokenizer is None or not isinstance(name := tokenizer.convert_ids_to_tokens(token_id), str):
            return None
        if (added := tokenizer.added_tokens_decoder.get(token_id)) is not None:
            return str(added.content).encode()
        if self._letters is not None:
            return b"".join(self._letters.get(letter) or letter.encode() for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        once, twice = (str(tokenizer.decode([token_id] * count, clean_up_tokenization_spaces=False)) for count in (1, 2))
        return twice.removeprefix(once).encode()  # with the space before it, which the first of a text may lose


def chat_logprobs(names: TokenNames, pieces: Sequence[LedgerPiece]) -> ChatLogprobs:
    return ChatLogprobs(content=[
        TokenLogprob(**_entry(names, piece.token_id, piece.logprob), top_logprobs=[TopLogprob(**_entry(names, *each)) for each in piece.top]) for piece in pieces
    ], refusal=None)  # fmt: skip


def text_logprobs(names: TokenNames, pieces: Sequence[LedgerPiece], offset: int) -> TextLogprobs:
    """`offset` characters of the answer came before."""
    made = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for piece in pieces:
        chosen = names.named(piece.token_id)[0]
        top: dict[str, float] = {}
        for token_id, logprob in [*piece.top, (piece.token_id, _least(piece.logprob))]:
            top.setdefault(names.named(token_id)[0], _least(logprob))
        made.tokens.append(chosen)
        made.token_logprobs.append(_least(piece.logprob))
        made.top_logprobs.append(top)
        made.text_offset.append(offset)
        offset += len(piece.text)
    return made


def _entry(names: TokenNames, token_id: int, logprob: float | None) -> dict[str, Any]:
    name, raw = names.named(token_id)
    return {"token": name, "logprob": _least(logprob), "bytes": None if raw is None else list(raw)}


def _least(logprob: float | None) -> float:
    """A cluster that tells none says that of all."""
    return _LEAST if logprob is None else max(logprob, _LEAST)


def _readable(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_letters() -> dict[str, bytes]:
    """The letters with which byte-level tokenizers write bytes (GPT-2's): printable ones stand for themselves, the others are numbered from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}
