"""`sllm-mini bench migrate`: how long a request pauses that moves between two processes, by mode and length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import FolderOption, RoundsOption, SaveOption, check_writable, deliver
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table


def migrate(
    model: Annotated[Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint of ours; default: a small Llama with random weights.")] = None,
    device: DeviceOption = "cpu",
    rounds: RoundsOption = 3,
    context: Annotated[
        list[int] | None, typer.Option("--context", min=1, metavar="N", help="Tokens of the prompt; repeatable. Default: 128, 512 and 2000.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, metavar="N", help="Threads that each of the two processes computes with.")] = 1,
    folder: FolderOption = None,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Move requests between two processes while they decode: by recomputing, by copying their KV cache, and by stopping first.

    Contexts and modes take turns in shuffled rounds. A pause is said in decode steps of the same request.
    """
    from sllm_mini.device import get_device
    from sllm_mini.lab.moving import Options, measure_moves

    check_writable(save)
    options = Options(rounds=rounds, contexts=tuple(context or (128, 512, 2000)), device=get_device(device).name, threads=threads)
    with terminal.stage_progress() as stage:
        document = measure_moves(model, options=options, folder=folder, on_stage=stage)
    deliver(document, _print, json=json, save=save)


def _print(document: dict[str, Any]) -> None:
    from sllm_mini.lab.moving import break_even

    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    words = f"{model['name']}: {nbytes_text(model['nbytes'])} ({model['weights']}), on {method['device']}, {terminal.count(method['threads'], 'thread')} each"
    console.print(f"{words}, {terminal.count(method['rounds'], 'round')}")
    console.print(_table(document))
    speeds, even = break_even(document)
    console.print(
        f"the destination recomputes {speeds.recompute_tokens_per_second:.0f} tokens/s, the link moves {rate_text(speeds.link_bytes_per_second)}, "
        f"a token's keys and values are {nbytes_text(speeds.kv_nbytes_per_token)}: copying wins on links faster than {rate_text(even)}"
    )


def _table(document: dict[str, Any]) -> Table:
    numbers = ("tokens", "a step", "pause in steps", "min – max", "last round", "client's gap", "whole move", "sent", "rounds")
    made = terminal.table("mode", *numbers, numbers=numbers, title="Moves")
    for row in document["results"]:
        made.add_row(
            row["mode"].replace("_", " "), str(row["tokens"]), seconds_text(row["step_seconds_median"]), f"{row['pause_steps_median']:.2f}",
            f"{row['pause_steps_min']:.2f} – {row['pause_steps_max']:.2f}", f"{row['last_round_steps_median']:.2f}" if row["rounds_median"] else "", f"{row['gap_steps_median']:.2f}", seconds_text(row["seconds_median"]),
            nbytes_text(row["nbytes"]), f"{row['rounds_median']:.0f}",
        )  # fmt: skip
    return made
