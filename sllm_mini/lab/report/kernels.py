"""The kernels of `csrc/` on this GPU: are they right, and what fraction of its memory's speed do they reach.

Each is checked against its host reference on fresh random input of awkward lengths, then timed with CUDA events over
a large range: the sums over bytes, attention over keys and values. The roof is a copy within the GPU's memory, timed in the same rounds and counted as two bytes moved per
byte copied, because a driver's nominal clock is often not told. Takes seconds and a third of the free memory at most.
`python -m sllm_mini.lab.report.kernels [--check]` prints the bench document; with `--check` it only checks, on little
memory, as `compute-sanitizer` wants it. Taught in chapter 02.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median
from typing import Any

from sllm_mini.device.base import Buffer
from sllm_mini.device.cpu import HostMemory
from sllm_mini.device.cuda import CudaDevice, cuda_device
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.device.kernels import (
    BLOCK_NBYTES,
    LEAF_NBYTES,
    enqueue_leaf_digests,
    enqueue_sum64,
    host_leaf_digests,
    host_sum64,
    leaf_count,
    leaf_digests,
    sum64,
)
from sllm_mini.errors import DeviceError
from sllm_mini.lab.report.attention import check_attention, timed_attention

_CHECKED_NBYTES = (BLOCK_NBYTES, LEAF_NBYTES, 3 * LEAF_NBYTES + 5 * BLOCK_NBYTES, 100 * LEAF_NBYTES)
_LARGEST_NBYTES = 8 << 30
_ROUNDS = 7


def check_kernels(device: CudaDevice) -> list[str]:
    """What was checked, in words. Raises DeviceError naming the kernel whose result is not its reference's."""
    random = secrets.token_bytes(max(_CHECKED_NBYTES) + 16)
    with closing(device.stream()) as stream, closing(device.allocate(len(random))) as buffer, closing(device.allocate_host(len(random))) as host:
        host.view[:] = random
        stream.copy_from_host(buffer, 0, host, 0, len(random))
        stream.synchronize()
        for nbytes in _CHECKED_NBYTES:
            for offset, length in ((0, nbytes), (16, nbytes), (0, nbytes - 1), (16, nbytes - 9)):
                if sum64(device, buffer, offset, length, stream) != host_sum64(random[offset : offset + length]):
                    raise DeviceError(f"sum64 of {length:,} bytes from byte {offset} is not its reference's; do not trust this GPU's sums")
            if not (leaf_digests(device, buffer, 16, nbytes, stream) == host_leaf_digests(random[16 : 16 + nbytes])).all():
                raise DeviceError(f"xxh3_leaves of {nbytes:,} bytes is not its reference's; do not trust this GPU's hashes")
    sums = f"sum64 and xxh3_leaves equal their host references on {len(_CHECKED_NBYTES)} lengths from {min(_CHECKED_NBYTES):,} bytes on"
    return [sums, check_attention(device, _place(device))]


def measure_kernels(device: CudaDevice, *, nbytes: int | None = None, rounds: int = _ROUNDS) -> dict[str, Any]:
    """The bench document: each kernel's seconds, and its bytes per second as a ratio to the memory's."""
    if nbytes is None:
        nbytes = min(_LARGEST_NBYTES, device.free_nbytes() // 3)
    nbytes = max(nbytes // LEAF_NBYTES, 1) * LEAF_NBYTES
    out_nbytes = 8 * leaf_count(nbytes)
    with closing(device.stream()) as stream, closing(device.allocate(nbytes)) as source, closing(device.allocate(nbytes)) as target, closing(device.allocate(out_nbytes)) as out:
        stream.fill(source, 0, nbytes, 0x5A)
        attention = timed_attention(device, _place(device), nbytes // 2)
        work: dict[str, Callable[[], None]] = {
            "copy within the GPU": lambda: stream.copy_on_device(target, 0, source, 0, nbytes),
            "sum64": lambda: enqueue_sum64(device, source, 0, nbytes, stream, out),
            "xxh3_leaves": lambda: enqueue_leaf_digests(device, source, 0, nbytes, stream, out),
            attention.name: attention.enqueue,
        }
        read = {"sum64": nbytes, "xxh3_leaves": nbytes, attention.name: attention.nbytes}
        for enqueue in work.values():  # compiles, and wakes the clocks
            _seconds(device, stream, enqueue)
        samples: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, enqueue in work.items():
                samples[name].append(_seconds(device, stream, enqueue))
        _check_last(out, out_nbytes, stream)
        attention.check()
    roof = 2 * nbytes / median(samples["copy within the GPU"])
    properties = device.properties()
    limits = {"device_memory_bytes_per_second": roof}
    if properties.memory_bytes_per_second:
        limits["device_memory_nominal_bytes_per_second"] = properties.memory_bytes_per_second
    return {
        "kind": "sllm-mini kernels", "method": {"device": device.name, "rounds": rounds},
        "machine": {"gpu": properties.model, "timer": "CUDA events" if _timed_by_gpu(device) else "host clock"},
        "limits": limits,
        "results": [
            {
                "name": name,
                "state": "in GPU memory",
                "nbytes": count,
                "samples": samples[name],
                "seconds_median": median(samples[name]),
                "seconds_min": min(samples[name]),
                "seconds_max": max(samples[name]),
                "bytes_per_second_median": count / median(samples[name]),
                "ratio_to_limit": count / median(samples[name]) / roof,
                "limit": "device_memory_bytes_per_second",
            }
            for name, count in read.items()
        ],
        "skipped": [],
    }


def _check_last(out: Buffer, nbytes: int, stream: CudaStream) -> None:
    """The last timed launch computed something: all leaves are alike, so all their digests are one that is known."""
    import numpy

    host = HostMemory(nbytes)
    stream.copy_to_host(host, 0, out, 0, nbytes)
    stream.synchronize()
    if not (numpy.frombuffer(host.view, dtype=numpy.uint64) == host_leaf_digests(b"\x5a" * LEAF_NBYTES)[0]).all():
        raise DeviceError("xxh3_leaves gave other digests in its timed size than its reference; do not trust this GPU's hashes")


def _place(device: CudaDevice) -> str:
    """Where torch's tensors of this GPU are: those of the fake lie in the host's memory."""
    return f"cuda:{device.index}" if _timed_by_gpu(device) else "cpu"


def _timed_by_gpu(device: CudaDevice) -> bool:
    import torch

    return torch.cuda.is_available() and hasattr(device.toolkit, "array")  # the fake's toolkit lends torch no arrays


def _seconds(device: CudaDevice, stream: CudaStream, enqueue: Callable[[], None]) -> float:
    import torch

    stream.synchronize()
    if not _timed_by_gpu(device):
        start = time.perf_counter()
        enqueue()
        stream.synchronize()
        return time.perf_counter() - start
    with stream.as_torch_stream():
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        enqueue()
        after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def main(argv: list[str] | None = None) -> int:
    """The command: 0, or 1 with one sentence where a kernel is wrong or the GPU refuses."""
    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.report.kernels", description="Check and time the kernels of csrc/.")
    parser.add_argument("--check", action="store_true", help="only check, on little memory")
    parser.add_argument("--nbytes", type=int, help="bytes to time over (default: a third of the free memory, 8 GiB at most)")
    options = parser.parse_args(argv)
    try:
        device = cuda_device(0)
        checked = check_kernels(device)
        document = {"checked": checked} if options.check else {"checked": checked, **measure_kernels(device, nbytes=options.nbytes)}
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
