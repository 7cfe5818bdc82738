"""Chapter 01: writing on a machine that fails. Full disks, killed writers, races, sources that change: a target is
there whole or not at all, an old one stays whole until the new one is, and the error says what happened."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sllm_mini.checkpoint import (
    Checkpoint,
    WriteOptions,
    convert_checkpoint,
    export_safetensors,
    open_checkpoint,
    publish,
    save_checkpoint,
    streams,
    verify_checkpoint,
)
from sllm_mini.checkpoint.publish import publish as publishing
from sllm_mini.checkpoint.source import Source, SourceTensor
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.errors import (
    CheckpointError,
    CheckpointExistsError,
    IntegrityError,
    SllmError,
    UnsupportedError,
    WriteError,
)
from sllm_mini.loading import load_tensors
from sllm_mini.types import Progress

from .tools import entry, hidden, in_child, nothing_left, refused, safetensors_bytes, start_child, wait_for

pytestmark = pytest.mark.timeout(120)

MB = 1 << 20


class Plain:
    """A storage of equal bytes, read without torch, so that a forked process can write it."""

    def __init__(self, nbytes: int, value: int) -> None:
        self.nbytes, self._value = nbytes, value

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = bytes([self._value]) * len(view)


def plain_source(value: int = 1, *, count: int = 3, nbytes: int = 300_000) -> Source:
    tensors = [SourceTensor(f"t{number}", "uint8", (nbytes,), (1,), number) for number in range(count)]
    return Source(tensors, [Plain(nbytes, value) for _ in tensors], companions={"config.json": b'{"value": %d}' % value})


def write_plain(path: Path, value: int = 1, *, overwrite: bool = False, progress: Callable[[Progress], None] | None = None, nbytes: int = 300_000, confirm: Callable[[], None] | None = None) -> None:
    """Three partitions of one tensor each, so three calls of `progress`."""
    write_checkpoint(replace(plain_source(value, nbytes=nbytes), confirm=confirm), path, WriteOptions(partition_nbytes=1, threads=1, overwrite=overwrite), progress)


def assert_whole(path: Path, value: int) -> None:
    verify_checkpoint(path)
    assert open_checkpoint(path).read_companion("config.json") == b'{"value": %d}' % value
    for tensor in load_tensors(path).values():
        assert bool((tensor == value).all())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face directory with 40 MB of weights: three slabs."""
    folder = tmp_path / "source"
    folder.mkdir()
    header = {f"w{number}": entry("U8", [20 * MB], [number * 20 * MB, (number + 1) * 20 * MB]) for number in range(2)}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(range(256)) * (40 * MB // 256)))
    (folder / "config.json").write_text("{}")
    return folder


# Full disks


@contextmanager
def mounted(place: Path, kind: str, *options: str) -> Iterator[Path]:
    """A file system of its own, kept in memory; skips where this user may not mount one."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", kind, *options, kind, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip() or 'no reason given'})")
    try:
        yield place
    finally:
        done = subprocess.run(["umount", place], capture_output=True, text=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "--lazy", place], check=True)
            pytest.fail(f"something of it is still open or mapped: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    with mounted(tmp_path / "disk", "tmpfs", "-o", "size=4m") as place:
        yield place


def test_a_disk_without_room_is_noticed_before_a_byte_is_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("bytes were written"))
    with refused(WriteError, small_disk, "10,002,432 bytes are to be written", "free"):
        save_checkpoint({"w": torch.zeros(10_000_000, dtype=torch.uint8)}, small_disk / "model")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    """The first look at the disk passes, as it would if another process took the room afterwards."""
    write_plain(small_disk / "old", 1)
    target = small_disk / ("old" if overwrite else "new")
    monkeypatch.setattr(streams, "_check_space", lambda *_: None)
    with refused(WriteError, target, "No space left on device"):
        write_plain(target, 2, overwrite=overwrite, nbytes=2_000_000)
    assert os.listdir(small_disk) == ["old"]
    assert_whole(small_disk / "old", 1)
    monkeypatch.undo()
    write_plain(small_disk / "next", 3)
    assert_whole(small_disk / "next", 3)


def test_a_disk_with_room_for_all_but_the_index_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    companions: dict[str, bytes | Path] = {"vocab.txt": bytes(3 * MB)}
    source = Source(plain_source().tensors, plain_source().storages, companions=companions)
    (small_disk / "taken").write_bytes(bytes(MB // 2))
    monkeypatch.setattr(streams, "_check_space", lambda *_: None)
    with refused(WriteError, small_disk, "No space left on device"):
        write_checkpoint(source, small_disk / "model", WriteOptions(), None)
    assert os.listdir(small_disk) == ["taken"]


def test_a_disk_that_fills_up_while_exporting_or_converting_leaves_nothing(small_disk: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = convert_checkpoint(source, tmp_path / "model")
    for use in (lambda: export_safetensors(checkpoint.path, small_disk / "out"), lambda: convert_checkpoint(source, small_disk / "out")):
        with refused(WriteError, small_disk, "free"):
            use()
    monkeypatch.setattr(streams, "_check_space", lambda *_: None)
    for use in (lambda: export_safetensors(checkpoint.path, small_disk / "out"), lambda: convert_checkpoint(source, small_disk / "out")):
        with refused(WriteError, small_disk, "No space left on device"):
            use()
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call, position", [("pwrite", 0), ("pwrite", 2), ("ftruncate", 1), ("fsync", 0), ("fsync", 3)])
def test_whatever_the_disk_refuses_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, position: int, code: int) -> None:
    """Also where no small file system can be mounted: the k-th call fails."""
    write_plain(tmp_path / "old", 1)
    real, calls = getattr(os, call), iter(range(1000))

    def failing(*args: object) -> object:
        if next(calls) == position:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with refused(WriteError, tmp_path / "old", os.strerror(code)):
        write_plain(tmp_path / "old", 2, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["old"]
    assert_whole(tmp_path / "old", 1)


def test_a_file_system_that_cannot_reserve_room_nor_say_how_much_it_has_is_written_to(tmp_path: Path) -> None:
    """ramfs has no size and no fallocate, as 9p (Windows drives under WSL) has none."""
    with mounted(tmp_path / "ramfs", "ramfs") as place:
        write_plain(place / "model", 6, nbytes=3_000_001)
        write_plain(place / "model", 7, nbytes=3_000_001, overwrite=True)
        assert_whole(place / "model", 7)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[: max(len(view) // 3, 1)], at))
    write_plain(tmp_path / "model", 5)
    assert_whole(tmp_path / "model", 5)


# Killed writers


def _kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_at(slab: int) -> Callable[[Progress], None]:
    calls = iter(range(1000))
    return lambda _: _kill() if next(calls) == slab else None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", ["first slab", "last slab", "before the index", "before the rename", "after the rename"])
def test_kill_9_leaves_the_old_one_or_the_new_one_and_the_next_writer_cleans_up(tmp_path: Path, moment: str, overwrite: bool) -> None:
    target = tmp_path / "model"
    if overwrite:
        write_plain(target, 1)

    def work() -> None:
        rename = publish._rename
        if moment == "before the rename":
            publish._rename = _kill  # type: ignore[assignment]
        elif moment == "after the rename":
            publish._rename = lambda *args: _kill(rename(*args))
        slab = {"first slab": 0, "last slab": 2}.get(moment, 99)
        write_plain(target, 2, overwrite=overwrite, progress=_killed_at(slab), confirm=_kill if moment == "before the index" else None)

    assert in_child(work) == -signal.SIGKILL
    left = [] if moment == "after the rename" and not overwrite else [name for name in hidden(tmp_path) if name.startswith(".model.")]
    assert sorted(os.listdir(tmp_path)) == sorted([*left, *(["model"] if overwrite or moment == "after the rename" else [])])
    assert len(left) == (0 if moment == "after the rename" and not overwrite else 1)
    if moment == "after the rename":
        assert_whole(target, 2)
    elif overwrite:
        assert_whole(target, 1)
    else:
        with refused(CheckpointError, target, "no such directory"):
            open_checkpoint(target)
    write_plain(target, 3, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert_whole(target, 3)


def test_a_writer_that_is_still_alive_is_not_cleaned_up(tmp_path: Path) -> None:
    """Nor is another target's, nor one whose name only looks like a pattern of ours."""
    (tmp_path / ".a.writing-12345678").mkdir()
    (tmp_path / ".model2.writing-12345678").mkdir()
    with publishing(tmp_path / "model") as first:
        (first / "x").write_bytes(b"first")
        with publishing(tmp_path / "[a]") as other:
            (other / "x").write_bytes(b"other")
        with pytest.raises(RuntimeError), publishing(tmp_path / "model"):
            raise RuntimeError
        assert (first / "x").read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == [".a.writing-12345678", ".model2.writing-12345678", "[a]", "model"]


@pytest.mark.parametrize("name", ["[a]", "*", "?", "model[0-9]", "a b", "ü", "-rf"])
def test_an_abandoned_directory_is_found_whatever_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.writing-12345678").mkdir()
    (tmp_path / ".other.writing-12345678").mkdir()
    write_plain(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted([".other.writing-12345678", name])


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_directory_that_another_writer_took_for_abandoned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Between making its directory and locking it, a writer is not to be told from a dead one."""
    make, lock = tempfile.mkdtemp, fcntl.flock
    made: list[str] = []

    def take_away(when: str) -> None:
        if when == moment and len(made) < 3:
            publish._remove(Path(made[-1]))
            assert not os.path.exists(made[-1])

    def make_and_lose(**options: str) -> str:
        made.append(make(**options))
        take_away("before it is opened")
        return made[-1]

    def lose_and_lock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            take_away("before it is locked")
        lock(fd, operation)

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    monkeypatch.setattr(fcntl, "flock", lose_and_lock)
    with nothing_left():
        write_plain(tmp_path / "model", 4)
    assert len(made) == 3
    assert os.listdir(tmp_path) == ["model"]
    assert_whole(tmp_path / "model", 4)


# Races


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_several_writers_one_wins_and_the_others_are_told(tmp_path: Path, overwrite: bool) -> None:
    def write(value: int) -> None:
        try:
            write_plain(tmp_path / "model", value, overwrite=overwrite, nbytes=5000)
        except CheckpointExistsError:
            os._exit(3)

    for _ in range(4):
        ends = [wait_for(child) for child in [start_child(lambda value=value: write(value)) for value in range(1, 5)]]  # type: ignore[misc]
        assert sorted(ends) == ([0, 0, 0, 0] if overwrite else [0, 3, 3, 3])
        winner = load_tensors(tmp_path / "model")["t0"][0].item()
        assert_whole(tmp_path / "model", int(winner))
        assert os.listdir(tmp_path) == ["model"]
        shutil.rmtree(tmp_path / "model")


def test_overwriting_is_atomic_for_a_reader_that_looks_all_the_time(tmp_path: Path) -> None:
    """Every look finds one whole checkpoint, never none, never a mixture, whether or not hashes are checked."""
    target = tmp_path / "model"
    write_plain(target, 1, nbytes=4096)

    def overwrite_again_and_again() -> None:
        for round in range(60):
            write_plain(target, 2 + round % 100, overwrite=True, nbytes=4096)

    child = start_child(overwrite_again_and_again)
    seen, replaced, looks = set(), 0, 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        looks += 1
        checkpoint = open_checkpoint(target)
        try:
            tensors = load_tensors(checkpoint, verify=bool(looks % 2))
        except CheckpointError as error:
            assert "replaced" in str(error)
            replaced += 1
            continue
        values = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
        assert len(values) == 1, f"a mixture of {values}"
        seen |= values
    assert len(seen) > 1 and looks > replaced, (looks, replaced)  # how many it sees is the scheduler's affair
    assert os.listdir(tmp_path) == ["model"]


# Targets


def test_a_target_that_exists_is_refused(tmp_path: Path) -> None:
    write_plain(tmp_path / "model", 1)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name in ("model", "file", "link", "dangling", "empty"):
        with refused(CheckpointExistsError, tmp_path / name, "exists already"):
            write_plain(tmp_path / name, 2)
    for name in ("file", "link", "dangling"):
        with refused(CheckpointExistsError, tmp_path / name, "not a directory"):
            write_plain(tmp_path / name, 2, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert_whole(tmp_path / "model", 1)
    write_plain(tmp_path / "empty", 3, overwrite=True)
    assert_whole(tmp_path / "empty", 3)


@pytest.mark.parametrize("target", ["file/model", "x" * 300, "x" * 250, "/proc/model", "/dev/null/model", "loop/model"])
def test_a_target_that_cannot_be_made_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    with refused(WriteError, None, "cannot be written"):
        write_plain(tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_an_interrupted_rename_on_a_file_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange keeps the old one; one that cannot refuse to replace still writes the new."""
    import ctypes

    class NoFlags:
        @staticmethod
        def renameat2(*_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(publish, "_libc", NoFlags)
    write_plain(tmp_path / "model", 1)
    with refused(WriteError, tmp_path / "model", "cannot exchange"):
        write_plain(tmp_path / "model", 2, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    assert_whole(tmp_path / "model", 1)


def test_files_get_the_mode_that_the_user_asked_for_with_umask(tmp_path: Path) -> None:
    def work() -> None:
        os.umask(0o027)
        write_plain(tmp_path / "model")

    assert in_child(work) == 0
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o640}


# Without permission


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="sllm-mini-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _as_nobody(use: Callable[[], object], kind: type[SllmError], place: Path, *says: str) -> None:
    """`use` must be refused when a user without rights tries (the superuser is asked for no permission)."""

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with refused(kind, place, *says):
            use()

    assert in_child(work) == 0


def test_without_permission_nothing_is_written_or_read_and_the_error_says_why(open_folder: Path) -> None:
    source, model, locked = open_folder / "source", open_folder / "model", open_folder / "locked"
    source.mkdir()
    (source / "model.safetensors").write_bytes(safetensors_bytes({"a": entry("U8", [4], [0, 4])}, b"1234"))
    (source / "config.json").write_text("{}")
    write_plain(model, 1)
    locked.mkdir(mode=0o755)
    open_folder.chmod(0o555)
    locked.chmod(0o555)
    denied = "Permission denied"
    try:
        load_tensors(model)  # every import is done before the rights are gone
        _as_nobody(lambda: write_plain(locked / "new"), WriteError, locked, denied)
        _as_nobody(lambda: write_plain(locked / "deep" / "new"), WriteError, locked, denied)
        _as_nobody(lambda: write_plain(model, 2, overwrite=True), WriteError, open_folder, denied)
        _as_nobody(lambda: convert_checkpoint(source, locked / "new"), WriteError, locked, denied)
        _as_nobody(lambda: export_safetensors(model, locked / "new"), WriteError, locked, denied)
        for file in ("index.json", "data-00001.bin", "config.json"):
            (model / file).chmod(0)
            _as_nobody(lambda: open_checkpoint(model), CheckpointError, model / file, denied)
            (model / file).chmod(0o644)
        checkpoint = open_checkpoint(model)
        (model / "data-00002.bin").chmod(0)
        _as_nobody(lambda: load_tensors(checkpoint), CheckpointError, model / "data-00002.bin", denied)
        (model / "data-00002.bin").chmod(0o644)
        for mode in (0o000, 0o111, 0o444):  # nothing, only passing through, only listing
            model.chmod(mode)
            source.chmod(mode)
            for use in (lambda: open_checkpoint(model), lambda: load_tensors(model), lambda: verify_checkpoint(model)):
                _as_nobody(use, CheckpointError, model, denied)
            _as_nobody(lambda: convert_checkpoint(source, open_folder / "new"), CheckpointError, source, denied)
        source.chmod(0o755)
        for file in ("model.safetensors", "config.json"):
            (source / file).chmod(0)
            open_folder.chmod(0o777)
            _as_nobody(lambda: convert_checkpoint(source, open_folder / "new"), CheckpointError, source / file, denied)
            (source / file).chmod(0o644)
        open_folder.chmod(0o000)
        _as_nobody(lambda: open_checkpoint(model), CheckpointError, model, denied)
        _as_nobody(lambda: convert_checkpoint(source, Path("/tmp/never")), CheckpointError, source, denied)
    finally:
        for folder in (open_folder, model, source, locked):
            folder.chmod(0o755)
    assert sorted(os.listdir(open_folder)) == ["locked", "model", "source"]
    assert os.listdir(locked) == []
    assert_whole(model, 1)


# Sources that change, and writers that are stopped


@pytest.mark.parametrize("nbytes", [0, 4, 10 * MB, 40 * MB])
def test_a_source_that_is_truncated_while_it_is_read_is_named(source: Path, tmp_path: Path, nbytes: int) -> None:
    file = source / "model.safetensors"
    with refused(IntegrityError, file, "at byte", "ended") as found:
        convert_checkpoint(source, tmp_path / "model", options=WriteOptions(threads=1), progress=lambda _: os.truncate(file, nbytes))
    assert found[0].offset >= nbytes  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("change", ["grow", "edit"])
def test_a_source_that_changes_while_it_is_read_is_named(source: Path, tmp_path: Path, change: str) -> None:
    file = source / "model.safetensors"

    def work(_: Progress) -> None:
        with open(file, "r+b") as stream:
            stream.seek(0 if change == "edit" else file.stat().st_size)
            stream.write(b"\xff")

    with refused(CheckpointError, file, "changed"):
        convert_checkpoint(source, tmp_path / "model", progress=work)
    assert os.listdir(tmp_path) == ["source"]


def test_a_source_that_is_replaced_while_it_is_read_stays_the_one_it_was(source: Path, tmp_path: Path) -> None:
    """Downloads are put in place by a rename; the file that was opened is still the old one, whole."""
    def work(_: Progress) -> None:
        (tmp_path / "new").write_bytes(b"other bytes")
        (tmp_path / "new").rename(source / "model.safetensors")

    convert_checkpoint(source, tmp_path / "model", progress=work)
    assert load_tensors(tmp_path / "model")["w1"][:256].tolist() == list(range(256))


class _Failing(Plain):
    def read_into(self, offset: int, view: memoryview) -> None:
        raise RuntimeError("the GPU fell off the bus")


@pytest.mark.parametrize("position", range(3))
def test_a_storage_that_cannot_be_read_ends_the_write(tmp_path: Path, position: int) -> None:
    source = plain_source()
    storages = [_Failing(storage.nbytes, 0) if number == position else storage for number, storage in enumerate(source.storages)]
    with nothing_left(), pytest.raises(RuntimeError, match="fell off the bus"):
        write_checkpoint(Source(source.tensors, storages), tmp_path / "model", WriteOptions(partition_nbytes=1), None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit])
@pytest.mark.parametrize("slab", [0, 2])
def test_an_error_in_the_progress_callback_ends_the_write(tmp_path: Path, error: type[BaseException], slab: int) -> None:
    write_plain(tmp_path / "old", 1)
    calls = iter(range(1000))

    def progress(_: Progress) -> None:
        if next(calls) == slab:
            raise error("stop")

    with nothing_left(), pytest.raises(error):
        write_plain(tmp_path / "old", 2, overwrite=True, progress=progress)
    assert os.listdir(tmp_path) == ["old"]
    assert_whole(tmp_path / "old", 1)
    calls = iter(range(1000))
    with nothing_left(), pytest.raises(error):
        verify_checkpoint(tmp_path / "old", threads=1, progress=progress)


def test_ctrl_c_ends_the_write(source: Path, tmp_path: Path) -> None:
    """The signal arrives in the main thread while the writers work."""
    assert threading.current_thread() is threading.main_thread()
    reached: list[int] = []

    def progress(now: Progress) -> None:
        reached.append(now.done_nbytes)
        if len(reached) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with nothing_left(), pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "model", options=WriteOptions(threads=1), progress=progress)
    assert os.listdir(tmp_path) == ["source"]


# What cannot be saved


def _freed() -> torch.Tensor:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


def _shrunk() -> torch.Tensor:
    tensor = torch.ones(1000)[10:]
    tensor.untyped_storage().resize_(3999)
    return tensor


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize(
    "state, says",
    [
        ({0: torch.zeros(1)}, "'0'"),
        ({None: torch.zeros(1)}, "'None'"),
        ({"": torch.zeros(1)}, "1 to 1,024"),
        ({"n" * 1025: torch.zeros(1)}, "1 to 1,024"),
        ({"\ud800": torch.zeros(1)}, "cannot be named"),
        ({"a": 5}, "'a'"),
        ({"a": None}, "'a'"),
        ({"a": [torch.zeros(1)]}, "'a'"),
        ({"a": np.zeros(3)}, "'a'"),
        ({"a": torch.zeros(3, device="meta")}, "meta"),
        ({"a": _freed()}, "freed"),
        ({"a": torch.zeros(3), "b": _shrunk()}, "'b'"),
        ({"a": _nested()}, "nested"),
        ({"a": torch.zeros(3, 3).to_sparse(), "a#values": torch.zeros(1)}, "'a#values'"),
        ({"a#values": torch.zeros(1), "a": torch.zeros(3, 3).to_sparse()}, "'a#values'"),
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path, state: dict[str, object], says: str) -> None:
    with refused(UnsupportedError, None, says):
        save_checkpoint(state, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_what_the_index_has_no_words_for_is_refused(tmp_path: Path) -> None:
    for name, tensor in (("expanded", torch.zeros(1).expand(2**60)), ("deep", torch.zeros([1] * 65))):
        with refused(UnsupportedError, None, name):
            save_checkpoint({name: tensor}, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("device_map", [{"": -1}, {"a": -5}])
def test_options_that_make_no_sense_are_refused(device_map: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        WriteOptions(device_map=device_map)
    for options in ({"partition_nbytes": 0}, {"partition_nbytes": -1}, {"threads": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            WriteOptions(**options)  # type: ignore[arg-type]


def test_arrays_that_share_memory_but_not_their_length_are_saved_whole(tmp_path: Path) -> None:
    """Two numpy arrays over the same memory are two storages that start at one address."""
    values = np.arange(1000, dtype=np.float32)
    state = {"short": torch.from_numpy(values[:10]), "long": torch.from_numpy(values), "middle": torch.from_numpy(values[:500])}
    save_checkpoint(state, tmp_path / "model")
    for name, tensor in load_tensors(tmp_path / "model").items():
        assert torch.equal(tensor, state[name])


# The long form: random faults at random places


@pytest.mark.parametrize("rounds", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_random_fault_leaves_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """One of the calls that writing is made of fails, at any of its uses: the target holds one version, whole."""
    choose = random.Random(5)
    target = tmp_path / "model"
    write_plain(target, 1, nbytes=5000)
    version, failures = 1, 0
    for round in range(rounds):
        call = choose.choice(("open", "pwrite", "ftruncate", "fsync", "mkdir", "statvfs", "fstat", "rename", "scandir"))
        position, real, calls = choose.randrange(12), getattr(os, call), iter(range(10_000))

        def failing(*args: object, real: Callable[..., object] = real, position: int = position, calls: Iterator[int] = calls, **more: object) -> object:
            if next(calls) == position:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **more)

        value = 2 + round % 200
        with nothing_left(maps=False), monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                write_plain(target, value, overwrite=True, nbytes=5000)
                version = value
            except SllmError:
                failures += 1
        found: Checkpoint = open_checkpoint(target)
        assert found.read_companion("config.json") in (b'{"value": %d}' % version, b'{"value": %d}' % value)
        version = int(load_tensors(found)["t0"][0])
        assert_whole(target, version)
    assert failures > rounds // 8
    write_plain(target, 1, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
