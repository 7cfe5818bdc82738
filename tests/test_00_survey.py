"""The survey: what it may say, what its reader refuses, and that what is shown is what is in the file. Chapter 00."""

from __future__ import annotations

import csv
import pkgutil
import re
from pathlib import Path

import pytest

from sllm_mini.errors import ResourceError
from sllm_mini.lab.survey import (
    COLUMNS,
    KINDS,
    TRUST,
    SurveyRow,
    load_survey,
    plot_survey,
    select,
    survey_alt_text,
    survey_table,
)
from sllm_mini.types import Warmth

GOOD = {
    "system": "Loader",
    "kind": "paper",
    "mechanism": "reads in parallel",
    "rung": "dram;device",
    "figure": "2x",
    "source": "Conf'24",
    "trust": "read in its abstract",
    "date": "2024",
    "chapter": "01;02",
    "policy": "keepalive.FixedKeepAlive",
}


def write(path: Path, *rows: dict[str, str], header: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([row[column] for column in header] for row in rows)
    return path


def test_the_survey_that_ships_is_whole() -> None:
    rows = load_survey()
    assert len(rows) >= 40
    assert {row.kind for row in rows} == set(KINDS)
    assert {row.trust for row in rows} == set(TRUST)
    assert all(select(rows, rung=rung) for rung in Warmth)
    # Every chapter from 01 on rebuilds something that somebody built before.
    assert {chapter for row in rows for chapter in row.chapters} >= set(range(1, 12))
    names = " ".join(row.system for row in rows)
    for name in ("ServerlessLLM", "RainbowCake", "λScale", "DeepServe", "FlashInfer", "AWS Lambda", "Azure", "Google Cloud Run", "Alibaba"):
        assert name in names


def test_what_is_only_remembered_is_never_shown_as_a_fact() -> None:
    rows = load_survey()
    remembered = [row for row in rows if row.trust == TRUST[-1] and row.figure]
    assert remembered
    shown = {line[0]: line for line in survey_table(rows).rows}
    for row in remembered:
        assert shown[row.system][3].startswith("unchecked: ")
        assert shown[row.system][4] == f"{row.source}: from memory, not checked"
    assert not [row for row in rows if row.trust != TRUST[-1] and "unchecked" in row.figure]


def test_a_row_says_what_its_cells_say(tmp_path: Path) -> None:
    second = GOOD | {"system": "Other, with a comma", "date": "", "chapter": "", "figure": "", "policy": ""}
    rows = load_survey(write(tmp_path / "s.csv", GOOD, second))
    assert rows[0] == SurveyRow(
        "Loader", "paper", "reads in parallel", (Warmth.DRAM, Warmth.DEVICE), "2x", "Conf'24", "read in its abstract", 2024, (1, 2),
        ("keepalive.FixedKeepAlive",),
    )  # fmt: skip
    assert (rows[1].system, rows[1].year, rows[1].chapters, rows[1].policies) == ("Other, with a comma", None, (), ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "blog"}, "kind 'blog'"),
        ({"rung": "dram;gpu"}, "rung 'gpu'"),
        ({"rung": "DRAM"}, "rung 'DRAM'"),
        ({"rung": ""}, "at least one"),
        ({"rung": "device;dram"}, "from cold to ready"),
        ({"rung": "dram;dram"}, "each once"),
        ({"trust": "sure"}, "trust 'sure'"),
        ({"trust": TRUST[-1]}, "unchecked"),
        ({"figure": "unchecked: 2x"}, "unchecked"),
        ({"date": "24"}, "date '24'"),
        ({"date": "1066"}, "date 1066"),
        ({"chapter": "12"}, "chapters"),
        ({"chapter": "1"}, "chapter '1'"),
        ({"chapter": "0\u0662"}, "chapter '0"),
        ({"policy": "FixedKeepAlive"}, "policy 'FixedKeepAlive'"),
        ({"policy": "keepalive.FixedKeepAlive;"}, "policy 'keepalive"),
        ({"mechanism": ""}, "mechanism is empty"),
        ({"system": ""}, "system is empty"),
        ({"source": ""}, "source is empty"),
    ],
)
def test_a_wrong_cell_is_refused_with_its_line(tmp_path: Path, change: dict[str, str], words: str) -> None:
    path = write(tmp_path / "s.csv", GOOD, GOOD | {"system": "Second"} | change)
    with pytest.raises(ResourceError, match=re.escape(words)) as caught:
        load_survey(path)
    assert f"{path} line 3" in str(caught.value)


def test_a_file_that_is_no_survey_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    with pytest.raises(ResourceError, match="cannot be read"):
        load_survey(path)
    with pytest.raises(ResourceError, match="cannot be read"):
        load_survey(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ResourceError, match="line 1: the columns"):
        load_survey(path)
    with pytest.raises(ResourceError, match="line 1: the columns"):
        load_survey(write(path, GOOD, header=COLUMNS[:-1]))
    write(path, GOOD, GOOD)
    with pytest.raises(ResourceError, match="'Loader' is on line 2 already"):
        load_survey(path)
    path.write_text(",".join(COLUMNS) + "\none,two\n", encoding="utf-8")
    with pytest.raises(ResourceError, match="line 2: 2 cells where 10"):
        load_survey(path)
    path.write_bytes(",".join(COLUMNS).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ResourceError, match="not UTF-8"):
        load_survey(path)
    path.write_text(",".join(COLUMNS) + '\n"never closed', encoding="utf-8")
    with pytest.raises(ResourceError, match="not a CSV file"):
        load_survey(path)


def test_the_filters_choose_and_the_caption_says_so() -> None:
    rows = load_survey()
    chosen = select(rows, rung=Warmth.DEVICE, kind="paper", chapter=10)
    assert chosen
    assert all(Warmth.DEVICE in row.rungs and row.kind == "paper" and 10 in row.chapters for row in chosen)
    table = survey_table(rows, rung=Warmth.DEVICE, kind="paper", chapter=10)
    assert [line[0] for line in table.rows] == [row.system for row in chosen]
    assert table.caption.startswith(f"{len(chosen)} of {len(rows)} ")
    for words in ("rung device", "kind paper", "chapter 10"):
        assert words in table.caption
    html = survey_table(rows)._repr_html_()
    words = set(str(survey_table(rows)).split())
    for row in rows:
        assert f">{row.system.replace('&', '&amp;')}<" in html
        assert set(f"{row.system} {row.mechanism} {row.figure} {row.source}: {row.trust}".split()) <= words


def test_what_models_a_row_is_there_to_be_imported() -> None:
    rows = load_survey()
    named = {name for row in rows for name in row.policies}
    assert {"keepalive.RainbowCake", "keepalive.FixedKeepAlive", "messages.ModelSpec.min_instances"} <= named
    for name in sorted(named):
        assert pkgutil.resolve_name(f"sllm_mini.control.{name}") is not None
    provided = [row for row in rows if row.kind == "provider" and 9 in row.chapters]
    assert provided and all(row.policies for row in provided), "chapter 09 simulates what each provider in it does"


def test_the_column_of_policies_is_shown_on_request() -> None:
    rows = load_survey()
    plain, wide = survey_table(rows, chapter=9), survey_table(rows, chapter=9, policies=True)
    assert wide.headers == (*plain.headers, "modelled by")
    assert [line[:-1] for line in wide.rows] == list(plain.rows)
    assert [line[-1] for line in wide.rows] == [", ".join(row.policies) for row in select(rows, chapter=9)]


def test_the_matrix_has_a_dot_for_each_rung_of_each_row() -> None:
    from matplotlib import pyplot

    rows = load_survey()
    axes = plot_survey(rows)
    dots = {(float(x), float(y)) for collection in axes.collections for x, y in collection.get_offsets().tolist()}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    named = {row.system: row for row in rows}
    assert sorted(labels) == sorted(named)
    assert dots == {(float(rung), float(y)) for y, label in enumerate(labels) for rung in named[label].rungs}
    for rung in Warmth:
        assert f"{rung.name.lower()}\n{len(select(rows, rung=rung))}" in [text.get_text() for text in axes.texts]
        assert f"{rung.name.lower()} {len(select(rows, rung=rung))}" in survey_alt_text(rows)
    pyplot.close("all")
    with pytest.raises(ValueError, match="no rows"):
        plot_survey([])
