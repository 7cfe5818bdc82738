"""Stop strings: text is held back while it may still become one, and given out as soon as it cannot.

A stop string may begin in one token and end in another, and in the middle of either. What is said never contains it,
nor anything after it, whatever the pieces in which the text comes. Costs a search in the few characters that are
held. Taught in chapter 07.
"""

from __future__ import annotations

from collections.abc import Sequence

from sllm_mini.inference.text import Detokenizer, TextDecoder


class StopBuffer:
    """Text in, text out, up to the first stop string: of several, the one that is complete first, and of those that end
    together the longest. `held` is what waits, `stopped` becomes True once for all. One stream, one thread."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.held = ""
        self.stopped = False
        self._stop = tuple(stop)

    def push(self, text: str) -> str:
        """What can be said now."""
        if not self._stop:
            return text
        text = self.held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        waits = max(self._overlap(text, stop) for stop in self._stop)
        self.held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def flush(self) -> str:
        """What was held, once no more text will come."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The longest end of the text that a stop string begins with, in characters, short of all of it."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """The text of one request: detokenised, stopped, counted. A pure function of its tokens, so it can be rebuilt.

    `emitted_nchars` counts the characters given out, `held` waits for its stop string. One stream, one thread.
    """

    def __init__(self, decoder: TextDecoder, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decoder, prompt_ids)
        self._buffer = StopBuffer(stop)
        self.emitted_nchars = 0

    @property
    def held(self) -> str:
        return self._buffer.held

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the text ends before it."""
        return self._buffer.stopped

    def push(self, token_id: int) -> str:
        """The text that this token lets out."""
        return self._said(self._buffer.push(self._detokenizer.push(token_id)))

    def flush(self) -> str:
        """The rest, once no more tokens will come."""
        text = self._buffer.push(self._detokenizer.flush())
        return self._said(text if self.stopped else text + self._buffer.flush())

    def _said(self, text: str) -> str:
        self.emitted_nchars += len(text)
        return text
