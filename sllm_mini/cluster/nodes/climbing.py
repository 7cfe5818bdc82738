"""Inside a worker: the rungs of the warmth ladder, up and down, one order each, and the process that does nothing else. Explained in chapter 08.

`Climber` is a worker's whole state, whichever way the worker runs; `serve` is the entry point of a process around one, which a
zygote forks, and `main` the same for a fresh interpreter. Until RUNTIME no torch is imported. What a rung costs is measured
here, without what counting its memory costs (one read of /proc/self/smaps_rollup, some 10 ms; `rung_memory` says how often).
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from sllm_mini.cluster.instance import Instance
from sllm_mini.cluster.node import Node
from sllm_mini.cluster.nodes import worker_messages
from sllm_mini.cluster.nodes.stages import Stages
from sllm_mini.cluster.nodes.worker_messages import Climbed, ClimbRung, Fall, Rung, Stage, Staged, Whole
from sllm_mini.cluster.process_memory import memory_of
from sllm_mini.cluster.runtime import give_back_memory, import_runtime, open_device
from sllm_mini.errors import ModelError, WireError
from sllm_mini.inference.workers import messages
from sllm_mini.inference.workers.service import EngineService
from sllm_mini.inference.workers.worker import end_process, serve_order, serve_orders, take_stdin
from sllm_mini.storage.client import StoreClient
from sllm_mini.types import Warmth
from sllm_mini.wire import Channel, WireTimeout, set_key

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine
    from sllm_mini.storage import Store

MakeEngine = Callable[[ClimbRung], Any]
"""Makes the engine of the rung READY in place of a model of the store's."""


def find_engine(name: str) -> MakeEngine | None:
    """The function called `module:function`; None for no name. Raises ModelError if there is none."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found: MakeEngine = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"no engine can be made by {name!r} ({error}); name a module:function that this process can import") from error
    return found


class Climber:
    """One worker's state: the rung on which it stands, and what it holds there. Begins at PROCESS. Safe from several threads:
    climbs and falls take turns, requests do not wait for them.

    `store` is the machine's where it is embedded in this process; else each order names its socket. With `make` the worker
    imports no torch and attaches nothing, and its engine is what `make` makes. `on_error` gets what ends a service, on the
    thread that steps.
    """

    def __init__(self, name: str, *, on_error: Callable[[BaseException], object], store: Store | None = None, make: MakeEngine | None = None) -> None:
        self.name = name
        self.warmth = Warmth.PROCESS
        self._on_error, self._store, self._make = on_error, store, make
        self._node: Node | None = None
        self._instance: Instance | None = None
        self._service: EngineService | None = None
        self._turn = threading.Lock()
        self._pipeline = Stages(self._turn, on_error)

    def climb(self, order: ClimbRung) -> float:
        """Climbs to `order.warmth` and returns the seconds that took. Raises ModelError for a rung that is not the next, for another
        model than it holds and for another digest; what importing, attaching, loading and serving raise: it stands where it
        stood then."""
        with self._turn:
            if order.warmth != self.warmth + 1:
                raise ModelError(f"worker {self.name} stands at {self.warmth} and cannot climb to {order.warmth}; rungs are climbed one by one")
            begun = time.monotonic()
            if order.warmth == Warmth.RUNTIME:
                self._import(order)
            elif order.warmth == Warmth.READY:
                self._serve(order)
            elif self._make is None:
                self._hold(order)
            self.warmth = order.warmth
            return time.monotonic() - begun

    def fall(self, warmth: Warmth) -> None:
        """Falls to DEVICE, DRAM or RUNTIME; to where it stands, or above, is no fall. Raises ModelError for a rung below those, which
        only the end of a process reaches."""
        if not Warmth.RUNTIME <= warmth <= Warmth.DEVICE:
            raise ModelError(f"worker {self.name} cannot fall to {warmth}; below RUNTIME, end it")
        with self._turn:
            if warmth >= self.warmth:
                return
            self._end_service()
            if self._instance is not None:
                self._instance.fall(warmth)
            if warmth == Warmth.RUNTIME:
                self._instance = None
                self._pipeline.close()
                give_back_memory()
            self.warmth = warmth

    def stage(self, start: int, stop: int, address: str, key: bytes = b"") -> str:
        """Serves layers of the model that it attached, once their bytes are there and until it lets go of it; returns the address. Without one
        it has them ready for a pipeline's last stage. Raises
        ModelError where it has none, and what `Piece` and `StageServer` raise."""
        if key:
            set_key(key)
        instance = self._instance
        if instance is None:
            raise ModelError(f"worker {self.name} holds no model of which it could serve layers; climb to DRAM first")
        return self._pipeline.serve(instance, start, stop, address, lambda: self._instance is instance)

    def whole(self, timeout: float | None = None) -> None:
        """Waits for the last byte. Raises the load's error, ModelError where it has no model, WireTimeout."""
        instance = self._instance
        if instance is not None:
            try:
                instance.wait(timeout)
            except TimeoutError as error:
                raise WireTimeout(str(error)) from error
        elif self._make is None:
            raise ModelError(f"worker {self.name} holds no model whose bytes could arrive; climb to DRAM first")

    @property
    def service(self) -> EngineService:
        """Raises ModelError below READY."""
        service = self._service
        if service is None:
            raise ModelError(f"worker {self.name} stands at {self.warmth} and serves nothing; climb to READY first")
        return service

    def stuck_seconds(self) -> float:
        """See `EngineService`; 0 below READY."""
        service = self._service
        return 0.0 if service is None else service.stuck_seconds()

    def cut(self) -> None:
        """From now on nothing is said to anybody, as if the machine had failed; returns at once. `close` frees what is left."""
        service = self._service
        if service is not None:
            service.cut()

    def close(self) -> None:
        """Ends what is under way and gives everything back. Safe to call twice; not on the thread that steps."""
        node = self._node
        if node is not None:
            node.close()  # a climb that waits for bytes ends now
        with self._turn:
            self._end_service()
            if self._node is not None:
                self._node.close()
            self._instance, self.warmth = None, Warmth.COLD
            self._pipeline.close()
            give_back_memory()  # the engine was in use when its instance was stopped, and may be in a cycle

    def _import(self, order: ClimbRung) -> None:
        if self._make is not None:
            for name in order.modules:
                importlib.import_module(name)
            return
        import_runtime(order.modules)
        if self._store is None:  # the process is this worker's own
            import torch

            torch.set_num_threads(order.threads)
        open_device(order.device)

    def _hold(self, order: ClimbRung) -> None:
        if order.warmth == Warmth.DRAM:
            if self._node is None:
                self._node = Node(StoreClient(order.store) if self._store is None else self._store, node_id=self.name)
            instance = self._node.hold(order.model)
            try:
                expected = order.digest if order.adapter is None else order.adapter.base
                if expected and instance.digest != expected:
                    raise ModelError(f"the store holds other weights of {order.model} than were registered ({instance.digest[:12]}, not {expected[:12]}); register it again")
                if not order.overlap:
                    instance.wait()
            except BaseException:
                instance.stop()
                raise
            self._instance = instance
        else:
            self._held(order).hold(order.device)

    def _held(self, order: ClimbRung) -> Instance:
        instance = self._instance
        if instance is None or instance.model != order.model:
            raise ModelError(f"worker {self.name} holds {instance and instance.model} and not {order.model}; let it fall to RUNTIME first")
        return instance

    def _serve(self, order: ClimbRung) -> None:
        if order.owner is None or not order.address or not order.arbiter:
            raise ModelError(f"worker {self.name} cannot serve as nobody: READY needs an owner, an address and an arbiter")
        if order.key:
            set_key(order.key)
        instance = None if self._make is not None else self._held(order)
        try:
            last = None if instance is None else order.last
            staged = None if last is None or instance is None else self._pipeline.join(instance, last, order.max_batch)
            engine: Engine = self._make(order) if self._make is not None else staged or self._ready(order)
            if order.warm_up and instance is not None:
                engine.complete([0], max_new_tokens=2, stop_at_eos=False)
            self._service = EngineService(
                engine, owner=order.owner, address=order.address, arbiter=order.arbiter, pace_seconds=order.pace_seconds, interval_seconds=order.interval_seconds,
                whole=(lambda: True) if instance is None or staged is not None else instance.arrived, on_error=self._on_error, line=True,
            )  # fmt: skip
            if instance is not None and staged is not None:
                service = self._service
                self._pipeline.follow(instance, staged, service, order.max_batch, lambda: self._service is service)
        except BaseException:
            if instance is not None:
                instance.fall(Warmth.DEVICE)
            raise

    def _ready(self, order: ClimbRung) -> Engine:
        """The engine of the model that is held, with the order's adapter. Raises ModelError where its folder has another one by now."""
        held = self._held(order)
        if order.adapter is None:
            return held.make_ready(max_batch=order.max_batch)
        return held.make_ready(max_batch=order.max_batch, adapter=order.adapter.folder, digest=order.digest)

    def _end_service(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            service.close()


def measured(warmth: Warmth, seconds: float) -> Rung:
    """The rung on which this process stands now."""
    memory = memory_of(os.getpid())
    return Rung(warmth, seconds, memory.private_nbytes, memory.proportional_nbytes)


def serve(channel: socket.socket, name: str = "", engine: str = "") -> NoReturn:
    """Runs a worker whose agent is at the other end of `channel`: what a zygote forks. It ends with the channel; it ignores
    SIGINT: its agent, or a killer, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders: Channel[worker_messages.Order] = Channel(channel, worker_messages.Order, name="agent of the worker")
    try:
        climber = Climber(name, on_error=lambda error: end_process(name, error), make=find_engine(engine))

        def carry_out(order: Any, payload: bytes) -> worker_messages.Answer:
            if isinstance(order, ClimbRung):
                seconds = climber.climb(order)
                rung = measured(order.warmth, seconds) if order.measure else Rung(order.warmth, seconds, 0, 0)
                return Climbed(order.number, rung, climber.service.address if order.warmth == Warmth.READY else "")
            if isinstance(order, Fall):
                climber.fall(order.warmth)
            elif isinstance(order, Whole):
                climber.whole()
            elif isinstance(order, Stage):
                return Staged(order.number, climber.stage(order.start, order.stop, order.address, order.key))
            else:
                return serve_order(climber.service, order, payload)
            return messages.Done(order.number)

        serve_orders(orders, carry_out, climber.stuck_seconds, beside=(messages.Move, Whole, Stage))
    except WireError:
        os._exit(0)  # the agent is gone; nothing here outlives it
    except BaseException:  # noqa: BLE001 - it is told, and ends the process
        traceback.print_exc()
    os._exit(1)


def main() -> NoReturn:
    """The same in a fresh interpreter, with the channel as standard input; its arguments are `name` and `engine`."""
    serve(take_stdin(), *sys.argv[1:3])
