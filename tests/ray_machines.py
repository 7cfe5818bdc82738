"""One Ray cluster for all tests of a session: machines that are processes of this one, two of them with GPUs that are not there.

Run as a program it is what has these processes, so that they are no children of the process that tests, as those of nobody's Ray are.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

# Before ray is imported, which reads them then: a token of this session's own, nothing told to anybody, and time to start beside other work.
os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "60000"})

FAKE_GPUS = 4
_T = TypeVar("_T")
_NODE = {"num_cpus": 1, "num_gpus": FAKE_GPUS, "object_store_memory": 80 << 20}
_HEAD = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
_NOTICED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 500, "health_check_failure_threshold": 5}
"""Ray looks after its machines itself, and notices one that is gone after some 15 s unless told otherwise."""


class RayMachines:
    """The machines beside the head, which has no GPU."""

    def __init__(self) -> None:
        self._program = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._answer()

    def add(self) -> None:
        """One more with GPUs."""
        self._ask("add")

    def remove(self, raylet: int) -> None:
        """The machine whose first process this is goes, as if its power had gone."""
        self._ask(str(raylet))

    def close(self) -> None:
        with self._program:
            self._program.communicate()  # until the last process of it has gone

    def _ask(self, what: str) -> None:
        assert self._program.stdin is not None
        print(what, file=self._program.stdin, flush=True)
        self._answer()

    def _answer(self) -> str:
        assert self._program.stdout is not None
        said = self._program.stdout.readline().strip()
        assert said, "the program that has Ray's processes ended; its error stands above"
        return said


@pytest.fixture(scope="session")
def ray_machines() -> Iterator[RayMachines]:
    ray = pytest.importorskip("ray", reason="Ray is not installed; make ray")
    before = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own
    machines = RayMachines()
    try:
        ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
        yield machines
    finally:
        ray.shutdown()
        machines.close()
        signal.signal(signal.SIGTERM, before)


def actors() -> list[int]:
    """The processes of the nodes' actors, on all machines; the agents are their children."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            said = Path(f"/proc/{pid}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if said.startswith("ray::AgentActor"):
            found.append(int(pid))
    return found


def patiently(start: Callable[[], _T]) -> _T:
    """Ray gives up what has not come up after some 15 s, and two busy cores may take longer."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:  # noqa: BLE001 - that is what Ray raises
            print(f"once more: {error}", file=sys.stderr)
    return start()


def main() -> None:
    """Its first line says where the cluster is; then each line of standard input is done and answered, until its end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Ray may talk, too
    from ray.cluster_utils import Cluster

    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**_HEAD, "_system_config": _NOTICED}))
    try:
        for _ in range(2):
            patiently(lambda: cluster.add_node(**_NODE))
        print(cluster.address, file=answers)
        for line in sys.stdin:
            if line == "add\n":
                patiently(lambda: cluster.add_node(**_NODE))
            else:
                (node,) = [each for each in cluster.worker_nodes if each.all_processes["raylet"][0].process.pid == int(line)]
                cluster.remove_node(node, allow_graceful=False)
            print("done", file=answers)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    if os.fork() == 0:
        main()
