"""The process of a node's agent, and how it is started: beside its driver or on another machine. Explained in chapter 08.

The agent talks to its driver over standard input where that started it, else over a connection that it makes to the driver's
address. It ends with that connection, and with a driver that says nothing any more, and its workers with it. Costs some 35 MB
without torch, and two threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn, cast

import msgspec
from msgspec.structs import replace

from sllm_mini.cluster.live.options import NodeOptions
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.cluster.nodes.mailbox import Conversation
from sllm_mini.cluster.nodes.remote import AgentProcess, RemoteNode
from sllm_mini.cluster.nodes.workers import Launcher
from sllm_mini.cluster.zygote_child import end_with
from sllm_mini.errors import SllmError, WireError
from sllm_mini.inference.workers.process import start_process
from sllm_mini.inference.workers.worker import MAX_SESSION_NBYTES, take_stdin
from sllm_mini.storage import Store
from sllm_mini.wire import Channel, connect, get_key, listen, set_key
from sllm_mini.wire.tcp import join_address

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from sllm_mini.cluster.nodes.program import main; main()"


class Agent(msgspec.Struct, frozen=True):
    """What an agent is told at its start. `folder` is on its machine. It connects to `driver` and proves that it knows `key`; without, its
    standard input is the connection."""

    name: str
    incarnation: int
    folder: str
    options: NodeOptions
    driver: str = ""
    key: bytes = b""
    starter: int = 0
    """A process whose main thread starts it, and which it ends with; 0 is none."""

    def arguments(self) -> list[str]:
        """Of the Python that runs it, which searches for modules where this process does. Without the key: anybody can read them."""
        return ["-c", _PROGRAM, msgspec.json.encode(replace(self, key=b"")).decode(), json.dumps([os.path.abspath(place) for place in sys.path])]

    def start(self) -> subprocess.Popen[bytes]:
        """Its process, on this machine, that connects to the driver. Raises OSError."""
        process = subprocess.Popen([sys.executable, *self.arguments()], stdin=subprocess.PIPE, process_group=0)
        with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as told:  # it has ended already
            told.write(self.key)
        return process


def local_node(agent: Agent) -> RemoteNode:
    """A node on this machine, with Unix sockets. Raises OSError where no process can be started."""
    connection, process = start_process(agent.arguments())
    return RemoteNode(agent.name, agent.incarnation, agent.options, process, connection)


def connected_node(agent: Agent, host: str, start: Callable[[Agent], AgentProcess] = Agent.start) -> RemoteNode:
    """A node whose agent connects to this process at `host`, an address that its machine can reach; `start` starts it there. This
    process has a key (`wire.set_key`). Raises WireError where nothing can listen there, and what `start` raises."""
    listener = listen(join_address(host, 0))
    try:
        return RemoteNode(agent.name, agent.incarnation, agent.options, start(replace(agent, driver=listener.address, key=get_key())), listener)
    except BaseException:
        listener.close()
        raise


def launcher_of(options: NodeOptions, store: Store) -> Launcher:
    """What starts the workers of an agent that has a process of its own."""
    from sllm_mini.cluster.nodes.launchers import SpawnLauncher, ZygoteLauncher
    from sllm_mini.cluster.nodes.threads import ThreadLauncher

    if options.launcher == "thread":
        return ThreadLauncher(store, engine=options.engine)
    return ZygoteLauncher(path=options.zygote or None, engine=options.engine) if options.launcher == "zygote" else SpawnLauncher(engine=options.engine)


def main() -> NoReturn:
    """The agent's process. It ignores SIGINT: its driver, or a killer, ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin = msgspec.json.decode(sys.argv[-1], type=Agent)
    if begin.starter:
        end_with(begin.starter)
    if begin.driver:
        set_key(sys.stdin.buffer.read())
        try:
            connection = connect(begin.driver)
        except WireError as error:
            sys.exit(f"the node {begin.name} cannot talk to its driver: {error}")
        host = connection.getsockname()[0]  # by which machines reach this one
    else:
        connection, host = take_stdin(), ""
    _serve(begin, Channel(connection, node.ToNode, name="the driver"), host)


def _serve(begin: Agent, channel: Channel[node.ToNode], host: str) -> NoReturn:
    from sllm_mini.cluster.nodes.agent import NodeAgent

    options = begin.options
    conversation: Conversation[node.NodeAnswer | node.Ending, node.NodeOrder | node.Leave] = Conversation(
        node.FromNode, options.beat_seconds, options.silent_seconds, max_payload_nbytes=MAX_SESSION_NBYTES,
    )  # fmt: skip

    agent: NodeAgent | None = None

    def end(why: str) -> NoReturn:
        """Nobody is served from here any more; where the driver hears it, it knows why."""
        with suppress(WireError):
            conversation.last(channel, node.Ending(why[:8000]))
        if agent is not None:
            agent.kill()
        os._exit(1)

    def speak() -> None:
        try:
            conversation.speak(channel)
        except WireError as error:
            end(f"it cannot say what it has to ({error})")

    try:
        agent = NodeAgent(begin.name, begin.incarnation, lambda store: launcher_of(options, store), options, Path(begin.folder), host)
    except (SllmError, OSError) as error:
        end(str(error))
    agent.open(conversation.post, lambda _why: os._exit(1))
    threading.Thread(target=speak, name="sllm-say", daemon=True).start()
    try:
        while True:
            for order, payload in conversation.hear(channel, options.silent_seconds):
                if isinstance(order, node.Leave):
                    agent.close()
                    os._exit(0)
                agent.give(order, payload)
    except WireError as error:
        end(f"it hears its driver no more ({error})")
