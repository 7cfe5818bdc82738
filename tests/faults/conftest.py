"""One thread for torch: these tests build thousands of tiny tensors, and waking a thread pool for each takes longer.
Ctrl-C as Python has it: a shell that runs the tests in its background lets them ignore it. And no waiting for the disk:
no test here takes the power away, and thousands of small files would be flushed one by one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def always_one_torch_thread(one_torch_thread: None) -> None:
    """Here it is for all."""


@pytest.fixture(autouse=True, scope="module")
def ctrl_c_as_python_has_it() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", os.fstat)  # still an error for what is not a descriptor
