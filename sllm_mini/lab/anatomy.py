"""The anatomy of a cold start: a fresh process is started and every second of it accounted for, to the first token.

`measure_cold_start` starts `lab.coldstart` and reads its report; the machine's monotonic clock is one for all
processes, so the parent's "start" and the child's spans are on one axis. Costs what it measures, and leaves nothing
running. Taught in chapter 00.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from sllm_mini.errors import ModelError, ResourceError
from sllm_mini.lab.account import Account, account
from sllm_mini.types import Span

DEFAULT_PROMPT = "Once upon a time"
_CHILD = (sys.executable, "-m", "sllm_mini.lab.coldstart")


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One measured start. All times are seconds since the process was asked for; immutable, safe from any thread.

    `first_token_seconds` is the time to the first token (TTFT), `page_cache_fraction` the share of the checkpoint's
    bytes that the page cache held beforehand (None where the system does not say), `threads` what torch computed on.
    """

    spans: tuple[Span, ...]
    first_token_seconds: float
    text: str
    token_ids: tuple[int, ...]
    prompt: str | tuple[int, ...]
    prompt_tokens: int
    device: str
    threads: int
    nbytes: int
    page_cache_fraction: float | None
    machine: dict[str, str]

    @property
    def until_first_token(self) -> Account:
        """What the time to the first token was spent on."""
        return account(self.spans, start=0.0, end=self.first_token_seconds)

    @property
    def coverage(self) -> float:
        """The share of the time to the first token in which a span was running: 1 is "every second"."""
        return self.until_first_token.coverage

    def seconds(self, name: str) -> float:
        """All seconds of the spans called `name` before the first token, 0 where there is none."""
        return sum(entry.seconds for entry in self.until_first_token.entries if entry.name == name)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the run as JSON, to be drawn later as a recorded one, and returns the path."""
        target = Path(path)
        target.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        return target


def load_cold_start(path: str | os.PathLike[str]) -> ColdStart:
    """A run that `ColdStart.save` wrote. Raises ResourceError for a file that is not one."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=ColdStart)
    except OSError as error:
        raise ResourceError(f"{os.fspath(path)}: the recorded run cannot be read ({error.strerror}); record it again") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(f"{os.fspath(path)}: this is no recorded cold start ({error}); record it again") from error


class _Report(msgspec.Struct, frozen=True):
    """What the child writes; its times are readings of the monotonic clock."""

    spans: tuple[Span, ...]
    first_token: float
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    threads: int
    device: str
    gpu: str = ""


class _Failure(msgspec.Struct, frozen=True):
    error: str


def measure_cold_start(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    prompt: str | Sequence[int] = DEFAULT_PROMPT,
    max_new_tokens: int = 16,
    drop_page_cache: bool = False,
    timeout_seconds: float = 600.0,
    child: Sequence[str] = _CHILD,
) -> ColdStart:
    """Starts a process that loads the checkpoint at `path` and answers `prompt`, and says where every second went.

    With `drop_page_cache` the checkpoint's bytes are first dropped from the page cache (the libraries' are not), so
    that they come from the disk. `child` is the command that is given the request. Raises what `open_checkpoint`
    raises, ModelError where the child fails, with its reason, or takes longer than `timeout_seconds`, and ValueError for
    a bad argument. Call from one thread at a time: two starts at once measure each other.
    """
    from sllm_mini.checkpoint import open_checkpoint

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    folder = open_checkpoint(path).path  # says at once what is wrong with it, instead of after the child's imports
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    if drop_page_cache:
        _drop_page_cache(files)
    nbytes, cached = _cached(files)
    asked: str | list[int] = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    spawned = time.monotonic()
    request = {"path": str(folder), "device": device, "prompt": asked, "max_new_tokens": max_new_tokens, "spawned": spawned}
    answer = _run([*child, json.dumps(request)], timeout_seconds)
    return ColdStart(
        spans=tuple(
            replace(s, start=s.start - spawned, end=s.end - spawned)
            for s in sorted(answer.spans, key=lambda item: (item.start, item.end))
        ),
        first_token_seconds=answer.first_token - spawned,
        text=answer.text,
        token_ids=answer.token_ids,
        prompt=asked if isinstance(asked, str) else tuple(asked),
        prompt_tokens=answer.prompt_tokens,
        device=answer.device,
        threads=answer.threads,
        nbytes=nbytes,
        page_cache_fraction=cached / nbytes if cached is not None and nbytes else None,
        machine=_machine(answer.gpu),
    )


def _run(command: Sequence[str], timeout_seconds: float) -> _Report:
    """Runs the child to its end; it is killed when it takes too long or this process is interrupted."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"the cold start was not over after {timeout_seconds:g} s and was stopped; give it more time or a smaller model") from error
    report = _decoded(done.stdout)
    if isinstance(report, _Report) and done.returncode == 0:
        return report
    if isinstance(report, _Failure):
        raise ModelError(f"the cold start failed: {report.error}")
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
    raise ModelError(f"the process of the cold start ended with code {done.returncode} and no report: {last[0]}")


def _decoded(report: bytes) -> _Report | _Failure | None:
    for kind in (_Failure, _Report):
        try:
            decoded: Any = msgspec.json.decode(report, type=kind)
            return decoded
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return None


def _drop_page_cache(files: Sequence[Path]) -> None:
    from sllm_mini.loading.residency import drop_cached

    for file in files:
        with open(file, "rb") as stream:
            drop_cached(stream.fileno())


def _cached(files: Sequence[Path]) -> tuple[int, int | None]:
    """The files' bytes, and how many of them the page cache holds."""
    from sllm_mini.loading.residency import cached_nbytes

    total = 0
    found: int | None = 0
    for file in files:
        nbytes = file.stat().st_size
        total += nbytes
        with open(file, "rb") as stream:
            cached = cached_nbytes(stream.fileno(), 0, nbytes)
        found = None if found is None or cached is None else found + cached
    return total, found


def _machine(gpu: str) -> dict[str, str]:
    """What a recorded run must say about where it ran."""
    import importlib.metadata
    import platform

    from sllm_mini.device.cpu import cpu_count

    facts = {"kernel": platform.release(), "python": platform.python_version(), "cores": str(cpu_count())}
    facts |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return facts | ({"gpu": gpu} if gpu else {})
