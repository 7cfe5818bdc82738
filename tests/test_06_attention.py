"""The decode-attention kernel: its own code on the CPU against torch's SDPA in float64, and inside a transformers model.

What it may differ by: `2e-6 * (largest value)` for the sums in float32, and half a unit in the last place of the output's
dtype. A row gives the same bits whatever rows are beside it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import Kernel, compile_for_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.device import CpuDevice, CudaDevice, get_device
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import ModelError, UnsupportedError
from sllm_mini.inference import Engine
from sllm_mini.inference import attention as attention_module
from sllm_mini.inference.attention import (
    AttentionShape,
    DecodeAttention,
    ProductAttention,
    decode_attention_forward,
    decoding,
    use_decode_attention,
    use_product_attention,
)
from sllm_mini.resources import resource

SOURCE = resource("csrc") / "decode_attention.cu"
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHAPES = [
    AttentionShape(64, 1, "bfloat16"),
    AttentionShape(80, 2, "float16"),
    AttentionShape(96, 3, "float32"),
    AttentionShape(128, 4, "bfloat16"),
    AttentionShape(128, 7, "float16"),
    AttentionShape(256, 5, "float32"),
    AttentionShape(8, 2, "bfloat16"),
]
Folder = Callable[[AttentionShape], CudaDevice]


@pytest.fixture(scope="module")
def gpu_for(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The fake GPU that runs the kernel of one shape, chunks of 32 tokens so that short sequences have several."""
    folder = tmp_path_factory.mktemp("attention")

    @cache
    def make(shape: AttentionShape) -> CudaDevice:
        options = tuple(option for option in shape.options if "CHUNK" not in option)
        of = compile_for_cpu(SOURCE, folder, (*options, "-DCHUNK=32"))
        kernels: dict[str, Kernel] = {name: of(name) for name in ("decode_attention", "decode_attention_merge")}
        return RecordingRuntime(kernels=kernels).device()

    return make


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And one thread: work this small only waits for others, on a busy machine for long."""
    monkeypatch.setattr(attention_module, "CHUNK_TOKENS", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slots(shape: AttentionShape, rows: int, kv_heads: int, capacity: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, and keys and values in slots of which the batch has the first `rows`; what no row may read is not a number."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, shape.dtype)
    query = torch.randn(rows, shape.group * kv_heads, shape.head_dim, generator=generator)
    keys, values = (torch.randn(rows + 1, kv_heads, capacity, shape.head_dim, generator=generator) for _ in range(2))
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: int, window: int | None, scale: float | None) -> torch.Tensor:
    """SDPA of one row in float64."""
    first = max(0, length - window) if window else 0
    group = query.shape[0] // keys.shape[0]
    key, value = (one[:, first:length].double().repeat_interleave(group, 0) for one in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query.double()[:, None], key, value, scale=scale)[:, 0]


def check_close(found: torch.Tensor, expected: torch.Tensor, values: torch.Tensor, dtype: str) -> None:
    # A half's smallest steps are 2^-24; below its normal numbers they are what rounding may lose.
    bound = 2e-6 * values.double().abs().max() + HALF_ULP[dtype] * expected.abs() + (2.0**-25 if dtype == "float16" else 0.0)
    assert ((found.double() - expected).abs() <= bound).all(), (found.double() - expected).abs().max()


def check_drawn(gpu_for: Folder, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    kv_heads, window = data.draw(st.integers(1, 2)), data.draw(st.none() | st.integers(1, 160))
    scale = data.draw(st.none() | st.sampled_from([0.05, 0.5]))
    query, keys, values = slots(shape, len(lengths), kv_heads, max(lengths) + data.draw(st.integers(0, 40)), data.draw(st.integers(0, 9)))
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    attend = DecodeAttention(gpu_for(shape), shape)
    longest = max(lengths) + data.draw(st.sampled_from([0, 33]))
    key, value = (one[:, :, :longest] for one in (keys, values))
    longest = key.shape[2]
    found = attend(query, key, value, torch.tensor(lengths, dtype=torch.int32), longest=longest, scale=scale, window=window)
    for row, length in enumerate(lengths):
        check_close(found[row], exact(query[row], keys[row], values[row], length, window, scale), values[row, :, :length], shape.dtype)


@settings(max_examples=25)
@given(data=st.data())
def test_kernel_equals_sdpa_in_float64(gpu_for: Folder, data: st.DataObject) -> None:
    check_drawn(gpu_for, data)


@settings(max_examples=25)
@given(data=st.data())
def test_the_fakes_reference_equals_sdpa_in_float64(data: st.DataObject) -> None:
    check_drawn(lambda _: RecordingRuntime().device(), data)


@pytest.mark.slow
@settings(max_examples=1000)
@given(data=st.data())
def test_kernel_equals_sdpa_in_float64_long_form(gpu_for: Folder, data: st.DataObject) -> None:
    check_drawn(gpu_for, data)


def test_a_row_gives_the_same_bits_in_any_company(gpu_for: Folder) -> None:
    shape = SHAPES[3]
    query, keys, values = slots(shape, 3, 2, 160, 1)
    attend, lengths = DecodeAttention(gpu_for(shape), shape), torch.tensor([100, 7, 131], dtype=torch.int32)
    together = attend(query, keys[:3], values[:3], lengths, longest=160)
    for row, length in enumerate(lengths.tolist()):
        alone = attend(query[row : row + 1], keys[row : row + 1, :, :length], values[row : row + 1, :, :length], lengths[row : row + 1], longest=length)
        assert torch.equal(alone[0], together[row])


def test_large_scores_do_not_overflow_and_no_tokens_give_zeros(gpu_for: Folder) -> None:
    shape = SHAPES[2]
    query, keys, values = slots(shape, 2, 1, 70, 2)
    query *= 1000
    attend = DecodeAttention(gpu_for(shape), shape)
    found = attend(query, keys[:2], values[:2], torch.tensor([70, 0], dtype=torch.int32), longest=70)
    assert torch.isfinite(found).all() and torch.equal(found[1], torch.zeros_like(found[1]))
    # Scores of thousands are rounded by some 1e-3 themselves, and the weights with them.
    assert (found[0] - exact(query[0], keys[0], values[0], 70, None, None)).abs().max() < 2e-2


def test_what_cut_off_keys_mean(gpu_for: Folder) -> None:
    """A sliding window's layer may hand over its newest tokens only; the kernel finds their places in the slot."""
    shape, window = SHAPES[0], 40
    query, keys, values = slots(shape, 2, 2, 128, 3)
    attend, lengths = DecodeAttention(gpu_for(shape), shape), torch.tensor([100, 100], dtype=torch.int32)
    whole = attend(query, keys[:2, :, :100], values[:2, :, :100], lengths, longest=100, window=window)
    cut = attend(query, keys[:2, :, 60:100], values[:2, :, 60:100], lengths, longest=100, window=window)
    assert torch.equal(whole, cut)


@pytest.mark.parametrize(
    ("shape", "why"), [(AttentionShape(100, 1, "bfloat16"), "vectors"), (AttentionShape(264, 1, "float32"), "up to 256"), (AttentionShape(64, 1, "float64"), "float64")]
)
def test_shapes_without_a_kernel_are_refused(shape: AttentionShape, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        DecodeAttention(RecordingRuntime().device(), shape)
    with pytest.raises(UnsupportedError, match="cpu runs none"):
        DecodeAttention(CpuDevice(), SHAPES[0])


def test_shapes_of_configurations() -> None:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    assert AttentionShape.of_config(LlamaConfig(hidden_size=256, num_attention_heads=8, num_key_value_heads=2), "torch.bfloat16") == AttentionShape(32, 4, "bfloat16")
    assert AttentionShape.of_config(GPT2Config(n_embd=768, n_head=12), "float16") == AttentionShape(64, 1, "float16")
    assert AttentionShape.of_config(Qwen3Config(head_dim=128, num_attention_heads=6, num_key_value_heads=6), "float32").head_dim == 128
    assert [AttentionShape(64, group, "bfloat16").queries for group in (1, 2, 3, 4, 5, 6, 7, 8, 12)] == [1, 2, 3, 4, 3, 3, 4, 4, 4]
    with pytest.raises(ModelError, match="names no attention heads"):
        AttentionShape.of_config(object())


def tiny(**changes: Any) -> Any:
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=61, max_position_embeddings=256,
        **{"sliding_window": None, **changes},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("window", [None, 20])
def test_a_model_decodes_by_the_kernel_as_by_sdpa(gpu_for: Folder, window: int | None) -> None:
    from transformers import DynamicCache

    model = tiny(sliding_window=window)
    shape = AttentionShape.of_config(model.config, "float32")
    device = gpu_for(shape)
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).logits
        attention = use_decode_attention(model, device)
        before = device.toolkit.runtime.names().count("launch")  # type: ignore[attr-defined]
        launches = lambda: device.toolkit.runtime.names().count("launch") - before  # type: ignore[attr-defined]  # noqa: E731
        cache = DynamicCache(config=model.config)
        assert (model(tokens[:, :30], past_key_values=cache).logits - expected[:, :30]).abs().max() < 1e-5
        assert not launches(), "a prefill is SDPA's"
        for at in range(30, 40):
            with decoding(attention, torch.tensor([at + 1] * 2, dtype=torch.int32), at + 1):
                logits = model(tokens[:, at : at + 1], past_key_values=cache).logits
            assert (logits[:, 0] - expected[:, at]).abs().max() < 1e-5
            assert launches() == (at - 29) * 2 * 2
        model(tokens[:, :1], past_key_values=cache)  # outside of `decoding`
    assert launches() == 10 * 2 * 2


@pytest.mark.parametrize("window", [None, 20])
def test_an_engine_decodes_by_the_kernel_as_by_sdpa(gpu_for: Folder, window: int | None) -> None:
    plain = Engine(tiny(sliding_window=window))
    engine = Engine(tiny(sliding_window=window))
    device = gpu_for(AttentionShape.of_config(engine.model.config, "float32"))
    engine.runner.use_decode_kernel(device)
    names = device.toolkit.runtime.names  # type: ignore[attr-defined]
    prompts = [list(range(3, 3 + length)) for length in (30, 5, 17)]
    before = names().count("launch")
    for one in (plain, engine):
        for number, prompt in enumerate(prompts):
            one.submit(prompt, max_new_tokens=16 + number, request_id=str(number), on_piece=lambda _: None)
    while plain.step():
        assert engine.step()
        if plain.requests:
            assert [engine.session(name).token_ids for name in engine.requests] == [plain.session(name).token_ids for name in plain.requests]
            lengths = plain.kv.lengths
            for row, length in enumerate(lengths):
                ours, theirs = (one.kv.read(row, 0, length).view(torch.float32) for one in (engine, plain))
                assert (ours - theirs).abs().max() < 1e-5
    assert not engine.step()
    assert names().count("launch") - before > 2 * 2 * 15, "decode steps are the kernel's"


def test_a_processor_has_no_decode_kernel() -> None:
    with pytest.raises(UnsupportedError, match="CUDA kernel"):
        Engine(tiny(), decode_kernel=True)


def test_what_the_kernel_has_no_place_for_is_sdpas(gpu_for: Folder) -> None:
    shape = SHAPES[2]
    attend, module = DecodeAttention(gpu_for(shape), shape), torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    query, keys, values = slots(shape, 2, 1, 50, 4)
    lengths, expected = torch.tensor([50, 50], dtype=torch.int32), torch.stack([exact(query[row], keys[row], values[row], 50, None, None) for row in range(2)])
    runtime = gpu_for(shape).toolkit.runtime

    def call(query: torch.Tensor, **more: Any) -> tuple[torch.Tensor, int]:
        before = runtime.names().count("launch")  # type: ignore[attr-defined]
        with decoding(attend, lengths, 50):
            found = decode_attention_forward(module, query[:, :, None], keys[:2], values[:2], None, scaling=None, **more)[0]
        return found[:, 0], runtime.names().count("launch") - before  # type: ignore[attr-defined]

    odd = torch.empty(2, 3, 97)[..., 1:].copy_(query)  # 4 bytes off a vector's border
    for given_query, more, launched in ((query, {}, 2), (odd, {}, 0), (query, {"position_bias": torch.zeros(1, 3, 1, 50)}, 0), (query, {"sliding_window": 70}, 2)):
        found, count = call(given_query, **more)
        assert count == launched and (found.double() - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="softcap"):
        call(query, softcap=30.0)


def test_only_a_model_on_sdpa_is_switched(gpu_for: Folder) -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="runs on eager attention"):
        use_decode_attention(model, gpu_for(AttentionShape.of_config(model.config, "float32")))
    assert model.config._attn_implementation == "eager"


# --- two products on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_give_what_sdpa_gives(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Within some rounding steps of the dtype of the result in float64; what a mask hides counts for nothing, however large it is."""
    generator = torch.Generator().manual_seed(heads[0])
    tokens, lengths = 70, torch.tensor([1, 64, 65, 70])
    query = torch.randn(4, heads[0], 24, generator=generator).to(dtype)
    keys, values = (torch.randn(4, heads[1], 128, 24, generator=generator).to(dtype)[:, :, :tokens] for _ in range(2))
    hidden = torch.arange(tokens) >= lengths[:, None]
    keys[hidden[:, None].expand(keys.shape[:3])] = 100.0
    values[hidden[:, None].expand(values.shape[:3])] = 1000.0
    mask = torch.zeros(4, 1, 1, tokens, dtype=dtype).masked_fill(hidden[:, None, None], torch.finfo(dtype).min)
    more: dict[str, Any] = {"lengths": lengths.to(torch.int32), "longest": tokens, "window": None}
    exact = torch.nn.functional.scaled_dot_product_attention
    for scale in (None, 0.5):
        found = ProductAttention().attend(query, keys, values, mask, scale=scale, **more)
        expected = exact(query.double().unsqueeze(2), keys.double(), values.double(), mask.double(), scale=scale, enable_gqa=True).squeeze(2)
        assert found is not None and found.dtype == dtype and (found - expected).abs().max() < 8 * torch.finfo(dtype).eps * values[~hidden[:, None].expand(values.shape[:3])].abs().max()
    assert ProductAttention().attend(query, keys, values, None, scale=None, **more) is None, "rows alike are SDPA's"
    assert ProductAttention().attend(query, keys, values, mask == 0, scale=None, **more) is None


def test_products_of_large_numbers_stay_finite_where_their_scores_do() -> None:
    """64 * 40 * 40 is more than float16 holds, an eighth of it is not; the same behind the mask."""
    query = torch.full((2, 1, 64), 40.0, dtype=torch.float16)
    keys = torch.full((2, 1, 4, 64), 40.0, dtype=torch.float16) * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float16)[:, None]
    values = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    mask = torch.tensor([0.0, 0.0, 0.0, torch.finfo(torch.float16).min]).half().expand(2, 1, 1, 4)
    found = ProductAttention().attend(query, keys, values, mask, scale=None, lengths=torch.tensor([3, 3]), longest=4, window=None)
    assert found is not None and torch.equal(found, values[:, :, [0, 2]].float().mean(2).half())


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_engine_in_half_precision_decodes_unlike_rows_by_products(dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tokens fed, so that one tie does not part the two: the logits stay within the dtype's rounding of SDPA's."""
    plain, engine = (Engine(tiny(sliding_window=window).to(dtype)).runner for _ in range(2))
    assert isinstance(engine._attention, ProductAttention) and engine.can_batch
    plain._attention = None
    asked: list[tuple[int, int]] = []
    attend = ProductAttention.attend

    def spy(self: ProductAttention, query: torch.Tensor, keys: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor | None:
        found = attend(self, query, keys, *rest, **more)
        asked.append((keys.shape[2], found is not None))
        return found

    monkeypatch.setattr(ProductAttention, "attend", spy)
    prompts = [list(range(3, 3 + length)) for length in (30, 5, 17)]
    caches = [runner.new_slots() for runner in (plain, engine)]
    for runner, slot_cache in zip((plain, engine), caches, strict=True):
        for row, prompt in enumerate(prompts):
            slot_cache.add_row()
            runner.extend(slot_cache, row, torch.tensor([prompt]))
    for step in range(45):
        tokens = torch.tensor([[(7 * step + row) % 61] for row in range(3)])
        expected, found = (runner.decode(held, tokens).double() for runner, held in zip((plain, engine), caches, strict=True))
        assert (found - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm(), step
    assert {size for size, _ in asked} == {64, 128} and all(taken for _, taken in asked), "oneDNN compiles for two shapes, not for 45"


def test_only_half_precision_on_sdpa_decodes_by_products() -> None:
    assert use_product_attention(tiny()) is None, "in float32 SDPA is as fast"
    model = tiny().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    assert use_product_attention(model) is None and model.config._attn_implementation == "eager"
    assert Engine(model).runner._attention is None


def test_rows_of_one_length_have_the_bits_of_generate() -> None:
    """In half precision too: products are for rows of unlike lengths."""
    model = tiny().to(torch.bfloat16)
    prompts = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(4))
    expected = model.generate(prompts, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    engine = Engine(model)
    list(engine.submit([1], max_new_tokens=1))  # an engine's first prompt is read alone, and would be one token ahead of the others
    generations = [engine.submit(prompt, max_new_tokens=30, stop_at_eos=False) for prompt in prompts.tolist()]
    while engine.step():
        pass
    assert [generation.token_ids for generation in generations] == expected.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_variant_compiles_without_spills(shape: AttentionShape, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed; it compiles csrc/ for GPUs that this machine lacks")
    command = ["nvcc", "--std=c++17", "-cubin", "-arch=sm_90", "-Werror", "all-warnings", "-Xptxas", "-v", *shape.options, str(SOURCE), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    assert report.count(" 0 bytes spill stores, 0 bytes spill loads") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [AttentionShape(64, 1, "float32"), AttentionShape(80, 2, "float16"), AttentionShape(128, 4, "bfloat16"), AttentionShape(96, 8, "bfloat16")], ids=str)
def test_gpu_attention_equals_sdpa_in_float64(shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "CHUNK_TOKENS", 128)
    attend, lengths = DecodeAttention(get_device("cuda"), shape), [1, 128, 1000, 4096]
    query, keys, values = (one.cuda() for one in slots(shape, 4, 2, 4096, 5))
    for window in (None, 300):
        found = attend(query, keys[:4], values[:4], torch.tensor(lengths, dtype=torch.int32, device="cuda"), longest=4096, window=window)
        for row, length in enumerate(lengths):
            check_close(found[row], exact(query[row], keys[row], values[row], length, window, None), values[row, :, :length], shape.dtype)
