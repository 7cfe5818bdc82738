"""The bytes of one instance on their way: waits that its owner can end. Explained in chapter 05.

Costs nothing beside the attachment that it wraps; whoever waits looks twenty times a second whether to give up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import LoadCancelled, SllmError

if TYPE_CHECKING:
    from sllm_mini.storage import Attachment

_LOOK_SECONDS = 0.05


class Load:
    """An attachment whose waits end with LoadCancelled soon after `cancelled` is set. An attachment's own do not: what a
    store brings, it brings for others too. Safe from several threads."""

    def __init__(self, attachment: Attachment, cancelled: threading.Event) -> None:
        self._attachment, self._cancelled = attachment, cancelled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attachment, name)

    def check(self) -> None:
        """Raises LoadCancelled if it was."""
        if self._cancelled.is_set():
            raise LoadCancelled("the start was cancelled: the instance was stopped, or its node closed", path=self._attachment.checkpoint.path)

    def ready(self, name: str) -> bool:
        """See `Attachment.ready`."""
        return self._poll(lambda _: self._attachment.ready(name), 0.0)

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        """See `Attachment.wait_for`."""
        return self._poll(lambda seconds: self._attachment.wait_for(name, seconds), timeout)

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """See `Attachment.wait`."""
        found: dict[str, Any] = {}

        def look(seconds: float) -> bool:
            try:
                found.update(self._attachment.wait(seconds))
            except TimeoutError:
                return False
            return True

        if not self._poll(look, timeout):
            raise TimeoutError(f"{self._attachment.checkpoint.path} had not arrived after {timeout} seconds")
        return found

    def wait_for_all(self, timeout: float | None = None) -> None:
        """Waits for the last byte, without putting tensors together. Raises the load's error, or TimeoutError."""
        end = None if timeout is None else time.monotonic() + timeout
        for layer in self.layers:
            if not self.wait_for(layer, None if end is None else max(end - time.monotonic(), 0.0)):
                raise TimeoutError(f"{self._attachment.checkpoint.path} had not arrived after {timeout} seconds")

    def cancel(self) -> None:
        """Ends the waits, and a load of this process's own."""
        self._cancelled.set()
        self._attachment.cancel()

    def _poll(self, look: Callable[[float], bool], timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LOOK_SECONDS if end is None else min(max(end - time.monotonic(), 0.0), _LOOK_SECONDS)
            try:
                if look(left):
                    return True
            except SllmError:
                if not self._cancelled.is_set():  # else it is a closed attachment's
                    raise
            self.check()
            if end is not None and time.monotonic() >= end:
                return False
