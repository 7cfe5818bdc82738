"""Kernels that are forked from a process which has imported what chapters import, for chapters that are executed one after another.

That saves each of them some five seconds (chapter 05 says why). What a chapter measures it measures in processes that it starts itself.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.cluster.zygote import Child, ForkOptions
from sllm_mini.errors import SllmError
from sllm_mini.lab.nursery import Nursery
from sllm_mini.wire import WireTimeout

_NURSERY = Nursery([*RUNTIME, "ipykernel.ipkernel", "ipykernel.kernelapp"], ["sllm_mini.lab.forked_kernel:serve"])


def serve(arguments: Sequence[str]) -> None:
    """A kernel, in a fork. `arguments` are ipykernel's."""
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=[*arguments, "--log-level=CRITICAL"])  # else it tells a terminal how to connect to it
    atexit._run_exitfuncs()  # a fork leaves without; temporary folders are removed there


class ForkedKernel(AsyncKernelManager):
    """Starts kernels as forks of one zygote, and is a kernel manager like any other besides."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        provisioner = self.provisioner
        if not isinstance(provisioner, LocalProvisioner) or kernel_cmd[1:3] != ["-m", "ipykernel_launcher"]:
            raise SllmError(f"the kernel {self.kernel_name} is not this Python's own ({' '.join(kernel_cmd[:3])}), and cannot be forked; execute the chapters one by one")
        child = _NURSERY.fork(kernel_cmd[3:], options=ForkOptions(environment=options["env"], folder=options["cwd"]))
        provisioner.process = _Process(child)  # type: ignore[assignment]
        provisioner.pid = provisioner.pgid = child.pid
        provisioner.cwd = options["cwd"]


class _Process:
    """A zygote's child as what a provisioner knows: a `Popen` without pipes."""

    stdin = stdout = stderr = None

    def __init__(self, child: Child) -> None:
        self.pid, self._child = child.pid, child
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self) -> int | None:
        return self._ended(None)

    def _ended(self, timeout: float | None) -> int | None:
        """Its status, and nothing is kept of it then: a provisioner does not wait for one that it has seen dead."""
        if self._status is None:
            with suppress(WireTimeout):
                self._status = self._child.wait(timeout)
                self._child.close()
        return self._status
