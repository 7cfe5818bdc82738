"""`sllm-mini bench tiers`: a model from the remote, the disk and DRAM to memory, and from one process to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import (
    FolderOption,
    KeepOption,
    RoundsOption,
    SaveOption,
    check_writable,
    deliver,
    print_skipped,
)
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text


def tiers(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help='A Hugging Face directory, a published shape, "small" or "tiny"; default: the largest shape that fits.'),
    ] = None,
    rounds: RoundsOption = 5,
    also: Annotated[list[str] | None, typer.Option("--also", metavar="MODEL", help="Another model to attach; repeatable. Default: tiny and opt-125m.")] = None,
    huge_pages: Annotated[bool, typer.Option("--huge-pages", help="As root, let the kernel give huge pages for the run; its settings are set back.")] = False,
    no_gpu: Annotated[bool, typer.Option("--no-gpu", help="Leave out the GPU where there is one.")] = False,
    folder: FolderOption = None,
    keep: KeepOption = False,
    json: JsonOption = False,
    save: SaveOption = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw how near each load comes to its limit (PNG).", dir_okay=False)] = None,
) -> None:
    """Load one model from every tier of the store, attach it from another process, and say how near each comes to its limit.

    Steps take turns in shuffled rounds, each with its limit measured in the same round. Every load ends with a sum over every byte.
    """
    from sllm_mini.lab.tiers import Options, described_tiers, measure_tiers
    from sllm_mini.lab.tiers.measure import ALSO

    check_writable(save, picture)
    options = Options(rounds=rounds, also=ALSO if also is None else tuple(also), huge_pages=huge_pages, gpu=not no_gpu)
    with terminal.stage_progress() as stage:
        document = measure_tiers(model, options=options, folder=folder, keep=keep, on_stage=stage)
    deliver(document, _print, json=json, save=save, picture=picture, draw=lambda: described_tiers(document))


def _print(document: dict[str, Any]) -> None:
    from sllm_mini.lab.tiers import parts_table, tiers_table
    from sllm_mini.lab.tiers.document import LABELS

    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    words = f"{model['name']}: {terminal.count(model['tensor_count'], 'tensor')}, {nbytes_text(model['nbytes'])} ({model['weights']})"
    console.print(f"{words}, {terminal.count(method['rounds'], 'round')}, memory {method['memory']}")
    console.print()
    limits = document["limits"]
    found = {label: rate_text(limits[f"{name}_bytes_per_second"]) for name, label in LABELS.items() if f"{name}_bytes_per_second" in limits}
    if "resident_use_seconds_median" in limits:
        found["using every byte"] = f"{seconds_text(limits['resident_use_seconds_median'])}, once it is in memory"
    console.print(terminal.facts(found))
    for made in (tiers_table(document), parts_table(document)):
        table = terminal.table(*made.headers, numbers=tuple(made.headers[column] for column in made.numeric), title=made.caption)
        for row in made.rows:
            table.add_row(*row)
        console.print()
        console.print(table)
        if made.note:
            console.print(made.note, style="dim")
    print_skipped(console, document)
