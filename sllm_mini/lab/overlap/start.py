"""One start of a model, from nothing to its first token: loaded then run, run while loading, and each part alone.

torch and transformers are imported already; the state of the page cache is the caller's to make. Costs the model's
memory once, given back before it returns. Shown in chapter 04.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.errors import UnsupportedError
from sllm_mini.inference import Engine
from sllm_mini.inference.overlap import COMPUTE_LANE, StreamedModel, stream_model
from sllm_mini.loading import LoadHandle, load_model, start_load
from sllm_mini.types import Span, SpanRecorder

Mode = Literal["serial", "overlapped", "load", "prefill"]
MODES: tuple[Mode, ...] = ("serial", "overlapped", "load", "prefill")


@dataclass(frozen=True, slots=True)
class Sample:
    """How long one start took, the processor time of all its threads in it, and the token it gave (a load gives none).

    `built_seconds`: of an overlapped start, until the module was there with all its tensors, so that a pass could begin.
    """

    seconds: float
    cpu_seconds: float
    token_id: int | None
    built_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the index and the bytes of its tensors."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """A start with all its spans: those of each chunk, of each layer, and "first token" at its end on the lane "request"."""

    mode: Mode
    layers: tuple[Layer, ...]
    spans: tuple[Span, ...]

    @property
    def begin(self) -> float:
        return min(span.start for span in self.spans)

    @property
    def seconds(self) -> float:
        """From the first byte asked for to the first token."""
        return max(span.end for span in self.spans) - self.begin

    @property
    def built_seconds(self) -> float:
        """Until the module was there with all its tensors, so that a pass could begin."""
        return next(span.end for span in self.spans if span.name == "fill") - self.begin

    def lane_seconds(self, lane: str) -> float:
        """All spans of a lane together: `WAIT_LANE` or `COMPUTE_LANE`."""
        return sum(span.seconds for span in self.spans if span.lane == lane)

    def compute_seconds(self) -> list[float]:
        """Of each layer of the index, in order; 0 for one that did not run."""
        found = {span.name: span.seconds for span in self.spans if span.lane == COMPUTE_LANE}
        return [found.get(layer.name, 0.0) for layer in self.layers]


def layers_of(checkpoint: Checkpoint) -> tuple[Layer, ...]:
    """The layers of a checkpoint in execution order; bytes that several tensors share count for the first."""
    index = checkpoint.index
    sizes = [0] * len(index.layers)
    seen: set[int] = set()
    for tensor in index.tensors:
        if tensor.storage not in seen:
            sizes[tensor.layer] += tensor.nbytes
            seen.add(tensor.storage)
    return tuple(Layer(name, nbytes) for name, nbytes in zip(index.layers, sizes, strict=True))


def time_start(checkpoint: Checkpoint, mode: Mode, prompt: Sequence[int], device: str = "cpu") -> Sample:
    """One timed start. `load` ends with a model that could run, `prefill` begins with one that was loaded untimed.

    Raises what `load_model` and the engine raise, and UnsupportedError where the checkpoint cannot be overlapped.
    """
    engine = Engine(load_model(checkpoint, device)) if mode == "prefill" else None
    gc.collect()
    token_id = built = streamed = None
    cpu, started = time.process_time(), time.monotonic()
    if mode == "overlapped":
        streamed = _streamed(checkpoint, start_load(checkpoint, device))
        built = time.monotonic() - started
        engine = Engine(streamed.model)
    elif engine is None:
        engine = Engine(load_model(checkpoint, device))
    if mode != "load":
        token_id = next(engine.generate(prompt, max_new_tokens=1)).token_id
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    engine = streamed = None
    gc.collect()
    return Sample(seconds, cpu, token_id, built)


def record_start(checkpoint: Checkpoint, mode: Mode, prompt: Sequence[int], device: str = "cpu") -> Start:
    """One start ("serial" or "overlapped") with its spans, for a picture: its times carry the cost of recording them.

    Raises as `time_start` does.
    """
    recorder = SpanRecorder()
    loading = start_load(checkpoint, device, recorder=recorder)
    streamed = _streamed(checkpoint, loading, recorder)
    engine = Engine(streamed.model)
    if mode == "serial":
        loading.wait()  # the hooks stay, so that each layer's time is still known
    with recorder.span("first token", lane="request"):
        next(engine.generate(prompt, max_new_tokens=1))
    streamed.wait()
    return Start(mode, layers_of(checkpoint), tuple(recorder.spans))


def _streamed(checkpoint: Checkpoint, loading: LoadHandle, recorder: SpanRecorder | None = None) -> StreamedModel:
    """The model of a load that it did not have to wait for."""
    streamed = stream_model(loading, recorder=recorder)
    if streamed.fallback is not None:
        raise UnsupportedError(f"{checkpoint.path} cannot run while it loads: {streamed.fallback}; choose another model")
    return streamed
