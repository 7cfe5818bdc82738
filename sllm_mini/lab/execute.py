"""Runs chapters top to bottom and keeps their outputs: `python -m sllm_mini.lab.execute [--check] chapters/*.ipynb`.

A chapter passes if no cell raises and none writes to stderr: a warning that a reader would wonder about is a defect of
the chapter. Each has a kernel of its own: a fresh process where one is executed, forks of a prepared one where they are several.
Cell ids stay as they are; the file is replaced at once or not at all.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sllm_mini.errors import SllmError
from sllm_mini.lab.recorded import code_hash


class ChapterError(SllmError):
    """A chapter that cannot be read, that raised, or that wrote to stderr."""


@dataclass(frozen=True, slots=True)
class Execution:
    """One run of one chapter: wall-clock seconds, the kernel's start included."""

    path: Path
    ncells: int
    seconds: float


def execute_chapter(path: str | os.PathLike[str], *, write: bool = True, to: str | os.PathLike[str] | None = None, timeout_seconds: float = 600, fork: bool = False) -> Execution:
    """Runs one notebook in a kernel of its own (with `fork` one of `lab.forked_kernel`), in its own folder, and writes outputs, where and when they came about and the time they took into it,
    or into the file `to`.

    With `write` false nothing is written. A chapter that fails is never written. Raises ChapterError naming the
    file and the cell. `timeout_seconds` bounds each cell. Not safe for one file from several threads.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ChapterError(f"{path}: not a notebook that can be read ({_first_line(error)})") from error
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=int(timeout_seconds),
        record_timing=False,  # times of single cells would change every cell of the file on every run
        resources={"metadata": {"path": str(path.parent)}},
    )
    if fork:
        from sllm_mini.lab.forked_kernel import ForkedKernel

        client.kernel_manager_class = ForkedKernel
    start = time.monotonic()
    try:
        client.execute()
    except CellExecutionError as error:
        raise ChapterError(f"{path}, {_failed_cell(notebook)}: {error.ename}: {_first_line(error.evalue)}") from error
    except (CellTimeoutError, DeadKernelError) as error:
        raise ChapterError(f"{path}: {_first_line(error)}") from error
    seconds = time.monotonic() - start
    for place, text in _complaints(notebook):
        raise ChapterError(f"{path}, {place} wrote to stderr: {_first_line(text)}")
    if write:
        notebook.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        notebook.metadata["sllm_mini"] = {
            "executed": today, "seconds": round(seconds, 1), "python": platform.python_version(), "machine": machine_label(), "code": code_hash(),
        }  # fmt: skip
        target = path if to is None else Path(to)
        temporary = target.with_name(f".{target.name}.tmp")
        nbformat.write(notebook, temporary)
        os.replace(temporary, target)
    return Execution(path, sum(cell.cell_type == "code" for cell in notebook.cells), seconds)


def machine_label() -> str:
    """What chapters run on here, in a few words: the GPU where there is one, the processor and its cores."""
    from sllm_mini.device import cuda_available
    from sllm_mini.device.cpu import cpu_count
    from sllm_mini.device.cuda import cuda_device
    from sllm_mini.loading.probe import processor_model

    gpu = f"{cuda_device(0).properties().model}, " if cuda_available() else ""
    return f"{gpu}{processor_model()}, {cpu_count()} cores"


def _complaints(notebook: Any) -> Iterator[tuple[str, str]]:
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr" and output.text.strip():
                yield f"cell {number} ({cell.get('id', 'no id')})", output.text


def _failed_cell(notebook: Any) -> str:
    for number, cell in enumerate(notebook.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return f"cell {number} ({cell.get('id', 'no id')})"
    return "a cell"


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if every chapter passed, 1 if one failed (the others are still run), 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.execute", description="Run chapters top to bottom and keep their outputs.")
    parser.add_argument("chapters", nargs="+", type=Path, metavar="CHAPTER.ipynb")
    parser.add_argument("--check", action="store_true", help="run them and write nothing")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="limit for each cell (default: 600)")
    options = parser.parse_args(argv)
    failed = 0
    for path in options.chapters:
        try:
            done = execute_chapter(path, write=not options.check, timeout_seconds=options.timeout, fork=len(options.chapters) > 1)
        except ChapterError as error:
            failed += 1
            print(error, file=sys.stderr)
        else:
            print(f"{done.path}: {done.ncells} code cells, {done.seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
