"""`sllm-mini tour`: a guided cold start, from files at rest to the first token, every step measured here and now."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from sllm_mini.cli import bars, inspection, terminal
from sllm_mini.cli.terminal import DeviceOption, JsonOption
from sllm_mini.lab.units import nbytes_text, seconds_text, share_text
from sllm_mini.resources import resource

if TYPE_CHECKING:
    from sllm_mini.lab.anatomy import ColdStart

PROMPT = "Once upon a time"
_NEW_TOKENS, _ENOUGH_TOKENS = 120, 80
"""It stops at the first end of a sentence after enough, or at the last of these."""
_WARM_REQUESTS = 5
_TINY = "data/models/tiny"

_FILES = {
    "config.json": "its shape: how many layers, how wide",
    "generation_config.json": "how its text begins and ends",
    "model.safetensors": "its weights: nearly all of its bytes",
    "tokenizer.json": "how text becomes numbers",
    "tokenizer_config.json": "the tokenizer's settings",
}

_NEXT = """\
make lab                                     chapter 00 in JupyterLab: this start again, drawn and explained
sllm-mini doctor                             the limits of this machine, which no loader can beat
sllm-mini make-model llama-3.2-1b DIR        a real model's size: 2.5 GB of random weights
sllm-mini convert DIR CKPT                   then write it so that it loads fast,
sllm-mini load CKPT --cold                   and time it: this is what chapters 01 and 02 are about
sllm-mini generate CKPT --prompt "Hello"     a whole cold start of your own"""


class _Guide:
    """Speaks to the reader: numbered steps, short paragraphs, and a stop after each step if asked for."""

    def __init__(self, console: Console, pause: bool) -> None:
        self.console = console
        self.width = min(console.width, terminal.TEXT_WIDTH)
        self._pause = pause and sys.stdin.isatty()
        self._step = 0

    def step(self, title: str) -> None:
        if self._step and self._pause:
            try:
                input("\n(Enter to go on) ")
            except EOFError:
                self._pause = False
        self._step += 1
        self.console.print()
        self.console.print(f"{self._step}. {title}", style="bold")

    def say(self, words: str) -> None:
        self.console.print(words, width=self.width)

    def show(self, drawn: RenderableType) -> None:
        self.console.print()
        self.console.print(drawn)
        self.console.print()


def tour(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help='Also start a larger model with random weights, such as "opt-125m".'
        ),
    ] = None,
    pause: Annotated[bool, typer.Option("--pause", help="Wait for Enter between the steps.")] = False,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    """Watch a small model start, every second explained.

    Takes about a minute. Works in a temporary directory and removes it at the end.
    """
    if model is not None:
        from sllm_mini.checkpoint.shapes import find_shape

        find_shape(model)  # a wrong name is told before the tour begins
    tiny = resource(_TINY)
    guide = _Guide(terminal.stdout_console(quiet=json), pause and not json)
    with tempfile.TemporaryDirectory(prefix="sllm-mini-tour-") as folder:
        document = _tour(guide, tiny, Path(folder), device, model, stream=not json)
    if json:
        terminal.emit_json(document)


def _tour(guide: _Guide, tiny: Path, folder: Path, device: str, model: str | None, *, stream: bool) -> dict[str, Any]:
    guide.console.print("A cold start, step by step", style="bold")
    guide.say(
        "A cold start is the time from a request for a model that is not running to the first piece of its answer. This tour "
        "makes one happen on this machine and accounts for every second of it."
    )
    _files_at_rest(guide, tiny)
    document: dict[str, Any] = {"device": device, "checkpoint": _convert(guide, tiny, folder / "tiny")}
    start = _cold_start(guide, folder / "tiny", device)
    document["cold_start"] = _start_document(start)
    document["warm"] = warm = _write(guide, folder / "tiny", device, stream)
    _cold_beside_warm(guide, start, warm["ttft_seconds"])
    if model is not None:
        document["larger"] = _larger(guide, model, folder, device, start)
    guide.step("What to read next")
    for line in _NEXT.splitlines():
        guide.console.print(f"  {line}", soft_wrap=True)
    return document


def _files_at_rest(guide: _Guide, tiny: Path) -> None:
    guide.step("A model at rest is a few files")
    listing = terminal.table("file", "size", "what it holds", numbers=("size",))
    for file in sorted(tiny.iterdir()):
        if file.is_file() and (file.name in _FILES or file.suffix == ".safetensors"):
            words = _FILES.get(file.name, _FILES["model.safetensors"])
            listing.add_row(file.name, nbytes_text(file.stat().st_size), words)
    guide.say(
        "This one comes with sllm_mini. It is tiny and has read only made-up stories, but it is a real language model."
    )
    guide.show(listing)


def _convert(guide: _Guide, source: Path, target: Path) -> dict[str, Any]:
    from sllm_mini.checkpoint import convert_checkpoint

    guide.step("The same weights, written for loading")
    guide.say(
        "We write the weights again in the order in which the model needs them, so that a part of the file is a part of the "
        "model; aligned, so that the disk can put them straight where they belong; and with a hash of every piece, so that no "
        "wrong bit goes unseen. The index says where everything is:"
    )
    started = time.monotonic()
    with terminal.byte_progress("Converting") as progress:
        checkpoint = convert_checkpoint(source, target, progress=progress)
    seconds = time.monotonic() - started
    guide.show(inspection.layers_table(checkpoint.index))
    guide.say(f"That took {seconds_text(seconds)} and is done once, long before anybody waits.")
    index = checkpoint.index
    return {"nbytes": index.total_nbytes, "tensor_count": len(index.tensors), "convert_seconds": seconds}


def _cold_start(guide: _Guide, checkpoint: Path, device: str) -> ColdStart:
    guide.step("A cold start")
    guide.say(
        "Now nothing is running, and a request arrives. We ask the kernel to forget the checkpoint, start a new Python process "
        f"and wait until it has the first token of an answer to “{PROMPT}”. One line for each step, drawn where it happened:"
    )
    start = _measure(checkpoint, device)
    guide.show(bars.timeline(start.spans, start.first_token_seconds, guide.width))
    imports = sum(start.seconds(name) for name in ("import torch", "import transformers", "import sllm_mini"))
    moved = _load_seconds(start)
    guide.say(
        f"The first token came after {seconds_text(start.first_token_seconds)}, and the lines above account for "
        f"{share_text(start.coverage)} of that. Importing libraries took {share_text(imports / start.first_token_seconds)}. "
        f"Moving the weights (marked ‖: it ran beside the others) took {seconds_text(moved)}, because these are only "
        f"{nbytes_text(start.nbytes)}; a large model has a thousand times as many."
    )
    return start


def _measure(checkpoint: Path, device: str) -> ColdStart:
    from sllm_mini.lab.anatomy import measure_cold_start

    with terminal.stage_progress() as stage:
        stage("a fresh process is starting")
        return measure_cold_start(checkpoint, device=device, prompt=PROMPT, max_new_tokens=8, drop_page_cache=True)


def _load_seconds(start: ColdStart) -> float:
    """Seconds in which bytes moved: the loader's own lane, which other steps may cover."""
    return sum(span.seconds for span in start.spans if span.name == "bytes" and span.lane != "main")


def _write(guide: _Guide, checkpoint: Path, device: str, stream: bool) -> dict[str, Any]:
    guide.step("It writes")
    guide.say("The model again, now in this process, with more time to speak:")
    guide.console.print()
    with terminal.stage_progress() as stage:
        stage("loading the model")
        from sllm_mini.inference import Engine

        engine = Engine.load(checkpoint, device)
    speak = terminal.wrapping_writer(guide.width) if stream else lambda _: None
    speak(PROMPT)
    with engine.generate(PROMPT, max_new_tokens=_NEW_TOKENS) as generation:
        pieces = []
        for piece in generation:
            pieces.append(piece.text)
            speak(piece.text)
            if len(pieces) >= _ENOUGH_TOKENS and piece.text.rstrip().endswith((".", "!", "?")):
                break
        timings = generation.timings
    speak("\n")
    # The first request paid for what is slow only once; a model that is kept alive answers like those after it.
    answers = [engine.complete(PROMPT, max_new_tokens=1).timings.first_token_seconds for _ in range(_WARM_REQUESTS)]
    warm = statistics.median(answers)
    speed = 1 / timings.seconds_per_step if timings.seconds_per_step else 0.0
    return {"text": "".join(pieces), "ttft_seconds": warm, "decode_tokens_per_second": speed}


def _cold_beside_warm(guide: _Guide, start: ColdStart, warm_seconds: float) -> None:
    cold = start.first_token_seconds
    guide.step("Cold beside warm")
    guide.say("The same model, already running, was asked the same again. Time to the first token, cold and warm:")
    guide.show(bars.beside({"cold": cold, "warm": warm_seconds}, guide.width))
    guide.say(
        f"Warm is {cold / warm_seconds:,.0f} times as fast, but it occupies memory while nobody asks. Between the two lie the rungs "
        "of a ladder, and every technique of this book either makes a rung cheaper to climb or chooses where to wait:"
    )
    guide.show(bars.ladder(start.spans, cold))
    guide.say("What ran beside something else is not counted twice, so the costs add up to the whole.")


def _larger(guide: _Guide, name: str, folder: Path, device: str, small: ColdStart) -> dict[str, Any]:
    from sllm_mini.checkpoint import convert_checkpoint
    from sllm_mini.checkpoint.random_model import make_model

    guide.step(f"A larger model: {name}")
    guide.say("Random weights in a published shape. Its text means nothing, but its bytes weigh what the real ones do.")
    source, target = folder / "larger-source", folder / "larger"
    with terminal.byte_progress(f"Making {name}") as progress:
        make_model(name, source, progress=progress)
    with terminal.byte_progress("Converting") as progress:
        checkpoint = convert_checkpoint(source, target, progress=progress)
    start = _measure(target, device)
    guide.show(bars.timeline(start.spans, start.first_token_seconds, guide.width))
    guide.say(
        f"{nbytes_text(checkpoint.nbytes)} took {seconds_text(_load_seconds(start))} to move, against "
        f"{seconds_text(_load_seconds(small))} for the tiny model; the imports do not grow with the model."
    )
    return {"name": name} | _start_document(start)


def _start_document(start: ColdStart) -> dict[str, Any]:
    return {
        "nbytes": start.nbytes,
        "first_token_seconds": start.first_token_seconds,
        "coverage": start.coverage,
        "page_cache_fraction": start.page_cache_fraction,
        "spans": [
            asdict(span) | {"warmth": None if span.warmth is None else span.warmth.name.lower()} for span in start.spans
        ],
    }
