"""`sllm-mini bench decode`: tokens per second of our engine, transformers' generate and its continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.bench_options import FolderOption, KeepOption, RoundsOption, SaveOption, check_writable, deliver
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

Dtype = Literal["bfloat16", "float16", "float32"]


def decode(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A checkpoint of ours, a Hugging Face directory with its configuration, or a published shape such as opt-125m.")] = "opt-125m",
    device: DeviceOption = "cpu",
    rounds: RoundsOption = 5,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, max=256, metavar="N", help="Requests at once; repeatable. Default: 1 and 8.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Length of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, metavar="N", help="Length of an answer.")] = 64,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32 to compute in. Default: as stored, but bfloat16 for float16 on a CPU.")] = None,
    folder: FolderOption = None,
    keep: KeepOption = False,
    json: JsonOption = False,
    save: SaveOption = None,
) -> None:
    """Time the answers to the same requests by our engine and by both of transformers' own, one after another, in shuffled rounds."""
    from sllm_mini.device import get_device
    from sllm_mini.lab.decode import Options, measure_decode

    check_writable(save)
    options = Options(rounds=rounds, batches=tuple(batch or (1, 8)), prompt_tokens=prompt_tokens, new_tokens=new_tokens, device=get_device(device).name, dtype=dtype)
    with terminal.stage_progress() as stage:
        document = measure_decode(model, options=options, folder=folder, keep=keep, on_stage=stage)
    deliver(document, _print, json=json, save=save)


def _print(document: dict[str, Any]) -> None:
    console = terminal.stdout_console()
    model, method = document["model"], document["method"]
    words = f"{model['name']}: {nbytes_text(model['nbytes'])} ({model['weights']}), on {method['device']} in {method['dtype']}, {terminal.count(method['rounds'], 'round')}"
    console.print(f"{words}, prompts of {method['prompt_tokens']} and answers of {terminal.count(method['new_tokens'], 'token')} at most")
    console.print(_table(document))
    console.print("A ratio above 1: that way took longer than ours in the same round.", style="dim")
    console.print("Every token of a lone request reads all weights once: the last column is what share of the answer's time that alone would be.", style="dim")


def _table(document: dict[str, Any]) -> Table:
    numbers = ("seconds", "min – max", "tokens/s", "over ours", "same tokens", "reading the weights")
    made = terminal.table("requests and way", *numbers, numbers=numbers, title="Answers")
    for row in document["results"]:
        ratio = f"{row['ratio_to_ours_median']:.2f} ({row['ratio_to_ours_min']:.2f} – {row['ratio_to_ours_max']:.2f})"
        share = "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.0%}"
        spread = f"{seconds_text(row['seconds_min'])} – {seconds_text(row['seconds_max'])}"
        made.add_row(row["name"], seconds_text(row["seconds_median"]), spread, f"{row['tokens_per_second_median']:.1f}", ratio, f"{row['same_tokens_share']:.0%}", share)
    return made
