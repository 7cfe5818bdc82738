"""An engine on memory that a store lends, climbed rung by rung: held, ready as its bytes arrive, put away. Explained in chapter 05.

An instance is one lease and, from when it has an engine until its last byte, one thread. Making it ready costs the model's
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

from sllm_mini.cluster.load import Load
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import ModelError, SllmError
from sllm_mini.types import ModelId, Span, SpanRecorder, Tier, Warmth

if TYPE_CHECKING:
    from sllm_mini.inference import Engine, StreamedModel
    from sllm_mini.inference.pieces import Piece


class NodeError(SllmError):
    """A node that was closed, or an instance that was stopped, was asked for more."""


class Instance:
    """See the module. Made by `Node.start`, or by `Node.hold` without an engine. Safe from several threads, except for
    `engine`, which has its own rules.

    `tier` is where the bytes are: DRAM or DEVICE, lent by the store, or DISK if it had no room (`reason` says why) and they
    are loaded into memory of this process's own.
    """

    def __init__(
        self,
        instance_id: str,
        model: str,
        device: Device,
        attach: Callable[[Device], Load],
        recorder: SpanRecorder,
        on_stop: Callable[[str], object],
    ) -> None:
        """Attaches the model on `device`. Raises what `attach` raises."""
        self.instance_id, self.model = instance_id, ModelId(model)
        self._attach, self._recorder, self._on_stop = attach, recorder, on_stop
        self._running: tuple[Engine, StreamedModel] | None = None
        self._error: BaseException | None = None
        self._arrived = threading.Event()
        self._follower: threading.Thread | None = None
        self._lock = threading.RLock()
        self._load: Load | None = self._attached(device)

    def _attached(self, device: Device) -> Load:
        with self._recorder.span("attach", warmth=Warmth.DEVICE):
            load = self._attach(device)
        self.device = device.name
        self.tier: Tier = load.tier
        self.reason: str = load.reason
        self._place = Warmth.DRAM if device.is_host else Warmth.DEVICE
        return load

    def __repr__(self) -> str:
        return f"<Instance {self.instance_id} of {self.model} on {self.device}: {self.warmth}>"

    @property
    def digest(self) -> str:
        """Names the weights: the digest of the checkpoint's index. Raises NodeError once the instance was stopped."""
        found: str = self._held().checkpoint.digest
        return found

    @property
    def engine(self) -> Engine:
        """It may run at once: what it lacks, its first pass waits for. Raises NodeError once the instance was stopped, and while
        it has no engine."""
        self._held()
        running = self._running
        if running is None:
            raise NodeError(f"instance {self.instance_id} of {self.model} holds weights and no engine; make it ready first")
        return running[0]

    @property
    def warmth(self) -> Warmth:
        """READY from the last byte on if it has an engine; else the rung the bytes are on, or on their way to (DRAM on a CPU, DEVICE
        on a GPU); COLD once it was stopped, or its load failed."""
        if self._load is None or self._error is not None:
            return Warmth.COLD
        return Warmth.READY if self._running is not None and self._arrived.is_set() else self._place

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

    def arrived(self) -> bool:
        """Whether every byte is there. Raises the load's error, NodeError once the instance was stopped."""
        load = self._held()
        return all(load.ready(layer) for layer in load.layers)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the last byte, with an engine or without. Raises the load's error, LoadCancelled if the instance is stopped
        before that byte, NodeError if it was already, TimeoutError."""
        self._held().wait_for_all(timeout)

    def hold(self, device: str | Device) -> None:
        """Brings the weights to another place and waits for them there; what the place before lent is given back then. Raises
        NodeError while there is an engine, and what attaching and loading raise: the weights are where they were then."""
        target = get_device(device)
        with self._lock:
            before = self._held()
            if target.name == self.device:
                return
            if self._running is not None:
                raise NodeError(f"instance {self.instance_id} of {self.model} has an engine on {self.device}; let it fall to DEVICE first")
            place = self.device, self.tier, self.reason, self._place
            load = None
            try:
                load = self._attached(target)
                load.wait_for_all()
            except BaseException:
                if load is not None:
                    load.close()
                self.device, self.tier, self.reason, self._place = place
                raise
            self._load = load
            before.close()

    def make_ready(self, *, max_batch: int = 8, adapter: str = "", digest: str = "") -> Engine:
        """Makes the engine, which may run while bytes still arrive, or gives the one there is; with the folder of an `adapter` it computes with that
        too, and of the lent memory nothing is written. `digest`, where given, must then be that of both (`adapted_digest`). Raises ModelError for
        a model that cannot be run and an adapter that does not fit, NodeError once the instance was stopped; it holds what it held before then."""
        from sllm_mini.inference import Engine, load_tokenizer, stream_model
        from sllm_mini.inference.templates import take

        with self._lock:
            load = self._held()
            if self._running is not None:
                return self._running[0]
            recorder, template = self._recorder, take(load.checkpoint)
            loading: Any = load  # it has what stream_model asks for, most of it the attachment's own
            streamed = stream_model(loading, recorder=recorder, skeleton=None if template is None else template.model)
            with recorder.span("tokenizer", warmth=Warmth.DRAM):
                tokenizer = load_tokenizer(load.checkpoint) if template is None else template.tokenizer
            name = load.checkpoint.digest
            if adapter:
                with recorder.span("adapter", warmth=Warmth.READY):
                    name = _apply(streamed.model, name, adapter, digest)
            with recorder.span("engine", warmth=Warmth.READY):
                engine = Engine(streamed.model, tokenizer, max_batch=max_batch, name=name, recorder=recorder)
            self._arrived = threading.Event()
            follower = threading.Thread(target=self._follow, args=(streamed, load, self._arrived), name="sllm-node-load", daemon=True)
            try:
                follower.start()
            except RuntimeError as error:
                raise NodeError(f"no thread can be started to watch the load of {self.model} ({error}); end some threads and start it again") from error
            self._follower = follower  # not before: one that never ran would hold what it was to follow, in a cycle
            self._running = engine, streamed
            return engine

    def piece(self, start: int, stop: int) -> Piece:
        """Layers `start` to `stop` − 1, once their bytes are there. Raises what `Piece` raises, the load's error, NodeError and LoadCancelled once
        the instance was stopped."""
        from sllm_mini.inference.pieces import Piece

        load = self._held()
        return Piece(load.checkpoint, load.tensors, start, stop, wait=load.wait_for)

    def ready(self, timeout: float | None = None) -> Engine:
        """Waits for the last byte and returns the engine. Raises the load's error, LoadCancelled if it was stopped before
        that byte, NodeError if after, or if it has no engine, TimeoutError."""
        if self._follower is None:
            return self.engine
        if not self._arrived.wait(timeout):
            raise TimeoutError(f"instance {self.instance_id} of {self.model} was not ready after {timeout} seconds")
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self.engine

    def fall(self, warmth: Warmth) -> None:
        """Keeps less: at DEVICE the weights where they are and no engine, at DRAM the weights in the host's memory, below it nothing,
        as after `stop`. Where it keeps less already, nothing happens. Waits for bytes that it keeps and that are still arriving.
        Raises what `hold` raises."""
        if warmth < Warmth.DRAM:
            return self.stop()
        with self._lock:
            if warmth < Warmth.READY:
                self._drop_engine()
            if warmth < Warmth.DEVICE and self._load is not None:
                self.hold("cpu")

    def stop(self) -> None:
        """Drops the engine, and with it the lease: the store may evict then. Safe to call twice.

        A generation that waits for bytes raises LoadCancelled. One that has them all goes on, and whoever holds it or the
        engine holds the memory too, so the lease ends with the last of them. A store in another process takes note of the
        end some milliseconds later.
        """
        held = self._load
        if held is not None:
            held.cancel()  # before the lock: whoever has it may be waiting for bytes
        del held
        with self._lock:
            if self._load is None:
                return
            self._load.cancel()
            self._load = None
            self._drop_engine()
        self._on_stop(self.instance_id)

    def _held(self) -> Load:
        load = self._load
        if load is None:
            raise NodeError(f"instance {self.instance_id} of {self.model} was stopped; start another")
        return load

    def _drop_engine(self) -> None:
        if self._running is None or self._follower is None:
            return
        engine, streamed = self._running
        self._running = None
        self._follower.join()
        model = weakref.ref(streamed.model)
        del engine, streamed
        if model() is not None:  # held by a cycle, perhaps: the first import of a library leaves one with frames in it
            gc.collect()

    def _follow(self, streamed: StreamedModel, load: Load, arrived: threading.Event) -> None:
        started = time.monotonic()
        try:
            streamed.wait()
            self._recorder.spans.append(Span("bytes", started, time.monotonic(), "loader", load.checkpoint.nbytes, Warmth.DEVICE))
        except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by whoever waits for it
            self._error = error.with_traceback(None)
        arrived.set()

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _apply(model: Any, base: str, folder: str, digest: str) -> str:
    """From now on the model computes with the adapter; what names both. Raises ModelError where that is not `digest`, and what loading raises."""
    from sllm_mini.inference.adapter_files import adapted_digest, open_adapter
    from sllm_mini.inference.lora import Adapters

    found = adapted_digest(base, open_adapter(folder).digest())
    if digest and found != digest:
        raise ModelError(f"the adapter in {folder} is another one than was deployed; deploy it again")
    adapters = Adapters(model)
    adapters.load(folder, folder)
    adapters.use(folder)
    return found
