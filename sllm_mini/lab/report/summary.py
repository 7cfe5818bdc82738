"""What the report came to, written from its records by this script alone: `summary.md` and `headlines.json`.

Every result of every bench document is one row with its ratio to the limit it is set against. Pure but for the two
files it writes; can be called at any time, also on a report that is not finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sllm_mini.lab.report.folder import REHEARSAL, Folder, write_json
from sllm_mini.lab.report.host import Host
from sllm_mini.lab.report.unit import Plan
from sllm_mini.lab.units import nbytes_text, rate_text, seconds_text


def headlines(folder: Folder) -> list[dict[str, Any]]:
    """One row per result of each bench document: unit, name, state, bytes, seconds, rate, ratio to its limit, and of a load
    how many times our loader's seconds it took."""
    rows = []
    for key, entry, document in folder.result_documents():
        results = document.get("results")
        for result in results if isinstance(results, list) else ():
            if not isinstance(result, Mapping) or not isinstance(result.get("seconds_median"), int | float) or not result.get("nbytes"):
                continue
            seconds = float(result["seconds_median"])
            row = {
                "unit": key,
                "name": result.get("name"),
                "state": result.get("state", result.get("setting")),
                "nbytes": result["nbytes"],
                "seconds_median": seconds,
                "bytes_per_second": result["nbytes"] / seconds if seconds else None,
                "ratio_to_limit": result.get("ratio_to_limit"),
                "limit": result.get("limit"),
                "ratio_to_reference": result.get("ratio_to_reference_median"),
                "date": entry.started[:10],
                "code": entry.code,
            }
            rows.append(row)
    return rows


def write_summary(folder: Folder, plan: Plan, host: Host) -> Path:
    """Writes both files and returns the path of `summary.md`."""
    rows = headlines(folder)
    note = {"rehearsal": REHEARSAL} if folder.rehearsal else {}
    write_json(folder.path / "headlines.json", {**note, "gpu": host.gpu_model, "rows": rows})
    path = folder.path / "summary.md"
    path.write_text("\n".join(_lines(folder, plan, host, rows)) + "\n", encoding="utf-8")
    return path


def _lines(folder: Folder, plan: Plan, host: Host, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"# Report of {host.gpu_model or 'a machine without a CUDA GPU'}" + (" (rehearsal)" if folder.rehearsal else "")
    yield ""
    if folder.rehearsal:
        yield from (f"**{REHEARSAL}**", "")
    gpu = f"{host.gpu_model}, {nbytes_text(host.gpu['total_nbytes'])}" if host.gpu else f"none ({host.why_no_gpu})"
    yield f"GPU: {gpu}. {host.cpu_count} cores, {nbytes_text(host.memory_nbytes)} of memory and {nbytes_text(host.disk_nbytes)} of disk free. {host.system}, Python {host.python}."
    yield ""
    yield from _outcomes(folder, plan)
    yield from _limits(folder)
    if rows:
        yield from ("## Figures", "", "Medians. The ratio is to the limit named, measured in the same rounds.", "")
        yield from ("| unit | what | state | bytes | seconds | rate | of its limit | times ours |", "|---|---|---|---:|---:|---:|---:|---:|")
        for row in rows:
            ratio = row["ratio_to_limit"]
            share = f"{ratio:.2f}" + (f" ({row['limit']})" if row["limit"] else "") if isinstance(ratio, int | float) else ""
            against = f"{row['ratio_to_reference']:.2f}" if isinstance(row["ratio_to_reference"], int | float) else ""
            rate = rate_text(row["bytes_per_second"]) if row["bytes_per_second"] else ""
            yield f"| {row['unit']} | {row['name']} | {row['state'] or ''} | {nbytes_text(row['nbytes'])} | {seconds_text(row['seconds_median'])} | {rate} | {share} | {against} |"
        yield ""
    if absent := host.complaints():
        yield from ("## Not there", "", *(f"- {line}" for line in absent), "")


def _outcomes(folder: Folder, plan: Plan) -> Iterator[str]:
    yield from ("## Units", "", "| unit | outcome | seconds | began (UTC) | code |", "|---|---|---:|---|---|")
    for unit in plan.units:
        entry = folder.entries.get(unit.key)
        if entry is None:
            yield f"| {unit.key} | not run yet | | | |"
        else:
            code = f" with code {entry.rc}" if entry.status == "failed" else ""
            yield f"| {unit.key} | {entry.status}{code} | {entry.seconds:.1f} | {entry.started} | {entry.code} |"
    for key, reason in plan.skipped.items():
        yield f"| {key} | skipped: {reason} | | | |"
    yield ""
    if left_out := [f"- {key}: {entry['name']}: {entry['reason']}" for key, entry in _skipped_inside(folder)]:
        yield from ("## Skipped by the benches themselves", "", *left_out, "")


def _skipped_inside(folder: Folder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, _, document in folder.result_documents():
        skipped = document.get("skipped")
        for entry in skipped if isinstance(skipped, list) else ():
            if isinstance(entry, Mapping) and {"name", "reason"} <= entry.keys():
                yield key, entry


def _limits(folder: Folder) -> Iterator[str]:
    found = [(key, name, value) for key, _, document in folder.result_documents() for name, value in _items(document.get("limits"))]
    if found:
        yield from ("## Limits", "", "| measured by | limit | value |", "|---|---|---:|")
        for key, name, value in found:
            text = rate_text(value) if name.endswith("bytes_per_second") else f"{value:g}"
            yield f"| {key} | {name} | {text} |"
        yield ""


def _items(limits: object) -> Iterator[tuple[str, float]]:
    if isinstance(limits, Mapping):
        yield from ((str(name), float(value)) for name, value in limits.items() if isinstance(value, int | float))
