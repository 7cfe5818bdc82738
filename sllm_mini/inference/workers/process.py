"""One worker process as its parent sees it: orders go out, answers come back, and its death is noticed. Explained in chapter 07.

A process that is killed is noticed at once, because its connection ends. One that hangs (stopped, or swapped out by a machine
that thrashes) keeps its connection, and is noticed by its silence: `watch` asks it whether it lives, and kills it if not. One
that answers and computes nothing more says so itself.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from sllm_mini import errors
from sllm_mini.errors import ModelError, SllmError, WireError
from sllm_mini.inference.workers import messages
from sllm_mini.wire import Channel, ChannelClosed, Message, WireTimeout

_PATIENCE_SECONDS = 30.0
_PINGS = 2
"""How many in a row must be left unanswered: a parent that was held up itself misses one answer, not two."""
_A = TypeVar("_A", bound=Message)


class Process(Protocol):
    """A process that can be ended: a `Popen`, or what a zygote forked."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self) -> int | None: ...


Start = Callable[[], tuple[socket.socket, Process]]
"""Starts a process that has one end of a connection as its standard input, and gives the other."""


def start_process(program: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Starts `python *program` with one end of a connection as its standard input, and gives the other. Raises OSError."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            # A group of its own: a Ctrl-C at a terminal and a notebook's Interrupt go to the whole group, and mean the parent alone.
            process = subprocess.Popen([sys.executable, *program], stdin=theirs.fileno(), env=environment or os.environ, process_group=0)
    except BaseException:
        ours.close()
        raise
    return ours, process


class WorkerProcess:
    """One worker, as its parent sees it: orders go out over `channel`, answers come back in any order. Safe from several threads.

    `channel` and `process` are its own from now on. `on_death` is called once, on a thread of this object's, when the process is
    gone, closed or not; `why` says then how it ended. Every order raises the worker's own error, or WireError once it is gone.
    """

    def __init__(self, name: str, channel: Channel[Any], process: Process, on_death: Callable[[str], None]) -> None:
        self.name = name
        self.process = process
        self.why = ""
        self._on_death = on_death
        self._channel = channel
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._answers: dict[int, Any] = {}
        self._number = 0
        self._gone = threading.Event()
        self._watch: threading.Thread | None = None
        self._thread = threading.Thread(target=self._listen, name=f"sllm-worker-{name}", daemon=True)
        self._thread.start()

    @property
    def gone(self) -> bool:
        """Whether the process has ended, or is being ended because its connection has."""
        return self._gone.is_set()

    def next(self) -> int:
        """The number that the next order must carry."""
        with self._changed:
            self._number += 1
            return self._number

    def ask(self, order: Any, kind: type[_A], *, payload: bytes | None = None, seconds: float | None = None) -> _A:
        """Gives an order and waits until it is answered. Raises WireTimeout if that takes longer than `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            self._waiting.add(order.number)
        try:
            with suppress(ChannelClosed):  # the thread that listens notices it too, and only then the process is known to be gone
                self._channel.send(order, payload=payload, timeout=_PATIENCE_SECONDS if seconds is None else seconds)
            with self._changed:
                left = None if end is None else max(end - time.monotonic(), 0.0)
                self._changed.wait_for(lambda: order.number in self._answers or self.gone, left)
        finally:
            with self._changed:
                self._waiting.discard(order.number)
                answer = self._answers.pop(order.number, None)
        if answer is None:
            if not self.gone:
                raise WireTimeout(f"worker {self.name} did not answer {type(order).__name__} in {seconds} seconds", ended=False)
            raise WireError(f"worker {self.name} is gone; its requests begin again elsewhere")
        if isinstance(answer, messages.Failed):
            error = getattr(errors, answer.kind, None)
            raise error(answer.message) if isinstance(error, type) and issubclass(error, SllmError) else ModelError(answer.message)
        if not isinstance(answer, kind):
            raise WireError(f"worker {self.name} answered {type(answer).__name__} to {type(order).__name__}; use one sllm_mini on both sides")
        return answer

    def kill(self) -> None:
        """Kills the process (SIGKILL): what a machine that fails does."""
        self.process.kill()

    def watch(self, silent_seconds: float, stuck_seconds: float = math.inf) -> None:
        """From now on the process is killed once it has answered nothing, or ended no step, for so long. Once."""
        arguments = (silent_seconds, stuck_seconds)
        self._watch = threading.Thread(target=self._ask_whether_alive, args=arguments, name=f"sllm-watch-{self.name}", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """Ends the process and waits for it, except in `on_death`, when it is gone. Safe to call twice."""
        self._channel.close()
        for thread in (self._thread, self._watch):
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def _ask_whether_alive(self, silent_seconds: float, stuck_seconds: float) -> None:
        missed, seconds = 0, silent_seconds / (2 * _PINGS)
        while missed < _PINGS and not self._gone.wait(min(seconds, stuck_seconds / 2)):
            try:
                stuck = self.ask(messages.Ping(self.next()), messages.Alive, seconds=seconds).stuck_seconds
                missed = 0
                if stuck >= stuck_seconds:
                    self.why = f"its engine had not ended a step for {stuck:.1f} s"
                    break
            except WireTimeout:
                missed += 1
            except WireError:
                return  # its connection has ended, which is noticed where it is read
        self.why = self.why or f"it answered nothing for {silent_seconds:g} s"
        self.process.kill()

    def _listen(self) -> None:
        try:
            while True:
                answer = self._channel.receive().message
                with self._changed:
                    if answer.number in self._waiting:
                        self._answers[answer.number] = answer
                        self._changed.notify_all()
        except WireError:
            with self._changed:
                self._gone.set()
                self._changed.notify_all()
            self._channel.close()
            self.process.kill()  # one that only lost its connection must not speak on
            status = self.process.wait()
            self.why = self.why or f"its process ended with status {status}"
            self._on_death(self.name)
