"""A simulated run as a trace for chrome://tracing or ui.perfetto.dev: a process per node, a row per instance. Chapter 08.

The JSON array format of the Trace Event Format: complete events ("X"), times in microseconds. Written one event at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sllm_mini.cluster.simulated.account import InstanceSpan
from sllm_mini.cluster.trace.file import published_file


def write_chrome_trace(path: str | os.PathLike[str], spans: Iterable[InstanceSpan]) -> int:
    """Writes the file, whole or not at all, and returns the number of spans in it. Raises WriteError."""
    number = 0
    with published_file(Path(path)) as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = ""
        for event in _events(spans):
            file.write((separator + json.dumps(event, ensure_ascii=False)).encode())
            separator = ",\n"
            number += event["ph"] == "X"
        file.write(b"\n]}\n")
    return number


def _events(spans: Iterable[InstanceSpan]) -> Iterator[dict[str, Any]]:
    nodes: dict[str, int] = {}
    named: set[int] = set()
    for span in spans:
        if span.node not in nodes:
            nodes[span.node] = len(nodes)
            yield {"ph": "M", "name": "process_name", "pid": nodes[span.node], "args": {"name": span.node}}
        node = nodes[span.node]
        if span.instance not in named:
            named.add(span.instance)
            yield {"ph": "M", "name": "thread_name", "pid": node, "tid": span.instance, "args": {"name": f"instance {span.instance}"}}
        details: dict[str, Any] = {"model": span.model, "warmth": span.warmth.name.lower(), "devices": list(span.devices)}
        name = f"{span.what} {span.model}".rstrip()
        if span.request >= 0:
            details["request"] = span.request
            name = f"{span.what} {span.request}"
        yield {
            "ph": "X", "name": name, "cat": span.what, "pid": node, "tid": span.instance, "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6,
            "args": details,
        }  # fmt: skip
