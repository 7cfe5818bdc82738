"""Chapter 02: the ladder's rungs, loads into tensors that exist, pools that outlive a load, hashes computed on a GPU."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sllm_mini.checkpoint import Checkpoint, WriteOptions, save_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.device import get_device
from sllm_mini.device.base import HostBuffer
from sllm_mini.device.cpu import HostMemory
from sllm_mini.device.cuda_runtime import OUT_OF_MEMORY
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import DeviceError, IntegrityError, LoadError, OutOfMemoryError
from sllm_mini.loading import ChunkPool, LoadOptions, in_place, ladder, load, load_tensors, residency, start_load
from sllm_mini.loading.in_place import InPlace
from sllm_mini.loading.ladder import LADDER, Rung
from sllm_mini.loading.reader import PartitionReader
from sllm_mini.loading.residency import cached_nbytes, drop_cached
from sllm_mini.types import SpanRecorder

SMALL = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=3, ring_chunks=2)
RUNGS = pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.name.replace(" ", "-"))


@pytest.fixture(scope="module")
def saved() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(700, 512)}
    tensors |= {f"model.layers.{number}.w": torch.randn(900, 517) for number in range(8)}
    tensors |= {"odd": torch.randn(3, 7).to(torch.bfloat16), "empty": torch.empty(0, 3), "scalar": torch.tensor(7)}
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"], "columns": tensors["model.layers.0.w"].t()}


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_checkpoint(saved, tmp_path_factory.mktemp("c") / "c", options=WriteOptions(partition_nbytes=3 * CHUNK_NBYTES))


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def assert_equal(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


def cached(checkpoint: Checkpoint, *, drop: bool = False) -> int:
    """Bytes of the data files that the page cache holds."""
    if drop:
        gc.collect()  # pages that a dead load's tensors still map would stay
    total = 0
    for number, entry in enumerate(checkpoint.index.partitions):
        fd = checkpoint.open_partition(number)
        try:
            for _ in range(100 if drop else 0):  # a page that is being read or written just now stays
                drop_cached(fd)
                if cached_nbytes(fd, 0, entry.file_nbytes) == 0:
                    break
                time.sleep(0.02)
            total += cached_nbytes(fd, 0, entry.file_nbytes) or 0
        finally:
            os.close(fd)
    assert not (drop and total), f"{total} bytes stay in the page cache"
    return total


# The rungs


@RUNGS
def test_every_rung_loads_the_same_bytes(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], rung: Rung) -> None:
    assert_equal(rung.load(checkpoint, get_device("cpu")), saved)


@RUNGS
def test_every_rung_loads_the_same_bytes_to_a_gpu(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    if not rung.bulk:
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, place: tensor if place == device.name else pytest.fail(place))
    found = rung.load(checkpoint, device)
    assert_equal(found, saved)
    assert (runtime.pageable_copies > 0) == (rung.bulk and not rung.pinned), "staged until memory is pinned"
    assert (runtime.peak_pinned_nbytes > 0) == rung.pinned
    del found
    gc.collect()
    assert runtime.leaks() == {}


def test_the_top_rungs_keep_as_many_reads_under_way(checkpoint: Checkpoint) -> None:
    assert {rung.threads for rung in LADDER[3:]} == {LoadOptions().threads}, "or a step would change two things"


def test_a_load_in_place_reads_smaller_chunks_unless_told_otherwise(checkpoint: Checkpoint) -> None:
    for target, options, nbytes in (("cpu", None, 4 << 20), ("cpu", LoadOptions(), 16 << 20), (RecordingRuntime().device(), None, 16 << 20)):
        with start_load(checkpoint, target, options=options) as handle:
            assert handle.report is not None and handle._pipeline is not None
            assert handle._pipeline.flow.options.chunk_nbytes == nbytes
            handle.wait()


def test_each_rung_is_the_one_before_plus_one_idea() -> None:
    flags = ("bulk", "direct", "threads", "pinned", "pipelined")
    assert [rung.name for rung in LADDER] == ["by tensor", "bulk", "direct", "threads", "pinned", "pipeline"]
    for lower, higher, flag in zip(LADDER[:-1], LADDER[1:], flags, strict=True):
        changed = [name for name in flags if getattr(lower, name) != getattr(higher, name)]
        assert changed == [flag] and higher.idea != lower.idea


@RUNGS
def test_a_rung_does_what_it_says(checkpoint: Checkpoint, rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it asks of the system: where reads go, how many there are and on how many threads, which pages."""
    cached(checkpoint, drop=True)
    around: set[bool] = set()
    lanes: set[str] = set()
    reads: list[int] = []
    huge: list[tuple[bool, bool]] = []
    real_read, real_init = PartitionReader.read, HostMemory.__init__
    enough = threading.Barrier(min(rung.threads, len(checkpoint.index.partitions)))

    def read(self: PartitionReader, view: memoryview, offset: int, *, cached: bool) -> bool:
        reads.append(len(view))
        lanes.add(threading.current_thread().name)
        if len(reads) <= enough.parties:
            enough.wait(20)  # as many reads are in flight at once as there are threads
        direct = real_read(self, view, offset, cached=cached)
        around.add(direct)
        return direct

    def init(self: HostMemory, nbytes: int, *, huge_pages: bool = True, populate: bool = False) -> None:
        huge.append((huge_pages, populate))
        real_init(self, nbytes, huge_pages=huge_pages, populate=populate)

    monkeypatch.setattr(ladder, "READ_NBYTES", CHUNK_NBYTES)
    monkeypatch.setattr(PartitionReader, "read", read)
    monkeypatch.setattr(HostMemory, "__init__", init)
    rung.load(checkpoint, get_device("cpu"))
    assert around == {rung.direct}
    assert (cached(checkpoint) == 0) == rung.direct, "direct reads leave the page cache as it was"
    assert (len(lanes) > 1) == (rung.threads > 1)
    tensors = [entry for entry in checkpoint.index.tensors if entry.nbytes]
    if rung.bulk:
        assert sum(reads) == checkpoint.nbytes, "each byte is read once"
        assert huge == ([(True, False)] if rung.pipelined else [(rung.pinned, rung.pinned)]), "one allocation"
    else:
        assert sorted(reads) == sorted(entry.nbytes for entry in tensors), "one read a tensor, shared storages each time"


@RUNGS
def test_a_rung_that_cannot_read_says_so(checkpoint: Checkpoint, rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(checkpoint, drop=True)
    calls = iter(range(1000))
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if next(calls) == 1:
            raise OSError(5, "Input/output error")
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(LoadError, match="Input/output error"):
        rung.load(checkpoint, get_device("cpu"))


# Into tensors that exist


@pytest.mark.parametrize("verify", [True, False])
def test_a_load_into_existing_tensors_fills_them_where_they_are(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], verify: bool) -> None:
    names = [name for name in saved if name != "columns"]
    into = {name: torch.full_like(saved[name], 3) for name in names}
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    with start_load(checkpoint, into=into, verify=verify, options=SMALL) as handle:
        found = handle.wait()
        assert handle.ready("embedding") and handle.ready("scalar")
    assert_equal(found, {name: saved[name] for name in names})
    assert all(found[name] is into[name] and into[name].data_ptr() == places[name] for name in names)


def test_a_load_into_some_tensors_leaves_the_others_alone(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    around = torch.zeros(3, 900, 517)
    into = {"model.layers.3.w": around[1], "odd": torch.zeros(3, 7, dtype=torch.bfloat16)}
    handle = start_load(checkpoint, into=into, options=SMALL)
    handle.wait()
    assert torch.equal(around[1], saved["model.layers.3.w"]) and torch.equal(into["odd"], saved["odd"])
    assert not around[0].any() and not around[2].any()
    assert handle.report.nbytes <= 6 * CHUNK_NBYTES < checkpoint.nbytes


@pytest.mark.parametrize(
    ("into", "says"),
    [
        ({}, "no tensor to load into"),
        ({"nowhere": torch.zeros(1)}, "holds no tensor 'nowhere'"),
        ({"scalar": torch.tensor(1.0)}, "int64 .* cannot be put into float32"),
        ({"odd": torch.zeros(7, 3, dtype=torch.bfloat16)}, r"\[3, 7\] there and cannot be put into bfloat16 \[7, 3\]"),
        ({"model.layers.1.w": torch.zeros(517, 900).t()}, "not contiguous"),
        ({"columns": torch.zeros(517, 900)}, "not contiguous"),
        ({"scalar": torch.tensor(1, device="meta")}, "'scalar' is on meta, and nothing can be loaded there"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(checkpoint: Checkpoint, into: dict[str, torch.Tensor], says: str) -> None:
    good = torch.full((700, 512), 3.0)
    with pytest.raises(LoadError, match=says):
        load_tensors(checkpoint, into={**({"model.embed_tokens.weight": good} if into else {}), **into})
    assert (good == 3).all()


def test_into_says_what_is_loaded_and_where(checkpoint: Checkpoint) -> None:
    into = {"scalar": torch.tensor(1)}
    for more in ({"names": ["scalar"]}, {"device": "cuda"}):
        with pytest.raises(ValueError, match="leave out"):
            load_tensors(checkpoint, into=into, **more)


def test_into_that_maps_no_names_to_tensors_is_refused(checkpoint: Checkpoint) -> None:
    tensor = torch.tensor(1)
    with pytest.raises(TypeError, match="`into` is a list; give a mapping from names"):
        load_tensors(checkpoint, into=[tensor])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`into` has a ndarray under 'scalar'"):
        load_tensors(checkpoint, into={"scalar": tensor.numpy()})  # type: ignore[dict-item]


def test_existing_tensors_on_a_gpu_are_filled_piece_by_piece(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    names = [name for name in saved if name not in ("columns", "empty")]
    buffers = {name: device.allocate(saved[name].nbytes) for name in names}
    into = {name: buffers[name].tensor().view(saved[name].dtype).view(saved[name].shape) for name in names}
    # The fake GPU's tensors say that they are on the CPU.
    monkeypatch.setattr("sllm_mini.loading.existing.get_device", lambda _: device)
    found = load_tensors(checkpoint, into=into, options=SMALL)
    assert_equal(found, {name: saved[name] for name in names})
    assert "streamWaitEvent" in runtime.names(), "torch may still be using the tensors"
    assert runtime.live_pinned_nbytes() == 0


# Pools


def test_a_pool_is_pinned_once_for_many_loads(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    with ChunkPool(device, chunk_nbytes=CHUNK_NBYTES, chunks=2) as pool:
        pool.fill()
        assert pool.nbytes == 2 * CHUNK_NBYTES
        pinned = runtime.names().count("hostAlloc")
        for _ in range(3):
            assert_equal(load_tensors(checkpoint, device, verify=False, options=SMALL, pool=pool), saved)
        assert runtime.names().count("hostAlloc") == pinned == 2
        assert runtime.live_pinned_nbytes() == pool.nbytes
    assert runtime.live_pinned_nbytes() == pool.nbytes == 0


def test_two_loads_share_a_pool_without_waiting_for_each_other(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    with ChunkPool(device, chunk_nbytes=CHUNK_NBYTES, chunks=1) as pool:
        handles = [start_load(checkpoint, device, verify=False, options=SMALL, pool=pool) for _ in range(3)]
        for handle in handles:
            assert_equal(handle.wait(), saved)
        assert pool.nbytes == runtime.live_pinned_nbytes() == CHUNK_NBYTES, "it keeps what it was made for and no more"
    assert runtime.live_pinned_nbytes() == 0


def test_a_pool_gets_its_chunks_back_from_a_load_that_fails(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    with ChunkPool(device, chunk_nbytes=CHUNK_NBYTES, chunks=2) as pool:
        pool.fill()
        runtime.fail("memcpyAsync", nth=3)
        with pytest.raises(Exception, match="copy from the host"):
            load_tensors(checkpoint, device, verify=False, options=SMALL, pool=pool)
        assert pool.nbytes == 2 * CHUNK_NBYTES
    gc.collect()
    assert runtime.leaks() == {}


def test_a_pool_that_is_closed_keeps_nothing_that_comes_back() -> None:
    runtime = RecordingRuntime()
    pool = ChunkPool(runtime.device(), chunk_nbytes=CHUNK_NBYTES, chunks=2)
    lent = pool.take()
    pool.close()
    assert runtime.live_pinned_nbytes() == CHUNK_NBYTES
    pool.give(lent)
    assert runtime.live_pinned_nbytes() == pool.nbytes == 0


def test_a_closed_pool_is_refused_by_later_loads_and_serves_those_under_way(
    checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    pool = ChunkPool(device, chunk_nbytes=CHUNK_NBYTES, chunks=2)
    go, real = threading.Event(), ChunkPool.take

    def take(self: ChunkPool) -> HostBuffer:
        assert go.wait(20)
        return real(self)

    monkeypatch.setattr(ChunkPool, "take", take)
    handle = start_load(checkpoint, device, verify=False, options=SMALL, pool=pool)
    pool.close()
    for use in (pool.fill, lambda: start_load(checkpoint, device, options=SMALL, pool=pool)):
        with pytest.raises(ValueError, match="the pool was closed; make a new one"):
            use()
    go.set()
    assert_equal(handle.wait(), saved)
    assert runtime.live_pinned_nbytes() == pool.nbytes == 0


def test_a_pool_that_fits_no_load_says_so(checkpoint: Checkpoint) -> None:
    device = get_device("cpu")
    for bad in ({"chunk_nbytes": 1}, {"chunks": 0}):
        with pytest.raises(ValueError, match="pool keeps 1 chunk or more"):
            ChunkPool(device, **bad)
    gpu = RecordingRuntime().device()
    with ChunkPool(gpu, chunk_nbytes=2 * CHUNK_NBYTES) as pool:
        with pytest.raises(ValueError, match="make them equal"):
            load_tensors(checkpoint, gpu, options=SMALL, pool=pool)
        load_tensors(checkpoint, gpu, pool=pool)  # without options a load follows its pool
    with ChunkPool(device, chunk_nbytes=CHUNK_NBYTES) as pool:
        for target in (RecordingRuntime().device(), device):  # a load to a CPU reads in place
            with pytest.raises(ValueError, match="no chunk of this load passes through"):
                load_tensors(checkpoint, target, options=SMALL, pool=pool)


# Hashes on the GPU


def test_a_gpu_hashes_what_arrived_there(checkpoint: Checkpoint, saved: dict[str, torch.Tensor]) -> None:
    runtime = RecordingRuntime(queries_before_done=2)
    recorder = SpanRecorder()
    handle = start_load(checkpoint, runtime.device(), options=SMALL, recorder=recorder)
    assert_equal(handle.wait(), saved)
    assert handle.report.device_hashed_nbytes == checkpoint.nbytes and handle.report.fallback is None
    assert {span.name for span in recorder.spans} == {"read", "copy"}, "the processor hashes nothing"


def test_a_byte_that_goes_wrong_on_the_way_to_the_gpu_is_found(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing on the host would not see it: the bytes are right there."""
    runtime = RecordingRuntime()
    real, copies = runtime.memcpyAsync, iter(range(1000))

    def copy(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        if kind == runtime.memcpyHostToDevice and next(copies) == 4:
            nbytes -= 1
        real(target, source, nbytes, kind, stream)

    monkeypatch.setattr(runtime, "memcpyAsync", copy)
    with pytest.raises(IntegrityError, match="not the one that was written"):
        load_tensors(checkpoint, runtime.device(), options=SMALL)
    gc.collect()
    assert runtime.leaks() == {}


def test_without_the_kernel_the_processor_hashes_and_the_report_says_so(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    own = save_checkpoint(saved, tmp_path / "c")
    runtime = RecordingRuntime(kernels={})
    handle = start_load(own, runtime.device(), options=SMALL)
    assert_equal(handle.wait(), saved)
    assert handle.report.device_hashed_nbytes == 0
    assert handle.report.fallback is not None and "hashes are computed on the processor" in handle.report.fallback
    file = own.path / own.index.partitions[0].file
    with open(file, "r+b") as stream:
        stream.write(b"\xff\xff\xff")
    with pytest.raises(IntegrityError, match="at byte 0"):
        load_tensors(own, runtime.device(), options=SMALL)


@pytest.mark.parametrize("call", ["malloc", "hostAlloc", "streamCreateWithFlags"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_gpu_without_room_for_the_ring_leaves_nothing(checkpoint: Checkpoint, call: str, nth: int) -> None:
    runtime = RecordingRuntime()
    runtime.fail(call, nth=nth, status=OUT_OF_MEMORY)
    happens = {"malloc": 2, "hostAlloc": 3, "streamCreateWithFlags": 2}  # the model and the digests; these and two slots; copies and hashes
    if nth <= happens[call]:
        with pytest.raises(OutOfMemoryError if call != "streamCreateWithFlags" else DeviceError):
            load_tensors(checkpoint, runtime.device(), options=SMALL)
    else:
        load_tensors(checkpoint, runtime.device(), options=SMALL)
    gc.collect()
    assert runtime.leaks() == {}


# Fallback


def test_a_fallback_to_the_page_cache_leaves_nothing_in_it(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **options)  # type: ignore[arg-type]

    cached(checkpoint, drop=True)
    monkeypatch.setattr(os, "open", refuse)
    handle = start_load(checkpoint, options=SMALL)
    assert_equal(handle.wait(), saved)
    assert handle.report.buffered_nbytes == checkpoint.nbytes
    assert cached(checkpoint) < checkpoint.nbytes // 8, "what was not cached before is dropped again"


# Order


def test_views_are_made_while_bytes_are_on_their_way(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, real_read, real_restore = threading.Event(), PartitionReader.read, load.restore_tensors

    def read(self: PartitionReader, view: memoryview, offset: int, *, cached: bool) -> bool:
        reading.set()
        return real_read(self, view, offset, cached=cached)

    def restore(*args: object) -> object:
        assert reading.wait(20), "no read was started before the tensors were made"
        return real_restore(*args)  # type: ignore[arg-type]

    cached(checkpoint, drop=True)
    monkeypatch.setattr(PartitionReader, "read", read)
    monkeypatch.setattr(load, "restore_tensors", restore)
    load_tensors(checkpoint, options=SMALL)


def test_a_failure_while_views_are_made_ends_the_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(*_: object) -> object:
        raise RuntimeError("no view can be made")

    monkeypatch.setattr(load, "restore_tensors", restore)
    with pytest.raises(RuntimeError, match="no view"):
        load_tensors(checkpoint, options=SMALL)


@pytest.mark.parametrize("cold", [True, False])
def test_pages_are_backed_once_and_never_under_a_mapping(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the readers are always faster; backing what is mapped already would copy it."""
    cached(checkpoint, drop=True)
    if not cold:  # some of each file: of one that is cached whole nothing is backed ahead
        for entry in checkpoint.index.partitions:
            with open(checkpoint.path / entry.file, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                file.read(CHUNK_NBYTES)
    backed = [0]
    real_ahead, real_populate = InPlace._back_ahead, HostMemory.populate

    def ahead(self: InPlace) -> None:
        with self._flow.changed:
            assert self._flow.changed.wait_for(lambda: len(self._states) == len(self._chunks), 20)
        real_ahead(self)

    def populate(self: HostMemory, offset: int, nbytes: int) -> None:
        backed[0] += nbytes
        real_populate(self, offset, nbytes)

    monkeypatch.setattr(InPlace, "_back_ahead", ahead)
    monkeypatch.setattr(HostMemory, "populate", populate)
    handle = start_load(checkpoint, options=SMALL)
    assert_equal(handle.wait(), saved)
    assert (handle.report.mapped_nbytes == 0) == cold
    assert backed[0] == checkpoint.nbytes - handle.report.mapped_nbytes


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_in_the_page_cache_is_mapped_in_one_call_by_few_threads(checkpoint: Checkpoint, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in checkpoint.index.partitions:
        (checkpoint.path / entry.file).read_bytes()
    if not whole:
        fd = checkpoint.open_partition(0)
        os.posix_fadvise(fd, 0, CHUNK_NBYTES, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    asked, maps, names, real, real_map, real_start = [0], [0], [], PartitionReader.is_cached, HostMemory.map_file, threading.Thread.start

    def is_cached(self: PartitionReader, offset: int, nbytes: int) -> bool:
        asked[0] += 1
        return real(self, offset, nbytes)

    def map_file(self: HostMemory, *args: int, populate: bool = True) -> None:
        maps[0] += 1
        real_map(self, *args, populate=populate)

    def start(self: threading.Thread) -> None:
        names.append(self.name.split("-")[1])
        real_start(self)

    monkeypatch.setattr(PartitionReader, "is_cached", is_cached)
    monkeypatch.setattr(HostMemory, "map_file", map_file)
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(in_place, "cpu_count", lambda: 2)
    handle = start_load(checkpoint, options=SMALL)
    handle.wait()
    assert (handle.report.mapped_nbytes == checkpoint.nbytes) == whole
    files, chunks = len(checkpoint.index.partitions), -(-checkpoint.index.partitions[0].nbytes // CHUNK_NBYTES)
    assert asked[0] == files + (0 if whole else chunks)
    assert maps[0] == files + (0 if whole else chunks - 2), "of the other file one chunk is read, the others are mapped singly"
    assert names == ["read", "read", "load"] if whole else ["pages", "read", "read", "read", "load"]


def test_views_made_after_a_failure_are_dropped_again(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a handle that is kept for its error would keep the model's memory."""
    real = load.restore_tensors

    def read(*_: object, **__: object) -> bool:
        raise LoadError("the disk is on fire")

    def restore(*args: object) -> object:
        for thread in threading.enumerate():
            if thread.name.startswith("sllm-"):
                thread.join(20)
        return real(*args)  # type: ignore[arg-type]

    cached(checkpoint, drop=True)
    monkeypatch.setattr(PartitionReader, "read", read)
    monkeypatch.setattr(load, "restore_tensors", restore)
    handle = start_load(checkpoint, options=SMALL)
    assert handle.done and handle._tensors == {}
    with pytest.raises(LoadError, match="on fire"):
        handle.wait()


def test_pages_are_backed_ahead_of_the_reads(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first read is in flight, the memory of all the others is made ready."""
    cached(checkpoint, drop=True)
    backed, all_backed = [0], threading.Event()
    real_populate, real_read = HostMemory.populate, PartitionReader.read

    def populate(self: HostMemory, offset: int, nbytes: int) -> None:
        real_populate(self, offset, nbytes)
        backed[0] += nbytes
        if backed[0] >= checkpoint.nbytes:
            all_backed.set()

    def read(self: PartitionReader, view: memoryview, offset: int, *, cached: bool) -> bool:
        assert all_backed.wait(20), "a read in flight held up the pages of the others"
        return real_read(self, view, offset, cached=cached)

    monkeypatch.setattr(HostMemory, "populate", populate)
    monkeypatch.setattr(PartitionReader, "read", read)
    load_tensors(checkpoint, options=LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=1))
    assert backed[0] == checkpoint.nbytes, "each page once"


# Memory

_GROWTH = """
import sys
import torch
from sllm_mini.checkpoint import save_checkpoint
from sllm_mini.lab.counters import counted
from sllm_mini.loading import LoadOptions, load_tensors

path, cached, into = sys.argv[1], sys.argv[2] == "cached", sys.argv[3] == "into"
save_checkpoint({f"model.layers.{n}.w": torch.ones(4 << 20) for n in range(8)}, path)
save_checkpoint({"w": torch.ones(4)}, path + "-small")
load_tensors(path + "-small")  # threads, imports
existing = {f"model.layers.{n}.w": torch.zeros(4 << 20) for n in range(8)} if into else None
with counted() as work:
    load_tensors(path, into=existing, options=LoadOptions(chunk_nbytes=4 << 20, ring_chunks=4, use_cached=cached))
print(work.peak_nbytes)
"""


@pytest.mark.parametrize(("cached", "into", "beside_nbytes"), [("read", "new", 0), ("cached", "new", 0), ("read", "into", 16 << 20)])
def test_memory_grows_by_the_model_alone(tmp_path: Path, cached: str, into: str, beside_nbytes: int) -> None:
    """128 MB of tensors: read, mapped from the page cache, and through a ring of 16 MB into tensors that exist."""
    command = [sys.executable, "-c", _GROWTH, str(tmp_path / "c"), cached, into]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    if said.strip() == "None":
        pytest.skip("this kernel does not say how much memory a process held at most")
    model = 0 if into == "into" else 8 * (16 << 20)
    assert model * 0.9 <= int(said) <= model + beside_nbytes + (10 << 20)


# What goes wrong while a load starts or ends


def test_a_file_system_that_takes_no_advice_does_not_stop_the_end(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *args, **options)  # type: ignore[arg-type]

    def no_advice(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    cached(checkpoint, drop=True)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "posix_fadvise", no_advice)
    assert_equal(start_load(checkpoint, options=SMALL).wait(20), saved)


def test_an_error_that_nobody_foresaw_while_closing_is_told(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PartitionReader.close

    def close(self: PartitionReader) -> None:
        real(self)
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(PartitionReader, "close", close)
    with pytest.raises(ZeroDivisionError):
        start_load(checkpoint, options=SMALL).wait(20)


@pytest.mark.parametrize("position", range(5))
def test_a_ctrl_c_while_threads_start_leaves_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    real, started = threading.Thread.start, iter(range(100))
    cached(checkpoint, drop=True)
    descriptors = len(os.listdir("/proc/self/fd"))

    def start(self: threading.Thread) -> None:
        real(self)
        if next(started) == position:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        start_load(checkpoint, options=SMALL)  # 1 thread for pages, 3 that read, 1 that ends it
    monkeypatch.undo()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("sllm-"):
            thread.join(20)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_of_a_file_that_belongs_to_somebody_else_nothing_is_believed(checkpoint: Checkpoint, saved: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses cachestat there, and its mincore calls every page resident."""

    class Refusing:
        code = 0
        mmap, munmap, mincore = residency._libc.mmap, residency._libc.munmap, residency._libc.mincore

        def syscall(self, *_: object) -> int:
            ctypes.set_errno(self.code)
            return -1

    libc = Refusing()
    cached(checkpoint, drop=True)
    monkeypatch.setattr(residency, "_libc", libc)
    for libc.code in (errno.EPERM, errno.ENOSYS):
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr(os, "access", lambda *_: False)
        handle = start_load(checkpoint, options=SMALL)
        assert_equal(handle.wait(), saved)
        assert handle.report.direct_nbytes == checkpoint.nbytes
