"""Links as machines have them, on one machine: a network namespace for each node, joined by a bridge, with the kernel's token bucket (tbf)
on both ends of every cable. Taught in chapter 10.

A namespace lives as long as a process that waits in it does, and that waits for the end of a pipe which only this process holds. So however
this one ends, the kernel takes namespaces, cables and bridge back; nothing has a name that could be left behind. Needs root, or a kernel that
gives users namespaces of their own (`unshare -Urn`), and the commands of iproute2 and util-linux. Costs one small process a node.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from sllm_mini.errors import UnsupportedError

_TOOLS = ("unshare", "nsenter", "ip", "tc", "sh", "cat")
_ALONE = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])
"""Commands that run one in a namespace of its own: as root, and as any user."""
_TRIAL = "ip link add name here0 type veth peer name there0 && ip link add name bridge0 type bridge && tc qdisc add dev here0 root tbf rate 8mbit burst 64kb latency 50ms"
_SECONDS = 20.0
_MOST = 1000


class Links:
    """So many nodes on one switch, each with a link of `bytes_per_second` both ways, frames' headers included; ended by `close`.

    `command(name)` is put before a program's own command line and runs it in that node's namespace, which reaches the others at `host(name)` and
    nothing else. Raises UnsupportedError where this machine gives no namespaces, ValueError.
    """

    def __init__(self, names: Sequence[str], bytes_per_second: float) -> None:
        if not 0 < len(set(names)) == len(names) <= _MOST or not bytes_per_second > 0:
            raise ValueError(f"{len(names)} nodes at {bytes_per_second} bytes/s are no network; give 1 to {_MOST} different names and a rate above 0")
        reason = why_no_namespaces()
        if reason is not None:
            raise UnsupportedError(f"this machine gives no network namespaces: {reason}; use token buckets instead")
        self._hosts = {name: f"10.213.{number // 250}.{number % 250 + 1}" for number, name in enumerate(names)}
        self._stack = ExitStack()
        self._inside: dict[str, list[str]] = {}
        # What tbf lets wait is a queue of 50 ms; a burst has room for what the kernel sends as one packet and cuts up later.
        bucket = f"root tbf rate {round(bytes_per_second * 8)}bit burst 128kb latency 50ms"
        try:
            hub, _ = self._hold(_alone())
            _run([*hub, "sh", "-ec", "ip link add name bridge0 type bridge && ip link set bridge0 up"])
            for number, name in enumerate(names):
                self._inside[name], pid = self._hold([*hub, "unshare", "--net"])
                _run([*hub, "sh", "-ec", f"ip link add name v{number} type veth peer name eth0 netns {pid}; ip link set v{number} master bridge0 up; tc qdisc add dev v{number} {bucket}"])
                _run([*self._inside[name], "sh", "-ec", f"ip link set lo up; ip addr add {self._hosts[name]}/16 dev eth0; ip link set eth0 up; tc qdisc add dev eth0 {bucket}"])
        except BaseException:
            self.close()
            raise

    def host(self, name: str) -> str:
        """A node's address, in every node's namespace."""
        return self._hosts[name]

    def command(self, name: str) -> list[str]:
        """What runs a command in a node's namespace; the process is the command's own, with its descriptors."""
        return list(self._inside[name])

    def close(self) -> None:
        """Takes everything down; programs that still run there lose their network. Safe to call twice."""
        self._stack.close()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hold(self, alone: list[str]) -> tuple[list[str], int]:
        """A process that keeps a new namespace: what runs a command there, and its pid."""
        process = subprocess.Popen([*alone, "sh", "-c", "echo && exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._stack.callback(_end, process)
        if process.stdout is None or not process.stdout.readline():  # it says a line once it is there
            raise UnsupportedError(f"a network namespace could not be made: {_last_words(process)}")
        user = ["--user", "--preserve-credentials"] if "--user" in _alone() else []
        return ["nsenter", "--target", str(process.pid), *user, "--net"], process.pid


@functools.cache
def _found() -> tuple[list[str] | None, str]:
    """What runs a command in a namespace of its own here, or why nothing does."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return None, f"it has no {', '.join(missing)} (iproute2 and util-linux have them)"
    reasons = []
    for alone in _ALONE:
        tried = subprocess.run([*alone, "sh", "-c", _TRIAL], capture_output=True, text=True, timeout=_SECONDS, check=False)
        if tried.returncode == 0:
            return alone, ""
        reasons.append(tried.stderr.strip().splitlines()[-1] if tried.stderr.strip() else f"exit status {tried.returncode}")
    return None, f"as this user, {reasons[0]}; in a namespace of users, {reasons[1]}"


def why_no_namespaces() -> str | None:
    """Why this machine cannot make `Links`; None where it can. Tried once a process, in a namespace that goes again."""
    return _found()[1] or None


def _alone() -> list[str]:
    alone, reason = _found()
    if alone is None:
        raise UnsupportedError(reason)
    return alone


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise UnsupportedError(f"a network link could not be made: {done.stderr.strip() or f'exit status {done.returncode}'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.communicate(timeout=_SECONDS)  # closes its input, which ends it


def _last_words(process: subprocess.Popen[bytes]) -> str:
    return (process.stderr.read() if process.stderr is not None else b"").decode(errors="replace").strip() or "it ended at once"
