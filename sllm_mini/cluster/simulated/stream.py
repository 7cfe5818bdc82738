"""The answer of a simulated request, read as time passes. Part of `interactive`; chapter 08."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import Protocol

from sllm_mini.cluster.api import Listener, RequestReport
from sllm_mini.errors import ModelError
from sllm_mini.inference.ownership.ledger import LedgerPiece


class Played(Protocol):
    """What a stream asks of its cluster, by its request's name; each is told where it is defined (`interactive`)."""

    @property
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def pieces(self, request_id: str) -> Iterator[LedgerPiece]: ...
    def end_of(self, request_id: str) -> float: ...
    def report(self, request_id: str) -> RequestReport: ...
    def cancel(self, request_id: str) -> None: ...
    def subscribe(self, request_id: str, listener: Listener) -> Callable[[], None]: ...


class SimulatedStream:
    """See `api.Stream`."""

    def __init__(self, driver: Played, request_id: str) -> None:
        self._driver, self.request_id = driver, request_id

    def __iter__(self) -> Iterator[LedgerPiece]:
        return self._driver.pieces(self.request_id)

    def wait(self, timeout: float | None = None) -> RequestReport:
        driver = self._driver
        end = driver.end_of(self.request_id)
        if timeout is None and end == inf:
            raise ModelError(f"request {self.request_id!r} is never answered as things are; give the cluster room for its model, or cancel it")
        if timeout is not None and end > driver.now + timeout:
            driver.sleep(timeout)
            raise TimeoutError(f"request {self.request_id!r} had not ended after {timeout} seconds of simulated time")
        driver.sleep(max(0.0, end - driver.now))
        return driver.report(self.request_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        return self._driver.subscribe(self.request_id, listener)

    def cancel(self) -> None:
        self._driver.cancel(self.request_id)

    @property
    def report(self) -> RequestReport:
        return self._driver.report(self.request_id)
