"""Ways to answer the same requests with the same model, each as a call that can be timed. Shown in chapter 07.

Greedy, past every end-of-text token, no tokenizer. Each variant loads the same checkpoint for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from sllm_mini.checkpoint import Checkpoint
from sllm_mini.errors import ModelError
from sllm_mini.inference import Engine
from sllm_mini.lab.decode.workload import Workload
from sllm_mini.loading import load_model

Variant = Literal["sllm_mini", "own kernel", "generate", "continuous batching"]
VARIANTS: tuple[Variant, ...] = ("sllm_mini", "own kernel", "generate", "continuous batching")
LABELS = {
    "sllm_mini": "sllm_mini", "own kernel": "sllm_mini, its own attention", "generate": "transformers, generate",
    "continuous batching": "transformers, continuous batching",
}  # fmt: skip

Answers = list[list[int]]
"""The new tokens of each request, in the requests' order."""
Run = Callable[[Workload], Answers]

_PAGE_TOKENS = 256
_WAIT_SECONDS = 120.0


@contextmanager
def opened(variant: Variant, checkpoint: Checkpoint, device: str, dtype: str, largest: Workload) -> Iterator[Run]:
    """The variant, its model loaded and computing in `dtype`, ready for any workload of at most as many tokens as `largest`; closed at the end."""
    import torch

    model = load_model(checkpoint, device).to(getattr(torch, dtype))
    if variant in ("sllm_mini", "own kernel"):
        yield _ours(Engine(model, max_batch=len(largest.requests), decode_kernel=variant == "own kernel"))
    elif variant == "generate":
        yield _generate(model)
    else:
        with _continuous(model, largest) as run:
            yield run


def _ours(engine: Engine) -> Run:
    def run(workload: Workload) -> Answers:
        generations = [engine.submit(list(one.prompt), max_new_tokens=one.new_tokens, stop_at_eos=False) for one in workload.requests]
        while engine.step():
            pass
        return [generation.token_ids[generation.prompt_length :] for generation in generations]

    return run


def _generate(model: Any) -> Run:
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # it would lend its end of text to a call that names none

    def run(workload: Workload) -> Answers:
        """One static batch: prompts padded on the left, and all go on until the longest answer is there."""
        longest = max(len(one.prompt) for one in workload.requests)
        padding = [longest - len(one.prompt) for one in workload.requests]
        ids = torch.tensor([[0] * pad + list(one.prompt) for pad, one in zip(padding, workload.requests, strict=True)], device=model.device)
        mask = torch.tensor([[0] * pad + [1] * len(one.prompt) for pad, one in zip(padding, workload.requests, strict=True)], device=model.device)
        steps = max(one.new_tokens for one in workload.requests)
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)).tolist()
        return [row[longest : longest + one.new_tokens] for row, one in zip(made, workload.requests, strict=True)]

    return run


@contextmanager
def _continuous(model: Any, largest: Workload) -> Iterator[Run]:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    endless = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it says of our answers without an end that they have none
    tokens = sum(len(one.prompt) + one.new_tokens for one in largest.requests)
    batch = len(largest.requests)
    config = ContinuousBatchingConfig(page_size=_PAGE_TOKENS, num_blocks=tokens // _PAGE_TOKENS + 2 * batch, max_batch_tokens=tokens, max_requests_per_batch=batch)
    with model.continuous_batching_context_manager(generation_config=endless, continuous_batching_config=config) as manager:

        def run(workload: Workload) -> Answers:
            names = [manager.add_request(list(one.prompt), max_new_tokens=one.new_tokens) for one in workload.requests]
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=_WAIT_SECONDS)
                if result is None or result.error:
                    raise ModelError(f"transformers' continuous batching gave no answer ({result.error if result else 'none in time'}); leave it out with --only")
                if result.is_finished():
                    done[result.request_id] = list(result.generated_tokens)
            return [done[name] for name in names]

        yield run
