"""The event log of a controller, a line of JSON for each event with the actions that followed, and its replay.

    recorder = Recorder(controller, file.write)          # file: opened for writing bytes
    recorder.handle(event, now)                          # as the controller's
    replay(open("events.jsonl", "rb"), another)          # the same actions, or an error that names the line

A controller made with the same policies and options gives exactly the recorded actions: from the first line on without a
past, from any later one on restored from what `Controller.to_bytes` gave there. What a policy has learned is part of that
where it offers `save` and `restore` (see `saveable`), as all that are here do. Costs some 10 us an event. One thread at a
time. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from msgspec import Struct

from sllm_mini.control.controller import Controller
from sllm_mini.control.messages import AnyAction, AnyEvent
from sllm_mini.errors import SllmError

VERSION = 1


class LogHeader(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format", tag="sllm-mini events"):
    """The first line of a log that says by itself how to replay it: the names of the policies and the controller's options. A
    log may do without; then whoever replays it must know them."""

    placement: str
    keep_alive: str
    autoscaler: str
    max_failures: int = 3
    retry_seconds: float = 1.0
    version: int = VERSION

    def to_line(self) -> bytes:
        return _encode(self) + b"\n"


class Record(Struct, frozen=True):
    """One line of a log."""

    now: float
    event: AnyEvent
    actions: tuple[AnyAction, ...] = ()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode
_decode_header = msgspec.json.Decoder(LogHeader).decode


class Recorder:
    """Handles events as its controller does and gives each line of the log, with its newline, to `write`."""

    def __init__(self, controller: Controller, write: Callable[[bytes], object]) -> None:
        self.controller, self._write = controller, write

    def handle(self, event: AnyEvent, now: float) -> list[AnyAction]:
        actions = self.controller.handle(event, now)
        self._write(_encode(Record(now, event, tuple(actions))) + b"\n")
        return actions


def log_header(line: bytes | str) -> LogHeader | None:
    """The header that the first line of a log is, None where it is a record. Raises SllmError for a header that is wrong."""
    if not (line.startswith(b'{"format"') if isinstance(line, bytes) else line.startswith('{"format"')):
        return None
    try:
        header = _decode_header(line)
    except msgspec.DecodeError as error:
        raise SllmError(f"line 1 of the event log is a wrong header ({error}); record the log again") from error
    if header.version != VERSION:
        raise SllmError(f"the event log is of version {header.version} and this sllm_mini reads version {VERSION}; record the log again")
    return header


def read_log(lines: Iterable[bytes | str]) -> Iterator[Record]:
    """The records of a log, without its header. Raises SllmError naming the line that is no record. A last line without its newline was cut off, and is an error too."""
    for number, line in enumerate(lines, 1):
        if number == 1 and log_header(line) is not None:
            continue
        try:
            yield _decode(line)
        except msgspec.DecodeError as error:
            raise SllmError(f"line {number} of the event log is not a record ({error}); was the log cut off there?") from error


def replay(log: Iterable[bytes | str], controller: Controller) -> int:
    """Feeds a recorded log to a controller; returns how many events there were. Raises SllmError at the first event after
    which the actions are not those recorded."""
    count = 0
    for record in read_log(log):
        count += 1
        actions = tuple(controller.handle(record.event, record.now))
        if actions != record.actions:
            raise SllmError(
                f"event {count} of the log, {record.event}, gave {_short(actions)} and not {_short(record.actions)} as recorded; "
                "replay it with the policies and options it was recorded with"
            )
    return count


def _short(actions: tuple[AnyAction, ...]) -> str:
    return ", ".join(map(repr, actions[:3])) + (f" and {len(actions) - 3} more" if len(actions) > 3 else "") if actions else "nothing"
