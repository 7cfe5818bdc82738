"""Executes one chapter into the report: `python -m sllm_mini.lab.report.chapter CHAPTER.ipynb COPY.ipynb [--rehearsal]`.

The copy keeps the outputs; the chapter itself is not touched. Exit code 1 with one sentence where a cell failed. The
copy of a rehearsal says in its first cell that it is one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sllm_mini.lab.execute import ChapterError, execute_chapter
from sllm_mini.lab.report.folder import REHEARSAL


def main() -> int:
    source, copy = map(Path, sys.argv[1:3])
    working = copy.with_name(f".{copy.name}.executing")
    shutil.copyfile(source, working)
    try:
        done = execute_chapter(working, timeout_seconds=460)
    except ChapterError as error:
        print(error, file=sys.stderr)
        return 1
    else:
        if "--rehearsal" in sys.argv[3:]:
            _say_so(working)
        working.replace(copy)
    finally:
        working.unlink(missing_ok=True)
    print(f"{copy.name}: {done.ncells} code cells, {done.seconds:.0f} s")
    return 0


def _say_so(path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(REHEARSAL, id="rehearsal"))
    nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
