"""How fast this machine copies memory, how long first use of fresh memory takes, and how fast its GPU is filled.

First touch is half of the story of loading to a CPU: every fresh 4 KiB page costs a fault and a cleared page, a huge
page 512 times fewer faults. Samples are kept apart because the first one often tells more: a virtual machine's host
may have to find the memory first. Costs at most `nbytes` twice in memory, given back on return. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from threading import Event

import numpy as np

from sllm_mini.device.base import Device, HostBuffer
from sllm_mini.device.cpu import HostMemory, available_nbytes, cpu_count
from sllm_mini.errors import SllmError
from sllm_mini.loading.probe_samples import Deadline, Samples, Skipped, reason_of, run_threads, sample_in_rounds

_PAGE_NBYTES = 4096
_MEMORY_SHARE = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def measure_memory_copy(*, nbytes: int = 256 << 20, budget_seconds: float = 2.0, rounds: int = 5) -> Samples:
    """ "memory_copy": bytes copied per second between two populated huge-page buffers, by one thread and by one per
    processor. (The bus moves at least twice as much: each byte is read and written.)"""
    nbytes = _that_fits(nbytes)
    try:
        source, target = HostMemory(nbytes, populate=True), HostMemory(nbytes, populate=True)
    except SllmError as error:
        return Samples(skipped=(Skipped("memory_copy", reason_of(error)),))
    settings: dict[str, Callable[[], float]] = {"1 thread": partial(_copy, target, source, 1)}
    if (threads := cpu_count()) > 1:
        settings[f"{threads} threads"] = partial(_copy, target, source, threads)
    return sample_in_rounds("memory_copy", nbytes, settings, rounds=rounds, deadline=Deadline(budget_seconds))


def _copy(target: HostMemory, source: HostMemory, threads: int) -> float:
    share = -(-target.nbytes // threads)

    def work(worker: int, stop: Event) -> None:
        start = worker * share
        # A ctypes call gives up the GIL, so the threads copy at the same time.
        _libc.memcpy(target.address + start, source.address + start, max(0, min(share, target.nbytes - start)))

    return run_threads(threads, work)


def measure_first_touch(*, nbytes: int = 512 << 20, budget_seconds: float = 4.0, rounds: int = 3) -> Samples:
    """ "first_touch": writing one byte in each 4 KiB of memory that was just mapped, with 4 KiB pages and huge ones."""
    nbytes = _that_fits(nbytes)
    settings = {"4 KiB pages": partial(_touch, nbytes, False), "huge pages": partial(_touch, nbytes, True)}
    return sample_in_rounds("first_touch", nbytes, settings, rounds=rounds, deadline=Deadline(budget_seconds))


def _touch(nbytes: int, huge_pages: bool) -> float:
    memory = HostMemory(nbytes, huge_pages=huge_pages)
    pages = np.frombuffer(memory.view, dtype=np.uint8)[::_PAGE_NBYTES]
    start = time.perf_counter()
    pages[:] = 1
    return time.perf_counter() - start


def measure_device_copy(
    device: Device, *, nbytes: int = 256 << 20, budget_seconds: float = 4.0, rounds: int = 5
) -> Samples:
    """ "host_to_device_copy" from pinned and from pageable memory, and "pinned_allocation", what pinning costs.

    `device` is a GPU (or a stand-in for one). What the device refuses is in `skipped` with its own words.
    """
    deadline = Deadline(budget_seconds)
    nbytes = min(_that_fits(nbytes), max(device.free_nbytes() // 2, _PAGE_NBYTES) // _PAGE_NBYTES * _PAGE_NBYTES)
    try:
        target, stream = device.allocate(nbytes), device.stream()
    except SllmError as error:
        return Samples(skipped=(Skipped("host_to_device_copy", reason_of(error)),))
    pinned: list[HostBuffer] = []

    def pin() -> float:
        start = time.perf_counter()
        pinned.append(device.allocate_host(nbytes))
        return time.perf_counter() - start

    def copy(source: HostBuffer) -> float:
        start = time.perf_counter()
        stream.copy_from_host(target, 0, source, 0, nbytes)
        stream.record().wait()
        return time.perf_counter() - start

    try:
        samples = sample_in_rounds(
            "pinned_allocation", nbytes, {"first, then again": pin}, rounds=min(rounds, 2), deadline=deadline
        )
        try:
            sources = {"pageable memory": HostMemory(nbytes, populate=True)} | (
                {"pinned memory": pinned[0]} if pinned else {}
            )
            for source in sources.values():  # the first use of a source and of a stream has costs of its own
                copy(source)
        except SllmError as error:
            return samples + Samples(skipped=(Skipped("host_to_device_copy", reason_of(error)),))
        settings = {name: partial(copy, source) for name, source in sources.items()}
        return samples + sample_in_rounds("host_to_device_copy", nbytes, settings, rounds=rounds, deadline=deadline)
    finally:
        stream.close()
        target.close()
        for buffer in pinned:
            buffer.close()


def _that_fits(nbytes: int) -> int:
    """`nbytes`, or less on a machine with little memory to spare; whole pages, at least one."""
    available = available_nbytes()
    allowed = min(nbytes, available // _MEMORY_SHARE) if available else nbytes
    return max(allowed // _PAGE_NBYTES, 1) * _PAGE_NBYTES
