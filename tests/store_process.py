"""A store in a process of its own: `with StoreProcess(folder, dram_nbytes=…) as store: store.client.attach("a")`. Also the
program that it runs, which serves until its standard input ends and then says what it has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sllm_mini.errors import StoreError
from sllm_mini.storage.client import StoreClient
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.storage.store import Store

PATIENT = RemoteOptions(timeout_seconds=30.0, deadline_seconds=30.0, backoff_seconds=0.01)
"""How remotes are read: a gate in the server may stay closed for as long as a test needs."""


class StoreProcess:
    """See the module. The options are those of `Store`; `limits` are set in the process before anything else, in bytes or
    numbers ("fsize", "nofile"). `stop` ends it in good order, and fails if it complained or left anything."""

    def __init__(self, folder: Path, *, address: Path | None = None, limits: dict[str, int] | None = None, **options: Any) -> None:
        self.folder = folder
        self.address = address or folder / "socket"
        folder.mkdir(parents=True, exist_ok=True)
        said = json.dumps({"options": options, "limits": limits or {}})
        self.process = subprocess.Popen(
            [sys.executable, __file__, os.fspath(folder), os.fspath(self.address), said], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"NO_PROXY": "*"},
        )  # fmt: skip
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise AssertionError(self.process.communicate()[1])
        self.client = StoreClient(self.address, remote=PATIENT)

    def descriptors(self) -> list[str]:
        """What is open in it."""
        found = []
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{self.process.pid}/fd/{name}"))
            except OSError:
                continue  # closed meanwhile
        return found

    def shared_nbytes(self) -> int:
        """What the kernel says that its memory files occupy."""
        total = 0
        for name in os.listdir(f"/proc/{self.process.pid}/fd"):
            path = f"/proc/{self.process.pid}/fd/{name}"
            try:
                if "sllm-chunk" in os.readlink(path):
                    total += os.stat(path).st_blocks * 512
            except OSError:
                continue
        return total

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> None:
        out, err = self.process.communicate("", timeout=30)
        assert (self.process.returncode, err) == (0, ""), (self.process.returncode, err)
        assert json.loads(out) == {"threads": [], "chunks": 0, "socket": False}, out

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.returncode is None:
            if kind is None:
                self.stop()
            else:
                self.kill()


def eventually(check: Any, seconds: float = 10.0) -> None:
    """Waits until `check()` is true: for what happens on another thread or in another process."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.005)


def _serve(folder: str, address: str, said: dict[str, Any]) -> None:
    import resource

    for name, limit in said["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (limit, limit))
    if "fsize" in said["limits"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails instead
    with Store(folder, remote=PATIENT, **said["options"]) as store, StoreServer(store, address):
        print("ready", flush=True)
        sys.stdin.read()
    left = sorted(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
    chunks = sum("sllm-chunk" in os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}"))
    try:
        StoreClient(address).models()
        answers = True
    except StoreError:
        answers = os.path.exists(address)
    print(json.dumps({"threads": left, "chunks": chunks, "socket": answers}))


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
