"""The JSON document of `bench decode`: tokens per second of each way, and ratios taken round by round. Pure but for reading.

`ratio_to_ours` of another way is its seconds over ours in the same round: 1.2 took a fifth longer. A batch of one has a
floor: each new token reads every weight once, so `ratio_to_limit` of such a row is the least seconds in which the weights
were read in the same run, by adding all of them up, over those of a decode step (prefill counts as one): a share, at most 1,
and None where a step took less than that, so that it was no floor. Shown in chapter 07.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sllm_mini.lab.bench.document import read_document
from sllm_mini.lab.decode.variants import LABELS, Variant
from sllm_mini.lab.decode.workload import Workload

KIND = "sllm-mini bench decode"
OURS: Variant = "sllm_mini"

Samples = Mapping[tuple[str, Variant], Sequence[float]]
"""Seconds of each round, by name of the workload and variant."""


def assemble(
    loads: Sequence[Workload], samples: Samples, same_tokens: Mapping[tuple[str, Variant], float], read_seconds: Sequence[float], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The document. `same_tokens` is the share of tokens that equal ours up to the first that differs; `facts` pass through."""
    limit = min(read_seconds)
    rows = []
    for load in loads:
        ours = samples[load.name, OURS]
        for name, variant in samples:
            if name != load.name:
                continue
            seconds = samples[name, variant]
            ratios = [other / our for other, our in zip(seconds, ours, strict=True)]
            median = statistics.median(seconds)
            share = limit * load.new_tokens / median
            rows.append(
                {
                    "name": f"{LABELS[variant]}, {load.name}", "variant": variant, "workload": load.name, "state": "resident", "requests": len(load.requests),
                    "prompt_tokens": sum(len(one.prompt) for one in load.requests), "new_tokens": load.new_tokens,
                    "samples": list(seconds), "seconds_median": median, "seconds_min": min(seconds), "seconds_max": max(seconds),
                    "tokens_per_second_median": load.new_tokens / median,
                    "ratio_to_ours_median": statistics.median(ratios), "ratio_to_ours_min": min(ratios), "ratio_to_ours_max": max(ratios),
                    "same_tokens_share": same_tokens[name, variant],
                    "ratio_to_limit": share if len(load.requests) == 1 and share <= 1 else None,
                }
            )  # fmt: skip
    return {"kind": KIND, **facts, "limits": {"weights_read_seconds": limit}, "results": rows, "skipped": []}


def read_decode(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)
