"""One machine that serves models: a store, and the engines that run on its memory. Explained in chapter 05.

    with Store(folder, dram_nbytes=8 << 30) as store, Node(store, node_id="a") as node:
        store.register("llama", "llama.sllm")
        instance = node.start("llama")
        print(instance.engine.complete("Once upon a time").text)

All instances of a model in one place share one image, so the second costs no bytes and no load. They run in this process;
a process of its own for an instance is a `Zygote`'s child that makes a node of the same store.
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from sllm_mini.cluster.instance import Instance, NodeError
from sllm_mini.cluster.load import Load
from sllm_mini.cluster.runtime import has_runtime, import_runtime
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.errors import LoadCancelled, StoreError
from sllm_mini.storage.holdings import DRAM
from sllm_mini.storage.sources import DISK
from sllm_mini.types import NodeId, ProgressCallback, SpanRecorder, Warmth

if TYPE_CHECKING:
    from sllm_mini.storage import Store, StoreClient


class Node:
    """See the module. `store` is this machine's, embedded or in another process, and stays its owner's to close. Safe from
    several threads. As a context manager it closes itself."""

    def __init__(self, store: Store | StoreClient, *, node_id: str) -> None:
        self.store = store
        self.node_id = NodeId(node_id)
        self._numbers = itertools.count()
        self._instances: dict[str, Instance] = {}
        self._starting: set[threading.Event] = set()
        """What cancels each start that is under way."""
        self._closed = False
        self._changed = threading.Condition()

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Those that were started and not stopped, in the order in which they were started."""
        with self._changed:
            return tuple(self._instances.values())

    def start(self, model: str, device: str | Device = "cpu", *, overlap: bool = True) -> Instance:
        """An instance of a model that the store knows. With `overlap` it is there while its bytes still arrive, else it is
        `ready`. The first start in a process imports torch and transformers.

        Raises StoreError for a name that is not registered or a store that is gone, ModelError for a model that cannot be
        run, what attaching and loading raise, NodeError once the node is closed, LoadCancelled if it is closed meanwhile. A
        start that raised has left no lease, instance or thread, even if its error is kept.
        """
        return self._begin(lambda name, cancelled: self._start(name, model, get_device(device), overlap, cancelled))

    def hold(self, model: str, device: str | Device = "cpu") -> Instance:
        """An instance without an engine: the lease on a model's weights, which may still arrive (`Instance.wait`). Imports torch.
        Raises as `start` does."""
        return self._begin(lambda name, cancelled: self._hold(name, model, get_device(device), SpanRecorder(), cancelled))

    def _begin(self, climb: Callable[[str, threading.Event], Instance]) -> Instance:
        """Gives a start a number and what cancels it, and keeps what came of it."""
        cancelled = threading.Event()
        with self._changed:
            if self._closed:
                raise NodeError(f"node {self.node_id} is closed; make another for its store")
            self._starting.add(cancelled)
            instance_id = f"{self.node_id}/{next(self._numbers)}"
        try:
            return climb(instance_id, cancelled)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep the tensors in them
            raise
        finally:
            with self._changed:
                self._starting.discard(cancelled)
                self._changed.notify_all()

    def _start(self, instance_id: str, model: str, device: Device, overlap: bool, cancelled: threading.Event) -> Instance:
        recorder = SpanRecorder()
        with recorder.span("import", warmth=Warmth.RUNTIME):
            import_runtime()

        def make_ready(instance: Instance) -> None:
            instance.make_ready()
            if not overlap:
                with recorder.span("wait for bytes", warmth=Warmth.DEVICE):
                    instance.ready()

        return self._hold(instance_id, model, device, recorder, cancelled, make_ready)

    def _hold(
        self,
        instance_id: str,
        model: str,
        device: Device,
        recorder: SpanRecorder,
        cancelled: threading.Event,
        then: Callable[[Instance], object] = lambda _: None,
    ) -> Instance:
        instance = Instance(instance_id, model, device, lambda place: Load(self.store.attach(model, place), cancelled), recorder, self._forget)
        try:
            then(instance)
            self._keep(instance, cancelled)
        except BaseException:
            instance.stop()
            raise
        return instance

    def _keep(self, instance: Instance, cancelled: threading.Event) -> None:
        with self._changed:
            if cancelled.is_set():
                raise LoadCancelled(f"the start of {instance.model} was cancelled: its node closed")
            self._instances[instance.instance_id] = instance

    def _forget(self, instance_id: str) -> None:
        with self._changed:
            self._instances.pop(instance_id, None)

    def warmth(self, model: str) -> Warmth:
        """The highest rung that this node holds for a model: READY with an instance that has all its bytes, DEVICE or DRAM
        if the store holds all of it there, else what this process is for any model: RUNTIME once it has imported what a
        start needs, PROCESS until then. What is on its way to a rung does not count.

        Raises StoreError for a name that is not registered, or a store that is gone while no instance is ready.
        """
        if any(instance.model == model and instance.warmth is Warmth.READY for instance in self.instances):
            return Warmth.READY
        found = next((found for found in self.store.models() if found.name == model), None)
        if found is None:
            raise StoreError(f"no model is registered as {model[:200]!r}; register it first")
        whole = {held.place for held in found.places if not held.loading and held.nbytes >= found.nbytes} - {DISK}
        if whole:
            return Warmth.DRAM if whole == {DRAM} else Warmth.DEVICE
        return Warmth.RUNTIME if has_runtime() else Warmth.PROCESS

    def prefetch(self, model: str, to: str = DRAM, *, on_progress: ProgressCallback | None = None) -> None:
        """Brings a model to a place ("disk", "dram", "cuda:0") and returns when it is there; see `Store.prefetch`."""
        self.store.prefetch(model, to, on_progress=on_progress)

    def evict(self, model: str, place: str = DRAM) -> int:
        """Gives back what a place holds of a model, and returns the bytes; see `Store.evict`. Raises StoreError while an
        instance uses it."""
        return self.store.evict(model, place)

    def close(self) -> None:
        """Cancels the starts under way, waits until they have ended, and stops every instance; the store runs on. Safe to
        call twice. The opening of a model's source is not interrupted but waited for."""
        with self._changed:
            self._closed = True
            for cancelled in self._starting:
                cancelled.set()
            self._changed.wait_for(lambda: not self._starting)
        for instance in self.instances:
            instance.stop()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
