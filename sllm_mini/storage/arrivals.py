"""Which layers of an image are in place: told by whoever moves the bytes, asked by whoever runs the model.

The same questions as a `LoadHandle` answers, for bytes that another process loads or that a copy brings (chapter 04).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.index import Index, TensorEntry
from sllm_mini.errors import LoadError
from sllm_mini.types import Progress


def image_places(index: Index) -> Iterator[tuple[TensorEntry, int]]:
    """Each tensor, in execution order, and the offset of its first byte in the image: all partitions, one after another."""
    starts, at = [], 0
    for partition in index.partitions:
        starts.append(at)
        at += partition.nbytes
    for tensor in index.tensors:
        yield tensor, starts[tensor.partition] + tensor.offset if tensor.nbytes else 0


class Arrivals:
    """The layers that have arrived so far. Safe from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        index = checkpoint.index
        self._ends = dict.fromkeys((tensor.layer for tensor in index.tensors), 0)
        self._layer_of = {tensor.name: tensor.layer for tensor in index.tensors}
        for tensor, offset in image_places(index):
            self._ends[tensor.layer] = max(self._ends[tensor.layer], offset + tensor.nbytes)
        self._layer_of |= {name: number for number, name in enumerate(index.layers) if name not in self._layer_of}
        self._missing = set(self._ends)
        self._done_nbytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def layers(self) -> list[str]:
        """Their names, in execution order."""
        return [self.checkpoint.index.layers[number] for number in self._ends]

    @property
    def progress(self) -> Progress:
        with self._changed:
            return Progress(self._done_nbytes, self.checkpoint.nbytes)

    @property
    def done(self) -> bool:
        """True once everything has arrived or nothing more will."""
        with self._changed:
            return self._ended

    def ready(self, name: str) -> bool:
        """True if the layer, or the layer of the tensor, of that name is in place. Raises LoadError for a name that is
        neither, and the error that ended it."""
        number = self._number(name)
        with self._changed:
            self._raise_if_failed()
            return number not in self._missing

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        """Waits until `ready`; False if `timeout` seconds passed first."""
        number = self._number(name)
        with self._changed:
            there = self._changed.wait_for(lambda: self._error is not None or number not in self._missing, timeout)
            self._raise_if_failed()
            return there

    def wait(self, timeout: float | None = None) -> None:
        """Waits for everything. Raises the error that ended it, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"{self.checkpoint.path} had not arrived after {timeout} seconds")
            self._raise_if_failed()

    def cancel(self) -> None:
        """Does nothing: what arrives is not this object's to stop, and it ends by itself."""

    def advance(self, prefix_nbytes: int) -> None:
        """Says that this much of the image, from its start, is in place."""
        self.arrived([number for number, end in self._ends.items() if end <= prefix_nbytes], prefix_nbytes)

    def arrived(self, layers: Iterable[int], done_nbytes: int) -> None:
        """Says that these layers are in place, and how many bytes in all."""
        with self._changed:
            self._missing.difference_update(layers)
            self._done_nbytes = max(self._done_nbytes, done_nbytes)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Says that everything is in place, or why nothing more will come; the first word counts."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
                if error is None:
                    self._missing.clear()
                    self._done_nbytes = self.checkpoint.nbytes
                self._changed.notify_all()

    def _number(self, name: str) -> int:
        number = self._layer_of.get(name)
        if number is None or number not in self._ends:
            raise LoadError(f"{name!r} is neither a tensor nor a layer of it", path=self.checkpoint.path)
        return number

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)
