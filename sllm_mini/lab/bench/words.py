"""What the limits of a machine and the states of the page cache are called: one place for tables, pictures and sentences.

Keys are the names that probes and benches measure under. Pure data. Shown in chapter 02.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sllm_mini.lab.bench.entry import State

DISK, LINK, COPY, MAPPED_FILE = "disk_direct_read", "host_to_device_copy", "memory_copy", "mapped_file"

LIMIT_LABELS: Mapping[str, str] = MappingProxyType(
    {DISK: "disk, direct read", MAPPED_FILE: "a mapped file", COPY: "memory copy", LINK: "copy to the GPU"}
)  # fmt: skip
"""At the head of a row, in the order of a list."""

LIMIT_NOUNS: Mapping[str, str] = MappingProxyType({DISK: "the disk", MAPPED_FILE: "a mapped file", LINK: "the copy to the GPU"})
"""Within a sentence, of the limits that a load is held against."""

COLD_LIMITS: Mapping[str, str] = MappingProxyType({DISK: "the disk's limit", LINK: "the limit of the way to the GPU"})
"""The limit itself within a sentence, of those that a cold load meets."""

PROBES: Mapping[str, str] = MappingProxyType(
    {
        DISK: "the disk read around the page cache",
        "disk_buffered_read": "the disk read through the page cache",
        "cached_read": "copied out of the page cache",
        "cached_map": "mapped from the page cache",
        COPY: "copied within memory",
        LINK: "copied to the GPU",
    }
)
"""What happens to the bytes, for those who do not know the probes' names yet."""

STATE_TITLES: Mapping[State, str] = MappingProxyType({"cold": "cold: every byte from the disk", "warm": "warm: the page cache holds the files"})

STATE_SOURCES: Mapping[str, str] = MappingProxyType({"cold": "from the disk", "warm": "from the page cache"})
"""Where the bytes of a load come from."""
