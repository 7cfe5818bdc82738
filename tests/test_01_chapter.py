"""Chapter 01: the three formats hold the same bytes, readers read them, counters and figures say what happened."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint
from sllm_mini.errors import LoadError, ResourceError
from sllm_mini.lab import models
from sllm_mini.lab.counters import Counters
from sllm_mini.lab.formats import damage
from sllm_mini.lab.formats import files as formats
from sllm_mini.lab.formats import maps as format_plots
from sllm_mini.lab.formats import plots as reader_plots
from sllm_mini.lab.formats import record as reader_record
from sllm_mini.lab.formats import runs as reader_runs
from sllm_mini.lab.formats.files import OURS, SAFETENSORS, TORCH, Format, StoredTensor
from sllm_mini.lab.formats.readers import READERS
from sllm_mini.lab.formats.runs import ReaderRun, measure_readers, median_runs, sum_of
from sllm_mini.loading.probe import IN_MEMORY_FILE_SYSTEMS, file_system_of
from sllm_mini.loading.residency import cached_nbytes
from sllm_mini.resources import resource

CHAPTER = next((Path(__file__).parents[1] / "chapters").glob("01_*.ipynb"))
TENSOR = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("formats") / "tiny")


@pytest.fixture(scope="module")
def written(tiny: Checkpoint) -> dict[str, Format]:
    return formats.write_formats(tiny, tiny.path.parent)


@pytest.fixture
def axes() -> Iterator[None]:
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def made(*layers: int, name: str = OURS, nbytes: int = 100, start: int = 0) -> Format:
    """A file that holds one tensor of `nbytes` for each of `layers`, in that order."""
    stored = [StoredTensor(f"t{layer}", start + at * nbytes, nbytes, layer) for at, layer in enumerate(layers)]
    names = tuple(f"model.layers.{layer}" for layer in range(max(layers) + 1))
    return Format(name, Path("x"), start + nbytes * len(layers), names, tuple(stored))


def test_each_format_says_where_every_byte_of_a_tensor_is(written: dict[str, Format]) -> None:
    state = torch.load(written[TORCH].path, weights_only=True)
    for fmt in written.values():
        data = (fmt.path / "data-00000.bin" if fmt.path.is_dir() else fmt.path).read_bytes()
        assert fmt.tensor_nbytes == written[OURS].tensor_nbytes
        for tensor in fmt.stored:
            assert data[tensor.offset : tensor.end] == bytes(state[tensor.name].reshape(-1).view(torch.uint8).numpy()), tensor.name


def test_ties_are_written_once(written: dict[str, Format]) -> None:
    assert len({tuple(sorted(tensor.name for tensor in fmt.stored)) for fmt in written.values()}) == 1
    assert "lm_head.weight" in torch.load(written[TORCH].path, weights_only=True, mmap=True)
    assert "lm_head.weight" not in {tensor.name for tensor in written[TORCH].stored}


def test_our_tensors_are_aligned_and_in_execution_order(written: dict[str, Format]) -> None:
    ours = written[OURS]
    assert ours.alignment >= 256 and ours.stored[0].offset == 0
    assert format_plots.order_text(ours) == "execution order"
    rows = {row[0]: row for row in format_plots.formats_table(written).rows}
    assert rows[OURS][-1] == "execution order" and set(rows) == {TORCH, SAFETENSORS, OURS}


def test_a_layer_runs_when_all_before_it_are_there() -> None:
    ordered, sorted_by_name = made(0, 1, 2), made(0, 2, 1)
    assert ordered.needed_nbytes() == [100, 200, 300]
    assert sorted_by_name.needed_nbytes() == [100, 300, 300]
    assert [sorted_by_name.runnable_layers(nbytes) for nbytes in (0, 99, 100, 250, 300)] == [0, 0, 1, 1, 3]
    assert sorted_by_name.arrived_shares(250) == [1.0, 0.5, 1.0]
    assert format_plots.order_text(sorted_by_name) == "layer 2 follows layer 0"


def test_the_shares_of_a_tensor_in_pieces_add_up() -> None:
    fmt = replace(made(0, 1), stored=(StoredTensor("a", 10, 30, 0), StoredTensor("b", 40, 60, 1), StoredTensor("c", 100, 10, 0)))
    assert fmt.needed_nbytes() == [110, 110]
    assert fmt.arrived_shares(70) == [0.75, 0.5]
    assert fmt.between_nbytes == 0 and fmt.alignment == 2


@pytest.mark.usefixtures("axes")
def test_figures_say_what_they_show() -> None:
    both = {SAFETENSORS: made(0, 2, 1, name=SAFETENSORS), OURS: made(0, 1, 2)}
    assert "layer 2 follows layer 0" in format_plots.file_map_text(both)
    assert "safetensors 1 of 3, sllm_mini 2 of 3" in format_plots.prefix_text(both, share=0.7)
    assert "on each other" not in format_plots.prefix_text(both)
    assert "safetensors and sllm_mini lie on each other" in format_plots.prefix_text({SAFETENSORS: made(0, 1, name=SAFETENSORS), OURS: made(0, 1)})
    assert len(format_plots.plot_file_map(both).patches) == 6
    steps = {line.get_label(): list(line.get_ydata()) for line in format_plots.plot_prefix(both).get_lines()}
    assert steps == {name: [0, 1, 2, 3, 3] for name in both}
    drawn = format_plots.draw_arrival(both, 250e-9)
    assert "safetensors: 1 of 3 layers can run and 1 more are whole" in drawn.alt_text
    assert "sllm_mini: 2 of 3 layers can run and 0 more" in drawn.alt_text


@pytest.fixture(scope="module")
def runs(written: dict[str, Format]) -> list[ReaderRun]:
    return measure_readers(written, rounds=1)


def test_every_reader_reads_the_same_bytes(runs: list[ReaderRun], written: dict[str, Format]) -> None:
    assert {run.checksum for run in runs} == {sum_of(torch.load(written[TORCH].path, weights_only=True))}
    assert {(run.reader.name, run.warm) for run in runs} >= {(reader.name, warm) for reader in READERS if "direct" not in reader.name for warm in (False, True)}


def test_the_page_cache_is_as_asked(runs: list[ReaderRun], written: dict[str, Format]) -> None:
    with written[TORCH].path.open("rb") as file:
        if cached_nbytes(file.fileno(), 0, 1) is None:
            pytest.skip("this system does not say what the page cache holds")
    assert all(run.cached_share == 1 for run in runs if run.warm)
    if file_system_of(written[TORCH].path.parent) not in IN_MEMORY_FILE_SYSTEMS:
        assert all(run.cached_share is not None and run.cached_share < 1 for run in runs if not run.warm)


def test_counters_show_what_each_reader_does(runs: list[ReaderRun]) -> None:
    by_name = {run.reader.name: run for run in median_runs(runs, warm=True)}
    if any(run.copies_per_byte is None for run in by_name.values()):
        pytest.skip("this kernel does not count reads")
    calls = {name: run.total("read_calls") or 0 for name, run in by_name.items()}
    assert calls["ours, one read"] < 10 < 50 < calls["safetensors, by tensor"]
    assert 0.99 < (by_name["ours, one read"].copies_per_byte or 0) < 1.1
    assert 0.99 < (by_name["torch.load"].copies_per_byte or 0) < 1.3
    assert (by_name["ours, mapped"].total("read_nbytes") or 0) < 0.1 * by_name["ours, mapped"].nbytes
    assert (by_name["torch.load, mmap"].total("read_nbytes") or 0) < 0.1 * by_name["torch.load, mmap"].nbytes


def run_of(number: int, seconds: float, *, use: float = 0.0, warm: bool = False, checksum: int = 1) -> ReaderRun:
    load = Counters(seconds=seconds, user_seconds=0.25 * seconds, system_seconds=0.5 * seconds, minor_faults=10, read_calls=3, read_nbytes=100, disk_nbytes=50, peak_nbytes=100)
    used = Counters(seconds=use, read_calls=0, read_nbytes=0, disk_nbytes=0, peak_nbytes=0)
    return ReaderRun(READERS[number], warm, 100, 0.0, load, used, checksum)


def test_the_median_is_a_run_that_happened() -> None:
    three = [run_of(0, seconds) for seconds in (3.0, 1.0, 2.0)]
    assert median_runs([*three, run_of(0, 9.0, warm=True)], warm=False) == [three[2]]


def test_two_readers_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch, written: dict[str, Format]) -> None:
    sums = iter(range(100))

    class Pool:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> Pool:
            return self

        def result(self) -> ReaderRun:
            return run_of(0, 1.0, checksum=next(sums))

    monkeypatch.setattr(reader_runs, "ProcessPoolExecutor", Pool)
    with pytest.raises(LoadError, match="different bytes"):
        measure_readers(written, rounds=1)


@pytest.mark.usefixtures("axes")
def test_tables_and_sentences_follow_from_the_runs() -> None:
    several = [run_of(0, 4.0), run_of(1, 1.0, use=3.0), run_of(0, 2.0, warm=True), run_of(1, 1.0, warm=True)]
    assert reader_plots.deferred_text(several).endswith("torch.load, mmap 75%.")
    assert "every reader had done most" in reader_plots.deferred_text(several[:1])
    row = reader_plots.counters_table(several, warm=False).rows[0]
    assert row == ("torch.load", "4.000", "3", "1.00 x", "0.50 x", "10", "0", "1.00 x")
    steps = reader_plots.steps_table(several, [("mapped", "torch.load", "torch.load, mmap"), ("refused", "torch.load", "ours, one direct read")])
    assert len(steps.rows) == 1 and steps.rows[0][-2:] == ("x1.00", "x0.50")
    assert "x1.0" in steps.note
    assert "in the process 25%, in the kernel (copies, page faults) 50%, neither (waiting) 25%" in reader_plots.processor_text([several[0], several[2]])
    fig = reader_plots.plot_readers(several)
    widths = [sum(patch.get_width() for patch in ax.patches) for ax in fig.axes]
    assert widths == pytest.approx([8.0, 3.0])
    assert "torch.load, mmap from the disk: 4.00 s" in reader_plots.readers_alt_text(several)


def test_a_counter_that_the_kernel_lacks_is_said_so() -> None:
    run = run_of(0, 1.0)
    run.load.read_nbytes = run.load.disk_nbytes = None
    assert run.copies_per_byte is None
    row = reader_plots.counters_table([run], warm=False).rows[0]
    assert row[3] == row[4] == "not counted"


def test_runs_are_recorded_and_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [run_of(0, 4.0), run_of(0, 2.0, warm=True)]
    (tmp_path / "some-gpu").mkdir()
    path = tmp_path / "some-gpu" / "formats.json"
    reader_record.save_runs(several, path)
    assert reader_record.load_runs(path) == several
    monkeypatch.setattr(reader_record, "recorded_runs", lambda _: {"some-gpu": path})
    monkeypatch.setattr(reader_record, "recorded_note", lambda _: "Recorded on: some-gpu.")
    drawn = reader_record.recorded_readers()
    assert not isinstance(drawn, str) and "some-gpu" in drawn.alt_text
    path.write_text('{"runs": [{"reader": "none"}]}')
    with pytest.raises(ResourceError, match="record them again"):
        reader_record.load_runs(path)
    monkeypatch.setattr(reader_record, "recorded_runs", lambda _: {})
    assert reader_record.recorded_readers() == "Recorded on: some-gpu."


def test_the_command_records_and_removes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Checkpoint) -> None:
    monkeypatch.setenv("SLLM_MINI_WORK", str(tmp_path))
    monkeypatch.setattr(reader_record, "formats_checkpoint", lambda: tiny)
    monkeypatch.setattr(reader_record, "measure_readers", lambda _, rounds: [run_of(0, float(rounds))])
    assert reader_record.main([str(tmp_path / "formats.json"), "--rounds", "2"]) == 0
    assert reader_record.load_runs(tmp_path / "formats.json")[0].seconds == 2.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["formats.json"]


def test_one_flipped_bit_is_noticed_by_the_format_with_hashes(tiny: Checkpoint, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny.path, tmp_path / "tiny")
    rows = damage.damage_table(formats.write_formats(open_checkpoint(copy), tmp_path), TENSOR, element=7).rows
    noticed = {(row[0], row[1]): row[2] for row in rows}
    assert noticed[OURS, "one bit flipped"] == "yes" and noticed[OURS, "last byte missing"] == "yes"
    assert noticed[SAFETENSORS, "one bit flipped"] == "no"
    said = next(row[3] for row in rows if row[:2] == (OURS, "one bit flipped"))
    assert "IntegrityError" in said and "at byte" in said and str(tmp_path) not in said


def test_a_flipped_bit_flips_back(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    damage.flip_bit(file, 1, 6)
    assert file.read_bytes() == b"a\x22c"
    damage.flip_bit(file, 1, 6)
    damage.cut_end(file, 1)
    assert file.read_bytes() == b"ab"


def test_direct_reads_are_tried_and_their_errors_named(written: dict[str, Format], tmp_path: Path) -> None:
    table = damage.direct_table(written)
    answers = {(row[0], row[1]): row[3] for row in table.rows}
    if answers[OURS, "the first tensor, where it starts"].startswith("EINVAL"):
        pytest.skip("this file system has no direct I/O")
    assert answers[OURS, "the last block"] == "4,096 bytes"
    assert answers[SAFETENSORS, "the last block"].endswith("the file ends")
    assert damage.try_direct(tmp_path / "none", 0, 4096) == "ENOENT: No such file or directory"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("memory", "disk", "expected"), [(64e9, 500e9, "qwen2.5-0.5b"), (2e9, 500e9, "opt-125m"), (64e9, 2e9, "opt-125m"), (1e8, 1e12, None)])
def test_the_model_fits_three_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Checkpoint, memory: float, disk: float, expected: str | None) -> None:
    for name in models._FORMATS_SIZES:
        shutil.copytree(tiny.path, tmp_path / name)
    monkeypatch.setattr(models, "available_nbytes", lambda: int(memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(disk)))
    if expected is None:
        with pytest.raises(ResourceError, match="fits"):
            models.formats_checkpoint(tmp_path)
    else:
        assert models.formats_checkpoint(tmp_path).path.name == expected


def test_the_defects_table_names_tests_that_exist() -> None:
    text = "\n".join(cell.source for cell in nbformat.read(CHAPTER, as_version=4).cells)
    named = set(re.findall(r"`(test_defect_\w+)`", text))
    source = (Path(__file__).parent / "test_01_defects.py").read_text(encoding="utf-8")
    assert len(named) == 7 and named <= set(re.findall(r"def (test_defect_\w+)\(", source))
