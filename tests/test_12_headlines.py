"""The README's figures come from recorded documents, by a script. Chapter 12."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sllm_mini.errors import FormatError
from sllm_mini.lab import headlines
from sllm_mini.lab.headlines import BEGIN, END, keep, main, table, with_table
from sllm_mini.resources import resource

README = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = resource("data/results")


def saved(folder: Path, **changes: Any) -> Path:
    """A bench of overlap as its command saves it, worked out by hand: 3 s become 2 s."""
    prompt = {"tokens": 8, "serial_over_overlapped_median": 1.5, "serial_over_overlapped_min": 1.25, "serial_over_overlapped_max": 1.75}
    document = {
        "kind": "sllm-mini bench overlap", "date": "2026-11-23T23:59:00+00:00", "command": ["sllm-mini", "bench", "overlap", "/home/somebody/m"],
        "machine": {"processor": "a processor", "cpu_count": 2, "directory": "/home/somebody"}, "model": {"name": "m", "nbytes": 10_000_000},
        "method": {"device": "cpu"}, "prompts": [prompt, {**prompt, "tokens": 9, "serial_over_overlapped_median": 1.1}],
        "results": [{"mode": mode, "tokens": tokens, "seconds_median": seconds} for tokens in (8, 9) for mode, seconds in (("serial", 3.0), ("overlapped", 2.0))],
    }  # fmt: skip
    path = folder / "saved.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def test_the_readme_has_the_table_of_what_is_recorded() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text, table(RESULTS)) == text, "python -m sllm_mini.lab.headlines writes it again"


def test_what_is_recorded_names_no_folder_of_a_machine() -> None:
    for path in RESULTS.rglob("*.json"):
        assert not re.search(r'"/(home|root|tmp|var|work|Users)/', path.read_text(encoding="utf-8")), path


def test_a_saved_document_becomes_a_line(tmp_path: Path) -> None:
    kept = keep(saved(tmp_path), tmp_path / "results" / "cpu")
    assert kept.name == "bench-overlap.json"
    document = json.loads(kept.read_text())
    assert "command" not in document and "somebody" not in kept.read_text() and document["recorded"]["date"] == "2026-11-23"
    lines = table(tmp_path / "results").splitlines()
    assert lines[0] == "On a processor, 2 cores, without a GPU, 2026-11-23; medians, in brackets the least and the most of the rounds:"
    assert lines[-1] == "| first token of a prompt of 8 while m, 10.0 MB loads | 2.00 s | load, then run: x1.50 (1.25–1.75) as long |"
    assert with_table(f"before {BEGIN} old {END} after", "new") == f"before {BEGIN}\nnew\n{END} after"


@pytest.mark.parametrize("changes", [{"kind": "other"}, {"method": None}, {"prompts": []}, {"date": 3}])
def test_what_has_no_headline_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="one without a headline figure"):
        keep(saved(tmp_path, **changes), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_on_a_gpu_is_refused_and_a_document_that_lacks_something_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="measured on cuda"):
        keep(saved(tmp_path, method={"device": "cuda"}), tmp_path / "results")
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    saved(folder, results=[])
    with pytest.raises(FormatError, match="is not there"):
        table(tmp_path / "results")
    with pytest.raises(FormatError, match="not both there"):
        with_table("nothing", "")


def test_a_file_that_is_none_is_one_sentence_and_the_readme_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("as it was")
    monkeypatch.setattr(headlines, "resource", lambda name: tmp_path / name)
    (tmp_path / "text").write_text("no document")
    assert main([str(tmp_path / "text")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and (tmp_path / "README.md").read_text() == "as it was"


def on_a_gpu(folder: Path, name: str, *, nbytes: int | None = None, **changes: Any) -> dict[str, Any]:
    """What this machine recorded, as a report on a GPU would have left it."""
    document = json.loads((RESULTS / "cpu" / f"{name}.json").read_text(encoding="utf-8"))
    document["method"] |= {"device": "cuda"} if "device" in document["method"] else {"cuda": True}
    document |= changes | ({"model": document["model"] | {"name": "large", "nbytes": nbytes}} if nbytes else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{nbytes}-{len(list(folder.iterdir()))}.json").write_text(json.dumps(document))
    return document


def test_of_a_gpus_runs_the_largest_model_is_told_whatever_part_a_unit_measured(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "a-gpu"
    rows = json.loads((RESULTS / "cpu" / "bench-load.json").read_text(encoding="utf-8"))["results"]
    peers = [row for row in rows if row["kind"] == "peer"]
    for state in ("cold", "warm"):
        on_a_gpu(folder, "bench-load", results=[row for row in rows if row["state"] == state])
        on_a_gpu(folder, "bench-load", nbytes=16_000_000_000, results=[row for row in rows if row["state"] == state and row not in peers and "no hashing" not in row["name"]])
    start = on_a_gpu(folder, "bench-start")
    on_a_gpu(folder, "bench-start", nbytes=16_000_000_000, results=[row for row in start["results"] if row["name"] != "transformers serve"])
    for name in ("bench-overlap", "bench-migrate", "bench-serve-overhead"):
        on_a_gpu(folder, name)
    on_a_gpu(folder, "bench-load", nbytes=20_000_000_000, method={"device": "cpu"})
    kernel = {"name": "sum64", "nbytes": 8_000_000_000, "bytes_per_second_median": 4e12, "ratio_to_limit": 0.9}
    stamped = {"kind": "sllm-mini kernels", "machine": {"gpu": "A GPU"}, "method": {"device": "cuda:0"}, "results": [kernel], "recorded": {"date": "2026-01-02"}}
    (folder / "0.json").write_text(json.dumps(stamped))
    lines = table(tmp_path / "results").splitlines()
    assert ", a-gpu, 2026-01-02 to 2026" in lines[0] and "unnamed" not in lines[0]
    told = "\n".join(lines)
    assert "| kernel sum64 over 8.00 GB in the GPU's memory | 4.00 TB/s | 0.90 of the bytes" in told
    assert len([line for line in lines if line.startswith("| load large, 16.0 GB from the ") and "to the GPU" in line and line.endswith("| no peer was there |")]) == 2
    assert "20.0 GB" not in told and "opt-125m from" not in told and told.count("| no peer was there |") == 5


@pytest.mark.parametrize("name", ["bench-start", "bench-serve-overhead"])
def test_no_run_on_a_gpu_is_kept_as_one_without(tmp_path: Path, name: str) -> None:
    on_a_gpu(tmp_path / "saved", name)
    (path,) = (tmp_path / "saved").iterdir()
    with pytest.raises(FormatError, match="measured on cuda"):
        keep(path, tmp_path / "results" / "cpu")
