"""Frames on one connected stream socket: a message, its descriptors, its payload. Explained in chapter 07.

    frame  = header, message, payload
    header = "SLM", version u8, descriptors u32, message nbytes u32, payload nbytes u64    (20 bytes, little-endian)

Descriptors ride on the first byte of a frame (SCM_RIGHTS) and the header says how many, as in D-Bus; a read never
crosses the end of a frame, as vhost-user asks, because descriptors met on the way would be lost. A frame that fails
half-way ends its channel, as in dask.distributed: nobody knows any more where the next one starts. Unlike
vhost-user's, surplus descriptors are an error and not dropped.

Every size is checked before memory is asked for, and this module asks for one message at most: a payload (KV blocks)
goes from the sender's own buffers into memory that the receiver gives, with no copy in either process. Cost of a
small message: one send, two or three receives, and one decode at the sender, which finds what the peer would refuse.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Generic, TypeVar

import msgspec

from sllm_mini.errors import WireError
from sllm_mini.wire.message import ChannelClosed, Message, WireTimeout, decoder

MAX_FDS = 253
"""Descriptors that Linux takes with one message (SCM_MAX_FD)."""

_HEADER = struct.Struct("<3sBIIQ")
_MAGIC = b"SLM"
_VERSION = 1
_IOV_MAX = 1024
_PACED_NBYTES = 64 << 10
"""How much of a payload goes over a paced channel at a time."""
_CONTROL_NBYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)

BytesLike = bytes | bytearray | memoryview
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """One message with what came with it. The descriptors are now the receiver's to close: `close()` or `with`."""

    message: M
    payload: memoryview | None = None
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        _close_all(self.fds)

    def __enter__(self) -> Received[M]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Channel(Generic[M]):
    """Both directions of one connected stream socket, which it owns. `message_type` is the union it receives.

    Safe from several threads: frames go out whole and are taken whole, and sending never waits for receiving.
    Each `timeout` is in seconds and covers the whole frame, waiting for other threads included; None waits for ever.
    """

    def __init__(self, sock: socket.socket, message_type: type[M] | UnionType, *, name: str, max_nbytes: int = 1 << 20) -> None:
        """`max_nbytes` bounds one encoded message. Raises ValueError if `message_type` leaves anything unchecked."""
        if not 0 < max_nbytes < 1 << 32:
            raise ValueError(f"{name}: max_nbytes is {max_nbytes}; it must be between 1 and {(1 << 32) - 1}")
        sock.setblocking(False)
        self.name = name
        self.max_nbytes = max_nbytes
        self._sock = sock
        schema: Any = message_type
        self._decoder = decoder(schema)
        self._sending = threading.RLock()
        self._receiving = threading.RLock()
        self._ended: str | None = None
        self._sent: Callable[[int], object] | None = None
        self._received: Callable[[int], object] | None = None

    def pace(self, *, sent: Callable[[int], object] | None = None, received: Callable[[int], object] | None = None) -> None:
        """Limits the rate from now on: each is called with the bytes that have just moved, of a payload at most 64 KiB, and returns
        when more may. Time spent there is not looked at by a `timeout`."""
        self._sent, self._received = sent, received

    def send(
        self,
        message: Message,
        *,
        payload: BytesLike | Sequence[BytesLike] | None = None,
        fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> None:
        """Sends one frame. The payload is gathered from the given buffers; `fds` stay the caller's to close.

        Raises WireError, with nothing sent and the channel usable, for a message that its schema refuses, is too
        large or may not carry so many descriptors; ChannelClosed if the peer is gone; WireTimeout.
        """
        deadline = deadline_of(timeout)
        kind = type(message).__name__
        body = self._encode(message, kind)
        if len(fds) > min(type(message).max_fds, MAX_FDS):
            raise WireError(f"{self.name}: {kind} may carry {min(type(message).max_fds, MAX_FDS)} descriptors, not {len(fds)}")
        if fds and self._sock.family != socket.AF_UNIX:
            raise WireError(f"{self.name}: descriptors pass over Unix sockets only; send {kind} without them")
        parts = [payload] if isinstance(payload, BytesLike) else payload or ()
        views = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
        header = _HEADER.pack(_MAGIC, _VERSION, len(fds), len(body), sum(view.nbytes for view in views))
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with hold(self._sending, deadline, self.name):
            self._check_open()
            self._send([memoryview(header + body), *views], control, kind, deadline)

    def receive(self, timeout: float | None = None, *, into: Callable[[M, int], BytesLike] | None = None) -> Received[M]:
        """The next frame. `into(message, nbytes)` gives the memory for its payload: exactly `nbytes`, writable.

        Raises ChannelClosed at a clean end; WireTimeout; WireError for a frame that is truncated, too large, of
        another protocol, against the schema, or with descriptors or a payload that nobody asked for. A bad frame,
        and an `into` that raises, end the channel; descriptors that came with it are closed.
        """
        deadline = deadline_of(timeout)
        fds: list[int] = []
        with hold(self._receiving, deadline, self.name):
            self._check_open()
            try:
                return self._receive(fds, into, deadline)
            except BaseException as error:
                _close_all(fds)
                if not isinstance(error, ChannelClosed) and getattr(error, "ended", True):
                    self._end(f"ended by an earlier failure ({error})")
                raise

    def close(self) -> None:
        """Ends both directions and wakes every thread that waits in one. Any thread may call it, more than once."""
        self._end("closed on this side")
        # The waiting threads leave first: closing under them could leave them polling a reused descriptor number.
        with self._sending, self._receiving:
            self._sock.close()

    def __enter__(self) -> Channel[M]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _encode(self, message: Message, kind: str) -> bytes:
        try:
            body = msgspec.msgpack.encode(message)
            decoder(type(message)).decode(body)
        except (msgspec.MsgspecError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise WireError(f"{self.name}: {kind} breaks its own schema and was not sent: {error}") from error
        if len(body) > self.max_nbytes:
            raise WireError(f"{self.name}: {kind} is {len(body):,} bytes and the channel takes {self.max_nbytes:,}; split it or use a payload")
        return body

    def _send(self, views: list[memoryview], control: list[Any], kind: str, deadline: float | None) -> None:
        first, started = 0, False
        try:
            while first < len(views):
                try:
                    now = views[first : first + _IOV_MAX] if self._sent is None else [views[first][:_PACED_NBYTES]]
                    count = self._sock.sendmsg(now, [] if started else control)
                except BlockingIOError:
                    if not ready(self._sock, select.POLLOUT, deadline):
                        raise WireTimeout(f"{self.name}: {kind} was not taken in time; the peer does not read", ended=started) from None
                    continue
                started = True
                if self._sent is not None:
                    self._sent(count)
                while first < len(views) and count >= views[first].nbytes:
                    count -= views[first].nbytes
                    first += 1
                if count:
                    views[first] = views[first][count:]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed(f"{self.name}: {self._ended or 'the peer closed the channel'} before {kind} was sent") from error
        except OSError as error:  # such as a descriptor that is not open, or too many of them in flight
            raise WireError(f"{self.name}: {kind} could not be sent: {error.strerror}") from error
        finally:
            if started and first < len(views):
                self._end(f"ended when {kind} was sent half")

    def _receive(self, fds: list[int], into: Callable[[M, int], BytesLike] | None, deadline: float | None) -> Received[M]:
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header), "a header", deadline, fds)
        magic, version, fd_count, nbytes, payload_nbytes = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise WireError(f"{self.name}: {bytes(header[:4])!r} starts no message; check what is at the other end")
        if version != _VERSION:
            raise WireError(f"{self.name}: the peer speaks version {version} and this side {_VERSION}; restart both with one sllm_mini")
        if fd_count != len(fds):
            raise WireError(f"{self.name}: a header declares {fd_count} descriptors and {len(fds)} came with it")
        if nbytes > self.max_nbytes:
            raise WireError(f"{self.name}: a message of {nbytes:,} bytes was announced and the channel takes {self.max_nbytes:,}")
        body = bytearray(nbytes)
        self._fill(memoryview(body), "a message", deadline)
        try:
            message = self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"{self.name}: a message of {nbytes:,} bytes breaks the schema: {error}") from error
        kind = type(message).__name__
        if len(fds) > type(message).max_fds:
            raise WireError(f"{self.name}: {kind} may carry {type(message).max_fds} descriptors and {len(fds)} came with it")
        if payload_nbytes == 0:
            return Received(message, None, tuple(fds))
        if into is None:
            raise WireError(f"{self.name}: {kind} came with a payload of {payload_nbytes:,} bytes that nobody asked for")
        payload = memoryview(into(message, payload_nbytes)).cast("B")
        if payload.nbytes != payload_nbytes or payload.readonly:
            raise WireError(f"{self.name}: the payload of {kind} needs {payload_nbytes:,} writable bytes and was given {payload.nbytes:,}")
        self._fill(payload, f"the payload of {kind}", deadline)
        return Received(message, payload, tuple(fds))

    def _fill(self, view: memoryview, what: str, deadline: float | None, fds: list[int] | None = None) -> None:
        """Receives exactly `view.nbytes`. Only a header has a list for descriptors, so only there may they come."""
        done, header = 0, fds is not None
        at_most = view.nbytes if self._received is None else _PACED_NBYTES
        while done < view.nbytes:
            try:
                count, control, flags, _ = self._sock.recvmsg_into([view[done : done + at_most]], _CONTROL_NBYTES if header else 0, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                if not ready(self._sock, select.POLLIN, deadline):
                    idle = header and done == 0
                    text = "no message came in time" if idle else f"{what} was not complete in time: {done:,} of {view.nbytes:,} bytes"
                    raise WireTimeout(f"{self.name}: {text}", ended=not idle) from None
                continue
            except OSError:  # a reset, or closed by another thread
                count, control, flags = 0, [], 0
            for level, kind, data in control:
                if fds is not None and (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(array.array("i", data[: len(data) // 4 * 4]))
            if flags & socket.MSG_CTRUNC or (fds is not None and len(fds) > MAX_FDS):
                raise WireError(f"{self.name}: descriptors came with {what} that may not be there, or that this process has no room for")
            if count == 0 and (self._ended or (header and done == 0)):
                raise ChannelClosed(f"{self.name}: {self._ended or 'the peer closed the channel'}")
            if count == 0:
                raise WireError(f"{self.name}: the peer ended after {done:,} of the {view.nbytes:,} bytes of {what}")
            done += count
            if self._received is not None:
                self._received(count)

    def _check_open(self) -> None:
        if self._ended:
            raise ChannelClosed(f"{self.name}: {self._ended}")

    def _end(self, reason: str) -> None:
        """Ends both directions; the peer, and threads that wait here, notice at once."""
        self._ended = self._ended or reason
        with contextlib.suppress(OSError):  # the peer may have ended it first
            self._sock.shutdown(socket.SHUT_RDWR)


def deadline_of(timeout: float | None) -> float | None:
    """The moment on the monotonic clock at which `timeout` seconds will have passed; None is never."""
    return None if timeout is None else time.monotonic() + timeout


@contextlib.contextmanager
def hold(lock: threading.RLock, deadline: float | None, name: str) -> Iterator[None]:
    """Holds the lock for the body. Raises WireTimeout if other threads held it until the deadline."""
    if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
        raise WireTimeout(f"{name}: other threads used it until the deadline")
    try:
        yield
    finally:
        lock.release()


def ready(sock: socket.socket, events: int, deadline: float | None) -> bool:
    """Waits until the socket is worth another try. False if the deadline has passed."""
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        return False
    poll = select.poll()
    poll.register(sock, events)
    poll.poll(None if remaining is None else remaining * 1000)
    return True


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
