"""Who has which row of the cache: requests that decode at the front, behind them those on hold and guests that move in.

A decode pass works on the first rows, so whoever joins or leaves those that decode swaps rows with another, which costs a
copy of what the two hold (see `kv`). Taught in chapters 06 and 07.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm_mini.errors import ModelError
from sllm_mini.inference.requests import Request

if TYPE_CHECKING:
    from sllm_mini.inference.kv import SlotCache


class Guest:
    """A request that is moving in: a row that fills. `known` are the tokens of that row, None where only their KV came."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.row: int | None = None
        self.known: list[int | None] = []


class Rows:
    """The rows of `kv` in use and their `owners`, of whom the first `count` are requests that decode. One thread at a time."""

    def __init__(self, kv: SlotCache) -> None:
        self.kv = kv
        self.owners: list[Request | Guest] = []
        self.count = 0

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def running(self) -> list[Request]:
        """Those that decode, by row."""
        return [owner for owner in self.owners[: self.count] if isinstance(owner, Request)]

    @property
    def late(self) -> list[Request]:
        """Those that lack keys and values, which their next step is to compute."""
        return [owner for owner in self.owners[self.count :] if isinstance(owner, Request) and owner.late and not owner.held]

    def add(self, owner: Request | Guest) -> int:
        """Gives an owner an empty row behind all others."""
        owner.row = self.kv.add_row()
        self.owners.append(owner)
        return owner.row

    def replace(self, guest: Guest, request: Request) -> None:
        """A request takes over the row of a guest, which has none then."""
        row = row_of(guest)
        self.owners[row], request.row, guest.row = request, row, None

    def join(self, request: Request) -> None:
        """From a row behind those that decode to the last of them."""
        self._swap(row_of(request), self.count)
        self.count += 1

    def leave(self, owner: Request | Guest) -> None:
        """From a row that decodes to the first behind them."""
        self.count -= 1
        self._swap(row_of(owner), self.count)

    def remove(self, owner: Request | Guest, *, clean: bool) -> None:
        """Takes an owner's row away; with `clean` its memory is zeroed, see `SlotCache.empty_row`."""
        self.kv.empty_row(row_of(owner), clean=clean)  # first, so that a swap copies only what the other one holds
        if row_of(owner) < self.count:
            self.leave(owner)
        self._swap(row_of(owner), len(self.owners) - 1)
        self.owners.pop()
        owner.row = None
        self.kv.pop_row()

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.kv.swap_rows(one, other)
            owners = self.owners
            owners[one], owners[other] = owners[other], owners[one]
            owners[one].row, owners[other].row = one, other


def row_of(owner: Request | Guest) -> int:
    """Its row. Raises ModelError if it has none."""
    if owner.row is None:
        raise ModelError(f"request {owner.request_id!r} has no slot; it ended between two steps")
    return owner.row
