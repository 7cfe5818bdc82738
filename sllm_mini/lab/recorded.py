"""Runs recorded on a machine with a CUDA GPU, to be drawn beside the reader's own.

They lie in `data/results/<gpu-model>/`, put there by the run itself and never by hand. Where there are none, chapters
say so. Shown from chapter 00 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sllm_mini.errors import ResourceError
from sllm_mini.lab.figure import Described, describe
from sllm_mini.resources import resource
from sllm_mini.types import Span


def recorded_runs(name: str) -> dict[str, Path]:
    """GPU model → the file `name` of its recorded run; empty where nothing was recorded."""
    try:
        root = resource("data/results")
    except ResourceError:
        return {}
    return {folder.name: folder / name for folder in sorted(root.iterdir()) if (folder / name).is_file()}


def recorded_note(name: str) -> str:
    """One sentence for the page: which GPUs have a recorded run of that name, or that there is none yet."""
    runs = recorded_runs(name)
    if not runs:
        return "No run on a CUDA GPU has been recorded yet: every figure on this page is from the machine that ran it."
    return f"Recorded on: {', '.join(runs)}."


def beside_recorded(spans: Sequence[Span], name: str, *, label: str = "this machine") -> Described | str:
    """The reader's own timeline with the first recorded run of that name below it; the note where there is none."""
    from sllm_mini.lab.anatomy import load_cold_start
    from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text

    runs = recorded_runs(name)
    if not runs:
        return recorded_note(name)
    model, path = next(iter(runs.items()))
    recorded = load_cold_start(path).spans
    alt = f"{timeline_alt_text(spans, what=label)} {timeline_alt_text(recorded, what=f'Recorded on {model}')}"
    return describe(plot_timeline(spans, label=label, recorded=recorded, recorded_label=f"recorded on {model}"), alt)
