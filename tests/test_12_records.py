"""Chapters that were run are kept and set beside each other: tables read back from notebooks as they were written, figures by their units. Chapter 00."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from command_line import Run as Command
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.lab.execute import ChapterError, Execution, machine_label
from sllm_mini.lab.recorded import code_hash
from sllm_mini.lab.records import RecordError, Run, chapter_files, figures, figures_table, quantity, read_run, record
from sllm_mini.lab.table import Table
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text
from sllm_mini.resources import resource

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
LOADS = Table(("way", "seconds", "of the limit"), (("map", "0.50", "50%"), ("map", "250 ms", "100 %"), ("read <all>", "1.5 s", "x2.0 (1.9 to 2.1)")), "Loads & such")


def notebook(*tables: Table, title: str = "# 01 · A chapter", told: Mapping[str, Any] | None = None) -> Any:
    cell = nbformat.v4.new_code_cell("1", id="c01-02")
    cell.outputs = [nbformat.v4.new_output("stream", text="words\n"), *(nbformat.v4.new_output("display_data", data=dict(each._repr_mimebundle_())) for each in tables)]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"{title}\n\nWords.", id="c01-01"), cell], metadata={"sllm_mini": {"executed": "2026-11-23"} if told is None else told})


def read(tmp_path: Path, *tables: Table, **given: Any) -> Run:
    path = tmp_path / "01_a_chapter.ipynb"
    nbformat.write(notebook(*tables, **given), path)
    return read_run(path)


@given(st.integers(1, 4).flatmap(lambda columns: st.tuples(st.lists(TEXT, min_size=columns, max_size=columns), st.lists(st.lists(TEXT, min_size=columns, max_size=columns), max_size=4))), TEXT)
def test_a_table_is_read_as_it_was_written(cells: tuple[list[str], list[list[str]]], caption: str) -> None:
    from sllm_mini.lab.records import _tables

    made = Table(tuple(cells[0]), tuple(map(tuple, cells[1])), caption, note="not read", numeric=frozenset({0}), emphasis=frozenset({0}))
    (found,) = _tables({"outputs": [{"data": {"text/html": made._repr_html_().splitlines(keepends=True)}}]})
    assert (found.headers, found.rows, found.caption) == (made.headers, made.rows, made.caption)


@given(st.floats(1e-6, 1e4))
def test_what_the_lab_writes_is_read_in_its_unit(value: float) -> None:
    for text, unit, least in ((seconds_text(value), "s", 0.05), (nbytes_text(round(value * 1e6)), "B", 0.06), (rate_text(value * 1e6), "B/s", 0.06)):
        found = quantity(text)
        assert found is not None and found[1] == unit, text
        assert found[0] == pytest.approx(value if unit == "s" else round(value * 1e6) if unit == "B" else value * 1e6, rel=least, abs=1.0), text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x1.29 (1.1 to 1.5)", (1.29, "x")), ("50%", (0.5, "%")), ("99.3 %", (pytest.approx(0.993), "%")), ("61,739 → 5", (61739.0, "")), ("−4.7 ms", (pytest.approx(-0.0047), "s")), ("2 min", (120.0, "s")),
        ("", None), ("as low as sub-second", None), ("sm_90", None), ("3rd", None), ("2.13.0+cpu", None), ("node-0000", None),
    ],
)  # fmt: skip
def test_a_cell_is_a_quantity_or_it_is_not(text: str, found: tuple[float, str] | None) -> None:
    assert quantity(text) == found


def test_figures_are_compared_where_both_have_them_and_by_name(tmp_path: Path) -> None:
    mine = read(tmp_path, LOADS, Table(("a",), (("1",),)))
    turned = replace(LOADS, rows=(("read <all>", "3.0 s", "x1.0"), ("new", "1 s", "1%"), ("map", "1.0", "25%"), ("map", "1 GB", "0 %")))
    theirs = read(tmp_path, turned)
    assert [(each.row, each.column, each.mine, each.theirs, each.ratio) for each in figures(mine, theirs)] == [
        ("map", "seconds", "0.50", "1.0", 2.0), ("map", "of the limit", "50%", "25%", 0.5), ("map", "of the limit", "100 %", "0 %", None),
        ("read <all>", "seconds", "1.5 s", "3.0 s", 2.0), ("read <all>", "of the limit", "x2.0 (1.9 to 2.1)", "x1.0", 0.5),
    ]  # fmt: skip
    assert figures(mine, read(tmp_path, replace(LOADS, headers=("way", "seconds", "else")))) == []
    table = figures_table(mine, theirs)
    assert table.caption == "01 · A chapter" and "2026-11-23" in table.note and table.rows[0] == ("Loads & such", "map", "seconds", "0.50", "1.0", "2.00")


def test_a_record_keeps_what_a_chapter_showed_and_leaves_the_chapter_as_it_was(tmp_path: Path) -> None:
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    good = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 01 · Good"), nbformat.v4.new_code_cell("from sllm_mini.lab.table import Table\nTable(('way', 'seconds'), (('map', '1.5 s'),))")])
    nbformat.write(good, chapters / "01_good.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), chapters / "02_bad.ipynb")
    before = {path: path.read_bytes() for path in chapter_files(chapters)}
    done = list(record(chapter_files(chapters), tmp_path / "mine"))
    assert isinstance(done[0], Execution) and isinstance(done[1], ChapterError) and "ZeroDivisionError" in str(done[1])
    assert {path: path.read_bytes() for path in before} == before and [path.name for path in (tmp_path / "mine").iterdir()] == ["01_good.ipynb"]
    run = read_run(tmp_path / "mine" / "01_good.ipynb")
    assert (run.title, run.machine, run.code) == ("01 · Good", machine_label(), code_hash()) and run.seconds > 0
    assert [(each.mine, each.ratio) for each in figures(run, run)] == [("1.5 s", 1.0)]
    with pytest.raises(RecordError, match="is there already"):
        list(record([], tmp_path / "mine"))


def test_what_is_no_record_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="has no chapters"):
        chapter_files(tmp_path)
    path = tmp_path / "01_a.ipynb"
    path.write_text("[]")
    with pytest.raises(RecordError, match="no notebook that can be read"):
        read_run(path)
    with pytest.raises(RecordError, match="there is no chapter 07"):
        chapter_files(tmp_path, ["01", "07"])
    with pytest.raises(RecordError, match="never executed"):
        read(tmp_path, LOADS, told={})


def test_every_chapter_that_came_with_the_book_is_a_run_that_can_be_compared() -> None:
    for path in chapter_files(resource("chapters")):
        run = read_run(path)
        assert run.title.startswith(path.name[:2]) and all(each.ratio in (1.0, None) for each in figures(run, run))
        if path.name[:2] != "09":
            assert figures(run, run), path.name


def test_the_commands(run: Command, tmp_path: Path) -> None:
    nbformat.write(notebook(LOADS), tmp_path / "01_loading_optimised_checkpoints.ipynb")
    found = run("compare", tmp_path, tmp_path, "--json")
    assert found.code == 0 and len(found.document["chapters"][0]["figures"]) == 6 and found.document["chapters"][0]["same_code"]
    assert "Loads & such" in run("compare", tmp_path, tmp_path).out
    assert run("compare", tmp_path).code == 0
    assert run("compare", tmp_path, "--chapter", "02").code == 1
    assert run("record", "99").code == 1
    assert run("record", "01", "--name", "a/b").code == 2
