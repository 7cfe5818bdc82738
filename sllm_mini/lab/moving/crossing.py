"""From which context on do rounds pay: the pause of a mode beside that of stop and copy, predicted and measured. Pure. Chapter 07.

Stopping first costs a pause that grows with the context. The rounds cost one that hardly does, but is not nothing: so there is
a context below which the baseline pauses shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sllm_mini.inference.migration import Mode
from sllm_mini.lab.moving.document import prompt_rows
from sllm_mini.lab.moving.parts import Parts, crossing
from sllm_mini.lab.moving.trace_plots import MODE_WORDS
from sllm_mini.lab.table import Table

_MODES: tuple[Mode, ...] = ("tokens", "kv")


def differences(document: Mapping[str, Any], mode: Mode) -> dict[int, tuple[float, bool]]:
    """For each context measured: by how many steps stop and copy pauses longer (median less median, below 0 shorter), and
    whether that is more than scatter: the two ranges, from least to most, lie apart."""
    found = {}
    for row, baseline in zip(prompt_rows(document, mode), prompt_rows(document, "stop_and_copy"), strict=True):
        apart = row["pause_steps_max"] < baseline["pause_steps_min"] or row["pause_steps_min"] > baseline["pause_steps_max"]
        found[int(row["tokens"])] = baseline["pause_steps_median"] - row["pause_steps_median"], apart
    return found


def crossing_text(document: Mapping[str, Any], parts: Parts) -> str:
    """For tokens and KV cache a sentence: where stop and copy is predicted to become the longer pause, and where it did."""
    return " ".join(_sentence(mode, differences(document, mode), crossing(parts, mode)) for mode in _MODES)


def _sentence(mode: Mode, found: Mapping[int, tuple[float, bool]], predicted: float) -> str:
    longer = [context for context, (steps, _) in found.items() if steps > 0]
    shorter = [context for context in found if context not in longer]
    if not longer:
        where = f"not up to {max(shorter):,} tokens"
    elif not shorter:
        where = f"from {min(longer):,} tokens, the shortest context here, or fewer"
    elif max(shorter) < min(longer):
        where = f"between {max(shorter):,} and {min(longer):,} tokens"
    else:
        where = "at no one place: it was longer at " + " and ".join(f"{context:,}" for context in longer) + " tokens only, which is scatter"
    return f"Against {MODE_WORDS[mode]}, stop and copy was to become the longer pause at {predicted:,.0f} tokens of context; measured, it does so {where}."


def crossing_table(document: Mapping[str, Any]) -> Table:
    """Steps by which stop and copy pauses longer than each way of rounds, a column for each context."""
    contexts = list(differences(document, "kv"))
    rows = []
    for mode in _MODES:
        found = differences(document, mode)
        rows.append((MODE_WORDS[mode], *(f"{found[context][0]:+.2f}" + ("" if found[context][1] else " (ranges overlap)") for context in contexts)))
    headers = ("stop and copy less", *(f"at {context:,} tokens" for context in contexts))
    return Table(headers, tuple(rows), caption="Pause in decode steps that rounds save", numeric=frozenset(range(1, 1 + len(contexts))), note="Medians; below 0 stop and copy pauses shorter. Ranges: from the least to the most measured.")
