"""The small synthetic traces that travel with sllm_mini, and the one command that makes them again, bit for bit.

    python -m sllm_mini.cluster.trace.shipped data/traces

They are plain CSV, so that they can be looked at; the README beside them says what each is calibrated to. Taught in
chapters 08 to 10.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import msgspec

from sllm_mini.cluster.trace.file import open_trace, write_trace
from sllm_mini.cluster.trace.request import Trace
from sllm_mini.cluster.trace.tokens import CODE_TOKENS
from sllm_mini.cluster.trace.workloads import burst_trace, diurnal_trace, faas_trace
from sllm_mini.resources import resource

SHIPPED: Mapping[str, Callable[[], Trace]] = MappingProxyType(
    {
        "burst": lambda: burst_trace(requests=2500, requests_per_second=1.4, seed=8),
        "diurnal": lambda: diurnal_trace(seconds=86_400, requests_per_second=1 / 36, tokens=CODE_TOKENS, seed=10),
        "faas": lambda: faas_trace(seconds=8 * 3600, seed=9),
    }
)
"""The recipes, by name."""


def shipped_trace(name: str) -> Trace:
    """A trace that travels with sllm_mini: burst, diurnal or faas; streams from its file.

    Raises ValueError for another name, ResourceError where it is not part of the installation.
    """
    if name not in SHIPPED:
        raise ValueError(f"no trace {name!r} travels with sllm_mini; name one of {', '.join(SHIPPED)}")
    return open_trace(resource("data/traces") / f"{name}.csv")


def make_shipped(directory: str | os.PathLike[str]) -> list[Path]:
    """Writes every shipped trace into a directory, over what is there, and returns the files. Raises WriteError."""
    made = []
    for name, recipe in SHIPPED.items():
        trace = recipe()
        path = Path(directory) / f"{name}.csv"
        write_trace(path, replace(trace, label=msgspec.structs.replace(trace.label, name=name)), overwrite=True)
        made.append(path)
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sllm_mini.cluster.trace.shipped DIRECTORY")
    for made_path in make_shipped(sys.argv[1]):
        print(made_path)
