"""`sllm-mini bench load`: fair rounds, true sums, honest conditions, ratios by hand, and loaders that misbehave."""

from __future__ import annotations

import json
import os
import re
import struct
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run as Command
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sllm_mini.cli import bench as bench_command
from sllm_mini.errors import CheckpointError, FormatError, OutOfMemoryError, UnsupportedError
from sllm_mini.lab.bench import (
    Options,
    bench_table,
    entries,
    measure,
    ours,
    plot_roofline,
    read_document,
    roofline_alt_text,
    rows_of,
    words,
)
from sllm_mini.lab.bench import conditions as conditions_module
from sllm_mini.lab.bench.checksum import sum_files, sum_tensors
from sllm_mini.lab.bench.conditions import back_memory, make_cold, make_warm
from sllm_mini.lab.bench.document import assemble, limit_of, load_part, ratios
from sllm_mini.lab.bench.entry import SOURCE, STATES, Entry
from sllm_mini.lab.bench.limits import Sample, collect, disk_samples
from sllm_mini.lab.bench.measure import Run, Series, measure_rounds, plan_groups, plan_rounds
from sllm_mini.lab.bench.ours import MAPPED, REFERENCE
from sllm_mini.lab.bench.prepare import Files
from sllm_mini.lab.bench.process import Worker, WorkerError
from sllm_mini.lab.bench.workload import find_model, small_shapes
from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS
from sllm_mini.loading.probe_kernel import file_system_of
from sllm_mini.loading.probe_samples import Measurement, Skipped
from sllm_mini.loading.residency import cached_nbytes

MODULO = 1 << 64

FAKES = '''
import os, time
import torch
from safetensors.torch import load_file
kept = []

def good(job):
    return lambda: [tensor for file in job.files for tensor in load_file(file).values()]

def wrong(job):
    def load():
        tensors = [tensor.clone() for tensor in good(job)()]
        max(tensors, key=lambda tensor: tensor.nbytes).view(torch.uint8).view(-1)[0] ^= 1
        return tensors
    return load

def missing(job):
    return lambda: sorted(good(job)(), key=lambda tensor: tensor.nbytes)[:-1]

def leaking(job):
    def load():
        tensors = [tensor.clone() for tensor in good(job)()]
        kept.append(tensors)
        return tensors
    return load

def later(job, does):
    calls = []
    def load():
        calls.append(1)
        if len(calls) > 1:
            does()
        return good(job)()
    return load

def crashing(job):
    return later(job, lambda: (start_server(), print("the disk is on fire", file=__import__("sys").stderr, flush=True), os._exit(3)))

def start_server():
    with open(__file__ + ".pid", "w") as file:
        file.write(str(__import__("subprocess").Popen(["sleep", "600"]).pid))

def hanging(job):
    return later(job, lambda: time.sleep(3600))

def refusing(job):
    print("a library that talks on standard output")
    raise RuntimeError("it wants a better machine")
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tensors of every awkward kind: odd bytes, no dimension, none at all; some megabytes."""
    home = tmp_path_factory.mktemp("models") / "odd"
    home.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(1024, 2048, generator=generator).to(torch.bfloat16),
        "odd": torch.randint(0, 256, (13,), dtype=torch.uint8, generator=generator),
        "scalar": torch.tensor(-1.5),
        "none": torch.zeros(0, 7),
        "flags": torch.rand(3, 3, generator=generator) > 0.5,
    }
    save_file(tensors, home / "model.safetensors")
    return home


def on_a_disk(path: Path) -> None:
    if file_system_of(path) in IN_MEMORY_FILE_SYSTEMS:
        pytest.skip(f"{path} lives in memory, so nothing there can be cold")


def sum_by_hand(tensors: dict[str, torch.Tensor]) -> int:
    total = 0
    for tensor in tensors.values():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        data += bytes(-len(data) % 8)
        total += sum(struct.unpack(f"<{len(data) // 8}Q", data))
    return total % MODULO


# The sum


def test_the_sum_of_known_bytes() -> None:
    assert sum_tensors([torch.tensor([1, 2], dtype=torch.int64), torch.tensor([3], dtype=torch.uint8)]) == (6, 17)
    assert sum_tensors([torch.tensor([-1, -1], dtype=torch.int64)]) == (MODULO - 2, 16)
    assert sum_tensors([]) == (0, 0)


def test_the_sum_of_a_file_is_that_of_its_tensors(model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    assert sum_files([file]) == sum_tensors(tensors.values()) == (sum_by_hand(tensors), sum(t.nbytes for t in tensors.values()))


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(0, 9), st.booleans())
def test_neither_alignment_nor_layout_changes_the_sum(data: list[int], skip: int, transposed: bool) -> None:
    padded = torch.tensor([7] * skip + data, dtype=torch.uint8)
    tensor = padded[skip:]  # starts anywhere, also off a word
    if transposed and len(data) % 2 == 0 and data:
        tensor = torch.tensor(data, dtype=torch.uint8).view(2, -1).t().contiguous().t()
    assert sum_tensors([tensor]) == (sum_by_hand({"x": torch.tensor(data, dtype=torch.uint8)}), len(data))


def test_a_word_that_torch_cannot_view_is_summed_all_the_same() -> None:
    data = bytearray(range(32))
    shifted = torch.frombuffer(data, dtype=torch.uint8, offset=4)[4:20]  # on a word in memory, off it in its storage
    assert sum_tensors([shifted]) == (sum(struct.unpack("<2Q", data[8:24])), 16)
    turned = torch.frombuffer(data, dtype=torch.uint8).view(8, 4).t()  # rows of eight, not one after another
    assert sum_tensors([turned]) == (sum_by_hand({"turned": turned}), 32)
    assert sum_tensors([torch.frombuffer(data, dtype=torch.uint8, offset=3)[:16]]) == (sum(struct.unpack("<2Q", data[3:19])), 16)


def test_one_flipped_bit_changes_the_sum(model: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    before = sum_tensors(tensors.values())
    tensors["odd"][12] ^= 128
    assert sum_tensors(tensors.values()) != before


# The plan


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_every_round_holds_every_loader_and_state_once(names: int, rounds: int, seed: int) -> None:
    loaders = [f"loader {number}" for number in range(names)]
    plan = plan_rounds(loaders, ("cold", "warm"), rounds, seed)
    assert len(plan) == rounds and plan == plan_rounds(loaders, ("cold", "warm"), rounds, seed)
    for order in plan:
        assert Counter(order) == {(name, state): 1 for name in loaders for state in ("cold", "warm")}


def test_rounds_are_in_different_orders() -> None:
    plan = plan_rounds(list("abcdefgh"), ("cold", "warm"), 5, seed=0)
    assert len({tuple(order) for order in plan}) == 5


def test_formats_share_the_disk_only_where_it_has_room() -> None:
    formats = ["sllm", SOURCE, "torch", "tensorizer"]
    assert plan_groups(formats, 10**9, 10**11) == [[SOURCE, "sllm", "torch", "tensorizer"]]
    assert plan_groups(formats, 10**9, 4 * 10**9) == [[SOURCE, "sllm"], ["torch"], ["tensorizer"]]
    assert plan_groups([SOURCE], 10**12, 0) == [[SOURCE]]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"states": ()}, {"states": ("hot",)}, {"memory": "borrowed"}])
def test_options_that_measure_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Options(**wrong)


# Conditions


def test_cold_is_out_of_the_page_cache_and_warm_is_in_it(tmp_path: Path) -> None:
    on_a_disk(tmp_path)
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_bytes(os.urandom(3_000_001))

    def held() -> int:
        found = 0
        for file in files:
            with file.open("rb") as opened:
                found += cached_nbytes(opened.fileno(), 0, 3_000_001) or 0
        return found

    make_cold(files)
    assert held() == 0
    make_warm(files)
    assert held() == 6_000_002


def test_what_cannot_be_made_cold_or_warm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    monkeypatch.setattr(conditions_module.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(conditions_module, "cached_nbytes", lambda fd, offset, nbytes: nbytes // 2)
    with pytest.raises(UnsupportedError, match="50,000 of 100,000 bytes stay in the page cache"):
        make_cold([file])
    with pytest.raises(UnsupportedError, match="only 50,000 of 100,000"):
        make_warm([file])
    monkeypatch.setattr(conditions_module, "cached_nbytes", lambda fd, offset, nbytes: None)
    with pytest.raises(UnsupportedError, match="does not say"):
        make_cold([file])


def test_backing_memory_never_asks_for_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Memory:
        def __init__(self, nbytes: int, *, populate: bool) -> None:
            asked.append(nbytes)

        def close(self) -> None: ...

    monkeypatch.setattr(conditions_module, "HostMemory", Memory)
    monkeypatch.setattr(conditions_module, "available_nbytes", lambda: 4000)
    back_memory(1000)
    back_memory(10**12)
    assert asked == [1000, 3000]


# Models and files


def test_small_tensors_are_many_seeded_and_mixed() -> None:
    shapes = small_shapes(10_000, seed=0)
    assert len(shapes) == 10_000 and shapes == small_shapes(10_000, seed=0) != small_shapes(10_000, seed=1)
    assert {len(shape) for shape in shapes.values()} == {0, 2} and len(set(shapes.values())) > 20
    assert 130e6 < sum(2 * int(np.prod(shape)) for shape in shapes.values()) < 500e6


def test_a_model_is_a_directory_a_shape_or_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sllm_mini.lab.bench import workload

    found = find_model(str(model), tmp_path)
    assert (found.name, found.tensor_count, found.made, found.is_whole) == ("odd", 5, False, False)
    real = workload._write_small
    monkeypatch.setattr(workload, "_write_small", lambda target, seed: real(target, seed, 100))
    small = find_model("small", tmp_path)
    assert small.made and small.tensor_count == len(load_file(small.files[0])) == 100
    assert not find_model("small", tmp_path).made
    with pytest.raises(CheckpointError, match="no directory, and no shape has that name"):
        find_model("llama-9000", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        find_model(str(tmp_path), tmp_path)


def test_prepared_files_are_made_once_kept_or_deleted(model: Path, tmp_path: Path) -> None:
    written: list[str] = []

    def write(format: str, source: Path, files: Any, target: Path) -> None:
        written.append(format)
        if format == "broken":
            target.write_bytes(b"half")
            raise OSError("no space")
        target.write_bytes(b"whole")

    def files() -> Files:
        return Files(model, [model / "model.safetensors"], tmp_path / "formats", write)

    first = files()
    first.make("torch")
    assert first.read_by("torch") == [tmp_path / "formats/torch/model"]
    again = files()
    again.make("torch")
    assert written == ["torch"]
    again.close()  # it made nothing, so it deletes nothing
    assert first.path("torch").exists()
    with pytest.raises(OSError):
        first.make("broken")
    assert not (tmp_path / "formats/broken").exists()
    first.close()
    assert not (tmp_path / "formats").exists() and first.path(SOURCE) == model


# Loaders that misbehave


@pytest.fixture(scope="module")
def faked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    """One run of two rounds with every fake."""
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "bench_fakes.py").write_text(FAKES)
    names = ("good", "wrong", "missing", "leaking", "crashing", "hanging", "refusing")
    loaders = [Entry(name, "peer", f"bench_fakes:{name}") for name in names]
    loaders += [
        Entry("absent", "peer", "bench_fakes:good", package="no-such-package"),
        Entry("whole", "peer", "bench_fakes:good", whole_model=True),
        Entry("gpu", "peer", "bench_fakes:good", cuda_only="it wants a GPU"),
    ]
    stages: list[str] = []
    found = find_model(str(model), folder)
    states = ("warm",) if file_system_of(folder) in IN_MEMORY_FILE_SYSTEMS else ("cold", "warm")
    options = Options(rounds=2, states=states, limit_seconds=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        run = measure_rounds(found, loaders, "good", folder, options, on_stage=stages.append)
    assert not (folder / "odd-formats").exists()
    server = Path("/proc", (folder / "bench_fakes.py.pid").read_text(), "stat")
    assert not server.exists() or server.read_text().rpartition(")")[2].split()[0] == "Z", "it outlived the loader that crashed"
    return run, stages


def test_a_loader_that_misbehaves_is_skipped_with_its_reason_and_the_rest_goes_on(faked: tuple[Run, list[str]]) -> None:
    run, _ = faked
    reasons = {skipped.name: skipped.reason for skipped in run.skipped}
    assert {series.entry.name for series in run.series} == {"good", "leaking"}
    assert all(sorted(series.samples) == [0, 1] for series in run.series) and len(run.use_seconds) == 2
    assert "the sum over its bytes is not that of the file" in reasons["wrong"]
    assert "bytes of tensors and the file holds" in reasons["missing"]
    assert reasons["crashing"] == "its process ended with exit code 3: the disk is on fire"
    assert reasons["hanging"] == "it gave no answer within 5 seconds and was ended"
    assert reasons["refusing"] == "RuntimeError: it wants a better machine"
    assert reasons["absent"] == "no-such-package is not installed"
    assert reasons["whole"] == "it builds a model, and odd has no config.json"
    assert reasons["gpu"] == "it wants a GPU"


def test_what_a_loader_keeps_is_seen(faked: tuple[Run, list[str]], model: Path) -> None:
    run, _ = faked
    nbytes = (model / "model.safetensors").stat().st_size
    kept = {(series.entry.name, number): sample["kept_nbytes"] for series in run.series for number, sample in series.samples.items()}
    assert min(kept["leaking", 0], kept["leaking", 1]) > 2 * nbytes * 0.9


def test_a_sample_holds_the_load_the_sum_and_what_the_kernel_counted(faked: tuple[Run, list[str]]) -> None:
    run, _ = faked
    shares: dict[str, list[float]] = {"cold": [], "warm": []}
    for series in run.series:
        for sample in series.samples.values():
            assert 0 < sample["load_seconds"] < sample["seconds"]
            assert sample["counters"]["minor_faults"] > 0
            if sample["counters"]["disk_nbytes"] is not None:
                shares[series.state].append(sample["counters"]["disk_nbytes"] / sample["nbytes"])
    assert all(share > 0.9 for share in shares["cold"])
    # Another process may empty the page cache at any moment, but not at every one.
    assert min(shares["warm"], default=0.0) < 0.1


def test_limits_that_fail_in_a_round_lose_that_round_s_limits_only(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_disk(tmp_path)
    failures = iter([OutOfMemoryError("the host has no memory left"), WorkerError("CUDA out of memory")])

    def fail(*_: object) -> None:
        raise next(failures)

    monkeypatch.setattr(measure._Bench, "_limits", fail)
    chosen = [entry for entry in ours.entries(ladder=False) if entry.name == ours.REFERENCE]
    run = measure_rounds(find_model(str(model), tmp_path), chosen, ours.REFERENCE, tmp_path, Options(rounds=2, states=("warm",)))
    assert [len(series.samples) for series in run.series] == [2]
    assert [(s.name, s.reason) for s in run.skipped] == [
        ("limits, round 1", "the host has no memory left"), ("limits, round 2", "CUDA out of memory"),
    ]  # fmt: skip


def test_a_worker_that_is_told_nonsense_says_so_and_goes_on() -> None:
    with Worker(limit_seconds=60) as worker:
        with pytest.raises(WorkerError, match="nothing can be done"):
            worker.ask(do="load")
        assert worker.ask(do="call", function="os.path:basename", arguments=["a/b"]) == {"value": "b"}


# Limits


def test_the_disk_is_swept_by_direct_reads_of_that_file(tmp_path: Path) -> None:
    on_a_disk(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(5 << 20))
    found = list(disk_samples(file))
    samples = [one for one in found if isinstance(one, Sample)]
    if not samples:
        assert any("direct" in one.reason for one in found if isinstance(one, Skipped))
        pytest.skip("direct reads are refused here")
    assert {one.name for one in samples} == {"disk_direct_read"} and all(one.seconds > 0 and 0 < one.nbytes <= 5 << 20 for one in samples)


def test_a_file_too_small_to_measure_a_disk_with_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (found,) = disk_samples(tmp_path / "file")
    assert isinstance(found, Skipped) and "too small" in found.reason


def test_samples_of_rounds_become_one_measurement_per_setting() -> None:
    found = collect([Sample("disk", "a", 10, 1.0), Sample("disk", "b", 10, 3.0), Sample("disk", "a", 10, 2.0)])
    assert found == [Measurement("disk", "a", 10, (1.0, 2.0)), Measurement("disk", "b", 10, (3.0,))]


# The document


def sample(seconds: float, load: float = 0.1) -> dict[str, Any]:
    return {"seconds": seconds, "load_seconds": load, "kept_nbytes": 0, "counters": {"minor_faults": 7, "disk_nbytes": None}}


def made_document() -> dict[str, Any]:
    """Ten bytes; the disk gives 10 B/s, the sum alone takes 1 s. Worked out by hand in the tests below."""
    ours, peer, mapped = Entry(REFERENCE, "ours", "m:f"), Entry("peer", "peer", "m:f"), Entry(MAPPED, "limit", "m:f")
    run = Run(
        series=[
            Series(ours, "cold", 0, {0: sample(2.0), 1: sample(3.0), 2: sample(2.25)}),
            Series(peer, "cold", 0, {0: sample(5.0), 1: sample(3.0), 2: sample(4.5)}),
            Series(mapped, "warm", 0, {0: sample(1.5)}),
            Series(ours, "warm", 0, {0: sample(1.25)}),
            Series(peer, "warm", 0, {0: sample(0.5)}),
        ],
        limits=[Measurement("disk_direct_read", "a", 10, (1.0,)), Measurement("disk_direct_read", "b", 10, (2.0,))],
        use_seconds=[0.5, 1.0, 4.0],
        skipped=[Skipped("other", "it is not installed")],
        groups=[[SOURCE]],
    )
    facts = {
        "machine": {}, "date": "2026-01-01T00:00:00+00:00", "packages": {}, "groups": run.groups, "command": [],
        "model": {"name": "made up", "tensor_count": 1, "nbytes": 10, "weights": "none"},
        "method": {"device": "cpu", "rounds": 3, "states": ["cold", "warm"], "memory": "fresh", "seed": 0},
    }  # fmt: skip
    return assemble(run, nbytes=10, device="cpu", reference=REFERENCE, facts=facts)


def row(document: dict[str, Any], name: str, state: str) -> dict[str, Any]:
    (found,) = [one for one in document["results"] if (one["name"], one["state"]) == (name, state)]
    return found


def test_ratios_are_those_worked_out_by_hand() -> None:
    document = made_document()
    ours, peer = row(document, REFERENCE, "cold"), row(document, "peer", "cold")
    assert document["limits"] == {"disk_direct_read_bytes_per_second": 10.0, "resident_use_seconds_median": 1.0, "mapped_file_bytes_per_second": 20.0}
    assert (ours["seconds_median"], ours["load_part_seconds_median"], ours["limit"]) == (2.25, 1.25, "disk_direct_read")
    assert ours["ratio_to_limit"] == 1.0 / 1.25 and peer["ratio_to_limit"] == 1.0 / 3.5
    # Round by round: 5/2, 3/3, 4.5/2.25.
    assert (peer["ratio_to_reference_median"], peer["ratio_to_reference_min"], peer["ratio_to_reference_max"]) == (2.0, 1.0, 2.5)
    assert (ours["ratio_to_reference_min"], ours["ratio_to_reference_max"]) == (1.0, 1.0)
    assert row(document, REFERENCE, "warm")["ratio_to_limit"] == 0.5 / 0.25
    assert row(document, MAPPED, "warm")["ratio_to_limit"] == 1.0
    assert peer["minor_faults_median"] == 7 and peer["disk_nbytes_median"] is None


def test_no_ratio_is_made_of_noise() -> None:
    assert row(made_document(), "peer", "warm")["ratio_to_limit"] is None  # faster than the sum alone
    assert load_part(1.0, 1.0) is None and load_part(1.0, None) is None and load_part(1.5, 1.0) == 0.5


def test_the_limit_of_a_load_is_the_slowest_thing_on_its_way() -> None:
    limits = {"disk_direct_read_bytes_per_second": 2.0, "host_to_device_copy_bytes_per_second": 5.0, "mapped_file_bytes_per_second": 50.0}
    assert limit_of("cold", "cpu", limits, 10) == ("disk_direct_read", 5.0)
    assert limit_of("warm", "cpu", limits, 10) == ("mapped_file", 0.2)
    assert limit_of("cold", "cuda:0", limits, 10) == ("disk_direct_read", 5.0)
    assert limit_of("warm", "cuda:0", limits, 10) == ("host_to_device_copy", 2.0)
    assert limit_of("cold", "cuda:0", {"host_to_device_copy_bytes_per_second": 5.0}, 10) == (None, None)


def test_only_rounds_that_both_lived_through_are_compared() -> None:
    assert ratios({0: 2.0, 2: 9.0}, {0: 1.0, 1: 5.0, 2: 3.0}) == [2.0, 3.0] and ratios({0: 1.0}, {}) == []


def test_a_group_is_compared_with_its_own_reference() -> None:
    ours, peer = Entry(REFERENCE, "ours", "m:f"), Entry("peer", "peer", "m:f")
    series = [Series(ours, "cold", 0, {0: sample(1.0)}), Series(ours, "cold", 1, {0: sample(4.0)}), Series(peer, "cold", 1, {0: sample(8.0)})]
    document = assemble(Run(series=series), nbytes=1, device="cpu", reference=REFERENCE, facts={})
    assert [one["name"] for one in document["results"]] == [REFERENCE, "peer"]
    assert row(document, "peer", "cold")["ratio_to_reference_median"] == 2.0 and row(document, REFERENCE, "cold")["seconds_median"] == 1.0


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    for text, problem in (("{", "not JSON"), ("[]", "it lacks"), ('{"kind": "other"}', "it lacks limits, machine")):
        file.write_text(text)
        with pytest.raises(FormatError, match=problem):
            read_document(file)


# Picture and table


def test_the_picture_shows_every_loader_and_the_limit_of_each_state() -> None:
    document = made_document()
    axes = plot_roofline(document)
    panels = axes.get_figure().axes
    assert len(panels) == 2
    for panel, state in zip(panels, ("cold", "warm"), strict=True):
        assert [label.get_text() for label in panel.get_yticklabels()] == [one["name"] for one in rows_of(document, state)]
        assert "GB/s" in panel.get_xlabel()
    # 10 bytes, 1 s of disk and 1 s of use: 5 B/s.
    (roof,) = panels[0].lines[-1:]
    assert roof.get_xdata()[0] == pytest.approx(5e-9)
    text = roofline_alt_text(document)
    assert "peer" in text and "The most that the disk allows is 5 B/s" in text
    with pytest.raises(ValueError, match="no results"):
        plot_roofline({"results": []})


def test_the_table_says_what_the_picture_shows() -> None:
    table = bench_table(made_document(), "cold")
    assert [cells[0] for cells in table.rows] == [REFERENCE, "peer"]
    assert table.rows[1][2:] == ("4.50 s", "3.00 s – 5.00 s", "0.29", "2.00 (1.00 – 2.50)")
    assert "the disk" in table.note and table.emphasis == {0}


def test_a_share_says_what_it_is_of_and_what_one_above_1_means() -> None:
    document = made_document()
    assert "less the sum over every byte" in bench_table(document, "cold").note and "Above 1" not in bench_table(document, "cold").note
    assert "Above 1: the model is too small" in bench_table(document, "warm").note  # ours: 2.00
    for row_ in document["results"]:
        row_["ratio_to_limit"] = 1.004  # reads as 1.00
    assert "Above 1" not in bench_table(document, "cold").note
    for row_ in document["results"]:
        row_["limit"] = row_["ratio_to_limit"] = None
    assert bench_table(document, "cold").note == ""


def test_one_round_has_no_spread() -> None:
    cells = {cells[0]: cells for cells in bench_table(made_document(), "warm").rows}
    assert cells[REFERENCE][3] == "one round" and cells[REFERENCE][5] == "1.00" and cells["peer"][5] == "0.40"
    ours, peer = Entry(REFERENCE, "ours", "m:f"), Entry("peer", "peer", "m:f")
    series = [Series(ours, "cold", 0, {0: sample(1.0), 1: sample(2.0)}), Series(peer, "cold", 0, {1: sample(3.0), 2: sample(4.0)})]
    facts = {"model": {"name": "made up"}}
    document = assemble(Run(series=series), nbytes=1, device="cpu", reference=REFERENCE, facts=facts)
    assert row(document, "peer", "cold")["ratio_to_reference_samples"] == [1.5]
    cells = {cells[0]: cells for cells in bench_table(document, "cold").rows}
    assert cells["peer"][3] == "3.00 s – 4.00 s" and cells["peer"][5] == "1.50"  # one round that both lived through
    assert cells[REFERENCE][5] == "1.00 (1.00 – 1.00)"


def test_a_limit_names_its_setting_and_how_far_its_rounds_lie_apart() -> None:
    measured = [Measurement("disk_direct_read", "a", 8, (1.0, 4.0, 2.0)), Measurement("disk_direct_read", "b", 8, (0.5, 8.0, 8.0)), Measurement("memory_copy", "c", 8, (1.0,))]
    document = assemble(Run(limits=measured), nbytes=8, device="cpu", reference=REFERENCE, facts={})
    best = document["limit_settings"]["disk_direct_read"]
    assert best == {
        "setting": "a", "settings_tried": 2, "samples": [1.0, 4.0, 2.0],
        "bytes_per_second_median": 4.0, "bytes_per_second_min": 2.0, "bytes_per_second_max": 8.0,
    }  # fmt: skip
    assert document["limits"]["disk_direct_read_bytes_per_second"] == best["bytes_per_second_median"]


def test_the_printed_table_says_settings_spreads_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    document = made_document()
    bench_command._print(document)
    lines = capsys.readouterr().out.splitlines()
    (disk,) = [line for line in lines if line.startswith("disk, direct read")]
    assert "10 B/s (one round), a, the best of 2 settings" in disk
    (mapped,) = [line for line in lines if line.startswith("a mapped file") and "B/s" in line]
    assert mapped.split() == ["a", "mapped", "file", "20", "B/s"]
    assert [line.startswith("Against the disk stands the load alone") for line in lines].count(True) == 1
    assert [line.startswith("Against a mapped file stands the load alone") and "Above 1" in line for line in lines].count(True) == 1
    assert any(line.startswith("Cold: every byte from the disk") for line in lines)
    assert "2.00 (1.00 – 2.50)" in "\n".join(lines) and any("one round" in line and line.endswith("0.40") for line in map(str.rstrip, lines))
    document["limit_settings"]["disk_direct_read"] |= {"samples": [1.0, 2.0], "bytes_per_second_min": 5.0, "settings_tried": 1}
    bench_command._print(document)
    assert "10 B/s (5 B/s – 10 B/s), a\n" in re.sub(" +\n", "\n", capsys.readouterr().out)


def test_words_cover_every_limit_and_state() -> None:
    names = (words.DISK, words.LINK, words.MAPPED_FILE, words.COPY)
    for slowest in names:
        rates = {f"{name}_bytes_per_second": 1.0 if name == slowest else 2.0 for name in names}
        for state, device in product(STATES, ("cpu", "cuda:0")):
            name, _ = limit_of(state, device, rates, 1)
            assert name in words.LIMIT_NOUNS and (state == "warm" or name in words.COLD_LIMITS)
    assert set(words.STATE_TITLES) == set(words.STATE_SOURCES) == set(STATES)
    assert {f"{name}_bytes_per_second" for name in words.LIMIT_LABELS} == set(rates)


# The loaders and the command


def test_every_loader_is_named_once_and_asked_for_by_its_beginning() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names)) and {REFERENCE, MAPPED, "torch.load", "safetensors load_file", "Run:ai streamer"} <= set(names)
    assert {entry.kind for entry in entries(ladder=False, with_peers=False)} == {"ours", "limit"}
    kept = [entry.name for entry in entries(only=["torch"])]
    assert kept == [REFERENCE, "torch.load", "torch.load, mmap", MAPPED]
    assert MAPPED not in [entry.name for entry in entries("cuda:0")]
    for wrong in ("tarball", "Torch"):
        with pytest.raises(UnsupportedError, match=f"no loader '{wrong}'.*upper and lower case as here: .*'torch.load', 'torch.load, mmap'"):
            entries(only=[wrong])


@pytest.fixture
def command(run: Command) -> Command:
    return partial(run, "bench", "load")


def test_the_command_measures_prints_saves_and_draws(command: Command, model: Path, tmp_path: Path) -> None:
    saved, drawn, folder = tmp_path / "bench.json", tmp_path / "bench.png", tmp_path / "work"
    shared = (model, "--rounds", "1", "--no-ladder", "--only", "safetensors load_file, pread", "--dir", folder)
    code, out, err = command(*shared, "--json", "--save", saved, "--picture", drawn)
    assert code == 0 and err == ""
    document = json.loads(out)
    assert document == read_document(saved) and drawn.read_bytes()[:4] == b"\x89PNG"
    assert document["model"] == {"name": "odd", "tensor_count": 5, "nbytes": document["model"]["nbytes"], "weights": "the directory's own"}
    assert document["method"]["memory"] == "backed" and document["packages"]["safetensors"] and document["machine"]["kernel"]
    for state in document["method"]["states"]:
        names = {one["name"] for one in document["results"] if one["state"] == state}
        if state == "cold" and not names:
            assert any(skipped["name"] == "cold" for skipped in document["skipped"])
            continue
        assert {REFERENCE, "safetensors load_file, pread"} <= names
    for one in document["results"]:
        assert len(one["samples"]) == 1 and one["nbytes"] == document["model"]["nbytes"]
        assert one["seconds_min"] <= one["seconds_median"] <= one["seconds_max"]
    assert not list(folder.rglob("data-*")), "prepared files are deleted"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nowhere",), 1, "no directory, and no shape has that name"),
        (("small", "--only", "tarball"), 1, "there is no loader 'tarball'"),
        (("small", "--device", "tpu"), 1, "there is no device 'tpu'"),
        (("small", "--save", "/no/such/folder/x.json"), 1, "/no/such/folder"),
        (("small", "--state", "hot"), 2, "hot"),
        (("small", "--rounds", "0"), 2, "--rounds"),
        (("small", "--memory", "rented"), 2, "--memory"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(command: Command, tmp_path: Path, args: tuple[str, ...], code: int, words: str) -> None:
    ended, out, err = command(*args, "--dir", tmp_path)
    assert ended == code and out == "" and words in err and "Traceback" not in err
    if code == 1:
        ended, out, err = command(*args, "--dir", tmp_path, "--json")
        assert ended == 1 and out == "" and words in json.loads(err.splitlines()[-1])["error"]["message"]
