"""The process that one loader lives in: it is told what to do and answers, one line of JSON each way.

It does everything that comes before a load once (imports, thread pools, the CUDA context and one load that is not
timed), then loads as often as it is asked, and gives all memory back before it answers. Started by `process.Worker`. Shown in
chapter 02.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.bench.entry import Job, resolve
from sllm_mini.lab.counters import counted

if TYPE_CHECKING:
    import torch

    from sllm_mini.lab.bench.entry import Load


def main(path: list[str], channel: socket.socket) -> None:
    """Answers until the channel ends. `path` is where modules are looked for."""
    sys.path[:] = path
    load: Load | None = None
    device, before = "cpu", 0
    for line in channel.makefile("r", encoding="utf-8"):
        asked = json.loads(line)
        try:
            if asked["do"] == "open":
                job = _job(asked)
                device = job.device
                load = _open(asked["opener"], job)
                before = _resident_nbytes()
                _answer(channel, {"ok": True})
            elif asked["do"] == "load" and load is not None:
                sample = _load(load, device)
                _answer(channel, sample | {"kept_nbytes": max(_resident_nbytes() - before, 0)})
            elif asked["do"] == "use":
                _answer(channel, _use(_job(asked)))
            elif asked["do"] == "call":
                _answer(channel, {"value": resolve(asked["function"])(*asked["arguments"])})
            else:
                raise ValueError(f"nothing can be done for {asked['do']!r} now")
        except Exception as error:  # noqa: BLE001 - said to the bench, which lists the loader as skipped
            _answer(channel, {"error": f"{type(error).__name__}: {error}"})
        del asked
        gc.collect()


def _answer(channel: socket.socket, document: dict[str, Any]) -> None:
    channel.sendall(json.dumps(document).encode() + b"\n")


def _job(asked: dict[str, Any]) -> Job:
    return Job(Path(asked["path"]), tuple(Path(file) for file in asked["files"]), asked["device"], asked.get("arguments", {}))


def _open(opener: str, job: Job) -> Load:
    import torch

    if job.device != "cpu":
        torch.zeros(1, device=job.device)  # the context
    sum_tensors([torch.zeros(1 << 20, dtype=torch.uint8, device=job.device)])  # the threads of the sum
    load: Load = resolve(opener)(job)
    return load


def _load(load: Load, device: str) -> dict[str, Any]:
    """One sample: the load and the sum, and what the kernel counted during both."""
    gc.collect()
    with counted() as work:
        start = time.perf_counter()
        tensors: Iterable[torch.Tensor] = load()
        tensors = list(tensors)
        _wait(device)
        loaded = time.perf_counter()
        total, nbytes = sum_tensors(tensors)
        end = time.perf_counter()
    on = {str(tensor.device).partition(":")[0] for tensor in tensors}
    counters = asdict(work)
    del tensors
    _free(device)
    if on - {device.partition(":")[0]}:
        raise RuntimeError(f"it left tensors on {', '.join(sorted(on))}, not on {device}")
    return {"seconds": end - start, "load_seconds": loaded - start, "sum": total, "nbytes": nbytes, "counters": counters}


def _use(job: Job) -> dict[str, Any]:
    """The sum alone, over tensors that lie in populated memory or on the device already."""
    from sllm_mini.checkpoint.safetensors_file import read_header
    from sllm_mini.device.cpu import HostMemory

    tensors: list[torch.Tensor] = []
    for path in job.files:
        memory = HostMemory(path.stat().st_size, populate=True)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < memory.nbytes and (count := file.readinto(memory.view[done:])):
                done += count
        whole = memory.tensor().to(job.device)
        # As 8-byte words where they start on one, as the loaders' tensors do.
        tensors += [whole[entry.offset : entry.offset + entry.nbytes] for entry in read_header(path)]
        memory.close()
        del whole, memory
    _wait(job.device)
    start = time.perf_counter()
    total, nbytes = sum_tensors(tensors)
    seconds = time.perf_counter() - start
    tensors.clear()
    _free(job.device)
    return {"seconds": seconds, "sum": total, "nbytes": nbytes}


def _resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def _free(device: str) -> None:
    """Gives memory back to the system, not only to the allocators: the next load must find a machine that is fresh."""
    gc.collect()
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
