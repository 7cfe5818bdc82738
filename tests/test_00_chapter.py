"""Chapter 00: the arithmetic of the ladder, the models chapters measure on, and the rhythm of the page itself."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from sllm_mini.checkpoint import save_checkpoint, verify_checkpoint
from sllm_mini.errors import CheckpointExistsError, ResourceError
from sllm_mini.lab import house, models, picture, recorded
from sllm_mini.lab.anatomy import ColdStart
from sllm_mini.lab.rungs import FIRST_TOKEN, ladder_table, median_rungs, plot_rungs, rung_seconds, rungs_alt_text
from sllm_mini.types import Span, Warmth

CHAPTERS = sorted((Path(__file__).parents[1] / "chapters").glob("[0-9][0-9]_*.ipynb"))


def start(*spans: Span, first_token: float) -> ColdStart:
    return ColdStart(
        spans=spans, first_token_seconds=first_token, text="", token_ids=(), prompt="", prompt_tokens=1, device="cpu",
        threads=1, nbytes=1, page_cache_fraction=None, machine={},
    )  # fmt: skip


ONE = start(
    Span("interpreter", 0.0, 1.0, warmth=Warmth.PROCESS),
    Span("import torch", 1.0, 4.0, warmth=Warmth.RUNTIME),
    Span("skeleton", 4.0, 5.0, warmth=Warmth.DRAM),
    Span("bytes", 4.0, 6.0, "loader", 100, Warmth.DEVICE),
    Span("wait for bytes", 5.0, 6.0, warmth=Warmth.DEVICE),
    Span("first call", 6.25, 6.5, warmth=Warmth.READY),
    Span("first token", 6.5, 7.0, warmth=Warmth.READY),
    Span("decode", 7.0, 9.0, warmth=Warmth.READY),
    first_token=7.0,
)


def test_rungs_add_up_to_the_time_to_the_first_token() -> None:
    parts = rung_seconds(ONE)
    assert parts == {"process": 1.0, "runtime": 3.0, "dram": 1.0, "device": 1.0, "ready": 0.25, FIRST_TOKEN: 0.5, "unaccounted": 0.25}
    assert sum(parts.values()) == ONE.first_token_seconds


def test_the_ladder_gets_cheaper_with_every_rung() -> None:
    table = ladder_table(rung_seconds(ONE))
    assert [row[0] for row in table.rows] == [rung.name.lower() for rung in Warmth]
    seconds = [float(row[2]) for row in table.rows]
    assert seconds == [7.0, 5.75, 2.75, 1.75, 0.75, 0.5]


def test_the_median_is_taken_rung_by_rung() -> None:
    slow = start(Span("interpreter", 0.0, 3.0, warmth=Warmth.PROCESS), Span("first token", 3.0, 4.0, warmth=Warmth.READY), first_token=4.0)
    middle = start(Span("interpreter", 0.0, 2.0, warmth=Warmth.PROCESS), Span("first token", 2.0, 2.5, warmth=Warmth.READY), first_token=2.5)
    assert median_rungs([ONE, slow, middle]) == {"process": 2.0, FIRST_TOKEN: 0.5, "runtime": 0.0, "dram": 0.0, "device": 0.0, "ready": 0.0, "unaccounted": 0.0}
    with pytest.raises(ValueError, match="no run"):
        median_rungs([])


def test_bars_show_the_same_seconds_as_their_alt_text() -> None:
    from matplotlib import pyplot

    parts = rung_seconds(ONE)
    ax = plot_rungs({"one": parts, "two": parts})
    widths = sum(patch.get_width() for patch in ax.patches)
    assert widths == pytest.approx(2 * 7.0)
    legend = ax.get_legend()
    ax.figure.canvas.draw()
    assert legend.get_window_extent().y1 < ax.xaxis.get_label().get_window_extent().y0, "the key stays clear of the axis label"
    assert "one: 7.00 s in all" in rungs_alt_text({"one": parts})
    pyplot.close(ax.figure)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [(64e9, 500e9, "qwen2.5-0.5b"), (4e9, 3e9, "qwen2.5-0.5b"), (4e9, 2e9, "opt-125m"), (1e9, 500e9, "opt-125m"), (1e8, 1e12, None)],
)
def test_the_larger_model_fits_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: float, disk: float, expected: str | None) -> None:
    monkeypatch.setattr(models, "cuda_available", lambda: False)
    monkeypatch.setattr(models, "available_nbytes", lambda: int(memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(disk)))
    if expected is None:
        with pytest.raises(ResourceError, match="fits"):
            models.fitting_shape(tmp_path)
    else:
        assert models.fitting_shape(tmp_path) == expected


def test_the_tiny_checkpoint_is_made_once(tmp_path: Path) -> None:
    made = models.tiny_checkpoint(tmp_path)
    verify_checkpoint(made)
    before = (tmp_path / "tiny" / "index.json").stat().st_mtime_ns
    assert models.tiny_checkpoint(tmp_path).index == made.index
    assert (tmp_path / "tiny" / "index.json").stat().st_mtime_ns == before


def test_the_tiny_checkpoint_replaces_nothing_but_a_model(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointExistsError, match="other than a model"):
        models.tiny_checkpoint(tmp_path)
    assert (tmp_path / "tiny" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("gpu_nbytes", [None, 8e9])
def test_the_larger_model_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu_nbytes: float | None) -> None:
    monkeypatch.setattr(models, "cuda_available", lambda: gpu_nbytes is not None)
    monkeypatch.setattr(models, "get_device", lambda _: SimpleNamespace(free_nbytes=lambda: gpu_nbytes))
    monkeypatch.setattr(models, "available_nbytes", lambda: 64_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))  # full, now that it is there
    name = "qwen2.5-0.5b" if gpu_nbytes is None else "llama-3.2-1b"
    save_checkpoint({"w": torch.zeros(1)}, tmp_path / name)
    save_checkpoint({"w": torch.zeros(1)}, tmp_path / "opt-125m")
    assert models.sized_checkpoint(tmp_path).path == tmp_path / name


def test_a_page_says_so_where_no_gpu_run_was_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Path:
        raise ResourceError(name)

    monkeypatch.setattr(recorded, "resource", absent)
    assert "No run on a CUDA GPU" in recorded.recorded_note("cold_start.json")
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "cold_start.json").write_text("{}")
    monkeypatch.setattr(recorded, "resource", lambda _: tmp_path)
    assert recorded.recorded_note("cold_start.json") == "Recorded on: h200."


def test_a_recorded_run_is_drawn_beside_the_readers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorded, "resource", lambda _: tmp_path)
    assert recorded.beside_recorded(ONE.spans, "cold_start.json") == recorded.recorded_note("cold_start.json")
    (tmp_path / "some-gpu").mkdir()
    ONE.save(tmp_path / "some-gpu" / "cold_start.json")
    drawn = recorded.beside_recorded(ONE.spans, "cold_start.json")
    assert not isinstance(drawn, str) and drawn.png[:4] == b"\x89PNG"
    assert "this machine" in drawn.alt_text and "Recorded on some-gpu" in drawn.alt_text


def test_the_readme_picture_is_drawn_from_a_measured_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = replace(ONE, machine={"cores": "2"})
    monkeypatch.setattr(picture, "measure_cold_start", lambda *_args, **_options: started)
    monkeypatch.setattr(picture, "tiny_checkpoint", lambda: SimpleNamespace(path=tmp_path))
    assert picture.main([str(tmp_path / "images" / "p.png")]) == 0
    assert (tmp_path / "images" / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_the_house_shows_as_built_what_can_be_imported() -> None:
    from matplotlib import pyplot

    specs = {name: importlib.util.find_spec(f"sllm_mini.{name}") for name in house.room_names()}
    there = {name for name, spec in specs.items() if spec is not None and spec.origin is not None}  # a folder alone has none
    assert set(house.built_rooms()) == there and {"wire", "lab"} <= there
    axes = house.draw_house(("loading",))
    rooms = [patch for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    walls = dict(zip(house.room_names(), (patch.get_linestyle() for patch in rooms), strict=True))
    assert {name for name, wall in walls.items() if wall in ("-", "solid")} == there
    pyplot.close("all")


def test_a_room_stands_as_soon_as_its_module_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(house, "_PACKAGE", tmp_path)
    assert house.built_rooms() == ()
    (tmp_path / "control").mkdir()  # a folder without a module in it is no room yet
    (tmp_path / "wire.py").touch()
    assert house.built_rooms() == ("wire",) and "standing already are wire;" in house.house_alt_text(())
    (tmp_path / "control" / "__init__.py").touch()
    assert house.built_rooms() == ("wire", "control")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_leaves_it_to_the_house_what_stands(path: Path) -> None:
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "draw_house(lit=" in code and "standing" not in code


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_link_of_the_contents_has_its_heading(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    links = re.findall(r"\]\(#([^\n]*?)\)(?: ·|\n|$)", cells[0].source)
    headings = [line[3:].strip().replace(" ", "-") for cell in cells for line in cell.source.splitlines() if line.startswith("## ")]
    assert len(links) >= 5 and sorted(links) == sorted(headings)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_keeps_the_rhythm(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    titles = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines() if line.startswith("# ")]
    assert len(titles) == 1
    text = notebook.cells[0].source
    assert "**Time**" in text and "**You need**" in text and "**Contents**" in text
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "check_environment()" in code[0].source
    for cell in code:
        lines = cell.source.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 116, cell.source
        assert cell.outputs or cell.source.lstrip().startswith(("from", "import", "def")), f"a cell shows nothing:\n{cell.source}"
        for output in cell.outputs:
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert "<img" not in html or 'alt="' in html
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
