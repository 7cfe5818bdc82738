"""What loaders are held against, measured in the same rounds: disk, memory, the mapped file, the GPU's link.

The disk's limit is the best of a sweep of direct reads over a file that our own loader reads, by this package's probe
and, where it is installed, by fio. fio's buffers are 4 KiB pages unless told otherwise, which halves what this kind of
disk gives; with glibc's `hugetlb` tunable its malloc asks for huge pages. Shown in chapter 02.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.device import get_device
from sllm_mini.errors import SllmError
from sllm_mini.lab.bench.conditions import make_cold
from sllm_mini.loading.probe_disk import MIB, SWEEP, seconds_to_read
from sllm_mini.loading.probe_memory import measure_device_copy, measure_memory_copy
from sllm_mini.loading.probe_samples import Measurement, Samples, Skipped, reason_of

MAX_NBYTES = 2 << 30
_COPY_NBYTES = 256 << 20
_FIO_SECONDS = 120
_FIO = (
    ("libaio", 4 * MIB, 16, 1),
    ("libaio", 16 * MIB, 4, 1),
    ("io_uring", 4 * MIB, 16, 1),
    ("psync", 16 * MIB, 1, 4),
)
"""(engine, block bytes, depth, threads)"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of one limit: `name` is a key, `setting` says how, in words."""

    name: str
    setting: str
    nbytes: int
    seconds: float


def disk_samples(path: Path) -> Iterator[Sample | Skipped]:
    """One sample of every setting of both sweeps over one file, read cold and directly. What is refused is skipped."""
    nbytes = min(path.stat().st_size // MIB * MIB, MAX_NBYTES)
    if nbytes == 0:
        yield Skipped("disk_direct_read", "the file is smaller than 1 MiB, too small to measure a disk with")
        return
    make_cold([path])
    yield from _own_sweep(path, nbytes)
    yield from _fio_sweep(path, nbytes)


def _own_sweep(path: Path, nbytes: int) -> Iterator[Sample | Skipped]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        yield Skipped("disk_direct_read", f"direct reads are refused here: {reason_of(error)}")
        return
    try:
        for chunk, threads in SWEEP:
            setting = f"{chunk // MIB} MiB × {threads} thread{'s' * (threads > 1)}"
            try:
                yield Sample("disk_direct_read", setting, nbytes, max(seconds_to_read(fd, nbytes, chunk, threads), 1e-9))
            except (OSError, SllmError) as error:
                yield Skipped(f"disk_direct_read, {setting}", reason_of(error))
    finally:
        os.close(fd)


def _fio_sweep(path: Path, nbytes: int) -> Iterator[Sample | Skipped]:
    if shutil.which("fio") is None:
        yield Skipped("disk_direct_read, fio", "fio is not installed, so the sweep is this package's own alone")
        return
    for engine, block, depth, threads in _FIO:
        if nbytes < block * threads:
            continue
        setting = f"fio {engine}, {block // MIB} MiB × {depth * threads}"
        try:
            yield _fio(path, nbytes, engine, block, depth, threads, setting)
        except (OSError, ValueError, KeyError, IndexError, subprocess.SubprocessError) as error:
            yield Skipped(f"disk_direct_read, {setting}", f"fio failed: {reason_of(error)}")


def _fio(path: Path, nbytes: int, engine: str, block: int, depth: int, threads: int, setting: str) -> Sample:
    share = nbytes // threads // MIB * MIB
    command = [
        "fio", "--name=limit", f"--filename={path}", "--readonly", "--rw=read", "--direct=1", "--invalidate=0", "--iomem=malloc", "--thread",
        f"--ioengine={engine}", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={threads}", f"--size={share}", f"--offset_increment={share}",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    huge = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    ran = subprocess.run(command, env=huge, capture_output=True, text=True, timeout=_FIO_SECONDS, check=True, cwd="/")
    read = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]["read"]
    if not read["io_bytes"] or not read["runtime"]:
        raise ValueError("it read nothing")
    return Sample("disk_direct_read", setting, read["io_bytes"], read["io_bytes"] / read["bw_bytes"])


def memory_samples() -> Iterator[Sample | Skipped]:
    """One sample of each setting of a copy within memory."""
    yield from _once(measure_memory_copy(nbytes=_COPY_NBYTES, rounds=1))


def device_samples(device: str) -> list[list[object]]:
    """One sample of each setting of copies to a GPU, as plain lists; runs in a worker, which has the CUDA context."""
    found = measure_device_copy(get_device(device), nbytes=_COPY_NBYTES, rounds=2)
    measured: list[list[object]] = [[m.name, m.setting, m.nbytes, m.seconds_min] for m in found.measurements]
    return measured + [[skipped.name, skipped.reason] for skipped in found.skipped]


def from_lists(found: Sequence[Sequence[object]]) -> Iterator[Sample | Skipped]:
    """What a worker answered for `device_samples`, as samples again."""
    for row in found:
        yield Sample(str(row[0]), str(row[1]), int(str(row[2])), float(str(row[3]))) if len(row) == 4 else Skipped(str(row[0]), str(row[1]))


def _once(samples: Samples) -> Iterator[Sample | Skipped]:
    for m in samples.measurements:
        yield Sample(m.name, m.setting, m.nbytes, m.seconds_median)
    yield from samples.skipped


def collect(samples: Sequence[Sample]) -> list[Measurement]:
    """Samples of all rounds, one `Measurement` per setting. A setting that read less is kept apart by its bytes."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for sample in samples:
        found.setdefault((sample.name, sample.setting, sample.nbytes), []).append(sample.seconds)
    return [Measurement(name, setting, nbytes, tuple(seconds)) for (name, setting, nbytes), seconds in found.items()]
