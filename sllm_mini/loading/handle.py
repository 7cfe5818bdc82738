"""A load under way: what is there already, what is still to come, and how to wait for it or stop it.

Everything that starts before a load ends is made of this: streaming inference, progress bars, prefetching.
Taught in chapters 02 and 04.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.index import TensorEntry
from sllm_mini.device.base import Buffer
from sllm_mini.errors import LoadCancelled, LoadError
from sllm_mini.loading.flow import LoadReport
from sllm_mini.loading.pipeline import Pipeline
from sllm_mini.loading.plan import Chunk, LoadPlan
from sllm_mini.loading.restore import join_composites
from sllm_mini.types import Progress

if TYPE_CHECKING:
    import torch


class LoadHandle:
    """A running or finished load. Safe to use from several threads. As a context manager it cancels on leaving early.

    `tensors` exist at once; their bytes are right when `ready` says so. After a failure or a cancel every method that
    would give bytes raises the error, and no memory of the load is held.
    """

    def __init__(self, checkpoint: Checkpoint, plan: LoadPlan, buffers: list[Buffer]) -> None:
        self.checkpoint = checkpoint
        self._plan = plan
        self._tensors: dict[str, torch.Tensor] = {}
        self._buffers = buffers
        self._needs: dict[str, frozenset[int]] = {}
        self._entries = {tensor.name: (tensor, device) for tensor, device in plan.tensors}
        self._missing = {chunk.number for chunk in plan.chunks}
        self._done_nbytes = plan.nbytes - sum(chunk.nbytes for chunk in plan.chunks)
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._pipeline: Pipeline | None = None

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The plain tensors by name, in execution order; see `ready` for when their bytes are there."""
        with self._changed:
            self._raise_if_failed()
            return self._tensors

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are being loaded, in execution order."""
        names = self.checkpoint.index.layers
        return [names[layer] for layer in dict.fromkeys(tensor.layer for tensor, _ in self._plan.tensors)]

    @property
    def progress(self) -> Progress:
        with self._changed:
            return Progress(self._done_nbytes, self._plan.nbytes)

    @property
    def done(self) -> bool:
        """True once every byte is in place or the load has failed."""
        with self._changed:
            return self._ended

    @property
    def report(self) -> LoadReport:
        """What the load did so far, and in full once it is done."""
        if self._pipeline is None:
            return LoadReport()
        return self._pipeline.flow.report

    def ready(self, name: str) -> bool:
        """True if all bytes of a tensor, or of every tensor of a layer, are in place. Raises LoadError for a name that
        is neither, and the load's error if it failed."""
        needed = self._needed(name)
        with self._changed:
            self._raise_if_failed()
            return not (needed & self._missing)

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        """Waits until a tensor or layer is ready; False if `timeout` seconds passed first. Raises as `ready` does."""
        needed = self._needed(name)
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._error is not None or not (needed & self._missing), timeout)
            self._raise_if_failed()
            return arrived

    def wait(self, timeout: float | None = None) -> dict[str, torch.Tensor]:
        """Waits for all bytes and returns every tensor by name, composites put together.

        Raises the load's error (LoadError, IntegrityError, DeviceError, LoadCancelled), or TimeoutError after
        `timeout` seconds, in which case the load goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the load of {self.checkpoint.path} was not done after {timeout} seconds")
        self._join()  # also after a failure: whoever gets the error finds no thread of the load left
        with self._changed:
            self._raise_if_failed()
            tensors = dict(self._tensors)
        return join_composites(self.checkpoint, tensors)

    def cancel(self) -> None:
        """Ends the load; returns when every thread is gone and all memory given back. Does nothing after the end."""
        if self._pipeline is not None:
            self._pipeline.stop(LoadCancelled("the load was cancelled", path=self.checkpoint.path))
        self._join()

    def __enter__(self) -> LoadHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.done:
            self.cancel()

    def _needed(self, name: str) -> frozenset[int]:
        found = self._needs.get(name)
        if found is None:
            found = self._needs[name] = frozenset(self._chunks_of(name))
        return found

    def _chunks_of(self, name: str) -> Iterator[int]:
        if name in self._entries:
            yield from self._plan.chunks_of(*self._entries[name])
            return
        if name not in self._members:
            raise LoadError(f"{name!r} is neither a tensor nor a layer of this load", path=self.checkpoint.path)
        for tensor, device in self._members[name]:
            yield from self._plan.chunks_of(tensor, device)

    @cached_property
    def _members(self) -> dict[str, list[tuple[TensorEntry, int]]]:
        """The tensors of each layer. Whoever asks for one layer asks for all, and a model may have 36,000 tensors in 94."""
        layers = self.checkpoint.index.layers
        members: dict[str, list[tuple[TensorEntry, int]]] = {}
        for tensor, device in self._plan.tensors:
            members.setdefault(layers[tensor.layer], []).append((tensor, device))
        return members

    def _raise_if_failed(self) -> None:
        if self._error is None:
            return
        # The kept error is shared by threads; its traceback must not grow with every raise.
        raise self._error.with_traceback(None)

    def _join(self) -> None:
        if self._pipeline is not None:
            self._pipeline.join()

    def _attach(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def _give_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The tensors, made while the first bytes are on their way; after a failure they are dropped again."""
        with self._changed:
            if not (self._ended and self._error is not None):
                self._tensors = tensors

    def _on_chunk(self, chunk: Chunk) -> None:
        with self._changed:
            self._missing.discard(chunk.number)
            self._done_nbytes += chunk.nbytes
            self._changed.notify_all()

    def _on_end(self, error: BaseException | None) -> None:
        with self._changed:
            if error is None and self._missing:
                error = LoadError("the load ended before all its bytes were in place", path=self.checkpoint.path)
            if isinstance(error, LoadCancelled) and not self._missing:
                error = None  # cancelled after the last byte: there is nothing left to cancel
            self._error = error
            if error is not None:
                self._tensors = {}
                for buffer in self._buffers:
                    buffer.close()
            self._buffers = []
            self._ended = True
            self._changed.notify_all()
