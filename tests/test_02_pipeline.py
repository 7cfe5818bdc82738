"""Chapter 02: the pipeline's plan, order, overlap and ring; CPU and (recorded) GPU targets; nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.checkpoint import Checkpoint, WriteOptions, save_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.device.cuda_stream import CudaEvent
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import DeviceError, IntegrityError, LoadCancelled, LoadError, OutOfMemoryError
from sllm_mini.loading import LoadOptions, in_place, load_tensors, residency, start_load
from sllm_mini.loading.load import _by_prefix
from sllm_mini.loading.pipeline import Pipeline, next_chunk
from sllm_mini.loading.plan import Chunk, plan_load
from sllm_mini.loading.reader import PartitionReader
from sllm_mini.loading.residency import cached_nbytes
from sllm_mini.types import SpanRecorder

SMALL = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=3, ring_chunks=2)


@pytest.fixture(scope="module")
def saved() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(700, 512)}
    tensors |= {f"model.layers.{number}.w": torch.randn(900, 517) for number in range(12)}
    tensors |= {"model.norm.weight": torch.randn(512), "empty": torch.empty(0, 3), "scalar": torch.tensor(7)}
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_checkpoint(saved, tmp_path_factory.mktemp("c") / "c", options=WriteOptions(partition_nbytes=9 << 20))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads, files = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert {thread.name for thread in set(threading.enumerate()) - threads} == set()
    assert len(set(os.listdir("/proc/self/fd"))) <= len(files)


def evict(checkpoint: Checkpoint) -> None:
    for number in range(len(checkpoint.index.partitions)):
        fd = checkpoint.open_partition(number)
        os.fsync(fd)
        for _ in range(100):  # a page that is being read or written just now stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_nbytes(fd, 0, checkpoint.index.partitions[number].file_nbytes) == 0:
                break
            time.sleep(0.02)
        os.close(fd)


def assert_equal(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


# The plan


@st.composite
def subsets(draw: st.DrawFn) -> tuple[list[str], int, int]:
    names = ["model.embed_tokens.weight", *[f"model.layers.{n}.w" for n in range(12)], "model.norm.weight", "empty", "scalar", "lm_head.weight"]
    return draw(st.lists(st.sampled_from(names), unique=True)), draw(st.sampled_from([CHUNK_NBYTES, 3 * CHUNK_NBYTES])), draw(st.sampled_from([4096, CHUNK_NBYTES]))


@settings(deadline=None, max_examples=60)
@given(subset=subsets(), devices=st.sampled_from([{"": 0}, {"": 0, "model.layers": 1}, {"": 1, "model.layers.3": 0, "lm_head": 0}]))
def test_a_plan_reads_each_needed_byte_once_into_its_own_place(checkpoint: Checkpoint, subset: tuple[list[str], int, int], devices: dict[str, int]) -> None:
    names, chunk_nbytes, granule = subset
    plan = plan_load(checkpoint.index, partial(_by_prefix, devices), devices=max(devices.values()) + 1, names=names, chunk_nbytes=chunk_nbytes, granule=granule)
    for device, nbytes in enumerate(plan.device_nbytes):
        own = sorted((chunk.device_offset, chunk.nbytes) for chunk in plan.chunks if chunk.device == device)
        assert [at for at, _ in own] == [sum(size for _, size in own[:number]) for number in range(len(own))], "no hole, no overlap"
        assert sum(size for _, size in own) == nbytes
    for chunk in plan.chunks:
        assert chunk.nbytes <= chunk_nbytes and chunk.file_offset % 4096 == chunk.device_offset % 4096 == chunk.nbytes % 4096 == 0
        assert chunk.file_offset // chunk_nbytes == (chunk.file_offset + chunk.nbytes - 1) // chunk_nbytes
    assert [chunk.layer for chunk in plan.chunks] == sorted(chunk.layer for chunk in plan.chunks), "execution order"
    for tensor, device in plan.tensors:
        place, numbers = plan.place(tensor, device), set(plan.chunks_of(tensor, device))
        expected = {
            chunk.number for chunk in plan.chunks
            if chunk.device == device and chunk.device_offset < place + tensor.nbytes and place < chunk.device_offset + chunk.nbytes
        }  # fmt: skip
        assert numbers == (expected if tensor.nbytes else set())
        for number in numbers:
            chunk = plan.chunks[number]
            assert chunk.partition == tensor.partition
            assert chunk.device_offset - place == chunk.file_offset - tensor.offset, "the file's bytes land under the tensor"


def test_a_whole_model_is_read_in_whole_chunks(checkpoint: Checkpoint) -> None:
    plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=CHUNK_NBYTES, granule=4096)
    assert plan.nbytes == checkpoint.nbytes
    assert [(chunk.partition, chunk.file_offset) for chunk in plan.chunks] == sorted((chunk.partition, chunk.file_offset) for chunk in plan.chunks)


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_next_chunk_takes_the_first_that_has_somewhere_to_go(devices: list[int], free: list[int]) -> None:
    pending = [Chunk(number, 0, 0, 1, device, 0, 0) for number, device in enumerate(devices)]
    found = next_chunk(pending, free)
    possible = [position for position, device in enumerate(devices) if free[device]]
    assert found == (possible[0] if possible else None)


# On the CPU


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_a_cold_load_reads_every_byte_once_around_the_cache(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], direct: bool, verify: bool) -> None:
    evict(checkpoint)
    with start_load(checkpoint, verify=verify, options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, direct=direct)) as handle:
        assert_equal(handle.wait(), saved)
    report = handle.report
    assert report.nbytes == checkpoint.nbytes and handle.progress.fraction == 1.0
    if direct and report.fallback is None:
        assert report.direct_nbytes == checkpoint.nbytes
        readers = [PartitionReader(checkpoint, number, direct=False) for number in range(len(checkpoint.index.partitions))]
        assert sum(cached_nbytes(reader.fd, 0, 1 << 30) or 0 for reader in readers) == 0, "the page cache stays as it was"
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_what_the_page_cache_holds_is_taken_from_it(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], mapped: bool) -> None:
    for entry in checkpoint.index.partitions:
        (checkpoint.path / entry.file).read_bytes()
    handle = start_load(checkpoint, options=LoadOptions(map_cached=mapped))
    found = handle.wait()
    assert_equal(found, saved)
    assert (handle.report.mapped_nbytes if mapped else handle.report.buffered_nbytes) == checkpoint.nbytes
    before = (checkpoint.path / "data-00000.bin").read_bytes()
    for tensor in found.values():
        tensor.zero_()
    assert (checkpoint.path / "data-00000.bin").read_bytes() == before, "a write stays with the process that wrote"


def test_a_kernel_with_large_pages_reads_what_it_cannot_map(
    checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in checkpoint.index.partitions:
        (checkpoint.path / entry.file).read_bytes()
    monkeypatch.setattr(in_place.mmap, "PAGESIZE", 16 << 20)
    handle = start_load(checkpoint, options=SMALL)
    assert_equal(handle.wait(), saved)
    assert handle.report.buffered_nbytes > 0 and handle.report.nbytes == checkpoint.nbytes


def test_half_a_file_in_the_cache_is_mapped_and_half_is_read(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    evict(checkpoint)
    with open(checkpoint.path / "data-00000.bin", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead past what is asked for
        file.read(CHUNK_NBYTES)
    handle = start_load(checkpoint, options=SMALL)
    assert_equal(handle.wait(), saved)
    if handle.report.fallback is None:
        assert CHUNK_NBYTES <= handle.report.mapped_nbytes < checkpoint.nbytes
        assert handle.report.mapped_nbytes + handle.report.direct_nbytes == checkpoint.nbytes


def test_a_subset_reads_only_its_blocks(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    names = ["model.layers.3.w", "model.norm.weight", "empty"]
    handle = start_load(checkpoint, names=names, verify=False)
    assert_equal(handle.wait(), {name: saved[name] for name in names})
    assert handle.report.nbytes <= saved["model.layers.3.w"].nbytes + 4 * 4096
    checked = start_load(checkpoint, names=names)
    assert_equal(checked.wait(), {name: saved[name] for name in names})
    assert checked.report.nbytes <= saved["model.layers.3.w"].nbytes + 4 * CHUNK_NBYTES
    with pytest.raises(LoadError, match="holds no tensor"):
        start_load(checkpoint, names=["nobody"])


def test_tensors_outlive_everything(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    found = load_tensors(checkpoint, options=SMALL)
    last = found["model.layers.11.w"]
    del found
    gc.collect()
    assert torch.equal(last, saved["model.layers.11.w"])


def test_layers_become_ready_in_execution_order(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Semaphore(0), PartitionReader.read

    def read_when_told(self: PartitionReader, view: memoryview, offset: int, *, cached: bool) -> bool:
        go.acquire()
        return real(self, view, offset, cached=cached)

    monkeypatch.setattr(PartitionReader, "read", read_when_told)
    options = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=1, map_cached=False)
    handle = start_load(checkpoint, options=options)
    assert handle.layers == ["embedding", *[f"model.layers.{number}" for number in range(12)], "head"]
    assert not handle.ready("embedding") and handle.ready("empty") and not handle.wait_for("embedding", timeout=0)
    seen = []
    for layer in handle.layers:
        while not handle.ready(layer):
            done = handle.progress.done_nbytes
            go.release()
            handle._changed.acquire()
            handle._changed.wait_for(lambda before=done: handle._done_nbytes > before, 10)
            handle._changed.release()
        seen.append(handle.progress.fraction)
        if layer != "head":
            assert torch.equal(handle.tensors[f"{layer}.w" if layer != "embedding" else "model.embed_tokens.weight"], saved[f"{layer}.w" if layer != "embedding" else "model.embed_tokens.weight"])
    assert seen == sorted(seen) and seen[0] < 0.2, "the first layer is usable long before the last byte"
    for _ in range(100):
        go.release()
    handle.wait()


def test_no_thread_works_before_the_last_was_started(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their page faults would hold up the start of the next, and whoever starts a load to run beside it."""
    began, seen, real_take, real_start = threading.Event(), list[bool](), Pipeline._take, threading.Thread.start

    def take(self: Pipeline) -> Chunk | None:
        began.set()
        return real_take(self)

    def start(self: threading.Thread) -> None:
        if self.name == "sllm-load":
            seen.append(began.wait(0.3))
        real_start(self)

    monkeypatch.setattr(Pipeline, "_take", take)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert_equal(load_tensors(checkpoint, options=SMALL), saved)
    assert seen == [False] and began.is_set()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_cancel_leaves_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    started, hold, real, real_stop = threading.Semaphore(0), threading.Event(), PartitionReader.read, Pipeline.stop
    reads = itertools.count()

    def read_then_hold(self: PartitionReader, view: memoryview, offset: int, *, cached: bool) -> bool:
        started.release()
        if next(reads) >= after:
            hold.wait(10)
        return real(self, view, offset, cached=cached)

    def stop_then_let_go(self: Pipeline, error: BaseException) -> None:
        real_stop(self, error)
        hold.set()

    monkeypatch.setattr(PartitionReader, "read", read_then_hold)
    monkeypatch.setattr(Pipeline, "stop", stop_then_let_go)
    handle = start_load(checkpoint, options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, map_cached=False))
    started.acquire()
    handle.cancel()
    assert handle.done and handle.progress.fraction != 1.0
    for attempt in (handle.wait, lambda: handle.tensors, lambda: handle.ready("empty"), lambda: handle.wait_for("embedding")):
        with pytest.raises(LoadCancelled):
            attempt()
    handle.cancel()


def test_leaving_the_block_early_cancels(checkpoint: Checkpoint) -> None:
    with pytest.raises(ZeroDivisionError), start_load(checkpoint, options=SMALL) as handle:
        raise ZeroDivisionError
    assert handle.done


def test_stages_of_different_chunks_overlap(checkpoint: Checkpoint) -> None:
    evict(checkpoint)
    recorder = SpanRecorder()
    load_tensors(checkpoint, options=SMALL, recorder=recorder)
    names = {span.name for span in recorder.spans}
    assert {"read", "hash"} <= names
    spans = sorted(recorder.spans, key=lambda span: span.start)
    overlapping = sum(two.start < one.end and two.lane != one.lane for one, two in itertools.pairwise(spans))
    assert overlapping > len(spans) // 10
    assert sum(span.nbytes for span in spans if span.name == "hash") == checkpoint.nbytes


# On GPUs (a recording one: host memory, copies done only when waited for)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_gpu_gets_every_byte_through_a_bounded_ring(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], threads: int) -> None:
    runtime = RecordingRuntime(queries_before_done=2)
    found = load_tensors(checkpoint, runtime.device(), options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=threads, ring_chunks=3))
    assert_equal(found, saved)
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    digests_nbytes = CHUNK_NBYTES // 8192  # 8 bytes per 64 KiB
    assert runtime.peak_pinned_nbytes <= 3 * (CHUNK_NBYTES + digests_nbytes), "host memory grows by the ring alone"
    assert runtime.peak_nbytes[0] == checkpoint.nbytes + 3 * digests_nbytes and runtime.pageable_copies == 0
    assert runtime.live_pinned_nbytes() == 0
    chunks = sum(-(-entry.nbytes // CHUNK_NBYTES) for entry in checkpoint.index.partitions)
    assert runtime.names().count("memcpyAsync") == 2 * chunks, "each chunk once, and its digests back"
    del found
    gc.collect()
    assert runtime.leaks() == {}


def test_reads_go_on_while_copies_are_in_flight(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime()
    seen: list[int] = []
    enough, real_copy, real_wait = threading.Event(), runtime.memcpyAsync, CudaEvent.wait

    def copy(*args: int) -> None:
        real_copy(*args)
        seen.append(1)
        if len(seen) == 4:
            enough.set()

    def wait(self: CudaEvent) -> None:
        assert enough.wait(20), "nothing more was enqueued while the first copy was in flight"
        real_wait(self)

    monkeypatch.setattr(runtime, "memcpyAsync", copy)
    monkeypatch.setattr(CudaEvent, "wait", wait)
    load_tensors(checkpoint, runtime.device(), options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=1, ring_chunks=4))
    assert "deviceSynchronize" not in runtime.names()


def test_a_gpu_that_fails_after_the_last_byte_fails_the_load(checkpoint: Checkpoint) -> None:
    runtime = RecordingRuntime()
    runtime.fail("streamSynchronize")  # only closing the stream asks for it
    with pytest.raises(DeviceError, match="finish a stream's work"):
        load_tensors(checkpoint, runtime.device(), options=SMALL)
    gc.collect()
    assert runtime.leaks() == {}



def test_a_device_map_sends_each_tensor_to_its_gpu(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    runtime = RecordingRuntime(devices=2)
    first, second = runtime.device(0), runtime.device(1)
    found = load_tensors(checkpoint, {"": first, "model.layers": second, "model.layers.0": "cpu", "lm_head": second}, options=SMALL)
    assert_equal(found, saved)
    layers = sum(saved[f"model.layers.{number}.w"].nbytes for number in range(1, 12))
    head = saved["lm_head.weight"].nbytes
    assert layers + head <= runtime.peak_nbytes[1] <= layers + head + 8 * CHUNK_NBYTES, "the tied storage is on both"
    assert runtime.peak_nbytes[0] <= head + 6 * CHUNK_NBYTES
    del found
    gc.collect()
    assert runtime.leaks() == {}
    with pytest.raises(LoadError, match=r"model\.norm"):
        start_load(checkpoint, {"model.layers": "cpu", "model.embed_tokens": "cpu", "lm_head": "cpu"})


FAULTS = [("memcpyAsync", 1), ("memcpyAsync", 5), ("eventRecord", 2), ("hostAlloc", 1), ("hostAlloc", 2), ("malloc", 1), ("streamCreateWithFlags", 1)]


@pytest.mark.parametrize(("call", "nth"), FAULTS)
def test_a_failing_gpu_call_ends_the_load_and_gives_everything_back(checkpoint: Checkpoint, call: str, nth: int) -> None:
    runtime = RecordingRuntime()
    runtime.fail(call, nth=nth)
    with pytest.raises(DeviceError):
        load_tensors(checkpoint, runtime.device(), options=SMALL)
    gc.collect()
    assert runtime.leaks() == {}


def test_a_copy_that_fails_later_is_not_called_success(checkpoint: Checkpoint) -> None:
    runtime = RecordingRuntime()
    runtime.fail("memcpyAsync", nth=4, later=True)
    with pytest.raises(DeviceError):
        load_tensors(checkpoint, runtime.device(), options=SMALL)
    gc.collect()
    assert runtime.leaks() == {}


def test_a_gpu_that_is_too_small_says_so_before_anything_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime(memory_nbytes=checkpoint.nbytes // 2)
    monkeypatch.setattr(PartitionReader, "read", lambda *_args, **_options: pytest.fail("a byte was read"))
    with pytest.raises(OutOfMemoryError):
        start_load(checkpoint, runtime.device())
    assert runtime.leaks() == {}


def test_a_wrong_byte_never_reaches_a_tensor_unseen(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = save_checkpoint(saved, tmp_path / "c")
    file = tmp_path / "c" / "data-00000.bin"
    at = checkpoint.nbytes - 4096 - 5
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 16]))
    for target in ("cpu", RecordingRuntime().device()):
        with pytest.raises(IntegrityError) as caught:
            load_tensors(checkpoint, target, options=SMALL)
        assert caught.value.path == str(file) and caught.value.offset == at // CHUNK_NBYTES * CHUNK_NBYTES
    load_tensors(checkpoint, verify=False)


def test_options_say_what_is_wrong() -> None:
    for bad in ({"chunk_nbytes": 5}, {"chunk_nbytes": 0}, {"threads": 0}, {"ring_chunks": 0}):
        with pytest.raises(ValueError, match="must be"):
            LoadOptions(**bad)


# What the page cache holds


def test_both_ways_to_ask_the_page_cache_agree(checkpoint: Checkpoint) -> None:
    fd = checkpoint.open_partition(0)
    try:
        os.pread(fd, checkpoint.index.partitions[0].file_nbytes, 0)
        assert residency._mincore(fd, 0, CHUNK_NBYTES) == cached_nbytes(fd, 0, CHUNK_NBYTES) == CHUNK_NBYTES
        evict(checkpoint)
        assert residency._mincore(fd, 0, CHUNK_NBYTES) == cached_nbytes(fd, 0, CHUNK_NBYTES) == 0
    finally:
        os.close(fd)


def test_a_system_that_calls_every_page_resident_is_not_believed(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar:
        mmap, munmap = residency._libc.mmap, residency._libc.munmap

        def mincore(self, _address: object, _nbytes: int, answer: ctypes.Array[ctypes.c_char]) -> int:
            answer.raw = b"\x01" * len(answer)
            return 0

        def syscall(self, *_: object) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

    evict(checkpoint)
    residency._mincore_tells.cache_clear()
    monkeypatch.setattr(residency, "_libc", Liar())
    try:
        handle = start_load(checkpoint, options=SMALL)
        assert_equal(handle.wait(), saved)
        assert handle.report.direct_nbytes == checkpoint.nbytes, "what nobody vouches for is read from the disk"
    finally:
        residency._mincore_tells.cache_clear()
