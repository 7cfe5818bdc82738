"""A store on a Unix socket: one thread per connection, and a connection that attached a model is the lease on it.

The socket has mode 0600 and the kernel says who connects (`wire.listener`), messages are schema-checked and never
unpickled, memory goes as descriptors. A client that is killed loses its connection, and with it its leases. Taught in
chapter 05.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from sllm_mini.checkpoint.index import encode_index
from sllm_mini.device.cuda_memory import DeviceMemory
from sllm_mini.errors import SllmError, StoreError
from sllm_mini.storage import messages
from sllm_mini.storage.attach import Arriving
from sllm_mini.storage.failures import failure
from sllm_mini.storage.holdings import DRAM, Lease
from sllm_mini.storage.lending import duplicate
from sllm_mini.storage.store import Store
from sllm_mini.types import Progress
from sllm_mini.wire import MAX_FDS, Channel, ChannelClosed, Connections, WireTimeout

SEND_SECONDS = 30.0
"""A client that does not read for so long is given up."""
_PROGRESS_SECONDS = 0.1
_LOOK_SECONDS = 0.005
_SPOKE = "a connection that attached a model takes no other request; open another"

RequestChannel = Channel[messages.Request]


class StoreServer:
    """Serves `store`, which it does not own, at `address` until `close`, which any thread may call. Raises WireError if the
    address cannot be had."""

    def __init__(self, store: Store, address: str | os.PathLike[str]) -> None:
        self.store = store
        self._connections: Connections[messages.Request] = Connections(address, messages.Request, self._talk, name="sllm-store")

    @property
    def address(self) -> str:
        return self._connections.address

    def wait(self) -> None:
        """Returns once the server was closed."""
        self._connections.wait()

    def close(self) -> None:
        """Ends every connection and waits for their threads; the socket's file goes."""
        self._connections.close()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _talk(self, channel: RequestChannel) -> None:
        while True:
            request = channel.receive().message
            try:
                if isinstance(request, messages.Attach):
                    self._attach(channel, request)
                elif isinstance(request, messages.Watch):
                    self._watch(channel)
                else:
                    _send(channel, self._answer(channel, request))
            except (ChannelClosed, WireTimeout):
                raise  # there is nobody to tell
            except (SllmError, OSError, ValueError) as error:
                _send(channel, failure(error))

    def _answer(self, channel: RequestChannel, request: messages.Request) -> messages.Answer:
        store = self.store
        if isinstance(request, messages.Register):
            return store.register(request.name, request.source)
        if isinstance(request, messages.Forget):
            store.forget(request.name)
        elif isinstance(request, messages.Prefetch):
            store.prefetch(request.name, request.place, on_progress=lambda progress: _send(channel, _progressed(progress)))
        elif isinstance(request, messages.Pin):
            store.pin(request.name, request.place, request.pinned)
        elif isinstance(request, messages.Evict):
            return messages.Done(store.evict(request.name, request.place))
        elif isinstance(request, messages.List):
            return messages.Models(store.models())
        elif isinstance(request, messages.Stats):
            return store.stats()
        return messages.Done()

    def _attach(self, channel: RequestChannel, request: messages.Attach) -> None:
        """Lends a model for as long as the connection lives."""
        found = self.store.lend(request.name, DRAM if request.device == "cpu" else request.device)
        if isinstance(found, messages.Elsewhere):
            _send(channel, found)
            return
        with found as lease:
            _send_image(channel, lease)
            arriving, done = lease.arriving, 0
            layers = lease.entry.version.checkpoint.index.layers
            missing = arriving.layers
            while missing and not arriving.done:
                try:
                    _wait(channel, partial(_some, arriving, missing))
                    there = [name for name in missing if arriving.ready(name)]
                except SllmError as error:
                    _send(channel, failure(error))
                    return
                missing = [name for name in missing if name not in there]
                done = max(done, arriving.progress.done_nbytes)
                if not arriving.done:
                    _send(channel, messages.Ready([layers.index(name) for name in there], done, False))
            try:
                _wait(channel, partial(_ended, arriving))
            except SllmError as error:
                _send(channel, failure(error))
                return
            _send(channel, messages.Ready([], lease.entry.version.checkpoint.nbytes, True))
            channel.receive()  # the client says nothing more: this ends when it closes the connection, or dies
            raise StoreError(_SPOKE)

    def _watch(self, channel: RequestChannel) -> None:
        happened: queue.SimpleQueue[messages.Happened] = queue.SimpleQueue()
        end = self.store.listen(happened.put)
        try:
            _send(channel, messages.Done())
            while True:
                with suppress(queue.Empty):
                    _send(channel, happened.get(timeout=_PROGRESS_SECONDS))
                    continue
                with suppress(WireTimeout):
                    channel.receive(0)  # notices a client that is gone
        finally:
            end()


def _send_image(channel: RequestChannel, lease: Lease) -> None:
    checkpoint = lease.entry.version.checkpoint
    index = encode_index(checkpoint.index)
    folder = os.fspath(checkpoint.path)
    if lease.place != DRAM:
        _wait(channel, partial(_ended, lease.arriving))  # whoever opens it could not tell what is there: CUDA's events are not shared
        with lease.memory() as image:
            if not isinstance(image.buffer, DeviceMemory):
                raise StoreError(f"memory in {lease.place} cannot be opened by another process")
            handle = image.buffer.export()
        channel.send(messages.DeviceImage(folder, checkpoint.identity, checkpoint.nbytes, handle), payload=index, timeout=SEND_SECONDS)
        return
    fds, chunk_nbytes = duplicate(lease)
    try:
        channel.send(messages.Image(folder, checkpoint.identity, checkpoint.nbytes, chunk_nbytes, len(fds)), payload=index, timeout=SEND_SECONDS)
        for first in range(0, len(fds), MAX_FDS):
            channel.send(messages.Descriptors(), fds=fds[first : first + MAX_FDS], timeout=SEND_SECONDS)
    finally:
        for fd in fds:
            os.close(fd)


def _wait(channel: RequestChannel, arrived: Callable[[float], bool]) -> None:
    """Waits for part of a load and looks now and then whether the client is still there. Raises the load's error, and
    ChannelClosed if the client is gone."""
    while not arrived(_PROGRESS_SECONDS):
        with suppress(WireTimeout):
            channel.receive(0)
            raise StoreError(_SPOKE)


def _some(arriving: Arriving, names: Sequence[str], seconds: float) -> bool:
    """Whether one of these layers is in place within so many seconds. Nearly always the first is the next; others that come before it, as
    a model's do that other nodes send, are seen some milliseconds later."""
    end = time.monotonic() + seconds
    while not any(arriving.ready(name) for name in names):
        left = end - time.monotonic()
        if left <= 0:
            return False
        arriving.wait_for(names[0], min(left, _LOOK_SECONDS))
    return True


def _ended(arriving: Arriving, seconds: float) -> bool:
    try:
        arriving.wait(seconds)
    except TimeoutError:
        return False
    return True


def _send(channel: RequestChannel, answer: messages.Answer) -> None:
    channel.send(answer, timeout=SEND_SECONDS)


def _progressed(progress: Progress) -> messages.Progressed:
    return messages.Progressed(progress.done_nbytes, progress.total_nbytes)
