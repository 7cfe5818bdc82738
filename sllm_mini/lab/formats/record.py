"""Chapter 01's measurement as one command and one file: `python -m sllm_mini.lab.formats.record formats.json`.

Makes the three files, measures every reader, removes the files again and writes the runs as JSON; `recorded_readers` draws
such a file from a machine with a GPU. Costs what the chapter costs, about a minute on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sllm_mini.errors import ResourceError, SllmError
from sllm_mini.lab.counters import Counters
from sllm_mini.lab.figure import Described, describe
from sllm_mini.lab.formats.files import remove_formats, write_formats
from sllm_mini.lab.formats.plots import plot_readers, readers_alt_text
from sllm_mini.lab.formats.readers import READERS
from sllm_mini.lab.formats.runs import ReaderRun, measure_readers
from sllm_mini.lab.models import formats_checkpoint
from sllm_mini.lab.recorded import recorded_note, recorded_runs


def save_runs(runs: Sequence[ReaderRun], path: str | os.PathLike[str]) -> None:
    """Writes runs as JSON, units in the keys."""
    rows = [
        {
            "reader": run.reader.name, "warm": run.warm, "nbytes": run.nbytes, "cached_share": run.cached_share,
            "load": asdict(run.load), "use": asdict(run.use), "checksum": f"{run.checksum:016x}",
        }
        for run in runs
    ]  # fmt: skip
    Path(path).write_text(json.dumps({"runs": rows}, indent=1) + "\n", encoding="utf-8")


def load_runs(path: str | os.PathLike[str]) -> list[ReaderRun]:
    """What `save_runs` wrote. Raises ResourceError for a file that is none, or that names a reader there is not."""
    by_name = {reader.name: reader for reader in READERS}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
        return [
            ReaderRun(
                by_name[row["reader"]], row["warm"], row["nbytes"], row["cached_share"],
                Counters(**row["load"]), Counters(**row["use"]), int(row["checksum"], 16),
            )
            for row in rows
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResourceError(f"{path}: these are no runs of readers ({error!r}); record them again") from error


def recorded_readers(name: str = "formats.json") -> Described | str:
    """The first recorded run of that name as a picture, captioned with where it was made; a note where there is none."""
    found = recorded_runs(name)
    if not found:
        return recorded_note(name)
    model, path = next(iter(found.items()))
    runs = load_runs(path)
    return describe(plot_readers(runs), f"Recorded on a machine with {model}. {readers_alt_text(runs)}", caption=recorded_note(name))


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the file is written, 1 for an error, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m sllm_mini.lab.formats.record", description="Measure chapter 01's readers and write the runs.")
    parser.add_argument("path", type=Path, metavar="FILE.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    try:
        formats = write_formats(formats_checkpoint())
        try:
            save_runs(measure_readers(formats, rounds=options.rounds), options.path)
        finally:
            remove_formats()
    except (SllmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
