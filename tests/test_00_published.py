"""Chapter 00: published shapes go from make-model through convert to generate, token for token as transformers does.

One small shape in every run; the others with --slow, each only where memory and disk have room for it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sllm_mini.checkpoint.shapes import SHAPES
from sllm_mini.cli.main import main
from sllm_mini.device.cpu import available_nbytes

SMALL = "opt-125m"
PROMPT = "Once upon a time there was a"
NTOKENS = 8


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: pytest keeps folders until the end, and these fill a disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def need(nbytes: int, folder: Path) -> None:
    """Twice the model on disk, once and a half in memory (and twice at most four bytes a parameter on a CPU)."""
    if shutil.disk_usage(folder).free < 2.2 * nbytes or available_nbytes() < 1.4 * nbytes:
        pytest.skip(f"{nbytes / 1e9:.0f} GB of weights do not fit on this machine")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code in (0, None)
    return json.loads(capsys.readouterr().out)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == SMALL else pytest.mark.slow) for name in SHAPES])
def test_a_published_shape_generates_what_transformers_generates(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    need(SHAPES[name].nbytes, tmp_path)
    run(capsys, "make-model", name, str(tmp_path / "hf"))
    run(capsys, "convert", str(tmp_path / "hf"), str(tmp_path / "c"))
    ours = run(capsys, "generate", str(tmp_path / "c"), "--prompt", PROMPT, "--max-new-tokens", str(NTOKENS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        theirs = model.generate(**inputs, max_new_tokens=NTOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours["token_ids"] == theirs
    assert ours["text"] == tokenizer.decode(theirs, skip_special_tokens=True)


_CONVERT = """
import sys, threading, psutil, time
from sllm_mini.checkpoint import convert_checkpoint
process, peak, stop = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not stop.is_set():
        memory = process.memory_info()
        peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.005)
base = process.memory_info()
watcher = threading.Thread(target=watch); watcher.start()
convert_checkpoint(sys.argv[1], sys.argv[2])
stop.set(); watcher.join()
print(peak - (base.rss - base.shared))
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [SMALL, pytest.param("opt-6.7b", marks=pytest.mark.slow)])
def test_converting_takes_memory_that_does_not_grow_with_the_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need(SHAPES[name].nbytes, tmp_path)
    run(capsys, "make-model", name, str(tmp_path / "hf"))
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _CONVERT, str(tmp_path / "hf"), str(tmp_path / "c")], capture_output=True, text=True, check=True)
    grown = int(done.stdout)
    with capsys.disabled():
        print(f"\n{name}: {SHAPES[name].nbytes / 1e9:.1f} GB converted in {time.monotonic() - started:.1f} s, memory grew by {grown / 1e6:.0f} MB")
    assert grown < min(500e6, 0.9 * SHAPES[name].nbytes)
