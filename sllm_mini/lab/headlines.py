"""The README's table of headline figures, made from recorded documents and from nothing else.

    python -m sllm_mini.lab.headlines FILE…     # keeps what a bench saved on a machine without a GPU in data/results/cpu, and writes the table
    python -m sllm_mini.lab.headlines           # writes the table again

A document is what `sllm-mini bench … --save FILE` wrote. Runs on a GPU come by `python -m sllm_mini.lab.report record`. Costs no measurement.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.errors import FormatError, SllmError
from sllm_mini.lab.recorded import code_hash
from sllm_mini.lab.report.folder import write_json
from sllm_mini.lab.report.record import without_folders
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text
from sllm_mini.resources import resource

BEGIN, END = "<!-- headlines: made by sllm_mini.lab.headlines -->", "<!-- /headlines -->"
_CPU = "cpu"

Document = Mapping[str, Any]
Line = tuple[str, str, str]
"""What was measured, ours, and what stands beside it."""


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 with a sentence on standard error."""
    root = resource("data/results")
    readme = root.parents[1] / "README.md"
    try:
        for name in arguments:
            print(keep(Path(name), root / _CPU))
        text = readme.read_text(encoding="utf-8")
        readme.write_text(with_table(text, table(root)), encoding="utf-8")
    except (OSError, SllmError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def keep(path: Path, folder: Path) -> Path:
    """Puts a saved document there under its bench's name, stamped with the code that is here, without the folders of the machine. Raises
    FormatError for what is no document with a headline, or was measured on a GPU, OSError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind, device = document["kind"], _device(document)
        lines, day = list(_LINES[kind](document)), _day(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError("it is not a document that a bench saved, or one without a headline figure", path=path) from error
    if device != "cpu" or not lines:
        raise FormatError(f"it was measured on {device}; runs on a GPU come by python -m sllm_mini.lab.report record", path=path)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{'-'.join(re.findall(r'[a-z]+', kind.removeprefix('sllm-mini ')))}.json"
    write_json(kept, {**without_folders(document), "recorded": {"date": day, "code_hash": code_hash()}})
    return kept


def table(root: Path) -> str:
    """The Markdown of all runs recorded below that folder: a table for each machine. Raises FormatError for a document that lacks something."""
    parts = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        found = []
        for path in sorted(folder.glob("*.json")):
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("kind") in _LINES:
                found.append((path, document))
        if folder.name != _CPU:
            found = _of_the_gpu(found)
        if found:
            parts.append("\n".join(_part(folder.name, found)))
    return "\n\n".join(parts)


def with_table(text: str, made: str) -> str:
    """That text with the table between its two marks. Raises FormatError where they are not both there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"the marks {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def _of_the_gpu(found: Sequence[tuple[Path, Document]]) -> list[tuple[Path, Document]]:
    """Of all that a report records there, what ran on the GPU; of each bench, the largest model alone."""
    there = [(path, document) for path, document in found if _device(document) != "cpu"]
    largest: dict[str, int] = {}
    for _, document in there:
        largest[document["kind"]] = max(largest.get(document["kind"], 0), _nbytes(document))
    return [(path, document) for path, document in there if _nbytes(document) == largest[document["kind"]]]


def _nbytes(document: Document) -> int:
    return int(document.get("model", {}).get("nbytes", 0))


def _device(document: Document) -> str:
    """What it was measured on. Multicast and the like know no device but the CPU's memory."""
    method = document["method"]
    return str(method.get("device", "cuda" if method.get("cuda") else "cpu"))


def _part(name: str, found: Sequence[tuple[Path, Document]]) -> Iterator[str]:
    machine = next((document["machine"] for _, document in found if "processor" in document["machine"]), {"processor": "an unnamed processor", "cpu_count": "some"})
    where = "without a GPU" if name == _CPU else name
    days = sorted({_day(document) for _, document in found})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    yield f"On {machine['processor']}, {machine['cpu_count']} cores, {where}, {when}; medians, in brackets the least and the most of the rounds:"
    yield from ("", "| | ours | beside it, in the same run |", "|---|---|---|")
    for path, document in found:
        try:
            for what, ours, beside in _LINES[document["kind"]](document):
                yield f"| {what} | {ours} | {beside} |"
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the figure of its headline is not there ({error})", path=path) from error


def _day(document: Document) -> str:
    """In UTC; what ran in a report says it in its stamp alone."""
    if "date" not in document:
        return str(document["recorded"]["date"])
    return datetime.fromisoformat(document["date"]).astimezone(UTC).date().isoformat()


def _model(document: Document) -> str:
    model = document["model"]
    return f"{model['name']}, {nbytes_text(model['nbytes'])}"


def _times(row: Document, name: str, places: int = 1) -> str:
    low, high = row[f"{name}_min"], row[f"{name}_max"]
    return f"x{row[f'{name}_median']:.{places}f} ({low:.{places}f}–{high:.{places}f})"


def _load(document: Document) -> Iterator[Line]:
    target = "" if _device(document) == "cpu" else " to the GPU"
    for state, place in (("cold", "disk"), ("warm", "page cache")):
        rows = [row for row in document["results"] if row["state"] == state]
        named = {row["name"]: row for row in rows}
        ours, unchecked = (named.get(name) for name in (document["reference"], f"{document['reference']}, no hashing"))
        if ours is None:  # that state was not measured
            continue
        best: dict[str, Document] = {}
        for row in sorted((row for row in rows if row["kind"] == "peer" and row["ratio_to_reference_median"]), key=lambda row: float(row["ratio_to_reference_median"])):
            best.setdefault(row["package"], row)
        gives = "disk gives" if state == "cold" else "way to the GPU allows" if target else "memory allows"
        limit = f", {ours['ratio_to_limit']:.2f} of what the {gives}" if ours["ratio_to_limit"] else ""
        told = f"{seconds_text(ours['seconds_median'])} with every hash checked{limit}" + (f"; {seconds_text(unchecked['seconds_median'])} without" if unchecked else "")
        beside = ", ".join(f"{row['name']} {_times(row, 'ratio_to_reference', 2)}" for row in best.values())
        beside = f"its seconds over ours with hashes, the best setting of each package: {beside}" if beside else "no peer was there"
        yield f"load {_model(document)} from the {place}{target} and use every byte", told, beside


def _overlap(document: Document) -> Iterator[Line]:
    best = max(document["prompts"], key=lambda row: float(row["serial_over_overlapped_median"]))
    seconds = {row["mode"]: row["seconds_median"] for row in document["results"] if row["tokens"] == best["tokens"]}
    yield (
        f"first token of a prompt of {best['tokens']} while {_model(document)} loads", seconds_text(seconds["overlapped"]),
        f"load, then run: {_times(best, 'serial_over_overlapped', 2)} as long",
    )  # fmt: skip


def _start(document: Document) -> Iterator[Line]:
    rows = {row["name"]: row for row in document["results"]}
    peer = rows.get("transformers serve")
    for name, what in (("ready", "it is ready"), ("dram", "weights in memory, process and libraries there"), ("process, disk", "nothing runs")):
        row = rows[name]
        if peer is None:
            yield f"first token of {_model(document)}: {what}", seconds_text(row["seconds_median"]), "no peer was there"
            continue
        rest = f"; without what both import {_times(row, 'ratio_without_imports')}" if name == "process, disk" else ""
        yield f"first token of {_model(document)}: {what}", seconds_text(row["seconds_median"]), f"`transformers serve` from cold ({seconds_text(peer['seconds_median'])}): {_times(row, 'ratio_to_peer')}{rest}"


def _decode(document: Document) -> Iterator[Line]:
    ours = [row for row in document["results"] if row["variant"] == "sllm_mini"]
    for row in ours:
        others = [each for each in document["results"] if each["workload"] == row["workload"] and each is not row]
        beside = ", ".join(f"{each['name'].partition(', ')[0]} {_times(each, 'ratio_to_ours', 2)}" for each in others)
        yield f"decode {_model(document)}: {row['workload']}", f"{row['tokens_per_second_median']:,.0f} tokens/s", f"its seconds over ours: {beside}"


def _migrate(document: Document) -> Iterator[Line]:
    most = max(row["tokens"] for row in document["results"])
    rows = {row["mode"]: row for row in document["results"] if row["tokens"] == most}
    told = {mode: f"{row['pause_steps_median']:.1f} decode steps ({row['pause_steps_min']:.1f}–{row['pause_steps_max']:.1f})" for mode, row in rows.items()}
    for mode, way in (("kv", "its KV cache"), ("tokens", "its tokens")):
        yield f"pause of a request of {most:,} tokens that moves by {way}", told[mode], f"stop and copy: {told['stop_and_copy']}"


def _multicast(document: Document) -> Iterator[Line]:
    for row in document["results"]:
        if row["name"].startswith("binomial"):
            yield f"a model reaches {row['nodes']} nodes", f"{_times(row, 'over_bound', 2)} what its links allow", f"as long as everybody reading the store: {_times(row, 'ratio_to_reference', 2)}"


def _overhead(document: Document) -> Iterator[Line]:
    rows = {row["name"]: row for row in document["results"]}
    direct = seconds_text(rows["direct"]["one_token_seconds_median"])
    for name, how in (("submit", "through the cluster"), ("http json", "over HTTP, JSON"), ("http stream", "over HTTP, streamed")):
        if row := rows.get(name):
            yield f"a warm request of one token {how}", f"+{seconds_text(row['added_one_token_seconds_median'])}", f"its engine called directly: {direct}"


def _kernels(document: Document) -> Iterator[Line]:
    for row in document["results"]:
        roof = f"{row['ratio_to_limit']:.2f} of the bytes that a copy within its memory moves in that time"
        yield f"kernel {row['name']} over {nbytes_text(row['nbytes'])} in the GPU's memory", rate_text(row["bytes_per_second_median"]), roof


_LINES: Mapping[str, Callable[[Document], Iterator[Line]]] = {
    "sllm-mini bench load": _load, "sllm-mini bench overlap": _overlap, "sllm-mini bench start": _start, "sllm-mini bench decode": _decode,
    "sllm-mini bench migrate": _migrate, "sllm-mini bench multicast": _multicast, "sllm-mini bench serve overhead": _overhead,
    "sllm-mini kernels": _kernels,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
