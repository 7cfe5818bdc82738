"""`bench decode` as one call: several ways to answer the same requests, interleaved. Call from one thread. Shown in chapter 07.

Each way has a process of its own (see `process`); models are resident and each way has answered once before anything is
timed. In each round every workload is answered once by every way, in a shuffled order that a seed fixes, and never two at
a time. Costs the model's memory once per way and once here.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.checkpoint.shapes import SHAPES
from sllm_mini.device import get_device
from sllm_mini.errors import CheckpointError
from sllm_mini.lab.bench.checksum import sum_tensors
from sllm_mini.lab.decode.document import OURS, assemble
from sllm_mini.lab.decode.process import WayProcess
from sllm_mini.lab.decode.variants import VARIANTS, Answers, Variant
from sllm_mini.lab.decode.workload import workloads
from sllm_mini.lab.models import workspace
from sllm_mini.lab.overlap.measure import prepared_checkpoint
from sllm_mini.loading import load_tensors
from sllm_mini.loading.probe import measure_machine

DEFAULT_MODEL = "opt-125m"
_READS = 3
"""How often each round reads all weights: the least of them is the floor."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure. `batches`: how many requests at once. `dtype`: what is computed in; None: what the weights are stored in, but
    bfloat16 for float16 on a CPU, which few can multiply (one that converts every product takes as long per token whatever the
    engine does). Raises ValueError for what measures nothing."""

    rounds: int = 5
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 64
    new_tokens: int = 64
    device: str = "cpu"
    dtype: str | None = None
    only: tuple[Variant, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype}; it must be float16, bfloat16 or float32")
        if not self.batches or min(self.batches) < 1:
            raise ValueError("a batch has at least one request")


def measure_decode(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    options: Options | None = None,
    folder: str | os.PathLike[str] | None = None,
    keep: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measures one model; returns the document (see `document`).

    `model`: a checkpoint of ours, a Hugging Face directory or a published shape; `folder` and `keep` as for
    `measure_overlap`. Raises CheckpointError for an unknown model and for one without a configuration, before anything is made,
    and ModelError where a way gives no answer.
    """
    options = options or Options()
    _check_model(os.fspath(model))
    root = Path(folder) if folder is not None else workspace() / "bench"
    say = on_stage or (lambda _: None)
    with prepared_checkpoint(os.fspath(model), root, keep, say) as (checkpoint, weights):
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "machine": asdict(measure_machine(checkpoint.path)),
            "model": {"name": Path(model).name, "tensor_count": len(checkpoint.index.tensors), "nbytes": checkpoint.nbytes, "weights": weights},
            "method": {
                "device": options.device, "dtype": computed_dtype(checkpoint, options), "rounds": options.rounds, "batches": list(options.batches), "prompt_tokens": options.prompt_tokens,
                "new_tokens": options.new_tokens, "seed": options.seed, "sampling": "greedy, past every end of text",
                "not_timed": "the load, and one answer of each way to each workload", "processes": "one for each way, one answering at a time",
            },
        }  # fmt: skip
        return _run(checkpoint, options, facts, say)


def _check_model(name: str) -> None:
    """Raises CheckpointError for what is no model that can answer: weights alone, such as the benches' "small", are none."""
    if not Path(name).is_dir():
        if name not in SHAPES:
            raise CheckpointError(f"it is no directory, and no model that can answer has that name; name a checkpoint, a Hugging Face directory, or one of {', '.join(SHAPES)}", path=name)
    elif not (Path(name) / "config.json").is_file():
        raise CheckpointError("it holds no config.json, without which nobody knows what to compute; put the model's own there", path=name)


def computed_dtype(checkpoint: Checkpoint, options: Options) -> str:
    """What is computed in."""
    if options.dtype is not None:
        return options.dtype
    stored = Counter(tensor.dtype for tensor in checkpoint.index.tensors).most_common(1)[0][0]
    return "bfloat16" if stored == "float16" and get_device(options.device).is_host else stored


def _run(checkpoint: Checkpoint, options: Options, facts: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    import torch

    loads = workloads(options.batches, options.prompt_tokens, options.new_tokens, options.seed)
    device = get_device(options.device)
    there: Sequence[Variant] = [variant for variant in VARIANTS if variant != "own kernel" or not device.is_host]
    chosen: Sequence[Variant] = [variant for variant in there if variant == OURS or variant in (options.only or there)]
    dtype = facts["method"]["dtype"]
    with ExitStack() as stack:
        runs: dict[Variant, WayProcess] = {}
        for variant in chosen:
            say(f"loading for {variant}")
            runs[variant] = stack.enter_context(WayProcess(variant, str(checkpoint.path), options.device, dtype, loads))
            runs[variant].ready()
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_tensors(checkpoint, options.device).items()}
        sum_tensors(weights.values())  # untimed: the first starts threads and touches pages
        first: dict[tuple[str, Variant], Answers] = {}
        for number, load in enumerate(loads):
            for variant in chosen:
                say(f"a first answer, untimed: {variant}, {load.name}")
                first[load.name, variant] = runs[variant](number)[1]
        samples: dict[tuple[str, Variant], list[float]] = {key: [] for key in first}
        reads: list[float] = []
        numbers = {load.name: number for number, load in enumerate(loads)}
        generator = random.Random(options.seed)
        for number in range(options.rounds):
            for name, variant in generator.sample(list(samples), len(samples)):
                say(f"round {number + 1} of {options.rounds}: {variant}, {name}")
                samples[name, variant].append(runs[variant](numbers[name])[0])
            for _ in range(_READS):
                started = time.monotonic()
                sum_tensors(weights.values())
                reads.append(time.monotonic() - started)
    same = {(name, variant): _same_share(answers, first[name, OURS]) for (name, variant), answers in first.items()}
    return assemble(loads, samples, same, reads, facts)


def _same_share(answers: Answers, ours: Answers) -> float:
    """Of all new tokens, those before the first that differs, request by request: after a tie two answers go apart for good."""
    same = 0
    for answer, own in zip(answers, ours, strict=True):
        same += next((place for place, (a, b) in enumerate(zip(answer, own, strict=True)) if a != b), len(own))
    return same / sum(map(len, ours))
