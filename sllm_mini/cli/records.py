"""`sllm-mini record` and `compare`: chapters run on this machine, kept, and set beside a run on another."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import UnsupportedError
from sllm_mini.resources import resource

Chosen = Annotated[list[str] | None, typer.Argument(metavar="[CHAPTER]...", help="Numbers such as 02; default: all.")]


def record(
    chapters: Chosen = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the record: a folder in --out.")] = "mine",
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where records are kept.", file_okay=False)] = Path("out/records"),
    json: JsonOption = False,
) -> None:
    """Run chapters here and keep what they measured.

    A record is a folder of executed notebooks, each with machine, date and code; `compare` sets it beside the figures that came with the book, or beside another record.
    """
    from sllm_mini.lab.execute import Execution
    from sllm_mini.lab.records import RecordError, chapter_files
    from sllm_mini.lab.records import record as run

    if not name or Path(name).name != name:
        raise typer.BadParameter(f"{name!r} is no name of a folder", param_hint="--name")
    if find_spec("nbclient") is None:
        raise UnsupportedError("chapters are run by nbclient, which is not here; install the extra with: pip install 'sllm_mini[lab]'")
    console, ran, failed = terminal.stdout_console(quiet=json), list[dict[str, Any]](), list[str]()
    files = chapter_files(resource("chapters"), chapters or ())
    with terminal.stage_progress() as stage, closing(run(files, out / name)) as runs:
        for path in files:
            stage(path.stem)
            done = next(runs)
            if isinstance(done, Execution):
                ran.append({"chapter": done.path.name, "seconds": done.seconds})
                console.print(f"{done.path.name}: {done.seconds:.0f} s")
            else:
                failed.append(str(done))
    if ran:
        console.print(f"kept in {out / name}; beside the book's own figures: sllm-mini compare {out / name}")
    if failed:
        raise RecordError(f"{len(failed)} of {terminal.count(len(files), 'chapter')} failed and {'is' if len(failed) == 1 else 'are'} not kept: {'; '.join(failed)}")
    if json:
        terminal.emit_json({"record": str(out / name), "chapters": ran})


def compare(
    mine: Annotated[Path, typer.Argument(metavar="RECORD", help="A folder that `record` wrote, or the chapters as you ran them.", exists=True, file_okay=False)],
    theirs: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="Another one; default: the chapters as they came with the book.", exists=True, file_okay=False)] = None,
    chapter: Annotated[list[str] | None, typer.Option("--chapter", metavar="NUMBER", help="Only this one; repeatable.")] = None,
    json: JsonOption = False,
) -> None:
    """Set the figures of two machines' chapters side by side.

    Those in tables, in printed lines and in what is said of pictures. Chapters run in their own place stand beside what git has of them.
    """
    from sllm_mini.lab.records import RecordError, chapter_files, figures, figures_table, read_run

    other = theirs or resource("chapters")
    committed = theirs is None and other.samefile(mine)
    there = {path.name: path for path in chapter_files(other)}
    pairs = [(read_run(path), read_run(there[path.name], committed=committed)) for path in chapter_files(mine, chapter or ()) if path.name in there]
    if not pairs:
        raise RecordError(f"{mine} and {other} have no chapter in common")
    if json:
        chapters = [
            {"title": one.title, "this": one.where, "other": two.where, "same_code": one.code == two.code, "seconds": [one.seconds, two.seconds], "figures": [asdict(each) for each in figures(one, two)]}
            for one, two in pairs
        ]  # fmt: skip
        return terminal.emit_json({"this": str(mine), "other": str(other), "chapters": chapters})
    console = terminal.stdout_console()
    for one, two in pairs:
        console.print(str(figures_table(one, two)), markup=False, highlight=False, soft_wrap=True)
        console.print()
