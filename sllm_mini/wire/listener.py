"""Where channels begin: a Unix socket that only its user may open, or `tcp://host:port` (see `wire.tcp`), and the way to it. Explained in chapter 05.

A Unix socket's path is a name that outlives its server, so a listener must tell a live server from what a dead one left
behind, and two that start together must not both replace it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sllm_mini.errors import WireError
from sllm_mini.wire.channel import deadline_of, hold, ready
from sllm_mini.wire.message import ChannelClosed, WireTimeout
from sllm_mini.wire.tcp import Callers, bind_tcp, connect_tcp, is_tcp

_PATH_NBYTES = 107  # sockaddr_un.sun_path without its closing zero
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Who made the other end of a Unix socket, as the kernel noted it when they connected."""

    pid: int
    uid: int
    gid: int


def peer(sock: socket.socket) -> Peer:
    """The credentials of the other end (SO_PEERCRED). The kernel vouches for them; a pid may have been reused since."""
    return Peer(*struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))))


class Listener:
    """A listening socket, made by `listen`, at `address`. `accept` and `close` may be called from several threads."""

    def __init__(self, sock: socket.socket, address: str, callers: Callers | None = None) -> None:
        """`callers` has whoever must prove a key first (TCP); without, `address` is a path."""
        self.address = address
        self._sock = sock
        self._callers = callers
        self._accepting = threading.RLock()
        self._closed = False
        self._identity = None if callers is not None else _identity(address)
        sock.setblocking(False)

    def fileno(self) -> int:
        """Its descriptor, for `select` and its kin: readable when somebody connects, who may be no one that `accept` takes; -1 once closed."""
        return self._sock.fileno() if self._callers is None else self._callers.fileno()

    def accept(self, timeout: float | None = None) -> socket.socket:
        """The next connection by this user, or over TCP by whoever has proved the key; others are closed unread. A caller over TCP
        waits until somebody accepts, and a silent one holds up nobody.

        Raises WireTimeout, ChannelClosed once the listener is closed, WireError when the process is out of descriptors.
        """
        deadline = deadline_of(timeout)
        with hold(self._accepting, deadline, self.address):
            while not self._closed:
                if self._callers is not None and (proven := self._callers.proven()) is not None:
                    return proven
                try:
                    sock, _ = self._sock.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    if not (ready(self._sock, select.POLLIN, deadline) if self._callers is None else self._callers.wait(deadline)):
                        raise WireTimeout(f"{self.address}: nobody connected in time") from None
                    continue
                except OSError as error:
                    if self._closed:  # by another thread, between the look at it and the call
                        continue
                    raise WireError(f"{self.address}: a connection could not be accepted: {error.strerror}") from error
                if self._callers is not None:
                    self._callers.add(sock)
                elif peer(sock).uid == os.geteuid():
                    return sock
                else:
                    sock.close()
            raise ChannelClosed(f"{self.address}: the listener is closed")

    def close(self) -> None:
        """Stops listening, wakes `accept`, and removes a path if it is still this listener's. Safe to call twice."""
        self._closed = True
        with contextlib.suppress(OSError):  # it may be closed already
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._accepting:
            if self._sock.fileno() == -1:
                return
            self._sock.close()
            if self._callers is not None:
                self._callers.close()
                return
            with contextlib.suppress(FileNotFoundError):
                if _identity(self.address) == self._identity:
                    os.unlink(self.address)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def listen(address: str | os.PathLike[str], *, backlog: int = 128, key: bytes | None = None) -> Listener:
    """Listens at `tcp://host:port` (port 0: any; no host: loopback), for callers that know `key` or else the process's (`set_key`). Any other address
    is a path in a folder that exists: a socket there with mode 0600, which needs no key; a stale one is replaced.

    Raises WireError if a live server has the address, if anything but a socket is at the path, if it cannot be made, or for want of a key.
    """
    if is_tcp(address):
        sock, place = bind_tcp(str(address), backlog)
        try:
            return Listener(sock, place, Callers(sock, place, key))
        except BaseException:
            sock.close()
            raise
    place = _checked(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(os.path.dirname(place)):
            _remove_stale(place)
            # The socket's own mode becomes the file's: private from birth, and the process's umask stays alone.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(place)
            sock.listen(backlog)
            return Listener(sock, place)
    except OSError as error:
        sock.close()
        raise WireError(f"{place}: no socket can be made there: {error.strerror}") from error
    except WireError:
        sock.close()
        raise


def connect(address: str | os.PathLike[str], *, timeout: float | None = None, key: bytes | None = None) -> socket.socket:
    """A socket connected to the server at `address`, see `listen`: one that knows the key too, or at a path runs as this user.

    Raises WireError if nobody listens there or it is somebody else's, WireTimeout if its queue stays full or nobody accepts.
    """
    if is_tcp(address):
        return connect_tcp(str(address), key, timeout)
    place = _checked(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if timeout is not None:
            # A non-blocking connect would fail at once on a full queue; the kernel's own timer waits for room.
            seconds = max(timeout, 1e-6)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
        sock.connect(place)
        owner = peer(sock).uid
        if owner != os.geteuid():
            raise WireError(f"{place}: the server runs as user {owner} and this process as {os.geteuid()}; it was sent nothing")
    except BlockingIOError:
        sock.close()
        raise WireTimeout(f"{place}: the server took no connection in time") from None
    except OSError as error:
        sock.close()
        raise WireError(f"{place}: no server answers there ({error.strerror}); start it or check the path") from error
    except WireError:
        sock.close()
        raise
    return sock


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _checked(path: str | os.PathLike[str]) -> str:
    place = os.path.abspath(path)
    if len(os.fsencode(place)) > _PATH_NBYTES:
        raise WireError(f"{place} is longer than the {_PATH_NBYTES} bytes that a socket's path may have; choose a shorter one")
    return place


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Only one listener at a time looks at the sockets of a folder. The lock leaves no file behind."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WireError(f"{folder}: another process keeps this folder locked; use a folder of your own") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _remove_stale(place: str) -> None:
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise WireError(f"{place} is there already and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(place)
        except ConnectionRefusedError:
            os.unlink(place)
            return
        except BlockingIOError as error:  # its queue is full, so somebody listens
            raise WireError(f"{place}: a busy server listens there already; use another path") from error
    raise WireError(f"{place}: a server listens there already; stop it or use another path")
