"""How a node comes to a live cluster: it is made, told to join, and waited for. Part of `driver`; chapter 08."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.loop import Loop
from sllm_mini.cluster.nodes import messages as node
from sllm_mini.control import messages as m
from sllm_mini.errors import SllmError

Handles = Callable[[m.NodeSpec, int], NodeHandle]
"""Makes a node of its spec and its incarnation."""


class Adder:
    """A node has `seconds` to come up. Safe from several threads."""

    def __init__(self, loop: Loop, handles: Handles, seconds: float) -> None:
        self._loop, self._handles, self._seconds = loop, handles, seconds

    def add(self, spec: m.NodeSpec) -> None:
        """Returns when the controller knows the node. Raises SllmError where one of its name is there or on its way, or it does not come up,
        and what making it raises; nothing is left of it then."""
        members = self._loop.members
        incarnation = self._loop.call(lambda: members.incarnation(spec))
        try:
            handle = self._handles(spec, incarnation)
        except BaseException:
            self._loop.call(lambda: members.withdraw(spec.name))
            raise
        try:
            self._join(handle, spec)
        except BaseException as error:
            why = f"it did not come up: {error}"
            self._loop.post(lambda: members.gone(handle, why))
            try:
                handle.kill()
            finally:
                handle.close()
            raise

    def _join(self, handle: NodeHandle, spec: m.NodeSpec) -> None:
        members, done = self._loop.members, Future[None]()
        self._loop.do(lambda: members.begin(handle, spec, done))
        handle.open(
            lambda answer, _payload: self._loop.post(lambda: self._heard(handle, answer)), lambda why: self._loop.post(lambda: members.gone(handle, why)),
        )  # fmt: skip
        handle.give(members.join_order(handle))
        try:
            done.result(self._seconds)
        except TimeoutError as error:
            if not self._came(handle):
                raise SllmError(f"the node {spec.name} did not come up within {self._seconds:g} s") from error

    def _came(self, handle: NodeHandle) -> bool:
        """Whether it came just now, when its time was over; else it is given up, in one step with the look."""
        members, came = self._loop.members, list[bool]()

        def look() -> list[m.AnyEvent]:
            came.append(members.has_joined(handle))
            return [] if came[0] else members.gone(handle, f"it did not come up within {self._seconds:g} s")

        self._loop.do(look)
        return came[0]

    def _heard(self, handle: NodeHandle, answer: node.NodeAnswer) -> list[m.AnyEvent]:
        """Nothing of one that has been given up: the next of its name may be there already."""
        members = self._loop.members
        return [*members.heard(handle, answer), *self._loop.carry.heard(handle, answer)] if members.is_ours(handle) else []
