"""`sllm-mini bench overlap`: the first token of a model that is loaded then run, and of one that runs while it loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import FolderOption, KeepOption, RoundsOption, SaveOption, check_writable, deliver
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table


def overlap(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A checkpoint, a Hugging Face directory or a published shape; default: the largest shape that fits.")
    ] = None,
    device: DeviceOption = "cpu",
    rounds: RoundsOption = 5,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", min=1, metavar="N", help="Length of the prompt; repeatable. Default: a short one, and one whose prefill takes as long as the load."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="N", help="Threads that compute, on a processor; default: all, so that the load shares them.")
    ] = None,
    folder: FolderOption = None,
    keep: KeepOption = False,
    json: JsonOption = False,
    save: SaveOption = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw bytes against layers for the last prompt (PNG).", dir_okay=False)] = None,
) -> None:
    """Time the first token of a cold model: loaded then run, run while loading, and load and prefill alone.

    All four take turns in shuffled rounds, each from a cold page cache, so that a noisy minute hurts all of them.
    """
    from sllm_mini.device import get_device
    from sllm_mini.lab.overlap import Options, described_overlap, measure_overlap

    check_writable(save, picture)
    options = Options(rounds=rounds, tokens=tuple(tokens or ()), device=get_device(device).name, threads=threads)
    with terminal.stage_progress() as stage:
        document, starts = measure_overlap(model, options=options, folder=folder, keep=keep, on_stage=stage)
    title = f"{document['model']['name']}, a prompt of {terminal.count(document['prompts'][-1]['tokens'], 'token')}"
    deliver(document, _print, json=json, save=save, picture=picture, draw=lambda: described_overlap(starts, title=title))


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    words = f"{model['name']}: {nbytes_text(model['nbytes'])} ({model['weights']})"
    console.print(f"{words}, to {method['device']}, {terminal.count(method['rounds'], 'round')}, cold, {terminal.count(method['threads'], 'thread')} to compute")
    for prompt in document["prompts"]:
        console.print()
        console.print(_table(document, prompt))
        console.print(f"first token over the target: {_ratio(prompt, 'ratio_to_target')} (the target is 1.1 × max(load, prefill) + one layer)")
        console.print(f"loaded then run over run while loading: {_ratio(prompt, 'serial_over_overlapped')}")
        built = f" and the module, built after {seconds_text(prompt['built_seconds_median'])}," if "built_seconds_median" in prompt else ""
        console.print(f"over what bytes in order{built} allow if nothing competes: {_ratio(prompt, 'ratio_to_pipeline')}", style="dim")
        if "ratio_to_work_median" in prompt:
            cores = terminal.count(document["limits"]["processor_count"], "processor")
            console.print(f"over the processor time of both parts, shared by {cores}: {_ratio(prompt, 'ratio_to_work')}", style="dim")


def _ratio(prompt: dict[str, Any], name: str) -> str:
    return f"{prompt[f'{name}_median']:.2f} ({prompt[f'{name}_min']:.2f} – {prompt[f'{name}_max']:.2f})"


def _table(document: dict[str, Any], prompt: dict[str, Any]) -> Table:
    from sllm_mini.lab.overlap import prompt_rows

    numbers = ("seconds", "min – max", "processor time")
    made = terminal.table("start", *numbers, numbers=numbers, title=f"A prompt of {terminal.count(prompt['tokens'], 'token')} ({prompt['why']})")
    for mode, row in prompt_rows(document, prompt["tokens"]).items():
        spread = f"{seconds_text(row['seconds_min'])} – {seconds_text(row['seconds_max'])}"
        made.add_row(mode, seconds_text(row["seconds_median"]), spread, seconds_text(row["cpu_seconds_median"]))
    return made
