"""What outlives a server: a folder that one server at a time has, with its cluster's files. Chapter 11.

    FOLDER/lock          held while a server runs, by the kernel: none is left by a crash
    FOLDER/server.json   where that server is
    FOLDER/serving.json  the policies that its controller decided by
    FOLDER/wanted.json   what a server is to deploy, until it has
    FOLDER/…             the cluster's own files (`cluster.journal`), and its nodes'
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from sllm_mini.cluster.api import Deployment
from sllm_mini.cluster.journal import write_whole
from sllm_mini.errors import FormatError, SllmError, WriteError

_CONTROL = ("events.jsonl", "controller.bin", "ledger.bin")
_DEPLOYMENTS, _WANTED = "deployments.json", "wanted.json"
LOG_NBYTES = 64 << 20
"""A longer event log is not read again: the next server begins another with what is deployed."""


class _Running(msgspec.Struct):
    pid: int
    url: str


class ServerFolder:
    """Of one server, from when it is made until `close`. Raises SllmError where another one has it, WriteError for one that cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WriteError(f"it cannot keep a server's state ({error.strerror}); give another folder", path=self.path) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise SllmError(f"{self.path} is the state of a server that runs{self._other()}; end that one, or give another folder") from None
        for left in self.path.glob("arbiter-*"):  # the socket of one that was killed
            left.unlink()

    def prepare(self, policies: Mapping[str, str], *, given: Collection[str] = (), fresh: bool = False) -> tuple[bool, list[Deployment]]:
        """Whether the cluster that was here can be resumed, and what it had deployed; where it cannot, that is to be deployed in a new one. It
        cannot where other policies are to decide from now on, or its log has become long; with `fresh` nothing is left of it. Until `announce` it
        is kept apart, and found by the next server if this one gets no further. Raises SllmError where the weights of a model are not there any more
        that are not `given` anew."""
        if fresh:
            self._forget(_DEPLOYMENTS, _WANTED)
        begun = (self.path / _WANTED).exists()  # an earlier server ended while it deployed them
        deployments = list({each.spec.name: each for name in (_WANTED, _DEPLOYMENTS) for each in self._deployed(name)}.values())
        for each in deployments:
            if each.spec.name not in given and "://" not in each.source and not os.path.exists(each.source):
                raise SllmError(f"{each.source}, from which {each.spec.name} was deployed, is not there any more; bring it back, or begin anew with --fresh")
        said, written = msgspec.json.encode(dict(policies)), self.path / "serving.json"
        same = written.exists() and written.read_bytes() == said
        resumed = same and not fresh and not begun and (self.path / "controller.bin").exists() and (self.path / "events.jsonl").stat().st_size <= LOG_NBYTES
        if not resumed:
            if deployments:
                write_whole(self.path / _WANTED, msgspec.json.encode(deployments))
            self._forget(*_CONTROL)
        write_whole(written, said)
        return resumed, deployments

    def announce(self, url: str) -> None:
        """For whoever wants the folder as well: it serves what it was to serve."""
        self._forget(_WANTED)
        write_whole(self.path / "server.json", msgspec.json.encode(_Running(os.getpid(), url)))

    def close(self) -> None:
        """Lets another server have it. Safe to call twice."""
        if self._lock >= 0:
            self._forget("server.json")
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _deployed(self, name: str) -> list[Deployment]:
        path = self.path / name
        if not path.exists():
            return []
        try:
            return msgspec.json.decode(path.read_bytes(), type=list[Deployment])
        except (msgspec.DecodeError, ValueError) as error:
            raise FormatError(f"it does not say what was deployed ({error}); begin anew with --fresh", path=path) from error

    def _other(self) -> str:
        """Where it is, if it has said so."""
        try:
            other = msgspec.json.decode((self.path / "server.json").read_bytes(), type=_Running)
        except (OSError, msgspec.DecodeError):
            return ""
        return f" at {other.url} (process {other.pid})"

    def _forget(self, *names: str) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
