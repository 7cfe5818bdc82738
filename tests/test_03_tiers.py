"""`sllm-mini bench tiers`: right bytes from every tier, ratios by hand, conditions that are set back, nothing left behind."""

from __future__ import annotations

import gc
import http.client
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import Run as Command
from store_process import eventually

from sllm_mini.checkpoint import convert_checkpoint, open_checkpoint
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import FormatError, RemoteError, UnsupportedError
from sllm_mini.lab.bench.checksum import sum_files, sum_tensors
from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.bench.entry import Job
from sllm_mini.lab.bench.process import WorkerError
from sllm_mini.lab.bench.workload import Model, find_model
from sllm_mini.lab.report.folder import Folder
from sllm_mini.lab.report.host import look
from sllm_mini.lab.report.plan import SHAPES, Table
from sllm_mini.lab.tiers import (
    Options,
    client,
    measure_tiers,
    pages,
    parts_table,
    plot_tiers,
    tiers_alt_text,
    tiers_table,
)
from sllm_mini.lab.tiers import measure as measure_module
from sllm_mini.lab.tiers.document import KIND, LOOPBACK, USE, Row, Run, assemble, limit_seconds
from sllm_mini.lab.tiers.measure import _measured, _subjects
from sllm_mini.lab.tiers.origin import Origin, seconds_to_fetch
from sllm_mini.lab.tiers.steps import Step, Steps, Subject
from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS
from sllm_mini.loading.probe_kernel import file_system_of
from sllm_mini.loading.probe_samples import Measurement
from sllm_mini.resources import resource
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.store import Store

GB = 10**9
MIB = 1 << 20


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("tiny")
    model = find_model(os.fspath(resource("data/models/tiny")), folder)
    return Subject(model, convert_checkpoint(model.folder, folder / "tiny.sllm"), sum_files(model.files)[0])


@pytest.fixture
def served(subject: Subject, tmp_path: Path) -> Iterator[tuple[Store, str]]:
    with Store(tmp_path / "store", dram_nbytes=64 * MIB) as store, StoreServer(store, tmp_path / "socket") as server:
        store.register("tiny", subject.checkpoint.path)
        store.prefetch("tiny")
        yield store, server.address


# The document


def made_document() -> dict[str, Any]:
    def samples(**parts: float) -> dict[int, dict[str, float]]:
        return {number: {name: value * factor for name, value in parts.items()} for number, factor in enumerate((1.0, 0.5, 2.0))}

    run = Run(limits=[Measurement("disk_direct_read", "slow", GB, (1.0,)), Measurement("disk_direct_read", "fast", GB, (0.5, 0.6, 0.4))], use_seconds=[0.1, 0.3, 0.2])
    run.limits += [Measurement("host_to_device_copy", "", GB, (0.8,))]
    run.samples = {
        Row("disk", "cold", ("disk_direct_read",), "load", model="m", nbytes=2 * GB): samples(seconds=1.6, load=1.25, use=0.3),
        Row("mapped file", "warm", kind="limit", model="m", nbytes=2 * GB): samples(seconds=0.3, use=0.25),
        Row("cached", "warm", ("mapped_file",), "rest", model="m", nbytes=2 * GB): samples(seconds=0.4, use=0.2),
        Row("whole", "dram", (USE,), "seconds", model="m", nbytes=2 * GB): samples(seconds=0.8, use=0.2),
        Row("gpu", "cold", ("disk_direct_read", "host_to_device_copy"), "load", model="m", nbytes=2 * GB): samples(seconds=2.0, load=2.0, use=0.2),
        Row("remote", "remote", (LOOPBACK,), "load", model="m", nbytes=2 * GB): samples(seconds=2.0, load=2.0, use=0.2),
        Row("attach", "dram", kind="attach", target_seconds=0.02, model="m", nbytes=2 * GB): samples(seconds=0.005, use=0.2),
        Row("touch", "dram", kind="pages", model="m", nbytes=2 * GB): samples(seconds=0.5, use=0.2),
    }
    return assemble(run, {"model": {"name": "m", "nbytes": 2 * GB}, "method": {"rounds": 3}, "date": "2026-01-01"})


def test_ratios_are_those_worked_out_by_hand() -> None:
    document = made_document()
    rows = {row["name"]: row for row in document["results"]}
    assert document["limits"] == {
        "disk_direct_read_bytes_per_second": pytest.approx(2e9),  # of the faster setting
        "host_to_device_copy_bytes_per_second": pytest.approx(1.25e9),
        "mapped_file_bytes_per_second": pytest.approx(2e10),  # 2 GB in 0.3 s less the 0.2 s of the sum
        "resident_use_seconds_median": 0.2,
    }
    shares = {name: (row["limit"], row["ratio_to_limit"]) for name, row in rows.items()}
    assert shares["disk"] == ("disk_direct_read", pytest.approx(0.8))
    assert shares["cached"] == ("mapped_file", pytest.approx(0.1 / 0.2))
    assert shares["whole"] == (USE, pytest.approx(0.25))
    assert shares["gpu"] == ("host_to_device_copy", pytest.approx(0.8))  # the slower of the two
    assert shares["remote"] == (None, None)  # its limit was not measured
    assert rows["attach"]["ratio_to_target"] == pytest.approx(0.25) and rows["touch"]["seconds_per_gb_median"] == pytest.approx(0.25)
    assert (rows["disk"]["seconds_min"], rows["disk"]["seconds_max"], rows["disk"]["samples"]) == (0.8, 3.2, [1.6, 0.8, 3.2])
    assert rows["disk"]["parts"] == {"load_seconds_median": 1.25, "use_seconds_median": 0.3}


def test_no_ratio_is_made_of_noise() -> None:
    """A sample that is faster than the sum alone says nothing about the rest."""
    row = Row("cached", "warm", ("mapped_file",), "rest", nbytes=GB)
    document = assemble(Run(samples={row: {0: {"seconds": 0.1}}}, use_seconds=[0.2]), {})
    assert document["results"][0]["ratio_to_limit"] is None and limit_seconds(row, {}, 0.2) == (None, None)


def test_the_picture_and_the_tables_say_every_row_and_its_limit() -> None:
    document = made_document()
    ax = plot_tiers(document)
    drawn = [label.get_text() for label in ax.get_yticklabels()]
    assert drawn == ["disk", "cached", "whole", "gpu"] and [bar.get_width() for bar in ax.patches] == pytest.approx([0.8, 0.5, 0.25, 0.8])  # type: ignore[attr-defined]
    alt = tiers_alt_text(document)
    assert all(name in alt for name in drawn) and "0.80, 1.60 GB/s of 2.00 GB/s, disk" in alt
    rows = {row[0]: row for row in tiers_table(document).rows}
    assert rows["disk"] == ("disk", "2.00 GB", "1.60 s", "800 ms – 3.20 s", "1.25 s", "300 ms", "0.80 of disk, direct read")
    assert rows["attach"][-1] == "0.25 of 20.0 ms" and rows["remote"][-1] == ""
    assert parts_table(document).rows == (("touch", "500 ms", "250 ms – 1.00 s", "250 ms"),)
    with pytest.raises(ValueError, match="no load with a limit"):
        plot_tiers({**document, "results": []})


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"kind": "sllm-mini bench load"}'):
        path.write_text(text)
        with pytest.raises(FormatError):
            read_document(path, KIND)


# The server


def test_the_server_gives_whole_files_and_ranges_and_refuses_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a b.bin").write_bytes(bytes(range(256)) * 40)
    with Origin(tmp_path) as origin:
        connection = http.client.HTTPConnection("127.0.0.1", origin.port, timeout=30)

        def get(path: str, asked: str | None = None) -> tuple[int, str | None, bytes]:
            connection.request("GET", path, headers={} if asked is None else {"Range": asked})
            response = connection.getresponse()
            return response.status, response.getheader("Content-Range"), response.read()

        assert get("/model/a%20b.bin") == (200, None, bytes(range(256)) * 40)
        assert get("/model/a%20b.bin", "bytes=250-259") == (206, "bytes 250-259/10240", bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3]))
        assert get("/model/a%20b.bin", "bytes=10200-99999")[1:] == ("bytes 10200-10239/10240", bytes(range(216, 256)))
        assert get("/model/a%20b.bin", "bytes=10240-10241")[:2] == (416, "bytes */10240")
        assert get("/model/absent")[0] == get("/../../etc/hostname")[0] == get("/..")[0] == 404
        connection.close()
        assert seconds_to_fetch(origin.port, [("a%20b.bin", 10240)], 4096, 3) > 0
        with pytest.raises(RemoteError, match="answered 404"):
            seconds_to_fetch(origin.port, [("absent", 10)], 4096, 1)
        pid = origin._process.pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_remote_loader_brings_the_bytes_of_the_file(subject: Subject, tmp_path: Path) -> None:
    with Origin(subject.checkpoint.path) as origin:
        load = client.remote(Job(subject.checkpoint.path, (), "cpu", {"url": origin.url, "folder": str(tmp_path / "remote")}))
        assert sum_tensors(load()) == sum_tensors(load()) == (subject.total, subject.model.nbytes)


# Pages


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shmem").write_text("always within_size advise [never] deny force\n")
    for name in ("nr_hugepages", "free_hugepages"):
        (tmp_path / name).write_text("3\n")
    monkeypatch.setattr(pages, "_SHMEM", tmp_path / "shmem")
    monkeypatch.setattr(pages, "_RESERVED", tmp_path)
    return tmp_path


def test_huge_pages_are_asked_for_only_when_told_to_and_settings_are_set_back(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pages.granted("4 KiB pages", GB, allow=False) as asked:
        assert asked == "never"
    with pytest.raises(UnsupportedError, match=r"shmem_enabled is never.*--huge-pages"), pages.granted("transparent huge pages", GB, allow=False):
        pass
    with pytest.raises(UnsupportedError, match=r"5 huge pages of 2 MiB are needed and 3 are .*--huge-pages"), pages.granted("reserved huge pages", 9 * MIB, allow=False):
        pass
    before = {path.name: path.read_text().split() for path in kernel.iterdir()}
    with pages.granted("reserved huge pages", 6 * MIB, allow=False) as asked:  # there are enough
        assert asked == "hugetlb" and (kernel / "nr_hugepages").read_text() == "3\n"
    with pytest.raises(KeyError), pages.granted("transparent huge pages", GB, allow=True) as asked:
        assert asked == "auto" and (kernel / "shmem").read_text() == "advise"
        raise KeyError
    assert (kernel / "shmem").read_text() == "never"
    with pytest.raises(UnsupportedError, match="memory had 3"), pages.granted("reserved huge pages", 9 * MIB, allow=True):
        pass  # this kernel takes the number and gives none
    assert (kernel / "nr_hugepages").read_text().split() == before["nr_hugepages"]
    write = pages._write
    monkeypatch.setattr(pages, "_write", lambda path, value: (write(path, value), write(kernel / "free_hugepages", value)))
    with pages.granted("reserved huge pages", 9 * MIB, allow=True) as asked:
        assert asked == "hugetlb" and (kernel / "nr_hugepages").read_text() == "5"
    assert (kernel / "nr_hugepages").read_text().split() == before["nr_hugepages"]


# The client


def test_what_a_client_does_ends_with_every_byte_and_without_a_lease(subject: Subject, served: tuple[Store, str]) -> None:
    store, address = served
    parts = {
        "attach": client.attach(address, "tiny"), "touch": client.touch(address, "tiny"), "populate": client.populate(address, "tiny"), "build": client.build(address, "tiny"),
    }  # fmt: skip
    for name, found in parts.items():
        assert (found["sum"], found["nbytes"]) == (subject.total, subject.model.nbytes), name
        assert 0 < found["attach"] <= found["ready"] and found["use"] > 0
    assert parts["touch"]["touch"] > 0 and parts["populate"]["populate"] > 0 and parts["build"]["skeleton"] > 0 and parts["build"]["fill"] > 0
    gc.collect()
    end = time.monotonic() + 30
    while store.models()[0].places[0].leases and time.monotonic() < end:
        time.sleep(0.01)
    assert store.models()[0].places[0].leases == 0 and store.evict("tiny", "dram") > 0


def test_a_store_without_room_is_no_attachment(subject: Subject, tmp_path: Path) -> None:
    with Store(tmp_path / "store", dram_nbytes=2 * MIB) as store, StoreServer(store, tmp_path / "socket") as server:
        store.register("tiny", subject.checkpoint.path)
        with pytest.raises(UnsupportedError, match="lent nothing: dram has no room"):
            client.attach(server.address, "tiny")


def test_a_client_opens_the_memory_of_a_gpu(subject: Subject, tmp_path: Path) -> None:
    """Two recording fakes stand for the GPU as the store's process sees it and as the client's does."""
    owner = RecordingRuntime(memory_nbytes=64 * MIB, pinned_nbytes=64 * MIB)
    other = RecordingRuntime(beside=owner)
    gpu = owner.device()
    with Store(tmp_path / "store", device_nbytes={gpu: 32 * MIB}) as store, StoreServer(store, tmp_path / "socket") as server:
        store.register("tiny", subject.checkpoint.path)
        store.prefetch("tiny", gpu.name)
        found = client.attach(server.address, "tiny", other.device())
        gc.collect()
        assert (found["sum"], found["nbytes"]) == (subject.total, subject.model.nbytes)
        assert "ipcOpenMemHandle" in other.names() and "memcpyAsync" not in other.names() and other.leaks() == {}


# The steps


def test_the_way_to_a_gpu_is_measured_and_a_client_without_one_is_skipped(subject: Subject, tmp_path: Path) -> None:
    gpu = RecordingRuntime(memory_nbytes=1 << 30, pinned_nbytes=2 << 30).device()
    run = Run()
    with Steps([subject], tmp_path, gpu=gpu, huge_pages=False, limit_seconds=60) as steps:
        found = {row.name: (row, step) for step in (*steps.loads(), *steps.attachments()) for row in step.rows}
        for name in ("DRAM → GPU", "disk → GPU", "GPU → another process, tiny"):
            row, step = found[name]
            run.samples[row] = {}
            assert _measured(step, 0, run) == ("another" not in name), run.skipped
        row = found["DRAM → GPU"][0]
        assert row.limits == ("host_to_device_copy",) and run.samples[row][0]["seconds"] >= run.samples[row][0]["load"] > 0
        steps._empty()  # a load is counted a moment after its last byte
        with suppress(AssertionError):
            eventually(lambda: steps.store.stats().moved_nbytes["disk->cuda:0"] >= 2 * subject.checkpoint.nbytes)
        moved = steps.store.stats().moved_nbytes
        assert moved["disk->cuda:0"] >= 2 * subject.checkpoint.nbytes == moved["dram->cuda:0"], (moved, steps.store.models())  # the first is not believed
        assert found["disk → GPU"][0].limits == ("disk_direct_read", "host_to_device_copy")
        assert found["GPU → another process, tiny"][0].target_seconds == 0.02
    assert [skipped.name for skipped in run.skipped] == ["GPU → another process, tiny"]
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_no_sample(subject: Subject) -> None:
    right = {"sum": subject.total, "nbytes": subject.model.nbytes, "attach": 0.1}
    assert subject.check(right) == {"attach": 0.1}
    for wrong in ({"sum": subject.total ^ 1}, {"nbytes": subject.model.nbytes - 1}):
        with pytest.raises(WorkerError, match="wrong ones"):
            subject.check({**right, **wrong})


def test_a_step_that_fails_is_skipped_with_its_reason(subject: Subject) -> None:
    row, run = Row("a", "cold"), Run()
    run.samples[row] = {}

    def refuse() -> list[dict[str, float]]:
        raise UnsupportedError("not now")

    def fail() -> list[dict[str, float]]:
        raise WorkerError("it crashed")

    assert _measured(Step((row,), refuse), 0, run) and _measured(Step((row,), lambda: [{"seconds": 1.0}]), 1, run)
    assert not _measured(Step((row,), fail), 2, run)
    assert run.samples[row] == {1: {"seconds": 1.0}} and [skipped.reason for skipped in run.skipped] == ["not now", "it crashed"]


def test_a_directory_takes_the_place_of_the_shape_that_it_is_called_after(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(name: str, root: Path) -> Model:
        asked.append(name)
        return find_model(name, root)

    monkeypatch.setattr(measure_module, "find_model", find)
    home = os.fspath(subject.model.folder)
    with ExitStack() as made:
        found = list(_subjects(["tiny", home], tmp_path, False, made, lambda _: None))
        assert asked == [home] and [one.name for one in found] == ["tiny"]
        assert found[0].total == subject.total and open_checkpoint(found[0].checkpoint.path).nbytes == subject.checkpoint.nbytes
    assert list(tmp_path.iterdir()) == []


def test_options_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="0 rounds"):
        Options(rounds=0)


# The command and the report


def test_the_command_measures_every_tier_prints_saves_and_draws(run: Command, tmp_path: Path) -> None:
    work, saved, picture = tmp_path / "work", tmp_path / "tiers.json", tmp_path / "tiers.png"
    ended = run("bench", "tiers", "tiny", "--also", "tiny", "--rounds", 1, "--no-gpu", "--dir", work, "--json", "--save", saved, "--picture", picture)
    assert not ended.code, ended.err
    document = ended.document
    assert document == read_document(saved, KIND) and picture.read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in document["results"]}
    expected = {
        "remote → own memory", "remote → disk cache and DRAM, one pass", "disk → DRAM of the store", "disk → DRAM of the store, memory kept", "disk → own memory",
        "page cache → own memory", "mapped file", "DRAM → another process, tiny", "first touch, 4 KiB pages", "populate_read, 4 KiB pages", "module build",
        "DRAM → summed model in another process",
    }  # fmt: skip
    left_out = {skipped["name"]: skipped["reason"] for skipped in document["skipped"]}
    # Others on the machine may have the page cache at the wrong moment; then that is said, and nothing else is missing.
    assert all("page cache" in left_out.get(name, "") for name in expected - rows.keys()), left_out
    assert {"DRAM → GPU", "disk → GPU", "GPU → another process"} <= left_out.keys() and left_out["DRAM → GPU"] == "no CUDA GPU is used: not asked for"
    for row in rows.values():
        assert row["rounds"] == [0] and row["nbytes"] == document["model"]["nbytes"]
        assert row["samples"] == [row["seconds_min"]] == [row["seconds_median"]] == [row["seconds_max"]]
    assert {"memory_copy_bytes_per_second", "resident_use_seconds_median"} <= document["limits"].keys()
    for name in (name for name in rows if name.startswith("remote") and "loopback_ranges_bytes_per_second" in document["limits"]):
        assert rows[name]["limit"] == LOOPBACK and rows[name]["ratio_to_limit"] > 0
        assert rows[name]["parts"].get("published_seconds_median", 1e9) >= rows[name]["parts"]["load_seconds_median"]
    assert rows["DRAM → another process, tiny"]["target_seconds"] == 0.02 and rows["DRAM → another process, tiny"]["ratio_to_target"] > 0
    assert list(work.iterdir()) == []


@pytest.mark.gpu
def test_gpu_rows_are_measured_where_there_is_a_gpu(tmp_path: Path) -> None:
    document = measure_tiers("tiny", options=Options(rounds=1, also=("tiny",)), folder=tmp_path)
    rows = {row["name"]: row for row in document["results"]}
    assert {"DRAM → GPU", "disk → GPU", "GPU → another process, tiny"} <= rows.keys(), document["skipped"]
    assert rows["DRAM → GPU"]["limit"] == "host_to_device_copy" and rows["DRAM → GPU"]["ratio_to_limit"] > 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("no-such-model",), 1, "it is no directory"),
        (("tiny", "--save", "/no/such/folder/x.json"), 1, "there is no such folder"),
        (("tiny", "--rounds", "0"), 2, "rounds"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(args: tuple[str, ...], code: int, words: str, tmp_path: Path, run: Command) -> None:
    ended = run("bench", "tiers", *args, "--also", "tiny", "--dir", tmp_path)
    assert ended.code == code and words in ended.err


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_report_measures_tiers_and_overlap_beside_the_loaders(rehearsal: bool, tmp_path: Path) -> None:
    checkout = Path(__file__).resolve().parents[1]
    plan = Table(look(tmp_path, rehearsal=rehearsal), Folder(tmp_path / "out", rehearsal=rehearsal), checkout).plan()
    named = {unit.name: unit for unit in plan.units if unit.stage == "bench"}
    wanted = {f"{bench}-{size}" for bench in ("tiers", "overlap") for size in (("tiny",) if rehearsal else SHAPES)}
    if rehearsal and file_system_of(tmp_path) in IN_MEMORY_FILE_SYSTEMS:
        wanted.remove("overlap-tiny")  # nothing can be cold there
    assert all((name in named) != (f"bench/{name}" in plan.skipped) for name in wanted), plan.skipped
    assert not rehearsal or wanted <= named.keys()
    for name, unit in named.items():
        bench = name.partition("-")[0]
        if bench in ("tiers", "overlap"):
            assert name in wanted and unit.command[3:5] == ("bench", bench) and 0 < unit.seconds <= unit.limit_seconds
            assert unit.result == f"bench_{name.replace('-', '_')}.json"
