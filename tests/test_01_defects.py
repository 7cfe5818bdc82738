"""Chapters 01 and 02: the defects that reading ServerlessLLM's source turned up in its format and loader, each with a
test that it is not here. Of the fifteen, 12 to 14 (caches, handles, sockets) belong to the store and are tested with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from sllm_mini.checkpoint import WriteOptions, convert_checkpoint, open_checkpoint, save_checkpoint, verify_checkpoint
from sllm_mini.checkpoint.dtypes import ITEM_NBYTES
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.checkpoint.index import BLOCK_NBYTES
from sllm_mini.device.base import Device
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import CheckpointError, IntegrityError, LoadCancelled, LoadError, WriteError
from sllm_mini.loading import LoadOptions, load_tensors, start_load

COLD = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2, ring_chunks=2, use_cached=False)

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 1000, 4095, 4096, 4097, 2_097_153, 67_000_001])
def test_defect_1_no_tail_is_dropped_whatever_the_size(tmp_path: Path, nbytes: int) -> None:
    """Its aligned writer drops the unaligned tail of a file without an error: 100 and 67 000 001 bytes came out as 0.
    Here every byte is on the disk, padded to whole blocks, and comes back through direct reads."""
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
    checkpoint = save_checkpoint({"w": data}, tmp_path / "model")
    size = (tmp_path / "model" / "data-00000.bin").stat().st_size
    assert size % BLOCK_NBYTES == 0 and nbytes <= size < nbytes + BLOCK_NBYTES
    assert verify_checkpoint(checkpoint).nbytes == size
    assert torch.equal(load_tensors(checkpoint, options=COLD)["w"], data)


def test_defect_1_a_short_write_is_continued_and_a_failed_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same defect from the other side: what the system did not write is written again, or the write fails."""
    data = torch.arange(100_000, dtype=torch.int32)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[: len(view) // 2 + 1], at))
    save_checkpoint({"w": data}, tmp_path / "model")
    assert torch.equal(load_tensors(tmp_path / "model")["w"], data)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match="No space left"):
        save_checkpoint({"w": data}, tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]


def test_defect_2_views_with_an_offset_come_back_right(tmp_path: Path) -> None:
    """It saves a view as its whole storage from byte 0, so a view with a non-zero storage offset restores wrong data."""
    base = torch.arange(10_000, dtype=torch.float32)
    views = {
        "tail": base[7_777:],
        "middle": base[5_000:5_010],
        "transposed": base[100:200].view(10, 10).t(),
        "strided": base[1::3],
        "diagonal": base[:100].view(10, 10).diagonal(),
        "one": base[9_999],
    }
    for name, view in views.items():  # alone, where nothing else keeps the start of the storage
        save_checkpoint({name: view}, tmp_path / name)
        assert torch.equal(load_tensors(tmp_path / name)[name], view), name
    save_checkpoint(views, tmp_path / "together")
    for name, found in load_tensors(tmp_path / "together").items():
        assert torch.equal(found, views[name]) and found.stride() == views[name].stride(), name


def test_defect_3_ties_across_devices_are_right_on_each(tmp_path: Path) -> None:
    """Tied tensors that its device map splits get the offset of the other device's partition. Here a storage has one
    place in the files, and a load to two devices gives each the right bytes."""
    tied = torch.randn(300, 64)
    state = {"embed.weight": tied, "layers.0.w": torch.randn(128, 64), "layers.1.w": torch.randn(64, 3), "head.weight": tied, "head.t": tied.t()}
    checkpoint = save_checkpoint(state, tmp_path / "model", options=WriteOptions(device_map={"embed": 0, "layers": 1, "head": 1}))
    assert {entry.device for entry in checkpoint.index.partitions} == {0, 1}
    places = {(tensor.partition, tensor.offset) for tensor in checkpoint.index.tensors if tensor.name in ("embed.weight", "head.weight")}
    assert len(places) == 1
    runtime = RecordingRuntime(devices=2)
    targets: tuple[str | dict[str, str | Device], ...] = ("cpu", {"": "cpu", "head": runtime.device(1)}, {"embed": runtime.device(0), "layers": runtime.device(1), "head": runtime.device(1)})
    for target in targets:
        found = load_tensors(checkpoint, target, options=COLD)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor), name


def test_defect_4_padding_is_zeros(tmp_path: Path) -> None:
    """Its padding is uninitialised heap: the same model gives other bytes each time, and other people's bytes travel."""
    # One thread, so that each file is written from memory that held the one before it.
    state = {f"layers.{number}.w": torch.full((1 + 97 * number,), 255, dtype=torch.uint8) for number in range(60)}
    files = []
    for name in ("one", "two"):
        checkpoint = save_checkpoint(state, tmp_path / name, options=WriteOptions(partition_nbytes=20_000, threads=1))
        assert len(checkpoint.index.partitions) > 5
        for number, partition in enumerate(checkpoint.index.partitions):
            content = bytearray((tmp_path / name / partition.file).read_bytes())
            for tensor in checkpoint.index.tensors:
                if tensor.partition == number:
                    assert content[tensor.offset : tensor.offset + tensor.nbytes] == b"\xff" * tensor.nbytes
                    content[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
            assert not any(content), f"{partition.file} holds bytes that belong to no tensor"
        files.append({file: (tmp_path / name / file).read_bytes() for file in os.listdir(tmp_path / name)})
    assert files[0] == files[1], "the same tensors give the same files"


def test_defect_5_magic_version_checksum_and_atomic_rename(tmp_path: Path) -> None:
    """Its index has no magic, version or checksum, and a writer that is stopped leaves half a checkpoint under the
    final name."""
    class Stop(Exception):
        pass

    def stop(_: object) -> None:
        assert os.listdir(tmp_path) != [] and not (tmp_path / "model").exists(), "nothing is visible before the end"
        raise Stop

    with pytest.raises(Stop):
        save_checkpoint({"w": torch.ones(1000)}, tmp_path / "model", progress=stop)
    assert os.listdir(tmp_path) == []
    save_checkpoint({"w": torch.ones(1000)}, tmp_path / "model")
    raw = (tmp_path / "model" / "index.json").read_text()
    assert json.loads(raw).keys() == {"magic", "version", "digest", "body"}
    for old, new in (("sllm-mini-checkpoint", "sllm-mini-checkpoinT"), ('"version":1', '"version":2'), ('"shape":[1000]', '"shape":[1001]')):
        assert old in raw
        (tmp_path / "model" / "index.json").write_text(raw.replace(old, new))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load_tensors(tmp_path / "model")
    (tmp_path / "model" / "index.json").write_text(raw)
    with open(tmp_path / "model" / "data-00000.bin", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(IntegrityError, match=r"data-00000\.bin at byte 0"):
        load_tensors(tmp_path / "model")


def test_defect_6_every_dtype_of_torch_is_saved(tmp_path: Path) -> None:
    """It knows nine dtypes: neither bool nor fp8 nor complex."""
    bits = torch.arange(64, dtype=torch.uint8)
    kinds = {name: getattr(torch, name) for name in ITEM_NBYTES if isinstance(getattr(torch, name, None), torch.dtype)}
    assert {"bool", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "bfloat16", "uint16"} <= kinds.keys()
    state = {name: (bits % 2 if name == "bool" else bits).view(dtype) for name, dtype in kinds.items()}
    save_checkpoint(state, tmp_path / "model")
    found = load_tensors(tmp_path / "model")
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def _large(path: Path) -> Path:
    state = {f"layers.{number}.w": torch.randint(0, 256, (3 << 20,), dtype=torch.uint8) for number in range(4)}
    return save_checkpoint(state, path, options=WriteOptions(partition_nbytes=7 << 20)).path


def _fail_read(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    real, calls = os.preadv, iter(range(10_000))

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if next(calls) == position:
            time.sleep(0.03)  # a disk that fails takes its time, in which the other readers run out of slots
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def test_defect_7_a_failed_load_never_reports_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its asynchronous loads discard the error and answer that the model is loaded."""
    path = _large(tmp_path / "model")
    _fail_read(monkeypatch, 3)
    handle = start_load(path, options=COLD)
    for use in (handle.wait, handle.wait, lambda: handle.wait_for("layers.3"), lambda: handle.ready("layers.3.w"), lambda: handle.tensors):
        with pytest.raises(LoadError, match="Input/output error"):
            use()
    assert handle.done and handle.progress.fraction < 1


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.timeout(30)
def test_defect_8_a_read_error_does_not_stop_the_pipeline_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int, threads: int) -> None:
    """A disk read error deadlocks its pipeline: the copying thread waits for a chunk that never comes. The ring has one
    slot here, so that readers wait for each other's copies when the error strikes."""
    path = _large(tmp_path / "model")
    _fail_read(monkeypatch, position)
    runtime = RecordingRuntime()
    options = LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=threads, ring_chunks=1, use_cached=False)
    with pytest.raises(LoadError, match="Input/output error"):
        load_tensors(path, runtime.device(), options=options)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm-")]


def test_defect_9_a_cancelled_load_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It marks a cancelled worker's model as loaded."""
    path = _large(tmp_path / "model")
    real, started, release = os.preadv, threading.Event(), threading.Event()

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        started.set()
        release.wait(20)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", slow)
    handle = start_load(path, options=COLD)
    assert started.wait(20)
    threading.Timer(0.05, release.set).start()
    handle.cancel()
    assert handle.done and handle.progress.fraction < 1
    with pytest.raises(LoadCancelled):
        handle.wait()
    with pytest.raises(LoadCancelled):
        handle.ready("layers.3.w")


def test_defect_10_a_model_need_not_fit_the_pool(tmp_path: Path) -> None:
    """Its whole model must fit into the pool of pinned memory. Here two chunks carry a model of any size."""
    path = _large(tmp_path / "model")
    runtime = RecordingRuntime()
    found = load_tensors(path, runtime.device(), options=COLD)
    assert open_checkpoint(path).nbytes >= 6 * CHUNK_NBYTES
    digests_nbytes = CHUNK_NBYTES // 8192  # 8 bytes per 64 KiB
    assert 0 < runtime.peak_pinned_nbytes <= 2 * (CHUNK_NBYTES + digests_nbytes)
    expected = load_tensors(path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_defect_11_copies_to_a_gpu_are_asynchronous_on_a_stream(tmp_path: Path) -> None:
    """It calls cudaMemcpy, which waits, and never uses the streams it makes."""
    runtime = RecordingRuntime()
    load_tensors(_large(tmp_path / "model"), runtime.device(), options=COLD)
    names = runtime.names()
    assert names.count("memcpyAsync") >= 6 and "memcpy" not in names and "deviceSynchronize" not in names
    assert runtime.pageable_copies == 0, "a copy from memory that is not pinned waits, whatever it is called"


def test_defect_15_direct_reads_stay_aligned_after_a_partition_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a partition whose size is no multiple of the block, its O_DIRECT reads are misaligned. Offset, length and
    address of every direct read here are whole blocks, and none is refused."""
    state = {f"layers.{number}.w": torch.randint(0, 256, (n,), dtype=torch.uint8) for number, n in enumerate((1, 4097, 100_003, 2_097_151, 5_000_011))}
    path = save_checkpoint(state, tmp_path / "model", options=WriteOptions(partition_nbytes=1)).path
    real, direct_reads, lock = os.preadv, [], threading.Lock()

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            address = torch.frombuffer(views[0], dtype=torch.uint8).data_ptr()
            with lock:
                direct_reads.append((offset, len(views[0]), address))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for names in (None, ["layers.1.w", "layers.3.w"], ["layers.4.w"]):
        for verify in (True, False):
            handle = start_load(path, names=names, verify=verify, options=COLD)
            for name, tensor in handle.wait().items():
                assert torch.equal(tensor, state[name]), name
            if handle.report.fallback and not direct_reads:
                pytest.skip(f"the file system of the tests has no direct reads: {handle.report.fallback}")
            assert handle.report.fallback is None
    assert direct_reads
    for read in direct_reads:
        assert all(number % BLOCK_NBYTES == 0 for number in read), read


def test_a_converted_model_has_none_of_them_either(tmp_path: Path) -> None:
    """The converter goes another way than `save_checkpoint` (from files, slab by slab); its result holds the same bytes."""
    from safetensors.torch import save_file

    state = {"embed.weight": torch.randn(33, 7), "layers.0.w": torch.randint(0, 256, (2_097_153,), dtype=torch.uint8), "flag": torch.tensor(True), "none": torch.empty(0, 3)}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    convert_checkpoint(tmp_path / "source", tmp_path / "model", options=WriteOptions(partition_nbytes=1000))
    verify_checkpoint(tmp_path / "model")
    found = load_tensors(tmp_path / "model", options=COLD)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
