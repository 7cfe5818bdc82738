"""HydraServe's estimate of the first token when several workers fetch a model's stages side by side.

Each of pp workers fetches 1/pp of the model and computes its own layers of the first request: the fetch is divided, the
prefill is not, and sharing GPUs makes it slower. From HydraServe (NSDI'26), as its published code computes it.
Taught in chapters 04 and 10.
"""

from __future__ import annotations

from math import inf

START_SECONDS = 2.0
"""What its code adds for everything after the fetch: loading, initialisation."""


def hydraserve_ttft(
    model_nbytes: float,
    bytes_per_second: float,
    prefill_seconds: float,
    *,
    workers: int = 1,
    full_memory_workers: int = 1,
    wait_seconds: float = 0.0,
    start_seconds: float = START_SECONDS,
) -> float:
    """Seconds to the first token: model_nbytes / (pp · bytes_per_second) + prefill_seconds · r + wait_seconds + start_seconds.

    pp = `workers` (its code tries 1 to 4), r = pp − a + a/pp with a = `full_memory_workers`, those that have a whole GPU to
    themselves; bytes_per_second is the slowest worker's link. In the source's units: milliseconds = 8000 · GB / (pp · Gbit/s) +
    prefill · r + wait + 2000. Raises ValueError for figures that cannot be, nan and infinity among them. Pure.
    """
    if not 0 <= full_memory_workers <= workers or workers < 1:
        raise ValueError(f"{full_memory_workers} of {workers} workers have a whole GPU; give at least one worker, and no more of the former than of the latter")
    figures = (model_nbytes, prefill_seconds, wait_seconds, start_seconds)
    if not (all(0 <= figure < inf for figure in figures) and 0 < bytes_per_second < inf):  # false for nan
        raise ValueError(
            f"{model_nbytes} bytes at {bytes_per_second} bytes/s, {prefill_seconds} s of prefill, {wait_seconds} s of waiting and {start_seconds} s of start: "
            f"give a speed above 0, and no size or time below it, all finite"
        )
    slowed = workers - full_memory_workers + full_memory_workers / workers
    return model_nbytes / (workers * bytes_per_second) + prefill_seconds * slowed + wait_seconds + start_seconds
