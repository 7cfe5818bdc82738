"""The command: `python -m sllm_mini.lab.report [STAGE…]` makes or goes on with a report, `… record ARCHIVE` records one.

Exit codes: 0 all done (or skipped with a reason), 1 something failed, 2 wrong usage, 3 the budget ended first and the
same command goes on, 130 interrupted. What was done is kept in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sllm_mini.lab.report.runner import Call
    from sllm_mini.lab.report.unit import Plan, Unit

EXIT_FAILED, EXIT_UNFINISHED, EXIT_INTERRUPTED = 1, 3, 130
_RESERVED_SECONDS = 10.0
"""Kept of the budget for ending a unit that runs into it, the summary and the archive."""
_WRITTEN_ALWAYS = {"summary", "archive"}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    from sllm_mini.lab.report.folder import ReportError

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _record(words[1:]) if words[:1] == ["record"] else _report(words)
    except ReportError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _record(words: Sequence[str]) -> int:
    from sllm_mini.lab.report.record import record, record_chapters

    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.report record", description="Bring a report's results into data/results/<gpu-model>/.")
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="the gpu-report.tar.gz of a run on a GPU")
    parser.add_argument(
        "--chapters", action="store_true",
        help="also replace the outputs of chapters/*.ipynb by those of the run; only of chapters whose cells and package code are still those that ran",
    )  # fmt: skip
    options = parser.parse_args(words)
    for path in record(options.archive):
        print(path)
    if not options.chapters:
        return 0
    brought, refused = record_chapters(options.archive, _checkout() / "chapters")
    for path in brought:
        print(path)
    for reason in refused:
        print(reason, file=sys.stderr)
    return EXIT_FAILED if refused or not brought else 0


def _parser() -> argparse.ArgumentParser:
    from sllm_mini.lab.report.archive import LIMIT_NBYTES

    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.report", description="Record what this project does on a machine with a CUDA GPU.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help='stages, or units as "bench/load-small*" (default: all; --list shows them)')
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS", help="of this call (default: 480); call again for the rest")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-report"), metavar="DIR", help="where everything goes (default: out/gpu-report)")
    parser.add_argument("--rehearse", action="store_true", help="the same steps in tiny sizes with a recording fake in place of the GPU")
    parser.add_argument("--again", action="store_true", help="also repeat what is done")
    parser.add_argument("--list", action="store_true", help="only show the units, their estimates and what is skipped")
    parser.add_argument("--archive-limit", type=int, default=LIMIT_NBYTES, metavar="BYTES", help=f"of the archive (default: {LIMIT_NBYTES:,})")
    return parser


def _report(words: Sequence[str]) -> int:
    from sllm_mini.lab.recorded import code_hash
    from sllm_mini.lab.report.archive import write_archive
    from sllm_mini.lab.report.folder import REHEARSAL, Folder, ReportError, write_json
    from sllm_mini.lab.report.host import look
    from sllm_mini.lab.report.plan import Table
    from sllm_mini.lab.report.runner import Runner, select
    from sllm_mini.lab.report.summary import write_summary

    options = _parser().parse_args(words)
    checkout = _checkout()
    folder = Folder(options.out.resolve(), rehearsal=options.rehearse, create=not options.list)
    with contextlib.nullcontext() if options.list else folder.locked():
        host = look(folder.work, rehearsal=options.rehearse)
        for line in (REHEARSAL,) if options.rehearse else ():
            print(line)
        for line in host.complaints():
            print(line)
        if options.list:
            _show(Table(host, folder, checkout).plan(), [word for word in options.stages if word not in _WRITTEN_ALWAYS])
            if host.gpu is None:
                print(f"There is no CUDA GPU here ({host.why_no_gpu}): sizes leave its memory out of account, and only --rehearse would run.")
            return 0
        if host.gpu is None:
            raise ReportError(f"there is no CUDA GPU to report on: {host.why_no_gpu}; --rehearse goes through the same steps without one")
        print(f"{host.gpu_model}, {host.cpu_count} cores, {host.memory_nbytes / 1e9:.0f} GB of memory and {host.disk_nbytes / 1e9:.0f} GB of disk free; into {folder.path}", flush=True)
        plan = Table(host, folder, checkout).plan()
        words = [word for word in options.stages if word not in _WRITTEN_ALWAYS]
        named = select(plan, words if options.stages else ["all"])
        note = {"rehearsal": REHEARSAL} if options.rehearse else {}
        write_json(folder.path / "machine.json", {**note, **host.as_json()})
        folder.save()
        deadline = time.monotonic() + options.budget - _RESERVED_SECONDS

        def run(units: Sequence[Unit]) -> Call:
            runner = Runner(plan, folder, code=code_hash(), cwd=checkout, env=_environment(checkout), say=_say)
            return runner.run(units, budget_seconds=deadline - time.monotonic(), again=options.again)

        call = run([unit for unit in named if unit.stage == "machine"])
        if not call.interrupted:
            # The disk's speed is known now, and with it how much of a bench fits into a unit; the names stay.
            plan = Table(host, folder, checkout).plan()
            keys = {unit.key for unit in named}
            call += run([unit for unit in plan.units if unit.key in keys and unit.stage != "machine"])
        summary = write_summary(folder, plan, host)
        archive = write_archive(folder, limit_nbytes=options.archive_limit)
    print(f"{len(call.done)} done, {len(call.failed)} failed, {len(call.left)} left: {summary}, {archive} ({archive.stat().st_size:,} bytes)")
    if call.interrupted:
        return EXIT_INTERRUPTED
    if call.left:
        print("The same command goes on from here.")
        return EXIT_UNFINISHED
    return EXIT_FAILED if call.failed else 0


def _checkout() -> Path:
    from sllm_mini.lab.report.folder import ReportError

    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / "tests").is_dir():
        raise ReportError(f"{checkout} holds no tests/ and chapters/; run the report from a checkout of the repository")
    return checkout


def _show(plan: Plan, words: Sequence[str]) -> None:
    from sllm_mini.lab.report.runner import is_named, select

    for unit in select(plan, words or ["all"]):
        print(f"  {unit.key}: about {unit.seconds:.0f} s")
    for key, reason in plan.skipped.items():
        if not words or any(is_named(key, word) for word in words):
            print(f"  {key}: skipped, {reason}")


def _say(line: str) -> None:
    print(line, flush=True)


def _environment(checkout: Path) -> dict[str, str]:
    """The package is found in the checkout, and nothing looks for the network."""
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


if __name__ == "__main__":
    sys.exit(main())
