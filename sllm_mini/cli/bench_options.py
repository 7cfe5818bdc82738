"""What the commands of `sllm-mini bench` have in common: their options, and what becomes of the document that they measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from sllm_mini.lab.figure import Described

RoundsOption = Annotated[int, typer.Option("--rounds", min=1, max=1000, metavar="N", help="How often each way is measured.")]
FolderOption = Annotated[Path | None, typer.Option("--dir", metavar="FOLDER", help="Where files are prepared: the disk that is measured.", file_okay=False)]
KeepOption = Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the prepared files for the next run.")]
SaveOption = Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the JSON document there too.", dir_okay=False)]


def check_writable(*targets: Path | None) -> None:
    """Raises FileNotFoundError for a file whose folder is not there, before anything is measured."""
    for target in targets:
        if target is not None and not target.absolute().parent.is_dir():
            raise FileNotFoundError(2, "there is no such folder; make it first", str(target.parent))


def check_gpus(count: int) -> None:
    """Raises DeviceError where the driver shows fewer."""
    from sllm_mini.device.cuda import gpu_count, why_no_cuda
    from sllm_mini.errors import DeviceError

    found = gpu_count()
    if found == 0:
        raise DeviceError(f"CUDA cannot be used: {why_no_cuda()}")
    if found < count:
        raise DeviceError(f"{count} GPUs were asked for and this machine has {found}; ask for fewer --devices")


def deliver(
    document: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    *,
    json: bool,
    save: Path | None = None,
    picture: Path | None = None,
    draw: Callable[[], Described] | None = None,
) -> None:
    """Saves and draws where that was asked for; then prints the document, as JSON or as `show` does. Raises OSError."""
    from sllm_mini.lab.bench.document import save_document

    if save is not None:
        save_document(document, save)
    if picture is not None and draw is not None:
        draw().save(picture)
    if json:
        terminal.emit_json(document)
    else:
        show(document)


def print_skipped(console: Console, document: dict[str, Any]) -> None:
    """A line for each thing that could not be measured."""
    if document["skipped"]:
        console.print()
    for skipped in document["skipped"]:
        console.print(f"skipped: {skipped['name']}: {skipped['reason']}", style="yellow")
