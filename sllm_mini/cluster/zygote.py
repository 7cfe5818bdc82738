"""A zygote: a process that has its libraries imported and forks on request. Explained in chapter 05.

    with Zygote(imports=["torch", "transformers"], entries=["worker:serve"]) as zygote:
        with zygote.fork("worker:serve", "models/tiny", port=8000) as child:
            child.wait()

A fork costs some milliseconds and copies no page until somebody writes to it, so each child starts with everything that
was imported for the price of what it changes (SOCK, ATC'18; Android's zygote; the idea of AWS SnapStart with a live
process instead of a snapshot). This module is the client's side, `zygote_process` the zygote itself.

Who ends with whom: a child ends when its client closes it or dies, and when its zygote ends or is killed; a zygote ends
when its owner closes it or dies. So neither is left behind whichever process is killed; what a child started itself gets
the signals sent to it, but must see to the rest. Only this user's processes can ask for a child, and they can name only
an entry point from the list that the zygote was started with.

What all children of a zygote share, and a process of its own would not: the addresses of its libraries (a guess that
works on one works on all) and Python's seed for string hashes. numpy's own matrix products run on one thread there
(OpenBLAS starts its threads on import, before any fork); torch's run on as many as in any process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal as signals
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.cluster.zygote_child import flush_standard
from sllm_mini.cluster.zygote_messages import Begin, Exited, Failed, Fork, Forked, Prepare, Prepared, Ready, Signal
from sllm_mini.errors import SllmError, WireError
from sllm_mini.wire import Channel, ChannelClosed, WireTimeout, connect
from sllm_mini.wire.channel import deadline_of, hold

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from sllm_mini.cluster.zygote_process import main; main()"
_PATIENCE_SECONDS = 30.0
"""How long a zygote that runs may take to answer, unless its client says otherwise."""
_STATUS_SECONDS = 1.0
"""How long it may take to say how a child has ended that is gone."""


class ZygoteError(SllmError):
    """There is no zygote, no child, or no longer one; the message says which and why."""


class ZygoteGoneError(ZygoteError):
    """No zygote answers: it has ended, or is stuck, and another could fork."""


class HasFileno(Protocol):
    """An open file, pipe or socket."""

    def fileno(self) -> int: ...


Descriptor = int | HasFileno


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """What a child gets besides its arguments; everything stays the caller's to close.

    `stdin`, `stdout` and `stderr` are this process's where None. `channel` is a connected socket that the entry point
    gets as its argument `channel`. `environment` replaces the child's whole environment, and `folder` is where it runs;
    both are this process's where None. Libraries that were imported have read the variables of the zygote; only
    OMP_NUM_THREADS is applied again. The zygote may take `patience` seconds to answer, now and later; its own where None.
    """

    stdin: Descriptor | None = None
    stdout: Descriptor | None = None
    stderr: Descriptor | None = None
    channel: socket.socket | None = None
    environment: Mapping[str, str] | None = None
    folder: str | os.PathLike[str] | None = None
    patience: float | None = None


class Child:
    """A process that a zygote forked. Safe from several threads. Closing it, or dropping it, ends the process.

    The process leads a process group of its own: signals go to it and to what it started.
    """

    def __init__(self, pid: int, entry: str, channel: Channel[Exited], pidfd: int, patience: float) -> None:
        """Made by `Zygote.fork` and `fork_from`; `pidfd` is its own from now on."""
        self.pid, self.entry = pid, entry
        self._channel, self._patience = channel, patience
        self._status: int | None = None
        self._waiting, self._closing = threading.RLock(), threading.Lock()
        self._pidfd, self._end_pidfd = pidfd, weakref.finalize(self, os.close, pidfd)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status once the process has ended, or minus the signal that ended it.

        Raises WireTimeout after `timeout` seconds, ZygoteError if the zygote ended, which ends the process too.
        """
        deadline = deadline_of(timeout)
        with hold(self._waiting, deadline, f"child {self.pid}"):
            if self._status is None:
                try:
                    with self._channel.receive(timeout) as received:
                        self._status = received.message.status
                except WireTimeout:
                    raise
                except WireError as error:
                    raise ZygoteError(f"child {self.pid} ({self.entry}) ended with its zygote, or was closed here; fork it from a new one") from error
            return self._status

    def poll(self) -> int | None:
        """The exit status, or None while the process runs. Raises ZygoteError as `wait` does."""
        with suppress(WireTimeout):
            return self.wait(0)
        return None

    def gone(self, timeout: float | None = None) -> bool:
        """Whether the process has ended, or does so within `timeout` seconds. The kernel says it, also where the zygote hangs;
        only `wait` knows how. Raises ZygoteError once closed."""
        with self._lent_pidfd() as pidfd:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(None if timeout is None else timeout * 1000))

    def kill(self) -> None:
        """Kills the process itself (SIGKILL), also where the zygote hangs; what it started is its zygote's to end. Does nothing
        where it has ended. Raises ZygoteError once closed."""
        with self._lent_pidfd() as pidfd, suppress(ProcessLookupError):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)

    def signal(self, number: int = signals.SIGTERM) -> None:
        """Sends a signal to the process and its group; to one that has ended already, nothing. Never reaches a stranger:
        the zygote, which alone collects the process, sends it."""
        with suppress(ChannelClosed):  # the process has ended; `wait` says how
            self._channel.send(Signal(int(number)), timeout=self._patience)

    def close(self) -> None:
        """Ends the process if it still runs, waits until it is gone, and lets go of it. Safe to call twice."""
        with suppress(ZygoteError, WireTimeout):  # gone with its zygote, or the zygote is stuck and will see the end below
            if self.poll() is None:
                self.signal(signals.SIGKILL)
                if not self.gone(self._patience):
                    self.kill()
                self.wait(_STATUS_SECONDS)
        self._channel.close()
        with self._closing:
            self._end_pidfd()

    @contextmanager
    def _lent_pidfd(self) -> Iterator[int]:
        """A copy, so that closing this object meanwhile cannot make its number another's."""
        with self._closing:
            if not self._end_pidfd.alive:
                raise ZygoteError(f"child {self.pid} ({self.entry}) was closed here; fork another")
            pidfd = os.dup(self._pidfd)
        try:
            yield pidfd
        finally:
            os.close(pidfd)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Zygote:
    """Starts a zygote and owns it. `fork` may be called from several threads. Costs a fresh process and its imports, once.

    `imports` are modules, or `module:function` for something to call once before any fork; nothing among them may start
    a thread or use CUDA. `entries` are the `module:function` that children may run. `path` is where the zygote listens,
    for `fork_from` in other processes; by default in a private temporary folder. `environment` is the zygote's own. One that
    answers nothing for `patience` seconds counts as stuck.
    """

    def __init__(
        self,
        imports: Sequence[str] = RUNTIME,
        entries: Sequence[str] = (),
        *,
        path: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        """Returns when the zygote can fork. Raises ZygoteError if it cannot: an import that fails, takes more than
        `timeout` seconds, starts a thread or initialises CUDA, an entry point that is not there, a path that is taken."""
        self._patience = patience
        ours, theirs = socket.socketpair()
        self._owner: Channel[Ready | Failed] = Channel(ours, Ready | Failed, name="zygote")
        # OpenBLAS (numpy's) starts its threads on import, before any fork could come first. CUDA's driver, once
        # initialised, is unusable in every child; with this, torch asks NVML whether there is a GPU and leaves it alone.
        variables = {**(os.environ if environment is None else environment), "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        search = msgspec.json.encode([os.path.abspath(place) for place in sys.path]).decode()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        try:
            with theirs:
                self._folder = tempfile.mkdtemp(prefix="sllm-zygote-") if path is None else None
                self.path = os.path.join(self._folder, "socket") if self._folder is not None else os.path.abspath(path or "")
                command = [sys.executable, "-c", _PROGRAM, search]
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=variables, start_new_session=True)
            self.pid = self._process.pid
            begin = Begin(list(imports), list(entries), self.path, self._folder is not None)
            self.import_seconds = self._begin(begin, self._process, timeout)
        except BaseException:
            if self._process is not None:
                self._process.kill()
            self.close()
            raise

    def fork(self, entry: str, /, *args: Any, options: ForkOptions | None = None, **named: Any) -> Child:
        """A child that runs `entry` with these arguments, which must be JSON-able; none may be named `options`. Raises what
        `fork_from` raises.

        Its exit status is what the entry point returns (None is 0), or 1 after an exception, which it prints. It leaves
        at once when the entry point returns, without handlers of `atexit` and without waiting for threads.
        """
        if self._process is not None and (status := self._process.poll()) is not None:
            raise ZygoteGoneError(f"zygote {self.pid} ended with status {status}, and its children with it; start a new one")
        given = options or ForkOptions()
        return fork_from(self.path, entry, *args, options=replace(given, patience=self._patience if given.patience is None else given.patience), **named)

    def kill(self) -> None:
        """Kills the zygote, and so its children, without waiting for it to answer: one that is stuck. `close` it then."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Ends the children and the zygote, and waits for that. Safe to call twice."""
        self._owner.close()
        if self._process is not None:
            try:
                self._process.wait(self._patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:  # a zygote that was killed has left it
            shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, begin: Begin, process: subprocess.Popen[bytes], timeout: float) -> float:
        try:
            self._owner.send(begin, timeout=timeout)
            with self._owner.receive(timeout) as received:
                answer = received.message
        except WireTimeout as error:
            raise ZygoteError(f"the zygote was not ready in {timeout:g} seconds; give it more, or fewer imports") from error
        except ChannelClosed as error:
            raise ZygoteError(f"the zygote ended with status {process.wait()} during its imports; its standard error says why") from error
        if isinstance(answer, Failed):
            raise ZygoteError(f"no zygote: {answer.message}")
        return answer.import_seconds

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fork_from(path: str | os.PathLike[str], entry: str, /, *args: Any, options: ForkOptions | None = None, **named: Any) -> Child:
    """A child of the zygote that listens at `path`, as `Zygote.fork` makes it. Safe from several threads.

    Raises ZygoteGoneError if no zygote answers there, ZygoteError if `entry` is not on its list, or if it may not or cannot
    fork; WireError for arguments and environment of more than 1 MB; ValueError for arguments that are not JSON-able.
    """
    given = options or ForkOptions()
    patience = _PATIENCE_SECONDS if given.patience is None else given.patience
    arguments = _arguments(entry, args, named)
    environment = os.environb if given.environment is None else {os.fsencode(name): os.fsencode(value) for name, value in given.environment.items()}
    request = Fork(entry, arguments, dict(environment), os.fsencode(os.path.abspath(given.folder or os.getcwd())))
    standard = [_fd_of(given.stdin, 0), _fd_of(given.stdout, 1), _fd_of(given.stderr, 2)]
    flush_standard()  # what was printed before the child started comes before what the child prints
    try:
        channel: Channel[Any] = Channel(connect(path, timeout=patience), Forked | Failed | Exited, name=f"child running {entry}")
    except WireError as error:
        raise ZygoteGoneError(f"no zygote can be asked for {entry}: {error}") from error
    try:
        channel.send(request, fds=standard if given.channel is None else [*standard, given.channel.fileno()], timeout=patience)
        received = channel.receive(patience)
    except BaseException as error:
        channel.close()
        if isinstance(error, ChannelClosed | WireTimeout):
            raise ZygoteGoneError(f"the zygote at {os.fspath(path)} did not fork {entry}: it ended, or is stuck; start a new one") from error
        raise
    answer = received.message
    if not isinstance(answer, Forked) or not received.fds:
        received.close()
        channel.close()
        raise ZygoteError(f"{entry} was not forked: {answer.message}" if isinstance(answer, Failed) else f"{entry} was not forked")
    return Child(answer.pid, entry, channel, received.fds[0], patience)


def prepare_in(path: str | os.PathLike[str], entry: str, /, *args: Any, patience: float = _PATIENCE_SECONDS, **named: Any) -> str:
    """Has the zygote that listens at `path` run `entry`, one of its list, itself: children that are forked later have what it made. Returns
    once it has, with the reason why that zygote can fork no more, "" as it should be. Raises ZygoteGoneError if no zygote answers
    there within `patience` seconds, ZygoteError if the entry is not on its list or fails, ValueError as `fork_from`."""
    request = Prepare(entry, _arguments(entry, args, named))
    try:
        with Channel(connect(path, timeout=patience), Prepared | Failed, name=f"zygote that prepares {entry}") as channel:
            channel.send(request, timeout=patience)
            with channel.receive(patience) as received:
                answer = received.message
    except WireError as error:
        raise ZygoteGoneError(f"the zygote at {os.fspath(path)} did not prepare {entry} ({error}); start a new one") from error
    if isinstance(answer, Failed):
        raise ZygoteError(answer.message)
    return str(answer.why_not)


def _arguments(entry: str, args: Any, named: Any) -> bytes:
    try:
        return msgspec.json.encode([args, named])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{entry}: the arguments of a child travel as JSON, and these do not: {error}") from error


def _fd_of(given: Descriptor | None, standard: int) -> int:
    return standard if given is None else given if isinstance(given, int) else given.fileno()
