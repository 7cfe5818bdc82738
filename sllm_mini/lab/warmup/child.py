"""One thing measured in a fresh process, where it really happens for the first time.

Imports are not timed. Run by `measure`, chapter 06.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    from sllm_mini.device.base import Device

Answer = dict[str, Any]
_AGAIN = 5
_PROMPT = "Once upon a time there was a little girl who lived by the sea"
_PARALLEL = "parallel loop"
_HEAP_NBYTES = 16 << 20
"""Asked for before the clock starts and untouched until the first call, so that its page faults are that call's."""


def first_call(what: str, path: str) -> Answer:
    """The seconds of the first call of one kind in this process and of five more."""
    if what != _PARALLEL:
        one_thread()
    call = _CALLS[what](path)
    seconds = [seconds_of(call) for _ in range(1 + _AGAIN)]
    return {"first_seconds": seconds[0], "again_seconds": seconds[1:]}


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_thread() -> None:
    """A thread that is waited for is not what is asked, and on a busy machine it would be most of what is seen."""
    import torch

    torch.set_num_threads(1)


def _tokenizer(path: str) -> Callable[[], object]:
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.inference import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(path))
    return lambda: tokenizer(_PROMPT)


def _matmul(dtype: str) -> Callable[[str], Callable[[], object]]:
    def make(path: str) -> Callable[[], object]:
        import torch

        weight = torch.ones(512, 512, dtype=getattr(torch, dtype))
        row = torch.ones(1, 512, dtype=weight.dtype)
        return lambda: torch.nn.functional.linear(row, weight)

    return make


def _loop(path: str) -> Callable[[], object]:
    import numpy
    import torch

    numbers = torch.from_numpy(numpy.ones(1 << 17, numpy.float32))  # torch.ones would start the threads already
    return lambda: numbers.add_(1.0)


def _memory(path: str) -> Callable[[], object]:
    import torch

    memory = torch.empty(_HEAP_NBYTES // 4)
    return lambda: memory.fill_(1.0)


def _prefill(path: str) -> Callable[[], object]:
    from sllm_mini.inference import Engine

    engine = Engine.load(path)
    ids = engine.encode(_PROMPT)
    return lambda: next(engine.generate(ids, max_new_tokens=1, stop_at_eos=False))


def _decode(path: str) -> Callable[[], object]:
    from sllm_mini.inference import Engine

    engine = Engine.load(path)
    generation = engine.generate(engine.encode(_PROMPT), max_new_tokens=2 + _AGAIN, stop_at_eos=False)
    next(generation)  # the prefill
    return lambda: next(generation)


_CALLS: dict[str, Callable[[str], Callable[[], object]]] = {
    "tokenizer": _tokenizer,
    "matrix product, float32": _matmul("float32"),
    "matrix product, bfloat16": _matmul("bfloat16"),
    _PARALLEL: _loop,
    "16 MiB of memory": _memory,
    "prefill": _prefill,
    "decode step after a prefill": _decode,
}
FIRST_CALLS = tuple(_CALLS)


def compile_step(layers: int) -> Answer:
    """A decode step of a small random Llama: eager, then through `torch.compile`, whose cache the environment names."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

    one_thread()
    config = LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2, head_dim=32, vocab_size=1024, max_position_embeddings=256
    )  # fmt: skip
    torch.manual_seed(0)
    model, cache = AutoModelForCausalLM.from_config(config).eval(), StaticCache(config=config, max_cache_len=128)
    ids, position, mask = torch.tensor([[3]]), torch.tensor([[5]]), torch.ones(1, 1, 1, 128, dtype=torch.bool)

    def step() -> torch.Tensor:
        return model(input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    compiled = torch.compile(step, dynamic=False)
    with torch.inference_mode():
        for _ in range(3):
            expected = step()
        started = time.perf_counter()
        found = compiled()
        first = time.perf_counter() - started
        compiled()  # the first run without a guard to be made
        eager_seconds, compiled_seconds = _interleaved(step, compiled)
    return {
        "first_seconds": first,
        "eager_seconds": eager_seconds,
        "compiled_seconds": compiled_seconds,
        "largest_difference": float((found - expected).abs().max()),
    }


def _interleaved(*works: Callable[[], object], rounds: int = 30) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for found, work in zip(samples, works, strict=True):
            found.append(seconds_of(work))
    return samples


def kernel_state(state: str, ahead: str, cache: str, head_dim: int, group: int, device: str, architecture: str) -> Answer:
    """How decode attention's kernel is come by in one state; on a GPU also loaded, else only the machine code is found."""
    from sllm_mini.device.kernels_image import STATES, KernelFolders, Recipe, find_image
    from sllm_mini.inference.attention import SOURCE, AttentionShape
    from sllm_mini.resources import resource

    folders = KernelFolders((Path(ahead),), Path(cache))
    options, allowed = AttentionShape(head_dim, group, "bfloat16").options, [one for one in STATES if one == state]
    source = resource("csrc") / SOURCE
    if device != "cpu":
        from sllm_mini.device.cuda import cuda_device
        from sllm_mini.device.kernels import Kernels

        gpu = cuda_device()
        gpu.synchronize()  # the context is there before the clock starts
        kernels = Kernels(gpu, source, options, folders=folders, allowed=allowed)
        kernels["decode_attention"]
        if kernels.start is None:
            raise RuntimeError("a kernel was found and nobody says how")
        return {"state": kernels.start.state, "seconds": kernels.start.seconds, "image_nbytes": kernels.start.nbytes}
    from sllm_mini.device.cuda import CupyToolkit

    compiler = CupyToolkit().compiler  # cupy's import is part of the runtime, not of the kernel
    image = find_image(Recipe.of(source, options, architecture), folders, compiler, allowed=allowed)
    return {"state": image.state, "seconds": image.seconds, "image_nbytes": len(image.data)}


def first_request(path: str, dummy: bool) -> Answer:
    """Seconds to the first token of a model that never ran, or ran one dummy request; then of the same request again."""
    from sllm_mini.inference import Engine

    one_thread()
    engine = Engine.load(path)
    ids = engine.encode(_PROMPT)

    def request() -> tuple[float, float, list[int]]:
        started, seconds, tokens = time.perf_counter(), [], []
        for piece in engine.generate(ids, max_new_tokens=3, stop_at_eos=False):
            seconds.append(time.perf_counter() - started)
            tokens.append(piece.token_id)
        return seconds[0], seconds[-1], tokens

    dummy_seconds = sum(request()[1] for _ in range(dummy))
    (first, _, tokens), (again, _, same) = request(), request()
    if tokens != same:
        raise RuntimeError("the same request gave other tokens the second time")
    return {"dummy_seconds": dummy_seconds, "first_seconds": first, "again_seconds": again, "token_ids": tokens}


def memory_profile(path: str, folder: str, device: str, max_batch: int, max_tokens: int) -> Answer:
    """What a start spends on knowing how much memory a step needs: a trial, or the record of one."""
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.device import get_device
    from sllm_mini.inference.warmup import ProfileKey, find_profile
    from sllm_mini.loading import load_model

    target, checkpoint = get_device(device), open_checkpoint(path)
    model = load_model(checkpoint, target)
    key = ProfileKey.of(f"{checkpoint.path.name} {checkpoint.nbytes}", target, str(model.dtype), max_batch=max_batch, max_tokens=max_tokens)
    found = find_profile(key, folder, model, target)
    return {"state": found.state, "seconds": found.seconds, "step_nbytes": found.profile.step_nbytes, "kv_nbytes_per_token": found.profile.kv_nbytes_per_token}


def attention(device: str, rows: int, tokens: int) -> Answer:
    """Decode attention of one layer of Llama-3.1-8B's shape in bfloat16, by our kernel and by torch's SDPA."""
    from sllm_mini.device import get_device

    return time_attention(get_device(device), device, rows, tokens)


def time_attention(target: Device, place: str, rows: int, tokens: int, *, kv_heads: int = 8, group: int = 4, head_dim: int = 128, rounds: int = 50) -> Answer:
    """See `attention`; tensors are on torch's device `place`. Rows have unlike lengths up to `tokens`, as in a batch, so SDPA
    gets a mask. `largest_difference` is from SDPA in float64, `sdpa_difference` SDPA's own in bfloat16."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from sllm_mini.inference.attention import AttentionShape, DecodeAttention

    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, heads, length, head_dim, generator=generator).to(place, torch.bfloat16) for heads, length in ((kv_heads * group, 1), (kv_heads, tokens), (kv_heads, tokens))]
    query, keys, values = made
    lengths = torch.linspace(tokens / 2, tokens, rows, device=place).to(torch.int32)
    mask = (torch.arange(tokens, device=place) < lengths[:, None])[:, None, None]
    kernel = DecodeAttention(target, AttentionShape(head_dim, group, "bfloat16"))

    def ours() -> torch.Tensor:
        return kernel(query[:, :, 0], keys, values, lengths, longest=tokens)

    def theirs() -> torch.Tensor:
        return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)[:, :, 0]

    def timed(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            target.synchronize()

        return run

    exact = sdpa(query.double(), keys.double(), values.double(), attn_mask=mask, enable_gqa=True)[:, :, 0]
    differences = [float((found().double() - exact).abs().max()) for found in (ours, theirs)]
    own_seconds, sdpa_seconds = _interleaved(timed(ours), timed(theirs), rounds=rounds)
    nbytes = 2 * int(lengths.sum()) * kv_heads * head_dim * 2
    return {"own_seconds": own_seconds, "sdpa_seconds": sdpa_seconds, "nbytes": nbytes, "largest_difference": differences[0], "sdpa_difference": differences[1]}


def graphs(path: str, mode: str, max_batch: int, capacity: int, device: str, kernel: bool) -> Answer:
    """Decode steps of every batch size: the seconds before the first step, of the first step of each size, and of later ones."""
    import torch

    from sllm_mini.device import get_device
    from sllm_mini.inference.attention import use_decode_attention
    from sllm_mini.inference.graphs import DecodeSteps
    from sllm_mini.loading import load_model

    target, model = get_device(device), load_model(path, device)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (max_batch, getattr(config, "num_key_value_heads", None) or config.num_attention_heads, capacity, head_dim)
    keys, values = ([torch.zeros(shape, dtype=model.dtype, device=target.name) for _ in range(config.num_hidden_layers)] for _ in range(2))
    attention = use_decode_attention(model, target) if kernel else None
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 8), dtype=torch.int64, device=target.name))  # libraries make their handles
    target.synchronize()
    started = time.perf_counter()
    steps = DecodeSteps(model, keys, values, device=target, mode=mode, max_batch=max_batch, attention=attention)  # type: ignore[arg-type]
    target.synchronize()
    before = time.perf_counter() - started
    first, later = [], []
    for batch in range(1, max_batch + 1):
        ids = torch.zeros(batch, dtype=torch.int64, device=target.name)
        lengths = torch.full((batch,), capacity // 2, device=target.name)
        seconds = []
        for _ in range(2 + _AGAIN):
            started = time.perf_counter()
            steps(ids, lengths)
            target.synchronize()
            seconds.append(time.perf_counter() - started)
        first.append(seconds[0])
        later.append(sorted(seconds[1:])[len(seconds[1:]) // 2])
    return {"before_seconds": before, "first_seconds": first, "later_seconds": later, "captures": [[one.batch, one.seconds] for one in steps.captures]}


TASKS: dict[str, Callable[..., Answer]] = {one.__name__: one for one in (first_call, first_request, compile_step, kernel_state, memory_profile, attention, graphs)}


def answer_task(answers: Connection, printed: str, task: str, arguments: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Does one of `TASKS` and sends its answer; what is printed meanwhile goes to the file `printed`, the reason of a failure last."""
    with open(printed, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    answers.send(TASKS[task](**arguments))
