"""A disk that is full under a live cluster: it serves on, says so once, and has everything on disk once there is room. Chapter 08."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_engine import whole_text
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster import appending, journal
from sllm_mini.cluster.api import Ask, Cluster, Deployment, RefusedError
from sllm_mini.cluster.appending import AppendFile
from sllm_mini.cluster.journal import Journal, read_journal
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.control.replay import replay
from sllm_mini.errors import WriteError
from sllm_mini.inference.session import Session
from sllm_mini.resources import resource

MIB = 1 << 20
SECONDS = 20.0


@dataclass
class Disk:
    """Has room for so many bytes of each file."""

    room: float = float("inf")

    def pwrite(self, file: int, data: bytes, offset: int) -> int:
        written = int(min(len(data), max(0, self.room - offset)))
        if data and not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return PWRITE(file, data[:written], offset)


PWRITE = os.pwrite


# A file that grows


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=20), st.integers(0, 200), st.none()), max_size=40))
def test_what_a_disk_takes_late_is_there_whole_and_in_order(tmp_path_factory: pytest.TempPathFactory, steps: list[bytes | int | None]) -> None:
    """Records are appended, the disk gets room or loses it, and what waits is tried again: always the file begins with all that it says it
    has, and with room for it has everything."""
    path, disk, appended = tmp_path_factory.mktemp("f") / "file", Disk(0), b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appending.os, "pwrite", disk.pwrite)
        file = AppendFile(path, new=True)
        ends = {0}
        for step in [*steps, 10_000, None]:
            if isinstance(step, bytes):
                appended += step
                ends.add(len(appended))
                file.append(step)
            elif step is None:
                assert file.retry() == (file.nbytes == len(appended))
            else:
                disk.room = step
            found = path.read_bytes()
            assert found == appended[: len(found)] and file.nbytes <= len(found) and file.nbytes in ends
            assert bool(file.error) == (file.nbytes < len(appended)) and not file.lost
        file.close()
    assert path.read_bytes() == appended


def test_what_waits_is_bounded_and_then_the_file_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(appending.os, "pwrite", disk.pwrite)
    file = AppendFile(tmp_path / "file", most_nbytes=10)
    file.append(b"one")
    disk.room = 3
    file.append(b"12345")
    file.append(b"12345")
    assert not file.lost and "No space left" in file.error
    file.append(b"x")
    disk.room = 1000
    assert file.lost and "no more than 10 bytes wait" in file.error and not file.retry()
    file.append(b"later")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"one"
    with pytest.raises(FileExistsError):
        AppendFile(tmp_path / "file", new=True)


def test_a_journal_is_rewritten_while_something_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(appending.os, "pwrite", disk.pwrite)
    book = Journal(tmp_path / "journal", lambda: 2.0)
    for number, name in enumerate("abc"):
        book.opened(number, name, "model", "", 0.0, Session(name, "m", (1,), 1, 5).to_bytes())
    disk.room = book.nbytes + 5  # the next one is cut off
    book.ended("a", "stop", None)
    book.ended("b", "stop", None)
    with pytest.raises(WriteError, match="journal cannot be written whole"):
        book.retry()
    book.compact()
    assert [past.over for past in read_journal(book.path)] == [False] * 3
    disk.room = 10**6
    book.retry()
    assert [past.over for past in read_journal(book.path)] == [True, True, False] and not book.error
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_retold", full)
        with pytest.raises(WriteError, match="cannot be rewritten"):
            book.compact()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["journal"]
    book.compact()
    assert [past.opened.request_id for past in read_journal(book.path)] == ["c"]
    book.close()


def full(*_of: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# A cluster


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Under all that a driver writes."""
    found = Disk()
    write_bytes = Path.write_bytes

    def write_whole(path: Path, data: bytes) -> int:
        if found.room < len(data):
            path.touch()
            full()
        return write_bytes(path, data)

    monkeypatch.setattr(appending.os, "pwrite", found.pwrite)
    monkeypatch.setattr(Path, "write_bytes", write_whole)
    return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    convert_checkpoint(resource("data/models/tiny"), tmp_path / "tiny")
    node = NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.001)
    with open_cluster(
        "inprocess", folder=tmp_path / "cluster", nodes=even_cluster(1), control=ControlOptions(), options=LiveOptions(node=node, snapshot_seconds=0.05, journal_nbytes=1)
    ) as made:
        made.deploy(deployment(tmp_path, "a"))
        yield made


def deployment(folder: Path, name: str) -> Deployment:
    return Deployment(ModelSpec(name=name, nbytes=10 * MIB, concurrency=4), str(folder / "tiny"))


def is_answered(cluster: Cluster, name: str, tokens: int = 20) -> bool:
    stream = cluster.submit(Ask("a", [5, 6, 7], tokens, stop_at_eos=False, request_id=name))
    text = tuple(piece.token_id for piece in stream)
    return text == whole_text(Session("x", "x", (5, 6, 7), 3, tokens, stop_at_eos=False))[0] and stream.wait(SECONDS).outcome == "answered"


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cluster_on_a_full_disk_serves_on_and_has_everything_on_disk_once_there_is_room(
    cluster: Cluster, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(what: str) -> int:
        return sum(what in record.message for record in caplog.records)

    assert isinstance(cluster, LiveCluster)
    assert is_answered(cluster, "before")
    disk.room = 0
    for number in range(3):
        assert is_answered(cluster, f"while-{number}")
        until(lambda: said("the cluster goes on") == 1)
    with pytest.raises(WriteError, match="b was not deployed"):
        cluster.deploy(deployment(tmp_path, "b"))
    with pytest.raises(RefusedError, match="there is no model b"):
        cluster.submit(Ask("b", [1], 1))
    saves = cluster._keeper.next_at
    until(lambda: cluster._keeper.next_at > saves + 0.2)
    assert said("the cluster goes on") == 1 and not said("again"), caplog.messages
    disk.room = float("inf")
    until(lambda: said("could be written again") == 1)
    cluster.deploy(deployment(tmp_path, "b"))
    assert is_answered(cluster, "after")
    until(lambda: (cluster.folder / "events.jsonl").read_bytes().count(b'"RequestFinished"') == 5)
    assert replay(cluster.log(), ControlOptions().controller())
    going_on = cluster.submit(Ask("a", [5, 6, 7], 4000, stop_at_eos=False, request_id="going-on"))
    until(lambda: going_on.report.output_tokens > 3)
    left = tmp_path / "left"  # as by a driver that is killed now
    left.mkdir()
    for name in ("controller.bin", "ledger.bin", "events.jsonl", "deployments.json"):  # the log after the controller that has seen it
        shutil.copy(cluster.folder / name, left)
    going_on.cancel()
    with LiveCluster(nobody, ControlOptions(), left, LiveOptions(), resume=True) as again:
        assert sorted(each.spec.name for each in again.models()) == ["a", "b"]
        assert again.stream("going-on").report.output_tokens > 3 and again._router.count == 6


def nobody(*_of: object) -> None:  # type: ignore[misc]
    raise AssertionError("no node is added here")


def test_a_request_is_refused_once_no_more_can_wait(cluster: Cluster, disk: Disk) -> None:
    assert isinstance(cluster, LiveCluster)
    cluster._journal._file._most_nbytes = 100
    disk.room = 0
    assert is_answered(cluster, "the last")
    with pytest.raises(RefusedError, match="cannot be written, and no more than 100 bytes wait") as refused:
        cluster.submit(Ask("a", [1], 1))
    assert refused.value.status == 503


def test_a_cluster_that_cannot_begin_its_log_says_so_and_leaves_none(tmp_path: Path, disk: Disk) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    disk.room = 0
    with pytest.raises(WriteError, match=r"events\.jsonl cannot be written \(No space left on device\)"):
        LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions())  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before and set(threading.enumerate()) <= threads
    disk.room = float("inf")
    LiveCluster(nobody, ControlOptions(), tmp_path, LiveOptions()).close()  # type: ignore[arg-type]
