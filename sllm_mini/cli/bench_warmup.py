"""`sllm-mini bench warmup`: what comes after the weights, first and again, cold and prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import RoundsOption, SaveOption, check_writable, deliver, print_skipped
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.errors import UnsupportedError


def warmup(
    model: Annotated[str | None, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint of ours, or a Hugging Face directory; default: the tiny trained model.")] = None,
    device: DeviceOption = "cpu",
    rounds: RoundsOption = 3,
    part: Annotated[list[str] | None, typer.Option("--part", metavar="NAME", help="Only this part; repeatable: first calls, torch.compile, kernels, memory profile, attention, graphs.")] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, max=64, metavar="N", help="Layers of the model that torch.compile compiles.")] = 1,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, max=256, metavar="N", help="Rows of the worst case, and of the largest graph.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, metavar="N", help="Tokens of the worst case, and of a slot; at most the model's context.")] = 1024,
    json: JsonOption = False,
    save: SaveOption = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw every part as bars (PNG).", dir_okay=False)] = None,
) -> None:
    """Time what a start still has to do once the weights are there: first calls, kernels, graphs, the memory trial.

    Every sample is a fresh process; all take turns in shuffled rounds, so that a noisy minute hurts all of them. What this machine cannot measure is skipped and named.
    """
    from sllm_mini.lab.warmup import PARTS, Options, described_warmup, measure_warmup

    check_writable(save, picture)
    try:
        options = Options(rounds=rounds, device=device, parts=tuple(part or PARTS), layers=layers, max_batch=max_batch, max_tokens=max_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with terminal.stage_progress() as stage:
        document = measure_warmup(model, options=options, on_stage=stage)
    deliver(document, _print, json=json, save=save, picture=picture if document["results"] else None, draw=lambda: described_warmup(document))
    if picture is not None and not document["results"]:
        raise UnsupportedError(f"nothing was measured, so {picture} was not drawn; see what was skipped, and leave --picture out")


def _print(document: dict[str, Any]) -> None:
    from sllm_mini.lab.warmup import warmup_table

    console = terminal.stdout_console()
    method = document["method"]
    console.print(f"{document['model']['name']}, on {method['device']}, {terminal.count(method['rounds'], 'round')}, each sample a fresh process")
    if not document["results"]:
        console.print("Nothing was measured: every part that was asked for was skipped.")
        print_skipped(console, document)
        return
    made = warmup_table(document)
    table = terminal.table(*made.headers, numbers=tuple(made.headers[column] for column in made.numeric), title=made.caption)
    for row in made.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    print_skipped(console, document)
