"""What a cold start is made of, measured alone, and the first token that follows from it for any prompt.

`measure_parts` measures a load and a few prefills; `Parts.predict` is arithmetic on them. The pipeline's formula is
`document.pipeline_seconds`: bytes arrive in order at the load's mean rate, layers compute in their order, and the first
waits for the module, too. Where load and arithmetic share the same processors, their processor time over the number of
processors is a second bound. Shown in chapter 04.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.device.cpu import cpu_count
from sllm_mini.lab.overlap.document import pipeline_seconds
from sllm_mini.lab.overlap.measure import make_state, prompt_of
from sllm_mini.lab.overlap.picture import arrival_seconds
from sllm_mini.lab.overlap.start import Layer, Mode, Sample, Start, record_start, time_start
from sllm_mini.types import Span, Warmth

_LONGEST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds to the first token of one prompt. `work`: the bound of shared processors, 0 where they are not shared."""

    tokens: int
    load: float
    prefill: float
    pipeline: float
    work: float

    @property
    def serial(self) -> float:
        return self.load + self.prefill

    @property
    def overlapped(self) -> float:
        return max(self.pipeline, self.work)


@dataclass(frozen=True, slots=True)
class Parts:
    """A load, prefills of some prompt lengths (ascending), and each layer's bytes and seconds in one pass.

    `cores`: how many processors load and arithmetic share, None where they share none. `model_seconds`: until the module is
    built and filled beside the load. Raises ValueError for fewer than two prompt lengths.
    """

    layers: tuple[Layer, ...]
    layer_seconds: tuple[float, ...]
    load: Sample
    prefills: tuple[tuple[int, Sample], ...]
    cores: int | None
    model_seconds: float = 0.0

    def __post_init__(self) -> None:
        lengths = [tokens for tokens, _ in self.prefills]
        if len(lengths) < 2 or lengths != sorted(set(lengths)):
            raise ValueError(f"a line needs prefills of two or more prompt lengths, ascending; these are {lengths}")

    def prefill(self, tokens: float) -> tuple[float, float]:
        """Seconds and processor seconds of a prefill: on the line between its neighbours, or on the last one's."""
        lengths = [length for length, _ in self.prefills]
        at = min(max(bisect_left(lengths, tokens), 1), len(lengths) - 1)
        (low, before), (high, after) = self.prefills[at - 1 : at + 1]
        share = (tokens - low) / (high - low)
        least = min(sample.seconds for _, sample in self.prefills)
        seconds = max(before.seconds + share * (after.seconds - before.seconds), 0.5 * least)
        return seconds, max(before.cpu_seconds + share * (after.cpu_seconds - before.cpu_seconds), 0.0)

    def predict(self, tokens: int) -> Prediction:
        """The first token of a prompt of that length, serial and overlapped."""
        seconds, cpu = self.prefill(tokens)
        pipeline = pipeline_seconds(self.layers, self.layer_seconds, self.load.seconds, seconds, self.model_seconds)
        work = (self.load.cpu_seconds + cpu) / self.cores if self.cores else 0.0
        return Prediction(tokens, self.load.seconds, seconds, pipeline, work)

    def balanced(self, *, least: int = 1, most: int = _LONGEST_TOKENS) -> int:
        """The prompt whose prefill takes as long as the load, where overlap can gain most; within `least` and `most`."""
        return next((tokens for tokens in range(least, most) if self.prefill(tokens)[0] >= self.load.seconds), most)

    def embedding_share(self) -> float:
        """The first layer's share of the bytes: nothing can compute before they are there."""
        return self.layers[0].nbytes / sum(layer.nbytes for layer in self.layers)


def record_cold(checkpoint: Checkpoint, mode: Mode, tokens: int, device: str = "cpu") -> Start:
    """One recorded start from a cold page cache. Raises what `make_state` and `record_start` raise."""
    make_state(checkpoint, device)
    return record_start(checkpoint, mode, prompt_of(tokens), device)


def measure_parts(checkpoint: Checkpoint, lengths: Sequence[int] = (4, 48, 160), *, device: str = "cpu", rounds: int = 3) -> Parts:
    """Measures load and prefills alone, taking turns, each the median of `rounds` after one that does not count.

    Costs a cold load for each sample. Raises what `record_cold` raises and ValueError for fewer than two lengths.
    """
    loads: list[Sample] = []
    prefills: dict[int, list[Sample]] = {tokens: [] for tokens in sorted(lengths)}
    for tokens in prefills:
        time_start(checkpoint, "prefill", prompt_of(tokens), device)
    serial = record_cold(checkpoint, "serial", lengths[len(lengths) // 2], device)
    for _ in range(rounds):
        make_state(checkpoint, device)
        loads.append(time_start(checkpoint, "load", prompt_of(1), device))
        for tokens, samples in prefills.items():
            samples.append(time_start(checkpoint, "prefill", prompt_of(tokens), device))
    return Parts(
        layers=serial.layers,
        layer_seconds=tuple(serial.compute_seconds()),
        load=_middle(loads),
        prefills=tuple((tokens, _middle(samples)) for tokens, samples in prefills.items()),
        cores=cpu_count() if device == "cpu" else None,
        model_seconds=serial.built_seconds,
    )


def _middle(samples: Sequence[Sample]) -> Sample:
    return sorted(samples, key=lambda sample: sample.seconds)[len(samples) // 2]


def prompt_lengths(parts: Parts, *, least: int = 8, most: int = 96) -> tuple[int, ...]:
    """Three prompts, load-bound, compute-bound and the balanced one last; it is kept within `least` and `most`, so
    that a machine on which one side never wins still measures both directions."""
    middle = parts.balanced(least=least, most=most)
    return max(1, middle // 6), 2 * middle, middle


def phases(start: Start) -> list[Span]:
    """A start in a few spans for a timeline: all its bytes, what made the model beside them, and the first token."""
    end = start.begin + max((high for _, high in arrival_seconds(start)), default=0.0)
    nbytes = sum(layer.nbytes for layer in start.layers)
    own = [Span(span.name, span.start, span.end, "model", 0, Warmth.DRAM) for span in start.spans if span.name in ("skeleton", "fill")]
    token = next(span for span in start.spans if span.lane == "request")
    return [
        Span("load", start.begin, end, "bytes", nbytes, Warmth.DEVICE),
        *own,
        Span("first token", token.start, token.end, "request", 0, Warmth.READY),
    ]
