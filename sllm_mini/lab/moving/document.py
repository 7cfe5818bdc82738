"""The JSON document of `bench migrate`: the pause of a request that moves, as a multiple of one decode step. Pure but for reading.

`pause_steps` is the time from the source's last step of the request to the destination's first over a decode step at that
length, as seen in the same request just before; `gap_steps` is the same between the two tokens as the client got them.
One undisturbed step is 1. `ratio_to_limit` is the pause that a mode should not exceed over the one it had: 3 steps where the
cache is copied, the last round where tokens are sent. `nbytes` is everything that was sent. From the same moves come two speeds: tokens that the
destination recomputes in a second, and bytes that the link moves while the source stands still (also in the rows of these modes); where they meet is the
break-even between the two ways (`inference.migration.choose_mode`). Shown in chapter 07.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllm_mini.inference.migration import Mode, Speeds, break_even_bytes_per_second
from sllm_mini.lab.bench.document import read_document

KIND = "sllm-mini bench migrate"
MODES: tuple[Mode, ...] = ("tokens", "kv", "stop_and_copy")
KV_TARGET_STEPS = 3.0
"""The longest pause that copying should have; by tokens it is the last round before the stop, which had the smallest gap."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move, measured. `context` is the length of the prompt. `catch_up_*` is its largest round, `copy_*` what was copied after
    the stop besides the hand-over."""

    mode: Mode
    context: int
    seconds: float
    pause_seconds: float
    gap_seconds: float
    step_seconds: float
    nbytes: int
    rounds: int
    catch_up_tokens: int
    catch_up_seconds: float
    copy_tokens: int
    copy_nbytes: int
    copy_seconds: float
    last_round_seconds: float = 0.0


def assemble(moves: Sequence[Move], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The document; `facts` are its keys about machine, model and method, passed through."""
    contexts = sorted({move.context for move in moves})
    groups = [(mode, context, [move for move in moves if (move.mode, move.context) == (mode, context)]) for context in contexts for mode in MODES]
    return {
        "kind": KIND,
        **facts,
        "limits": _speeds([move for move in moves if move.context == contexts[-1]]) | _sizes(moves),
        "results": [_row(mode, context, found) for mode, context, found in groups if found],
        "skipped": [],
    }


def _row(mode: Mode, context: int, moves: Sequence[Move]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": f"{mode}, {context} tokens", "mode": mode, "tokens": context, "state": "resident", "samples": [move.seconds for move in moves]}
    values = {
        "seconds": [move.seconds for move in moves],
        "pause_seconds": [move.pause_seconds for move in moves],
        "pause_steps": [move.pause_seconds / move.step_seconds for move in moves],
        "gap_steps": [move.gap_seconds / move.step_seconds for move in moves],
        "last_round_steps": [move.last_round_seconds / move.step_seconds for move in moves],
        "step_seconds": [move.step_seconds for move in moves],
        "nbytes": [float(move.nbytes) for move in moves],
        "rounds": [float(move.rounds) for move in moves],
    }
    for name, samples in values.items():
        row |= {f"{name}_median": statistics.median(samples), f"{name}_min": min(samples), f"{name}_max": max(samples)}
    row |= {f"{name}_median": speed for name, speed in _speeds(moves).items()}
    row["pause_steps_samples"] = values["pause_steps"]
    row["nbytes"] = int(row["nbytes_median"])
    targets = {"kv": KV_TARGET_STEPS, "tokens": row["last_round_steps_median"]}
    row["ratio_to_limit"] = targets[mode] / row["pause_steps_median"] if targets.get(mode) else None
    return row


def _speeds(moves: Sequence[Move]) -> dict[str, float]:
    """Medians; of the longest context for the whole document, since there the cost of a message disturbs least."""
    recompute = [move.catch_up_tokens / move.catch_up_seconds for move in moves if move.mode == "tokens" and move.catch_up_seconds]
    link = [move.copy_nbytes / move.copy_seconds for move in moves if move.mode == "stop_and_copy" and move.copy_seconds]
    found = {"recompute_tokens_per_second": recompute, "link_bytes_per_second": link}
    return {name: statistics.median(samples) for name, samples in found.items() if samples}


def _sizes(moves: Sequence[Move]) -> dict[str, float]:
    sizes = [move.copy_nbytes / move.copy_tokens for move in moves if move.copy_tokens]
    return {"kv_nbytes_per_token": statistics.median(sizes)} if sizes else {}


def break_even(document: Mapping[str, Any]) -> tuple[Speeds, float]:
    """The measured speeds, and the link at which recomputing and copying take equally long, in bytes per second. Raises
    KeyError for a document in which a mode is missing."""
    limits = document["limits"]
    speeds = Speeds(limits["recompute_tokens_per_second"], limits["link_bytes_per_second"], round(limits["kv_nbytes_per_token"]))
    return speeds, break_even_bytes_per_second(speeds)


def prompt_rows(document: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    """The results of one mode, from the shortest context to the longest."""
    return sorted((row for row in document["results"] if row["mode"] == mode), key=lambda row: int(row["tokens"]))


def read_moves(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A saved document. Raises FormatError for a file that is not one, OSError if it cannot be read."""
    return read_document(path, KIND)
