"""Runs recorded on a machine with a CUDA GPU, to be drawn beside the reader's own.

They lie in `data/results/<gpu-model>/`, put there by `python -m sllm_mini.lab.report record` and never by hand, each
stamped with the hash of the code that it ran. Where there are none, chapters say so; where the code at hand is another,
they call the run stale. Shown from chapter 00 on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sllm_mini.errors import ResourceError
from sllm_mini.lab.figure import Described, describe
from sllm_mini.resources import resource
from sllm_mini.types import Span

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def code_hash() -> str:
    """16 hex digits that change with any byte of the package's Python files or kernels, and with nothing else.

    The same for a checkout and for the package installed from it. Costs the reading of about 1 MB, once per process.
    """
    digest = hashlib.sha256()
    for name, root, pattern in (("sllm_mini", _PACKAGE, "*.py"), ("csrc", resource("csrc"), "*.cu")):
        files = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern)}
        for file, path in sorted(files.items()):
            if not file.startswith("_data/"):  # in a wheel the scripts of data/ lie inside the package
                data = path.read_bytes()
                digest.update(f"{name}/{file} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def recorded_runs(name: str) -> dict[str, Path]:
    """GPU model → the file `name` of its recorded run; empty where nothing was recorded."""
    try:
        root = resource("data/results")
    except ResourceError:
        return {}
    return {folder.name: folder / name for folder in sorted(root.iterdir()) if (folder / name).is_file()}


def recorded_stamp(path: Path) -> dict[str, Any]:
    """What a recorded run says of itself: gpu, date, command, code_hash, machine, versions; empty for one without a
    stamp. Raises ResourceError for a file that is no JSON document."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8")).get("recorded", {})
    except (OSError, ValueError, AttributeError) as error:
        raise ResourceError(f"{path}: the recorded run cannot be read ({error}); record it again") from error
    return stamp if isinstance(stamp, dict) else {}


def is_stale(path: Path) -> bool:
    """Whether the run at `path` was made by other code than that at hand. Raises what `recorded_stamp` raises."""
    return recorded_stamp(path).get("code_hash", code_hash()) != code_hash()


def recorded_note(name: str) -> str:
    """One sentence for the page: which GPUs have a recorded run of that name, and which of them are stale; or that there
    is none yet. Raises what `recorded_stamp` raises."""
    runs = recorded_runs(name)
    if not runs:
        return "No run on a CUDA GPU has been recorded yet: every figure on this page is from the machine that ran it."
    return f"Recorded on: {', '.join(_label(model, path) for model, path in runs.items())}."


def beside_recorded(spans: Sequence[Span], name: str, *, label: str = "this machine") -> Described | str:
    """The reader's own timeline with the first recorded run of that name below it; the note where there is none."""
    from sllm_mini.lab.anatomy import load_cold_start
    from sllm_mini.lab.timeline import plot_timeline, timeline_alt_text

    runs = recorded_runs(name)
    if not runs:
        return recorded_note(name)
    model, path = next(iter(runs.items()))
    recorded, where = load_cold_start(path).spans, _label(model, path)
    alt = f"{timeline_alt_text(spans, what=label)} {timeline_alt_text(recorded, what=f'Recorded on {where}')}"
    return describe(plot_timeline(spans, label=label, recorded=recorded, recorded_label=f"recorded on {where}"), alt)


def _label(model: str, path: Path) -> str:
    if not is_stale(path):
        return model
    return f"{model} (stale: by other code, {recorded_stamp(path).get('date', 'date unknown')})"
