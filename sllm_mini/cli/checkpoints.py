"""`sllm-mini make-model`, `convert`, `export` and `verify`: the commands that write checkpoints or prove them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from sllm_mini.cli import terminal
from sllm_mini.cli.terminal import JsonOption
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

SHAPE_NAMES = ("gpt2", "opt-125m", "opt-1.3b", "opt-6.7b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b")
"""The keys of `checkpoint.shapes.SHAPES`, written out so that `--help` need not import that floor; a test compares them."""

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST if it exists, in one step and only once the new one is whole.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads at work.", show_default="as the processor suggests", metavar="N"),
]


def parse_nbytes(text: str) -> int:
    """Bytes from "4GiB", "500MB" or "1048576". Raises typer.BadParameter (wrong usage) for anything else."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (nbytes := int(float(match[1]) * unit)) < 1:
        raise typer.BadParameter(f'"{text}" is not a size; write for example 4GiB, 500MB or 1048576')
    return nbytes


def make_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(SHAPE_NAMES)}.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the Hugging Face directory is made.")],
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32.", show_default="as published"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a model of a published shape with random weights.

    The result is a Hugging Face directory that loads, and costs, exactly what the real model does; its text means nothing.
    """
    from sllm_mini.checkpoint.random_model import make_model as make

    started = time.monotonic()
    with terminal.byte_progress(f"Making {name}") as progress:
        make(name, directory, seed=seed, overwrite=overwrite, dtype=dtype, progress=progress)
    seconds = time.monotonic() - started
    files = sorted(directory.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    if json:
        terminal.emit_json(
            {
                "name": name,
                "path": str(directory),
                "files": [file.name for file in files],
                "nbytes": nbytes,
                "seed": seed,
                "seconds": seconds,
            }
        )
        return
    console = terminal.stdout_console()
    console.print(
        f"Made {directory}: {name} with random weights, {nbytes_text(nbytes)} in {terminal.count(len(files), 'file')}, {seconds_text(seconds)}"
    )


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A Hugging Face directory with safetensors, or one safetensors file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The checkpoint directory to make.")],
    partition_size: Annotated[
        int | None,
        typer.Option(
            "--partition-size",
            parser=parse_nbytes,
            metavar="SIZE",
            help="No data file is larger, for example 4GiB.",
            show_default="8GiB",
        ),
    ] = None,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Convert a model to a checkpoint that loads fast.

    DST appears whole or not at all. The model's configuration and tokenizer travel with it.
    """
    from sllm_mini.checkpoint import WriteOptions, convert_checkpoint
    from sllm_mini.checkpoint.quantised import KINDS, lacks_torchao

    options = WriteOptions(overwrite=overwrite, threads=threads)
    if partition_size is not None:
        options = WriteOptions(overwrite=overwrite, threads=threads, partition_nbytes=partition_size)
    started = time.monotonic()
    with terminal.byte_progress(f"Converting {source.name}") as progress:
        checkpoint = convert_checkpoint(source, destination, options=options, progress=progress)
    seconds = time.monotonic() - started
    index = checkpoint.index
    if json:
        terminal.emit_json(
            {
                "source": str(source),
                "path": str(destination),
                "nbytes": index.total_nbytes,
                "tensors": len(index.tensors),
                "partitions": len(index.partitions),
                "companions": [entry.file for entry in index.companions],
                "seconds": seconds,
            }
        )
        return
    console = terminal.stdout_console()
    parts = f"{terminal.count(len(index.tensors), 'tensor')}, {nbytes_text(index.total_nbytes)} in {terminal.count(len(index.partitions), 'partition')}"
    console.print(f"Converted {source} to {destination}")
    console.print(f"  {parts}, {seconds_text(seconds)} ({rate_text(index.total_nbytes / seconds)})")
    if lacks_torchao() and any(entry.kind in KINDS for entry in index.composites):
        console.print("  its quantised weights need torchao to be loaded; install it with: pip install torchao", style="yellow")
    console.print(f"  next: sllm-mini load {destination}", style="dim")


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The Hugging Face directory to make.")],
    shard_size: Annotated[
        int | None,
        typer.Option(
            "--shard-size",
            parser=parse_nbytes,
            metavar="SIZE",
            help="No safetensors file is larger, for example 5GB.",
            show_default="5GB",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Turn a checkpoint back into a Hugging Face directory."""
    from sllm_mini.checkpoint import export_safetensors

    started = time.monotonic()
    with terminal.byte_progress(f"Exporting {checkpoint.name}") as progress:
        if shard_size is None:
            files = export_safetensors(checkpoint, destination, overwrite=overwrite, progress=progress)
        else:
            files = export_safetensors(
                checkpoint, destination, max_shard_nbytes=shard_size, overwrite=overwrite, progress=progress
            )
    seconds = time.monotonic() - started
    nbytes = sum(file.stat().st_size for file in files)
    if json:
        terminal.emit_json(
            {
                "source": str(checkpoint),
                "path": str(destination),
                "files": [file.name for file in files],
                "nbytes": nbytes,
                "seconds": seconds,
            }
        )
        return
    console = terminal.stdout_console()
    console.print(
        f"Exported {checkpoint} to {destination}: {nbytes_text(nbytes)} in {terminal.count(len(files), 'file')}, {seconds_text(seconds)}"
    )


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")],
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Prove that no byte of a checkpoint has changed.

    Exit code 1, and the first damaged file and where its damaged chunk starts, if one has.
    """
    from sllm_mini.checkpoint import verify_checkpoint

    with terminal.byte_progress(f"Verifying {checkpoint.name}") as progress:
        report = verify_checkpoint(checkpoint, threads=threads, progress=progress)
    if json:
        terminal.emit_json(
            {
                "path": str(checkpoint),
                "ok": True,
                "nbytes": report.nbytes,
                "files": report.files,
                "seconds": report.seconds,
            }
        )
        return
    console = terminal.stdout_console()
    console.print(
        f"{checkpoint} is intact: {nbytes_text(report.nbytes)} in {terminal.count(report.files, 'file')}, {seconds_text(report.seconds)}"
    )
