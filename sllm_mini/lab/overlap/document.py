"""The JSON document of `bench overlap`: what was measured, and how near it comes to what can be. Pure.

Of each prompt, round by round: `target_seconds` is 1.1 × max(load, prefill) + one layer, where one layer is the larger
of a decoder layer's share of the load (by bytes) and of the prefill (by count); `ratio_to_target` is the overlapped
first token over it, so at most 1 meets it. `serial_over_overlapped` is what overlap gains. `pipeline_seconds` is the
earliest first token if loading and computing never disturb each other: the first layer runs when its bytes and the
module are there (`built_seconds`, of the overlapped start itself), each later one when its bytes are and the layer before
has run; layers have unequal shares of bytes and of seconds. `work_seconds` (on a processor only) is the processor time of
load and prefill over the number of processors: where both compete for the same ones, no schedule is faster. A document of
an earlier version has no `built_seconds`, and its pipeline begins with the bytes alone. Shown in chapter 04.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllm_mini.lab.overlap.start import MODES, Layer, Mode, Sample

KIND = "sllm-mini bench overlap"
TARGET_FACTOR = 1.1
_OUTER = ("embedding", "head")


@dataclass(frozen=True, slots=True)
class Series:
    """All samples of one prompt, by mode and round, and the seconds of each layer in a pass of their own."""

    tokens: int
    why: str
    layer_seconds: Sequence[float]
    samples: Mapping[Mode, Mapping[int, Sample]]


def one_layer_seconds(layers: Sequence[Layer], load: float, prefill: float) -> float:
    """The longer of one decoder layer's part of a load and of a prefill; the largest layer where they differ."""
    inner = [layer for layer in layers if layer.name not in _OUTER]
    if not inner:
        return 0.0
    return max(load * max(layer.nbytes for layer in inner) / sum(layer.nbytes for layer in layers), prefill / len(inner))


def pipeline_seconds(layers: Sequence[Layer], layer_seconds: Sequence[float], load: float, prefill: float, built: float = 0.0) -> float:
    """When the first token can come if bytes arrive in order at the load's mean rate and layers compute in their order, the
    first of them not before the module is `built`."""
    total_nbytes, total_seconds = sum(layer.nbytes for layer in layers), sum(layer_seconds) or 1.0
    arrived, end = 0.0, built
    for layer, seconds in zip(layers, layer_seconds, strict=True):
        arrived += load * layer.nbytes / total_nbytes
        end = max(end, arrived) + prefill * seconds / total_seconds
    return end


def assemble(series: Sequence[Series], layers: Sequence[Layer], *, device: str, cores: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document. `facts` are its keys about machine, model and method, passed through."""
    prompts = [_prompt(one, layers, cores if device == "cpu" else None) for one in series]
    results = [_row(one, mode, layers, prompt) for one, prompt in zip(series, prompts, strict=True) for mode in MODES if mode in one.samples]
    limits = {f"{mode}_{one.tokens}_tokens_seconds": _median(one.samples[mode].values()) for one in series for mode in MODES[2:]}
    return {
        "kind": KIND,
        **facts,
        "limits": limits | {"processor_count": cores},
        "layers": [{"name": layer.name, "nbytes": layer.nbytes} for layer in layers],
        "prompts": prompts,
        "results": results,
        "skipped": [],
    }


def _prompt(series: Series, layers: Sequence[Layer], cores: int | None) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    overlapped = series.samples["overlapped"]
    for number in sorted(overlapped):
        serial, both, load, prefill = (series.samples[mode][number] for mode in MODES)
        layer = one_layer_seconds(layers, load.seconds, prefill.seconds)
        target = TARGET_FACTOR * max(load.seconds, prefill.seconds) + layer
        pipeline = pipeline_seconds(layers, series.layer_seconds, load.seconds, prefill.seconds, both.built_seconds or 0.0)
        values = {
            "one_layer_seconds": layer,
            "target_seconds": target,
            "pipeline_seconds": pipeline,
            "ratio_to_target": both.seconds / target,
            "ratio_to_max": both.seconds / max(load.seconds, prefill.seconds),
            "ratio_to_pipeline": both.seconds / pipeline,
            "serial_over_overlapped": serial.seconds / both.seconds,
            "serial_over_sum": serial.seconds / (load.seconds + prefill.seconds),
            "overlapped_cpu_over_parts": both.cpu_seconds / (load.cpu_seconds + prefill.cpu_seconds),
        }
        if both.built_seconds is not None:
            values["built_seconds"] = both.built_seconds
        if cores is not None:
            work = (load.cpu_seconds + prefill.cpu_seconds) / cores
            values |= {"work_seconds": work, "ratio_to_work": both.seconds / work}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    row: dict[str, Any] = {"tokens": series.tokens, "why": series.why, "layer_seconds": list(series.layer_seconds)}
    for name, samples in found.items():
        row |= {f"{name}_samples": samples, f"{name}_median": statistics.median(samples), f"{name}_min": min(samples), f"{name}_max": max(samples)}
    return row


def _row(series: Series, mode: Mode, layers: Sequence[Layer], prompt: Mapping[str, Any]) -> dict[str, Any]:
    samples = series.samples[mode]
    seconds = [sample.seconds for sample in samples.values()]
    parts = max(_median(series.samples[part].values()) for part in MODES[2:])
    return {
        "name": f"{mode}, {series.tokens} tokens",
        "mode": mode,
        "tokens": series.tokens,
        "state": "cold",
        "nbytes": sum(layer.nbytes for layer in layers),
        "samples": seconds,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds_median": statistics.median(sample.cpu_seconds for sample in samples.values()),
        "limit": "max(load, prefill)",
        "ratio_to_limit": parts / statistics.median(seconds) if mode in MODES[:2] else None,
        "ratio_to_target_median": prompt["ratio_to_target_median"] if mode == "overlapped" else None,
    }


def _median(samples: Iterable[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def prompt_rows(document: Mapping[str, Any], tokens: int) -> dict[Mode, dict[str, Any]]:
    """The results of one prompt by mode."""
    return {row["mode"]: row for row in document["results"] if row["tokens"] == tokens}
