"""How likely each token was: told of the model's own logits, to those who ask only, over moves, deaths and old bytes; and as OpenAI writes it. Chapter 11."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine, scores_of, whole_text
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from serving_world import MIB, World, open_world
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sllm_mini.cluster.api import Ask, Deployment, Stream
from sllm_mini.cluster.journal import Journal, read_journal
from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.inference import requests
from sllm_mini.inference.engine import Engine
from sllm_mini.inference.ownership import EpochRegister, TokenLedger
from sllm_mini.inference.ownership.ledger import LedgerPiece
from sllm_mini.inference.ownership.messages import MAX_VECTOR_NBYTES, Token
from sllm_mini.inference.ownership.server import OwnershipClient, OwnershipServer
from sllm_mini.inference.requests import Piece
from sllm_mini.inference.sampler import SamplingOptions, likeliest
from sllm_mini.inference.session import Session
from sllm_mini.inference.text import load_tokenizer
from sllm_mini.serving.logprobs import TokenNames, chat_logprobs, text_logprobs
from sllm_mini.types import Epoch

VOCABULARY = 64
OLD_SESSION = (
    "c2xsbS1zZXNzaW9uAY2kdHlwZadTZXNzaW9uqnJlcXVlc3RfaWShcqVtb2RlbKFtqXRva2VuX2lkc5MFBgetcHJvbXB0X2xlbmd0aAKubWF4X25ld190b2tlbnMJqHNhbXBsaW5nhqR0eXBlqV9TYW1wbGluZ6t0ZW1wZXJhdHVyZcs/"
    "4AAAAAAAAKV0b3BfawCldG9wX3DLP/AAAAAAAACkc2VlZAOycmVwZXRpdGlvbl9wZW5hbHR5yz/wAAAAAAAApHN0b3CRoXirc3RvcF9hdF9lb3PCs2VtaXR0ZWRfdGV4dF9uY2hhcnMAqWhlbGRfdGV4dKCndGltaW5nc4ikdHlwZahfVGlt"
    "aW5nc7B0b2tlbml6ZV9zZWNvbmRzywAAAAAAAAAAr3ByZWZpbGxfc2Vjb25kc8sAAAAAAAAAAK5kZWNvZGVfc2Vjb25kc8sAAAAAAAAAALNmaXJzdF90b2tlbl9zZWNvbmRzywAAAAAAAAAArGRlY29kZV9zdGVwcwCtcXVldWVfc2Vjb25k"
    "c8sAAAAAAAAAAKxsb2FkX3NlY29uZHPLAAAAAAAAAACvZWxhcHNlZF9zZWNvbmRzywAAAAAAAAAA"
)
OLD_TAKEN = (
    "xgAAAB/fxt2DpHR5cGWlVGFrZW6iYXTLP/gAAAAAAACmdG9rZW5zkoikdHlwZaVUb2tlbqpyZXF1ZXN0X2lkoXKlZXBvY2gBqHBvc2l0aW9uAqh0b2tlbl9pZAekdGV4dKFhpmZpbmlzaMCnbG9ncHJvYsCIpHR5cGWlVG9rZW6qcmVxdWVz"
    "dF9pZKFypWVwb2NoAahwb3NpdGlvbgOodG9rZW5faWQIpHRleHShYqZmaW5pc2imbGVuZ3Rop2xvZ3Byb2LLv+AAAAAAAAA="
)
"""What was written before there were these fields: by a Session, and by a journal for two tokens."""


def model_of(seed: int = 3) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of()


def checked(model: Any, token_ids: list[int], pieces: list[Piece], count: int) -> None:
    """Against one pass of transformers over the whole text."""
    with torch.inference_mode():
        oracle = model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
    for piece in pieces:
        row = oracle[piece.position - 1]
        assert piece.logprob == pytest.approx(float(row[piece.token_id]), abs=1e-5)
        assert len(piece.top) == count and [logprob for _, logprob in piece.top] == sorted((logprob for _, logprob in piece.top), reverse=True)
        assert [logprob for _, logprob in piece.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-5)
        assert all(logprob == pytest.approx(float(row[token_id]), abs=1e-5) for token_id, logprob in piece.top)


# --- the engine -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3) | st.floats(-90, 90, width=16), min_size=1, max_size=30), st.integers(0, 20), st.data())
def test_the_likeliest_are_sorted_sum_to_one_at_most_and_of_equals_the_lowest(scores: list[float], count: int, data: st.DataObject) -> None:
    logits = torch.tensor(scores, dtype=torch.bfloat16)
    token = data.draw(st.integers(0, len(scores) - 1))
    logprob, top = likeliest(logits, token, count)
    exact = logits.double().log_softmax(-1)
    wanted = sorted(range(len(scores)), key=lambda one: (-float(logits[one]), one))[:count]
    assert [one for one, _ in top] == wanted and logprob == pytest.approx(float(exact[token]), abs=1e-4)
    assert all(found == pytest.approx(float(exact[one]), abs=1e-4) for one, found in top)
    total = sum(math.exp(found) for _, found in top)
    assert total <= 1 + 1e-5 and (count < len(scores) or total == pytest.approx(1, abs=1e-5))
    if count:
        assert top[0][0] == int(logits.max(-1).indices)  # as the greedy choice has it


def test_whoever_asks_is_told_and_nobody_else_pays(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(requests, "likeliest", lambda logits, token_id, count: calls.append(count) or likeliest(logits, token_id, count))  # type: ignore[func-returns-value]
    engine = Engine(model)
    odd = SamplingOptions(temperature=0.7, top_k=9, seed=4, repetition_penalty=1.7)
    asked = engine.generate([5, 6, 7], max_new_tokens=12, stop_at_eos=False, logprobs=5)
    others = [engine.generate([8] * 9, max_new_tokens=12, stop_at_eos=False, sampling=each) for each in (SamplingOptions(), odd)]
    drawn = engine.generate([9, 4], max_new_tokens=12, stop_at_eos=False, sampling=odd, logprobs=0)
    all_of_it = engine.generate([5], max_new_tokens=3, stop_at_eos=False, logprobs=20)
    told = {generation.request_id: list(generation) for generation in (asked, *others, drawn, all_of_it)}
    assert all((piece.logprob, piece.top) == (None, ()) for generation in others for piece in told[generation.request_id])
    assert sorted(calls) == [0] * 12 + [5] * 12 + [20] * 3
    for generation, count in ((asked, 5), (drawn, 0), (all_of_it, 20)):
        checked(model, generation.token_ids, told[generation.request_id], count)
    assert all(piece.top[0] == (piece.token_id, piece.logprob) for piece in told[asked.request_id])  # greedy
    alone = Engine(model).generate([5, 6, 7], max_new_tokens=12, stop_at_eos=False)
    assert [piece.token_id for piece in alone] == asked.token_ids[3:] and not engine.requests


def test_a_request_that_moves_tells_them_all(model: Any) -> None:
    here, there = Engine(model, name="m"), Engine(model, name="m")
    before: list[Piece] = []
    here.generate([5, 6, 7], max_new_tokens=14, stop_at_eos=False, logprobs=3, request_id="r", on_piece=before.append)
    for _ in range(6):
        here.step()
    session = Session.from_bytes(here.session("r").to_bytes())
    data = here.read_kv("r", 0, 4)
    here.drop("r", "moved")
    there.prepare(session)
    there.write_kv("r", 0, data)
    generation = there.adopt(session)  # the rest it computes in its first step
    pieces = before + list(generation)
    assert [piece.position for piece in pieces] == list(range(3, 17))
    checked(model, generation.token_ids, pieces, 3)


def test_how_many_there_may_be(model: Any) -> None:
    for logprobs in (-1, 21, 2.0, True):
        with pytest.raises(ValueError, match="logprobs is"):
            Engine(model).generate([5], logprobs=logprobs)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="logprobs is"):
            Session("r", "m", (5,), 1, 4, logprobs=logprobs)  # type: ignore[arg-type]


# --- what is written --------------------------------------------------------------------------------------------


def test_bytes_of_before_are_read(tmp_path: Path) -> None:
    raw = base64.b64decode(OLD_SESSION)
    session = Session.from_bytes(raw)
    assert session == Session("r", "m", (5, 6, 7), 2, 9, SamplingOptions(temperature=0.5, seed=3), ("x",), False) and (session.logprobs, session.embed) == (None, False)
    journal = Journal(tmp_path / "journal", lambda: 1.5)
    journal.opened(1, "r", "a", "", 1.0, raw)
    journal.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(base64.b64decode(OLD_TAKEN))
    (past,) = read_journal(tmp_path / "journal")
    assert past.pieces == [LedgerPiece(2, 7, "a", Epoch(1), 1.5), LedgerPiece(3, 8, "b", Epoch(1), 1.5, -0.5)] and past.finish == "length"
    assert Session.from_bytes(past.opened.session) == session


def test_a_journal_keeps_all_that_was_told(tmp_path: Path) -> None:
    session = Session("r", "m", (5, 6), 2, 9, logprobs=2)
    journal = Journal(tmp_path / "journal", lambda: 1.5)
    journal.opened(1, "r", "a", "", 1.0, session.to_bytes())
    journal.taken([Token("r", 1, 2, 7, "a", None, -0.5, ((7, -0.5), (3, -1.5))), Token("r", 1, 3, 7, "b", None, -math.inf, (), b"vector")])
    for _ in range(2):
        (past,) = read_journal(tmp_path / "journal")
        assert [(piece.logprob, piece.top, piece.vector) for piece in past.pieces] == [(-0.5, ((7, -0.5), (3, -1.5)), None), (-math.inf, (), b"vector")]
        assert Session.from_bytes(past.opened.session) == session
        journal.compact()
    journal.close()


def test_large_tokens_go_to_the_ledger_in_several_messages(tmp_path: Path) -> None:
    register = EpochRegister()
    ledger = TokenLedger(register)
    tokens = []
    with OwnershipServer(register, ledger, tmp_path / "arbiter") as server, OwnershipClient(server.address) as client:
        for number in range(40):
            ledger.open(Session(f"r{number}", "m", (5,), 1, 300))
            register.claim(f"r{number}", "one", 0)
            tokens.append(Token(f"r{number}", 1, 1, 7, "", "length", None, (), bytes(MAX_VECTOR_NBYTES)))
        ledger.open(Session("long", "m", (5,), 1, 300))
        register.claim("long", "one", 0)
        tokens += [Token("long", 1, 1 + number, 7, "x" * 90, None, -0.5, ((1 << 31, -0.123456789),) * 20) for number in range(290)]
        assert client.deliver(tokens) == ["taken"] * len(tokens) and client.deliver([]) == []
    assert len(ledger.pieces("r39")[0].vector or b"") == MAX_VECTOR_NBYTES and len(ledger.pieces("long")[-1].top) == 20


def told(stream: Stream, prompt: tuple[int, ...], tokens: int, count: int) -> list[LedgerPiece]:
    """A double's pieces, whole, with what it must say of each."""
    pieces = list(stream)
    ids = prompt + whole_text(Session("x", "x", prompt, len(prompt), tokens, stop_at_eos=False))[0]
    assert tuple(piece.token_id for piece in pieces) == ids[len(prompt) :]
    assert [(piece.logprob, piece.top) for piece in pieces] == [scores_of(ids[: piece.position], 0, count) for piece in pieces]
    return pieces


def test_doubles_that_move_tell_them_all() -> None:
    said: list[Any] = []
    session = Session("r", "fake", (5, 6), 2, 30, stop_at_eos=False, logprobs=2)
    one, other = FakeEngine(), FakeEngine()
    one.adopt(session, on_piece=said.append)
    for _ in range(9):
        one.step()
    moved = Session.from_bytes(one.session("r").to_bytes())
    one.drop("r", "moved")
    other.adopt(moved, on_piece=said.append)
    while other.step():
        pass
    ids = (5, 6, *(piece.token_id for piece in said))
    assert [(piece.logprob, piece.top) for piece in said] == [scores_of(ids[: piece.position], 0, 2) for piece in said] and len(said) == 30


def test_a_request_whose_node_dies_tells_them_all_and_so_does_a_resumed_cluster(tmp_path: Path, world: World) -> None:
    options = LiveOptions(node=NodeOptions(store_dram_nbytes=64 * MIB, engine="fake_engine:make", pace_seconds=0.005, beat_seconds=0.1, silent_seconds=3.0, stuck_seconds=5.0))
    with open_cluster("inprocess:2", folder=tmp_path, options=options) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=10 * MIB, max_instances=1), str(world.source)))
        stream = cluster.submit(Ask("a", [5, 6, 7], 200, stop_at_eos=False, logprobs=4, request_id="r"))
        assert len(list(itertools.islice(iter(stream), 3))) == 3
        cluster.kill_node(next(node.name for node in cluster.nodes() for each in node.instances if each.requests))
        assert len({piece.epoch for piece in told(stream, (5, 6, 7), 200, 4)}) > 1 and stream.report.restarts == 1
        plain = cluster.submit(Ask("a", [5], 9, stop_at_eos=False))
        assert all((piece.logprob, piece.top) == (None, ()) for piece in plain)
    with open_cluster("inprocess:1", folder=tmp_path, options=options, resume=True) as cluster:
        told(cluster.stream("r"), (5, 6, 7), 200, 4)


def test_a_simulated_cluster_has_none(tmp_path: Path, world: World) -> None:
    with open_cluster("simulated", folder=tmp_path) as cluster:
        cluster.deploy(Deployment(ModelSpec(name="a", nbytes=MIB), str(world.source)))
        assert [piece.logprob for piece in cluster.submit(Ask("a", [5], 2, logprobs=3))] == [None, None]


# --- names of tokens --------------------------------------------------------------------------------------------


def test_tokens_bytes_joined_are_the_text(world: World) -> None:
    tokenizer = load_tokenizer(world.source)
    assert tokenizer is not None
    names = TokenNames(tokenizer)
    for text in ("Once upon a time, there was a naïve 🦊 — \x00\n  and tabs\t", "<|end|> of it"):
        found = [names.named(token_id) for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert b"".join(raw or b"" for _, raw in found) == text.encode()
        assert all(name == (raw or b"").decode() for name, raw in found if not name.startswith("bytes:"))
    assert {name for name, _ in found} > {"<|end|>"} and any(name.startswith("bytes:\\x") for name, _ in map(names.named, range(6, 260)))
    assert names.named(99_999) == ("token_id:99999", None) and TokenNames(None).named(5) == ("token_id:5", None)


def test_other_kinds_of_tokenizers_name_their_tokens_too() -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "▁Once": 2, "Once": 3, "<0xF0>": 4, "<0x9F>": 5, "a": 6}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [names.named(each)[1] for each in range(1, 7)] == [b" ", b" Once", b"Once", b"\xf0", b"\x9f", b"a"] and names.named(0)[0] == "<unk>"
    assert names.named(4)[0] == "bytes:\\xf0"
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "on": 1, "##ce": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]"))
    assert [names.named(each)[1] for each in (1, 2)] == [b" on", b"ce"]


# --- over HTTP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("logprobs")) as opened:
        yield opened


def wanted(prompt: tuple[int, ...], tokens: int, seed: int, count: int) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    new = whole_text(Session("x", "x", prompt, len(prompt), tokens, SamplingOptions(seed=seed)))[0]
    return [(token, *scores_of((*prompt, *new[:place]), seed, count)) for place, token in enumerate(new)]


def names_of(world: World) -> TokenNames:
    return TokenNames(load_tokenizer(world.source))


def test_a_chat_tells_them(world: World) -> None:
    names = names_of(world)
    document = world.chat(seed=3, logprobs=True, top_logprobs=4, max_tokens=20).document
    (choice,) = document["choices"]
    tokenizer = load_tokenizer(world.source)
    assert tokenizer is not None
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    due = wanted(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), 20, 3, 4)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        name, raw = names.named(token_id)
        return {"token": name, "logprob": pytest.approx(logprob), "bytes": None if raw is None else list(raw)}

    assert choice["logprobs"] == {"content": [{**entry(token, logprob), "top_logprobs": [entry(*each) for each in top]} for token, logprob, top in due], "refusal": None}
    assert len(due) == document["usage"]["completion_tokens"]
    bare = world.chat(seed=3, logprobs=True).document["choices"][0]["logprobs"]["content"]
    assert all(each["top_logprobs"] == [] for each in bare) and bare[0]["logprob"] == choice["logprobs"]["content"][0]["logprob"]
    assert world.chat(seed=3, logprobs=False).document["choices"][0]["logprobs"] is None


def test_a_text_tells_them(world: World) -> None:
    names = names_of(world)
    for count in (0, 5):
        (choice,) = world.complete(seed=6, logprobs=count, max_tokens=30).document["choices"]
        found, due = choice["logprobs"], wanted((5, 6, 7), 30, 6, count)
        assert found["tokens"] == [names.named(token)[0] for token, _, _ in due]
        assert found["token_logprobs"] == pytest.approx([logprob for _, logprob, _ in due])
        assert [set(each) for each in found["top_logprobs"]] == [{names.named(one)[0] for one, _ in [*top, (token, 0)]} for token, _, top in due]
        assert all(each[name] == logprob for each, name, logprob in zip(found["top_logprobs"], found["tokens"], found["token_logprobs"], strict=True))
        offsets = [*found["text_offset"], len(choice["text"])]
        assert offsets[0] == 0 and offsets == sorted(offsets) and len(offsets) == len(due) + 1
    assert world.complete().document["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", ["chat", "text"])
def test_a_stream_tells_the_same(world: World, path: str) -> None:
    """Of two choices, and with the tokens that let out no text."""
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if path == "chat" else {"logprobs": 2}
    ask: Any = world.chat if path == "chat" else world.complete
    options |= {"seed": 8, "n": 2, "max_tokens": 40}
    whole = ask(**options).document["choices"]
    chunks = [choice for event in ask(**options, stream=True).events[:-1] for choice in event["choices"]]
    for index, choice in enumerate(whole):
        own = [each for each in chunks if each["index"] == index]
        joined: dict[str, list[Any]] = {name: [] for name, values in choice["logprobs"].items() if values is not None}
        text = ""
        for each in own:
            for name, values in (each["logprobs"] or {}).items():
                joined.setdefault(name, []).extend(values or [])
            text += each["delta"].get("content", "") if path == "chat" else each["text"]
        assert {name: values for name, values in joined.items() if values} == {name: values for name, values in choice["logprobs"].items() if values}
        assert text == (choice["message"]["content"] if path == "chat" else choice["text"]) and own[-1]["finish_reason"] == choice["finish_reason"]


def test_what_cannot_be_asked_for(world: World) -> None:
    for reply, param in [
        (world.chat(top_logprobs=3), "top_logprobs"), (world.chat(logprobs=True, top_logprobs=21), "top_logprobs"), (world.chat(logprobs=3), "logprobs"),
        (world.complete(logprobs=6), "logprobs"), (world.complete(logprobs=-1), "logprobs"), (world.complete(logprobs=True), "logprobs"), (world.complete(logprobs=0, echo=True), "logprobs"),
    ]:  # fmt: skip
        assert reply.status == 400 and reply.code in ("invalid_value", "unsupported_value") and reply.document["error"]["param"] == param


def test_the_openai_package_reads_them(world: World) -> None:
    with OpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        chat = client.chat.completions.create(model="a", messages=[{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=2, max_tokens=6, seed=1)
        assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
        first = chat.choices[0].logprobs.content[0]
        assert first.logprob < 0 and len(first.top_logprobs) == 2 and (first.bytes is None or first.token.startswith("bytes:") or bytes(first.bytes).decode() == first.token)
        text = client.completions.create(model="a", prompt="Once", logprobs=5, max_tokens=6, seed=1)
        assert text.choices[0].logprobs is not None and len(text.choices[0].logprobs.tokens or []) == text.usage.completion_tokens  # type: ignore[union-attr]


def test_what_is_impossible_is_a_number_that_json_has() -> None:
    piece = LedgerPiece(3, 7, "", Epoch(1), 0.0, -math.inf, ((8, -1.0), (7, -math.inf)))
    chat, text = chat_logprobs(TokenNames(None), [piece]).content[0], text_logprobs(TokenNames(None), [piece], 4)
    assert (chat.logprob, [each.logprob for each in chat.top_logprobs]) == (-9999, [-1, -9999])
    assert (text.token_logprobs, text.top_logprobs, text.text_offset) == ([-9999], [{"token_id:8": -1, "token_id:7": -9999}], [4])
