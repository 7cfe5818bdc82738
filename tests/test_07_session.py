"""The state of a request as one object, and an engine that goes on with it at the very next token. Chapter 07.

Oracle: the same request that stayed where it was. With its keys and values moved, tokens, texts and bytes are equal;
computed again, tokens are equal unless the two best differ by less than EPSILON (see test_07_engine).
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_04_engine import tiny, tokenizer_of
from test_07_engine import FAMILIES, in_threads, options_of, same_tokens

from sllm_mini.errors import FormatError, ModelError
from sllm_mini.inference import Engine, Generation, Piece, SamplingOptions, Session, Timings

GREEDY = SamplingOptions()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- bytes -------------------------------------------------------------------------------------------------------

seconds_of = st.floats(0, 1e9)
names_of = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def sessions(pick: st.DrawFn) -> Session:
    token_ids = tuple(pick(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)))
    prompt = pick(st.integers(1, len(token_ids)))
    return Session(
        request_id=pick(names_of),
        model=pick(st.text("abc0", max_size=9)),
        token_ids=token_ids,
        prompt_length=prompt,
        max_new_tokens=max(len(token_ids) - prompt, 1) + pick(st.integers(0, 1000)),
        sampling=pick(options_of),
        stop=tuple(pick(st.lists(names_of, max_size=3))),
        stop_at_eos=pick(st.booleans()),
        emitted_text_nchars=pick(st.integers(0, 2**40)),
        held_text=pick(st.none() | st.text("abé🦊", max_size=5)),
        timings=Timings(*pick(st.tuples(seconds_of, seconds_of, seconds_of, seconds_of, st.integers(0, 999), seconds_of, seconds_of))),
        elapsed_seconds=pick(seconds_of),
        logprobs=pick(st.none() | st.integers(0, 20)),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(session=sessions())
def test_bytes_and_back(session: Session) -> None:
    raw = session.to_bytes()
    assert Session.from_bytes(raw) == session == Session.from_bytes(memoryview(raw))
    assert Session.from_bytes(raw).to_bytes() == raw
    assert session.remaining_tokens == session.max_new_tokens - len(session.token_ids) + session.prompt_length


@settings(max_examples=300, deadline=None, derandomize=True)
@given(session=sessions(), data=st.data())
def test_any_other_bytes_are_refused_in_a_sentence_or_are_another_whole_session(session: Session, data: st.DataObject) -> None:
    raw = bytearray(session.to_bytes())
    kind = data.draw(st.sampled_from(["cut", "longer", "flip"]))
    if kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "longer":
        raw += b"\xc0"
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = Session.from_bytes(raw)
    except FormatError as error:
        assert str(error).startswith(("the session", "these bytes"))
    else:
        assert kind == "flip" and found != session and found.to_bytes()


PLAIN = Session("a", "m", (5, 6, 7), 2, 9)


def with_field(name: str, value: Any) -> bytes:
    raw = PLAIN.to_bytes()
    fields = msgspec.msgpack.decode(raw[13:])
    fields[name] = value
    return raw[:13] + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not a session"),
        (b"\x80\x04pickle", "not a session"),
        (b"sllm-session\x03rest", "the session has version 3; this release reads versions 1 to 2"),
        (with_field("token_ids", [5, -1]), r"cannot be read: .*>= 0"),
        (with_field("token_ids", "text"), "cannot be read"),
        (with_field("prompt_length", 4), "prompt has 4 of its 3 tokens"),
        (with_field("prompt_length", 0), "prompt has 0 of its 3 tokens"),
        (with_field("max_new_tokens", 0), "the session is of no request: max_new_tokens is 0; it must be at least 1"),
        (with_field("stop", [""]), "a stop string is empty"),
        (with_field("request_id", ""), "request_id is ''; it must be a text of 1 to 200 characters"),
        (with_field("elapsed_seconds", math.nan), "cannot be read"),
        (with_field("elapsed_seconds", math.inf), "not a number of seconds"),
        (with_field("surprise", 1), "unknown field `surprise`"),
        (with_field("sampling", {"type": "_Sampling", "temperature": -1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "repetition_penalty": 1.0}), "temperature is -1.0"),
        (PLAIN.to_bytes() + b"\x00", "cannot be read"),
        ("abc", "is of type str; give what Session.to_bytes wrote"),
        (None, "is of type NoneType"),
        (7, "is of type int"),
    ],
)
def test_odd_bytes_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Session.from_bytes(raw)


def test_what_no_request_can_be_in_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 3}, "version 3"),
        ({"token_ids": ()}, "prompt has 2 of its 0 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"token_ids": (5, 6, 7, 8), "max_new_tokens": 1}, "2 new tokens of at most 1"),
        ({"elapsed_seconds": -1.0}, "not a number of seconds"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(PLAIN, **changes)
    for bad in (replace(PLAIN, token_ids=(5, 6, 2**40)), replace(PLAIN, held_text="\ud800"), replace(PLAIN, model="a" * 300)):
        with pytest.raises(ValueError, match="cannot be written"):
            bad.to_bytes()


ODD: list[tuple[dict[str, Any], str]] = [
    ({"sampling": None}, "sampling is None; it must be a SamplingOptions"),
    ({"sampling": {"temperature": 1.0}}, "sampling is {'temperature': 1.0}; it must be"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; it must be at least 1, and a whole number"),
    ({"max_new_tokens": "9"}, "max_new_tokens is '9'"),
    ({"max_new_tokens": 2**41}, "max_new_tokens is 2199023255552"),
    ({"request_id": 5}, "request_id is 5; it must be a text of 1 to 200 characters"),
    ({"request_id": "a" * 300}, "request_id is 'aaa.*; it must be"),
    ({"request_id": "\ud800"}, "request_id is .* in valid Unicode"),
    ({"stop": ("b" * 70_000,)}, "a stop string is 'bbb.*65,536 characters"),
    ({"stop": (5,)}, "a stop string is 5"),
    ({"stop_at_eos": 1}, "stop_at_eos is 1; it must be True or False"),
]


@pytest.mark.parametrize(("changes", "message"), ODD, ids=lambda value: ", ".join(value) if isinstance(value, dict) else "")
def test_what_a_session_could_not_hold_is_refused_before_it_runs(changes: dict[str, Any], message: str) -> None:
    """By the session, and by the engine before it reaches the batch: its neighbour there goes on as if it had never come."""
    with pytest.raises(ValueError, match=f"^the session is of no request: {message}"):
        replace(PLAIN, **changes)
    engine = Engine(tiny("Llama"))
    alone = engine.generate([5, 6, 7], max_new_tokens=5, stop_at_eos=False)
    expected = [piece.token_id for piece in alone]
    neighbour = engine.generate([5, 6, 7], max_new_tokens=5, stop_at_eos=False)
    next(neighbour)
    for ask in (engine.generate, engine.submit):
        with pytest.raises(ValueError, match=f"^{message}"):
            ask([5, 6], **changes)
    assert [piece.token_id for piece in neighbour] == expected[1:] and neighbour.finish == "length"


def test_a_prompt_is_no_bytes_and_one_that_is_too_long_gets_one_sentence_of_ours() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte_level"))
    tokenizer.model_max_length = 50
    engine = Engine(tiny("Llama"), tokenizer)
    for raw in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        with pytest.raises(ModelError, match="these are bytes: decode them to a text first"):
            engine.generate(raw)
    with pytest.raises(ModelError, match="but this model's context is"):
        engine.generate("word " * 5000)
    assert not tokenizer.deprecation_warnings, "transformers warned of indexing errors that cannot happen"


def test_options_that_no_message_holds_are_refused() -> None:
    for changes in ({"temperature": None}, {"temperature": "1"}, {"top_p": True}, {"top_k": True}, {"top_k": 2**41}, {"seed": 1.0}, {"repetition_penalty": "2"}):
        with pytest.raises(ValueError, match=f"^{next(iter(changes))} is "):
            SamplingOptions(**changes)


# --- going on elsewhere --------------------------------------------------------------------------------------------


def run(engine: Engine) -> None:
    while engine.step():
        pass


def by_kv(source: Engine, there: Engine, session: Session) -> Generation:
    """In three parts, as a staged copy does."""
    length = len(session.token_ids) - 1
    there.prepare(session)
    for start, stop in ((0, length // 3), (length // 3, length - 1 if length else 0), (max(length - 1, 0), length)):
        there.write_kv(session.request_id, start, source.read_kv(session.request_id, start, stop))
    return there.adopt(session)


def by_tokens(source: Engine, there: Engine, session: Session) -> Generation:
    """In two rounds, the second short of the last tokens."""
    there.prepare(session)
    for start, stop in ((0, session.prompt_length), (session.prompt_length, max(len(session.token_ids) - 2, session.prompt_length))):
        there.absorb(session.request_id, session.token_ids[start:stop])
    return there.adopt(session)


def at_once(source: Engine, there: Engine, session: Session) -> Generation:
    return there.adopt(session)


@pytest.mark.parametrize("move", [by_kv, by_tokens, at_once])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_that_moves_at_any_step_goes_on_as_if_it_had_stayed(family: str, move: Callable[[Engine, Engine, Session], Generation]) -> None:
    source, there = Engine(tiny(family)), Engine(tiny(family))
    prompt, count = [5, 0, 7, 9], 14
    for options in (GREEDY, SamplingOptions(1.0, top_k=40, top_p=0.95, seed=99, repetition_penalty=1.3)):
        stayed = source.submit(prompt, max_new_tokens=count, sampling=options, stop_at_eos=False, request_id="r")
        wanted = Engine(source.model).complete(prompt, max_new_tokens=count, sampling=options, stop_at_eos=False).token_ids
        kv: list[torch.Tensor] = []
        moved: list[tuple[int, Generation]] = []
        for k in range(1, count):
            source.step()
            session = Session.from_bytes(source.session("r").to_bytes())
            assert session.token_ids == (*prompt, *wanted[:k])
            assert source.kv_length("r") == len(session.token_ids) - 1
            kv.append(source.read_kv("r", 0, source.kv_length("r")))
            generation = move(source, there, session)
            if move is by_kv:  # to ask would complete it
                assert there.kv_length("r") == len(session.token_ids) - 1 == len(generation.token_ids) - 1
            pieces = [next(generation)]
            assert pieces[0].position == len(session.token_ids)
            if move is by_kv and generation.finish is None:
                assert there.kv_length("r") == len(session.token_ids)
                assert torch.equal(there.read_kv("r", 0, len(session.token_ids) - 1), kv[-1])
            pieces += generation
            assert [piece.token_id for piece in pieces] == generation.token_ids[len(session.token_ids) :]
            moved.append((k, generation))
        run(source)
        assert tuple(stayed.token_ids[len(prompt) :]) == wanted
        for k, generation in moved:
            assert generation.finish == "length" and len(generation.token_ids) == len(stayed.token_ids)
            if move is by_kv:
                assert generation.token_ids == stayed.token_ids
            same_tokens(source.model, generation.token_ids, stayed.token_ids, options, f"{family} {move.__name__} at {k}")
            assert generation.timings.decode_steps == count - 1 and generation.timings.first_token_seconds == stayed.timings.first_token_seconds
        assert there.kv.lengths == [] and there.requests == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_the_cache_token_by_token(family: str, dtype: torch.dtype) -> None:
    """`[token][layer][key|value][kv_head][head_dim]`, so that ranges can be joined; written elsewhere they read the same."""
    engine, there = Engine(tiny(family).to(dtype)), Engine(tiny(family).to(dtype))
    others = [engine.submit([9] * n, max_new_tokens=40, stop_at_eos=False) for n in (3, 12)]
    engine.submit([5, 6, 7], max_new_tokens=40, stop_at_eos=False, request_id="r", on_piece=lambda _piece: None)
    for _ in range(12):
        engine.step()
    length, size = engine.kv_length("r"), engine.kv_nbytes_per_token
    whole = engine.read_kv("r", 0, length)
    assert whole.dtype == torch.uint8 and whole.is_contiguous() and whole.numel() == length * size
    assert torch.equal(torch.cat([engine.read_kv("r", start, min(start + 4, length)) for start in range(0, length, 4)]), whole)
    row = engine._requests["r"].row
    parts = [held[row, :, :length].transpose(0, 1).reshape(length, -1) for layer in engine.kv.layers for held in (layer.keys, layer.values)]
    assert torch.equal(torch.cat(parts, 1).view(torch.uint8).view(-1), whole)
    assert there.kv_nbytes_per_token == size
    there.prepare(engine.session("r"))
    there.write_kv("r", 0, whole)
    assert torch.equal(there.read_kv("r", 0, length), whole) and there.requests == ()
    assert len(others) == 2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_text_goes_on_without_a_gap_or_a_broken_character(data: st.DataObject) -> None:
    """What is not in the session — the state of the detokenizer, the history of the penalty — follows from its tokens."""
    tokenizer = tokenizer_of("byte_level")
    model = tiny("Llama", vocab_size=len(tokenizer))
    source, there = Engine(model, tokenizer), Engine(model, tokenizer)
    options = SamplingOptions(1.2, seed=data.draw(st.integers(0, 10**6)), repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])))
    whole = source.complete("the in", max_new_tokens=30, sampling=options, stop_at_eos=False)
    start = data.draw(st.integers(0, len(whole.text) - 2))
    stop = [whole.text[start : start + data.draw(st.integers(2, 8))]] if data.draw(st.booleans()) else ["\u1234 no"]
    wanted = source.complete("the in", max_new_tokens=30, sampling=options, stop=stop, stop_at_eos=False)
    generation = source.submit("the in", max_new_tokens=30, sampling=options, stop=stop, stop_at_eos=False, request_id="r")
    said = ""
    for _ in range(data.draw(st.integers(0, max(len(wanted.token_ids) - 1, 0)))):
        said += next(generation).text
    session = generation.session()
    assert session.emitted_text_nchars == len(said) and session.stop == tuple(stop)
    known = data.draw(st.sampled_from(["held text is told", "held text is not known", "prepared before"]))
    if known == "prepared before":
        there.prepare(replace(session, token_ids=session.token_ids[: session.prompt_length], emitted_text_nchars=0, held_text=""))
    moved = there.adopt(replace(session, held_text=None) if known == "held text is not known" else session)
    source.drop("r", finish="moved")
    said += "".join(piece.text for piece in moved)
    assert said == wanted.text and moved.finish == wanted.finish and generation.finish == "moved"


def test_there_and_back_and_there_again_beside_others() -> None:
    one, two = Engine(tiny("Qwen2")), Engine(tiny("Qwen2"))
    others = [engine.submit([9, 8, 7 + n], max_new_tokens=60, stop_at_eos=False) for n, engine in enumerate((one, two))]
    wanted = Engine(one.model).complete([5, 6], max_new_tokens=24, stop_at_eos=False).token_ids
    alone = [Engine(one.model).complete([9, 8, 7 + n], max_new_tokens=60, stop_at_eos=False).token_ids for n in range(2)]
    pieces: list[Piece] = []
    here, there = one, two
    here.submit([5, 6], max_new_tokens=24, stop_at_eos=False, request_id="r", on_piece=pieces.append)
    for _ in range(4):
        for _ in range(5):
            here.step()
            there.step()
        here.hold("r")
        there.prepare(here.session("r"))
        there.write_kv("r", 0, here.read_kv("r", 0, here.kv_length("r")))
        there.adopt(here.session("r"), on_piece=pieces.append)
        assert here.drop("r", finish="moved")
        here, there = there, here
    run(one)
    run(two)
    same_tokens(one.model, [5, 6, *(piece.token_id for piece in pieces)], [5, 6, *wanted], GREEDY, "there and back")
    assert [piece.position for piece in pieces] == list(range(2, 26))
    for n, other in enumerate(others):
        same_tokens(one.model, other.token_ids, [9, 8, 7 + n, *alone[n]], GREEDY, "beside a move")


def test_what_is_missing_is_computed_with_the_next_token_in_one_pass() -> None:
    source, there = Engine(tiny("Llama")), Engine(tiny("Llama"))
    source.submit([5, 0, 7, 9], max_new_tokens=24, request_id="r", stop_at_eos=False, on_piece=lambda _: None)
    for _ in range(8):
        source.step()
    session = source.session("r")
    wanted = Engine(source.model).complete([5, 0, 7, 9], max_new_tokens=24, stop_at_eos=False).token_ids
    passes: list[int] = []
    there.model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    there.submit([3, 1], max_new_tokens=94, request_id="other", stop_at_eos=False, on_piece=lambda _: None)
    there.step()
    for interrupt in ("nothing", "hold", "read", "drop"):
        there.prepare(session)
        there.absorb("r", session.token_ids[:5])
        passes.clear()
        generation = there.adopt(session)
        assert passes == [] and there.session("r").token_ids == session.token_ids
        if interrupt == "hold":
            there.hold("r")
            there.step()
            assert passes == [6, 1] and there.session("r").token_ids == session.token_ids
            there.release("r")
        elif interrupt == "read":
            assert there.read_kv("r", 0, 11).numel() == 11 * there.kv_nbytes_per_token and passes == [6]
        elif interrupt == "drop":
            assert there.drop("r")
            there.step()
            assert generation.finish == "cancelled" and passes == [1]
            continue
        else:
            there.step()
            assert passes == [1, 7], "one token of the other, and in one pass all that was missing and the last"
        assert generation.finish is None and len(list(generation)) == len(wanted) - 8 and tuple(generation.token_ids[4:]) == wanted
    assert there.requests == ("other",) and len(there.kv.lengths) == 1


def test_a_request_that_has_not_begun_moves_too() -> None:
    engine, there = Engine(tiny("Llama")), Engine(tiny("Llama"))
    wanted = engine.complete([5, 6, 7], max_new_tokens=8, stop_at_eos=False).token_ids
    engine.submit([5, 6, 7], max_new_tokens=8, stop_at_eos=False, request_id="r", on_piece=lambda _piece: None)
    engine.hold("r")
    assert not engine.step() and engine.read_kv("r", 0, 0).numel() == 0
    there.prepare(engine.session("r"))
    there.absorb("r", [5, 6])
    generation = there.adopt(engine.session("r"))
    assert len(there.kv.lengths) == 0 and there.requests == ("r",)
    assert tuple(piece.token_id for piece in generation) == wanted


def test_others_step_between_the_chunks_of_a_guest() -> None:
    engine = Engine(tiny("Llama", max_position_embeddings=2048))
    generation = engine.submit([5], max_new_tokens=1500, stop_at_eos=False)
    engine.step()
    stop, stepping, lengths = threading.Event(), threading.Event(), []

    def absorb() -> None:
        engine.prepare(Session("g", "", tuple([5] * 1000), 1000, 2))
        assert stepping.wait(20)
        for _ in range(3):
            before = len(generation.token_ids)
            engine.absorb("g", [7] * 640)  # five chunks
            lengths.append(len(generation.token_ids) - before)
        stop.set()

    def step() -> None:
        while not stop.is_set() and engine.step():
            stepping.set()

    in_threads(absorb, step)
    assert min(lengths) >= 3 and engine.kv_length("g") == 1920


# --- what is refused ---------------------------------------------------------------------------------------------


def test_errors_are_one_sentence_and_leave_nothing() -> None:
    tokenizer = tokenizer_of("byte_level")
    model = tiny("Llama", vocab_size=len(tokenizer))
    source = Engine(model, tokenizer, name="m")
    source.submit([5, 6], max_new_tokens=20, stop_at_eos=False, request_id="r", on_piece=lambda _piece: None)
    for _ in range(4):
        source.step()
    session = source.session("r")
    there = Engine(model, tokenizer, name="m", max_batch=2)
    refused: list[tuple[Any, Session, str]] = [
        (Engine(model, tokenizer, name="n"), session, "the session is of model 'm' and this engine runs 'n'"),
        (Engine(model, tokenizer), session, "the session is of model 'm' and this engine runs ''"),
        (source, session, "a request with the id 'r' is here already"),
        (there, replace(session, max_new_tokens=4), "has given all its 4 tokens"),
        (there, replace(session, max_new_tokens=4000), "context is 96 tokens"),
        (there, replace(session, token_ids=(*session.token_ids, 100_000)), "token 6 of the prompt is 100000"),
        (there, replace(session, emitted_text_nchars=session.emitted_text_nchars + 1), "not what this engine's tokenizer makes of its tokens"),
        (there, replace(session, held_text="x"), "not what this engine's tokenizer makes of its tokens"),
        (Engine(model, name="m"), session, "has text and this engine has no tokenizer"),
    ]
    for engine, bad, message in refused:
        rows = len(engine.kv.lengths)
        for call in (engine.prepare, engine.adopt):
            with pytest.raises(ModelError, match=message):
                call(bad)
        assert len(engine.kv.lengths) == rows and len(engine._guests) == 0

    with pytest.raises(ModelError, match="there is no guest 'r'; prepare it first"):
        there.absorb("r", [5])
    with pytest.raises(ModelError, match="there is no guest 'r'; prepare it first"):
        there.write_kv("r", 0, torch.empty(0, dtype=torch.uint8))
    there.prepare(session)
    with pytest.raises(ModelError, match="'r' is here already; drop it first"):
        there.prepare(session)
    for call in (there.session, there.hold, there.release):
        with pytest.raises(ModelError, match="request 'r' is a guest, which does not run yet; adopt it first"):
            call("r")
    size = there.kv_nbytes_per_token
    with pytest.raises(ValueError, match=f"takes uint8 in multiples of {size} bytes a token"):
        there.write_kv("r", 0, torch.empty(size + 1, dtype=torch.uint8))
    with pytest.raises(ModelError, match="holds the KV of 0 tokens, so tokens from 3 on do not follow; send from there"):
        there.write_kv("r", 3, torch.empty(size, dtype=torch.uint8))
    with pytest.raises(ModelError, match=r"holds the KV of 5 tokens; ask for a range of those, not \[0, 6\)"):
        source.read_kv("r", 0, 6)
    with pytest.raises(ModelError, match=r"not \[3, 2\)"):
        source.read_kv("r", 3, 2)
    there.prepare(replace(session, request_id="s"))
    with pytest.raises(ModelError, match="there is no slot for request 't': all 2 are taken"):
        there.adopt(replace(session, request_id="t"))
    there.absorb("r", [5, 6, 999 % len(tokenizer)])
    with pytest.raises(ModelError, match="does not begin with the tokens that were sent before it"):
        there.adopt(session)
    assert there.kv.lengths == [0] and there.drop("s") and not there.drop("r") and there.kv.nbytes == 0


def test_an_engine_is_named_after_its_checkpoint(tmp_path: Any) -> None:
    from sllm_mini.checkpoint import save_checkpoint

    save_checkpoint(tiny("GPT2"), tmp_path / "a")
    save_checkpoint(tiny("GPT2"), tmp_path / "b")
    save_checkpoint(tiny("GPT2", n_layer=1), tmp_path / "c")
    names = [Engine.load(tmp_path / name, overlap=name == "b").name for name in "abc"]
    assert names[0] == names[1] != names[2] and all(names)


def test_the_first_request_of_an_overlapped_load_says_how_long_it_waited_for_weights(tmp_path: Any) -> None:
    from sllm_mini.checkpoint import save_checkpoint

    save_checkpoint(tiny("Llama"), tmp_path / "a")
    engine = Engine.load(tmp_path / "a", overlap=True)
    first = engine.complete([5], max_new_tokens=3, stop_at_eos=False)
    assert 0 < first.timings.load_seconds < first.timings.first_token_seconds
    assert engine.complete([5], max_new_tokens=3, stop_at_eos=False).timings.load_seconds == 0


@pytest.mark.gpu
def test_on_a_gpu_bytes_and_tokens_move_exactly() -> None:
    source, there = Engine(tiny("Llama").to("cuda")), Engine(tiny("Llama").to("cuda"))
    generation = source.submit([5, 6, 7], max_new_tokens=20, stop_at_eos=False, request_id="r")
    for _ in range(7):
        source.step()
    data = source.read_kv("r", 0, source.kv_length("r"))
    assert data.is_pinned() and data.device.type == "cpu"
    there.prepare(source.session("r"))
    there.write_kv("r", 0, data)
    assert torch.equal(there.read_kv("r", 0, 9), data)
    moved = there.adopt(source.session("r"))
    run(source)
    run(there)
    assert moved.token_ids == generation.token_ids
