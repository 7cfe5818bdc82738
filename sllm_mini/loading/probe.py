"""This machine and its limits: what every load here is set against.

`measure_machine` reads facts and costs milliseconds; `measure_limits` runs the probes of `probe_disk` and
`probe_memory` within a budget of seconds and gives back every byte it took. A loader can be no faster than the
limits found here, so chapters and benches report ratios to them. `sllm-mini doctor` prints both. Nothing here
imports torch. Call from one thread at a time: two probes at once measure each other. Taught in chapters 00 and 02.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sllm_mini.device.base import Device
from sllm_mini.device.cpu import available_nbytes, cpu_count
from sllm_mini.loading.probe_disk import measure_disk
from sllm_mini.loading.probe_kernel import (
    Ability,
    DirectIo,
    file_system_of,
    huge_page_mode,
    measure_abilities,
    measure_direct_io,
)
from sllm_mini.loading.probe_memory import measure_device_copy, measure_first_touch, measure_memory_copy
from sllm_mini.loading.probe_samples import Measurement, Samples, Skipped

__all__ = [
    "Ability", "DirectIo", "Limits", "Machine", "Measurement", "Samples", "Skipped", "file_system_of", "huge_page_mode", "measure_abilities",
    "measure_device_copy", "measure_direct_io", "measure_disk", "measure_first_touch", "measure_limits", "measure_machine", "measure_memory_copy",
    "processor_model",
]  # fmt: skip

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "cupy")
IN_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about this machine, as seen from one directory. `packages` maps a package to its version, None if absent."""

    kernel: str
    architecture: str
    processor: str
    cpu_count: int
    memory_nbytes: int
    memory_available_nbytes: int
    python: str
    packages: dict[str, str | None]
    directory: str
    file_system: str
    free_nbytes: int
    page_nbytes: int
    huge_page_mode: str
    direct_io: DirectIo
    abilities: tuple[Ability, ...]

    @property
    def directory_is_in_memory(self) -> bool:
        """True where "disk" figures would be figures of memory."""
        return self.file_system in IN_MEMORY_FILE_SYSTEMS


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured, setting by setting, and what was left out and why."""

    measurements: tuple[Measurement, ...]
    skipped: tuple[Skipped, ...]

    def best(self, name: str) -> Measurement | None:
        """The fastest setting of the measurement called `name`, by median; None if it could not be measured."""
        found = [m for m in self.measurements if m.name == name]
        return max(found, key=lambda m: m.bytes_per_second, default=None)

    def bytes_per_second(self) -> dict[str, float]:
        """The best rate of each measurement by name: the limits that ratios are taken against."""
        names = dict.fromkeys(m.name for m in self.measurements)
        return {name: best.bytes_per_second for name in names if (best := self.best(name)) is not None}


def measure_machine(directory: str | os.PathLike[str]) -> Machine:
    """Reads the facts. Raises OSError if `directory` is not a directory that a file can be made in."""
    space = os.statvfs(directory)
    return Machine(
        kernel=platform.release(),
        architecture=platform.machine(),
        processor=processor_model(),
        cpu_count=cpu_count(),
        memory_nbytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_available_nbytes=available_nbytes(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        directory=os.path.realpath(directory),
        file_system=file_system_of(directory),
        free_nbytes=space.f_bavail * space.f_frsize,
        page_nbytes=os.sysconf("SC_PAGE_SIZE"),
        huge_page_mode=huge_page_mode(),
        direct_io=measure_direct_io(directory),
        abilities=measure_abilities(),
    )


def measure_limits(
    directory: str | os.PathLike[str],
    *,
    device: Device | None = None,
    quick: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Limits:
    """Measures disk, memory and, if `device` is a GPU, the way to it: up to 20 s and 1 GiB of disk,
    `quick` up to 7 s and 128 MiB.

    `on_stage` is told what is being measured, in words. Raises OSError if no file can be made in `directory`;
    whatever else a kernel or a disk refuses is in `skipped`. Nothing is left behind, also after a Ctrl-C.
    """
    size = 1 / 8 if quick else 1.0
    time = 1 / 3 if quick else 1.0

    def nbytes(full: int) -> int:
        return int(full * size)

    stages: list[tuple[str, Callable[[], Samples]]] = [
        (
            "the disk and the page cache",
            lambda: measure_disk(directory, file_nbytes=nbytes(1 << 30), budget_seconds=12 * time),
        ),
        ("copies within memory", lambda: measure_memory_copy(nbytes=nbytes(256 << 20), budget_seconds=2 * time)),
        ("first use of fresh memory", lambda: measure_first_touch(nbytes=nbytes(512 << 20), budget_seconds=4 * time)),
    ]
    if device is not None and not device.is_host:
        words = f"copies to {device.name}"
        stages.append((words, lambda: measure_device_copy(device, nbytes=nbytes(256 << 20), budget_seconds=4 * time)))
    return Limits(*_flat(_run(stages, on_stage)))


def _run(
    stages: Iterable[tuple[str, Callable[[], Samples]]], on_stage: Callable[[str], None] | None
) -> Iterable[Samples]:
    for words, stage in stages:
        if on_stage is not None:
            on_stage(words)
        yield stage()


def _flat(parts: Iterable[Samples]) -> tuple[tuple[Measurement, ...], tuple[Skipped, ...]]:
    total = sum(parts, start=Samples())
    return total.measurements, total.skipped


def processor_model() -> str:
    """The processor as its maker names it, or the architecture where the system names none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def _version(package: str) -> str | None:
    names = [package] if package != "cupy" else ["cupy-cuda13x", "cupy-cuda12x", "cupy"]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
