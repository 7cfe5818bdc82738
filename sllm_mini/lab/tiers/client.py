"""What another process does with a model that the store holds, timed: attach it, touch it, build it, use every byte.

A bench's worker calls these by name (see `lab.bench.worker`); it has imported torch and this package before. Each call
attaches anew, says what each part took, and ends with the sum over every byte, so that nobody is believed who brought
none. Seconds of the clock, in this process. Shown in chapters 03 and 05.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.device.base import Device
from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.bench.entry import Job
from sllm_mini.lab.bench.ours import model_tensors
from sllm_mini.storage.attach import Attachment
from sllm_mini.storage.client import StoreClient
from sllm_mini.storage.mapping import MADV_POPULATE_READ
from sllm_mini.types import Tier

if TYPE_CHECKING:
    import torch

    from sllm_mini.lab.bench.entry import Load

_SMALL_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")

Sample = dict[str, Any]
"""Parts in seconds, by name, with the "sum" and the "nbytes" that it was taken over."""


def attach(address: str, name: str, device: str | Device = "cpu") -> Sample:
    """`attach`: until the tensors exist; `ready`: until it is known, too, that all their bytes are there; `use`: the sum."""
    with _attached(address, name, device) as (attachment, sample):
        return sample | _used(attachment.tensors.values())


def touch(address: str, name: str) -> Sample:
    """`touch`: one byte read of every small page, in order, by one thread, right after attaching: the page faults."""
    import numpy

    with _attached(address, name) as (attachment, sample):
        start, nbytes = _memory(attachment)
        pages = numpy.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(start))[::_SMALL_PAGE_NBYTES]
        began = time.perf_counter()
        pages.max()
        sample["touch"] = time.perf_counter() - began
        return sample | _used(attachment.tensors.values())


def populate(address: str, name: str) -> Sample:
    """`populate`: the kernel told to map every page at once (MADV_POPULATE_READ). Raises UnsupportedError before Linux
    5.14."""
    libc = ctypes.CDLL(None, use_errno=True)
    with _attached(address, name) as (attachment, sample):
        start, nbytes = _memory(attachment)
        began = time.perf_counter()
        failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), MADV_POPULATE_READ)
        sample["populate"] = time.perf_counter() - began
        if failed:
            raise UnsupportedError(f"this kernel does not populate on demand ({os.strerror(ctypes.get_errno())})")
        return sample | _used(attachment.tensors.values())


def build(address: str, name: str) -> Sample:
    """The whole way to a transformers model whose every byte was used: `attach`, `ready`, `skeleton` (the modules, on the
    meta device), `fill` (the tensors put into them), `use`."""
    from sllm_mini.loading.model import build_skeleton, fill

    with _attached(address, name) as (attachment, sample):
        tensors = attachment.wait()
        began = time.perf_counter()
        model = build_skeleton(attachment.checkpoint)
        built = time.perf_counter()
        fill(model, tensors, "cpu", attachment.checkpoint)
        sample |= {"skeleton": built - began, "fill": time.perf_counter() - built}
        sample |= _used(model_tensors(model))
        del model, tensors
        return sample


def remote(job: Job) -> Load:
    """A loader for a bench's worker: a remote checkpoint opened, loaded into this process's memory, and closed."""
    from sllm_mini.loading import load_tensors
    from sllm_mini.storage.remote import open_remote

    url, folder = str(job.arguments["url"]), Path(job.arguments["folder"])

    def load() -> Iterable[torch.Tensor]:
        with open_remote(url, folder) as checkpoint:
            return load_tensors(checkpoint, job.device).values()

    return load


@contextmanager
def _attached(address: str, name: str, device: str | Device = "cpu") -> Iterator[tuple[Attachment, Sample]]:
    """An attachment and its sample so far. Raises UnsupportedError if the store had no room and lent nothing."""
    client = StoreClient(address)
    gc.collect()
    start = time.perf_counter()
    attachment = client.attach(name, device)
    mapped = time.perf_counter()
    try:
        if attachment.tier not in (Tier.DRAM, Tier.DEVICE):
            raise UnsupportedError(f"the store lent nothing: {attachment.reason}")
        attachment.wait()
        yield attachment, {"attach": mapped - start, "ready": time.perf_counter() - start}
    finally:
        attachment.close()
        del attachment
        gc.collect()  # the lease ends with the last tensor


def _memory(attachment: Attachment) -> tuple[int, int]:
    """The address and the bytes of the image that all tensors are views of."""
    storage = next(iter(attachment.tensors.values())).untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _used(tensors: Iterable[torch.Tensor]) -> Sample:
    start = time.perf_counter()
    total, nbytes = sum_tensors(tensors)
    return {"use": time.perf_counter() - start, "sum": total, "nbytes": nbytes}
