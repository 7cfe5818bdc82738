"""Content hashes: a two-level tree of XXH3-64 digests.

A chunk (2 MiB) is cut into leaves (64 KiB); its digest is XXH3-64 of its leaves' digests, each written as 8
little-endian bytes. Leaves are independent, so a GPU hashes all of them at once (`csrc/xxh3_leaves.cu`); chunks are
independent, so threads verify a file in any order while it is still being read. XXH3 finds accidents, not forgery.
Costs one pass over the bytes, ~10 GB/s a core. Taught in chapter 01.
"""

from __future__ import annotations

import struct

import xxhash

from sllm_mini.device.kernels import LEAF_NBYTES

CHUNK_NBYTES = 2 << 20
DIGEST_HEX = 16
"""Hexadecimal characters of one digest in the index."""


def leaf_digests(chunk: memoryview) -> list[int]:
    """XXH3-64 of each 64 KiB leaf of `chunk` (any length; the last leaf may be shorter)."""
    digest = xxhash.xxh3_64_intdigest
    return [digest(chunk[at : at + LEAF_NBYTES]) for at in range(0, len(chunk), LEAF_NBYTES)]


def chunk_digest(chunk: memoryview) -> str:
    """The digest of one chunk as 16 hexadecimal characters."""
    leaves = leaf_digests(chunk)
    return digest_of_leaves(struct.pack(f"<{len(leaves)}Q", *leaves))


def digest_of_leaves(leaves: bytes | memoryview) -> str:
    """The digest of a chunk from those of its leaves, 8 little-endian bytes each."""
    return xxhash.xxh3_64_hexdigest(leaves)


def chunk_digests(data: memoryview, chunk_nbytes: int = CHUNK_NBYTES) -> list[str]:
    """The digest of each consecutive chunk of `data`."""
    return [chunk_digest(data[at : at + chunk_nbytes]) for at in range(0, len(data), chunk_nbytes)]


def bytes_digest(data: bytes | memoryview) -> str:
    """The digest of a small file held in memory, as 16 hexadecimal characters."""
    return xxhash.xxh3_64_hexdigest(data)
