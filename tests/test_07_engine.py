"""Several requests in one engine: slots, steps, joins and leaves, stop strings, penalties, threads. Chapters 06 and 07.

Oracles: the same model with transformers' own cache, each request alone, and transformers' processors. Where a batch
gives another token than the request alone, the two best must differ by less than EPSILON; such cases are counted.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_04_engine import decode, engine_of, tiny, tokenizer_of, without_cache

from sllm_mini.errors import LoadError, ModelError
from sllm_mini.inference import Engine, Generation, Piece, SamplingOptions
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.sampler import choose_token, choose_tokens, draw, filter_logits, penalise, seen_tokens
from sllm_mini.inference.stopping import StopBuffer
from sllm_mini.inference.turns import Turns

FAMILIES = ["Llama", "Qwen2", "GPT2", "OPT", "GPTNeoX", "Mistral", "Gemma3"]
EPSILON = 1e-3
"""Logits of these models spread over several units; float32 noise of another batch shape stays below 1e-4."""
near_ties: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    print(f"tokens that differ from the request alone, all with a margin below {EPSILON}: {len(near_ties)} {near_ties}")


def explains(model: Any, tokens: list[int], position: int, got: int, options: SamplingOptions) -> bool:
    """Whether logits that are off by EPSILON could have given `got` at `position`, after the tokens before it."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:position]]), use_cache=False).logits[0, -1]
    if options.repetition_penalty != 1:
        logits = penalise(logits, seen_tokens(tokens[:position], logits.shape[0]), options.repetition_penalty)
    if options.greedy:
        return float(logits.max() - logits[got]) < EPSILON
    cumulative = filter_logits(logits, options).softmax(-1, dtype=torch.float64).cumsum(-1)
    below = float(cumulative[got - 1]) if got else 0.0
    return below - EPSILON <= draw(options.seed, position) <= float(cumulative[got]) + EPSILON


def same_tokens(model: Any, got: list[int], alone: list[int], options: SamplingOptions, what: str) -> None:
    """`got` equals what the request gives alone, up to the first near tie."""
    for position, (ours, theirs) in enumerate(zip(got, alone, strict=False)):
        if ours != theirs:
            assert explains(model, alone, position, ours, options), f"{what}: token {ours} at {position} for {theirs}"
            near_ties.append(f"{what}@{position}")
            return
    assert len(got) <= len(alone)


# --- one request -------------------------------------------------------------------------------------------------


def dynamic(runner: Any, token_ids: torch.Tensor, cache: Any, length: int) -> torch.Tensor:
    """The oracle: the same call with transformers' own cache, which copies itself at each token. Logits `[vocabulary]`."""
    n = token_ids.shape[1]
    with torch.inference_mode():
        logits: torch.Tensor = runner._forward(token_ids, cache, torch.arange(length - n, length).unsqueeze(0), length, None)[0]
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, "Bloom", "GPTNeo"])
def test_logits_are_those_of_transformers_cache_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    """Prefill, decode, a further chunk, decode; in each of several slots, while the storage grows."""
    runner = Runner(tiny(family).to(dtype))
    slots = runner.new_slots()
    for row, prompt in enumerate(([5], list(range(3, 40)), [1, 9, 0, 0, 33, 2, 7])):
        slots.add_row()
        cache, length = runner.new_cache(), 0
        feeds = [prompt, *([token] for token in range(11, 26)), [40, 41, 42, 43, 44, 45, 46, 47], [9], [10]]
        for feed in feeds:
            ids = torch.tensor([feed])
            length += len(feed)
            expected = dynamic(runner, ids, cache, length)
            assert torch.equal(runner.extend(slots, row, ids)[0], expected), (row, length)
            assert slots.lengths[row] == length == slots.get_seq_length()
    assert slots.slots == 4 and slots.capacity == 64


def test_no_copy_of_the_cache_is_made_for_a_step() -> None:
    """What attention gets is the slots themselves."""
    engine = Engine(tiny("Llama"))
    generation = engine.generate([5, 6, 7], max_new_tokens=9, stop_at_eos=False)
    next(generation)
    layer = engine.kv.layers[0]
    before, update = layer.keys.data_ptr(), layer.update
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(update(*args))
        return seen[-1]

    layer.update = watched
    list(generation)
    assert len(seen) == 8 and all(keys.data_ptr() == before for keys, _ in seen)
    assert [keys.shape[2] for keys, _ in seen] == list(range(4, 12))


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unlike_lengths_compute_what_each_would_alone(family: str) -> None:
    runner = Runner(tiny(family))
    assert runner.can_batch
    slots, alone = runner.new_slots(), []
    prompts = [list(range(3, 3 + n)) for n in (9, 1, 30, 4)]
    for row, prompt in enumerate(prompts):
        runner.extend(slots, slots.add_row(), torch.tensor([prompt]))
        alone.append(runner.new_cache())
        dynamic(runner, torch.tensor([prompt]), alone[row], len(prompt))
    for step in range(12):
        tokens = torch.tensor([[50 + step + 20 * row] for row in range(4)])
        logits = runner.decode(slots, tokens)
        for row, prompt in enumerate(prompts):
            expected = dynamic(runner, tokens[row : row + 1], alone[row], len(prompt) + step + 1)
            assert float((logits[row] - expected).abs().max()) < 1e-4, (row, step)


def test_rows_of_one_length_need_no_mask() -> None:
    engine = Engine(tiny("Mistral"))
    engine.complete([5], max_new_tokens=1)  # the first pass of an engine is alone in its step
    masks: list[Any] = []
    inner = engine.model.forward

    @functools.wraps(inner)
    def spy(**kwargs: Any) -> Any:
        masks.append((kwargs["input_ids"].shape[0], kwargs.get("attention_mask")))
        return inner(**kwargs)

    engine.runner.can_batch  # noqa: B018 - the trial has masks of its own
    engine.model.forward = spy
    both = [engine.submit([5, 6, 7 + n], max_new_tokens=12, stop_at_eos=False) for n in range(2)]
    while engine.step():
        pass
    assert [count for count, _ in masks] == [1] + [2] * 11
    assert masks[0][1].shape == (1, 1, 6, 6) and all(mask is None for _, mask in masks[1:])  # two prompts are one row
    for generation in both:
        same_tokens(engine.model, generation.token_ids, generation.token_ids[:3] + without_cache(engine.model, generation.token_ids[:3], 12), SamplingOptions(), "one length")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3"])
def test_both_kinds_of_attention_take_the_masks(family: str, implementation: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(implementation)
    assert Runner(model).can_batch


@pytest.mark.parametrize("family", ["Bloom", "GPTNeo"])
def test_a_model_with_masks_of_its_own_is_decoded_one_by_one(family: str) -> None:
    engine = Engine(tiny(family))
    assert not engine.runner.can_batch
    generations = [engine.submit([5 + n] * (1 + 4 * n), max_new_tokens=15, stop_at_eos=False) for n in range(3)]
    while engine.step():
        pass
    for n, generation in enumerate(generations):
        assert generation.token_ids[1 + 4 * n :] == without_cache(engine.model, [5 + n] * (1 + 4 * n), 15)


def test_a_mask_that_a_model_misreads_is_found_by_the_trial() -> None:
    model = tiny("Llama")
    inner = model.forward

    @functools.wraps(inner)
    def deaf(**kwargs: Any) -> Any:
        return inner(**(kwargs | {"attention_mask": None}))

    model.forward = deaf
    assert not Runner(model).can_batch


options_of = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
)
prompt_of = st.lists(st.integers(0, 319), min_size=1, max_size=20)


def check_rows(engine: Engine) -> None:
    """A cache holds one token fewer than its sequence, and rows that decode lie at the front."""
    owners = engine._rows.owners
    assert [owner.row for owner in owners] == list(range(len(owners))) and len(engine.kv.lengths) == len(owners)
    for row, owner in enumerate(owners):
        decodes = owner.request_id in engine.requests and not engine._requests[owner.request_id].held
        assert decodes == (row < engine._rows.count)
        if owner.request_id in engine.requests:
            assert engine.kv_length(owner.request_id) == len(engine.session(owner.request_id).token_ids) - 1


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_joins_leaves_waits_or_moves_in_a_request_says_what_it_says_alone(family: str, data: st.DataObject) -> None:
    engine = Engine(engine_of(family).model, max_batch=data.draw(st.integers(1, 5)))
    open_: dict[str, Generation] = {}
    asked: dict[str, tuple[list[int], int, SamplingOptions]] = {}
    guests: set[str] = set()
    for number in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel", "hold", "release", "guest", "forget"]))
        known = sorted(engine.requests)
        if action == "submit":
            name, prompt, count, options = f"r{number}", data.draw(prompt_of), data.draw(st.integers(1, 25)), data.draw(options_of)
            asked[name] = prompt, count, options
            open_[name] = engine.submit(prompt, max_new_tokens=count, sampling=options, stop_at_eos=False, request_id=name)
        elif action == "step":
            engine.step()
        elif action == "guest" and len(engine._rows) < engine.max_batch:
            engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id=f"g{number}").session())
            engine.absorb(f"g{number}", data.draw(prompt_of))
            guests.add(f"g{number}")
        elif action == "forget" and guests:
            engine.drop(guests.pop())
        elif known and action in ("cancel", "hold", "release"):
            name = data.draw(st.sampled_from(known))
            if action == "cancel":
                open_[name].cancel()
                assert open_[name].finish == "cancelled"
            else:
                getattr(engine, action)(name)
        check_rows(engine)
    for name in [*engine.requests]:
        engine.release(name)
    for guest in guests:
        engine.drop(guest)
    while engine.step():
        check_rows(engine)
    assert engine.kv.lengths == [] and engine.kv.nbytes == 0 and engine.requests == ()
    for name, (prompt, count, options) in asked.items():
        alone = [*prompt, *engine_of(family).complete(prompt, max_new_tokens=count, sampling=options, stop_at_eos=False).token_ids]
        same_tokens(engine.model, open_[name].token_ids, alone, options, f"{family} {name}")
        if open_[name].finish == "length":
            assert len(open_[name].token_ids) == len(alone)
            assert [piece.position for piece in open_[name]] == list(range(len(prompt), len(alone)))


def test_memory_that_holds_no_numbers_does_not_reach_a_shorter_row() -> None:
    """The row of a guest that brought NaN is used again by a short prompt beside a long one."""
    engine = Engine(tiny("Llama"))
    expected = engine.complete([5], max_new_tokens=20, stop_at_eos=False).token_ids
    long = engine.submit(list(range(3, 40)), max_new_tokens=30, stop_at_eos=False)
    engine.step()
    engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id="bad").session())
    nan = torch.full((60 * engine.kv_nbytes_per_token // 4,), math.nan).view(torch.uint8)
    engine.write_kv("bad", 0, nan)
    assert engine.drop("bad")
    short = engine.submit([5], max_new_tokens=20, stop_at_eos=False)
    while engine.step():
        pass
    assert short.finish == long.finish == "length"
    same_tokens(engine.model, short.token_ids, [5, *expected], SamplingOptions(), "after NaN")


def test_the_first_pass_of_an_engine_is_alone_in_its_step() -> None:
    engine = Engine(tiny("Llama"))
    generations = [engine.submit([5 + n], max_new_tokens=9, stop_at_eos=False) for n in range(3)]
    lengths = []
    for _ in range(3):
        engine.step()
        lengths.append([len(generation.token_ids) - 1 for generation in generations])
    assert lengths == [[1, 0, 0], [2, 1, 1], [3, 2, 2]]


def test_those_who_wait_come_in_order_when_a_slot_is_free() -> None:
    engine = Engine(tiny("Llama"), max_batch=2)
    generations = [engine.submit([5 + n], max_new_tokens=2 + n, stop_at_eos=False) for n in range(4)]
    order: list[int] = []
    while engine.step():
        order += [n for n, generation in enumerate(generations) if len(generation.token_ids) > 1 and n not in order]
        assert len(engine.kv.lengths) <= 2
    assert order == [0, 1, 2, 3] and all(generation.finish == "length" for generation in generations)


def test_memory_that_is_kept_is_not_given_back_nor_got_again() -> None:
    engine = Engine(tiny("Llama"), max_batch=4, kv_tokens=4 * 96)
    engine.complete([5], max_new_tokens=3)
    memory = engine.kv.layers[0].keys
    assert memory.shape[0] == 4 and memory.shape[2] == 128 and engine.kv.nbytes == 4 * 128 * engine.kv_nbytes_per_token
    engine.complete([5] * 60, max_new_tokens=30)
    assert engine.kv.layers[0].keys is memory
    with pytest.raises(ValueError, match="kv_tokens is -1"):
        Engine(tiny("Llama"), kv_tokens=-1)


# --- what ends a request -----------------------------------------------------------------------------------------


def test_an_error_of_one_request_is_its_own() -> None:
    engine = Engine(tiny("Llama"))
    alone = [engine.complete([5 + n], max_new_tokens=12, stop_at_eos=False).token_ids for n in range(3)]

    def angry(piece: Piece) -> None:
        if piece.position == 4:
            raise LoadError("the reader has gone")

    inner = engine.model.forward
    step = 0

    @functools.wraps(inner)
    def poisoned(**kwargs: Any) -> Any:
        nonlocal step
        out = inner(**kwargs)
        step += 1
        if step == 8:
            out.logits[2] = math.nan
        return out

    engine.runner.can_batch  # noqa: B018
    engine.model.forward = poisoned
    generations = [engine.submit([5 + n], max_new_tokens=12, stop_at_eos=False, on_piece=angry if n == 1 else None) for n in (0, 1)]
    third = engine.submit([7], max_new_tokens=12, stop_at_eos=False)
    fourth = engine.submit([6], max_new_tokens=12, stop_at_eos=False)
    while engine.step():
        pass
    with pytest.raises(LoadError, match="the reader has gone"):
        list(generations[1])
    assert list(generations[1]) == []
    broken = [generation for generation in (generations[0], third, fourth) if generation.finish is None]
    assert len(broken) == 1
    with pytest.raises(ModelError, match="not finite"):
        list(broken[0])
    for generation, tokens in ((generations[0], alone[0]), (third, alone[2]), (fourth, alone[1])):
        assert generation in broken or tuple(generation.token_ids[1:]) == tokens


def test_a_pass_that_fails_ends_those_in_it_and_the_next_request_runs() -> None:
    engine = Engine(tiny("Llama"))
    generations = [engine.submit([5 + n], max_new_tokens=12) for n in range(2)]
    engine.step()
    engine.step()
    inner, engine.model.forward = engine.model.forward, None
    engine.step()
    engine.model.forward = inner
    for generation in generations:
        with pytest.raises(TypeError):
            list(generation)
    assert engine.complete([5], max_new_tokens=4, stop_at_eos=False).finish == "length" and engine.kv.lengths == []


def test_an_interrupted_step_is_done_again() -> None:
    engine = Engine(tiny("Llama"))
    expected = [engine.complete([5 + n], max_new_tokens=9, stop_at_eos=False).token_ids for n in range(2)]
    inner = engine.model.forward
    left = iter(["", "interrupt", "", "", "interrupt", "", "interrupt"])

    @functools.wraps(inner)
    def interrupted(**kwargs: Any) -> Any:
        out = inner(**kwargs)
        if next(left, "") == "interrupt":
            raise KeyboardInterrupt
        return out

    engine.runner.can_batch  # noqa: B018
    engine.model.forward = interrupted
    generations = [engine.submit([5 + n], max_new_tokens=9, stop_at_eos=False) for n in range(2)]
    count, work = 0, True
    while work:
        try:
            work = engine.step()
        except KeyboardInterrupt:
            count += 1
    assert count == 3 and [tuple(generation.token_ids[1:]) for generation in generations] == expected


def test_a_step_that_is_interrupted_after_its_pass_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("Llama"))
    expected = engine.complete([5], max_new_tokens=9, stop_at_eos=False).token_ids
    calls = iter(range(100))

    def interrupted(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return choose_tokens(*args)

    monkeypatch.setattr("sllm_mini.inference.requests.choose_tokens", interrupted)
    generation = engine.submit([5], max_new_tokens=9, stop_at_eos=False)
    with pytest.raises(KeyboardInterrupt):
        while engine.step():
            pass
    assert tuple(piece.token_id for piece in generation) == expected


def test_cancel_close_and_drop_free_the_slot_and_say_so() -> None:
    engine = Engine(tiny("Llama"))
    names = ["cancelled", "closed", "dropped", "moved", "waiting"]
    for name in names:
        generation = engine.submit([5], max_new_tokens=50, request_id=name)
        if name != "waiting":
            next(generation)
            next(generation)
        if name in ("cancelled", "waiting"):
            generation.cancel()
        elif name == "closed":
            generation.close()
        else:
            assert engine.drop(name, finish="moved" if name == "moved" else "cancelled")
        assert generation.finish == {"closed": None, "moved": "moved"}.get(name, "cancelled")
        assert list(generation) == [] and engine.requests == () and engine.kv.lengths == []
        assert not engine.drop(name)
        with pytest.raises(ModelError, match=f"request '{name}' is not here; it has ended, moved, or never came"):
            generation.session()


def test_ids_limits_and_stop_strings_are_checked() -> None:
    engine = Engine(tiny("Llama"))
    engine_generation = engine.submit([5], max_new_tokens=9, request_id="a")
    with pytest.raises(ValueError, match="a request with the id 'a' is here already"):
        engine.submit([5], max_new_tokens=9, request_id="a")
    with pytest.raises(ModelError, match="no text to find a stop string in"):
        engine.submit([5], max_new_tokens=9, stop="x")
    with pytest.raises(ValueError, match="a stop string is empty"):
        engine.submit([5], max_new_tokens=9, stop=["x", ""])
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        Engine(engine.model, max_batch=0)
    with pytest.raises(ValueError, match="repetition_penalty is 0; it must be a positive number"):
        SamplingOptions(repetition_penalty=0)
    assert engine.requests == ("a",) and engine_generation.finish is None


# --- stop strings ------------------------------------------------------------------------------------------------


def stopped_at(text: str, stops: list[str]) -> str:
    """The oracle: character by character, the longest stop string that the text ends with."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=500, deadline=None, derandomize=True)
@given(pieces=st.lists(st.text("abé🦊", max_size=4), max_size=12), stops=st.lists(st.text("abé🦊", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_whatever_its_pieces(pieces: list[str], stops: list[str]) -> None:
    buffer, said, whole = StopBuffer(stops), "", ""
    for piece in pieces:
        whole += piece
        said += buffer.push(piece)
        if buffer.stopped:
            break
        # Nothing waits that cannot become a stop string, and nothing is said that could.
        assert said + buffer.held == whole and (not buffer.held or any(stop.startswith(buffer.held) for stop in stops))
        assert not any(said.endswith(stop[:n]) and whole == said for stop in stops for n in range(1, len(stop)))
    said += buffer.flush()
    assert said == stopped_at("".join(pieces), stops)
    assert buffer.stopped == (said != "".join(pieces) or any(stop in whole for stop in stops))


def scripted(engine: Engine, token_ids: list[int]) -> None:
    """Lets the model choose these tokens, by their position after a prompt of one token."""
    inner = engine.model.forward

    @functools.wraps(inner)
    def forward(**kwargs: Any) -> Any:
        out = inner(**kwargs)
        for row, position in enumerate(kwargs["position_ids"][:, -1].tolist()):
            out.logits[row, -1, token_ids[position]] = 1e6
        return out

    engine.model.forward = forward


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_engine_stops_before_a_stop_string_that_lies_across_tokens_and_characters(data: st.DataObject) -> None:
    tokenizer = tokenizer_of("byte_level")
    text = "ünïcödé, 猫と犬とŝtöp 🚀 and the rain"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text), "characters of several tokens"
    engine = Engine(tiny("Llama", vocab_size=len(tokenizer)), tokenizer)
    scripted(engine, ids)
    start = data.draw(st.integers(0, len(text) - 2))
    stops = [text[start : start + data.draw(st.integers(1, 6))], *data.draw(st.lists(st.sampled_from(["と犬と", "zzz", "é, 猫x", "🚀"]), max_size=2))]
    generation = engine.generate([3], max_new_tokens=len(ids), stop=stops, stop_at_eos=False)
    pieces = list(generation)
    said = stopped_at(text, stops)
    assert "".join(piece.text for piece in pieces) == said and generation.finish == "stop"
    # It ends with the very token that completes the stop string, and an end token inside one is no end.
    least = next(n for n in range(len(ids) + 1) if any(stop in decode(tokenizer, ids[:n]) for stop in stops))
    assert len(pieces) == least and engine.kv.lengths == []


def test_what_a_stop_string_held_back_is_said_at_the_end() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("the rain", add_special_tokens=False)
    engine = Engine(tiny("Llama", vocab_size=len(tokenizer)), tokenizer)
    scripted(engine, [*ids, 1])
    engine.runner.eos_ids = frozenset({1})
    generation = engine.generate([3], max_new_tokens=len(ids), stop=["rainbow"])
    assert "".join(piece.text for piece in generation) == "the rain" and generation.finish == "length"
    generation = engine.generate([3], max_new_tokens=len(ids) + 1, stop=["rainbow"])
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == "the rain" and generation.finish == "eos" and pieces[-1].token_id == 1 and pieces[-1].text


# --- penalties and padding ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), ids=st.lists(st.integers(0, 199), min_size=1, max_size=30), penalty=st.sampled_from([0.5, 1.0, 1.1, 2.0]))
def test_the_penalty_is_the_processor_of_transformers(seed: int, ids: list[int], penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 4
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone().unsqueeze(0))[0]
    assert torch.equal(penalise(logits, seen_tokens(ids, 200), penalty), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_penalised_greedy_tokens_equal_generate_alone_and_beside_others(family: str) -> None:
    engine = Engine(engine_of(family).model)
    prompt, options = [5, 6, 5, 9], SamplingOptions(repetition_penalty=1.5)
    ids = torch.tensor([prompt])
    kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.5}
    expected = engine.model.generate(ids, **kwargs)[0].tolist()
    assert list(engine.complete(prompt, max_new_tokens=30, sampling=options).token_ids) == expected[4:]
    plain = engine.complete(prompt, max_new_tokens=30).token_ids
    assert list(plain) != expected[4:]
    beside = [engine.submit(prompt, max_new_tokens=30, sampling=options), engine.submit([9] * 11, max_new_tokens=30), engine.submit(prompt, max_new_tokens=30)]
    while engine.step():
        pass
    same_tokens(engine.model, beside[0].token_ids, expected, options, f"{family} penalised")
    same_tokens(engine.model, beside[2].token_ids, [*prompt, *plain], SamplingOptions(), f"{family} beside a penalised one")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_token_that_equals_the_padding_id_is_seen_by_those_after_it(family: str) -> None:
    model = tiny(family)
    free = Engine(model).complete([5, 6], max_new_tokens=25, stop_at_eos=False).token_ids
    model.config.pad_token_id = model.generation_config.pad_token_id = free[4]
    expected = without_cache(model, [5, 6], 25)
    assert expected == list(free) and model.config.pad_token_id in expected[:-1]
    engine = Engine(model)
    generations = [engine.submit([5, 6], max_new_tokens=25, stop_at_eos=False), engine.submit([free[4]] * 5, max_new_tokens=25, stop_at_eos=False)]
    while engine.step():
        pass
    same_tokens(model, generations[0].token_ids, [5, 6, *expected], SamplingOptions(), f"{family} padding")
    same_tokens(model, generations[1].token_ids, [free[4]] * 5 + without_cache(model, [free[4]] * 5, 25), SamplingOptions(), f"{family} prompt of padding")


# --- threads -----------------------------------------------------------------------------------------------------


def in_threads(*bodies: Callable[[], None]) -> None:
    """Runs them at once; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_several_threads_pull_and_each_reads_its_own_text() -> None:
    engine = Engine(tiny("Llama"), max_batch=3)
    alone = [engine.complete([5 + n] * (1 + n), max_new_tokens=40, stop_at_eos=False).token_ids for n in range(6)]
    passes = 0
    inner = engine.model.forward

    @functools.wraps(inner)
    def counted(**kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return inner(**kwargs)

    engine.model.forward = counted
    found: dict[int, list[int]] = {}

    def read(n: int) -> None:
        found[n] = [piece.token_id for piece in engine.submit([5 + n] * (1 + n), max_new_tokens=40, stop_at_eos=False)]

    in_threads(*(functools.partial(read, n) for n in range(6)))
    for n in range(6):
        same_tokens(engine.model, [5 + n] * (1 + n) + found[n], [5 + n] * (1 + n) + list(alone[n]), SamplingOptions(), f"thread {n}")
    assert passes < 6 * 40 and engine.kv.lengths == []


def test_between_steps_gets_in_while_another_thread_steps_in_a_loop() -> None:
    engine = Engine(tiny("Llama"))
    generation = engine.submit([5], max_new_tokens=90, stop_at_eos=False)
    engine.step()
    lengths: list[int] = []

    def look() -> None:
        for _ in range(10):
            with engine.between_steps():
                before = len(generation.token_ids)
                with engine.between_steps():
                    lengths.append(engine.kv_length(generation.request_id))
                assert len(generation.token_ids) == before == lengths[-1] + 1

    in_threads(lambda: [None for _ in generation].clear(), look)
    assert len(set(lengths)) >= 8  # fair: about one look for each step, where a plain lock would let in one or two


def test_turns_go_to_whoever_waited_longest() -> None:
    turns, order = Turns(), []

    def take(n: int) -> None:
        with turns:
            order.append(n)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    with turns:
        assert not turns.enter_if_free()
        for n, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) <= n:
                pass
    for thread in threads:
        thread.join(10)
    assert order == list(range(8)) and turns.enter_if_free()


def test_a_reader_of_a_request_on_hold_waits_until_it_goes_on() -> None:
    engine = Engine(tiny("Llama"))
    expected = engine.complete([5], max_new_tokens=12, stop_at_eos=False).token_ids
    generation = engine.submit([5], max_new_tokens=12, stop_at_eos=False, request_id="a")
    for _ in range(3):
        next(generation)
    engine.hold("a")
    engine.hold("a")
    assert not engine.step() and engine.requests == ("a",) and engine.kv_length("a") == 3
    got: list[int] = []
    reading = threading.Event()

    def read() -> None:
        reading.set()
        got.extend(piece.token_id for piece in generation)

    def let_go() -> None:
        reading.wait(10)
        other = engine.complete([9], max_new_tokens=5, stop_at_eos=False)
        assert len(other.token_ids) == 5 and got == []
        engine.release("a")
        engine.release("a")

    in_threads(read, let_go)
    assert tuple(got) == expected[3:]
    waiting = engine.submit([5], max_new_tokens=9, request_id="b")
    engine.hold("b")
    in_threads(lambda: list(waiting).clear(), lambda: engine.drop("b", finish="moved") and None)
    assert waiting.finish == "moved"


def test_a_generation_that_nobody_holds_leaves_at_the_next_step() -> None:
    engine = Engine(tiny("Llama"))
    pieces: list[Piece] = []
    kept = engine.submit([5], max_new_tokens=30, stop_at_eos=False)
    gone = engine.submit([6], max_new_tokens=30, stop_at_eos=False)
    engine.submit([7], max_new_tokens=3, stop_at_eos=False, on_piece=pieces.append)  # somebody listens, so it stays
    with engine.between_steps():
        del gone
        assert len(engine.requests) == 3
    engine.step()
    assert len(engine.requests) == 2
    assert len(list(kept)) == 30 and [piece.position for piece in pieces] == [1, 2, 3]


# --- times -------------------------------------------------------------------------------------------------------


def test_times_say_where_they_went() -> None:
    engine = Engine(tiny("Llama"), max_batch=1)
    first = engine.submit([5], max_new_tokens=8, stop_at_eos=False)
    second = engine.submit([6], max_new_tokens=8, stop_at_eos=False)
    pieces = [*first, *second]
    ours, theirs = first.timings, second.timings
    assert theirs.queue_seconds >= ours.prefill_seconds + ours.decode_seconds > 0 and ours.load_seconds == 0
    assert ours.decode_steps == theirs.decode_steps == 7
    for generation in (first, second):
        timings = generation.timings
        parts = timings.tokenize_seconds + timings.queue_seconds + timings.load_seconds + timings.prefill_seconds
        assert parts <= timings.first_token_seconds <= parts + 0.05
    assert pieces[-1].seconds >= theirs.first_token_seconds


def test_choices_of_a_batch_are_those_of_its_rows() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 3
    logits[4, 7] = math.nan
    options = [SamplingOptions(), SamplingOptions(1.0, seed=5), SamplingOptions(0.7, top_k=20, seed=6), SamplingOptions(1.0, top_p=0.8, seed=7), SamplingOptions()]
    expected = [int(choose_token(row, one, position)) for row, one, position in zip(logits, options, range(5), strict=True)]
    assert choose_tokens(logits, options, range(5)).tolist() == expected and expected[4] == 300
    assert choose_tokens(logits, [SamplingOptions()] * 5, range(5)).tolist() == [*(int(row.argmax()) for row in logits[:4]), 300]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_a_batch_says_what_each_says_alone(family: str) -> None:
    model = tiny(family).to("cuda")
    alone = [Engine(model).complete([5 + n] * (1 + 3 * n), max_new_tokens=30, stop_at_eos=False).token_ids for n in range(4)]
    engine = Engine(model)
    generations = [engine.submit([5 + n] * (1 + 3 * n), max_new_tokens=30, stop_at_eos=False) for n in range(4)]
    while engine.step():
        pass
    cpu = tiny(family)
    for n, generation in enumerate(generations):
        same_tokens(cpu, generation.token_ids, [5 + n] * (1 + 3 * n) + list(alone[n]), SamplingOptions(), f"gpu {family} {n}")
