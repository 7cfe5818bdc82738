"""A node in a process of its own: the driver's end, and the program at the other. Explained in chapter 08.

Both ends say something every `beat_seconds`, and each gives the other up after `silent_seconds` without a word: the driver kills the
agent, and the agent ends itself and its workers. So a node that hangs is noticed as surely as one that dies, whose connection ends
at once, and a node that cannot hear its driver serves nobody. Costs a process of some 35 MB without torch, and two threads a node here.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import NoReturn

import msgspec

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.workers import Launcher
from sllm_mini.errors import SllmError, WireError
from sllm_mini.inference.workers.process import start_process
from sllm_mini.storage import Store
from sllm_mini.wire import Channel, WireTimeout

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from sllm_mini.cluster.nodes.remote import main; main()"
_CLOSE_SECONDS = 10.0
_START_SECONDS = 30.0
Orders = node.NodeOrder | node.Hear | node.Leave
Answers = node.NodeAnswer | node.Beat


class RemoteNode:
    """The driver's end. A `NodeHandle`; the agent's process is its own. Safe from several threads. Raises OSError where no process
    can be started."""

    def __init__(self, name: str, incarnation: int, options: NodeOptions, folder: Path) -> None:
        self.name, self.incarnation = name, incarnation
        self._options = options
        search = json.dumps([os.path.abspath(place) for place in sys.path])
        arguments = [name, str(incarnation), os.fspath(folder), msgspec.json.encode(options).decode(), search]
        connection, self._process = start_process(["-c", _PROGRAM, *arguments])
        self.pid = self._process.pid
        self._channel: Channel[Answers] = Channel(connection, Answers, name=f"node {name}")
        self._orders: queue.SimpleQueue[tuple[Orders, bytes] | None] = queue.SimpleQueue()
        self._why = ""
        self._threads: list[threading.Thread] = []

    def open(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        """From now on its answers are told, on a thread of its own."""
        self._threads = [
            threading.Thread(target=self._hear, args=(on_answer, on_gone), name=f"sllm-hear-{self.name}", daemon=True),
            threading.Thread(target=self._say, name=f"sllm-say-{self.name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None:
        """Takes an order; never waits, never raises."""
        self._orders.put((order, payload))

    def kill(self) -> None:
        """SIGKILL; its workers end with it."""
        self._why = self._why or "it was killed"
        self._process.kill()

    def close(self) -> None:
        """Lets it end by itself, for a while, and waits until it has."""
        self._why = self._why or "it was closed"
        self._orders.put((node.Leave(), b""))
        try:
            self._process.wait(_CLOSE_SECONDS)
        except TimeoutExpired:
            self._process.kill()
        for thread in self._threads:
            thread.join()

    def _hear(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        patience = _START_SECONDS  # until it has said something it is being imported
        try:
            while True:
                message = self._channel.receive(patience).message
                patience = self._options.silent_seconds
                if not isinstance(message, node.Beat):
                    on_answer(message, b"")
        except WireTimeout:
            self._why = self._why or f"it said nothing for {patience:g} s"
        except WireError as error:
            self._why = self._why or f"its connection ended ({error})"
        self._process.kill()
        self._process.wait()
        self._orders.put(None)
        self._channel.close()
        on_gone(self._why)

    def _say(self) -> None:
        with suppress(WireError):  # the thread that hears tells it
            _speak(self._channel, self._orders, node.Hear(), self._options)


def _speak(channel: Channel, waiting: queue.SimpleQueue, beat: node.Hear | node.Beat, options: NodeOptions) -> None:
    """Sends what is put into the queue, and a beat where nothing is, until None. Raises WireError."""
    while True:
        try:
            said = waiting.get(timeout=options.beat_seconds)
        except queue.Empty:
            said = beat, b""
        if said is None:
            return
        channel.send(said[0], payload=said[1], timeout=options.silent_seconds)


def launcher_of(options: NodeOptions, store: Store) -> Launcher:
    """What starts the workers of an agent that has a process of its own."""
    from sllm_mini.cluster.nodes.launchers import SpawnLauncher, ZygoteLauncher
    from sllm_mini.cluster.nodes.threads import ThreadLauncher

    if options.launcher == "thread":
        return ThreadLauncher(store, engine=options.engine)
    return ZygoteLauncher(engine=options.engine) if options.launcher == "zygote" else SpawnLauncher(engine=options.engine)


def main() -> NoReturn:
    """The agent's process. It ignores SIGINT: its driver, or a killer, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from sllm_mini.cluster.nodes.agent import NodeAgent
    from sllm_mini.inference.workers.worker import take_stdin

    name, incarnation, folder, encoded = sys.argv[-4:]
    options = msgspec.json.decode(encoded, type=NodeOptions)
    channel: Channel[Orders] = Channel(take_stdin(), Orders, name="driver of the node")
    answers: queue.SimpleQueue[tuple[Answers, bytes] | None] = queue.SimpleQueue()
    try:
        agent = NodeAgent(name, int(incarnation), lambda store: launcher_of(options, store), options, Path(folder))
    except SllmError as error:
        print(f"node {name}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    agent.open(lambda answer, payload: answers.put((answer, payload)), lambda why: os._exit(1))
    speaking = threading.Thread(target=_end_with, args=(agent.kill, channel, answers, options), name="sllm-say", daemon=True)
    speaking.start()
    try:
        while True:
            received = channel.receive(options.silent_seconds, into=lambda _, nbytes: bytearray(nbytes))
            if isinstance(received.message, node.Leave):
                agent.close()
                os._exit(0)
            if not isinstance(received.message, node.Hear):
                agent.give(received.message, b"" if received.payload is None else bytes(received.payload))
    except WireError:
        agent.kill()  # the driver is gone or says nothing: nobody is served from here; ends the process
    os._exit(1)


def _end_with(kill: Callable[[], None], channel: Channel, answers: queue.SimpleQueue, options: NodeOptions) -> None:
    try:
        _speak(channel, answers, node.Beat(), options)
    except WireError:
        kill()
