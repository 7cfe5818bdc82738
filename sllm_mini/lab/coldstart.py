"""The process that is watched while it starts: `python -m sllm_mini.lab.coldstart REQUEST`, run by `lab.anatomy`.

It climbs the warmth ladder one rung at a time, as plainly as a server would, and writes one JSON report to the pipe that
was its standard output; whatever a library prints goes to standard error. Heavy imports stand where they are timed.
Shown in chapter 00.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sllm_mini.errors import SllmError
from sllm_mini.types import Span, SpanRecorder, Warmth

if TYPE_CHECKING:
    from sllm_mini.inference import Piece


def climb(path: str, device: str, prompt: str | list[int], max_new_tokens: int, spawned: float) -> dict[str, Any]:
    """From nothing to the last token; `spawned` is when the parent asked for this process, on the same clock.

    Raises what loading and generating raise. Once per process: imports are only slow the first time.
    """
    recorder = SpanRecorder([Span("interpreter", spawned, time.monotonic(), warmth=Warmth.PROCESS)])
    with recorder.span("import torch", warmth=Warmth.RUNTIME):
        import torch
    with recorder.span("import transformers", warmth=Warmth.RUNTIME):
        import_model_class(path)
    with recorder.span("import sllm_mini", warmth=Warmth.RUNTIME):
        from sllm_mini.checkpoint import open_checkpoint
        from sllm_mini.device import CudaDevice, get_device
        from sllm_mini.inference import Engine, load_tokenizer
        from sllm_mini.loading import load_model
    with recorder.span("open device", warmth=Warmth.RUNTIME):
        target = get_device(device)
        torch.zeros(1, device=target.name).add_(1)  # the first operation makes torch's own context
        target.synchronize()
    with recorder.span("open checkpoint", warmth=Warmth.DRAM):
        checkpoint = open_checkpoint(path)
    with recorder.span("tokenizer", warmth=Warmth.DRAM):
        tokenizer = load_tokenizer(checkpoint)
    with _named(recorder, before="start load", after="hand over"):
        model = load_model(checkpoint, target, recorder=recorder)
    with recorder.span("engine", warmth=Warmth.READY):
        engine = Engine(model, tokenizer)
        prompt_ids = engine.encode(prompt)
    with recorder.span("first call", warmth=Warmth.READY):
        # What a server does before it says that it is ready: one prefill and one decode step, on a single token.
        for _ in engine.generate(prompt_ids[:1], max_new_tokens=2, stop_at_eos=False):
            pass
    pieces: list[Piece] = []
    first_token = begun = time.monotonic()
    for piece in engine.generate(prompt_ids, max_new_tokens=max_new_tokens):
        now = time.monotonic()
        first_token = first_token if pieces else now
        recorder.spans.append(Span("decode" if pieces else "first token", begun, now, warmth=Warmth.READY))
        pieces.append(piece)
        begun = now
    return {
        "spans": [asdict(span) for span in recorder.spans],
        "first_token": first_token,
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.token_id for piece in pieces],
        "prompt_tokens": len(prompt_ids),
        "threads": torch.get_num_threads(),
        "device": target.name,
        "gpu": target.properties().model if isinstance(target, CudaDevice) else "",
    }


@contextmanager
def _named(recorder: SpanRecorder, *, before: str, after: str) -> Iterator[None]:
    """Names the main lane's time in the body before the first and after the last span that the body records itself."""
    start, known = time.monotonic(), len(recorder.spans)
    yield
    inner, end = [span for span in recorder.spans[known:] if span.lane == "main"], time.monotonic()
    first = min((span.start for span in inner), default=end)
    last = max((span.end for span in inner), default=end)
    recorder.spans.append(Span(before, start, max(first, start), warmth=Warmth.DRAM))
    recorder.spans.append(Span(after, min(last, end), end, warmth=Warmth.READY))


def import_model_class(path: str | os.PathLike[str]) -> None:
    """Imports transformers and the module of the checkpoint's own class, which would else be imported much later."""
    import transformers

    # transformers imports what a name needs when the name is looked up.
    names: list[Any] = ["AutoTokenizer", "AutoModelForCausalLM"]
    # Where the configuration is no good, load_model says so, and better.
    with suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        names += json.load(file)["architectures"]
    for name in names:
        getattr(transformers, str(name), None)


def main(arguments: list[str]) -> int:
    """Answers one request and returns the exit code: 0, or 1 for an error that the report names."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = climb(**json.loads(arguments[0]))
    except SllmError as error:
        answer = {"error": str(error)}
    with report:
        json.dump(answer, report)
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # an interpreter that has torch takes a second to take itself down, which is no part of a start
