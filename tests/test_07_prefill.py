"""Prompts that wait are read several in one pass. Chapter 07.

Oracles: each prompt alone, token by token up to near ties (see `test_07_engine`), and the count of forward passes.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_04_engine import tiny, without_cache
from test_07_engine import FAMILIES, check_rows, same_tokens

from sllm_mini.errors import ModelError
from sllm_mini.inference import Engine, Generation, Piece, SamplingOptions
from sllm_mini.inference.kv import SlotCache
from sllm_mini.inference.masks import Masks
from sllm_mini.inference.runner import Runner
from sllm_mini.inference.sampler import choose_tokens

pytestmark = pytest.mark.usefixtures("one_torch_thread")
BAD = 300
"""A token that a test makes a prompt fail by."""


def warmed(model: Any, **options: Any) -> Engine:
    """An engine whose first pass, which is alone in its step, and whose trial are over."""
    engine = Engine(model, **options)
    engine.complete([5], max_new_tokens=1)
    engine.runner.can_batch  # noqa: B018
    return engine


def watch(engine: Engine, look: Callable[[list[list[int]]], None]) -> None:
    """`look` gets the tokens of each pass, by row, before it is run."""
    inner = engine.model.forward

    @functools.wraps(inner)
    def spy(**kwargs: Any) -> Any:
        look(kwargs["input_ids"].tolist())
        return inner(**kwargs)

    engine.model.forward = spy


def passes_of(engine: Engine) -> list[tuple[int, int]]:
    """Rows and tokens of every pass from now on."""
    seen: list[tuple[int, int]] = []
    watch(engine, lambda rows: seen.append((len(rows), len(rows[0]))))
    return seen


def finish(engine: Engine) -> None:
    while engine.step():
        check_rows(engine)


def as_alone(model: Any, generation: Generation, prompt: list[int], count: int, what: str) -> None:
    assert len(generation.token_ids) == len(prompt) + count and [piece.position for piece in generation] == list(range(len(prompt), len(prompt) + count))
    same_tokens(model, generation.token_ids, prompt + without_cache(model, prompt, count), SamplingOptions(), what)


# --- the pass itself ---------------------------------------------------------------------------------------------


def without_parameter(model: Any, name: str) -> Any:
    """The model with a forward pass that takes no such argument."""
    inner, signature = model.forward, inspect.signature(model.forward)

    def forward(**kwargs: Any) -> Any:
        assert name not in kwargs
        return inner(**kwargs)

    forward.__signature__ = signature.replace(parameters=[one for one in signature.parameters.values() if one.name != name])  # type: ignore[attr-defined]
    model.forward = forward
    return model


def with_own_attention(model: Any) -> Runner:
    """A runner as `use_decode_kernel` leaves it, but for the kernel."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from sllm_mini.inference.attention import NAME, decode_attention_forward

    AttentionInterface.register(NAME, decode_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    runner = Runner(model)
    assert not runner.can_batch  # the name alone says nothing
    runner._masks, runner._can_batch = Masks(model, runner.windows, runner.dtype, own_attention=True), None
    return runner


def variant(name: str) -> Runner:
    family, _, kind = name.partition(" ")
    model = tiny(family)
    if kind == "eager":
        model.set_attn_implementation("eager")
    if kind == "own":
        return with_own_attention(model)
    return Runner(without_parameter(model, "logits_to_keep") if kind == "all logits" else model)


@pytest.mark.parametrize("name", [*FAMILIES, "Llama eager", "Mistral eager", "Gemma3 eager", "Llama own", "Mistral own", "Llama all logits"])
def test_prompts_in_one_pass_compute_what_each_does_alone(name: str) -> None:
    """Logits, keys and values, and the steps after, behind a row that another request has."""
    runner = variant(name)
    assert runner.can_batch
    prompts = [[(11 * n + 7 * step) % 320 for step in range(length)] for n, length in enumerate((9, 1, 30, 1, 14))]
    joint, alone = runner.new_slots(), runner.new_slots()
    for slots in (joint, alone):
        runner.extend(slots, slots.add_row(), torch.tensor([[3, 4, 5, 6]]))
    before = joint.read(0, 0, 4)
    rows = [joint.add_row() for _ in prompts]
    logits = runner.prefill(joint, rows[0], prompts)
    assert joint.lengths == [4, *map(len, prompts)] and torch.equal(joint.read(0, 0, 4), before)
    for n, prompt in enumerate(prompts):
        expected = runner.extend(alone, alone.add_row(), torch.tensor([prompt]))[0]
        assert float((logits[n] - expected).abs().max()) < 1e-4, n
        ours, theirs = (slots.read(1 + n, 0, len(prompt)).view(torch.float32) for slots in (joint, alone))
        assert float((ours - theirs).abs().max()) < 1e-4, n
    for step in range(8):
        tokens = torch.tensor([[50 + step + 20 * row] for row in range(6)])
        both = [runner.decode(slots, tokens) for slots in (joint, alone)]
        assert float((both[0] - both[1]).abs().max()) < 1e-4, step


def test_prompts_of_one_token_each_give_their_own_logits() -> None:
    """As many logits as tokens, whichever the model keeps."""
    for name in ("Llama", "Llama all logits"):
        runner = variant(name)
        slots = runner.new_slots()
        prompts = [[5], [9], [44]]
        rows = [slots.add_row() for _ in prompts]
        logits = runner.prefill(slots, rows[0], prompts)
        for row, prompt in zip(logits, prompts, strict=True):
            other = runner.new_slots()
            assert float((row - runner.extend(other, other.add_row(), torch.tensor([prompt]))[0]).abs().max()) < 1e-4, name


def test_a_model_that_counts_positions_itself_reads_prompts_one_by_one() -> None:
    model = without_parameter(tiny("Llama"), "position_ids")
    engine = Engine(model)
    assert not engine.runner.can_batch
    engine.complete([5], max_new_tokens=1)
    passes = passes_of(engine)
    generations = [engine.submit([5 + n] * (1 + n), max_new_tokens=6, stop_at_eos=False) for n in range(3)]
    finish(engine)
    assert passes[:3] == [(1, 1), (1, 2), (1, 3)] and set(passes[3:]) == {(1, 1)}
    for n, generation in enumerate(generations):
        as_alone(tiny("Llama"), generation, [5 + n] * (1 + n), 6, f"own positions {n}")


def test_what_goes_wrong_alone_or_for_want_of_memory_does_not_end_batching() -> None:
    for error, rows in ((TypeError("no"), 1), (torch.OutOfMemoryError("no"), 2)):
        model = tiny("Llama")
        inner = model.forward

        @functools.wraps(inner)
        def poor(inner: Any = inner, error: Exception = error, rows: int = rows, **kwargs: Any) -> Any:
            if kwargs["input_ids"].shape[0] == rows:
                raise error
            return inner(**kwargs)

        runner = Runner(model)
        model.forward = poor
        with pytest.raises(type(error)):
            runner.can_batch  # noqa: B018
        model.forward = inner
        assert runner.can_batch
    assert not Runner(tiny("GPT2", n_positions=6)).can_batch


# --- how many passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_wait_are_read_in_one_pass_and_say_what_they_say_alone(family: str) -> None:
    engine = warmed(tiny(family))
    passes = passes_of(engine)
    prompts = [[(7 * n + 3 * step) % 320 for step in range(1 + 5 * n)] for n in range(6)]
    generations = [engine.submit(prompt, max_new_tokens=10, stop_at_eos=False) for prompt in prompts]
    finish(engine)
    assert passes == [(1, sum(map(len, prompts))), *[(6, 1)] * 9]
    for prompt, generation in zip(prompts, generations, strict=True):
        as_alone(engine.model, generation, prompt, 10, f"{family} {len(prompt)}")


def test_chance_and_penalties_are_each_requests_own_in_one_pass() -> None:
    engine = warmed(tiny("Llama"))
    options = [SamplingOptions(), SamplingOptions(0.9, seed=4), SamplingOptions(repetition_penalty=1.6), SamplingOptions(1.2, top_k=9, seed=8, repetition_penalty=1.2)]
    prompts = [[5, 6, 7 + n, 5] for n in range(4)]
    alone = [engine.complete(prompt, max_new_tokens=9, sampling=one, stop_at_eos=False).token_ids for prompt, one in zip(prompts, options, strict=True)]
    passes = passes_of(engine)
    generations = [engine.submit(prompt, max_new_tokens=9, sampling=one, stop_at_eos=False) for prompt, one in zip(prompts, options, strict=True)]
    finish(engine)
    assert passes[0] == (1, 16)
    for prompt, one, expected, generation in zip(prompts, options, alone, generations, strict=True):
        same_tokens(engine.model, generation.token_ids, [*prompt, *expected], one, f"{one}")


@pytest.mark.parametrize(
    ("lengths", "max_batch", "expected"),
    [
        ([100, 200, 212, 1, 300, 600, 2, 3], 16, [512, 301, 600, 5]),
        ([513, 513], 16, [513, 513]),
        ([10] * 7, 3, [30]),
        ([10], 3, [10]),
        ([600, 1, 1], 2, [600, 1]),
    ],
)
def test_a_pass_takes_512_tokens_and_as_many_prompts_as_rows_are_free(lengths: list[int], max_batch: int, expected: list[int]) -> None:
    engine = warmed(tiny("Llama", max_position_embeddings=700), max_batch=max_batch)
    passes = passes_of(engine)
    for n, length in enumerate(lengths):
        engine.submit([n] * length, max_new_tokens=2, stop_at_eos=False, request_id=f"r{n}", on_piece=lambda piece: None)
    engine.step()
    assert passes == [(1, count) for count in expected] and len(engine.kv.lengths) == min(len(lengths), max_batch)
    finish(engine)
    assert sum(ntokens for rows, ntokens in passes if rows == 1 and ntokens > 1) >= sum(lengths) - len(lengths) and engine.requests == ()


def test_those_who_come_while_others_run_join_behind_them() -> None:
    """Beside a guest and a request on hold, which change places with those who come."""
    engine = warmed(tiny("Mistral"))
    passes = passes_of(engine)
    prompts = {"runs": [5, 6], "held": [7] * 12, **{f"late {n}": [30 + n] * (2 + 3 * n) for n in range(3)}}
    found = {name: engine.submit(prompts[name], max_new_tokens=14, stop_at_eos=False, request_id=name) for name in ("runs", "held")}
    engine.step()
    engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id="guest").session())
    engine.absorb("guest", list(range(40, 59)))
    engine.hold("held")
    kept = {name: engine.read_kv(name, 0, engine.kv_length(name)) for name in ("guest", "held")}
    found |= {name: engine.submit(prompts[name], max_new_tokens=14, stop_at_eos=False, request_id=name) for name in prompts if name not in found}
    del passes[:]
    engine.step()
    check_rows(engine)
    assert passes == [(1, 2 + 5 + 8), (1, 1)]
    for name, before in kept.items():
        assert torch.equal(engine.read_kv(name, 0, engine.kv_length(name)), before)
    engine.release("held")
    finish(engine)
    for name, prompt in prompts.items():
        as_alone(engine.model, found[name], prompt, 14, name)


def test_a_request_that_comes_while_those_who_wait_are_counted_waits_its_turn() -> None:
    engine = warmed(tiny("Llama"))
    late: list[Generation] = []

    class Slow(list[int]):
        def __len__(self) -> int:
            if not late:  # as another thread does
                late.append(engine.submit([9], max_new_tokens=2, stop_at_eos=False))
            return super().__len__()

    both = [engine.submit([5 + n], max_new_tokens=2, stop_at_eos=False) for n in range(2)]
    both[0]._request.token_ids = Slow([5])
    finish(engine)
    assert all(generation.finish == "length" for generation in (*both, *late))


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "gives no numbers"])
def test_one_bad_prompt_ends_alone(how: str) -> None:
    engine = warmed(tiny("Llama"))
    long = engine.submit([8] * 40, max_new_tokens=30, stop_at_eos=False)
    engine.step()
    if how == "raises":

        def refuse(rows: list[list[int]]) -> None:
            if BAD in rows[0]:
                raise RuntimeError("a bad prompt")

        watch(engine, refuse)
    else:
        with torch.no_grad():
            engine.model.get_input_embeddings().weight[BAD] = math.nan
    prompts = [[5, 6, 7], [9, BAD, *[9] * 30], [11] * 9]
    generations = [engine.submit(prompt, max_new_tokens=12, stop_at_eos=False) for prompt in prompts]
    engine.step()
    assert [len(generation.token_ids) - len(prompt) for generation, prompt in zip(generations, prompts, strict=True)] == [1, 0, 1]
    assert all(torch.isfinite(tensor).all() for tensor, _, _ in engine.kv._parts())
    with pytest.raises((RuntimeError, ModelError), match="a bad prompt" if how == "raises" else "not finite at position 32"):
        next(generations[1])
    finish(engine)
    model = tiny("Llama")
    for n in (0, 2):
        as_alone(model, generations[n], prompts[n], 12, f"beside a bad one {n}")
    as_alone(model, long, [8] * 40, 30, "that ran already")


def interrupt(monkeypatch: pytest.MonkeyPatch, engine: Engine, where: str, which: int) -> None:
    """Ctrl-C in the pass after `which` others, or at the choice that follows it."""
    count = iter(range(1000))

    def maybe() -> None:
        if next(count) == which:
            raise KeyboardInterrupt

    if where == "pass":
        watch(engine, lambda rows: maybe())
    else:

        def choose(*args: Any) -> torch.Tensor:
            maybe()
            return choose_tokens(*args)

        monkeypatch.setattr("sllm_mini.inference.requests.choose_tokens", choose)


@pytest.mark.parametrize("where", ["pass", "choice"])
def test_an_interruption_leaves_all_waiting_and_a_later_step_answers_all(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = warmed(tiny("Llama"))
    held = engine.submit([7] * 12, max_new_tokens=9, stop_at_eos=False, request_id="held")
    engine.step()
    engine.hold("held")
    engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id="guest").session())
    engine.absorb("guest", list(range(40, 59)))
    kept = {name: engine.read_kv(name, 0, engine.kv_length(name)) for name in ("guest", "held")}
    prompts = [[5 + n] * (1 + 4 * n) for n in range(4)]
    generations = [engine.submit(prompt, max_new_tokens=9, stop_at_eos=False) for prompt in prompts]
    interrupt(monkeypatch, engine, where, 0)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [request.token_ids for request in engine._waiting] == prompts and all(generation._request.row is None for generation in generations)
    assert len(engine.kv.lengths) == 2 and engine.requests == ("held", *(generation.request_id for generation in generations))
    check_rows(engine)
    for name, before in kept.items():
        assert torch.equal(engine.read_kv(name, 0, engine.kv_length(name)), before)
    passes = passes_of(engine)
    engine.release("held")
    engine.step()
    assert passes[0] == (1, sum(map(len, prompts)))
    engine.drop("guest")
    finish(engine)
    for prompt, generation in zip(prompts, generations, strict=True):
        as_alone(engine.model, generation, prompt, 9, f"interrupted {len(prompt)}")
    as_alone(engine.model, held, [7] * 12, 9, "held")


def test_a_first_pass_that_is_interrupted_is_still_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("Llama"))
    interrupt(monkeypatch, engine, "pass", 0)
    generations = [engine.submit([5 + n], max_new_tokens=4, stop_at_eos=False) for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.step()
    assert [len(generation.token_ids) for generation in generations] == [2, 1, 1]
    finish(engine)
    assert [generation.finish for generation in generations] == ["length"] * 3


def test_a_late_request_that_is_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = warmed(tiny("Llama"))
    source = Engine(engine.model).submit([5, 6, 7], max_new_tokens=12, stop_at_eos=False, request_id="a")
    expected = [next(source).token_id for _ in range(4)]
    arrived = engine.adopt(source.session())
    interrupt(monkeypatch, engine, "choice", 0)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    finish(engine)
    expected += [piece.token_id for piece in source]
    assert arrived.token_ids[3:] == expected and arrived.finish == "length"


# --- readers that meddle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@pytest.mark.parametrize("how", ["cancel", "hold", "read"])
def test_a_reader_may_meddle_with_a_neighbour_of_the_same_pass(how: str, family: str) -> None:
    """Its first piece cancels, holds or reads a request that was read with it, or, where each is read alone, waits still."""
    engine = warmed(tiny(family))
    prompts = [[5 + n] * (2 + n) for n in range(4)]
    generations: list[Generation] = []
    read: list[Piece] = []

    def meddle(piece: Piece) -> None:
        if piece.position == 2:
            other = generations[2]
            if how == "cancel":
                other.cancel()
            elif how == "hold":
                engine.hold(other.request_id)
                read.append(Piece(0, "", 0.0, len(other.token_ids)))
            else:
                read.append(next(other))

    for n, prompt in enumerate(prompts):
        generations.append(engine.submit(prompt, max_new_tokens=8, stop_at_eos=False, on_piece=meddle if n == 0 else None))
    finish(engine)
    if how == "cancel":
        assert generations[2].finish == "cancelled" and generations[2].token_ids == prompts[2]
    elif how == "hold":
        assert len(generations[2].token_ids) == read[0].position == len(prompts[2])
        engine.release(generations[2].request_id)
        finish(engine)
    else:
        assert [piece.position for piece in (*read, *generations[2])] == list(range(4, 12))
        generations[2]._request.pieces.extend([*read, *[Piece(0, "", 0.0, position) for position in range(5, 12)]])
    for n, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        if n != 2 or how != "cancel":
            as_alone(engine.model, generation, prompt, 8, f"{family} {how} {n}")
    assert engine.kv.lengths == [] and engine.requests == ()


@pytest.mark.parametrize("family", ["Llama", "Bloom"])
def test_a_reader_may_drop_a_neighbour_that_decodes_after_it(family: str) -> None:
    engine = warmed(tiny(family))
    prompts = [[5 + n] * (2 + n) for n in range(3)]
    generations: list[Generation] = []

    def drop(piece: Piece) -> None:
        if piece.position == 4:
            generations[1].cancel()

    for n, prompt in enumerate(prompts):
        generations.append(engine.submit(prompt, max_new_tokens=8, stop_at_eos=False, on_piece=drop if n == 0 else None))
    finish(engine)
    assert generations[1].finish == "cancelled" and len(generations[1].token_ids) == 3 + 2
    for n in (0, 2):
        as_alone(engine.model, generations[n], prompts[n], 8, f"{family} {n}")


def test_a_reader_that_drops_one_who_runs_does_not_let_one_on_hold_run() -> None:
    engine = warmed(tiny("Llama"))
    runs, held = (engine.submit([5 + n], max_new_tokens=20, stop_at_eos=False, request_id=f"r{n}") for n in range(2))
    engine.step()
    engine.hold("r1")
    engine.submit([9], max_new_tokens=1, on_piece=lambda piece: runs.cancel())
    engine.step()
    assert runs.finish == "cancelled" and len(held.token_ids) == 2
    engine.release("r1")
    finish(engine)
    as_alone(engine.model, held, [6], 20, "held")


# --- memory and times --------------------------------------------------------------------------------------------


def test_rows_that_change_places_leave_nothing_behind_their_ends() -> None:
    runner = Runner(tiny("Llama"))
    for longer in (0, 1):
        slots: SlotCache = runner.new_slots()
        for row in range(2):
            runner.extend(slots, slots.add_row(), torch.tensor([[5] * (20 if row == longer else 3)]))
        held = [slots.read(row, 0, slots.lengths[row]) for row in range(2)]
        slots.swap_rows(0, 1)
        for row in range(2):
            assert torch.equal(slots.read(row, 0, slots.lengths[row]), held[1 - row])
            assert all(not tensor[row, :, slots.lengths[row] :].any() for tensor, _, _ in slots._parts())


def test_a_row_that_holds_no_numbers_is_cleaned_where_it_lies() -> None:
    """It is not the last row, so another one comes to lie there, beside a longer one."""
    engine = warmed(tiny("Llama"))
    nan = torch.full((60 * engine.kv_nbytes_per_token // 4,), math.nan).view(torch.uint8)
    engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id="bad").session())
    engine.write_kv("bad", 0, nan)
    engine.prepare(Engine(engine.model).submit([5], max_new_tokens=9, request_id="good").session())
    engine.drop("bad")
    assert all(torch.isfinite(tensor).all() for tensor, _, _ in engine.kv._parts())


def test_growing_that_is_interrupted_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tiny("Llama"))
    slots = runner.new_slots()
    runner.extend(slots, slots.add_row(), torch.tensor([[5, 6, 7]]))
    before, calls, inner = slots.read(0, 0, 3), iter(range(9)), torch.Tensor.__setitem__

    def interrupted(self: torch.Tensor, key: Any, value: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        inner(self, key, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "__setitem__", interrupted)
        slots.add_row()
    assert torch.equal(slots.read(0, 0, 3), before)
    slots.add_row()
    assert torch.equal(slots.read(0, 0, 3), before)


def test_times_of_one_pass_are_those_of_each_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny("Llama"))
    first = engine.submit([5], max_new_tokens=3, stop_at_eos=False)
    both = [engine.submit([6 + n] * (1 + n), max_new_tokens=3, stop_at_eos=False) for n in range(2)]
    trials: list[float] = []

    def trial() -> bool:
        trials.append(time.perf_counter())
        time.sleep(0.02)
        trials.append(time.perf_counter())
        return True

    monkeypatch.setattr(engine.runner, "_trial", trial)
    finish(engine)
    # What comes before the pass, the trial too, is a wait.
    waited = trials[1] - both[0]._request.requested - both[0].timings.tokenize_seconds
    ours, theirs = (generation.timings for generation in both)
    assert ours.prefill_seconds == theirs.prefill_seconds > 0 and ours.load_seconds == theirs.load_seconds == 0
    assert 0 < theirs.queue_seconds <= ours.queue_seconds and ours.queue_seconds > first.timings.prefill_seconds
    assert len(trials) == 2 and ours.queue_seconds >= waited
    for timings in (ours, theirs):
        assert timings.tokenize_seconds + timings.queue_seconds + timings.prefill_seconds <= timings.first_token_seconds and timings.decode_steps == 2
