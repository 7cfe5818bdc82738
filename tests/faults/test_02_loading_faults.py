"""Chapter 02: loading on a machine that fails. Read errors, damaged bytes, too little memory, files that change under
the reader, cancelled loads: one typed error that names file and byte, at once; no thread, descriptor or memory left."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint, save_checkpoint, verify_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.checkpoint.index import partition_file
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.device import cpu
from sllm_mini.device.cuda_stream import CudaEvent
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import (
    CheckpointError,
    DeviceError,
    FormatError,
    IntegrityError,
    LoadCancelled,
    LoadError,
    ModelError,
    OutOfMemoryError,
    SllmError,
)
from sllm_mini.loading import LoadOptions, load_model, load_tensors, start_load
from sllm_mini.loading.pipeline import Pipeline

from .test_01_writing_faults import plain_source
from .tools import large_tensors, nothing_left, put, refused

pytestmark = pytest.mark.timeout(120)

READ = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2, use_cached=False)
BUFFERED = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2, use_cached=False, direct=False)
COPIED = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2, map_cached=False)
MAPPED = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2)
MODES = pytest.mark.parametrize("options", [READ, BUFFERED, COPIED, MAPPED], ids=["direct", "buffered", "copied", "mapped"])


@pytest.fixture(scope="module")
def saved() -> dict[str, torch.Tensor]:
    return large_tensors()


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_checkpoint(saved, tmp_path_factory.mktemp("large") / "model", options=WriteOptions(partition_nbytes=6_000_000))


@pytest.fixture
def own(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy that a test may damage."""
    return open_checkpoint(shutil.copytree(checkpoint.path, tmp_path / "model"))


def chunks_of(checkpoint: Checkpoint) -> list[tuple[Path, int]]:
    """The file and offset of every chunk."""
    return [
        (checkpoint.path / entry.file, at)
        for entry in checkpoint.index.partitions
        for at in range(0, entry.file_nbytes, CHUNK_NBYTES)
    ]


def assert_equal(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


class Reads:
    """Stands in for os.preadv: `fault(call, fd, nbytes, offset)` may raise, or say how many bytes to read at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[int, int, int, int], int | None]) -> None:
        self.calls: list[tuple[str, int]] = []
        self._real, self._fault, self._lock = os.preadv, fault, threading.Lock()
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, views: list[memoryview], offset: int) -> int:
        with self._lock:
            number = len(self.calls)
            self.calls.append((os.readlink(f"/proc/self/fd/{fd}"), offset))
        limit = self._fault(number, fd, len(views[0]), offset)
        return 0 if limit == 0 else self._real(fd, [views[0][:limit]], offset)


# Errors of the disk


@pytest.mark.parametrize("options", [READ, BUFFERED], ids=["direct", "buffered"])
def test_a_read_error_at_any_chunk_ends_the_load_and_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, options: LoadOptions) -> None:
    chunks = chunks_of(checkpoint)
    assert len(chunks) > 8
    for position in range(len(chunks)):

        def fault(call: int, _fd: int, _nbytes: int, _offset: int, position: int = position) -> None:
            if call == position:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            reads = Reads(patch, fault)
            with refused(LoadError, checkpoint.path, "Input/output error", maps=True) as found:
                load_tensors(checkpoint, options=options)
        file, offset = reads.calls[position]
        assert file in str(found[0]) and found[0].offset == offset  # type: ignore[attr-defined]
        assert len(reads.calls) <= position + options.threads, "reading went on after the error"


def test_a_file_that_ends_early_at_any_chunk_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for position in range(len(chunks_of(checkpoint))):
        with monkeypatch.context() as patch:
            reads = Reads(patch, lambda call, *_, position=position: 0 if call == position else None)
            with refused(LoadError, checkpoint.path, "ends here") as found:
                load_tensors(checkpoint, options=READ)
        assert (found[0].path, found[0].offset) == reads.calls[position]  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
def test_short_reads_are_continued(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Also where a direct read stops in the middle of a block, after which no direct read can go on."""
    choose = random.Random(seed)
    Reads(monkeypatch, lambda _call, _fd, nbytes, _offset: choose.choice((None, 1, 100, 4096, 5000, nbytes // 2 + 1, nbytes - 1)) if nbytes > 1 else None)
    with nothing_left():
        assert_equal(load_tensors(checkpoint, options=READ), saved)


def test_an_interrupted_verification_of_short_reads_is_no_corruption(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    Reads(monkeypatch, lambda _call, _fd, nbytes, _offset: nbytes // 2 + 1)
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_verification_names_what_cannot_be_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fault(call: int, *_: int) -> None:
        if call == 2:
            raise OSError(code, os.strerror(code))

    reads = Reads(monkeypatch, fault)
    with refused(CheckpointError, checkpoint.path, os.strerror(code)) as found:
        verify_checkpoint(checkpoint, threads=1)
    assert (found[0].path, found[0].offset) == reads.calls[2]  # type: ignore[attr-defined]


@MODES
def test_a_flipped_bit_in_any_chunk_is_named(own: Checkpoint, options: LoadOptions) -> None:
    choose = random.Random(1)
    for file, at in chunks_of(own):
        end = min(at + CHUNK_NBYTES, file.stat().st_size)
        place = choose.randrange(at, end)
        with open(file, "r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ 1 << choose.randrange(8)]))
        with refused(IntegrityError, file, f"at byte {at:,}", maps=True):
            load_tensors(own, options=options)
        load_tensors(own, verify=False, options=options)
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(bytes([byte]))
    load_tensors(own, options=options)


# Direct reads that are refused


def test_a_file_system_without_direct_reads_is_read_through_the_cache(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with nothing_left():
        handle = start_load(checkpoint, options=READ)
        assert_equal(handle.wait(), saved)
        assert handle.report.fallback is not None and "refused" in handle.report.fallback
        assert (handle.report.direct_nbytes, handle.report.buffered_nbytes) == (0, checkpoint.nbytes)
        del handle


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("first", [0, 4])
def test_a_direct_read_that_is_refused_is_done_through_the_cache(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, code: int, first: int) -> None:
    def refuse(call: int, fd: int, _nbytes: int, _offset: int) -> None:
        if call >= first and is_direct(fd):
            raise OSError(code, os.strerror(code))

    Reads(monkeypatch, refuse)
    with nothing_left():
        handle = start_load(checkpoint, options=READ)
        assert_equal(handle.wait(), saved)
        assert handle.report.fallback is not None and "refused" in handle.report.fallback
        assert handle.report.buffered_nbytes > 0 and handle.report.nbytes == checkpoint.nbytes
        assert (handle.report.direct_nbytes > 0) == (first > 0)
        del handle


def test_another_error_of_a_direct_open_is_an_error(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT and str(path).endswith("data-00001.bin"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with refused(CheckpointError, checkpoint.path / "data-00001.bin", "Permission denied"):
        start_load(checkpoint, options=READ)


# Files that change under the reader


@MODES
def test_a_checkpoint_that_is_replaced_during_a_load_is_read_to_its_end(own: Checkpoint, saved: dict[str, torch.Tensor], options: LoadOptions) -> None:
    handle = start_load(own, options=options)
    save_checkpoint(large_tensors(seed=9), own.path, options=WriteOptions(partition_nbytes=6_000_000, overwrite=True))
    assert_equal(handle.wait(), saved)


def test_a_partition_that_is_replaced_by_rename_during_a_load_is_read_to_its_end(own: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(call: int, *_: int) -> None:
        if call == 1:
            (own.path / "other").write_bytes(bytes(100))
            for number in range(len(own.index.partitions)):
                shutil.copy(own.path / "other", own.path / "copy")
                (own.path / "copy").rename(own.path / partition_file(number))

    Reads(monkeypatch, swap)
    assert_equal(load_tensors(own, options=READ), saved)
    with refused(IntegrityError, own.path, "truncated"):
        load_tensors(own.path)


@pytest.mark.parametrize("options", [READ, BUFFERED, COPIED], ids=["direct", "buffered", "copied"])
@pytest.mark.parametrize("left_nbytes", [0, 5000, CHUNK_NBYTES])
def test_a_file_that_is_truncated_during_a_load_is_named(own: Checkpoint, monkeypatch: pytest.MonkeyPatch, options: LoadOptions, left_nbytes: int) -> None:
    """Not where it is mapped: there the kernel can only kill the process, which is why files are replaced, never
    changed in place (see `HostMemory.map_file`)."""
    last = own.path / partition_file(len(own.index.partitions) - 1)

    def truncate(call: int, *_: int) -> None:
        if call == 0:
            os.truncate(last, left_nbytes)

    Reads(monkeypatch, truncate)
    with refused(SllmError, last, "at byte"):
        load_tensors(own, options=options)


def test_a_partition_that_turns_into_a_pipe_after_opening_does_not_hang(own: Checkpoint) -> None:
    (own.path / "data-00001.bin").unlink()
    os.mkfifo(own.path / "data-00001.bin")
    with refused(FormatError, own.path / "data-00001.bin", "not a plain file"):
        load_tensors(own)


# Too little memory, too few descriptors, too few threads


def test_a_target_that_is_too_small_says_so_before_anything_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_nbytes", lambda: checkpoint.nbytes - 1)
    Reads(monkeypatch, lambda *_: pytest.fail("bytes were read"))
    with refused(OutOfMemoryError, None, f"{checkpoint.nbytes:,}", f"{checkpoint.nbytes - 1:,}"):
        start_load(checkpoint)
    monkeypatch.undo()
    load_tensors(checkpoint)


@pytest.mark.parametrize("position", [0, 3, 8])
def test_memory_that_runs_out_during_a_load_ends_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    real, calls = cpu.HostMemory.populate, iter(range(1000))

    def populate(memory: cpu.HostMemory, offset: int, nbytes: int) -> None:
        if next(calls) == position:
            raise OutOfMemoryError("the host could not back the memory")
        real(memory, offset, nbytes)

    monkeypatch.setattr(cpu.HostMemory, "populate", populate)
    with refused(OutOfMemoryError, None, "could not back"):
        load_tensors(checkpoint, options=READ)


def test_a_mapping_that_is_refused_ends_the_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def map_file(*_: object, **__: object) -> None:
        raise DeviceError("the file could not be mapped")

    monkeypatch.setattr(cpu.HostMemory, "map_file", map_file)
    load_tensors(checkpoint, options=COPIED)  # it is in the page cache now
    with refused(DeviceError, None, "could not be mapped"):
        load_tensors(checkpoint, options=MAPPED)


def test_too_few_descriptors_are_an_error_and_not_a_leak(checkpoint: Checkpoint) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(max(used) + 20) if number not in used]
    failures = 0
    for spare in range(12):
        with nothing_left(maps=False):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], hard))
            try:
                load_tensors(checkpoint, options=READ)
            except SllmError as error:
                assert "Too many open files" in str(error) and str(checkpoint.path) in str(error)
                failures += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert 2 < failures < 12, failures
    load_tensors(checkpoint)


@pytest.mark.parametrize("position", range(3))
def test_too_few_threads_are_an_error_and_not_a_leak(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    real, calls = threading.Thread.start, iter(range(1000))

    def start(thread: threading.Thread) -> None:
        if next(calls) == position:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with refused(LoadError, checkpoint.path, "thread", maps=True):
        load_tensors(checkpoint, options=READ)


@pytest.mark.timeout(30)
def test_an_error_that_nobody_foresaw_in_a_copy_does_not_stop_the_pipeline_for_ever(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The readers wait for the slots that the copying thread hands back; whatever ends it must end them."""
    calls = iter(range(1000))

    def wait(_: CudaEvent) -> None:
        if next(calls) == 2:
            raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(CudaEvent, "wait", wait)
    options = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2, ring_chunks=1, use_cached=False)
    with nothing_left(), pytest.raises(ZeroDivisionError):
        load_tensors(checkpoint, RecordingRuntime().device(), verify=False, options=options)


def test_a_load_of_what_is_not_there_is_refused(checkpoint: Checkpoint) -> None:
    for kind, says, use in (
        (LoadError, "'nobody'", lambda: load_tensors(checkpoint, names=["layers.0.w", "nobody"])),
        (LoadError, "device map", lambda: load_tensors(checkpoint, {})),
        (LoadError, "'layers.0.w'", lambda: load_tensors(checkpoint, {"layers.1": "cpu"})),
        (DeviceError, "'tpu'", lambda: load_tensors(checkpoint, "tpu")),
        (DeviceError, "''", lambda: load_tensors(checkpoint, "")),
    ):
        with refused(kind, None, says):
            use()
    for options in ({"chunk_nbytes": 0}, {"chunk_nbytes": -CHUNK_NBYTES}, {"chunk_nbytes": CHUNK_NBYTES + 1}, {"threads": 0}, {"ring_chunks": 0}):
        with pytest.raises(ValueError, match="must be"):
            LoadOptions(**options)  # type: ignore[arg-type]


# Cancelled and interrupted loads


def test_a_load_can_be_cancelled_at_any_moment(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(2)
    cancelled = finished = 0
    for _ in range(35):
        with monkeypatch.context() as patch, nothing_left():
            after, reached = choose.randrange(12), threading.Event()

            def count(call: int, *_: int, after: int = after, reached: threading.Event = reached) -> None:
                if call >= after:
                    reached.set()

            Reads(patch, count)
            handle = start_load(checkpoint, options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=choose.randrange(1, 5), use_cached=False))
            reached.wait(0.2)
            time.sleep(choose.random() * 0.002)
            handle.cancel()
            handle.cancel()
            assert handle.done
            try:
                assert_equal(handle.wait(), saved)
                finished += 1
            except LoadCancelled as error:
                assert str(checkpoint.path) in str(error)
                cancelled += 1
            del handle
    assert cancelled > 3 and finished > 0, (cancelled, finished)


def test_a_cancelled_load_is_told_to_all_who_wait(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    release, told = threading.Event(), []
    Reads(monkeypatch, lambda *_: release.wait(20) and None)
    handle = start_load(checkpoint, options=READ)

    def wait(use: Callable[[], object]) -> None:
        try:
            use()
        except LoadCancelled as error:
            told.append(error)

    uses: list[Callable[[], object]] = [handle.wait, lambda: handle.wait_for("layers.6.w"), lambda: handle.wait_for("layers.0")]
    waiting = [threading.Thread(target=wait, args=(use,)) for use in uses]
    for thread in waiting:
        thread.start()
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0.01)
    assert handle.wait_for("layers.0.w", timeout=0.01) is False
    threading.Timer(0.05, release.set).start()
    handle.cancel()
    for thread in waiting:
        thread.join(20)
    assert len(told) == 3


def test_ctrl_c_ends_a_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(call: int, *_: int) -> None:
        if call == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)

    Reads(monkeypatch, interrupt)
    with nothing_left(), pytest.raises(KeyboardInterrupt):
        load_tensors(checkpoint, options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=1, use_cached=False))


# What is left of a load that failed


def _anonymous_nbytes() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of 96 MB in one partition."""
    write_checkpoint(plain_source(7, count=2, nbytes=48 << 20), tmp_path / "large", WriteOptions(), None)
    yield tmp_path / "large"


def _damage_the_end(path: Path) -> None:
    file = path / "data-00000.bin"
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size - 1)
        stream.write(b"\xff")


def test_the_memory_of_a_failed_load_is_given_back(large: Path) -> None:
    _damage_the_end(large)
    with refused(IntegrityError, large):
        load_tensors(large, options=READ)
    before = _anonymous_nbytes()
    for _ in range(4):
        with refused(IntegrityError, large):
            load_tensors(large, options=READ)
    gc.collect()
    assert _anonymous_nbytes() - before < 32 << 20


@pytest.mark.parametrize("fault", ["damage", "read error"])
def test_the_memory_of_a_failed_load_is_given_back_while_its_handle_and_error_are_kept(large: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def fail(_call: int, _fd: int, nbytes: int, offset: int) -> None:
        if fault == "read error" and offset + nbytes == (large / "data-00000.bin").stat().st_size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    if fault == "damage":
        _damage_the_end(large)
    Reads(monkeypatch, fail)
    before = _anonymous_nbytes()
    handle = start_load(large, options=READ)
    with pytest.raises(CheckpointError if fault == "damage" else LoadError) as caught:
        handle.wait()
    assert _anonymous_nbytes() - before < 32 << 20
    assert handle.done and caught.value.path is not None


def test_the_memory_of_a_load_goes_with_its_last_tensor_without_a_garbage_collection(large: Path) -> None:
    before = _anonymous_nbytes()
    gc.collect()
    gc.disable()
    try:
        handle = start_load(large, options=READ)
        tensors = handle.wait()
        assert _anonymous_nbytes() - before > 90 << 20
        last = tensors["t1"]
        del tensors, handle
        assert int(last[-1]) == 7
        del last
        assert _anonymous_nbytes() - before < 32 << 20
    finally:
        gc.enable()


def test_who_gets_the_error_finds_no_thread_left(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the last thread is slow to go after it has told the error."""
    real = Pipeline._finish

    def finish_slowly(pipeline: Pipeline, workers: list[threading.Thread]) -> None:
        real(pipeline, workers)
        time.sleep(0.2)

    monkeypatch.setattr(Pipeline, "_finish", finish_slowly)
    _damage_the_end(large)
    with refused(IntegrityError, large):
        load_tensors(large, options=READ)


def test_nothing_of_a_failed_load_can_be_used_by_accident(large: Path) -> None:
    _damage_the_end(large)
    handle = start_load(large, options=READ)
    with pytest.raises(IntegrityError):
        handle.wait()
    uses: list[Callable[[], object]] = [
        handle.wait,
        handle.wait,
        lambda: handle.tensors,
        lambda: handle.ready("t0"),
        lambda: handle.wait_for("t0"),
        lambda: handle.ready("head"),
    ]
    for use in uses:
        with refused(IntegrityError, large, "at byte"):
            use()
    handle.cancel()
    with pytest.raises(IntegrityError):  # a cancel afterwards does not cover what happened
        handle.wait()
    assert handle.progress.done_nbytes < handle.progress.total_nbytes


def test_a_load_that_fails_does_not_touch_another(large: Path, checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    _damage_the_end(large)
    for _ in range(5):
        bad, good = start_load(large, options=READ), start_load(checkpoint, options=READ)
        with pytest.raises(IntegrityError):
            bad.wait()
        assert_equal(good.wait(), saved)


@pytest.mark.parametrize("rounds", [35, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_random_fault_ends_in_the_right_bytes_or_a_typed_error(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    choose = random.Random(8)
    good = bad = 0
    for _ in range(rounds):
        position = choose.randrange(16)
        fault = choose.choice((errno.EIO, errno.EINVAL, errno.ENOMEM, errno.EAGAIN, 0, 1, 4096, 100_000))

        def act(call: int, _fd: int, _nbytes: int, _offset: int, position: int = position, fault: int = fault) -> int | None:
            if call != position:
                return None
            if fault in errno.errorcode and fault > 1:
                raise OSError(fault, os.strerror(fault))
            return fault

        options = LoadOptions(CHUNK_NBYTES * choose.randrange(1, 4), choose.randrange(1, 5), direct=choose.random() < 0.5, use_cached=False)
        with monkeypatch.context() as patch, nothing_left():
            Reads(patch, act)
            try:
                assert_equal(load_tensors(checkpoint, options=options), saved)
                good += 1
            except (LoadError, IntegrityError) as error:
                assert str(checkpoint.path) in str(error)
                bad += 1
    assert good > rounds // 4 and bad > rounds // 8, (good, bad)


# Models: a configuration that makes no sense


_CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
_CONFIGS: list[bytes | dict[str, Any]] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 10_000,
    b'{"model_type": "llama"',
    b'{"model_type": 5}',
    b'{"model_type": "nobody"}',
    {"hidden_size": "abc"},
    {"hidden_size": -16},
    {"hidden_size": 2**70},
    {"hidden_size": 10**10},
    {"vocab_size": 10**13},
    {"num_attention_heads": 0},
    {"layer_types": ["x"]},
    {"rope_parameters": 5},
    {"pad_token_id": 10**9},
    {"hidden_act": "os.system"},
    {"dtype": "load"},
    {"dtype": "os"},
    {"dtype": "int8"},
    {"quantization_config": {"quant_method": "x"}},
    {"model_type": "bert"},
    {"tie_word_embeddings": "x"},
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    {},
]


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: str(config)[:40])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, config: bytes | dict[str, Any]) -> None:
    import transformers  # noqa: F401 - imported first, since importing it opens files and starts threads of its own

    source = plain_source(count=1, nbytes=64)
    source.companions["config.json"] = config if isinstance(config, bytes) else json.dumps({**_CONFIG, **config}).encode()
    write_checkpoint(source, tmp_path / "model", WriteOptions(), None)
    with refused(ModelError, tmp_path / "model"):
        load_model(tmp_path / "model")


def test_a_model_without_or_with_a_changed_configuration_is_refused(tmp_path: Path) -> None:
    write_checkpoint(plain_source(count=1, nbytes=64), tmp_path / "model", WriteOptions(), None)
    put(tmp_path / "model" / "config.json", b'{"value": 2}')
    with refused(IntegrityError, tmp_path / "model" / "config.json", "not those that were written"):
        load_model(tmp_path / "model")
    save_checkpoint({"w": torch.zeros(3)}, tmp_path / "bare")
    with refused(ModelError, tmp_path / "bare", "config.json"):
        load_model(tmp_path / "bare")
