"""What if: a cold start predicted from a handful of figures, as the sum of the rungs that are still to be climbed.

The model is the simplest that is useful, and its errors are what the later chapters are about: each rung costs what it
costs alone, unless `overlap` lets the copy to the device run beside the read (chapter 02). Pure; chapter 00's widget
draws it, and its figures can be those that the reader has just measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm_mini.types import Span, Warmth

if TYPE_CHECKING:
    from sllm_mini.lab.figure import Described

CHUNKS = 8
"""Parts of an overlapped load: few enough to see them in the drawing."""


def predict_cold_start(
    *,
    model_nbytes: float,
    disk_bytes_per_second: float,
    import_seconds: float,
    warm: Warmth = Warmth.COLD,
    device_bytes_per_second: float | None = None,
    overlap: bool = False,
    process_seconds: float = 0.05,
    first_call_seconds: float = 0.3,
    first_token_seconds: float = 0.1,
) -> list[Span]:
    """The spans of a start from rung `warm` to the first token, from second 0, in order.

    `device_bytes_per_second` is the link to a GPU, None where the processor itself computes: then bytes in host memory
    are on the device already. With `overlap` each of `CHUNKS` parts is copied as soon as it is read, so the slower of
    the two sets the pace and the last part of the other comes on top. The sum of rungs is the model of RainbowCake
    (ASPLOS'24), read up to the device; the overlap that of ServerlessLLM (OSDI'24). Raises ValueError for a rate that
    is not above zero or a size or time below it.
    """
    rates = {"disk_bytes_per_second": disk_bytes_per_second}
    if device_bytes_per_second is not None:
        rates["device_bytes_per_second"] = device_bytes_per_second
    amounts = {
        "model_nbytes": model_nbytes,
        "import_seconds": import_seconds,
        "process_seconds": process_seconds,
        "first_call_seconds": first_call_seconds,
        "first_token_seconds": first_token_seconds,
    }
    for name, value in rates.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; give a rate above zero")
    for name, value in amounts.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; give zero or more")

    nbytes = round(model_nbytes)
    read_seconds = model_nbytes / disk_bytes_per_second
    copy_seconds = 0.0 if device_bytes_per_second is None else model_nbytes / device_bytes_per_second
    spans: list[Span] = []
    now = 0.0

    def climb(name: str, seconds: float, to: Warmth, moved: int = 0) -> None:
        nonlocal now
        if warm < to:
            spans.append(Span(name, now, now + seconds, nbytes=moved, warmth=to))
            now += seconds

    climb("process", process_seconds, Warmth.PROCESS)
    climb("imports", import_seconds, Warmth.RUNTIME)
    if device_bytes_per_second is None:
        # The processor computes where the bytes land: one climb does for both rungs.
        if warm < Warmth.DRAM:
            climb("read", read_seconds, Warmth.DEVICE, nbytes)
    elif overlap and warm < Warmth.DRAM:
        spans.append(Span("read", now, now + read_seconds, "disk", nbytes, Warmth.DRAM))
        arrived, now = now, now + read_seconds / CHUNKS
        for number in range(1, CHUNKS + 1):
            start = max(now, arrived + read_seconds * number / CHUNKS)
            now = start + copy_seconds / CHUNKS
            spans.append(Span("copy", start, now, "link", nbytes * number // CHUNKS - nbytes * (number - 1) // CHUNKS, Warmth.DEVICE))
    else:
        climb("read", read_seconds, Warmth.DRAM, nbytes)
        climb("copy", copy_seconds, Warmth.DEVICE, nbytes)
    climb("first call", first_call_seconds, Warmth.READY)
    spans.append(Span("first token", now, now + first_token_seconds, warmth=Warmth.READY))
    return spans


def draw_prediction(
    *,
    model_gb: float,
    disk_gb_per_second: float,
    import_seconds: float,
    warm: Warmth = Warmth.COLD,
    device_gb_per_second: float | None = None,
    overlap: bool = False,
    first_call_seconds: float = 0.3,
    first_token_seconds: float = 0.1,
) -> Described:
    """The prediction as a picture, in the units of the sliders (GB, GB/s); the drawing function of the widget."""
    from sllm_mini.lab.figure import describe
    from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text
    from sllm_mini.lab.units import seconds_text

    spans = predict_cold_start(
        model_nbytes=model_gb * 1e9,
        disk_bytes_per_second=disk_gb_per_second * 1e9,
        import_seconds=import_seconds,
        warm=warm,
        device_bytes_per_second=None if device_gb_per_second is None else device_gb_per_second * 1e9,
        overlap=overlap,
        first_call_seconds=first_call_seconds,
        first_token_seconds=first_token_seconds,
    )
    total = max(span.end for span in spans)
    axes = plot_timeline(spans, title=f"Predicted: first token after {seconds_text(total)}")
    return describe(axes, timeline_alt_text(spans, what=f"Predicted start from {warm.name.lower()}, timeline"))
