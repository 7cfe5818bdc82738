"""A request's answer as its reader has it: pieces from the ledger, however often the worker behind it changes. Chapter 08."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from sllm_mini.cluster.api import Listener, RefusedError, RequestReport
from sllm_mini.cluster.router import Router
from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership.ledger import LedgerPiece

_REPORT_SECONDS = 2.0


class LiveStream:
    """See `api.Stream`. Safe from several threads, each of which reads it from the beginning."""

    def __init__(self, router: Router, request_id: str) -> None:
        self._router, self.request_id = router, request_id

    def __iter__(self) -> Iterator[LedgerPiece]:
        try:
            yield from self._router.ledger.stream(self.request_id)
        except ModelError as error:
            reason = self._router.reason(self.request_id)
            if reason is None:
                raise
            raise RefusedError.read(reason, self._router.retry_after()) from error
        with suppress(TimeoutError, ModelError):  # ModelError: forgotten already
            self.wait(_REPORT_SECONDS)  # the last token is read before its end is told to the controller, and so to the report

    def wait(self, timeout: float | None = None) -> RequestReport:
        return self._router.wait(self.request_id, timeout)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        return self._router.subscribe(self.request_id, listener)

    def cancel(self) -> None:
        self._router.cancel(self.request_id)

    @property
    def report(self) -> RequestReport:
        return self._router.report(self.request_id)
