"""The sizes of pages that shared memory can have here, one at a time: 4 KiB, transparent huge pages, reserved huge pages.

What the kernel does not grant is refused with the reason. With `allow`, which takes root, the kernel's settings are
changed for as long as one of these contexts lasts and set back at its end: this is a bench's to do only when it was asked
to. Shown in chapter 03.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sllm_mini.device.base import ALIGNMENT
from sllm_mini.errors import UnsupportedError
from sllm_mini.storage.memory import HugePages

Pages = Literal["4 KiB pages", "transparent huge pages", "reserved huge pages"]
PAGES: tuple[Pages, ...] = ("4 KiB pages", "transparent huge pages", "reserved huge pages")

_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_RESERVED = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_GRANTING = ("always", "within_size", "advise", "force")
_HINT = "run as root with --huge-pages to allow it for the run"


@contextmanager
def granted(pages: Pages, nbytes: int, *, allow: bool) -> Iterator[HugePages]:
    """What to ask the pool of a store for, so that it gets `nbytes` (rounded up) of such pages. Raises UnsupportedError
    where the kernel grants none."""
    if pages == "4 KiB pages":
        yield "never"
    elif pages == "transparent huge pages":
        with _shmem_allowed(allow):
            yield "auto"
    else:
        with _reserved(-(-nbytes // ALIGNMENT), allow):
            yield "hugetlb"


@contextmanager
def _shmem_allowed(allow: bool) -> Iterator[None]:
    found = re.search(r"\[(\w+)\]", _read(_SHMEM))
    before = found[1] if found else "never"
    if before in _GRANTING:
        yield
        return
    if not allow:
        raise UnsupportedError(f"the kernel gives shared memory no huge pages (shmem_enabled is {before}); {_HINT}")
    _write(_SHMEM, "advise")
    try:
        yield
    finally:
        _write(_SHMEM, before)


@contextmanager
def _reserved(count: int, allow: bool) -> Iterator[None]:
    free, before = (int(_read(_RESERVED / name) or 0) for name in ("free_hugepages", "nr_hugepages"))
    if free >= count:
        yield
        return
    if not allow:
        raise UnsupportedError(f"{count:,} huge pages of 2 MiB are needed and {free:,} are reserved and free; {_HINT}")
    _write(_RESERVED / "nr_hugepages", str(before + count - free))
    try:
        got = int(_read(_RESERVED / "free_hugepages") or 0)
        if got < count:
            raise UnsupportedError(f"{count:,} huge pages of 2 MiB are needed and memory had {got:,} in one piece each; free some memory")
        yield
    finally:
        _write(_RESERVED / "nr_hugepages", str(before))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # a kernel without them
        return ""


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value, encoding="ascii")
    except OSError as error:
        raise UnsupportedError(f"{path} cannot be set ({error.strerror}), so huge pages cannot be had; run as root, outside a container") from error
