"""Chapters that were run are kept and set beside each other: tables read back from notebooks as they were written, figures by their units. Chapter 00."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from command_line import Run as Command
from hypothesis import given
from hypothesis import strategies as st

from sllm_mini.lab import records
from sllm_mini.lab.environment import check_environment
from sllm_mini.lab.execute import ChapterError, Execution, machine_label
from sllm_mini.lab.quantity import quantities
from sllm_mini.lab.recorded import code_hash
from sllm_mini.lab.records import RecordError, Run, chapter_files, figures, figures_table, read_run, record
from sllm_mini.lab.shown import shown_by
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
    made = Table(tuple(cells[0]), tuple(map(tuple, cells[1])), caption, note="not read", numeric=frozenset({0}), emphasis=frozenset({0}))
    (found,) = shown_by({"outputs": [{"output_type": "display_data", "data": {"text/html": made._repr_html_().splitlines(keepends=True)}}]}).tables
    assert (found.headers, found.rows, found.caption) == (made.headers, made.rows, made.caption)


@given(st.floats(1e-6, 1e4))
def test_what_the_lab_writes_is_read_in_its_unit(value: float) -> None:
    for text, unit, written, least in ((seconds_text(value), "s", value, 0.0), (nbytes_text(round(value * 1e6)), "B", round(value * 1e6), 0.0), (rate_text(value * 1e6), "B/s", value * 1e6, 0.51)):
        (found,) = quantities(text)
        assert (found.unit, found.text) == (unit, text)
        assert found.value == pytest.approx(written, rel=0.006, abs=least), text  # three digits are written, below 1 kB whole bytes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x1.29 (1.1 to 1.5)", [(1.29, "x")]), ("50%", [(0.5, "%")]), ("99.3 %,", [(0.993, "%")]), ("61,739 → 5", [(61739, ""), (5, "")]), ("−4.7 ms", [(-0.0047, "s")]), ("2 min", [(120, "s")]),
        ("tiny 4.44 s, large 16 MiB: x1.0", [(4.44, "s"), (16 * 2**20, "B"), (1, "x")]), ("10 Gbit/s network", [(1.25e9, "B/s")]), ("at most 1.0e-15.", [(1e-15, "")]), ("[8, 16]", [(8, ""), (16, "")]),
        ("", []), ("as low as sub-second", []), ("sm_90", []), ("3rd", []), ("2.13.0+cpu", []), ("node-0000", []), ("http://127.0.0.1:4399/a", []), ("qwen2.5-0.5b", []), ("2026-11-23", []), ("0x87686e", []),
    ],
)  # fmt: skip
def test_figures_are_told_from_names(text: str, found: list[tuple[float, str]]) -> None:
    assert [(pytest.approx(each.value), each.unit) for each in quantities(text)] == found


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
    assert table.caption.startswith("01 · A chapter. This: a machine that is not named, 2026-11-23.") and table.rows[0] == ("Loads & such", "map", "seconds", "0.50", "1.0", "2.00")


def test_rows_that_begin_alike_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    ways = Table(("model", "bytes", "way", "there after"), (("tiny", "10 MB", "copied", "6 ms"), ("tiny", "10 MB", "attached", "2 ms"), ("large", "1 GB", "copied", "1 s")))
    rows = {(each.row, each.mine) for each in figures(read(tmp_path, ways), read(tmp_path, ways)) if each.column == "there after"}
    assert rows == {("tiny, 10 MB, copied", "6 ms"), ("tiny, 10 MB, attached", "2 ms"), ("large", "1 s")}


def test_printed_lines_and_pictures_are_compared_by_what_they_say(tmp_path: Path) -> None:
    def lines(*printed: str, alt: str, load: str) -> Run:
        made = notebook(LOADS)
        drawn = f'<figure><img alt="{alt}"><figcaption>Only words; load {load}.</figcaption></figure>'
        made.cells[1].outputs = [nbformat.v4.new_output("stream", text=text) for text in printed]
        made.cells[1].outputs += [nbformat.v4.new_output("display_data", data={"text/html": drawn, "text/plain": "not read: 7 s"})]
        nbformat.write(made, tmp_path / "01_a_chapter.ipynb")
        return read_run(tmp_path / "01_a_chapter.ipynb")

    mine = lines("cold   2 s (1 to 3), kept", " 100 ms: x20\nread 3 of 4\nround 1 s\n", alt="Start of 2 s: import 1.5 s (75 %), load 500 ms.", load="500 ms")
    theirs = lines("cold 500 ms (0 to 1), kept 125 ms: x4\nread 3 of 4\nround 1 s\nround 2 s\nskipped 1\n", alt="Start of 500 ms: load 250 ms, import 100 ms (20 %).", load="250 ms")
    found = [(each.row, each.column, each.mine, each.theirs, each.ratio) for each in figures(mine, theirs)]
    assert found == [
        ("Start of …", "Start of", "2 s", "500 ms", 0.25), ("import …", "import", "1.5 s", "100 ms", pytest.approx(1 / 15)), ("load …", "load", "500 ms", "250 ms", 0.5),
        ("cold …, kept …: …", "cold", "2 s", "500 ms", 0.25), ("cold …, kept …: …", "kept", "100 ms", "125 ms", 1.25), ("cold …, kept …: …", "", "x20", "x4", 0.2),
        ("read 3 of 4", "read", "3", "3", 1.0), ("read 3 of 4", "of", "4", "4", 1.0),
    ]  # fmt: skip
    table = figures_table(mine, theirs)
    assert table.rows[2:] == (("c01-02", "load …", "", "500 ms", "250 ms", "0.50"), ("c01-02", "cold …, kept …: …", "", "2 s, 100 ms, x20", "500 ms, 125 ms, x4", "0.25, 1.25, 0.20"))
    assert "Of 8 figures that both have, 2 are the same" in table.note


def test_machine_and_day_are_those_of_the_outputs_and_not_those_of_an_earlier_run(tmp_path: Path) -> None:
    found = check_environment(tmp_path).table()
    told = {"executed": "2020-01-01", "machine": "another", "code": "of another", "seconds": 5.0}
    run = read(tmp_path, found, told=told)
    assert (run.machine, run.date, run.code) == (machine_label(), found.rows[0][1], "")
    assert figures(run, run) == []  # what a chapter finds of the machine is no figure of the chapter
    with_metadata = read(tmp_path, found, LOADS, told={**told, "executed": run.date, "machine": run.machine})
    assert (with_metadata.code, with_metadata.seconds) == ("of another", 5.0)
    gpu = replace(found, rows=tuple(("GPU", "NVIDIA H200, 139 GB free", "ok", "") if row[0] == "GPU" else row for row in found.rows))
    assert read(tmp_path, gpu, told={}).machine.startswith("NVIDIA H200, ")


def test_chapters_run_in_their_place_stand_beside_what_git_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    theirs, path = read(tmp_path, LOADS), tmp_path / "01_a_chapter.ipynb"
    with pytest.raises(RecordError, match=r"01_a_chapter.ipynb as it was committed cannot be had \(.*; name the record"):
        read_run(path, committed=True)
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    mine = read(tmp_path, replace(LOADS, rows=(("map", "1.0", "50%"),)))
    assert read_run(path, committed=True) == theirs != mine
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecordError, match="git is not installed"):
        read_run(path, committed=True)


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


def test_a_chapter_that_fails_does_not_keep_the_others_from_being_recorded(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def executed(path: Path, *, to: Path, timeout_seconds: float) -> Execution:
        if path.name.startswith("01"):
            raise ChapterError(f"{path.name}, cell 3 (c): KeyError: 'x'")
        to.write_bytes(path.read_bytes())
        return Execution(path, 1, 2.0)

    monkeypatch.setattr(records, "execute_chapter", executed)
    monkeypatch.chdir(tmp_path)
    found = run("record", "00", "01", "02", "--name", "mine")
    assert found.code == 1 and "1 of 3 chapters failed and is not kept: 01_loading_optimised_checkpoints.ipynb, cell 3 (c): KeyError: 'x'" in found.err
    assert [path.name[:2] for path in sorted((tmp_path / "out" / "records" / "mine").iterdir())] == ["00", "02"]
    assert "is there already" in run("record", "02", "--name", "mine").err
    assert run("record", "01", "--name", "none").code == 1 and not (tmp_path / "out" / "records" / "none").exists()
    assert [each["chapter"][:2] for each in run("record", "02", "--name", "more", "--json").document["chapters"]] == ["02"]


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
        found = figures(run, run)
        assert len(found) > 50 and any(each.caption is None for each in found), path.name


def test_the_commands(run: Command, tmp_path: Path) -> None:
    nbformat.write(notebook(LOADS), tmp_path / "01_loading_optimised_checkpoints.ipynb")
    found = run("compare", tmp_path, tmp_path, "--json")
    assert found.code == 0 and len(found.document["chapters"][0]["figures"]) == 6 and found.document["chapters"][0]["same_code"]
    assert "Of 6 figures that both have, 6 are the same" in run("compare", tmp_path, tmp_path).out
    assert run("compare", tmp_path).code == 0
    assert run("compare", tmp_path, "--chapter", "02").code == 1
    (tmp_path / "other").mkdir()
    nbformat.write(notebook(LOADS), tmp_path / "other" / "02_another.ipynb")
    assert "have no chapter in common" in run("compare", tmp_path, tmp_path / "other").err
    assert run("record", "99").code == 1
    assert run("record", "01", "--name", "a/b").code == 2
