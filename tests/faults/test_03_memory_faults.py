"""Chapters 03 and 05: shared memory on a machine that fails. Killed clients and stores, descriptors that lie, no memory,
no descriptors, no addresses, damaged bytes, a GPU that is lost: one typed error, and nothing that anybody still holds."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from store_process import eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint, save_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.device.cuda_runtime import OUT_OF_MEMORY
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import DeviceError, IntegrityError, LoadError, OutOfMemoryError, SllmError, UnsupportedError
from sllm_mini.loading import ChunkPool, LoadOptions
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.pipeline import Pipeline
from sllm_mini.loading.plan import plan_load
from sllm_mini.storage import shared_chunk, stock
from sllm_mini.storage.chunks import FromChunks, IntoChunks
from sllm_mini.storage.mapping import AddressRange, MappedImage
from sllm_mini.storage.memory import SharedPool
from sllm_mini.storage.shared_chunk import SharedChunk

from .tools import in_child, large_tensors, nothing_left, refused, start_child, wait_for

pytestmark = pytest.mark.timeout(120)
SMALL = 2 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    with nothing_left(maps=False):
        yield
        gc.collect()
    assert not holders(), "somebody still maps a chunk"


def holders(inodes: set[int] | None = None) -> set[str]:
    """Processes that map shared chunks (these, by inode) or hold a descriptor of one; what nobody holds, the kernel frees."""
    found = set()
    for process in (entry for entry in os.listdir("/proc") if entry.isdigit()) if inodes is not None else ("self",):
        try:
            for line in Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines():
                if "memfd:sllm-chunk" in line and (inodes is None or int(line.split()[4]) in inodes):
                    found.add(f"{process} maps")
            for fd in os.listdir(f"/proc/{process}/fd"):
                link = f"/proc/{process}/fd/{fd}"
                if "memfd:sllm-chunk" in os.readlink(link) and (inodes is None or os.stat(link).st_ino in inodes):
                    found.add(f"{process} holds")
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
    return found


def shmem_nbytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("Shmem:")[1].split()[0]) * 1024


# Processes that die


def test_a_killed_client_leaves_the_memory_as_the_store_counts_it() -> None:
    size, count = 8 * SMALL, 4
    before = shmem_nbytes()
    with SharedPool(count * size, size) as pool:
        chunks = [pool.take() for _ in range(count)]
        for chunk in chunks:
            chunk.view[:] = b"\7" * size
            chunk.lent = True
        inodes = {os.fstat(chunk.fd).st_ino for chunk in chunks}
        ready = os.pipe()

        def client() -> None:
            image = MappedImage([os.dup(chunk.fd) for chunk in chunks], size, count * size)
            image.view[::PAGE] = b"\1" * (count * size // PAGE)  # every page has a private copy
            os.write(ready[1], b"x")
            time.sleep(60)

        child = start_child(client)
        assert os.read(ready[0], 1) == b"x"
        os.kill(child, signal.SIGKILL)
        assert wait_for(child) == -signal.SIGKILL
        assert holders(inodes) == {f"{os.getpid()} maps", f"{os.getpid()} holds"}, "the kernel took back what it had"
        assert pool.kernel_nbytes() == pool.used_nbytes == count * size
        assert all(bytes(chunk.view) == b"\7" * size for chunk in chunks)
        assert shmem_nbytes() - before > count * size // 2
        for chunk in chunks:
            pool.give(chunk)
        assert pool.kernel_nbytes() == pool.used_nbytes == 0 and holders(inodes) == set()
        deadline = time.monotonic() + 20
        while shmem_nbytes() - before > count * size // 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # others on this machine use shared memory too
        assert shmem_nbytes() - before < count * size // 2
        again = pool.take()
        assert not any(again.view[:PAGE])
        pool.give(again)
    for fd in ready:
        os.close(fd)


def test_a_killed_store_leaves_its_clients_what_they_have() -> None:
    here, there = socket.socketpair()

    def store() -> None:
        here.close()
        with SharedPool(2 * SMALL, SMALL) as pool:
            chunks = [pool.take(), pool.take()]
            for number, chunk in enumerate(chunks):
                chunk.view[:] = bytes([number + 1]) * SMALL
                chunk.lent = True
            socket.send_fds(there, [b"x"], [chunk.fd for chunk in chunks])
            time.sleep(60)

    child = start_child(store)
    there.close()
    _, fds, _, _ = socket.recv_fds(here, 1, 2)
    told: list[int] = []
    image = MappedImage(fds, SMALL, 2 * SMALL, on_unmap=lambda: told.append(1))
    inodes = {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines() if "sllm-chunk" in line}
    assert len(inodes) == 2
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL
    assert bytes(image.view) == b"\1" * SMALL + b"\2" * SMALL, "also the pages that it had not touched yet"
    assert holders(inodes) == {f"{os.getpid()} maps"}
    image.close()
    assert told == [1] and holders(inodes) == set()
    here.close()


# Descriptors that are not what they should be


def sealed(nbytes: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def plain_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(SMALL)
        return os.dup(file.fileno())


@pytest.mark.parametrize(
    ("make", "chunk_nbytes", "nbytes", "says"),
    [
        (lambda: [sealed(SMALL)], SMALL, 2 * SMALL, "1 chunks"),
        (lambda: [sealed(SMALL)] * 1 + [sealed(SMALL)], SMALL, SMALL, "2 chunks"),
        (lambda: [], SMALL, 1, "0 chunks"),
        (lambda: [sealed(SMALL)], SMALL + 1, SMALL, "chunks of"),
        (lambda: [sealed(SMALL)], 0, SMALL, "chunks of 0"),
        (lambda: [sealed(SMALL)], -SMALL, SMALL, "chunks of"),
        (lambda: [sealed(SMALL), sealed(SMALL - PAGE)], SMALL, 2 * SMALL, "descriptor 1"),
        (lambda: [sealed(SMALL, 0)], SMALL, SMALL, "no sealed chunk"),
        (lambda: [plain_file()], SMALL, SMALL, "no sealed chunk"),
        (lambda: [os.open("/dev/null", os.O_RDWR)], SMALL, SMALL, "no sealed chunk"),
        (lambda: [os.open("/", os.O_RDONLY)], SMALL, SMALL, "no sealed chunk"),
        (lambda: list(os.pipe()), SMALL, 2 * SMALL, "no sealed chunk"),
    ],
)
def test_descriptors_that_hold_no_image_are_refused_and_closed(make: Callable[[], list[int]], chunk_nbytes: int, nbytes: int, says: str) -> None:
    told: list[int] = []
    with refused(DeviceError, None, says, "ask the store"):
        MappedImage(make(), chunk_nbytes, nbytes, on_unmap=lambda: told.append(1))
    gc.collect()
    assert told == [], "what was never mapped was not unmapped"


def test_an_image_of_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        MappedImage([], SMALL, -1)


def test_a_failing_map_leaves_no_part_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    real = AddressRange.map

    def map_one(self: AddressRange, offset: int, fd: int, nbytes: int, *, shared: bool) -> None:
        if offset and not shared:
            raise OutOfMemoryError("no more maps")
        real(self, offset, fd, nbytes, shared=shared)

    monkeypatch.setattr(AddressRange, "map", map_one)
    with SharedPool(2 * SMALL, SMALL) as pool:
        chunks = [pool.take(), pool.take()]
        with refused(OutOfMemoryError, None, "no more maps"):
            MappedImage([os.dup(chunk.fd) for chunk in chunks], SMALL, 2 * SMALL)
        for chunk in chunks:
            pool.give(chunk)


def test_memory_that_was_closed_says_so() -> None:
    chunk = SharedChunk(SMALL)
    chunk.back()
    fd = os.dup(chunk.fd)
    chunk.close()
    image = MappedImage([fd], SMALL, 10)
    image.close()
    for use in (lambda: chunk.view, lambda: chunk.address, chunk.tensor, lambda: image.view, image.tensor, image.populate_read):
        with pytest.raises(DeviceError, match="closed"):
            use()


# Limits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"budget_nbytes": SMALL - 1}, "smaller than one chunk"),
        ({"budget_nbytes": 0}, "smaller than one chunk"),
        ({"budget_nbytes": -(2**40)}, "smaller than one chunk"),
        ({"budget_nbytes": 3 * SMALL, "chunk_nbytes": 4 * SMALL}, "smaller than one chunk"),
        ({"budget_nbytes": 3 * SMALL, "chunk_nbytes": SMALL + 4096}, "positive multiple"),
        ({"budget_nbytes": 3 * SMALL, "chunk_nbytes": 0}, "positive multiple"),
        ({"budget_nbytes": 3 * SMALL, "huge_pages": "always"}, "huge_pages is 'always'"),
        ({"budget_nbytes": 3 * SMALL, "backed_nbytes": 3 * SMALL + 1}, "back at most the budget"),
        ({"budget_nbytes": 3 * SMALL, "backed_nbytes": -1}, "back at most the budget"),
    ],
)
def test_a_pool_that_can_hold_nothing_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SharedPool(**arguments)


def test_the_last_bytes_go_to_one_of_two_and_the_next_request_works() -> None:
    with SharedPool(3 * SMALL - 1, SMALL) as pool:
        first, second = pool.take(), pool.take()
        with refused(OutOfMemoryError, None, "evict a model"):
            pool.take()
        assert pool.used_nbytes == 2 * SMALL and pool.kernel_nbytes() == 2 * SMALL
        pool.give(first)
        assert pool.take() is first
        pool.give(first)
        pool.give(second)
        pool.close()
        with refused(DeviceError, None, "closed"):
            pool.take()


def test_a_host_without_memory_is_asked_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedPool(4 * SMALL, SMALL) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(shared_chunk, "available_nbytes", lambda: SMALL - 1)
            with refused(OutOfMemoryError, None, "free"):
                pool.take()
            unbacked = pool.take(back=False)
            with refused(OutOfMemoryError, None, "free"):
                unbacked.back()
        assert pool.used_nbytes == SMALL and pool.kernel_nbytes() == 0
        unbacked.back()
        pool.give(unbacked)


def test_memory_that_a_stock_is_refused_is_told_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "RETRY_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(shared_chunk, "available_nbytes", lambda: SMALL - 1)
        with SharedPool(2 * SMALL, SMALL, backed_nbytes=2 * SMALL) as pool:
            eventually(lambda: pool.trouble)
            assert "the host has 2,097,151 bytes free" in pool.trouble and pool.ready_nbytes == 0 == pool.used_nbytes == pool.kernel_nbytes()
            with refused(OutOfMemoryError, None, "free"):
                pool.take()
            patch.undo()
            eventually(lambda: pool.ready_nbytes == 2 * SMALL)
            eventually(lambda: pool.trouble == "")
            pool.give(pool.take())


def test_without_a_thread_no_stock_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with refused(OutOfMemoryError, None, "can't start new thread", "or back none"):
        SharedPool(2 * SMALL, SMALL, backed_nbytes=SMALL)


def test_too_few_descriptors_are_said() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with SharedPool(4 * SMALL, SMALL) as pool:
        taken = pool.take()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")), hard))
        spare = []
        try:
            with pytest.raises(OSError) as full:
                while True:
                    spare.append(os.dup(0))
            assert full.value.errno == errno.EMFILE
            with pytest.raises(OutOfMemoryError, match="ulimit -n"):
                pool.take()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        assert pool.used_nbytes == SMALL
        other = pool.take()
        pool.give(taken)
        pool.give(other)


def test_too_few_addresses_are_said() -> None:
    def child() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * SMALL, resource.RLIM_INFINITY))
        with pytest.raises(OutOfMemoryError, match="bytes of addresses"):
            AddressRange(64 * SMALL)
        AddressRange(SMALL).close()

    assert in_child(child) == 0


def test_a_kernel_that_cannot_seal_is_not_trusted_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> object:
        if command == fcntl.F_ADD_SEALS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    with SharedPool(SMALL, SMALL) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "fcntl", refuse)
            with refused(UnsupportedError, None, "cannot seal", "Linux 5.1"):
                pool.take()
        pool.give(pool.take())


# Loads into chunks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = save_checkpoint(large_tensors(), tmp_path_factory.mktemp("m") / "m", options=WriteOptions(partition_nbytes=6_000_000))
    starts = [sum(entry.nbytes for entry in made.index.partitions[:number]) for number in range(len(made.index.partitions))]
    assert any(start % SMALL for start in starts), "hash chunks lie in two chunks of memory"
    return made


def load_into(shared: list[SharedChunk], checkpoint: Checkpoint) -> BaseException | None:
    options = LoadOptions(chunk_nbytes=2 * CHUNK_NBYTES, threads=2)
    plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=options.chunk_nbytes, granule=CHUNK_NBYTES)
    ended: list[BaseException | None] = []
    flow = Flow(checkpoint.index, options, verify=True, recorder=None, on_chunk=lambda _: None)
    pipeline = Pipeline(checkpoint, plan, flow, ended.append)
    pipeline.start(lambda flow, readers: [IntoChunks(flow, shared, plan.chunks, readers)])
    pipeline.join()
    [error] = ended
    return error


def test_any_flipped_byte_is_found_also_where_memory_is_cut(checkpoint: Checkpoint, tmp_path: Path) -> None:
    own = open_checkpoint(shutil.copytree(checkpoint.path, tmp_path / "m"))
    with SharedPool(16 * SMALL, SMALL) as pool:
        shared = [pool.take() for _ in range(-(-own.index.total_nbytes // SMALL))]
        start = 0
        for entry in own.index.partitions:
            file = own.path / entry.file
            cut = -start % SMALL  # the first border of two chunks of memory in this file
            for offset in sorted({0, max(cut - 1, 0), cut, entry.nbytes - 1}):
                original = file.read_bytes()
                damaged = bytearray(original)
                damaged[offset] ^= 0x10
                file.write_bytes(damaged)
                error = load_into(shared, own)
                assert isinstance(error, IntegrityError) and error.path == str(file) and error.offset == offset // CHUNK_NBYTES * CHUNK_NBYTES
                file.write_bytes(original)
            start += entry.nbytes
        assert load_into(shared, own) is None, "the next load into the same chunks works"
        for chunk in shared:
            pool.give(chunk)


def test_a_read_error_and_a_short_file_end_the_load(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = open_checkpoint(shutil.copytree(checkpoint.path, tmp_path / "m"))
    real = os.preadv
    with SharedPool(16 * SMALL, SMALL) as pool:
        shared = [pool.take(back=False) for _ in range(-(-own.index.total_nbytes // SMALL))]
        for answer in (OSError(errno.EIO, os.strerror(errno.EIO)), 0):

            def preadv(fd: int, views: list[memoryview], offset: int, answer: OSError | int = answer) -> int:
                if offset >= CHUNK_NBYTES:
                    if isinstance(answer, OSError):
                        raise answer
                    return answer
                return real(fd, views, offset)

            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", preadv)
                error = load_into(shared, own)
            assert isinstance(error, LoadError) and error.path is not None and "data-" in error.path
        assert load_into(shared, own) is None
        for chunk in shared:
            pool.give(chunk)


def test_no_memory_in_the_middle_of_a_load_ends_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedPool(16 * SMALL, SMALL) as pool:
        shared = [pool.take(back=False) for _ in range(-(-checkpoint.index.total_nbytes // SMALL))]
        with monkeypatch.context() as patch:
            patch.setattr(shared_chunk, "available_nbytes", lambda: 1 if sum(chunk.backed for chunk in shared) > 2 else 1 << 40)
            error = load_into(shared, checkpoint)
        assert isinstance(error, OutOfMemoryError) and pool.kernel_nbytes() < pool.used_nbytes
        assert load_into(shared, checkpoint) is None and pool.kernel_nbytes() == pool.used_nbytes
        with pytest.raises(ValueError, match="too few"):
            raise load_into(shared[:-1], checkpoint) or AssertionError("it was accepted")
        for chunk in shared:
            pool.give(chunk)


# GPUs


def test_memory_that_cannot_be_pinned_is_given_back() -> None:
    runtime = RecordingRuntime()
    with SharedPool(4 * SMALL, SMALL, runtime.device()) as pool:
        runtime.fail("hostRegister", nth=2, status=OUT_OF_MEMORY)
        first = pool.take()
        with refused(OutOfMemoryError, None, "could not pin"):
            pool.take()
        assert pool.used_nbytes == pool.kernel_nbytes() == SMALL
        second = pool.take()
        pool.give(first)
        pool.give(second)
    assert runtime.leaks() == {}


@pytest.mark.parametrize("later", [False, True], ids=["refused", "lost"])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "staged"])
def test_a_copy_that_fails_leaves_nothing_under_way(pinned: bool, later: bool) -> None:
    runtime = RecordingRuntime()
    device = runtime.device()
    with SharedPool(8 * SMALL, SMALL, device if pinned else None) as pool, ChunkPool(device, chunk_nbytes=SMALL, chunks=2) as slots:
        shared = [pool.take() for _ in range(5)]
        copier = FromChunks(device, slots)
        target = device.allocate(5 * SMALL)
        runtime.fail("memcpyAsync", nth=4, later=later)
        with pytest.raises(SllmError):
            copier.copy(shared, 5 * SMALL, target)
        assert slots.nbytes == (0 if pinned else 2 * SMALL), "the slots are back"
        if not later:
            for chunk in shared:  # they may be given to another model now
                chunk.view[:] = b"\xee" * SMALL
            device.synchronize()
            assert not (target.tensor()[: 3 * SMALL] == 0xEE).any(), "a copy was still under way"
            assert copier.copy(shared, 5 * SMALL, target) == 5 * SMALL, "the next copy works"
            copier.close()
        else:
            with pytest.raises(DeviceError):
                copier.close()
        target.close()
        for chunk in shared:
            pool.give(chunk)
    gc.collect()
    assert runtime.leaks() == {}


def test_a_target_too_small_for_an_image_is_refused() -> None:
    runtime = RecordingRuntime()
    with SharedPool(2 * SMALL, SMALL, runtime.device()) as pool:
        shared = [pool.take(), pool.take()]
        copier = FromChunks(runtime.device())
        target = runtime.device().allocate(2 * SMALL - 1)
        with refused(DeviceError, None, "outside the destination buffer"):
            copier.copy(shared, 2 * SMALL, target)
        with pytest.raises(ValueError, match="too few"):
            copier.copy(shared, 2 * SMALL + 1, target)
        copier.close()
        target.close()
        for chunk in shared:
            pool.give(chunk)
    assert runtime.leaks() == {}


def test_torch_cannot_be_led_out_of_an_image() -> None:
    with SharedPool(SMALL, SMALL) as pool:
        chunk = pool.take()
        image = MappedImage([os.dup(chunk.fd)], SMALL, 1000)
        tensor = image.tensor()
        assert tensor.numel() == 1000
        with pytest.raises(RuntimeError):
            torch.as_strided(tensor, (1001,), (1,))
        image.close()
        del tensor
        pool.give(chunk)
