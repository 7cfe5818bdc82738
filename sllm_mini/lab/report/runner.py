"""Runs a plan within a budget of seconds, unit by unit, and can be called again until nothing is left.

What is done is not done again; what failed is tried again only when the code has changed or it is asked for; what was
interrupted is tried again, with the time it took so far as its new estimate. A failure stops nothing else. Call from the
main thread: a SIGTERM ends a call as Ctrl-C does.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sllm_mini.lab.report.folder import REHEARSAL, Folder, ReportError, write_json
from sllm_mini.lab.report.process import Ended, run_limited
from sllm_mini.lab.report.unit import STAGE_SECONDS, Entry, Plan, Product, Status, Unit


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of the runner came to: keys by outcome; `left` were not begun or not finished."""

    done: tuple[str, ...]
    failed: tuple[str, ...]
    left: tuple[str, ...]
    interrupted: bool

    def __add__(self, later: Call) -> Call:
        return Call(self.done + later.done, self.failed + later.failed, self.left + later.left, later.interrupted)


def select(plan: Plan, words: Sequence[str]) -> list[Unit]:
    """The units that `words` name: stages ("bench"), units ("bench/opt*", shell patterns), or "all".

    Raises ReportError for a word that names nothing.
    """
    keys = [unit.key for unit in plan.units]
    for word in words:
        if word != "all" and not any(is_named(key, word) for key in (*keys, *plan.skipped)):
            raise ReportError(f"no stage or unit is called {word!r}; the stages are {', '.join(plan.stages)}, and --list shows their units")
    return [unit for unit in plan.units if any(is_named(unit.key, word) for word in words)]


def is_named(key: str, word: str) -> bool:
    """Whether a word of the command line names the unit with that key: its stage, its key or a pattern, or "all"."""
    return word == "all" or key.split("/")[0] == word or fnmatchcase(key, word)


class Runner:
    """See the module. `say` is told each step in one line; `code` is the hash of the package at hand."""

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        *,
        code: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._code = code
        self._cwd = cwd
        self._env = dict(os.environ if env is None else env)
        self._say = say
        self._clock = clock

    def run(self, units: Sequence[Unit], *, budget_seconds: float, again: bool = False) -> Call:
        """Works off `units` until all are done or the budget is spent. A Ctrl-C ends the call and is not raised:
        everything up to then is kept, and the call says that it was interrupted."""
        deadline = self._clock() + budget_seconds
        pending = [unit for unit in units if again or not self._settled(unit)]
        begun: list[str] = []
        stopped = False
        with _terminable():
            try:
                while pending and self._clock() < deadline:
                    unit = self._first_that_fits(pending, deadline - self._clock(), anything=not begun)
                    if unit is None:
                        break
                    begun.append(unit.key)
                    self._run_one(unit, deadline)
                    pending.remove(unit)
                    self._drop_unused(pending)
            except KeyboardInterrupt:
                stopped = True
        outcome = {unit.key: self._folder.entries.get(unit.key) for unit in units}
        waiting = {unit.key for unit in pending}
        left = tuple(key for key, entry in outcome.items() if key in waiting or entry is None or entry.status == "interrupted")
        return Call(
            done=tuple(key for key, entry in outcome.items() if entry is not None and entry.status == "done" and key not in left),
            failed=tuple(key for key, entry in outcome.items() if entry is not None and entry.status in ("failed", "timeout") and key not in left),
            left=left,
            interrupted=stopped,
        )

    def _settled(self, unit: Unit) -> bool:
        entry = self._folder.entries.get(unit.key)
        if entry is None or entry.status == "interrupted":
            return False
        return entry.status == "done" or entry.code == self._code

    def _estimate(self, unit: Unit) -> float:
        made = sum(self._plan.products[name].seconds for name in unit.uses if not self._plan.products[name].path.exists())
        before = self._folder.entries.get(unit.key)
        seen = 1.25 * before.seconds if before is not None else 0.0
        return min(max(unit.seconds, seen), unit.limit_seconds) + made

    def _first_that_fits(self, pending: Sequence[Unit], seconds: float, *, anything: bool) -> Unit | None:
        """In order; the first unit of a call is begun whatever its estimate says, or no call might ever begin it."""
        for unit in pending:
            if self._estimate(unit) <= seconds:
                return unit
        return pending[0] if anything else None

    def _run_one(self, unit: Unit, deadline: float) -> None:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        log = self._folder.log_of(unit.key)
        log.unlink(missing_ok=True)
        result = None if unit.result is None else self._folder.results / unit.result
        if result is not None:
            result.unlink(missing_ok=True)
        start = self._clock()

        def note(status: Status, rc: int | None) -> None:
            entry = Entry(
                status, rc, round(self._clock() - start, 3), started, self._code, unit.command, log.name,
                unit.result if result is not None and result.exists() else None,
            )  # fmt: skip
            self._folder.note(unit, entry)
            words = {"done": "done", "failed": f"FAILED with code {rc}", "timeout": "ENDED at its limit", "interrupted": "interrupted, to be resumed"}
            self._say(f"  {unit.key}: {words[status]}, {entry.seconds:.1f} s" + ("" if status == "done" else f"; see {log}"))

        self._say(f"  {unit.key} …")
        self._folder.clear_scratch()
        try:
            for name in unit.uses:
                product = self._plan.products[name]
                if not product.path.exists() and not self._make(product, log, deadline):
                    note("interrupted" if self._clock() >= deadline else "failed", 1)
                    return
            limit = min(unit.limit_seconds, deadline - self._clock())
            # A result is written beside its place first, so that what lies there is always whole.
            partial = self._folder.path / ".partial.json" if unit.from_stdout else None
            ended = self._command(unit.command, log, limit, unit.env, partial)
            if partial is not None and result is not None and partial.stat().st_size:
                os.replace(partial, result)
            if result is not None and self._folder.rehearsal:
                _mark_rehearsal(result)
        except KeyboardInterrupt:
            note("interrupted", None)
            raise
        finally:
            (self._folder.path / ".partial.json").unlink(missing_ok=True)
            self._folder.clear_scratch()
        if ended.rc is None:
            note("timeout" if limit >= unit.limit_seconds else "interrupted", None)
        else:
            missing = ended.rc == 0 and result is not None and not result.exists()
            note("failed" if ended.rc or missing else "done", ended.rc)

    def _make(self, product: Product, log: Path, deadline: float) -> bool:
        self._say(f"    making {product.name} …")
        made = False
        try:
            ended = self._command(product.command, log, min(STAGE_SECONDS, deadline - self._clock()), {}, None)
            made = ended.rc == 0 and product.path.exists()
        finally:
            if not made:
                self._folder.delete(product.path)  # a later call would take half a model for one
        return made

    def _command(self, command: Sequence[str], log: Path, limit: float, env: Mapping[str, str], output: Path | None) -> Ended:
        return run_limited(command, log=log, limit_seconds=limit, env={**self._env, **env}, cwd=self._cwd, output=output)

    def _drop_unused(self, pending: Sequence[Unit]) -> None:
        # Also what a later call will want, of whatever stage.
        wanted = {name for unit in self._plan.units if unit in pending or not self._settled(unit) for name in unit.uses}
        for name, product in self._plan.products.items():
            if name not in wanted and product.path.exists():
                self._folder.delete(product.path)


class _terminable:
    """Inside it a SIGTERM is a KeyboardInterrupt, so that a call that is asked to end keeps what was done."""

    def __enter__(self) -> None:
        self._here = threading.current_thread() is threading.main_thread()
        if self._here:
            self._before = signal.signal(signal.SIGTERM, _interrupt)

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._before)


def _mark_rehearsal(result: Path) -> None:
    """Says in the document itself that no figure in it is a result."""
    try:
        document = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # then it is no document that anybody could take for one
    write_json(result, {"rehearsal": REHEARSAL, **document})


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
