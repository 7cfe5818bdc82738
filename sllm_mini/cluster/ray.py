"""Nodes on the machines of a Ray cluster. Chapter 08.

Ray says which machines there are, leases their GPUs and starts one actor a node, which does one thing: it starts the node's agent
there. The agent connects to the driver, and from then on all is as with a node of this machine: orders, answers and beats go over
that connection, so a death is noticed by its end or by silence, long before Ray has looked (some 15 s). Ray restarts no actor:
what comes back is a new incarnation. sllm_mini must be installed on every machine, and the driver's address reachable from there; a
node's folder has the same path on its machine. Whoever may use the Ray cluster can read the key of the connections, an actor's argument.
The only module that imports ray. Costs an idle actor of some 110 MB a node, and 0.8 GB for a Ray of one's own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sllm_mini.cluster.live.options import LiveOptions
from sllm_mini.cluster.nodes.program import Agent, connected_node
from sllm_mini.cluster.nodes.remote import RemoteNode
from sllm_mini.control.messages import NodeSpec
from sllm_mini.errors import SllmError, UnsupportedError

_CONNECT_SECONDS = 5.0
_KILLED = -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Machine:
    """One of Ray's: how many of its GPUs no node of ours has leased, and how many nodes of ours are on it."""

    id: str
    gpus: int
    nodes: int


def choose(machines: Sequence[Machine], spec: NodeSpec, *, cuda: bool) -> tuple[str, int]:
    """The machine of a node and how many GPUs it leases: as many as it has devices, and none where only other machines have them and it
    needs none (not `cuda`). Nodes go to the machine with the fewest. Raises SllmError where there is no machine for it."""
    fitting = [each for each in machines if each.gpus >= spec.devices]
    if not (fitting if cuda else machines):
        raise SllmError(f"no machine of the Ray cluster has {spec.devices} free GPUs for the node {spec.name}; add one, or give the node fewer devices")
    best = min(fitting if cuda else machines, key=lambda each: (each.nodes, each not in fitting))
    return best.id, spec.devices if best in fitting else 0


class AgentActor:
    """The actor: an agent that is started with it and ends with it."""

    def __init__(self, agent: Agent, search: Sequence[str]) -> None:
        # Not all of the driver's folders are there on another machine, and those of this one the driver does not know.
        sys.path.extend(place for place in search if place not in sys.path)
        self._process = msgspec.structs.replace(agent, starter=os.getpid()).start()  # else Ray would leave it, when it ends the actor

    def pid(self) -> int:
        """The agent's: Ray had a place for the actor."""
        return self._process.pid

    def wait(self) -> int:
        """The agent's exit code, once it has ended. Nothing else is answered meanwhile."""
        return self._process.wait()


class ActorProcess:
    """What stands for the agent's process on the driver's machine (see `AgentProcess`). Once it is killed it counts as ended, which Ray
    cannot say of a machine that has failed for many seconds. `on_end` is called then, and again."""

    def __init__(self, ray: Any, actor: Any, on_end: Callable[[], object]) -> None:
        self._ray, self._actor, self._on_end = ray, actor, on_end
        self._ended, self._code = threading.Event(), _KILLED
        self._waiting = actor.wait.remote()
        self._waiting.future().add_done_callback(self._end)

    def kill(self) -> None:
        self._ended.set()
        self._ray.kill(self._actor)
        self._on_end()

    def poll(self) -> int | None:
        return self._code if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("the agent", timeout or 0.0)
        return self._code

    def _end(self, waited: Future[int]) -> None:
        if waited.exception() is None:
            self._code = waited.result()
        self._ended.set()


class RayNodes:
    """Makes nodes on the machines of the Ray that this process is connected to; where it is to none, of that at RAY_ADDRESS, else of one that
    is started on this machine and ends with `close`. Agents reach this process at `host`. Safe from several threads. Raises UnsupportedError where ray is not
    installed, SllmError where it cannot be reached."""

    def __init__(self, folder: Path, options: LiveOptions) -> None:
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise UnsupportedError('a cluster on Ray needs Ray, which is not installed; pip install "sllm_mini[ray]"') from error
        self._ray: Any = ray
        self._on: Any = NodeAffinitySchedulingStrategy
        self._folder, self._options = folder, options
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], tuple[str, int]] = {}
        """The machines of the nodes, and how many GPUs each has leased."""
        self._begun = not ray.is_initialized()
        if self._begun:
            address = os.environ.get("RAY_ADDRESS") or "local"
            _check_reachable(address)
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # that is what it raises where a start takes too long
                raise SllmError(f"the Ray at {address} cannot be used: {error}") from error
        self.host: str = options.host or ray.util.get_node_ip_address()
        self._actor: Any = ray.remote(AgentActor)

    def __call__(self, spec: NodeSpec, incarnation: int) -> RemoteNode:
        """Returns once its agent has been started. Raises SllmError where Ray had no place for it for `join_seconds`."""
        with self._lock:
            place = self._places[spec.name, incarnation] = choose(self._machines(), spec, cuda=self._options.node.cuda)
        agent = Agent(spec.name, incarnation, os.fspath((self._folder / spec.name).absolute()), self._options.node)
        try:
            return connected_node(agent, self.host, lambda agent: self._start(agent, *place))
        except BaseException:
            self._leave(agent)
            raise

    def _start(self, agent: Agent, machine: str, gpus: int) -> ActorProcess:
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": self._on(machine, soft=False)}
        actor = self._actor.options(**options).remote(agent, sys.path)
        try:
            self._ray.get(actor.pid.remote(), timeout=self._options.join_seconds)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            why = f"it had no place for {self._options.join_seconds:g} s" if isinstance(error, TimeoutError) else str(error)
            raise SllmError(f"Ray did not start the node {agent.name} on its machine {machine[:8]} with {gpus} GPUs: {why}") from error
        return ActorProcess(self._ray, actor, lambda: self._leave(agent))

    def close(self) -> None:
        """Ends what was begun; its nodes must have ended."""
        if self._begun:
            self._begun = False
            self._ray.shutdown()

    def _leave(self, agent: Agent) -> None:
        with self._lock:
            self._places.pop((agent.name, agent.incarnation), None)

    def _machines(self) -> list[Machine]:
        taken = list(self._places.values())
        return [
            Machine(
                each["NodeID"],
                int(each["Resources"].get("GPU", 0)) - sum(gpus for machine, gpus in taken if machine == each["NodeID"]),
                sum(machine == each["NodeID"] for machine, _ in taken),
            )
            for each in self._ray.nodes()
            if each["Alive"]
        ]


def _check_reachable(address: str) -> None:
    """Ray itself would try for longer than anybody waits. Raises SllmError."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise SllmError(f"no Ray answers at {address} ({error}); start it there with: ray start --head, or give another RAY_ADDRESS") from error
