"""Which loaders chapter 02 measures: the ladder cold, and one good setting of every other package.

`sllm-mini bench load` measures all of them in all their settings. Costs nothing.
"""

from __future__ import annotations

from dataclasses import replace

from sllm_mini.lab.bench import entries
from sllm_mini.lab.bench.entry import Entry

_LEFT_OUT = (
    "sllm_mini load_model", "safetensors load_file, pread", "safetensors safe_open", "Run:ai streamer, 32 readers", "Run:ai streamer, buffered",
    "Run:ai streamer, io_uring buffered", "fastsafetensors", "fastsafetensors, GPUDirect", "tensorizer", "tensorizer, 4 readers", "InstantTensor, buffered",
)  # fmt: skip
"""Other settings of a package that stays: one setting each keeps the chapter short."""


def chapter_loaders(device: str = "cpu") -> list[Entry]:
    """The rungs, cold; the product with and without hashing, and other packages, cold and warm. Those that are not installed
    too, so that the bench says so."""
    found = [entry for entry in entries(device) if entry.name not in _LEFT_OUT]
    return [replace(entry, states=("cold",)) if entry.kind == "ladder" else entry for entry in found]
