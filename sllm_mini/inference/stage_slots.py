"""The rows of one text's keys and values at several stages: each names its rows, and the others arrange theirs alike. Chapter 10."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from sllm_mini.inference.kv import SlotCache

_names = count()


class NamedSlots(SlotCache):
    """A cache whose rows have names, `number` among those of its engine. One thread at a time."""

    def __init__(self, windows: Sequence[int | None], number: int = 0) -> None:
        super().__init__(windows)
        self.number = number
        self.names: list[int] = []

    def add_row(self) -> int:
        row = super().add_row()
        self.names.append(next(_names))
        return row

    def pop_row(self, *, clean: bool = False) -> None:
        super().pop_row(clean=clean)
        self.names.pop()

    def swap_rows(self, one: int, other: int) -> None:
        super().swap_rows(one, other)
        self.names[one], self.names[other] = self.names[other], self.names[one]

    def arrange(self, names: Sequence[int], lengths: Sequence[int]) -> None:
        """Makes the rows those that another stage has. Rows that went are zeroed; a length may only be shorter than here, as after a
        pass that another stage did not finish. Raises ValueError for rows that this stage cannot have."""
        held = dict(zip(self.names, self.lengths, strict=True))
        if len(set(names)) != len(names) or len(names) != len(lengths) or any(length > held.get(name, 0) for name, length in zip(names, lengths, strict=True)):
            raise ValueError("the pass names rows that this stage does not have; end the requests and open the stages again")
        for name in [name for name in self.names if name not in names]:
            self.swap_rows(self.names.index(name), len(self.names) - 1)
            self.pop_row(clean=True)
        for row, name in enumerate(names):
            if name not in self.names:
                self.names[self.add_row()] = name
            self.swap_rows(row, self.names.index(name))
        self.lengths[:] = lengths
