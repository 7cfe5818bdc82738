"""`bench overlap` as one call: serial and overlapped first tokens, and load and prefill alone, in one interleaved run.

Every start begins with the checkpoint out of the page cache and memory that the host has backed. In each round
the load is measured once, and for each prompt the three others, in a shuffled order that a seed fixes; ratios are taken within a round.
Both ways must give the same first token. Costs the model's disk space where it has to be made, and one load per start.
Call from one thread. Shown in chapter 04.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint, open_checkpoint
from sllm_mini.device.cpu import cpu_count
from sllm_mini.errors import ModelError
from sllm_mini.lab.bench.conditions import back_memory, make_cold
from sllm_mini.lab.bench.prepare import Files, flush, write_format
from sllm_mini.lab.bench.workload import find_model
from sllm_mini.lab.models import fitting_shape, workspace
from sllm_mini.lab.overlap.document import Series, assemble
from sllm_mini.lab.overlap.start import MODES, Mode, Sample, Start, layers_of, record_start, time_start
from sllm_mini.loading.probe import measure_machine

SHORT_TOKENS = 8
_BACKED_SHARE = 1.1
_TRIAL_TOKENS = 32
_FIRST_ID = 3
"""Prompts count upwards from it: what the tokens are does not change how long they take."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `tokens`: prompt lengths (empty: a short one, and the one whose prefill takes as long as the load,
    where overlap can gain most). `threads`: how many compute on a processor (None: torch's own choice, which is all of
    them, so that a load has none to itself). `seed` fixes the order. Raises ValueError for what measures nothing."""

    rounds: int = 5
    tokens: tuple[int, ...] = ()
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"{self.rounds} rounds measure nothing; ask for at least 1")
        if any(count < 1 for count in self.tokens):
            raise ValueError("a prompt has at least 1 token")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"{self.threads} threads compute nothing; ask for at least 1")


def measure_overlap(
    model: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    folder: str | os.PathLike[str] | None = None,
    keep: bool = False,
    command: Sequence[str] = (),
    on_stage: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[Start]]:
    """Measures one model; returns the document (see `document`) and, of the last prompt, a recorded start of each way.

    `model`: a checkpoint of ours, a Hugging Face directory, a published shape, or None for the largest shape that fits.
    `folder`: where files are prepared (None: `bench/` in the chapters' workspace); what was made there is deleted at
    the end unless `keep`. Raises CheckpointError for an unknown model, UnsupportedError where nothing can be cold or the
    model cannot run while it loads, ModelError where the two ways disagree or a prompt is too long.
    """
    options = options or Options()
    root = Path(folder) if folder is not None else workspace() / "bench"
    say = on_stage or (lambda _: None)
    name = os.fspath(model) if model is not None else fitting_shape(workspace(), on_gpu=options.device != "cpu")
    with prepared_checkpoint(name, root, keep, say) as (checkpoint, weights):
        bench = _Bench(checkpoint, options, say)
        with _threads(options.threads) as threads:
            series = bench.run()
            say("recording one start of each way")
            starts = [bench.record(mode, series[-1].tokens) for mode in MODES[:2]]
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command) or [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(measure_machine(checkpoint.path)),
            "model": {"name": Path(name).name, "tensor_count": len(checkpoint.index.tensors), "nbytes": checkpoint.nbytes, "weights": weights},
            "method": {
                "device": options.device, "rounds": options.rounds, "states": ["cold"], "memory": "backed", "seed": options.seed,
                "threads": threads, "not_timed": "imports, the tokenizer, and one first start of each kind",
            },
        }  # fmt: skip
    return assemble(series, layers_of(checkpoint), device=options.device, cores=cpu_count(), facts=facts), starts


@contextmanager
def prepared_checkpoint(name: str, root: Path, keep: bool, say: Callable[[str], None]) -> Iterator[tuple[Checkpoint, str]]:
    """The checkpoint that a name means, and what its weights are."""
    if (Path(name) / "index.json").exists():
        yield open_checkpoint(name), "the checkpoint's own"
        return
    root.mkdir(parents=True, exist_ok=True)
    say(f"finding {name}")
    found = find_model(name, root)
    files = Files(found.folder, found.files, root / f"{found.name}-formats", write_format)
    try:
        say("writing the checkpoint")
        files.make("sllm")
        yield open_checkpoint(files.path("sllm")), found.weights
    finally:
        if not keep:
            files.close()
            if found.made:
                shutil.rmtree(found.folder, ignore_errors=True)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Lets torch compute on `count` threads meanwhile; gives the number that it does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class _Bench:
    def __init__(self, checkpoint: Checkpoint, options: Options, say: Callable[[str], None]) -> None:
        self.checkpoint, self.options, self.say = checkpoint, options, say

    def run(self) -> list[Series]:
        self.say("a first start of each kind, untimed")
        first = self.options.tokens[-1] if self.options.tokens else _TRIAL_TOKENS
        for mode in MODES:
            self._sample(mode, first)
        wanted = dict.fromkeys(self.options.tokens, "asked for")
        if not wanted:
            wanted, balanced = {SHORT_TOKENS: "short"}, self._balanced()
            if balanced > SHORT_TOKENS:  # else the prefill takes longer than the load, however short the prompt
                wanted[balanced] = "prefill about as long as the load"
        shares = {count: self.record("serial", count).compute_seconds() for count in wanted}
        found: dict[tuple[int, Mode], dict[int, Sample]] = {(count, mode): {} for count in wanted for mode in MODES if mode != "load"}
        loads: dict[int, Sample] = {}
        steps: list[tuple[int, Mode]] = [*found, (1, "load")]
        generator = random.Random(self.options.seed)
        for number in range(self.options.rounds):
            for step, (count, mode) in enumerate(generator.sample(steps, len(steps)), 1):
                self.say(f"round {number + 1} of {self.options.rounds}: {mode}, {count} tokens ({step} of {len(steps)})")
                (loads if mode == "load" else found[count, mode])[number] = self._sample(mode, count)
            for count in wanted:
                tokens = {found[count, mode][number].token_id for mode in MODES if mode != "load"}
                if len(tokens) > 1:
                    raise ModelError(f"{self.checkpoint.path}: the first token differs between the ways to run it ({tokens}); verify the checkpoint")
        return [Series(count, why, shares[count], {mode: loads if mode == "load" else found[count, mode] for mode in MODES}) for count, why in wanted.items()]

    def record(self, mode: Mode, count: int) -> Start:
        make_state(self.checkpoint, self.options.device)
        return record_start(self.checkpoint, mode, prompt_of(count), self.options.device)

    def _balanced(self) -> int:
        """The length of a prompt whose prefill takes as long as the load, found by trying twice."""
        self.say("finding the prompt whose prefill takes as long as the load")
        load = statistics.median(self._sample("load", 1).seconds for _ in range(3))
        count = _TRIAL_TOKENS
        for _ in range(2):
            prefill = statistics.median(self._sample("prefill", count).seconds for _ in range(2))
            count = max(1, min(round(count * load / prefill), self._longest()))
        return count

    def _longest(self) -> int:
        config = json.loads(self.checkpoint.read_companion("config.json"))
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048) - 1

    def _sample(self, mode: Mode, count: int) -> Sample:
        make_state(self.checkpoint, self.options.device)
        return time_start(self.checkpoint, mode, prompt_of(count), self.options.device)


def make_state(checkpoint: Checkpoint, device: str) -> None:
    """A checkpoint out of the page cache, and memory for it that the host has backed. Raises what `make_cold` raises."""
    paths = [checkpoint.path / partition.file for partition in checkpoint.index.partitions]
    flush(paths)  # what was only just written could not leave the page cache
    make_cold(paths)
    if device == "cpu":
        back_memory(int(checkpoint.nbytes * _BACKED_SHARE))


def prompt_of(count: int) -> list[int]:
    """The token ids that every start of this bench begins with."""
    return [_FIRST_ID + number % 64 for number in range(count)]
