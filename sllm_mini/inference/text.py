"""Tokens become text while they are still coming: what is said is never taken back, and never half a character.

A token is not a piece of text: one character may span four tokens, a space may belong to the token after it, and a
decoder may look at its neighbours. Each new token is decoded together with a few tokens before it, and what that adds
is given out once it can no longer change. The pieces joined are exactly the tokenizer's own decoding of all tokens.
Costs two small decodings a token whatever the length of the text. Taught in chapters 04 and 07.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.errors import ModelError

_REPLACEMENT = "\ufffd"
_TAIL = 16
"""Tokens of the prompt that are read again to join the answer to it."""
_IMPORTING = threading.Lock()
"""transformers puts another module in its place when it has been imported; a thread that asks for it meanwhile is given the first one, which has nothing."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(source: str | os.PathLike[str] | Checkpoint) -> Any | None:
    """The transformers tokenizer of a model directory, or None if it has no tokenizer files.

    Reads only that directory: no network, and no code from it is run. Of an opened checkpoint the digests of its small
    files are checked first, and IntegrityError raised. Raises ModelError if the files do not make a tokenizer.
    Thread-safe.
    """
    if isinstance(source, Checkpoint):
        for companion in source.index.companions:
            source.read_companion(companion.file)
    folder = source.path if isinstance(source, Checkpoint) else Path(source)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with _IMPORTING:
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer library raises bare Exception for a broken file
        raise ModelError(
            f"the tokenizer files in {folder} cannot be read ({type(error).__name__}: {error}); "
            "put the model's own tokenizer files there, or remove them and give prompts as token ids"
        ) from error
    if (plain := _plain(tokenizer)) is not None:  # once: what is set later would be set while another thread encodes
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = tokenizer.split_special_tokens
    return tokenizer


def tokenize(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text by a tokenizer that `load_tokenizer` gave, of whatever length; with `special` also those that the model's
    texts begin and end with. A short text takes 10 us where transformers adds nothing to the `tokenizers` library, else 60."""
    if (plain := _plain(tokenizer)) is not None:
        return list(plain.encode(text, add_special_tokens=special).ids)
    return [int(token_id) for token_id in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


def detokenize(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of these tokens without the special ones, and without the optional clean-up of spaces, which alters text that was right."""
    if (plain := _plain(tokenizer)) is not None:
        return str(plain.decode(list(token_ids), skip_special_tokens=True))
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _plain(tokenizer: Any) -> Any | None:
    """What transformers itself would ask, where its class adds nothing of its own to that."""
    return tokenizer.backend_tokenizer if _adds_nothing(tokenizer.__class__) else None


@cache
def _adds_nothing(kind: type[Any]) -> bool:
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus", "decode", "_decode")
    return issubclass(kind, PreTrainedTokenizerFast) and all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)


class TextDecoder:
    """What streams need to know of one tokenizer, looked up once; made per engine, shared by its streams.

    Text is as `detokenize` has it. Thread-safe as far as the tokenizer is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if hasattr(tokenizer, "backend_tokenizer"):
            self._special = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        else:
            self._special = set(tokenizer.all_special_ids)
        names = [f"<0x{value:02X}>" for value in range(256)]
        ids = tokenizer.convert_tokens_to_ids(names)
        self._bytes = {i for i, name in zip(ids, names, strict=True) if i is not None and self._name(i) == name}

    def _name(self, token_id: int) -> str | None:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return name if isinstance(name, str) else None

    def is_silent(self, token_id: int) -> bool:
        """True for a token that is never text: a special one, or one the tokenizer has no name for."""
        return token_id in self._special or (token_id not in self._bytes and self._name(token_id) is None)

    def is_byte(self, token_id: int) -> bool:
        """True for a token that stands for one raw byte, such as `<0xE4>`."""
        return token_id in self._bytes

    def decode(self, token_ids: Sequence[int]) -> str:
        return detokenize(self._tokenizer, token_ids) if token_ids else ""


class Detokenizer:
    """The text of one stream of tokens, piece by piece.

    `''.join(pushes) + flush()` is the decoding of all tokens, special ones left out. With `prompt_ids` it is the text
    that follows the prompt's text, with the space between them where the tokenizer keeps it in the next token.
    One stream, one thread.
    """

    def __init__(self, decoder: TextDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        # `_context` are the tokens of the last emission: many decoders treat the very first token apart, so no later
        # one is decoded without some before it. `_shown` is the text of `_context` and as much of `_pending` as was
        # given out.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = ""
        self._retry_at = 0
        start = max(len(prompt_ids) - _TAIL, 0)
        while start > 0 and (decoder.is_byte(prompt_ids[start]) or decoder.is_silent(prompt_ids[start])):
            start -= 1
        for token_id in prompt_ids[start:]:
            self.push(token_id)
        # A character that the prompt finishes belongs to the prompt, even if more byte tokens may follow it.
        if self._pending and not decoder.decode(self._context + self._pending).endswith(_REPLACEMENT):
            self.flush()

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character, or a run of byte tokens, is unfinished."""
        decoder = self._decoder
        if decoder.is_silent(token_id):
            return ""
        self._pending.append(token_id)
        # A run of byte tokens is decoded as a whole: one bad byte at its end spoils all of it, so it has to wait.
        if decoder.is_byte(token_id) or len(self._pending) < self._retry_at:
            return ""
        text = self._decode_pending()
        if not text.endswith(_REPLACEMENT):
            return self._emit(text)
        # The end is not a whole character yet, or never one: garbage may go on for ever, so look ever less often.
        self._retry_at = len(self._pending) + 1 if len(self._pending) < 8 else 2 * len(self._pending)
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[len(self._shown) :]
        self._shown += piece
        return piece

    def flush(self) -> str:
        """The rest, once no more tokens will come; bytes that make no character come as U+FFFD, as the tokenizer does."""
        return self._emit(self._decode_pending()) if self._pending else ""

    def _decode_pending(self) -> str:
        text = self._decoder.decode(self._context + self._pending)
        if not text.startswith(self._shown):
            # The new tokens change text that was given out (bad bytes right after the prompt's last byte token).
            # That text stands, and what is new is read for itself.
            self._context, self._shown = [], ""
            text = self._decoder.decode(self._pending)
        return text

    def _emit(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._context, self._pending, self._retry_at = self._pending, [], 0
        self._shown = self._decoder.decode(self._context)
        return piece
