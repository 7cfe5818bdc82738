"""The look of all chapters: palette, tables, figures, timeline, house, environment, widgets, what-if, anatomy. Chapter 00."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.device.cpu import cpu_count
from sllm_mini.errors import CheckpointError, ModelError, ResourceError
from sllm_mini.lab import environment, house, widgets
from sllm_mini.lab.account import account
from sllm_mini.lab.anatomy import ColdStart, load_cold_start, measure_cold_start
from sllm_mini.lab.figure import describe
from sllm_mini.lab.labels import HIDDEN, INSIDE, TWO_LINES, Label, place_labels
from sllm_mini.lab.style import GRID, INK, MUTED, PALETTE, PAPER, color_of, contrast, darker, ink_on
from sllm_mini.lab.table import Table
from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text, timeline_table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text, share_text
from sllm_mini.lab.whatif import CHUNKS, draw_prediction, predict_cold_start
from sllm_mini.loading.probe import measure_machine
from sllm_mini.types import Span, Tier, Warmth


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_importing_the_lab_is_cheap() -> None:
    names = "account anatomy coldstart environment figure house labels lanes style survey table timeline units whatif widgets"
    code = f"import sys\nfor name in {names.split()}: __import__('sllm_mini.lab.' + name)\n"
    code += "print([name for name in ('torch', 'transformers', 'matplotlib', 'IPython', 'ipywidgets', 'cupy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- numbers -----------------------------------------------------------------------------------------------------


def test_numbers_read_as_people_write_them() -> None:
    assert [seconds_text(s) for s in (0, 1.2345, 0.0456, 0.9999, 7.89e-6, 3e-9, 61.04, 1e-12)] == [
        "0 s", "1.23 s", "45.6 ms", "1.00 s", "7.89 µs", "3.00 ns", "61.0 s", "< 1 ns",
    ]  # fmt: skip
    assert [nbytes_text(n) for n in (0, 789, 999.9, 1_230_000_000, 45_600_000, 13e12)] == ["0 B", "789 B", "1.00 kB", "1.23 GB", "45.6 MB", "13.0 TB"]
    assert rate_text(3.3e9) == "3.30 GB/s"
    assert [share_text(x) for x in (0, 0.0004, 0.1234, 1)] == ["0 %", "< 0.1 %", "12.3 %", "100.0 %"]


@given(st.floats(1e-8, 1e5))
def test_a_rounded_number_is_within_half_a_percent(value: float) -> None:
    for text, scales in ((seconds_text(value), {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}), (nbytes_text(value * 1e7), {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12})):
        number, unit = text.replace("\u202f", "").split()
        expected = value if unit in ("s", "ms", "µs", "ns") else value * 1e7
        assert abs(float(number) * scales[unit] - expected) <= max(0.006 * expected, 0.51 * scales[unit] * (unit == "B"))


# --- tables ------------------------------------------------------------------------------------------------------


def test_a_table_says_the_same_as_html_and_as_text() -> None:
    rows = tuple((f"row {i}", "words " * i + f"[bold]<b>{i}</b> & more", f"{i}.5 GB/s") for i in range(8))
    table = Table(("name", "text", "rate"), rows, caption="A <caption>", note="a note", numeric=frozenset({2}), emphasis=frozenset({7}))
    html, text = table._repr_html_(), str(table)
    assert "<b>" not in html
    assert html.count('<th scope="col"') == 3
    assert "A &lt;caption&gt;" in html
    assert "[bold]<b>3</b>" in text  # not read as markup
    for row in rows:
        for cell in row:
            assert cell.replace("<", "&lt;").replace(">", "&gt;").replace("& ", "&amp; ") in html
            assert set(cell.split()) <= set(text.split())
    assert max(map(len, text.splitlines())) <= 120
    assert table._repr_mimebundle_() == {"text/html": html, "text/plain": text}


def test_a_table_of_long_cells_keeps_words_whole_and_fits() -> None:
    table = Table(("a", "b"), (("word " * 60, "x" * 30), ("", "other " * 40)))
    text = str(table)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("word") == 60
    assert "x" * 30 in text


def test_a_table_in_a_notebook_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(("a",), (("cell",),))
    text = str(table)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(table) == text  # and not written into the notebook by rich


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 of the table has 1 cells"):
        Table(("a", "b"), (("1", "2"), ("3",)))


# --- palette -----------------------------------------------------------------------------------------------------

# Simulated full deficiencies, linear RGB (Machado, Oliveira, Fernandes 2009, severity 1.0).
VISION = {
    "normal": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def lab_of(color: str, vision: str = "normal") -> np.ndarray:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(VISION[vision] @ linear, 0, 1)
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ linear
    scaled = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_no_two_colours_look_alike_to_anybody(vision: str) -> None:
    for one, other in itertools.combinations(PALETTE.values(), 2):
        assert np.linalg.norm(lab_of(one, vision) - lab_of(other, vision)) >= 15, (one, other)


def test_the_ladder_keeps_its_order_in_greyscale() -> None:
    lightness = [lab_of(color_of(rung))[0] for rung in Warmth]
    assert np.diff(lightness).min() >= 10


def test_a_rung_and_the_tier_of_its_bytes_share_a_colour() -> None:
    assert color_of(Warmth.DRAM) == color_of(Tier.DRAM) == color_of("dram")
    assert color_of(Warmth.DEVICE) == color_of(Tier.DEVICE) == color_of("gpu")
    assert color_of("compute") == color_of(Warmth.READY)
    assert len({color_of(tier) for tier in Tier}) == len(Tier)
    with pytest.raises(ValueError, match="no colour is set for 'mauve'"):
        color_of("mauve")


def test_text_can_be_read_on_every_fill() -> None:
    for color in PALETTE.values():
        assert contrast(ink_on(color), color) >= 4.5
        assert contrast(darker(color), PAPER) >= 3  # an edge that shows on white
    assert contrast(INK, PAPER) >= 7
    assert contrast(MUTED, PAPER) >= 4.5
    assert contrast(GRID, PAPER) < 1.5


# --- figures -----------------------------------------------------------------------------------------------------


def test_a_figure_carries_its_alt_text_and_closes_itself() -> None:
    from matplotlib import pyplot

    fig, axes = pyplot.subplots()
    axes.plot([0, 1])
    shown = describe(axes, 'rises from 0 to 1,\n "steadily"', caption="A <line>")
    assert not pyplot.fignum_exists(fig.number)
    html = shown._repr_html_()
    assert 'alt="rises from 0 to 1, &quot;steadily&quot;"' in html
    assert "A &lt;line&gt;" in html
    assert shown._repr_mimebundle_()["text/plain"] == '[figure: rises from 0 to 1, "steadily"]\nA <line>'
    width, _ = struct.unpack(">II", shown.png[16:24])
    assert shown.width_px == round(width / 1.5)
    with pytest.raises(ValueError, match="needs alt text"):
        describe(pyplot.figure(), "  ")


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    spans = [Span("a", 0, 1), Span("b", 1, 3)]
    pictures = [describe(plot_timeline(spans), "x") for _ in range(2)]
    assert pictures[0].png == pictures[1].png
    assert b"matplotlib" not in pictures[0].png.lower()
    assert pictures[0].save(tmp_path / "a.png").read_bytes() == pictures[0].png


# --- accounting --------------------------------------------------------------------------------------------------

SPANS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 10), st.sampled_from(["main", "disk"])).map(
        lambda t: Span(t[0], float(t[1]), float(t[1] + t[2]), t[3])
    ),
    min_size=1,
    max_size=12,
)


@given(SPANS)
def test_every_second_is_accounted_for(spans: list[Span]) -> None:
    books = account(spans)
    # On a grid of whole seconds: which are covered, counted one by one.
    grid = range(int(books.start), int(books.end))
    covered = [second for second in grid if any(span.start <= second < span.end for span in spans)]
    assert books.unaccounted_seconds == len(grid) - len(covered)
    assert sum(entry.seconds for entry in books.entries) - books.overlapped_seconds + books.unaccounted_seconds == pytest.approx(books.total_seconds)
    assert books.coverage == pytest.approx(len(covered) / len(grid) if grid else 1.0)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(books.gaps))
    assert sum(entry.count for entry in books.entries) == len(spans)


@given(SPANS, st.integers(-5, 45), st.integers(0, 45))
def test_a_stretch_is_cut_out_exactly(spans: list[Span], start: int, length: int) -> None:
    books = account(spans, start=start, end=start + length)
    covered = [second for second in range(start, start + length) if any(span.start <= second < span.end for span in spans)]
    assert books.unaccounted_seconds == length - len(covered)
    assert sum(entry.seconds for entry in books.entries) - books.overlapped_seconds == pytest.approx(len(covered))


def test_bytes_are_cut_with_their_span_and_give_a_rate() -> None:
    books = account([Span("read", 0.0, 4.0, nbytes=400)], end=3.0)
    assert (books.entries[0].nbytes, books.entries[0].bytes_per_second) == (300, 100.0)
    assert account([Span("think", 0.0, 4.0)]).entries[0].bytes_per_second is None


def test_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="no spans were recorded"):
        account([])
    with pytest.raises(ValueError, match="'late' ends 1 s before it starts"):
        account([Span("late", 2.0, 1.0)])
    with pytest.raises(ValueError, match="before it starts"):
        account([Span("nan", 2.0, float("nan"))])
    with pytest.raises(ValueError, match="swap start and end"):
        account([Span("a", 0.0, 1.0)], start=3.0, end=2.0)


# --- labels ------------------------------------------------------------------------------------------------------

LABELS = st.lists(
    st.tuples(st.floats(0, 600), st.floats(0, 200), st.floats(5, 150)).map(lambda t: Label(t[0], t[0] + t[1], t[2], t[2] * 0.6)), max_size=14
)


@given(LABELS)
@settings(max_examples=300)
def test_labels_never_touch_and_no_line_crosses_a_text(labels: list[Label]) -> None:
    places = place_labels(labels, padding=4.0, max_levels=6)
    flags = [(label, place) for label, place in zip(labels, places, strict=True) if place >= 0]
    for (one, low), (other, high) in itertools.permutations(flags, 2):
        left, right = sorted((one, other), key=lambda label: label.middle)
        if low == high:
            assert left.middle + left.width + 4.0 <= right.middle
        if low < high:  # the line of `other` passes the height of `one`'s text
            assert not one.middle < other.middle < one.middle + one.width
    for label, place in zip(labels, places, strict=True):
        room = label.end - label.start - 8.0
        assert (place == INSIDE) == (label.width <= room)
        assert (place == TWO_LINES) == (label.two_line_width <= room < label.width)


def test_flags_are_hidden_only_when_levels_run_out_or_the_bar_is_too_thin() -> None:
    crowd = [Label(float(i), i + 1.0, 100.0, 100.0) for i in range(8)]
    assert sorted(place_labels(crowd, padding=1.0, max_levels=6)) == [HIDDEN, HIDDEN, 0, 1, 2, 3, 4, 5]
    assert HIDDEN not in place_labels(crowd, padding=1.0, max_levels=8)
    assert place_labels(crowd, padding=1.0, max_levels=8, min_flag=2.0) == [HIDDEN] * 8


# --- timeline ----------------------------------------------------------------------------------------------------


def start_of_a_model() -> list[Span]:
    steps: Sequence[tuple[str, float, Warmth, int]] = (
        ("interpreter", 0.045, Warmth.PROCESS, 0), ("import torch", 2.3, Warmth.RUNTIME, 0), ("import transformers", 1.6, Warmth.RUNTIME, 0),
        ("open device", 0.002, Warmth.RUNTIME, 0), ("tokenizer", 0.05, Warmth.DRAM, 0), ("skeleton", 0.12, Warmth.DRAM, 0),
        ("bytes", 0.32, Warmth.DEVICE, 10**9), ("fill", 0.03, Warmth.DEVICE, 0), ("first call", 0.35, Warmth.READY, 0),
        ("first token", 0.08, Warmth.READY, 0), *[("decode", 0.02, Warmth.READY, 0)] * 15,
    )  # fmt: skip
    spans, now = [], 7.5
    for name, seconds, rung, nbytes in steps:
        spans.append(Span(name, now, now + seconds, nbytes=nbytes, warmth=rung))
        now += seconds + (0.1 if name == "import torch" else 0.0)
    return spans


def boxes_of(axes: Any, texts: list[Any]) -> list[Any]:
    axes.figure.draw_without_rendering()
    return [text.get_window_extent() for text in texts]


@pytest.mark.parametrize("recorded", [False, True])
def test_labels_of_a_drawn_timeline_do_not_overlap_and_stay_inside(recorded: bool) -> None:
    spans = start_of_a_model()
    other = [Span(s.name, s.start / 2, s.end / 2, s.lane, s.nbytes, s.warmth) for s in spans]
    axes = plot_timeline(spans, title="A title", recorded=other if recorded else None, recorded_label="recorded: some GPU")
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlabel() == "seconds since the start"
    texts = [text for text in axes.texts if text.get_text()]
    assert {text.get_text().split()[0] for text in texts} >= {"interpreter", "import", "tokenizer", "bytes", "decode"}
    boxes = boxes_of(axes, texts)
    for (one, box), (other_text, other_box) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        apart = box.x1 <= other_box.x0 or other_box.x1 <= box.x0 or box.y1 <= other_box.y0 + 1.5 or other_box.y1 <= box.y0 + 1.5
        assert apart, (one.get_text(), other_text.get_text())
    frame = axes.get_window_extent()
    for text, box in zip(texts, boxes, strict=True):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, text.get_text()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["process", "runtime", "dram", "device", "ready", "unaccounted", *(["recorded"] if recorded else [])]


def test_the_time_between_spans_is_drawn_and_listed() -> None:
    spans = [Span("a", 10.0, 11.0, warmth=Warmth.RUNTIME), Span("b", 13.0, 14.0, warmth=Warmth.READY)]
    axes = plot_timeline(spans)
    hatched = [collection for collection in axes.collections if collection.get_hatch()]
    extents = [path.get_extents() for collection in hatched for path in collection.get_paths()]
    assert [(box.x0, box.x1) for box in extents] == [(1.0, 3.0)]
    table = timeline_table(spans)
    assert [row[:3] for row in table.rows] == [
        ("a", "1.0000", "25.0 %"), ("b", "1.0000", "25.0 %"), ("unaccounted", "2.0000", "50.0 %"), ("total", "4.0000", "100.0 %"),
    ]  # fmt: skip
    assert "unaccounted 2.00 s (50.0 %)" in timeline_alt_text(spans)
    plain = plot_timeline([Span("a", 0.0, 1.0), Span("b", 1.0, 2.0)])
    assert not [collection for collection in plain.collections if collection.get_hatch()]


def test_a_bar_has_the_colour_of_its_rung_or_of_its_lane() -> None:
    from matplotlib.colors import to_hex

    spans = [Span("read", 0.0, 2.0, "disk 1", 10), Span("load", 0.0, 2.0, "main", warmth=Warmth.DEVICE), Span("?", 0.0, 2.0, "who knows")]
    axes = plot_timeline(spans)
    fills = [to_hex(collection.get_facecolor()[0]) for collection in axes.collections]
    assert fills == [color_of("disk"), color_of(Warmth.DEVICE), color_of("wait")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["disk 1", "main", "who knows"]


def test_spans_of_one_name_share_a_label_and_a_row_of_the_table() -> None:
    spans = [Span("read", float(i), i + 1.0, "disk", 10**9) for i in range(4)] + [Span("copy", 1.0, 4.0, "device", 10**9)]
    axes = plot_timeline(spans)
    assert sorted(text.get_text() for text in axes.texts) == ["copy  3.00 s", "read ×4  4.00 s"]
    rows = timeline_table(spans).rows
    assert rows[0] == ("read ×4 (disk)", "4.0000", "100.0 %", "4.00 GB", "1.00 GB/s")
    assert rows[2][:2] == ("ran side by side", "−3.0000")


def test_the_table_adds_up() -> None:
    rows = timeline_table(start_of_a_model()).rows
    seconds = [float(row[1].replace("−", "-")) for row in rows]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.0001 * len(rows))


def test_short_timelines_count_milliseconds_and_given_axes_are_used() -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(5, 2))
    assert plot_timeline([Span("a", 0.0, 0.004)], axes) is axes
    assert axes.get_xlabel() == "milliseconds since the start"
    assert axes.get_xlim()[1] >= 4.0
    assert tuple(axes.figure.get_size_inches()) == (5, 2)
    with pytest.raises(ValueError, match="no spans"):
        plot_timeline([])


# --- house -------------------------------------------------------------------------------------------------------


def test_the_house_has_the_rooms_of_the_package_and_lights_those_asked_for() -> None:
    from matplotlib.colors import to_hex

    axes = house.draw_house(("device", "checkpoint"), standing=("types",))
    rooms = [patch for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    fills = dict(zip(house.room_names(), (to_hex(patch.get_facecolor()) for patch in rooms), strict=True))
    assert {name for name, fill in fills.items() if fill == color_of("ready")} == {"device", "checkpoint"}
    walls = dict(zip(house.room_names(), (patch.get_linestyle() for patch in rooms), strict=True))
    assert {name for name, wall in walls.items() if wall in ("-", "solid")} == {"device", "checkpoint", "types"}
    alt = house.house_alt_text(("device", "checkpoint"), standing=("types",))
    assert "lit are device" in alt and "standing already are types;" in alt and "still to come are errors" in alt
    with pytest.raises(ValueError, match="no room called cellar"):
        house.draw_house(("cellar",))
    with pytest.raises(ValueError, match="no room called cellar"):
        house.house_alt_text("cellar")


def test_every_text_of_the_house_stays_in_its_room() -> None:
    axes = house.draw_house(house.room_names())
    texts = boxes_of(axes, axes.texts)
    rooms = [patch.get_window_extent() for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    words = [text.get_text() for text in axes.texts]
    for name, room in zip(house.room_names(), rooms, strict=True):
        number = words.index(name)
        for box in texts[number : number + 2]:  # the name, then what lives there
            assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1, name
        assert texts[number].y0 >= texts[number + 1].y1 - 1.5, name


# --- environment -------------------------------------------------------------------------------------------------


def test_the_environment_says_what_is_here(tmp_path: Path) -> None:
    days = [datetime.datetime.now(datetime.UTC).date().isoformat()]
    found = environment.check_environment(tmp_path)
    days.append(datetime.datetime.now(datetime.UTC).date().isoformat())
    import torch

    assert found.ready
    assert found["date"].value in days and "figures on this page" in found["date"].meaning
    assert found["processor"].value.startswith(f"{measure_machine(tmp_path).processor}, {cpu_count()} core")
    assert found["packages"].value.startswith(f"torch {torch.__version__}")
    assert str(torch.get_num_threads()) in found["processor"].value
    assert not list(tmp_path.iterdir())
    for text in (str(found), found._repr_mimebundle_()["text/html"]):
        for finding in found.findings:
            assert finding.name in text
    with pytest.raises(KeyError, match="nothing called 'moon'"):
        found["moon"]


def test_what_is_missing_is_said_and_never_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.setattr(environment, "_version", lambda name: None)
    monkeypatch.setattr(environment, "available_nbytes", lambda: 0)
    monkeypatch.setattr(environment, "why_no_cuda", lambda: "no driver")
    found = environment.check_environment(tmp_path / "absent")
    assert not found.ready
    assert found["processor"].status == found["packages"].status == found["disk"].status == "missing"
    assert found["GPU"].meaning.startswith("no driver; everything runs on the processor")
    assert found["memory"].status == found["cupy"].status == "limited"
    assert all(finding.meaning for finding in found.findings if finding.status != "ok")
    assert "Missing: packages, processor, disk." in str(found)


# --- widgets -----------------------------------------------------------------------------------------------------


def picture(**values: Any) -> Table:
    return Table(tuple(values), (tuple(str(value) for value in values.values()),))


def controls() -> dict[str, Any]:
    return {
        "size": widgets.Slider("Bytes of the model", 2.5, 0.1, 100, unit="GB", log=True),
        "speed": widgets.Slider("Speed of the disk", 3.0, 0.5, 10, step=0.5, unit="GB/s"),
        "warm": widgets.Choice("Already climbed to", Warmth.COLD, {rung.name.lower(): rung for rung in Warmth}),
        "overlap": widgets.Toggle("Copy while reading"),
    }


def test_the_static_twin_shows_the_drawing_and_its_settings() -> None:
    explorer = widgets.explore(lambda **values: (picture(**values), picture(second="drawing")), **controls())
    bundle = explorer.render()
    for text in bundle.values():
        for words in ("second", "Bytes of the model: 2.5 GB (0.1 GB to 100 GB)", "Already climbed to: cold", "Copy while reading: no"):
            assert words in text
    assert repr(explorer) == bundle["text/plain"]


def test_a_control_that_moves_redraws_with_the_same_function() -> None:
    drawn: list[dict[str, Any]] = []

    def draw(**values: Any) -> Table:
        drawn.append(values)
        return picture(**values)

    explorer = widgets.explore(draw, **controls())
    shown: list[dict[str, str]] = []
    panel = explorer.panel(shown.append)
    assert [child.description for child in panel.children] == [
        "Bytes of the model (GB)", "Speed of the disk (GB/s)", "Already climbed to", "Copy while reading",
    ]  # fmt: skip
    panel.children[0].value = 10.0
    panel.children[2].value = "dram"
    panel.children[3].value = True
    assert drawn[-1] == {"size": pytest.approx(10.0), "speed": 3.0, "warm": Warmth.DRAM, "overlap": True}
    assert len(shown) == 3
    assert "Already climbed to: dram" in shown[-1]["text/plain"]


def test_a_list_shows_what_it_stands_at_also_where_that_is_nothing() -> None:
    shown: list[dict[str, str]] = []
    explorer = widgets.explore(lambda **values: picture(**values), target=widgets.Choice("target", None, {"here": None, "there": 2}))
    (choice,) = explorer.panel(shown.append).children
    assert choice.index == 0
    choice.index = 1
    choice.index = 0
    assert explorer.values == {"target": None} and len(shown) == 2


def test_sliders_appear_only_where_somebody_can_move_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    class Kernel:
        kernel = object()

    class Handle:
        def __init__(self) -> None:
            self.updates: list[Any] = []

        def update(self, bundle: Any, raw: bool) -> None:
            self.updates.append(bundle)

    displayed: list[Any] = []
    handle = Handle()

    def display(thing: Any, **options: Any) -> Any:
        displayed.append(thing)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG", widgets.SWITCH):
        monkeypatch.delenv(name, raising=False)
    explorer = widgets.explore(picture, **controls())

    def shown() -> int:
        displayed.clear()
        explorer._ipython_display_()
        return len(displayed)

    assert shown() == 1  # no kernel at all
    monkeypatch.setattr(IPython, "get_ipython", Kernel)
    assert shown() == 1  # a kernel nobody looks at, as when a book is built
    monkeypatch.setenv("JPY_SESSION_NAME", "/chapters/00.ipynb")
    assert shown() == 2
    assert displayed[0] == explorer.render()
    displayed[1].children[1].value = 7.5
    assert "Speed of the disk: 7.5 GB/s" in handle.updates[-1]["text/plain"]
    monkeypatch.setenv(widgets.SWITCH, "0")
    assert shown() == 1


def test_bad_controls_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        widgets.explore(picture)
    with pytest.raises(TypeError, match="control size is a int"):
        widgets.explore(picture, size=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts at 3, outside its range"):
        widgets.Slider("s", 3, 0, 2)
    with pytest.raises(ValueError, match="logarithmic"):
        widgets.Slider("s", 1, 0, 2, log=True)
    with pytest.raises(ValueError, match="none of its options"):
        widgets.Choice("c", 1, {"two": 2})


# --- what if -----------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e6, 1e12)
SECONDS = st.floats(0, 100)


@given(POSITIVE, POSITIVE, POSITIVE, SECONDS, st.booleans())
def test_a_start_costs_the_sum_of_the_rungs_still_to_climb(nbytes: float, disk: float, link: float, imports: float, on_gpu: bool) -> None:
    totals = {}
    for warm in Warmth:
        spans = predict_cold_start(
            model_nbytes=nbytes, disk_bytes_per_second=disk, import_seconds=imports, warm=warm, device_bytes_per_second=link if on_gpu else None
        )
        assert all(one.end == other.start for one, other in itertools.pairwise(spans))
        assert spans[0].start == 0 and spans[-1].name == "first token"
        assert all(span.warmth is not None and (span.warmth > warm or span.name == "first token") for span in spans)
        totals[warm] = spans[-1].end
    read, copy = nbytes / disk, nbytes / link if on_gpu else 0.0
    steps = [0.05, imports, read, copy, 0.3, 0.1]
    for warm in Warmth:
        assert totals[warm] == pytest.approx(sum(steps[warm:]))
    assert list(totals.values()) == sorted(totals.values(), reverse=True)


@given(POSITIVE, POSITIVE, POSITIVE)
def test_overlap_costs_the_slower_and_one_part_of_the_faster(nbytes: float, disk: float, link: float) -> None:
    numbers: dict[str, Any] = {"model_nbytes": nbytes, "disk_bytes_per_second": disk, "device_bytes_per_second": link}
    numbers |= {"import_seconds": 1.0, "process_seconds": 0.5, "first_call_seconds": 0.0, "first_token_seconds": 0.0}
    spans = predict_cold_start(**numbers, overlap=True)
    read, copy = nbytes / disk, nbytes / link
    total = spans[-1].end
    assert total == pytest.approx(1.5 + max(read, copy) + min(read, copy) / CHUNKS)
    assert total <= predict_cold_start(**numbers)[-1].end * (1 + 1e-9)
    copies = [span for span in spans if span.name == "copy"]
    assert sum(span.nbytes for span in copies) == round(nbytes)
    for number, span in enumerate(copies, 1):  # no part is copied before it has been read
        assert span.start >= (1.5 + read * number / CHUNKS) * (1 - 1e-9)


@pytest.mark.parametrize(
    "bad",
    [{"disk_bytes_per_second": 0}, {"device_bytes_per_second": -1.0}, {"import_seconds": -1}, {"model_nbytes": float("nan")}, {"process_seconds": float("inf")}],
)
def test_impossible_figures_are_refused_by_name(bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"model_nbytes": 1e9, "disk_bytes_per_second": 1e9, "import_seconds": 1.0}
    with pytest.raises(ValueError, match=next(iter(bad))):
        predict_cold_start(**(good | bad))


def test_the_prediction_is_drawn_with_its_total_in_words() -> None:
    shown = draw_prediction(model_gb=16, disk_gb_per_second=2, import_seconds=4, warm=Warmth.RUNTIME, device_gb_per_second=16, overlap=False)
    assert shown.alt_text.startswith("Predicted start from runtime, timeline of 9.40 s: read 8.00 s")


# --- anatomy -----------------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
request = json.loads(sys.argv[1])
spawned, now = request["spawned"], time.monotonic()
report = {
    "spans": [
        {"name": "interpreter", "start": spawned, "end": spawned + 3.0, "warmth": 1},
        {"name": "bytes", "start": spawned + 3.5, "end": spawned + 4.0, "lane": "loader", "nbytes": 500, "warmth": 4},
        {"name": "decode", "start": spawned + 4.0, "end": spawned + 9.0, "warmth": 5},
    ],
    "first_token": spawned + 4.0, "text": request["prompt"] if isinstance(request["prompt"], str) else "ids", "token_ids": [1, 2],
    "prompt_tokens": 3, "threads": 2, "device": request["device"],
}
assert spawned <= now < spawned + 600
"""


def fake_child(tmp_path: Path, ending: str) -> list[str]:
    script = tmp_path / "child.py"
    script.write_text(CHILD + ending, encoding="utf-8")
    return [sys.executable, str(script)]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded two-layer Llama in float32 with a byte-level tokenizer, in the project's own format."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from sllm_mini.checkpoint import convert_checkpoint

    folder = tmp_path_factory.mktemp("anatomy")
    vocabulary = {"<s>": 0, "</s>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "hf")
    convert_checkpoint(folder / "hf", folder / "ours")
    return folder / "ours"


def test_a_report_becomes_an_account_of_the_time_to_the_first_token(tmp_path: Path, tiny_checkpoint: Path) -> None:
    run = measure_cold_start(tiny_checkpoint, prompt="ä 🙂", child=fake_child(tmp_path, "print(json.dumps(report))"))
    nbytes = sum(file.stat().st_size for file in tiny_checkpoint.iterdir())
    assert (run.text, run.prompt, run.token_ids, run.nbytes, run.device) == ("ä 🙂", "ä 🙂", (1, 2), nbytes, "cpu")
    assert run.first_token_seconds == pytest.approx(4.0)
    assert run.spans[0].start == 0.0
    assert run.coverage == pytest.approx(3.5 / 4)  # what comes after the first token does not count
    assert run.seconds("interpreter") == pytest.approx(3.0)
    assert run.seconds("decode") == 0.0
    assert run.page_cache_fraction is None or 0.0 <= run.page_cache_fraction <= 1.0
    assert run.spans[1].warmth is Warmth.DEVICE
    path = run.save(tmp_path / "run.json")
    assert load_cold_start(path) == run
    by_ids = measure_cold_start(tiny_checkpoint, prompt=[5, 6], child=fake_child(tmp_path, "print(json.dumps(report))"))
    assert (by_ids.text, by_ids.prompt) == ("ids", (5, 6))
    assert load_cold_start(by_ids.save(path)) == by_ids


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("print(json.dumps({'error': 'the disk is gone'})); sys.exit(1)", "the cold start failed: the disk is gone"),
        ("sys.exit('no such thing')", "ended with code 1 and no report: no such thing"),
        ("print('[]')", "code 0 and no report: it printed nothing"),
        ("del report['spans']; print(json.dumps(report))", "code 0 and no report"),
        ("print(json.dumps(report)); sys.exit(3)", "ended with code 3"),
        ("os.kill(os.getpid(), 9)", "ended with code -9"),
    ],
)
def test_a_child_that_fails_is_one_typed_error(tmp_path: Path, tiny_checkpoint: Path, ending: str, words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(words)):
        measure_cold_start(tiny_checkpoint, child=fake_child(tmp_path, ending))


def test_a_child_that_hangs_is_stopped(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pid_file = tmp_path / "pid"
    child = fake_child(tmp_path, f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(ModelError, match="was stopped"):
        measure_cold_start(tiny_checkpoint, child=child, timeout_seconds=1.5)
    if pid_file.exists():
        assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_bad_requests_and_bad_recordings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        measure_cold_start(tmp_path, max_new_tokens=0)
    with pytest.raises(ResourceError, match="cannot be read"):
        load_cold_start(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text(json.dumps({"spans": 3}), encoding="utf-8")
    with pytest.raises(ResourceError, match="no recorded cold start"):
        load_cold_start(tmp_path / "other.json")


def test_every_second_of_a_real_cold_start_is_accounted_for(tiny_checkpoint: Path) -> None:
    from sllm_mini.inference import Engine

    run = measure_cold_start(tiny_checkpoint, prompt="Once", max_new_tokens=4, drop_page_cache=True)
    assert isinstance(run, ColdStart)
    assert run.coverage >= 0.97
    main = [span for span in run.spans if span.lane == "main" and span.start < run.first_token_seconds]
    assert account(main, start=0.0, end=run.first_token_seconds).coverage >= 0.97  # in the thread that waits, too
    names = list(dict.fromkeys(span.name for span in main))
    order = ["interpreter", "import torch", "import transformers", "import sllm_mini", "open device", "tokenizer", "skeleton", "fill", "first call", "first token"]
    assert [name for name in names if name in order] == order
    assert run.seconds("import torch") > 0.05 * run.first_token_seconds  # the figure that surprises everybody
    assert any(span.name == "bytes" and span.nbytes > 0 for span in run.spans)
    assert len([span for span in run.spans if span.name == "decode"]) == len(run.token_ids) - 1
    expected = Engine.load(tiny_checkpoint).complete("Once", max_new_tokens=4)
    assert (run.token_ids, run.text, run.prompt_tokens) == (expected.token_ids, expected.text, 4)


def test_what_is_no_checkpoint_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        measure_cold_start(tmp_path, child=["/no/such/program"])
