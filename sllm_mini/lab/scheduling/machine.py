"""The controller alone: made for one placement policy, its log as a table, and its replay. Chapter 08. Nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import asdict

from sllm_mini.cluster.simulated import make_policies
from sllm_mini.control.controller import Controller
from sllm_mini.control.estimate import Estimator
from sllm_mini.control.keepalive import FixedKeepAlive
from sllm_mini.control.messages import SetTimer, TimerFired
from sllm_mini.control.policy import Placement
from sllm_mini.control.replay import read_log
from sllm_mini.lab.table import Table

KEEP_ALIVE_SECONDS = 600.0


def make_controller(placement: Placement | str, estimator: Estimator | None = None) -> Controller:
    """A new one with this placement, ten minutes of keep-alive, and an instance for as many requests as it takes at once.

    Raises SllmError for a name that no policy has.
    """
    estimator = Estimator() if estimator is None else estimator
    policies = make_policies(placement, FixedKeepAlive(KEEP_ALIVE_SECONDS), "per-request", estimator)
    return Controller(policies.placement, policies.keep_alive, policies.autoscaler, estimator)


def log_table(lines: Iterable[bytes | str], *, caption: str = "") -> Table:
    """A log, one event a row with the actions that followed; timers are left out and counted in the note."""
    rows, timers = [], 0
    for record in read_log(lines):
        actions = [action for action in record.actions if not isinstance(action, SetTimer)]
        timers += len(record.actions) - len(actions)
        if not isinstance(record.event, TimerFired) or actions:
            rows.append((f"{record.now:.2f}", _said(record.event), "; ".join(map(_said, actions)) or "nothing"))
    note = f"Left out: {timers} timers that it set." if timers else ""
    return Table(("second", "event", "actions"), tuple(rows), caption=caption, note=note, numeric=frozenset({0}))


def _said(message: Struct) -> str:
    """Its name and what tells it from another; specs by their name, enums by theirs, epochs left out."""
    words = []
    for name, value in asdict(message).items():
        if name in ("epoch", "queued_seconds", "load_seconds", "parts", "prefix") or value == ():
            continue
        if isinstance(value, Struct):
            words.append(str(value.name))  # type: ignore[attr-defined]
        elif isinstance(value, float):
            words.append(f"{value:.2f} s" if "seconds" in name else f"{value:.2f}")
        elif isinstance(value, tuple):
            words.append(f"{name} {', '.join(map(str, value))}")
        elif isinstance(value, int) and not hasattr(value, "name"):
            words.append(f"{name.replace('_', ' ')} {value}")
        else:
            words.append(str(getattr(value, "name", value)))
    return f"{type(message).__name__}({', '.join(words)})"
