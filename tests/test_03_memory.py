"""Chapters 03 and 05: memory that a store lends. Who may write it, who sees what, when it ends, what the kernel counts."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store_process import eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, save_checkpoint
from sllm_mini.checkpoint.hashing import CHUNK_NBYTES
from sllm_mini.device import get_device
from sllm_mini.device.base import Device, HostBuffer
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import OutOfMemoryError
from sllm_mini.loading import ChunkPool, LoadOptions
from sllm_mini.loading.flow import Flow
from sllm_mini.loading.pipeline import Pipeline
from sllm_mini.loading.plan import plan_load
from sllm_mini.loading.residency import drop_cached
from sllm_mini.storage import mapping
from sllm_mini.storage.chunks import FromChunks, IntoChunks, pieces_of
from sllm_mini.storage.mapping import AddressRange, MappedImage
from sllm_mini.storage.memory import SharedPool
from sllm_mini.storage.shared_chunk import SharedChunk

MIB = 1 << 20
SMALL = 2 * MIB
PAGE = mmap.PAGESIZE


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    threads, open_before = set(threading.enumerate()), len(descriptors())
    yield
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert len(descriptors()) == open_before, "descriptors are left"
    assert not chunk_maps(), "chunks are still mapped"


def start_child(work: Callable[[], object]) -> int:
    """The process id of a forked process that does `work`, without torch: its threads do not survive a fork."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a child ends here, whatever happened
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def chunk_maps(pid: int | str = "self") -> list[str]:
    """The mappings of shared chunks in a process."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines() if "sllm-chunk" in line]


def smaps(name: str, address: int) -> int:
    """A figure of /proc/self/smaps for the mapping that starts at an address, in bytes."""
    text = Path("/proc/self/smaps").read_text(errors="replace")
    inside = text.split(f"\n{address:x}-", 1)[1].split(f"\n{name}:", 1)[1]
    return int(inside.split()[0]) * 1024


def filled(pool: SharedPool, *bytes_of: int) -> list[SharedChunk]:
    """Chunks of the pool, each full of one byte value."""
    chunks = [pool.take() for _ in bytes_of]
    for chunk, value in zip(chunks, bytes_of, strict=True):
        chunk.view[:] = bytes([value]) * chunk.nbytes
    return chunks


def attach(chunks: list[SharedChunk], nbytes: int | None = None, on_unmap: Callable[[], object] | None = None) -> MappedImage:
    """What a client does with descriptors that it got."""
    for chunk in chunks:
        chunk.lent = True
    size = chunks[0].nbytes
    return MappedImage([os.dup(chunk.fd) for chunk in chunks], size, len(chunks) * size if nbytes is None else nbytes, on_unmap=on_unmap)


# Chunks


def test_a_second_process_can_read_a_chunk_and_nothing_else() -> None:
    with SharedPool(SMALL) as pool:
        [chunk] = filled(pool, 7)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        libc.mmap.restype = ctypes.c_void_p
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)

        def attack() -> None:
            fd = os.dup(chunk.fd)
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            attempts: list[Callable[[], object]] = [
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.pwrite(again, b"x", 0),
                lambda: os.ftruncate(again, 0),
                lambda: os.ftruncate(again, 2 * SMALL),
                lambda: os.truncate(f"/proc/self/fd/{fd}", 0),
                lambda: mmap.mmap(again, SMALL),
                lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            ]
            for attempt in attempts:
                with pytest.raises(PermissionError):
                    attempt()
            assert libc.fallocate(again, 3, 0, PAGE) == -1, "no hole can be made"
            address = libc.mmap(None, SMALL, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            assert ctypes.string_at(address, SMALL) == bytes([7]) * SMALL
            assert libc.mprotect(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == -1, "reading cannot become writing"
            assert libc.madvise(address, PAGE, 9) == -1, "nor can MADV_REMOVE make a hole"

        assert wait_for(start_child(attack)) == 0
        assert bytes(chunk.view) == bytes([7]) * SMALL
        chunk.view[3] = 9
        assert os.pread(chunk.fd, 5, 0) == bytes([7, 7, 7, 9, 7]), "the store can write, through its own mapping"
        pool.give(chunk)


def test_a_chunk_is_a_host_buffer_on_a_huge_page_boundary() -> None:
    chunk = SharedChunk(2 * SMALL)
    assert isinstance(chunk, HostBuffer) and not chunk.pinned and not chunk.backed
    assert chunk.address % SMALL == 0 and len(chunk.view) == 2 * SMALL and chunk.kernel_nbytes() == 0 == chunk.page_nbytes()
    chunk.back()
    assert chunk.kernel_nbytes() == 2 * SMALL and chunk.page_nbytes() in (PAGE, SMALL) and smaps("Rss", chunk.address) == 2 * SMALL
    tensor = chunk.tensor()
    chunk.view[5] = 3
    assert tensor[5] == 3
    chunk.close()
    chunk.close()
    tensor[5] = 4  # still memory
    assert len(chunk_maps()) == 1


def test_direct_reads_go_into_chunks(tmp_path: Path) -> None:
    content = os.urandom(SMALL)
    (tmp_path / "file").write_bytes(content)
    try:
        fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"direct I/O is refused here ({error.strerror})")
    with SharedPool(SMALL) as pool:
        chunk = pool.take()
        assert os.preadv(fd, [chunk.view], 0) == SMALL
        assert chunk.view == content
        pool.give(chunk)
    os.close(fd)


# The pool


def test_the_pool_counts_as_the_kernel_does() -> None:
    with SharedPool(5 * SMALL + 1, SMALL) as pool:
        assert (pool.used_nbytes, pool.free_nbytes, pool.kernel_nbytes()) == (0, 5 * SMALL, 0)
        chunks = [pool.take() for _ in range(3)]
        assert (pool.used_nbytes, pool.free_nbytes, pool.kernel_nbytes()) == (3 * SMALL, 2 * SMALL, 3 * SMALL)
        assert sum(smaps("Rss", chunk.address) for chunk in chunks) == 3 * SMALL
        unbacked = pool.take(back=False)
        assert (pool.used_nbytes, pool.kernel_nbytes()) == (4 * SMALL, 3 * SMALL)
        unbacked.back()
        unbacked.back()
        assert pool.kernel_nbytes() == 4 * SMALL
        chunks[0].lent = True
        pool.give(chunks[0])
        assert (pool.used_nbytes, pool.kernel_nbytes()) == (3 * SMALL, 3 * SMALL), "freed: it was lent"
        pool.give(chunks[1])
        assert (pool.used_nbytes, pool.kernel_nbytes()) == (2 * SMALL, 3 * SMALL), "kept"
        with pytest.raises(ValueError, match="not taken"):
            pool.give(chunks[1])
        pool.close()
        assert (pool.used_nbytes, pool.kernel_nbytes()) == (2 * SMALL, 2 * SMALL)
        pool.give(chunks[2])
        pool.give(unbacked)
        assert (pool.used_nbytes, pool.kernel_nbytes()) == (0, 0)


def test_only_a_chunk_that_was_never_lent_is_used_again() -> None:
    with SharedPool(2 * SMALL, SMALL) as pool:
        [kept, lent] = filled(pool, 1, 2)
        image = attach([lent])
        pool.give(kept)
        pool.give(lent)
        again, fresh = pool.take(), pool.take()
        assert again is kept and not again.fresh
        assert fresh is not lent and fresh.fresh and not any(fresh.view), "new memory is zero"
        fresh.view[:] = bytes([3]) * SMALL
        assert image.view == bytes([2]) * SMALL, "a late reader still sees what it was given"
        image.close()
        pool.give(again)
        pool.give(fresh)


def test_what_has_its_memory_is_taken_first() -> None:
    with SharedPool(2 * SMALL, SMALL) as pool:
        backed, bare = pool.take(), pool.take(back=False)
        pool.give(backed)
        pool.give(bare)
        assert pool.ready_nbytes == SMALL and [pool.take(back=False), pool.take(back=False)] == [backed, bare]
        pool.give(bare)
        pool.give(backed)
        assert pool.take(back=False) is backed
        pool.give(backed)


def test_the_default_chunk_makes_128_to_256_of_a_budget() -> None:
    for budget in (SMALL, 300 * MIB, 512 * MIB - 1, 512 * MIB, 10**10, 2**34, 3 * 2**34, 2**40):
        chunk = SharedPool(budget).chunk_nbytes
        assert chunk & (chunk - 1) == 0 and SMALL <= chunk <= 256 * MIB
        assert chunk in (SMALL, 256 * MIB) or 128 <= budget // chunk <= 256


def test_two_threads_never_get_the_same_chunk_nor_more_than_the_budget() -> None:
    with SharedPool(8 * SMALL, SMALL) as pool:
        pool.fill()
        assert pool.kernel_nbytes() == 8 * SMALL and pool.used_nbytes == 0
        refused: list[int] = []

        def work(value: int) -> None:
            for _ in range(40):
                chunks: list[SharedChunk] = []
                try:
                    for _ in range(4):
                        chunks.append(pool.take())
                        chunks[-1].view[:64] = bytes([value]) * 64
                except OutOfMemoryError:
                    refused.append(value)
                time.sleep(0.0005)
                for chunk in chunks:
                    assert bytes(chunk.view[:64]) == bytes([value]) * 64
                    pool.give(chunk)

        errors: list[BaseException] = []

        def guarded(value: int) -> None:
            try:
                work(value)
            except BaseException as error:  # noqa: BLE001 - it is raised below
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(value,)) for value in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and refused and pool.used_nbytes == 0 and pool.kernel_nbytes() == 8 * SMALL


# The stock: memory backed ahead of need


def ready(pool: SharedPool, nbytes: int) -> bool:
    """Waits until the stock has made this much ready."""
    eventually(lambda: pool.ready_nbytes >= nbytes)
    return pool.ready_nbytes == nbytes


@pytest.mark.parametrize(("backed", "chunks"), [(1, 1), (2 * SMALL, 2), (2 * SMALL + 1, 3), (5 * SMALL + 1, 5)])
def test_a_stock_backs_what_was_asked_for_and_nobody_uses_it(backed: int, chunks: int) -> None:
    with SharedPool(5 * SMALL + 1, SMALL, backed_nbytes=backed) as pool:
        assert ready(pool, chunks * SMALL)
        assert (pool.used_nbytes, pool.free_nbytes, pool.kernel_nbytes(), pool.trouble) == (0, 5 * SMALL, chunks * SMALL, "")
        time.sleep(0.3)
        assert pool.kernel_nbytes() == chunks * SMALL
        taken = [pool.take(back=False) for _ in range(5)]
        assert [chunk.backed for chunk in taken] == [True] * chunks + [False] * (5 - chunks), "what is ready goes first"
        assert all(chunk.fresh and not any(chunk.view) for chunk in taken)
        for chunk in taken:
            pool.give(chunk)


def test_a_stock_replaces_what_was_lent_within_the_budget() -> None:
    with SharedPool(4 * SMALL, SMALL, backed_nbytes=3 * SMALL) as pool:
        most: list[int] = []
        for _ in range(3):
            chunks = filled(pool, 1, 2, 3)
            image = attach(chunks)
            time.sleep(0.3)
            most.append(pool.used_nbytes + pool.ready_nbytes)
            assert ready(pool, SMALL), "no more has room beside what is taken"
            image.close()
            for chunk in chunks:
                pool.give(chunk)
            assert ready(pool, 3 * SMALL) and pool.kernel_nbytes() == 3 * SMALL and pool.used_nbytes == 0
        assert max(most) <= 4 * SMALL


def test_a_stock_waits_until_nothing_is_taken_and_nobody_moves_bytes() -> None:
    moving = threading.Event()
    with SharedPool(8 * SMALL, SMALL, backed_nbytes=4 * SMALL, busy=moving.is_set) as pool:
        assert ready(pool, 4 * SMALL)
        moving.set()
        taken = [pool.take() for _ in range(4)]
        time.sleep(0.4)
        assert pool.ready_nbytes == 0, "somebody moves bytes"
        moving.clear()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pool.give(taken.pop())
            taken.append(pool.take())
            assert pool.ready_nbytes == 0, "chunks are taken all the time"
            time.sleep(0.002)
        assert ready(pool, 4 * SMALL)
        for chunk in taken:
            pool.give(chunk)


def test_whoever_takes_a_chunk_that_is_being_backed_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun, go_on = AddressRange.populate, threading.Event(), threading.Event()

    def slowly(self: AddressRange, offset: int, nbytes: int, *, write: bool) -> None:
        begun.set()
        assert go_on.wait(10)
        real(self, offset, nbytes, write=write)

    monkeypatch.setattr(AddressRange, "populate", slowly)
    with SharedPool(SMALL, SMALL, backed_nbytes=SMALL) as pool:
        assert begun.wait(10)
        [chunk] = [pool.take(back=False)]  # the budget's only one
        assert not chunk.backed and pool.used_nbytes == SMALL
        chunk.lent = True
        giving = threading.Thread(target=pool.give, args=(chunk,))  # waits: its memory is not taken away under the stock
        giving.start()
        giving.join(0.1)
        assert giving.is_alive()
        go_on.set()
        giving.join(10)
        assert not giving.is_alive() and ready(pool, SMALL) and pool.trouble == ""


def test_closing_does_not_wait_for_all_that_is_to_be_backed(monkeypatch: pytest.MonkeyPatch) -> None:
    real, backed = AddressRange.populate, []

    def slowly(self: AddressRange, offset: int, nbytes: int, *, write: bool) -> None:
        time.sleep(0.05)
        backed.append(self)
        real(self, offset, nbytes, write=write)

    monkeypatch.setattr(AddressRange, "populate", slowly)
    pool = SharedPool(64 * SMALL, SMALL, backed_nbytes=64 * SMALL)
    eventually(lambda: len(backed) > 1)
    pool.close()
    count = len(backed)
    assert count < 30 and not [thread for thread in threading.enumerate() if thread.name == "sllm-stock"]
    time.sleep(0.1)
    assert len(backed) == count and pool.kernel_nbytes() == 0
    pool.close()
    backed.clear()


def test_a_stock_pins_for_a_gpu() -> None:
    runtime = RecordingRuntime(devices=1)
    with SharedPool(2 * SMALL, SMALL, runtime.device(), backed_nbytes=SMALL) as pool:
        assert ready(pool, SMALL)
        chunk = pool.take(back=False)
        assert chunk.pinned
        pool.give(chunk)
    assert runtime.leaks() == {}


# Images


def test_a_write_stays_with_the_process_that_wrote() -> None:
    with SharedPool(2 * SMALL, SMALL) as pool:
        chunks = filled(pool, 1, 2)
        ask, answer = os.pipe(), os.pipe()

        def other() -> None:
            image = attach(chunks)
            assert image.view[0] == 1 and image.view[SMALL] == 2
            image.view[0] = image.view[SMALL + PAGE] = 99
            assert smaps("Anonymous", image.address) == PAGE, "one page was copied, in each chunk"
            os.write(answer[1], b"written")
            assert os.read(ask[0], 10) == b"go on"
            assert image.view[0] == 99 and image.view[SMALL + PAGE] == 99
            assert image.view[PAGE] == 55, "pages that it has not written are still shared"

        child = start_child(other)
        assert os.read(answer[0], 10) == b"written"
        mine = attach(chunks)
        assert mine.view == bytes([1]) * SMALL + bytes([2]) * SMALL
        assert bytes(chunks[0].view) == bytes([1]) * SMALL
        chunks[0].view[PAGE] = 55
        assert mine.view[PAGE] == 55 and smaps("Anonymous", mine.address) == 0, "nothing was copied here"
        os.write(ask[1], b"go on")
        assert wait_for(child) == 0
        assert mine.view[0] == 1
        mine.close()
        for fd in (*ask, *answer):
            os.close(fd)
        for chunk in chunks:
            pool.give(chunk)


def test_an_image_is_one_range_over_many_chunks() -> None:
    with SharedPool(3 * SMALL, SMALL) as pool:
        chunks = filled(pool, 1, 2, 3)
        nbytes = 2 * SMALL + 5000
        image = attach(chunks, nbytes)
        assert isinstance(image, HostBuffer) and image.nbytes == nbytes == len(image.view) == image.tensor().numel()
        assert bytes(image.view) == (bytes([1]) * SMALL + bytes([2]) * SMALL + bytes([3]) * SMALL)[:nbytes]
        assert image.address == image.tensor().data_ptr() and image.address % SMALL == 0
        words = image.tensor()[SMALL - 4 : SMALL + 4].clone().view(torch.int32)
        assert words.tolist() == [0x01010101, 0x02020202]
        image.close()
        empty = MappedImage([], SMALL, 0)
        assert empty.tensor().numel() == 0 == len(empty.view)
        empty.close()
        for chunk in chunks:
            pool.give(chunk)


SURVIVORS: dict[str, Callable[[MappedImage], object]] = {
    "view": lambda image: image.view[10:20],
    "tensor": lambda image: image.tensor(),
    "slice": lambda image: image.tensor()[50:90][3:9],
    "typed": lambda image: image.tensor().view(torch.float16).as_strided((4, 3), (1, 4), 8),
    "numpy": lambda image: image.tensor().numpy()[5:6],
    "image": lambda image: image,
}


@pytest.mark.parametrize("survivor", SURVIVORS)
def test_the_end_is_told_once_when_the_last_thing_of_it_is_gone(survivor: str) -> None:
    with SharedPool(SMALL) as pool:
        [chunk] = filled(pool, 5)
        told: list[int] = []

        def ended() -> None:
            told.append(len(chunk_maps()))

        image = attach([chunk], 100_000, ended)
        kept = SURVIVORS[survivor](image)
        if survivor != "image":
            image.close()
            image.close()
        del image
        gc.collect()
        assert told == [], f"a {survivor} still reaches the memory"
        assert len(chunk_maps()) == 2
        del kept
        gc.collect()
        assert told == [1], "once, after it was unmapped"
        pool.give(chunk)


def test_a_forked_child_tells_nobody() -> None:
    with SharedPool(SMALL) as pool:
        [chunk] = filled(pool, 5)
        told: list[int] = []
        image = attach([chunk], on_unmap=lambda: told.append(os.getpid()))

        def child() -> None:
            assert image.view[0] == 5
            image.close()
            gc.collect()
            assert told == [] and len(chunk_maps()) == 1

        assert wait_for(start_child(child)) == 0
        assert image.view[0] == 5 and told == []
        image.close()
        assert told == [os.getpid()]
        pool.give(chunk)


def test_the_end_of_the_interpreter_tells_nobody_and_crashes_nothing() -> None:
    code = (
        "import os, sys; from sllm_mini.storage.mapping import MappedImage; from sllm_mini.storage.shared_chunk import SharedChunk;"
        "chunk = SharedChunk(2 << 20); image = MappedImage([os.dup(chunk.fd)], 2 << 20, 100, on_unmap=lambda: print('told'));"
        "view = image.view; sys.keep = view"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_populating_for_reading_copies_nothing_and_spares_the_faults() -> None:
    with SharedPool(16 * MIB, SMALL) as pool:
        chunks = filled(pool, *range(8))

        def faults(image: MappedImage) -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            assert sum(image.view[::PAGE]) == sum(range(8)) * SMALL // PAGE
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        plain, populated = attach(chunks), attach(chunks)
        populated.populate_read()
        assert faults(populated) * 4 < faults(plain)
        assert smaps("Anonymous", populated.address) == 0
        plain.close()
        populated.close()
        for chunk in chunks:
            pool.give(chunk)


def test_a_kernel_without_populate_touches_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "MADV_POPULATE_WRITE", 0x7FFF)
    monkeypatch.setattr(mapping, "MADV_POPULATE_READ", 0x7FFF)
    with SharedPool(2 * SMALL, SMALL) as pool:
        chunks = filled(pool, 1, 2)
        assert pool.kernel_nbytes() == 2 * SMALL
        image = attach(chunks)
        image.populate_read(PAGE, SMALL)
        assert smaps("Rss", image.address) >= SMALL - PAGE and smaps("Anonymous", image.address) == 0
        image.populate_read()
        assert bytes(image.view) == bytes([1]) * SMALL + bytes([2]) * SMALL
        image.close()
        for chunk in chunks:
            pool.give(chunk)


# Huge pages


@contextmanager
def setting(path: str, value: Callable[[str], str]) -> Iterator[None]:
    """A setting of the kernel, changed for a moment where root may; other runs of this test wait."""
    if not os.access(path, os.W_OK):
        pytest.skip(f"{path} cannot be changed here; run as root to see this")
    with open(path, encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read().strip()
        chosen = before.split("[")[1].split("]")[0] if "[" in before else before
        try:
            Path(path).write_text(value(chosen), encoding="ascii")
        except OSError as error:
            pytest.skip(f"{path} cannot be changed here ({error.strerror})")
        try:
            yield
        finally:
            Path(path).write_text(chosen, encoding="ascii")


def test_reserved_huge_pages_are_used_while_there_are_any() -> None:
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    with setting(str(pages / "nr_hugepages"), lambda before: str(int(before) + 6)):
        free = int((pages / "free_hugepages").read_text())
        if free < 2:
            pytest.skip(f"the machine gave {free} huge pages; it needs 2 free ones")
        with SharedPool((free + 1) * SMALL, SMALL, huge_pages="hugetlb") as pool:
            chunks = filled(pool, *range(free + 1))
            assert [chunk.hugetlb for chunk in chunks] == [True] * free + [False], "then small ones serve"
            assert {chunk.page_nbytes() for chunk in chunks[:-1]} == {SMALL}
            assert pool.kernel_nbytes() == pool.used_nbytes == (free + 1) * SMALL
            image = attach(chunks)  # reserves nothing: no page is left
            assert bytes(image.view[::SMALL]) == bytes(range(free + 1))
            image.populate_read()
            pool.give(chunks.pop(0))  # lent, so freed once the image is gone
            image.close()
            image = attach(chunks[:1])
            image.view[0] = 77
            assert chunks[0].view[0] == 1, "a private copy on a huge page"
            image.close()
            for chunk in chunks:
                pool.give(chunk)
        assert int((pages / "free_hugepages").read_text()) == free, "all given back"


def test_transparent_huge_pages_are_used_where_the_kernel_allows_them() -> None:
    with setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled", lambda before: "advise"):
        with SharedPool(8 * SMALL, 4 * SMALL, huge_pages="auto") as pool:
            chunks = filled(pool, 1, 2)
            if chunks[0].page_nbytes() != SMALL:
                pytest.skip("the machine has no huge page to give just now")
            assert pool.kernel_nbytes() == 8 * SMALL
            image = attach(chunks)
            image.populate_read()
            assert smaps("ShmemPmdMapped", image.address) >= 3 * SMALL, "in the client too"
            image.view[0] = 9
            assert smaps("Anonymous", image.address) == PAGE, "a write copies a small page"
            image.close()
            for chunk in chunks:
                pool.give(chunk)
        with SharedPool(SMALL, SMALL, huge_pages="never") as pool:
            chunk = pool.take()
            assert chunk.page_nbytes() == PAGE
            pool.give(chunk)


# Loads into chunks


@pytest.fixture(scope="module")
def saved() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(700, 512, generator=generator)}
    tensors |= {f"model.layers.{number}.w": torch.randn(900, 517, generator=generator) for number in range(6)}
    tensors |= {"odd": torch.randn(3, 7, generator=generator).to(torch.bfloat16), "empty": torch.empty(0, 3), "scalar": torch.tensor(7)}
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"], "columns": tensors["model.layers.0.w"].t()}


@pytest.fixture(scope="module")
def checkpoint(saved: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = save_checkpoint(saved, tmp_path_factory.mktemp("c") / "c", options=WriteOptions(partition_nbytes=5_000_000))
    assert len(made.index.partitions) > 2
    assert any(entry.nbytes % CHUNK_NBYTES for entry in made.index.partitions[:-1]), "hash chunks lie in two chunks of memory"
    return made


@pytest.fixture(scope="module")
def image_bytes(checkpoint: Checkpoint) -> bytes:
    return b"".join((checkpoint.path / entry.file).read_bytes() for entry in checkpoint.index.partitions)


def load_into(pool: SharedPool, checkpoint: Checkpoint, options: LoadOptions, *, back: bool = False) -> tuple[list[SharedChunk], Flow]:
    shared = [pool.take(back=back) for _ in range(-(-checkpoint.index.total_nbytes // pool.chunk_nbytes))]
    plan = plan_load(checkpoint.index, lambda _: 0, devices=1, names=None, chunk_nbytes=options.chunk_nbytes, granule=CHUNK_NBYTES)
    arrived: list[int] = []
    ended: list[BaseException | None] = []
    flow = Flow(checkpoint.index, options, verify=True, recorder=None, on_chunk=lambda chunk: arrived.append(chunk.number))
    pipeline = Pipeline(checkpoint, plan, flow, ended.append)
    pipeline.start(lambda flow, readers: [IntoChunks(flow, shared, plan.chunks, readers)])
    pipeline.join()
    assert ended == [None] and sorted(arrived) == [chunk.number for chunk in plan.chunks]
    return shared, flow


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize(("pool_chunk", "load_chunk"), [(1, 1), (1, 2), (3, 2), (8, 1)], ids=str)
def test_a_load_fills_chunks_with_the_image(checkpoint: Checkpoint, image_bytes: bytes, pool_chunk: int, load_chunk: int, direct: bool) -> None:
    if direct:
        for number in range(len(checkpoint.index.partitions)):
            fd = checkpoint.open_partition(number)
            drop_cached(fd)
            os.close(fd)
    options = LoadOptions(chunk_nbytes=load_chunk * CHUNK_NBYTES, threads=3, direct=direct, use_cached=not direct)
    with SharedPool(16 * SMALL, pool_chunk * SMALL) as pool:
        shared, flow = load_into(pool, checkpoint, options)
        found = b"".join(bytes(chunk.view) for chunk in shared)
        assert found[: len(image_bytes)] == image_bytes and not any(found[len(image_bytes) :])
        report = flow.report
        assert report.mapped_nbytes == 0 and report.nbytes == len(image_bytes) == checkpoint.index.total_nbytes
        assert report.direct_nbytes == (len(image_bytes) if direct and report.fallback is None else 0)
        assert pool.kernel_nbytes() == pool.used_nbytes
        for chunk in shared:
            pool.give(chunk)


def test_what_another_model_left_behind_the_image_is_cleared(checkpoint: Checkpoint, image_bytes: bytes) -> None:
    with SharedPool(16 * SMALL, 8 * SMALL) as pool:
        for chunk in filled(pool, 0xEE, 0xEE):
            pool.give(chunk)
        shared, _ = load_into(pool, checkpoint, LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2))
        found = b"".join(bytes(chunk.view) for chunk in shared)
        assert found[: len(image_bytes)] == image_bytes and not any(found[len(image_bytes) :])
        for chunk in shared:
            pool.give(chunk)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 13))
def test_pieces_cover_a_range_once_and_stay_inside_their_chunks(offset: int, nbytes: int, chunk_nbytes: int) -> None:
    pieces = list(pieces_of(offset, nbytes, chunk_nbytes))
    covered = [number * chunk_nbytes + inside + step for number, inside, count in pieces for step in range(count)]
    assert covered == list(range(offset, offset + nbytes))
    assert all(count > 0 and inside + count <= chunk_nbytes for _, inside, count in pieces)


ATTACH = """
import gc, os, sys
import torch
from sllm_mini.checkpoint import open_checkpoint
from sllm_mini.loading import load_tensors
from sllm_mini.loading.plan import plan_load
from sllm_mini.loading.restore import restore_tensors
from sllm_mini.storage.mapping import MappedImage

path, chunk_nbytes, fds = sys.argv[1], int(sys.argv[2]), [int(fd) for fd in sys.argv[3:]]
checkpoint = open_checkpoint(path)
index = checkpoint.index
plan = plan_load(index, lambda _: 0, devices=1, names=None, chunk_nbytes=chunk_nbytes, granule=chunk_nbytes)
told = []
image = MappedImage(fds, chunk_nbytes, index.total_nbytes, on_unmap=lambda: told.append(1))
tensors = restore_tensors(image.tensor(), plan.places(0))
image.close()
expected = load_tensors(checkpoint)
assert tensors.keys() == expected.keys()
for name, tensor in expected.items():
    found = tensors[name]
    assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.stride() == tensor.stride(), name
    assert torch.equal(found, tensor), name
tensors["model.embed_tokens.weight"].fill_(-1)
assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]), "ties share memory"
tensors = {name: tensor for name, tensor in tensors.items() if name == "odd"}
gc.collect()
assert not told
del found, tensors
gc.collect()
assert told == [1]
print("equal", len(expected))
"""


def test_a_second_process_has_the_tensors_bit_for_bit(checkpoint: Checkpoint, image_bytes: bytes, saved: dict[str, torch.Tensor]) -> None:
    with SharedPool(16 * SMALL, 2 * SMALL) as pool:
        shared, _ = load_into(pool, checkpoint, LoadOptions(chunk_nbytes=CHUNK_NBYTES, threads=2))
        fds = [chunk.fd for chunk in shared]
        for chunk in shared:
            chunk.lent = True
        command = [sys.executable, "-c", ATTACH, str(checkpoint.path), str(pool.chunk_nbytes), *map(str, fds)]
        done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=100)
        assert done.stdout == f"equal {len(saved)}\n", done.stderr
        assert b"".join(bytes(chunk.view) for chunk in shared)[: len(image_bytes)] == image_bytes, "the client's writes stayed there"
        for chunk in shared:
            pool.give(chunk)
        assert pool.kernel_nbytes() == 0


# From chunks to a device


def pattern(nbytes: int) -> bytes:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()


def image_in(pool: SharedPool, content: bytes) -> list[SharedChunk]:
    shared = []
    for at in range(0, len(content), pool.chunk_nbytes):
        shared.append(pool.take())
        piece = content[at : at + pool.chunk_nbytes]
        shared[-1].view[: len(piece)] = piece
    return shared


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "staged"])
def test_an_image_is_copied_to_a_gpu_without_stalls(pinned: bool) -> None:
    runtime = RecordingRuntime(queries_before_done=1)
    device = runtime.device()
    content = pattern(5 * SMALL + 4096)
    with SharedPool(8 * SMALL, 2 * SMALL, device if pinned else None) as pool, ChunkPool(device, chunk_nbytes=SMALL, chunks=2) as slots:
        shared = image_in(pool, content)
        assert all(chunk.pinned == pinned for chunk in shared)
        copier = FromChunks(device, slots)
        target = device.allocate(len(content))
        prefixes: list[int] = []
        for _ in range(2):  # slots and stream are used again
            prefixes.clear()
            assert copier.copy(shared, len(content), target, on_prefix=prefixes.append) == len(content)
            back = device.allocate_host(len(content))
            stream = device.stream()
            stream.copy_to_host(back, 0, target, 0, len(content))
            stream.synchronize()
            assert back.view == content
            back.close()
            stream.close()
        assert prefixes == sorted(set(prefixes)) and prefixes[-1] == len(content) and len(prefixes) == 6
        assert runtime.pageable_copies == 0
        assert runtime.names().count("hostAlloc") == (2 if pinned else 4), "two slots at most, and none from pinned chunks"
        target.close()
        copier.close()
        for chunk in shared:
            pool.give(chunk)
    assert runtime.leaks() == {}


def test_a_resident_prefix_is_not_copied_again() -> None:
    device: Device = get_device("cpu")
    content = pattern(3 * SMALL)
    with SharedPool(4 * SMALL, SMALL) as pool:
        shared = image_in(pool, content)
        target = device.allocate(len(content))
        target.tensor().zero_()
        copier = FromChunks(device)
        assert copier.copy(shared, len(content), target, start=SMALL + 100) == 2 * SMALL - 100
        assert target.tensor().numpy().tobytes() == bytes(SMALL + 100) + content[SMALL + 100 :]
        assert copier.copy(shared, 100, target) == 100 and copier.copy([], 0, target) == 0
        assert target.tensor().numpy().tobytes()[:101] == content[:100] + b"\0"
        copier.close()
        for chunk in shared:
            pool.give(chunk)


def test_pinned_chunks_are_unpinned_before_their_addresses_go(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RecordingRuntime()
    close, pinned_at_close = mapping.AddressRange.close, []

    def close_range(self: mapping.AddressRange) -> None:
        pinned_at_close.append(runtime.live_pinned_nbytes())
        close(self)

    monkeypatch.setattr(mapping.AddressRange, "close", close_range)
    with SharedPool(4 * SMALL, SMALL, runtime.device()) as pool:
        chunks = [pool.take() for _ in range(3)]
        assert runtime.live_pinned_nbytes() == 3 * SMALL
        chunks[0].lent = True
        pool.give(chunks[0])
        assert runtime.live_pinned_nbytes() == 2 * SMALL, "lent: freed"
        pool.give(chunks[1])
        assert runtime.live_pinned_nbytes() == 2 * SMALL, "kept pinned for the next model"
        assert pool.take() is chunks[1] and runtime.names().count("hostRegister") == 3
        for chunk in chunks[1:]:
            pool.give(chunk)
    assert runtime.leaks() == {} and pinned_at_close == [2 * SMALL, SMALL, 0]
