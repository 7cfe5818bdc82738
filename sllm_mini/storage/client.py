"""The store of this machine from another process: the same questions as `Store`, over its socket (chapter 05)."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sllm_mini.checkpoint.directory import Checkpoint
from sllm_mini.checkpoint.index import MAX_INDEX_NBYTES, decode_index
from sllm_mini.device import get_device
from sllm_mini.device.base import Device
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.errors import StoreError, WireError
from sllm_mini.storage import messages
from sllm_mini.storage.arrivals import Arrivals
from sllm_mini.storage.attach import Attachment, attach_memory, load_elsewhere
from sllm_mini.storage.failures import restored
from sllm_mini.storage.mapping import MappedImage
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.types import Progress, ProgressCallback, Tier
from sllm_mini.wire import Channel, ChannelClosed, Received, connect

CONNECT_SECONDS = 5.0
_A = TypeVar("_A", bound=messages.Answer)

AnswerChannel = Channel[messages.Answer]


def default_address() -> str:
    """Where the store of this user listens unless told otherwise: $SLLM_MINI_STORE, else in the user's runtime folder,
    else in one under /tmp, which is made here. Raises StoreError if others could put their own socket into that one."""
    named = os.environ.get("SLLM_MINI_STORE")
    if named:
        return named
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    if not _is_private(folder):  # none, or another user's that sudo left in the environment
        folder = f"/tmp/sllm-mini-{os.geteuid()}"
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if not _is_private(folder):
            raise StoreError(f"{folder} is not a folder that only this user may open; remove it, or name another socket in $SLLM_MINI_STORE")
    return os.path.join(folder, "sllm-mini-store.sock")


def _is_private(folder: str) -> bool:
    """Whether it is a folder, not a link to one, of this user's and closed to others."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077


class StoreClient:
    """A store that runs in another process. Each call is a connection of its own, so it is safe from several threads and
    after a fork. Raises StoreError if no store answers at `address`; errors of the store are raised as its own."""

    def __init__(self, address: str | os.PathLike[str] | None = None, *, remote: RemoteOptions | None = None) -> None:
        self.address = os.fspath(address) if address is not None else default_address()
        self._remote = remote

    def register(self, name: str, source: str | os.PathLike[str]) -> messages.Model:
        """See `Store.register`; a folder is taken relative to this process."""
        place = os.fspath(source)
        return self._ask(messages.Register(name, place if "://" in place else os.path.abspath(place)), messages.Model)

    def forget(self, name: str) -> None:
        """See `Store.forget`."""
        self._ask(messages.Forget(name), messages.Done)

    def models(self) -> list[messages.Model]:
        """See `Store.models`."""
        return self._ask(messages.List(), messages.Models).models

    def stats(self) -> messages.Figures:
        """See `Store.stats`."""
        return self._ask(messages.Stats(), messages.Figures)

    def prefetch(self, name: str, place: str = "dram", *, on_progress: ProgressCallback | None = None) -> None:
        """See `Store.prefetch`."""
        with self._connect() as channel:
            _send(channel, messages.Prefetch(name, place))
            while True:
                answer = _receive(channel, self.address).message
                if isinstance(answer, messages.Progressed):
                    if on_progress is not None:
                        on_progress(Progress(answer.done_nbytes, answer.total_nbytes))
                    continue
                _expect(answer, messages.Done)
                return

    def pin(self, name: str, place: str, pinned: bool = True) -> None:
        """See `Store.pin`."""
        self._ask(messages.Pin(name, place, pinned), messages.Done)

    def evict(self, name: str, place: str) -> int:
        """See `Store.evict`."""
        return self._ask(messages.Evict(name, place), messages.Done).nbytes

    def events(self) -> Iterator[messages.Happened]:
        """Whatever changes what the store holds from now on, until the iterator is closed or the store ends."""
        channel = self._connect()
        try:
            _send(channel, messages.Watch())
            _expect(_receive(channel, self.address).message, messages.Done)
        except BaseException:
            channel.close()
            raise
        return self._events(channel)

    def _events(self, channel: AnswerChannel) -> Iterator[messages.Happened]:
        with channel:
            while True:
                yield _expect(_receive(channel, self.address).message, messages.Happened)

    def attach(self, name: str, device: str | Device = "cpu") -> Attachment:
        """See `Store.attach`. The lease is a connection: it ends with the last tensor, or with this process."""
        target = get_device(device)
        channel = self._connect()
        try:
            _send(channel, messages.Attach(name, "cpu" if target.is_host else target.name))
            with _receive(channel, self.address, into_index=True) as first:
                answer = first.message
                if isinstance(answer, messages.Image):
                    return self._attach_image(channel, answer, _index(first))
                if isinstance(answer, messages.DeviceImage) and isinstance(target, CudaDevice):
                    return self._attach_device(channel, answer, _index(first), target)
        except BaseException:
            channel.close()
            raise
        channel.close()
        found = _expect(answer, messages.Elsewhere)
        return load_elsewhere(found.source, target, found.reason, self._remote)

    def _attach_image(self, channel: AnswerChannel, answer: messages.Image, index: bytes) -> Attachment:
        checkpoint = _checkpoint(answer, index)
        fds: list[int] = []
        try:
            while len(fds) < answer.chunks:
                received = _receive(channel, self.address)
                fds += received.fds
                _expect(received.message, messages.Descriptors)
                if not received.fds:
                    raise StoreError("the store promised memory and sent none; restart it")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        memory = MappedImage(fds, answer.chunk_nbytes, answer.nbytes, on_unmap=channel.close)
        arrivals = Arrivals(checkpoint)
        found = attach_memory(checkpoint, arrivals, memory, Tier.DRAM)
        if not answer.nbytes:
            arrivals.end()  # nothing arrives, and nothing holds the lease
            return found
        threading.Thread(target=_listen, args=(channel, arrivals, self.address), name="sllm-attach", daemon=True).start()
        return found

    def _attach_device(self, channel: AnswerChannel, answer: messages.DeviceImage, index: bytes, device: CudaDevice) -> Attachment:
        checkpoint = _checkpoint(answer, index)
        arrivals = Arrivals(checkpoint)
        arrivals.end()  # the store lends a GPU's memory only once it is full
        opened = device.open_exported(answer.handle, answer.nbytes)
        memory = opened.lend(channel.close)
        opened.close()
        return attach_memory(checkpoint, arrivals, memory, Tier.DEVICE)

    def _connect(self) -> AnswerChannel:
        try:
            sock = connect(self.address, timeout=CONNECT_SECONDS)
        except WireError as error:
            raise StoreError(f"no store answers: {error}") from error
        return Channel(sock, messages.Answer, name="the store")

    def _ask(self, request: messages.Request, kind: type[_A]) -> _A:
        with self._connect() as channel:
            _send(channel, request)
            return _expect(_receive(channel, self.address).message, kind)


def _send(channel: AnswerChannel, request: messages.Request) -> None:
    try:
        channel.send(request, timeout=CONNECT_SECONDS)
    except WireError as error:
        raise StoreError(f"the store was not asked: {error}") from error


def _receive(channel: AnswerChannel, address: str, *, into_index: bool = False) -> Received[messages.Answer]:
    def memory(_: messages.Answer, nbytes: int) -> bytearray:
        if nbytes > MAX_INDEX_NBYTES:
            raise StoreError(f"the store sent an index of {nbytes:,} bytes; at most {MAX_INDEX_NBYTES:,} are read")
        return bytearray(nbytes)

    try:
        return channel.receive(into=memory if into_index else None)
    except ChannelClosed as error:
        raise StoreError(f"the store at {address} was stopped or died; start it and ask again") from error
    except WireError as error:
        raise StoreError(f"the store at {address} ended the conversation ({error}); is it still running?") from error


def _expect(answer: messages.Answer, kind: type[_A]) -> _A:
    """Raises the store's error, or StoreError for an answer of another kind."""
    if isinstance(answer, kind):
        return answer
    if isinstance(answer, messages.Failed):
        raise restored(answer)
    raise StoreError(f"the store answered {type(answer).__name__} where {kind.__name__} was expected; use one version of sllm_mini on both sides")


def _index(received: Received[messages.Answer]) -> bytes:
    return bytes(received.payload or b"")


def _checkpoint(answer: messages.Image | messages.DeviceImage, index: bytes) -> Checkpoint:
    folder = Path(answer.folder)
    return Checkpoint(folder, decode_index(index, folder / "index.json"), answer.identity)


def _listen(channel: AnswerChannel, arrivals: Arrivals, address: str) -> None:
    """Passes on what the store says until everything is in place; the connection stays open, it is the lease."""
    try:
        while True:
            answer = _expect(_receive(channel, address).message, messages.Ready)
            arrivals.arrived(answer.layers, answer.done_nbytes)
            if answer.done:
                arrivals.end()
                return
    except BaseException as error:  # noqa: BLE001 - it is the load's result and raised by whoever waits for it
        arrivals.end(error)
