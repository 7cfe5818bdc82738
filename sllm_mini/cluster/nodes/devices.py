"""Which instance of a node has which of its devices. Part of `agent`; chapter 08."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from sllm_mini.errors import SllmError


class Devices:
    """Who has which device. A climb waits for the falls that free its devices, which are on their way. Safe from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owners: dict[int, int] = {}
        self._ended = False

    def take(self, instance: int, devices: Sequence[int]) -> None:
        """Waits until they are free, or the instance's. Raises SllmError once all has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or all(self._owners.get(device, instance) == instance for device in devices))
            if self._ended:
                raise SllmError("the node has ended")
            self._owners |= dict.fromkeys(devices, instance)

    def free(self, instance: int) -> None:
        with self._changed:
            self._owners = {device: owner for device, owner in self._owners.items() if owner != instance}
            self._changed.notify_all()

    def end(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
