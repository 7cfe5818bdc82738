"""The zygote itself: imports, waits, forks. Started by `zygote.Zygote`. Explained in chapter 05.

It has one thread from its first line to its last: a fork copies the thread that calls it and no other, so a lock that
another thread holds stays locked in the child for ever. That is why imports that start threads are refused (and why
this loop waits with poll). Cyclic garbage collection is off until a child turns it on, and what was imported is
frozen out of it, so that no collection writes to pages that could stay shared (CPython's own advice for gc.freeze).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from sllm_mini.cluster.zygote_child import Entry, become
from sllm_mini.cluster.zygote_messages import Begin, Exited, Failed, Fork, Forked, Prepare, Prepared, Ready, Signal
from sllm_mini.errors import SllmError, WireError
from sllm_mini.wire import Channel, ChannelClosed, Listener, Message, Received, WireTimeout, listen

_CUDA_FILE = "/dev/nvidia-uvm"
"""What a process has open once it has initialised CUDA; asking NVML about a GPU does not open it."""
_PATIENCE_SECONDS = 1.0
"""How long the others wait for a client that stops in the middle of a message."""


@dataclass(slots=True)
class _Lease:
    """One connection and the child that lives as long as it does. `pid` is 0 before the fork, `pidfd` -1."""

    channel: Channel[Any]
    fd: int
    pid: int = 0
    pidfd: int = -1


def main() -> NoReturn:
    """Runs a zygote whose owner is at the other end of standard input. Ends when the owner does."""
    gc.disable()
    owner_fd = os.dup(0)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    owner: Channel[Begin] = Channel(socket.socket(fileno=owner_fd), Begin, name="owner of the zygote")
    try:
        with owner.receive() as received:
            begin = received.message
    except ChannelClosed:  # it was killed before it had said anything
        os._exit(0)
    started = time.monotonic()
    try:
        entries = _import(begin)
        if reason := why_not_forkable():
            raise SllmError(reason)
        listener = listen(begin.path)
    except BaseException as error:
        with suppress(ChannelClosed):
            owner.send(Failed(str(error)[:8000] or type(error).__name__))
        raise
    ready = Ready(time.monotonic() - started)
    gc.collect()
    gc.freeze()
    zygote = _Zygote(entries, listener, owner_fd)
    try:
        with suppress(ChannelClosed):  # it was killed during the imports
            owner.send(ready)
            zygote.serve()
    finally:
        zygote.close()
        if begin.own_folder:
            with suppress(OSError):  # the owner may have removed it first
                os.rmdir(os.path.dirname(begin.path))
        os._exit(0)  # taking apart an interpreter with torch in it takes longer than starting some


def why_not_forkable() -> str | None:
    """Why this process must not fork, in one sentence; None if it may."""
    tasks = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    if tasks:
        return (
            f"the imports started {len(tasks)} thread{'s' * (len(tasks) > 1)}, which a fork would not copy and whose locks it would keep shut; "
            "import what starts them in the entry point"
        )
    torch = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or _has_open(_CUDA_FILE):
        return "the imports initialised CUDA, which no forked process can use; leave the GPU alone until the entry point runs"
    return None


class _Zygote:
    """The loop: one event at a time, the ends of children first, so that no number of a descriptor means two things."""

    def __init__(self, entries: Mapping[str, Entry], listener: Listener, owner_fd: int) -> None:
        self._entries = entries
        self._listener = listener
        self._listener_fd = listener.fileno()
        self._owner_fd = owner_fd
        self._leases: dict[int, _Lease] = {}
        """By the connection's descriptor; the lease of a child that was killed stays until the child is collected."""
        self._running: dict[int, _Lease] = {}
        """By the child's pidfd."""
        # A child takes two descriptors here; what is left over is for a request's own, and for what imports hold open.
        self._room = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64)

    def serve(self) -> None:
        """Until the owner is gone."""
        while True:
            poll = select.poll()
            waiting = [*self._running, self._owner_fd, *self._leases]
            if len(self._leases) + len(self._running) < self._room:
                waiting.append(self._listener_fd)
            for fd in waiting:
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            fd = next(fd for fd in waiting if fd in ready)
            if fd == self._owner_fd:
                return
            if fd == self._listener_fd:
                self._accept()
            elif fd in self._running:
                self._collect(self._running[fd])
            else:
                self._request(self._leases[fd])

    def close(self) -> None:
        for lease in [*self._running.values()]:
            _kill(lease)
            self._collect(lease)
        for lease in [*self._leases.values()]:
            self._drop(lease)
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock = self._listener.accept(0)
        except WireTimeout:  # the client left again
            return
        except WireError:
            time.sleep(0.1)  # the machine is out of descriptors; the children that run need none
        else:
            lease = _Lease(Channel(sock, Fork | Prepare | Signal, name="client of the zygote"), sock.fileno())
            self._leases[lease.fd] = lease

    def _request(self, lease: _Lease) -> None:
        try:
            received = lease.channel.receive(_PATIENCE_SECONDS)
        except WireError:  # the client left, or talks nonsense: either way its child goes
            self._drop(lease)
            return
        with received:
            message = received.message
            if isinstance(message, Signal):
                if lease.pid:
                    with suppress(ProcessLookupError):
                        if os.getpgid(lease.pid) != lease.pid:  # it left its group
                            signal.pidfd_send_signal(lease.pidfd, message.number)
                        os.killpg(lease.pid, message.number)
            elif lease.pid:
                self._drop(lease)
            elif isinstance(message, Prepare):
                self._answer(lease, self._prepare(message))
                self._drop(lease)
            else:
                answer = self._fork(lease, received)
                self._answer(lease, answer, fds=[lease.pidfd] if isinstance(answer, Forked) else [])

    def _prepare(self, request: Prepare) -> Prepared | Failed:
        """What it makes is frozen like what was imported."""
        if request.entry not in self._entries:
            return Failed(_unknown(request.entry, self._entries))
        try:
            given, named = json.loads(request.arguments)
            self._entries[request.entry](*given, **named)
        except Exception as error:  # noqa: BLE001 - it is told
            return Failed(f"{request.entry} failed: {type(error).__name__}: {error}"[:8000])
        finally:
            gc.collect()
            gc.freeze()
        return Prepared(why_not_forkable() or "")

    def _fork(self, lease: _Lease, received: Received[Fork]) -> Forked | Failed:
        """Forks; the child leaves by `become` and never comes back here."""
        request = received.message
        if request.entry not in self._entries:
            return Failed(_unknown(request.entry, self._entries))
        if len(received.fds) < 3:
            return Failed("a child needs its standard input, output and error")
        if reason := why_not_forkable():
            return Failed(reason)
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            return Failed(f"this machine has no room for another process: {error.strerror}")
        if pid == 0:
            owned = [self._owner_fd, self._listener_fd, *self._leases, *self._running]
            become(self._entries[request.entry], request, received.fds, owned, zygote)
        with suppress(OSError):  # it may be done already: both sides set it, so that whoever signals first finds the group
            os.setpgid(pid, pid)
        try:
            lease.pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Failed(f"the zygote is out of descriptors: {error.strerror}")
        lease.pid = pid
        self._running[lease.pidfd] = lease
        return Forked(pid)

    def _collect(self, lease: _Lease) -> None:
        """The child has ended, or is about to: takes its status, so that no zombie stays."""
        result = os.waitid(os.P_PIDFD, lease.pidfd, os.WEXITED)
        if result is None:
            raise SllmError(f"child {lease.pid} was to be collected and still runs")
        del self._running[lease.pidfd]
        os.close(lease.pidfd)
        lease.pid, lease.pidfd = 0, -1
        self._answer(lease, Exited(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status))
        self._drop(lease)

    def _answer(self, lease: _Lease, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            lease.channel.send(message, fds=fds, timeout=_PATIENCE_SECONDS)
        except WireError:
            self._drop(lease)

    def _drop(self, lease: _Lease) -> None:
        """Ends a connection, and with it its child; the child is collected when it has ended."""
        if self._leases.get(lease.fd) is not lease:  # dropped before; the number may be another connection's by now
            return
        del self._leases[lease.fd]
        lease.channel.close()
        if lease.pid:
            _kill(lease)


def _unknown(entry: str, entries: Mapping[str, Entry]) -> str:
    return f"{entry} is not an entry point of this zygote; it runs {', '.join(sorted(entries)) or 'nothing'}"


def _import(begin: Begin) -> dict[str, Entry]:
    for name in begin.imports:
        with _naming(name):
            if ":" in name:
                _resolve(name)()
            else:
                importlib.import_module(name)
    entries = {}
    for name in begin.entries:
        with _naming(name):
            entries[name] = _resolve(name)
    return entries


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SllmError(f"{name} cannot be imported or run: {type(error).__name__}: {error}") from error


def _resolve(name: str) -> Entry:
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError("an entry point is named module:function")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError("an entry point must be callable")
    return found


def _has_open(path: str) -> bool:
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them is gone by now
            if os.readlink(f"/proc/self/fd/{fd}") == path:
                return True
    return False


def _kill(lease: _Lease) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(lease.pidfd, signal.SIGKILL)  # alone, for one that left its group
        os.killpg(lease.pid, signal.SIGKILL)
