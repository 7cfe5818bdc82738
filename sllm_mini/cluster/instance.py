"""An engine on memory that a store lends: ready as its bytes arrive, stopped at any moment. Explained in chapter 05.

An instance is one lease and one thread, which waits for the last byte and ends there. Building one costs the model's
skeleton (some tens of milliseconds) and no copy of its weights.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sllm_mini.device.base import Device
from sllm_mini.errors import LoadCancelled, SllmError
from sllm_mini.types import ModelId, Span, SpanRecorder, Tier, Warmth

if TYPE_CHECKING:
    from sllm_mini.inference import Engine, StreamedModel
    from sllm_mini.storage import Attachment

_LOOK_SECONDS = 0.05


class NodeError(SllmError):
    """A node that was closed, or an instance that was stopped, was asked for more."""


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


class Instance:
    """See the module. Made by `Node.start`. Safe from several threads, except for `engine`, which has its own rules.

    `tier` is where the bytes are: DRAM or DEVICE, lent by the store, or DISK if it had no room (`reason` says why) and they
    are loaded into memory of this process's own.
    """

    def __init__(
        self,
        instance_id: str,
        model: str,
        device: Device,
        engine: Engine,
        streamed: StreamedModel,
        load: Load,
        recorder: SpanRecorder,
        on_stop: Callable[[str], object],
    ) -> None:
        self.instance_id, self.model, self.device = instance_id, ModelId(model), device.name
        self.tier: Tier = load.tier
        self.reason: str = load.reason
        self._on_the_way = Warmth.DRAM if device.is_host else Warmth.DEVICE
        self._held: tuple[Engine, StreamedModel, Load] | None = (engine, streamed, load)
        self._recorder, self._on_stop = recorder, on_stop
        self._error: BaseException | None = None
        self._arrived = threading.Event()
        self._lock = threading.Lock()
        follower = threading.Thread(target=self._follow, args=(streamed, load), name="sllm-node-load", daemon=True)
        try:
            follower.start()
        except RuntimeError as error:
            raise NodeError(f"no thread can be started to watch the load of {model} ({error}); end some threads and start it again") from error
        self._follower = follower  # not before: one that never ran would hold what it was to follow, in a cycle

    def __repr__(self) -> str:
        return f"<Instance {self.instance_id} of {self.model} on {self.device}: {self.warmth}>"

    @property
    def engine(self) -> Engine:
        """It may run at once: what it lacks, its first pass waits for. Raises NodeError once the instance was stopped."""
        held = self._held
        if held is None:
            raise NodeError(f"instance {self.instance_id} of {self.model} was stopped; start another")
        return held[0]

    @property
    def warmth(self) -> Warmth:
        """READY from the last byte on; before it the rung the bytes are on their way to (DRAM on a CPU, DEVICE on a GPU);
        COLD once it was stopped, or its load failed."""
        if self._held is None or self._error is not None:
            return Warmth.COLD
        return Warmth.READY if self._arrived.is_set() else self._on_the_way

    @property
    def spans(self) -> tuple[Span, ...]:
        """The parts of the start so far: "main" is what `Node.start` did, "loader" the load beside it, "wait" and "compute"
        the layers of a first pass that ran meanwhile."""
        return tuple(self._recorder.spans)

    @property
    def rung_seconds(self) -> dict[Warmth, float]:
        """How long `Node.start` climbed to each rung; what came beside it and after it is in `spans`."""
        found = dict.fromkeys(Warmth, 0.0)
        for span in self.spans:
            if span.lane == "main" and span.warmth is not None:
                found[span.warmth] += span.seconds
        return {rung: seconds for rung, seconds in found.items() if seconds}

    def ready(self, timeout: float | None = None) -> Engine:
        """Waits for the last byte and returns the engine. Raises the load's error, LoadCancelled if it was stopped before
        that byte, NodeError if after, TimeoutError."""
        if not self._arrived.wait(timeout):
            raise TimeoutError(f"instance {self.instance_id} of {self.model} was not ready after {timeout} seconds")
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self.engine

    def stop(self) -> None:
        """Drops the engine, and with it the lease: the store may evict then. Safe to call twice.

        A generation that waits for bytes raises LoadCancelled. One that has them all goes on, and whoever holds it or the
        engine holds the memory too, so the lease ends with the last of them. A store in another process takes note of the
        end some milliseconds later.
        """
        with self._lock:
            if self._held is None:
                return
            engine, streamed, load = self._held
            self._held = None
            load.cancel()
            self._follower.join()
            model = weakref.ref(streamed.model)
            del engine, streamed, load
            if model() is not None:  # held by a cycle, perhaps: the first import of a library leaves one with frames in it
                gc.collect()
        self._on_stop(self.instance_id)

    def _follow(self, streamed: StreamedModel, load: Load) -> None:
        started = time.monotonic()
        try:
            streamed.wait()
            self._recorder.spans.append(Span("bytes", started, time.monotonic(), "loader", load.checkpoint.nbytes, Warmth.DEVICE))
        except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by whoever waits for it
            self._error = error.with_traceback(None)
        self._arrived.set()

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
