"""Refusals as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, whose code is always a text. Chapter 11."""

from __future__ import annotations

import json
import math

from sllm_mini.cluster.api import RefusedError, RequestReport
from sllm_mini.errors import ModelError, SllmError, UnsupportedError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable", 507: "server_error"}
_REFUSED = {404: "model_not_found", 429: "queue_full", 503: "cannot_start"}
_LONGEST_RETRY_SECONDS = 120
"""The `openai` package gives up where it is told to wait for longer."""


class ApiError(SllmError):
    """A request that is answered with an error object: its HTTP status, a code that programs read, the sentence, which field it is about,
    and after how many seconds it may come again, where that may help."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after
        super().__init__(message)

    @property
    def document(self) -> dict[str, object]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        return json.dumps(self.document, ensure_ascii=False).encode("utf-8", "backslashreplace")

    @property
    def headers(self) -> dict[str, str]:
        """Besides the body's. `retry-after` is whole seconds, as HTTP has it."""
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            headers["retry-after"] = str(min(_LONGEST_RETRY_SECONDS, max(1, math.ceil(self.retry_after))))
        if self.status in (408, 413):
            headers["connection"] = "close"  # what was not read is in the way
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Something in the request cannot be."""
    return ApiError(400, code, message, param=param)


def unsupported(field: str, why: str = "is not supported here") -> ApiError:
    """A field that OpenAI has and this server has not: never ignored where the answer would be another one."""
    return invalid(f"{field} {why}; leave it out", field, "unsupported_value")


def unknown_model(name: str) -> ApiError:
    """A name that nobody deployed; it is shown escaped and cut, since anything may stand there."""
    return ApiError(404, "model_not_found", f"there is no model {name!a:.80}; GET /v1/models lists those that are deployed", param="model")


def of_submit(error: Exception) -> ApiError:
    """What `Cluster.submit` raised. Other errors than its own are bugs, and raised again."""
    match error:
        case ApiError():
            return error
        case RefusedError(status=503):
            return ApiError(503, "overloaded", error.reason, retry_after=error.retry_after or 1.0)
        case RefusedError():
            return _of_refusal(error)
        case UnsupportedError():
            return ApiError(400, "unsupported_model", str(error), param="model")
        case ValueError() | ModelError():
            return invalid(str(error))
        case SllmError():
            return ApiError(503, "shutting_down", str(error), retry_after=5.0)
    raise error


def of_report(report: RequestReport, retry_after: float = 1.0) -> ApiError:
    """Why a request that was taken ended without its text."""
    if report.outcome == "cancelled":
        return ApiError(500, "request_failed", "the request was cancelled on the server")
    return _of_refusal(RefusedError.read(report.reason, retry_after))


def internal_error(request_id: str) -> ApiError:
    """A bug: its traceback is in the log and never in an answer."""
    return ApiError(500, "internal_error", f"the server failed on this request; its log has it under {request_id}")


def shutting_down() -> ApiError:
    """The server ends; one in its place may come soon."""
    return ApiError(503, "shutting_down", "the server is ending; ask again in a while", retry_after=5.0)


def _of_refusal(error: RefusedError) -> ApiError:
    status = error.status if error.status in _REFUSED else 500
    return ApiError(status, _REFUSED.get(status, "request_failed"), error.reason, param="model" if status == 404 else None, retry_after=error.retry_after)
