"""Worker processes that are killed at a chosen message of a move, such as `one=sending:HandOver`, and are forked.

Each such argument names a worker, a moment (sending, sent or received) and a message of `inference.migration.messages`; the worker
of that name kills itself there with SIGKILL, as a machine that loses its power would, and the others are ordinary workers.
`forked` makes the `program` of `Workers` of them, and spares each the seconds of its imports (chapter 05). Shown in chapter 07.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sllm_mini.cluster.nodes.launchers import ForkedProcess
from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.cluster.zygote import ForkOptions
from sllm_mini.inference.migration import messages
from sllm_mini.inference.workers import worker
from sllm_mini.inference.workers.messages import Open
from sllm_mini.inference.workers.process import Process, Start
from sllm_mini.lab.nursery import Nursery
from sllm_mini.wire import Channel

if TYPE_CHECKING:
    from sllm_mini.inference.engine import Engine

MOMENTS = ("sending", "sent", "received")
_NURSERY = Nursery([*RUNTIME, "sllm_mini.lab.moving.dying"], ["sllm_mini.lab.moving.dying:main"])


def forked(*deaths: str) -> Start:
    """A `program` of `Workers` whose processes are forked from one zygote; `deaths` are arguments as above."""

    def start() -> tuple[socket.socket, Process]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                return ours, ForkedProcess(_NURSERY.fork(deaths, options=ForkOptions(stdin=theirs)))
        except BaseException:
            ours.close()
            raise

    return start


def death(argument: str) -> tuple[str, str, str]:
    """Worker, moment and message of one argument. Raises ValueError for one that names no moment of a move."""
    name, _, place = argument.partition("=")
    moment, _, message = place.partition(":")
    if not name or moment not in MOMENTS or not hasattr(messages, message):
        raise ValueError(f"{argument!r} names no moment; give worker=moment:message, such as one=sending:HandOver, with {', '.join(MOMENTS)}")
    return name, moment, message


def arm(moment: str, message: str) -> None:
    """From now on this process kills itself when that message is about to be sent, was sent, or was received."""
    kind = getattr(messages, message)
    send, receive = Channel.send, Channel.receive

    def happens(now: str, said: Any) -> None:
        if now == moment and isinstance(said, kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_send(self: Any, said: Any, **options: Any) -> None:
        happens("sending", said)
        send(self, said, **options)
        happens("sent", said)

    def dying_receive(self: Any, *args: Any, **options: Any) -> Any:
        received = receive(self, *args, **options)
        happens("received", received.message)
        return received

    Channel.send, Channel.receive = dying_send, dying_receive  # type: ignore[method-assign, assignment]


def main(arguments: Sequence[str], load: Callable[[Open], Engine] = worker.load) -> None:
    """Runs a worker whose engine `load` makes; never returns."""
    deaths = [death(argument) for argument in arguments]

    def make(begin: Open) -> Engine:
        for name, moment, message in deaths:
            if name == begin.owner:
                arm(moment, message)
        return load(begin)

    worker.main(make)
