"""`AdminClient`: asks a server that runs what it runs, and to deploy, change and delete models. What the command line speaks. Chapter 11.

Imports urllib3 and nothing of the server: its answers are plain JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

import urllib3

from sllm_mini.errors import SllmError
from sllm_mini.serving.options import MODEL_NAME

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 900.0


class ServerError(SllmError):
    """The server cannot be asked, or refuses: `status` is that of HTTP, 0 where none came, `code` what programs read, "" where there is none."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(message)


class AdminClient:
    """Of the server at `url`. Each method gives the answer's JSON, or raises ServerError. Safe from several threads; as a context manager it closes
    its connections."""

    def __init__(self, url: str = DEFAULT_URL, key: str = "") -> None:
        try:
            parsed = urllib3.util.parse_url(url)
        except urllib3.exceptions.LocationParseError:
            parsed = urllib3.util.Url()
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment or parsed.auth:
            raise ServerError(f"{url!r} is not the address of a server; write for example {DEFAULT_URL}")
        if not key.isascii() or not key.isprintable():
            raise ServerError("the API key has characters that a header cannot carry; give the one that the server was started with")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._keyed = bool(key)
        self._pool = urllib3.PoolManager(headers=headers, retries=False, timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS))

    def ps(self) -> dict[str, Any]:
        return self._ask("GET", "/admin/ps")

    def deploy(self, name: str, **fields: Any) -> dict[str, Any]:
        """`fields` are those of a `DeployRequest`; what is None stays as it is."""
        return self._ask("PUT", _place(name), {key: value for key, value in fields.items() if value is not None})

    def delete(self, name: str) -> dict[str, Any]:
        return self._ask("DELETE", _place(name))

    def load(self, name: str, warmth: str = "ready") -> dict[str, Any]:
        """Answers when an instance is as warm as that: dram, device or ready."""
        return self._ask("POST", f"{_place(name)}/load", {"warmth": warmth})

    def unload(self, name: str) -> dict[str, Any]:
        return self._ask("POST", f"{_place(name)}/unload", {})

    def pin(self, name: str, **fields: Any) -> dict[str, Any]:
        """`fields` are those of a `PinRequest`."""
        return self._ask("POST", f"{_place(name)}/pin", {key: value for key, value in fields.items() if value is not None})

    def close(self) -> None:
        self._pool.clear()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._pool.request(method, f"{self.url}{path}", redirect=False, **({} if body is None else {"json": body}))
        except urllib3.exceptions.ReadTimeoutError as error:
            raise ServerError(f"the server at {self.url} did not answer within {_READ_SECONDS:g} s; it may still do what it was asked: look with sllm-mini ps") from error
        except urllib3.exceptions.HTTPError as error:
            raise ServerError(f"no server answers at {self.url}; start one with: sllm-mini serve DIR, or name another with --server URL") from error
        try:
            document = json.loads(answer.data)
            refused = document.get("error") if answer.status >= 400 else None
            told = "" if refused is None else str(refused["message"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"what answers at {self.url} is not a server of sllm-mini (status {answer.status})", answer.status) from error
        if answer.status == 401:
            raise ServerError(f"the server at {self.url} " + ("does not know this API key" if self._keyed else "wants an API key") + "; set SLLM_MINI_API_KEY, or give --api-key-file", 401, "invalid_api_key")
        if answer.status >= 300:
            raise ServerError(told or f"what answers at {self.url} is not a server of sllm-mini (status {answer.status})", answer.status, str((refused or {}).get("code", "")))
        return dict(document)


def _place(name: str) -> str:
    """Raises ServerError for a name that no model has: some would be another address."""
    if re.fullmatch(MODEL_NAME, name) is None:
        raise ServerError(f"{name!r} is not a name for a model; use at most 128 letters, digits, '.', '_' and '-'")
    return f"/admin/models/{quote(name, safe='')}"
