"""The runner of chapters: what passes is kept, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

from sllm_mini.lab.execute import ChapterError, execute_chapter, main


def chapter(path: Path, *sources: str) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell("# A chapter"), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(notebook, path)
    return path


def test_a_chapter_that_passes_keeps_its_outputs_its_cell_ids_and_its_time(tmp_path: Path) -> None:
    path = chapter(tmp_path / "00_good.ipynb", "import os\nprint(os.getcwd())", "x = 6", "x * 7")
    before = nbformat.read(path, as_version=4)
    done = execute_chapter(path)
    after = nbformat.read(path, as_version=4)
    nbformat.validate(after)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert after.cells[1].outputs[0].text.strip() == os.path.realpath(tmp_path)
    assert after.cells[3].outputs[0].data["text/plain"] == "42"
    assert all("execution" not in cell.metadata for cell in after.cells)
    stamp = after.metadata.sllm_mini
    assert stamp.seconds == round(done.seconds, 1) and len(stamp.executed) == 10 and done.ncells == 3
    assert os.listdir(tmp_path) == [path.name]


def test_checking_writes_nothing_and_one_failure_does_not_hide_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        chapter(tmp_path / "00_good.ipynb", "1 + 1"),
        chapter(tmp_path / "01_raises.ipynb", "1", "{}['missing key']", "print('never')"),
        chapter(tmp_path / "02_warns.ipynb", "import warnings\nwarnings.warn('this is deprecated')"),
        tmp_path / "03_broken.ipynb",
    ]
    paths[3].write_text("{not a notebook")
    before = [path.read_bytes() for path in paths]
    assert main(["--check", *map(str, paths)]) == 1
    out, err = capsys.readouterr()
    assert "00_good.ipynb: 1 code cells" in out
    assert "01_raises.ipynb, cell 3" in err and "KeyError: 'missing key'" in err
    assert "02_warns.ipynb, cell 2" in err and "wrote to stderr" in err and "this is deprecated" in err
    assert "03_broken.ipynb: not a notebook" in err
    assert [path.read_bytes() for path in paths] == before
    with pytest.raises(ChapterError, match="wrote to stderr"):
        execute_chapter(paths[2])
    assert paths[2].read_bytes() == before[2]  # a chapter that fails is never written
    assert sorted(os.listdir(tmp_path)) == [path.name for path in paths]


@pytest.mark.parametrize("fork", [False, True])
def test_a_cell_that_hangs_and_a_kernel_that_dies_are_errors(tmp_path: Path, fork: bool) -> None:
    with pytest.raises(ChapterError, match=r"00_hangs.ipynb.*[Tt]imed? ?out"):
        execute_chapter(chapter(tmp_path / "00_hangs.ipynb", "while True: pass"), timeout_seconds=1, fork=fork)
    with pytest.raises(ChapterError, match=r"00_dies.ipynb.*died"):
        execute_chapter(chapter(tmp_path / "00_dies.ipynb", "import os\nos._exit(1)"), fork=fork)


LOOK = """
import os, sys, tempfile
folder = tempfile.TemporaryDirectory()
print(os.getcwd(), os.getppid(), "torch" in sys.modules, "left" in globals(), folder.name, flush=True)
left = 1
"""


def test_forked_kernels_are_fresh_ones_that_have_imported_and_leave_nothing(tmp_path: Path) -> None:
    said = []
    for name in ("00_one.ipynb", "01_two.ipynb"):
        path = chapter(tmp_path / name, LOOK)
        execute_chapter(path, fork=True)
        said.append(nbformat.read(path, as_version=4).cells[1].outputs[0].text.split())
    assert said[0][:4] == said[1][:4] == [os.path.realpath(tmp_path), said[0][1], "True", "False"]
    assert int(said[0][1]) != os.getpid()  # one zygote
    assert not any(os.path.exists(words[4]) for words in said)


def test_no_chapter_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
