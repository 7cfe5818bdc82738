"""Who may speak for a request: a register of epochs, the arbiter of every move. Explained in chapter 07.

Each request has one owner and an epoch that grows by one whenever it changes hands. `claim` is a compare-and-set: of
two that claim the same epoch one wins, and the other learns it in the answer. So a source that hears nothing and a
destination that hears nothing need not agree with each other, only with the register (epochs as in ZooKeeper's Zab;
fencing tokens as in Chubby, OSDI'06). Costs a dictionary entry a request.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

from sllm_mini.types import Epoch


class Ownership(NamedTuple):
    """Who owns a request, None for nobody, and since which epoch; (None, 0) is a request nobody ever claimed."""

    owner: str | None
    epoch: Epoch


class Register(Protocol):
    """What a move asks of the arbiter, be it in this process or another."""

    def owner(self, request_id: str) -> Ownership: ...

    def claim(self, request_id: str, owner: str, expected_epoch: int, *, ticket: int | None = None) -> Epoch | None: ...

    def release(self, request_id: str, owner: str, epoch: int) -> bool: ...


class EpochRegister:
    """The arbiter, in memory; `OwnershipServer` lets other processes ask it. Safe from several threads.

    Names of owners are never used twice: one that was retired stays so, and whoever takes its place has a name of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Ownership] = {}
        self._tickets: dict[str, int | None] = {}
        self._retired: set[str] = set()

    def owner(self, request_id: str) -> Ownership:
        """Who owns the request now."""
        with self._lock:
            return self._owner(request_id)

    def claim(self, request_id: str, owner: str, expected_epoch: int, *, ticket: int | None = None) -> Epoch | None:
        """Makes `owner` the owner if the epoch is still `expected_epoch`. The new epoch, or None for whoever came too late.

        A claim whose answer may have been lost is made again with the same `ticket`, any number that nobody else would take:
        it is answered as it was. The owner's name alone would not do: two may claim in it at once.
        """
        with self._lock:
            epoch = self._owner(request_id).epoch
            if owner in self._retired:
                return None
            if ticket is not None and epoch == expected_epoch + 1 and self._tickets.get(request_id) == ticket:
                return epoch
            if epoch != expected_epoch:
                return None
            self._entries[request_id] = Ownership(owner, Epoch(expected_epoch + 1))
            self._tickets[request_id] = ticket
            return Epoch(expected_epoch + 1)

    def release(self, request_id: str, owner: str, epoch: int) -> bool:
        """Leaves the request without an owner, for anybody to claim. False if it was not `owner`'s in that epoch."""
        with self._lock:
            if self._owner(request_id) != (owner, epoch):
                return False
            self._entries[request_id] = Ownership(None, Epoch(epoch))
            return True

    def retire(self, owner: str) -> dict[str, Epoch]:
        """The requests of an owner that is dead, and the epochs in which they were its own: whoever takes one over claims with
        that epoch, so that of two who do so one wins. From now on the dead one's claims are refused: one may still be on its
        way, written by a process that was killed right after, and must not take a request to the grave."""
        with self._lock:
            self._retired.add(owner)
            return {request_id: entry.epoch for request_id, entry in self._entries.items() if entry.owner == owner}

    def forget(self, request_id: str) -> None:
        """The request is over and its id will not come again."""
        with self._lock:
            self._entries.pop(request_id, None)
            self._tickets.pop(request_id, None)

    def _owner(self, request_id: str) -> Ownership:
        return self._entries.get(request_id, Ownership(None, Epoch(0)))
