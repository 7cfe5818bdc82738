"""The files of a live cluster but for its journal: the event log, the saved controller, what is deployed. Chapter 08."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.journal import Saved, write_whole
from sllm_mini.control.controller import Controller
from sllm_mini.control.replay import LogHeader, replay
from sllm_mini.errors import SllmError, WriteError


class Keeper:
    """In `folder`, every `seconds` where it is asked. `write` takes each line of the log, whole and at once. One thread at a time, but
    for `log`. Raises WriteError where the disk is full."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._events, self._controller, self._deployments = folder / "events.jsonl", folder / "controller.bin", folder / "deployments.json"
        self._seconds = seconds
        self.next_at = 0.0
        """When it wants to save again."""
        self._file = -1
        self._nbytes = 0

    def begin(self, header: LogHeader | None) -> None:
        """A new log. Raises SllmError where there is one: a folder is one cluster's."""
        if self._events.exists():
            raise SllmError(f"{self._events} is the log of another cluster; resume that one, or give a new folder")
        self._file = os.open(self._events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if header is not None:
            self.write(header.to_line())

    def go_on(self, controller: Controller) -> tuple[float, list[Deployment]]:
        """Makes a new controller what that of a cluster which has ended was, by what was saved and the log since then, which goes on
        after its last whole line; the time by then, and what was deployed. Raises SllmError for a folder that nothing can be
        resumed from."""
        saved = Saved.read(self._controller)
        whole = self._events.read_bytes() if self._events.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        if len(whole) < saved.log_nbytes:
            raise SllmError(f"{self._events} is shorter than when its controller was saved; nothing can be resumed from it: open a new cluster")
        controller.restore(saved.controller)
        replay(whole[saved.log_nbytes :].splitlines(keepends=True), controller)
        os.truncate(self._events, len(whole))
        self._file = os.open(self._events, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._nbytes = len(whole)
        deployments = msgspec.json.decode(self._deployments.read_bytes(), type=list[Deployment]) if self._deployments.exists() else []
        return max(saved.now, controller.now), deployments

    def write(self, line: bytes) -> None:
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise WriteError(f"the event log cannot be written ({error.strerror}); free some space", path=self._events) from error
        if written < len(line):
            raise WriteError("the event log cannot be written whole; free some space", path=self._events)
        self._nbytes += written

    def save(self, controller: Controller, now: float) -> None:
        self.next_at = now + self._seconds
        write_whole(self._controller, Saved(now, self._nbytes, controller.to_bytes()).to_bytes())

    def deployed(self, deployments: list[Deployment]) -> None:
        write_whole(self._deployments, msgspec.json.encode(deployments))

    def log(self) -> Iterator[bytes]:
        """The lines so far."""
        left = self._nbytes
        with open(self._events, "rb") as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    return
                yield line

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
