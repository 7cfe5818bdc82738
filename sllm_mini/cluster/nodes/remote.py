"""A node in a process of its own, as its driver sees it; `program` is what runs there. Explained in chapter 08.

Both ends say something every `beat_seconds`, and each gives the other up after `silent_seconds` without a word: the driver kills the
agent, and the agent ends itself and its workers. So a node that hangs is noticed as surely as one that dies, whose connection ends
at once, and a node that cannot hear its driver serves nobody. Costs two threads a node here.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from subprocess import TimeoutExpired
from typing import Protocol

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.mailbox import Conversation
from sllm_mini.errors import WireError
from sllm_mini.inference.workers.worker import MAX_SESSION_NBYTES
from sllm_mini.wire import Channel, ChannelClosed, Listener, WireTimeout

_CLOSE_SECONDS = 10.0
_START_SECONDS = 30.0
_LOOK_SECONDS = 0.1

log = logging.getLogger("sllm_mini.cluster")


class AgentProcess(Protocol):
    """What an agent runs in: a `Popen`, or what stands for one on another machine. Safe from several threads."""

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended."""
        ...

    def poll(self) -> int | None:
        """None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        ...


class RemoteNode:
    """A `NodeHandle` of an agent at the end of a connection. `way` is that connection, or the listener to which the agent connects;
    it and `process` are its own from now on. Safe from several threads."""

    def __init__(self, name: str, incarnation: int, options: NodeOptions, process: AgentProcess, way: socket.socket | Listener) -> None:
        self.name, self.incarnation = name, incarnation
        self._options, self._process, self._way = options, process, way
        self._conversation: Conversation[node.NodeOrder | node.Leave, node.NodeAnswer | node.Ending] = Conversation(
            node.ToNode, options.beat_seconds, options.silent_seconds, on_refused=self._refused,
        )  # fmt: skip
        self._on_answer: Callable[[node.NodeAnswer, bytes], None] = lambda _answer, _payload: None
        self._why = ""
        self._lock = threading.Lock()
        self._channel: Channel[node.FromNode] | None = None
        self._thread: threading.Thread | None = None

    def open(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        """From now on its answers are told, on threads of its own."""
        self._on_answer = on_answer
        thread = threading.Thread(target=self._run, args=(on_answer, on_gone), name=f"sllm-hear-{self.name}", daemon=True)
        thread.start()
        self._thread = thread

    def give(self, order: node.NodeOrder, payload: bytes = b"") -> None:
        """Takes an order; never waits, never raises. One that no message carries is answered as one that failed."""
        if len(payload) > MAX_SESSION_NBYTES:  # the agent would take it for another protocol, and end
            self._refused(order, WireError(f"node {self.name}: a payload of {len(payload):,} bytes is more than the {MAX_SESSION_NBYTES:,} that are taken"))
        else:
            self._conversation.post(order, payload)

    def kill(self) -> None:
        """SIGKILL; its workers end with it."""
        self._end("it was killed")

    def close(self) -> None:
        """Lets it end by itself, for a while, and waits until it has."""
        if self._thread is None:
            self._end("it was closed")
            self._process.wait()
            self._way.close()
            return
        self._why = self._why or "it was closed"
        self._conversation.post(node.Leave())
        try:
            self._process.wait(_CLOSE_SECONDS)
        except TimeoutExpired:
            self._process.kill()
        self._thread.join()

    def _refused(self, order: node.NodeOrder | node.Leave, error: WireError) -> None:
        """The node never hears of it, and lives."""
        answer = _answer_to(order, str(error)[:8000])
        if answer is not None:
            self._on_answer(answer, b"")
        elif isinstance(order, node.Pipeline):
            log.warning("the nodes of a plan do not serve its model together: %s", error)  # they have it whole soon
        else:
            self._end(f"it cannot be told what it must be ({error})")
        if isinstance(order, node.Fetch) and order.part is not None:
            self.give(node.Fetch(order.plan, order.model, None))  # who waits for the plan there reads the model itself

    def _end(self, why: str) -> None:
        """At once; its connection too, for where a kill takes its time."""
        with self._lock:
            self._why = self._why or why
            channel = self._channel
        self._process.kill()
        if channel is not None:
            channel.close()

    def _run(self, on_answer: Callable[[node.NodeAnswer, bytes], None], on_gone: Callable[[str], None]) -> None:
        try:
            self._hear(self._connected(), on_answer)
        except WireTimeout as error:
            self._end(str(error))
        except WireError as error:
            self._end(f"its connection ended ({error})")
        self._process.wait()
        on_gone(self._why)

    def _connected(self) -> Channel[node.FromNode]:
        """Raises WireTimeout where it does not come, ChannelClosed where it never will."""
        connection = self._way if isinstance(self._way, socket.socket) else self._accepted(self._way)
        with self._lock:
            self._channel = Channel(connection, node.FromNode, name=f"node {self.name}")
            return self._channel

    def _accepted(self, listener: Listener) -> socket.socket:
        deadline = time.monotonic() + _START_SECONDS
        with listener:
            while True:
                try:
                    return listener.accept(_LOOK_SECONDS)
                except WireTimeout:
                    if self._process.poll() is not None:
                        raise ChannelClosed("its process ended before it connected") from None
                    if time.monotonic() > deadline:
                        raise WireTimeout(f"it did not connect within {_START_SECONDS:g} s") from None

    def _hear(self, channel: Channel[node.FromNode], on_answer: Callable[[node.NodeAnswer, bytes], None]) -> None:
        """Until its connection ends. Raises WireError."""
        speaking = threading.Thread(target=self._speak, args=(channel,), name=f"sllm-say-{self.name}", daemon=True)
        speaking.start()
        patience = _START_SECONDS  # until it has said something it is being imported
        try:
            while True:
                for answer, _ in self._conversation.hear(channel, patience):
                    if isinstance(answer, node.Ending):
                        return self._end(answer.reason)
                    on_answer(answer, b"")
                patience = self._options.silent_seconds
        except WireTimeout as error:
            raise WireTimeout(f"it said nothing for {patience:g} s") from error
        finally:
            self._process.kill()
            self._conversation.end()
            channel.close()
            speaking.join()

    def _speak(self, channel: Channel[node.FromNode]) -> None:
        try:
            self._conversation.speak(channel)
        except ChannelClosed:
            return  # the thread that hears tells it
        except WireError as error:
            self._end(f"it cannot be told any more ({error})")


def _answer_to(order: node.NodeOrder | node.Leave, why: str) -> node.NodeAnswer | None:
    """What a node says to an order that it cannot carry out; None where it says nothing."""
    match order:
        case node.Register(model=model, number=number):
            return node.OrderFailed(model, WireError.__name__, why, number)
        case node.Fetch(plan=plan, model=model):
            return node.Fetched(plan, model, error=why)
        case node.Climb(instance=instance, epoch=epoch):
            return node.Lost(instance, epoch, why)
        case node.Run(request_id=request_id, register_epoch=epoch):
            return node.RunFailed(request_id, epoch, WireError.__name__, why)
        case node.Move(request_id=request_id, epoch=epoch):
            return node.Moved(request_id, epoch, "stayed", 0.0)
    return None
