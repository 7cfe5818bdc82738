"""The event log of a controller, a line of JSON for each event with the actions that followed, and its replay.

    recorder = Recorder(controller, file.write)          # file: opened for writing bytes
    recorder.handle(event, now)                          # as the controller's
    replay(open("events.jsonl", "rb"), another)          # the same actions, or an error that names the line

A controller made with the same policies and options, without a past, gives exactly the recorded actions. One that was
restored from `Controller.to_bytes` does from that line on where its policies learn nothing: what they have learned is
saved only by those with `save` and `restore`, which none that is here has yet. Costs some 10 us an event. One thread at a
time. Taught in chapter 08.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from msgspec import Struct

from sllm_mini.control.controller import Controller
from sllm_mini.control.messages import AnyAction, AnyEvent
from sllm_mini.errors import SllmError


class Record(Struct, frozen=True):
    """One line of a log."""

    now: float
    event: AnyEvent
    actions: tuple[AnyAction, ...] = ()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode


class Recorder:
    """Handles events as its controller does and gives each line of the log, with its newline, to `write`."""

    def __init__(self, controller: Controller, write: Callable[[bytes], object]) -> None:
        self.controller, self._write = controller, write

    def handle(self, event: AnyEvent, now: float) -> list[AnyAction]:
        actions = self.controller.handle(event, now)
        self._write(_encode(Record(now, event, tuple(actions))) + b"\n")
        return actions


def read_log(lines: Iterable[bytes | str]) -> Iterator[Record]:
    """Raises SllmError naming the line that is no record. A last line without its newline was cut off, and is an error too."""
    for number, line in enumerate(lines, 1):
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
