"""The first engine: our prefill and decode loop, its sampler and its streaming text. Chapters 00 and 04.

Oracles: transformers' own `generate`, its logits processors, its `decode`, and the same model run without any cache.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sllm_mini.checkpoint import convert_checkpoint, save_checkpoint
from sllm_mini.errors import IntegrityError, ModelError
from sllm_mini.inference import Completion, Detokenizer, Engine, Piece, SamplingOptions, TextDecoder, load_tokenizer
from sllm_mini.inference import sampler as sampler_module
from sllm_mini.inference.sampler import choose_token, draw, filter_logits
from sllm_mini.inference.text import detokenize, tokenize
from sllm_mini.types import SpanRecorder

pytestmark = pytest.mark.usefixtures("one_torch_thread")
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
VOCABULARY = 320
CONTEXT = 96
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


# --- tiny models -------------------------------------------------------------------------------------------------


def tiny(family: str, **changes: Any) -> Any:
    """A seeded random model of two layers; its weights are large, so that its greedy text wanders."""
    import transformers

    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
    }
    settings_of = {
        "Llama": ("LlamaConfig", "LlamaForCausalLM", llama),
        "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", llama),
        "Mistral": ("MistralConfig", "MistralForCausalLM", llama | {"sliding_window": 6}),
        "Gemma3": (
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            llama | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        "GPT2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.3}),
        "OPT": (
            "OPTConfig",
            "OPTForCausalLM",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": CONTEXT,
                "init_std": 0.3,
            },
        ),
        "GPTNeoX": (
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            {k: v for k, v in llama.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5},
        ),
        "GPTNeo": (
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6}
            | {"max_position_embeddings": CONTEXT, "initializer_range": 0.3},
        ),
        "Bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    }
    config_name, model_name, values = settings_of[family]
    torch.manual_seed(7)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**(IDS | values | changes))).eval()


@functools.cache
def engine_of(family: str) -> Engine:
    return Engine(tiny(family))


def by_generate(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    # The mask is given: without one, `generate` would mask prompt tokens that equal the padding id.
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def without_cache(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            sequence.append(int(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


PROMPTS = {
    "one token": [5],
    "padding and end ids inside": [1, 9, 0, 0, 33, 2, 7],
    "ends in the padding id": [11, 12, 0],
    "long": list(range(3, 60)),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Qwen2", "GPTNeoX", "Mistral", "Gemma3", "Bloom", "GPTNeo"])
def test_greedy_tokens_equal_generate(family: str, prompt: list[int]) -> None:
    engine = engine_of(family)
    expected = by_generate(engine.model, prompt, 30)
    completion = engine.complete(prompt, max_new_tokens=30)
    assert list(completion.token_ids) == expected
    assert completion.finish == ("eos" if expected[-1] == 2 else "length")
    # An oracle that shares no cache with us, so that sliding windows are checked past their width.
    assert without_cache(engine.model, prompt, len(expected)) == expected


def test_the_oracle_texts_wander() -> None:
    """Guards the tests above: a text of one repeated token would hide wrong positions and wrong caches."""
    for family in ("Llama", "GPT2", "OPT", "Qwen2", "Mistral"):
        assert len(set(engine_of(family).complete([5], max_new_tokens=30, stop_at_eos=False).token_ids)) >= 5, family


@pytest.mark.parametrize("as_list", [False, True])
def test_stops_at_the_end_token_that_generate_stops_at(as_list: bool) -> None:
    model = tiny("Llama")
    free = Engine(model).complete([5, 6], max_new_tokens=20, stop_at_eos=False)
    assert free.finish == "length" and len(free.token_ids) == 20
    end = free.token_ids[7]
    model.generation_config.eos_token_id = [end, VOCABULARY - 1] if as_list else end
    completion = Engine(model).complete([5, 6], max_new_tokens=20)
    assert list(completion.token_ids) == by_generate(model, [5, 6], 20)
    assert completion.token_ids[-1] == end and completion.finish == "eos"
    assert completion.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert Engine(model).complete([5, 6], max_new_tokens=20, stop_at_eos=False).token_ids == free.token_ids
    model.generation_config.eos_token_id = None
    assert Engine(model).complete([5, 6], max_new_tokens=20).token_ids == free.token_ids


def test_prefill_runs_once_then_one_token_a_step_and_one_row_of_logits() -> None:
    engine = Engine(tiny("Llama"))
    calls = []
    inner = engine.model.forward

    @functools.wraps(inner)
    def spy(**kwargs: Any) -> Any:
        out = inner(**kwargs)
        calls.append((tuple(kwargs["input_ids"].shape), kwargs["position_ids"][0].tolist(), out.logits.shape[1]))
        return out

    engine.model.forward = spy
    engine.complete([5, 6, 7], max_new_tokens=4, stop_at_eos=False)
    assert calls == [((1, 3), [0, 1, 2], 1), ((1, 1), [3], 1), ((1, 1), [4], 1), ((1, 1), [5], 1)]


# --- the stream --------------------------------------------------------------------------------------------------


def test_pieces_carry_positions_and_times_and_the_timings_add_up() -> None:
    generation = engine_of("Llama").generate([5, 6, 7], max_new_tokens=6, stop_at_eos=False)
    pieces = list(generation)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert [piece.position for piece in pieces] == [3, 4, 5, 6, 7, 8]
    assert [piece.token_id for piece in pieces] == generation.token_ids[3:]
    seconds = [piece.seconds for piece in pieces]
    assert seconds == sorted(seconds) and seconds[0] > 0
    timings = generation.timings
    assert timings.decode_steps == 5 and timings.seconds_per_step == timings.decode_seconds / 5
    assert timings.first_token_seconds == seconds[0] >= timings.tokenize_seconds + timings.prefill_seconds
    assert timings.tokenize_seconds + timings.prefill_seconds + timings.decode_seconds <= seconds[-1]
    assert list(generation) == []


def memory_of(engine: Engine) -> weakref.ref[Any]:
    return weakref.ref(engine.kv.layers[0].keys)


def test_the_cache_is_freed_at_the_end_on_close_on_drop_and_on_error() -> None:
    engine = Engine(tiny("Llama"))
    finished = engine.generate([5], max_new_tokens=2, stop_at_eos=False)
    next(finished)
    memory = memory_of(engine)
    assert memory() is not None
    assert len(list(finished)) == 1 and memory() is None and engine.kv.nbytes == 0

    closed = engine.generate([5], max_new_tokens=9)
    next(closed)
    memory = memory_of(engine)
    closed.close()
    assert memory() is None and closed.finish is None and list(closed) == []
    closed.close()

    with engine.generate([5], max_new_tokens=9) as left:
        next(left)
        memory = memory_of(engine)
    assert memory() is None

    dropped = engine.generate([5], max_new_tokens=9)
    next(dropped)
    memory = memory_of(engine)
    del dropped
    assert memory() is None and engine.requests == ()

    broken = Engine(tiny("Llama"))
    failing = broken.generate([5], max_new_tokens=9)
    next(failing)
    memory = memory_of(broken)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="LlamaForCausalLM gave logits that are not finite at position 2"):
        next(failing)
    assert memory() is None


def test_the_consumer_is_never_left_in_inference_mode() -> None:
    for _ in engine_of("Llama").generate([5], max_new_tokens=3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_open_generations_do_not_disturb_each_other() -> None:
    engine = engine_of("Qwen2")
    one, two = (engine.complete(prompt, max_new_tokens=12, stop_at_eos=False).token_ids for prompt in ([5, 6], [9]))
    pairs = zip(
        engine.generate([5, 6], max_new_tokens=12, stop_at_eos=False),
        engine.generate([9], max_new_tokens=12, stop_at_eos=False),
        strict=True,
    )
    assert [(a.token_id, b.token_id) for a, b in pairs] == list(zip(one, two, strict=True))


def test_the_loop_costs_no_more_than_generate() -> None:
    """On a model so small that little but the loop is left; the best of interleaved runs, so that noise cancels out."""
    engine, prompt = engine_of("Llama"), [5, 6, 7]
    ids = torch.tensor([prompt])
    ours, theirs = [], []
    while len(ours) < 5 or (min(ours) >= min(theirs) and len(ours) < 50):  # more on a machine that others keep busy
        start = time.perf_counter()
        engine.complete(prompt, max_new_tokens=40, stop_at_eos=False)
        middle = time.perf_counter()
        engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40, do_sample=False)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    assert min(ours) < min(theirs)


@pytest.mark.gpu
def test_on_a_gpu_tokens_equal_generate_and_ties_and_draws_are_as_on_the_cpu() -> None:
    model = tiny("Llama").to("cuda")
    expected = model.generate(torch.tensor([[5, 0, 7]], device="cuda"), attention_mask=torch.ones(1, 3, device="cuda"), max_new_tokens=30, do_sample=False)
    assert list(Engine(model).complete([5, 0, 7], max_new_tokens=30).token_ids) == expected[0, 3:].tolist()
    tied = torch.zeros(5000)
    tied[[4999, 700, 701]] = 3.0
    assert int(choose_token(tied.cuda(), SamplingOptions(), 0)) == 700
    assert int(choose_token(torch.full((9,), math.nan).cuda(), SamplingOptions(1.0), 0)) == 9
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 3
    for options in (SamplingOptions(1.0, seed=5), SamplingOptions(0.7, top_k=20, seed=6), SamplingOptions(1.0, top_p=0.8, seed=7)):
        for position in range(50):
            assert int(choose_token(logits.cuda(), options, position)) == int(choose_token(logits, options, position))


# --- what is refused ---------------------------------------------------------------------------------------------


def test_too_long_a_text_is_refused_before_the_model_runs() -> None:
    engine = Engine(tiny("GPT2"))
    engine.model.forward = None  # a run would fail with another error
    with pytest.raises(ModelError, match=r"prompt of 90 tokens and 7 new ones make 97, but this model's context is 96 tokens; ask for at most 6 new"):
        engine.generate([5] * 90, max_new_tokens=7)
    with pytest.raises(ModelError, match="shorten the prompt to fewer than 96 tokens"):
        engine.generate([5] * 96, max_new_tokens=1)


def test_the_last_position_of_the_context_can_be_used() -> None:
    for family in ("GPT2", "OPT", "Llama"):
        completion = engine_of(family).complete([5] * 90, max_new_tokens=6, stop_at_eos=False)
        assert list(completion.token_ids) == without_cache(engine_of(family).model, [5] * 90, 6)


def test_rope_that_changes_with_length_is_kept_within_its_original_context() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    engine = Engine(tiny("Llama", rope_parameters=rope))
    assert engine.runner.context_limit == 24
    assert engine_of("Llama").runner.context_limit == CONTEXT and engine_of("Bloom").runner.context_limit is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, VOCABULARY], "token 1 of the prompt is 320, but this model's ids go from 0 to 319"),
        ([-1], "token 0 of the prompt is -1"),
        ("words", "without a tokenizer; give the prompt as token ids"),
        ([1.5], "a prompt is a text or a sequence of token ids"),
        (["a"], "a prompt is a text or a sequence of token ids"),
        (None, "a prompt is a text or a sequence of token ids"),
    ],
)
def test_prompts_that_cannot_be_run(prompt: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        engine_of("Llama").generate(prompt)


def test_a_limit_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; it must be at least 1"):
        engine_of("Llama").generate([5], max_new_tokens=0)


def test_an_empty_prompt_is_the_beginning_token_or_refused() -> None:
    engine = engine_of("Llama")
    assert engine.complete([], max_new_tokens=5).token_ids == engine.complete([1], max_new_tokens=5).token_ids
    nameless = tiny("Llama", bos_token_id=None)
    with pytest.raises(ModelError, match="names no beginning-of-text token; give at least one token"):
        Engine(nameless).generate([])


def test_numpy_ids_and_tensors_are_prompts_too() -> None:
    engine = engine_of("Llama")
    expected = engine.complete([5, 6], max_new_tokens=3)
    for prompt in (np.array([5, 6]), torch.tensor([5, 6]), (5, 6)):
        assert engine.complete(prompt, max_new_tokens=3).token_ids == expected.token_ids


def refused_models() -> Iterator[tuple[str, Callable[[], Any], str]]:
    import transformers as t

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    grouped = small | {"num_key_value_heads": 2}
    yield "recurrent", lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)), "not a cache of keys and values"
    yield (
        "convolutions beside attention",
        lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**grouped, layer_types=["conv", "full_attention"])),
        "its cache has a LinearAttentionLayer, which holds more than keys and values",
    )
    yield "encoder only", lambda: t.BertModel(t.BertConfig(**small)), "has no head that predicts the next token"
    yield "encoder with a head", lambda: t.BertLMHeadModel(t.BertConfig(**small)), "reads text in both directions"
    yield "encoder as decoder", lambda: t.RobertaForCausalLM(t.RobertaConfig(**small, is_decoder=True)), "reads text in both directions"
    yield (
        "encoder and decoder",
        lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)),
        "has an encoder beside its decoder",
    )
    yield "no language model", lambda: torch.nn.Linear(2, 2), "Linear cannot be run by this engine: it has no head"


@pytest.mark.parametrize(("build", "why"), [case[1:] for case in refused_models()], ids=[case[0] for case in refused_models()])
def test_models_that_would_run_wrongly_are_refused(build: Callable[[], Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        Engine(build())


def test_a_model_that_ignores_the_cache_it_is_given_is_found_out() -> None:
    engine = Engine(tiny("Llama"))
    inner = engine.model.forward

    @functools.wraps(inner)
    def forgetful(**kwargs: Any) -> Any:
        return inner(**(kwargs | {"past_key_values": None, "use_cache": False}))

    engine.model.forward = forgetful
    with pytest.raises(ModelError, match="does not keep its keys and values in the cache"):
        engine.complete([5, 6], max_new_tokens=2)


# --- the sampler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be more than 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
    ],
)
def test_sampling_options_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**values)


@QUICK
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.05, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    top_p=st.sampled_from([1e-12, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
)
def test_filters_equal_the_processors_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)) * 4
    processors_of = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors_of.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors_of.append(TopPLogitsWarper(top_p))
    expected = processors_of(None, logits)
    ours = filter_logits(logits, SamplingOptions(temperature, top_k, top_p))
    assert torch.equal(ours.isneginf(), expected.isneginf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_filters_keep_all_that_tie_with_the_last_kept() -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0])
    for options in (SamplingOptions(1.0, top_k=3), SamplingOptions(1.0, top_p=0.9)):
        assert filter_logits(logits, options).isneginf().tolist() == [False, False, False, False, True]


def test_greedy_takes_the_lowest_of_equals() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(5000, dtype=dtype)
        logits[[4999, 700, 701]] = 3.0
        assert int(choose_token(logits, SamplingOptions(), 0)) == 700


def test_the_draw_is_numpys_philox_and_belongs_to_its_position() -> None:
    for position in range(10):
        assert draw(3, position) == (int(np.random.Philox(key=3, counter=position).random_raw()) >> 12) / 2**52
    draws = [draw(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(300)]
    assert len(set(draws)) == 900 and all(0 <= value < 1 for value in draws)
    assert abs(sum(draws) / 900 - 0.5) < 0.05
    # Pinned: a request that was stopped by one release must go on alike in the next.
    assert [round(draw(7, position), 12) for position in (0, 1, 1000)] == [0.87207345482, 0.082842687027, 0.23190574452]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    counts = np.zeros(5)
    for position in range(4000):
        counts[int(choose_token(logits, SamplingOptions(temperature=1.0, seed=11), position))] += 1
    np.testing.assert_allclose(counts / 4000, logits.softmax(-1).numpy(), atol=0.025)
    assert counts[2] == 0


@pytest.mark.parametrize("number", [0.0, (2**52 - 1) / 2**52])
def test_the_extreme_draws_choose_tokens_that_have_a_probability(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "draw", lambda seed, position: number)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        logits = torch.randn(50, generator=generator)
        logits[[0, 1, -1, -2]] = -torch.inf
        assert int(choose_token(logits, SamplingOptions(temperature=1.0), 0)) == (2 if number == 0 else 47)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(1.0), SamplingOptions(0.7, top_k=1), SamplingOptions(0.7, top_p=0.5)])
def test_logits_that_are_not_finite_choose_no_token(bad: list[float], options: SamplingOptions) -> None:
    assert int(choose_token(torch.tensor(bad), options, 0)) == 2


def test_a_tiny_temperature_is_greedy_and_not_an_overflow() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(5)) * 30
    assert int(choose_token(logits, SamplingOptions(temperature=1e-40), 3)) == int(logits.argmax())


def test_a_resumed_request_draws_the_numbers_it_would_have_drawn() -> None:
    engine = engine_of("Llama")
    options = SamplingOptions(temperature=1.0, top_k=40, top_p=0.95, seed=99)
    whole = engine.complete([5, 6, 7], max_new_tokens=20, sampling=options, stop_at_eos=False).token_ids
    for cut in (1, 7, 19):
        resumed = engine.complete([5, 6, 7, *whole[:cut]], max_new_tokens=20 - cut, sampling=options, stop_at_eos=False)
        assert resumed.token_ids == whole[cut:]
    other = SamplingOptions(temperature=1.0, top_k=40, top_p=0.95, seed=100)
    assert engine.complete([5, 6, 7], max_new_tokens=20, sampling=other, stop_at_eos=False).token_ids != whole


# --- the text ----------------------------------------------------------------------------------------------------

CORPUS = [
    "Once upon a time there was a little fox, and she didn't like the rain.",
    "Naïve café, 日本語のテキスト, здравствуй мир! 🦊🌧️ — “quotes” … ½",
    "one two  three   four\n\tfive 12345 the the the 👩‍👩‍👧 fin",
]
SPECIAL = ["<s>", "</s>", "<pad>"]


def wrap(backend: Tokenizer, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options)


def byte_level() -> Any:
    """As GPT-2, OPT, Qwen2 and Llama 3 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    backend.add_tokens(["<tool> é"])
    return wrap(backend)


def byte_fallback() -> Any:
    """As Llama 2 and Mistral have it: words start with ▁, what has no token is spelt in bytes, one leading space goes."""
    names = [*SPECIAL, "<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    letters = sorted({letter for line in CORPUS[:1] for letter in line if letter != " "} | {"▁", "日"})
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁", "▁"), ("i", "n")]
    vocabulary = {name: index for index, name in enumerate(names + letters + [a + b for a, b in merges])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrap(backend)


def metaspace() -> Any:
    """As sentencepiece models converted with the Metaspace decoder have it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(CORPUS * 3, trainers.UnigramTrainer(vocab_size=150, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False))
    return wrap(backend, unk_token="<unk>")


def word_piece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], show_progress=False))
    return wrap(backend, unk_token="<unk>", clean_up_tokenization_spaces=True)


def word_end() -> Any:
    """As GPT-1 and CLIP have it: a suffix marks the end of a word, so the last token's space is not there yet."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend, unk_token="<unk>")


BUILDERS = {build.__name__: build for build in (byte_level, byte_fallback, metaspace, word_piece, word_end)}


@functools.cache
def tokenizer_of(name: str) -> Any:
    return BUILDERS[name]()


@functools.cache
def decoder_of(name: str) -> TextDecoder:
    return TextDecoder(tokenizer_of(name))


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(decoder: TextDecoder, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(decoder, prompt or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_text_is_the_tokenizers_own_decoding_of_any_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    words = [token_id for line in CORPUS for token_id in tokenizer.encode(line, add_special_tokens=False)]
    one = st.one_of(
        st.integers(0, len(tokenizer) - 1),
        st.sampled_from(words),
        st.sampled_from([0, 1, len(tokenizer) + 5]),  # special ones, and one the tokenizer has no name for
    )
    ids = data.draw(st.lists(one, max_size=40))
    pieces = stream(decoder_of(name), ids)
    expected = decode(tokenizer, ids)
    assert "".join(pieces) == expected
    if name != "word_piece":
        assert expected == tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab the in  \né日🦊½<s>/[]"), max_size=60), special=st.booleans())
def test_a_text_has_the_ids_that_transformers_gives_it(name: str, text: str, special: bool) -> None:
    tokenizer = tokenizer_of(name)
    assert tokenize(tokenizer, text, special=special) == tokenizer(text, add_special_tokens=special)["input_ids"]


def test_a_tokenizer_that_adds_something_of_its_own_is_asked_itself() -> None:
    from transformers import PreTrainedTokenizerFast

    class Marked(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **named: Any) -> Any:
            return super()._encode_plus(f"the {text}", *args, **named)

        def _decode(self, *args: Any, **named: Any) -> str:
            return super()._decode(*args, **named).upper()

    plain = tokenizer_of("byte_level")
    marked = Marked(tokenizer_object=plain.backend_tokenizer)
    assert tokenize(marked, "in") == tokenize(plain, "the in") != tokenize(plain, "in")
    assert detokenize(marked, tokenize(plain, "in")) == "IN"


def test_a_text_keeps_its_length_whatever_the_tokenizers_file_cuts_and_fills(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte_level"))
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    tokenizer.save_pretrained(tmp_path)
    loaded, text = load_tokenizer(tmp_path), CORPUS[0]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    assert tokenize(loaded, text) == tokenizer_of("byte_level")(text)["input_ids"]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab the in  \né日🦊½")), data=st.data())
def test_text_of_a_prompt_is_continued_with_its_spaces(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt, rest = ids[:cut], ids[cut:]
    whole, before = decode(tokenizer, ids), decode(tokenizer, prompt)
    if "\ufffd" not in before:
        assert before + "".join(stream(decoder_of(name), rest, prompt)) == whole


def test_bad_bytes_after_the_prompt_leave_the_prompt_as_it_was() -> None:
    """Byte tokens are read as one run, so a bad one would unmake the prompt's last character; that one was said."""
    tokenizer = tokenizer_of("byte_fallback")
    prompt, bad, word = tokenizer.encode("½"), tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer.convert_tokens_to_ids("▁the")
    assert decode(tokenizer, prompt) == "½" and decode(tokenizer, [*prompt, bad]) != "½\ufffd"
    assert stream(decoder_of("byte_fallback"), [bad, word, word], prompt) == ["", "\ufffd the", " the", ""]
    half, rest = tokenizer.convert_tokens_to_ids(["<0xC2>", "<0xBD>"])
    assert stream(decoder_of("byte_fallback"), [half, rest, word], prompt) == ["", "", "½ the", ""]
    assert stream(decoder_of("byte_fallback"), [rest, word], [word, half]) == ["", "½ the", ""]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab the in  \né日🦊½")))
def test_no_character_waits_longer_than_its_last_token(text: str) -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode(text)
    detokenizer, shown = Detokenizer(decoder_of("byte_level")), ""
    for count, token_id in enumerate(ids, 1):
        shown += detokenizer.push(token_id)
        assert shown == decode(tokenizer, ids[:count]).rstrip("\ufffd")


class CountingDecoder(TextDecoder):
    """Counts the tokens it is asked to decode: the cost of a stream, whatever the machine."""

    decoded = 0

    def decode(self, token_ids: Any) -> str:
        self.decoded += len(token_ids)
        return super().decode(token_ids)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("byte_level", "text"), ("byte_level", "garbage"), ("byte_fallback", "text"), ("byte_fallback", "garbage"), ("byte_fallback", "spaces"), ("metaspace", "spaces")],
)
def test_the_cost_of_a_stream_grows_with_its_length_and_no_faster(name: str, kind: str) -> None:
    tokenizer = tokenizer_of(name)
    if kind == "garbage":
        bad = "<0xFF>" if name == "byte_fallback" else "ÿ"
        ids = [tokenizer.convert_tokens_to_ids(bad)] * 3000
    elif kind == "spaces":
        ids = [tokenizer.convert_tokens_to_ids("▁")] * 3000
    else:
        ids = random.Random(3).choices([token_id for line in CORPUS for token_id in tokenizer.encode(line)], k=3000)
    assert ids[0] is not None
    counting = CountingDecoder(tokenizer)
    assert "".join(stream(counting, ids)) == decode(tokenizer, ids)
    assert counting.decoded <= 10 * len(ids)


def test_a_long_prompt_is_not_decoded_again() -> None:
    tokenizer = tokenizer_of("byte_level")
    counting = CountingDecoder(tokenizer)
    Detokenizer(counting, tokenizer.encode(CORPUS[0]) * 200)
    assert counting.decoded < 200


# --- text and engine together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_the_engine_streams_the_text_of_its_tokens(name: str) -> None:
    tokenizer = tokenizer_of(name)
    engine = Engine(tiny("Llama", vocab_size=len(tokenizer)), tokenizer)
    prompt = "the in"
    ids = tokenizer(prompt)["input_ids"]
    for seed in range(5):
        options = SamplingOptions(temperature=1.0, seed=seed)
        generation = engine.generate(prompt, max_new_tokens=40, sampling=options, stop_at_eos=False)
        pieces = list(generation)
        assert generation.token_ids[: len(ids)] == ids
        text = "".join(piece.text for piece in pieces)
        assert decode(tokenizer, ids) + text == decode(tokenizer, generation.token_ids)
        completion = engine.complete(prompt, max_new_tokens=40, sampling=options, stop_at_eos=False)
        assert isinstance(completion, Completion) and completion.text == text
    assert engine.complete("", max_new_tokens=3).token_ids == engine.complete([1], max_new_tokens=3).token_ids or name == "byte_fallback"


def test_the_end_token_is_a_piece_without_text_that_brings_what_was_held() -> None:
    tokenizer = tokenizer_of("byte_level")
    half = tokenizer.convert_tokens_to_ids("ð")  # the first byte of an emoji
    model = tiny("Llama", vocab_size=len(tokenizer))
    engine = Engine(model, tokenizer)
    script = iter([half, 1])
    inner = model.forward

    @functools.wraps(inner)
    def scripted(**kwargs: Any) -> Any:
        out = inner(**kwargs)
        out.logits[0, -1, next(script)] = 1e6
        return out

    model.forward = scripted
    engine.runner.eos_ids = frozenset({1})
    pieces = list(engine.generate("a", max_new_tokens=9))
    assert [(piece.token_id, piece.text) for piece in pieces] == [(half, ""), (1, "\ufffd")]


# --- from a directory --------------------------------------------------------------------------------------------


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_is_read_back_from_its_directory(tmp_path: Path) -> None:
    tokenizer_of("byte_level").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None and loaded.encode(CORPUS[1]) == tokenizer_of("byte_level").encode(CORPUS[1])


def test_the_first_tokenizers_of_a_process_are_read_by_several_threads(tmp_path: Path) -> None:
    """Each comes while the one before still imports transformers."""
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    code = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from sllm_mini.inference.text import load_tokenizer

def read(number):
    time.sleep(0.05 * number)
    return load_tokenizer(sys.argv[1])

with ThreadPoolExecutor(6) as pool:
    assert None not in list(pool.map(read, range(6)))
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=100).returncode == 0


def test_a_broken_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 5}')
    with pytest.raises(ModelError, match=r"tokenizer files in .* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory as users have it: weights, configuration, generation settings, tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    tokenizer = tokenizer_of("byte_level")
    model = tiny("Llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [1, 44]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_engine_loaded_from_a_checkpoint_says_what_transformers_says(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_checkpoint(directory, tmp_path / "model")
    recorder = SpanRecorder()
    engine = Engine.load(tmp_path / "model", recorder=recorder)
    assert engine.runner.eos_ids == {1, 44}
    assert recorder.spans[0].name == "tokenizer" and len(recorder.spans) > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    for prompt in ("the little fox", "café 日本"):
        completion = engine.complete(prompt, max_new_tokens=25)
        ids = tokenizer(prompt)["input_ids"]
        assert list(completion.token_ids) == by_generate(model, ids, 25)
        assert tokenizer.decode(ids) + completion.text == tokenizer.decode([*ids, *completion.token_ids], skip_special_tokens=True)


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    model = tiny("GPT2")
    save_checkpoint(model, tmp_path / "model")
    engine = Engine.load(tmp_path / "model")
    assert engine.tokenizer is None
    completion = engine.complete([5, 6, 7], max_new_tokens=9)
    assert list(completion.token_ids) == by_generate(model, [5, 6, 7], 9) and completion.text == ""


def test_a_flipped_bit_in_the_tokenizer_is_found_before_it_is_used(directory: Path, tmp_path: Path) -> None:
    convert_checkpoint(directory, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[content.index(b"the")] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        Engine.load(tmp_path / "model")


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys; from sllm_mini.inference import SamplingOptions, Engine, Detokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
