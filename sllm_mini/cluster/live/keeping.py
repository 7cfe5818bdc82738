"""The files of a live cluster: the event log, the saved controller, what is deployed; and when its journal is seen to. Chapter 08.

A disk that is full ends nothing: what it does not take waits in memory (see `appending`), is tried again every few seconds, and is said
once. Only a deployment must be on disk before it counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.appending import AppendFile
from sllm_mini.cluster.journal import Journal, Saved, write_whole
from sllm_mini.control.controller import Controller
from sllm_mini.control.replay import LogHeader, replay
from sllm_mini.errors import SllmError, WriteError

log = logging.getLogger("sllm_mini.cluster")


class Keeper:
    """In `folder`, every `seconds` where it is asked. `write` takes each line of the log, whole and at once, and never raises. One thread at
    a time, but for `log`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._events, self._controller, self._deployments = folder / "events.jsonl", folder / "controller.bin", folder / "deployments.json"
        self._seconds = seconds
        self.next_at = 0.0
        """When it wants to save again."""
        self._file: AppendFile
        self._left: list[Deployment] | None = None
        """Deployments that are still to be written."""
        self._trouble = ""

    def begin(self, header: LogHeader | None) -> None:
        """A new log. Raises SllmError where there is one: a folder is one cluster's; WriteError where it cannot be written."""
        try:
            self._file = AppendFile(self._events, new=True)
        except FileExistsError:
            raise SllmError(f"{self._events} is the log of another cluster; resume that one, or give a new folder") from None
        except OSError as error:
            raise WriteError(f"the event log cannot be made ({error.strerror})", path=self._events) from error
        if header is not None:
            self.write(header.to_line())
        if self._file.error:
            self._file.close()
            self._events.unlink()
            raise WriteError(self._file.error)

    def go_on(self, controller: Controller) -> tuple[float, list[Deployment]]:
        """Makes a new controller what that of a cluster which has ended was, by what was saved and the log since then, which goes on
        after its last whole line; the time by then, and what was deployed. Raises SllmError for a folder that nothing can be
        resumed from."""
        saved = Saved.read(self._controller)
        whole = self._events.read_bytes() if self._events.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        if len(whole) < saved.log_nbytes:
            raise SllmError(f"{self._events} is shorter than when its controller was saved; nothing can be resumed from it: open a new cluster")
        try:
            deployments = msgspec.json.decode(self._deployments.read_bytes(), type=list[Deployment]) if self._deployments.exists() else []
        except msgspec.DecodeError as error:
            raise SllmError(f"{self._deployments} does not say what was deployed ({error}); nothing can be resumed from it: open a new cluster") from error
        controller.restore(saved.controller)
        replay(whole[saved.log_nbytes :].splitlines(keepends=True), controller)
        os.truncate(self._events, len(whole))
        self._file = AppendFile(self._events)
        return max(saved.now, controller.now), deployments

    def write(self, line: bytes) -> None:
        self._file.append(line)

    def save(self, controller: Controller, now: float, journal: Journal, journal_nbytes: int) -> None:
        """All that is to be written now and then; the journal anew where it is larger. What cannot be is said once, and tried next time."""
        self.next_at = now + self._seconds
        troubles = list[str]()
        for step in (lambda: self._save(controller, now), self._save_left, journal.retry):
            try:
                step()
            except SllmError as error:
                troubles.append(str(error))
        if not troubles and journal.nbytes > journal_nbytes:
            try:
                journal.compact()
            except SllmError as error:
                troubles.append(str(error))
        self._say(troubles[0] if troubles else "")

    def deployed(self, deployments: list[Deployment]) -> None:
        """Raises WriteError, and what was written before stays."""
        write_whole(self._deployments, msgspec.json.encode(deployments))
        self._left = None

    def undeployed(self, deployments: list[Deployment]) -> None:
        """Those that are left; where that cannot be written now it is later."""
        self._left = deployments
        try:
            self._save_left()
        except WriteError as error:
            self._say(str(error))

    def log(self) -> Iterator[bytes]:
        """The lines so far, as they are on disk."""
        left = self._file.nbytes
        with open(self._events, "rb") as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    return
                yield line

    def close(self) -> None:
        self._file.close()

    # Parts

    def _save(self, controller: Controller, now: float) -> None:
        if not self._file.retry():
            raise WriteError(self._file.error)  # the controller has seen more than the log says
        write_whole(self._controller, Saved(now, self._file.nbytes, controller.to_bytes()).to_bytes())

    def _save_left(self) -> None:
        if self._left is not None:
            self.deployed(self._left)

    def _say(self, trouble: str) -> None:
        """Once, and once when it is over."""
        if trouble and not self._trouble:
            log.warning("the cluster goes on, but could not be resumed as it is now: %s", trouble)
        elif self._trouble and not trouble:
            log.warning("all that the cluster keeps on disk could be written again")
        self._trouble = trouble
