"""`sllm-mini bench start`: from "not running" to the first token, from each rung of the ladder, beside `transformers serve` from cold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import (
    FolderOption,
    RoundsOption,
    SaveOption,
    check_gpus,
    check_writable,
    deliver,
    print_skipped,
)
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.units import nbytes_text, seconds_text


def start(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL_DIR]", exists=True, file_okay=False, help="A Hugging Face directory.", show_default="the tiny trained model")] = None,
    rounds: RoundsOption = 5,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Of each answer; the first is what is timed.")] = 8,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="That engines compute with.", show_default="one a CPU")] = None,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Measure transformers serve, too.")] = True,
    cuda: Annotated[bool, typer.Option("--cuda", help="On the first GPU.")] = False,
    folder: FolderOption = None,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Seconds to the first token of a model that does not run, from each rung of the warmth ladder.

    In the same shuffled rounds transformers serve starts with the same model, cold. What a process imports until it says that it is up stands apart; what ours prepares by then is counted as the rest.
    """
    check_writable(save)
    if cuda:
        check_gpus(1)
    try:
        from sllm_mini.lab.startbench import Options, measure_start
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"the server needs {error.name}; install the extra with: pip install 'sllm_mini[serve]'") from error
    from sllm_mini.resources import resource

    with terminal.stage_progress() as stage:
        document = measure_start(model or resource("data/models/tiny"), Options(rounds, tokens, threads, peer, cuda), folder=folder, on_stage=stage)
    deliver(document, _print, json=json, save=save)


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    model, method, machine = document["model"], document["method"], document["machine"]
    console.print(
        f"{model['name']}, {nbytes_text(model['nbytes'])} of {', '.join(model['dtypes'])}, on {machine['processor']} with {terminal.count(method['threads'], 'thread')}, "
        f"{terminal.count(method['rounds'], 'round')}; a start of a process begins before its imports"
    )
    console.print()
    numbers = ("first token", "min – max", "imports", "the rest", "floor", "sooner than peer", "without imports")
    made = terminal.table("from", *numbers, numbers=numbers, title="Seconds to the first token")
    for row in document["results"]:
        ratios = [f"{row[name]:.1f}x" if name in row else "" for name in ("ratio_to_peer_median", "ratio_without_imports_median")]
        made.add_row(
            row["name"], seconds_text(row["seconds_median"]), f"{seconds_text(row['seconds_min'])} – {seconds_text(row['seconds_max'])}",
            seconds_text(row["imports_seconds_median"]) if row["imports_seconds_median"] else "", seconds_text(row["rest_seconds_median"]),
            "" if row["floor_seconds"] is None else seconds_text(row["floor_seconds"]), *ratios,
        )  # fmt: skip
    console.print(made)
    console.print("The rest has what a process prepares before it is asked counted in, as if it came after.")
    console.print(f"The floor reads the weights once: from the disk, else at the speed of a copy {'to the GPU' if method['cuda'] else 'within memory'}.")
    print_skipped(console, document)
