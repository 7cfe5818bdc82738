"""The probes of this machine's limits: honest about what they measured, bounded, and never a cause of trouble."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.device.cpu import CpuDevice, HostMemory
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import LoadError, OutOfMemoryError
from sllm_mini.loading import probe, probe_disk, probe_kernel, probe_memory
from sllm_mini.loading.probe_samples import Deadline, Measurement, Samples, run_threads, sample_in_rounds

MIB = 1 << 20


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- samples ---


def test_a_measurement_keeps_every_sample_and_rates_the_median() -> None:
    measured = Measurement("read", "1 thread", 600, (3.0, 1.0, 2.0))
    assert (measured.seconds_median, measured.seconds_min, measured.seconds_max) == (2.0, 1.0, 3.0)
    assert measured.bytes_per_second == 300.0
    with pytest.raises(ValueError, match="at least one sample"):
        Measurement("read", "1 thread", 600, ())


def test_settings_take_turns() -> None:
    turns: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        return lambda: turns.append(name) or 1.0  # type: ignore[func-returns-value]

    found = sample_in_rounds("copy", 8, {"a": sampler("a"), "b": sampler("b")}, rounds=3, deadline=Deadline(60))
    assert turns == ["a", "b"] * 3
    assert [m.samples_seconds for m in found.measurements] == [(1.0, 1.0, 1.0)] * 2 and found.skipped == ()


def test_a_passed_deadline_ends_the_rounds_and_says_what_is_missing() -> None:
    clock = Clock()

    def slow() -> float:
        clock.now += 7
        return 7.0

    found = sample_in_rounds(
        "read", 8, {"first": slow, "second": slow, "third": slow}, rounds=5, deadline=Deadline(10, clock)
    )
    assert [(m.setting, len(m.samples_seconds)) for m in found.measurements] == [("first", 1), ("second", 1)]
    assert [s.name for s in found.skipped] == ["read, third"] and "time" in found.skipped[0].reason
    late = Deadline(1, clock)
    clock.now += 2
    assert len(sample_in_rounds("read", 8, {"only": slow}, rounds=5, deadline=late).measurements) == 1


def test_a_setting_that_is_refused_does_not_stop_the_others() -> None:
    def refuse() -> float:
        raise OSError(errno.EPERM, "Operation not permitted", "/some/temporary/file")

    def no_memory() -> float:
        raise OutOfMemoryError("the host has 3 bytes free")

    found = sample_in_rounds(
        "read", 8, {"a": refuse, "b": lambda: 1.0, "c": no_memory}, rounds=2, deadline=Deadline(60)
    )
    assert [m.setting for m in found.measurements] == ["b"]
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("read, a", "Operation not permitted"),
        ("read, c", "the host has 3 bytes free"),
    ]


def test_a_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Deadline(0)


# --- threads ---


def test_threads_share_the_work_and_are_gone_afterwards() -> None:
    before = threading.active_count()
    seen: list[int] = []
    assert run_threads(4, lambda worker, stop: seen.append(worker)) > 0
    assert sorted(seen) == [0, 1, 2, 3] and threading.active_count() == before


def test_the_first_error_of_a_thread_stops_the_others_and_is_raised() -> None:
    def work(worker: int, stop: threading.Event) -> None:
        if worker == 0:
            raise OSError(errno.EIO, "Input/output error")
        told.append(stop.wait(10))

    told: list[bool] = []
    with pytest.raises(OSError, match="Input/output error"):
        run_threads(3, work)
    assert all(told)  # a thread that had not begun yet need not run at all


def test_a_ctrl_c_stops_every_thread() -> None:
    before = threading.active_count()
    main_thread = threading.get_ident()

    def work(worker: int, stop: threading.Event) -> None:
        if worker == 0:
            signal.pthread_kill(main_thread, signal.SIGINT)  # as a terminal does
        told.append(stop.wait(10))

    told: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        run_threads(2, work)
    assert told and all(told)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # its work is over; the thread itself may take a moment to go
    assert threading.active_count() == before


# --- the disk ---


def test_the_disk_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    before = open_files()
    found = probe.measure_disk(tmp_path, file_nbytes=64 * MIB, budget_seconds=2, rounds=2)
    assert open_files() == before and list(tmp_path.iterdir()) == []
    names = {m.name for m in found.measurements}
    assert {"disk_write", "disk_buffered_read", "cached_read", "cached_map"} <= names
    assert "disk_direct_read" in names or any(s.name == "disk_direct_read" for s in found.skipped)
    assert all(0 < m.nbytes <= 64 * MIB for m in found.measurements)
    written = next(m for m in found.measurements if m.name == "disk_write")
    assert written.nbytes % (16 * MIB) == 0 and len(written.samples_seconds) == 1


def test_the_sweep_reads_one_amount_at_every_depth(tmp_path: Path) -> None:
    if not probe.measure_direct_io(tmp_path).works:
        pytest.skip("this file system refuses direct reads")
    found = probe.measure_disk(tmp_path, file_nbytes=64 * MIB, budget_seconds=60, rounds=1)
    swept = [m for m in found.measurements if m.name == "disk_direct_read"]
    assert len(swept) == len(probe_disk.SWEEP) and {m.nbytes for m in swept} == {64 * MIB}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [5 * MIB, 5 * MIB + 123])
def test_a_probe_reads_every_byte_once(
    tmp_path: Path, threads: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(nbytes))
    real, read, lock = os.preadv, [], threading.Lock()

    def recorded(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = real(fd, buffers, offset)
        with lock:
            read.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", recorded)
    with open(tmp_path / "file", "rb") as file:
        assert probe_disk.seconds_to_read(file.fileno(), nbytes, MIB, threads) > 0
    reached = 0
    for offset, got in sorted(read):
        assert offset == reached
        reached += got
    assert reached == nbytes


def test_a_file_that_shrinks_under_a_read_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    with open(tmp_path / "file", "rb") as file, pytest.raises(LoadError, match="ends here") as caught:
        probe_disk.seconds_to_read(file.fileno(), 4096, 4096, 1)
    assert caught.value.offset == 100


def test_a_file_system_without_direct_reads_is_measured_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert probe.measure_direct_io(tmp_path) == probe.DirectIo(
        False, 0, *probe_sizes(tmp_path), "the file system refuses O_DIRECT (Invalid argument)"
    )
    found = probe.measure_disk(tmp_path, file_nbytes=32 * MIB, budget_seconds=1, rounds=1)
    assert [s.name for s in found.skipped] == ["disk_direct_read"] and "O_DIRECT" in found.skipped[0].reason
    assert {"disk_write", "disk_buffered_read", "cached_read"} <= {m.name for m in found.measurements}


def probe_sizes(directory: Path) -> tuple[int, int]:
    (directory / "sizes").write_bytes(b"")
    try:
        return probe_kernel._statx_alignments(str(directory / "sizes"))
    finally:
        (directory / "sizes").unlink()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda offset, length, address: offset % 4096,
        lambda offset, length, address: length % 4096,
        lambda offset, length, address: address % 4096,
    ],
)
def test_the_block_size_is_found_by_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int, int, int], int]
) -> None:
    if not probe.measure_direct_io(tmp_path).works:
        pytest.skip("this file system refuses direct reads")
    real = os.preadv

    def only_pages(fd: int, buffers: list[memoryview], offset: int) -> int:
        if wrong(offset, len(buffers[0]), address(buffers[0])):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", only_pages)
    assert probe.measure_direct_io(tmp_path).block_nbytes == 4096

    def never(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", never)
    refused = probe.measure_direct_io(tmp_path)
    assert not refused.works and refused.block_nbytes == 0 and "Invalid argument" in refused.reason


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_what_statx_says_and_what_works_agree(tmp_path: Path) -> None:
    found = probe.measure_direct_io(tmp_path)
    if not (found.works and found.offset_alignment_nbytes):
        pytest.skip("this kernel or file system does not tell its alignments")
    assert found.block_nbytes == max(found.offset_alignment_nbytes, found.memory_alignment_nbytes, 512)


def test_a_full_disk_is_a_reason_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    monkeypatch.setattr(os, "pwrite", full)
    found = probe.measure_disk(tmp_path, file_nbytes=32 * MIB, budget_seconds=1)
    assert found.measurements == () and "No space left on device" in found.skipped[0].reason
    assert open_files() == before and list(tmp_path.iterdir()) == []


def test_a_ctrl_c_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int, data: Any, offset: int) -> int:
        raise KeyboardInterrupt

    before = open_files()
    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe.measure_disk(tmp_path, file_nbytes=32 * MIB, budget_seconds=1)
    assert open_files() == before and list(tmp_path.iterdir()) == []


def test_the_file_of_a_probe_is_already_unlinked_while_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.pwrite, []

    def look(fd: int, data: Any, offset: int) -> int:
        seen.append(list(tmp_path.iterdir()))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", look)
    probe.measure_disk(tmp_path, file_nbytes=16 * MIB, budget_seconds=1, rounds=1)
    assert seen and all(entries == [] for entries in seen)


def test_a_file_system_that_keeps_open_files_linked_is_cleaned_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.unlink, []

    def busy_once(path: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy_once)
        with probe_disk._probe_file(tmp_path, probe.DirectIo(False, 0, 0, 0, "")):
            assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_hold_a_file_is_an_error() -> None:
    with pytest.raises(OSError):
        probe.measure_disk("/proc", file_nbytes=16 * MIB)
    with pytest.raises(ValueError, match="too small"):
        probe.measure_disk("/tmp", file_nbytes=5)


# --- the kernel ---


class RefusingKernel:
    """A C library whose every call comes back with one error, as under a strict sandbox."""

    def __init__(self, code: int) -> None:
        self._code = code

    def _refuse(self, *_: Any) -> int:
        ctypes.set_errno(self._code)
        return -1

    syscall = mincore = madvise = statx = _refuse


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_that_refuses_everything_only_gives_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(probe_kernel, "_libc", RefusingKernel(code))
    assert [(a.works, a.reason) for a in probe.measure_abilities()] == [(False, os.strerror(code))] * 4
    found = probe.measure_direct_io(tmp_path)
    assert (found.memory_alignment_nbytes, found.offset_alignment_nbytes) == (0, 0)


def test_the_abilities_of_this_kernel_can_be_asked_for() -> None:
    before = open_files()
    found = {a.name: a for a in probe.measure_abilities()}
    assert set(found) == {"cachestat", "mincore", "populate_write", "io_uring"}
    assert all(a.works or a.reason for a in found.values())
    assert open_files() == before


def test_the_file_system_of_a_directory() -> None:
    assert probe.file_system_of("/proc") == "proc"
    assert probe.file_system_of("/proc/self") == "proc"
    assert probe.file_system_of("/") != "proc"


def test_the_innermost_and_latest_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/root rw",
        "2 1 8:2 / /mnt rw shared:1 - xfs /dev/b rw",
        "3 1 8:3 / /mnt rw - btrfs /dev/c rw",
        "4 1 8:4 / /mnt/a\\040b rw - tmpfs none rw",
        "broken",
    ]
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "\n".join(lines))
    assert probe.file_system_of("/nowhere") == "ext4"
    assert probe.file_system_of("/mnt/x") == "btrfs"
    assert probe.file_system_of("/mntx") == "ext4"
    assert probe.file_system_of("/mnt/a b/c") == "tmpfs"


def test_the_huge_page_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "always [madvise] never\n")
    assert probe.huge_page_mode() == "madvise"

    def missing(self: Path, **_: Any) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    assert probe.huge_page_mode() == "unknown" and probe.file_system_of("/") == "unknown"


# --- memory and devices ---


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_memory_copy_copies_every_byte(threads: int) -> None:
    nbytes = 3 * MIB + 4096
    source, target = HostMemory(nbytes), HostMemory(nbytes)
    source.view[:] = os.urandom(nbytes)
    probe_memory._copy(target, source, threads)
    assert target.view == source.view


def test_memory_is_measured_with_small_and_with_huge_pages() -> None:
    found = probe.measure_first_touch(nbytes=8 * MIB, rounds=2)
    assert [(m.setting, m.nbytes, len(m.samples_seconds)) for m in found.measurements] == [
        ("4 KiB pages", 8 * MIB, 2),
        ("huge pages", 8 * MIB, 2),
    ]
    copied = probe.measure_memory_copy(nbytes=MIB, rounds=2)
    assert copied.measurements[0].setting == "1 thread" and copied.skipped == ()


def test_a_machine_with_little_memory_is_measured_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_memory, "available_nbytes", lambda: 80 * 4096 + 5)
    assert probe.measure_memory_copy(nbytes=MIB, rounds=1).measurements[0].nbytes == 10 * 4096


class StandInGpu(CpuDevice):
    """The processor's memory under a GPU's name: same calls, no GPU."""

    name = "cuda:0"
    is_host = False


def test_copies_to_a_device_are_measured_from_pinned_and_pageable_memory() -> None:
    found = probe.measure_device_copy(StandInGpu(), nbytes=2 * MIB, rounds=2)
    assert [(m.name, m.setting) for m in found.measurements] == [
        ("pinned_allocation", "first, then again"),
        ("host_to_device_copy", "pageable memory"),
        ("host_to_device_copy", "pinned memory"),
    ]
    assert found.skipped == ()


def test_copies_are_waited_for_and_all_memory_of_a_gpu_is_given_back() -> None:
    runtime = RecordingRuntime()
    found = probe.measure_device_copy(runtime.device(), nbytes=MIB, rounds=3)
    assert found.skipped == () and [len(m.samples_seconds) for m in found.measurements] == [2, 3, 3]
    calls = runtime.names()
    assert calls.count("memcpyAsync") == 2 + 2 * 3  # each source once to warm up, then three rounds
    copies = [name for name in calls if name in ("memcpyAsync", "eventSynchronize")]
    assert copies == ["memcpyAsync", "eventSynchronize"] * 8, "a copy was not waited for, so its time is not its time"
    for taken, given in (("malloc", "free"), ("hostAlloc", "freeHost"), ("streamCreateWithFlags", "streamDestroy")):
        assert calls.count(taken) == calls.count(given) > 0


def test_a_device_that_has_no_memory_is_a_reason() -> None:
    class Full(StandInGpu):
        def allocate(self, nbytes: int) -> HostMemory:
            raise OutOfMemoryError("cuda:0 has 0 bytes free")

    class CannotPin(StandInGpu):
        def allocate_host(self, nbytes: int) -> HostMemory:
            raise OutOfMemoryError("nothing can be pinned")

    full = probe.measure_device_copy(Full(), nbytes=MIB)
    assert full.measurements == () and full.skipped[0].reason == "cuda:0 has 0 bytes free"
    unpinned = probe.measure_device_copy(CannotPin(), nbytes=MIB, rounds=1)
    assert [m.setting for m in unpinned.measurements] == ["pageable memory"]
    assert unpinned.skipped[0].reason == "nothing can be pinned"


@pytest.mark.gpu
def test_a_gpu_takes_pinned_memory_at_least_as_fast() -> None:
    from sllm_mini.device import get_device

    found = probe.measure_device_copy(get_device("cuda"), nbytes=256 * MIB)
    rates = {m.setting: m.bytes_per_second for m in found.measurements if m.name == "host_to_device_copy"}
    assert found.skipped == () and rates["pinned memory"] > 0.9 * rates["pageable memory"]


# --- the whole ---


def test_the_limits_are_the_best_of_each_measurement() -> None:
    slow, fast = Measurement("read", "1 thread", 100, (2.0,)), Measurement("read", "2 threads", 100, (1.0, 9.0, 1.0))
    limits = probe.Limits((slow, fast, Measurement("copy", "", 10, (1.0,))), ())
    assert limits.best("read") is fast and limits.best("nothing") is None
    assert limits.bytes_per_second() == {"read": 100.0, "copy": 10.0}


@pytest.mark.parametrize("device", [None, CpuDevice(), StandInGpu()])
def test_stages_are_told_and_a_gpu_adds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: CpuDevice | None
) -> None:
    for name in ("measure_disk", "measure_memory_copy", "measure_first_touch", "measure_device_copy"):
        monkeypatch.setattr(probe, name, lambda *_, **__: Samples())
    stages: list[str] = []
    assert probe.measure_limits(tmp_path, device=device, on_stage=stages.append) == probe.Limits((), ())
    assert len(stages) == (4 if isinstance(device, StandInGpu) else 3)


def test_the_facts_of_this_machine(tmp_path: Path) -> None:
    machine = probe.measure_machine(tmp_path)
    assert machine.cpu_count >= 1 and machine.memory_nbytes > 0 and machine.directory == os.path.realpath(tmp_path)
    assert machine.packages["torch"] and set(machine.packages) == set(probe.PACKAGES)
    assert machine.directory_is_in_memory == (machine.file_system in probe.IN_MEMORY_FILE_SYSTEMS)
    assert list(tmp_path.iterdir()) == []


def test_probing_needs_no_torch() -> None:
    code = "import sys, sllm_mini.loading.probe as p; p.measure_machine('/tmp'); sys.exit('torch' in sys.modules or 'cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
