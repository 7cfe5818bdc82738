"""One completion over a connection that stays open, timed where its bytes arrive: a socket, `http.client` and nothing else. Chapter 11.

A request leaves in one piece, as curl's does: `http.client` alone sends its head first, and where processors are few the server that this wakes holds
up the body.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from sllm_mini.errors import SllmError

SECONDS = 600.0
"""What an answer may take."""


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer: seconds from the call to its first text (of a stream), and to its end. `gaps` are those between events with text."""

    status: int
    text: str
    tokens: int
    first_seconds: float | None
    seconds: float
    gaps: tuple[float, ...] = ()
    timing: dict[str, Any] | None = None
    """What the server says of it, its object `sllm`."""
    error: str = ""


class Sender:
    """Of one server at `url`. For one thread; `send` raises OSError where the server is gone, SllmError for an answer that is none."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SllmError(f"{url} is no address of a server; give one such as http://127.0.0.1:8000")
        self._connection = _Connection(parts.hostname, parts.port or 80, timeout=SECONDS)
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def send(self, body: dict[str, Any]) -> Sent:
        """POSTs to /v1/completions; with `stream` in `body` its events are read as they come."""
        if body.get("stream"):
            body = {**body, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", data, self._headers)
        answer = self._connection.getresponse()
        if answer.status == 200 and body.get("stream"):
            return _read_stream(answer, began)
        found = answer.read()
        seconds = time.perf_counter() - began
        try:
            document = json.loads(found)
            if answer.status != 200:
                return Sent(answer.status, "", 0, None, seconds, error=str(document["error"]["code"]))
            choice = document["choices"][0]
            return Sent(200, choice["text"], document["usage"]["completion_tokens"], None, seconds, timing=choice.get("sllm"))
        except (ValueError, LookupError, TypeError) as error:
            raise SllmError(f"the server's answer with status {answer.status} is not OpenAI's ({error}); give the address of `sllm-mini serve`") from error

    def close(self) -> None:
        self._connection.close()


class _Connection(http.client.HTTPConnection):
    """Keeps the head of a request until its body comes."""

    _head = b""

    def send(self, data: Any) -> None:
        """Of what `endheaders` sends, which is a head and a body."""
        if self._head:
            head, self._head = self._head, b""
            super().send(head + data)
        else:
            self._head = data


def _read_stream(answer: http.client.HTTPResponse, began: float) -> Sent:
    """Reads to the end, so that the connection can be used again."""
    text: list[str] = []
    times: list[float] = []
    tokens, timing, error, done, ended = 0, None, "", False, 0.0
    while line := answer.readline():
        now = time.perf_counter()
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done, ended = True, now
            continue
        event = json.loads(line[6:])
        if "error" in event:
            error, ended = str(event["error"]["code"]), now
            continue
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if choice["text"]:
                text.append(choice["text"])
                times.append(now)
            timing = choice.get("sllm") or timing
    first = times[0] - began if times else None
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Sent(200, "".join(text), tokens, first, (ended or time.perf_counter()) - began, gaps, timing, error or ("" if done else "cut_off"))
