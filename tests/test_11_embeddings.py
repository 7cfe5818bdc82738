"""/v1/embeddings: equal to what transformers makes of a text alone, whoever shares its pass; as OpenAI answers; refused where it cannot be. Chapter 11."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from serving_world import MIB, World, open_world
from test_04_engine import tiny

from sllm_mini.checkpoint import open_checkpoint
from sllm_mini.cluster.api import Ask, Deployment
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.errors import ModelError, UnsupportedError
from sllm_mini.inference.engine import Engine
from sllm_mini.inference.ownership import EpochRegister, TokenLedger
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.pieces import Piece, needed_tensors
from sllm_mini.inference.sampler import SamplingOptions
from sllm_mini.inference.session import Session
from sllm_mini.inference.staged import StagedEngine, StageServer
from sllm_mini.inference.text import load_tokenizer
from sllm_mini.loading import load_model
from sllm_mini.loading.model import build_skeleton
from sllm_mini.serving.options import Limits
from sllm_mini.types import Epoch

PROMPTS = [[5, 6, 7, 8, 9], [11, 3], [4] * 40, [0, 0, 9, 0], [7]]


def expected(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """transformers' own, alone."""
    with torch.inference_mode():
        mean = model.base_model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state.float().mean(1)[0]
    return np.asarray((mean / mean.norm()).numpy())


def near(found: bytes | None, wanted: np.ndarray[Any, Any], error: float = 1e-5) -> bool:
    vector = np.frombuffer(found or b"", "<f4")
    return vector.shape == wanted.shape and float(abs(vector - wanted).max()) < error and abs(float(np.linalg.norm(vector)) - 1) < 1e-5


# --- the engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "OPT", "Bloom", *(pytest.param(each, marks=pytest.mark.slow) for each in ("Mistral", "Gemma3", "GPT2", "GPTNeoX", "GPTNeo"))])
def test_equal_to_transformers_whoever_shares_the_pass(family: str) -> None:
    """Packed prompts of unlike lengths, a text that is written meanwhile, and each alone. Bloom reads one by one."""
    model = tiny(family)
    engine = Engine(model)
    text = engine.generate([9, 8, 7], max_new_tokens=8, stop_at_eos=False)
    next(text)
    embeddings = [engine.generate(ids, max_new_tokens=1, embed=True) for ids in PROMPTS]
    late = engine.generate([3, 4], max_new_tokens=4, stop_at_eos=False)
    for ids, generation in zip(PROMPTS, embeddings, strict=True):
        (piece,) = list(generation)
        assert near(piece.vector, expected(model, ids)) and (piece.text, piece.logprob, generation.finish) == ("", None, "length")
        (alone,) = list(Engine(model).generate(ids, max_new_tokens=1, embed=True))
        assert near(alone.vector, expected(model, ids))
    assert [piece.vector for piece in (*text, *late)] == [None] * 11
    assert text.token_ids[3:] == list(Engine(model).complete([9, 8, 7], max_new_tokens=8, stop_at_eos=False).token_ids) and not engine.kv.lengths


def test_in_half_precision_states_are_averaged_in_float32() -> None:
    model = tiny("Llama").to(torch.bfloat16)
    wanted = expected(tiny("Llama"), PROMPTS[2])
    (piece,) = list(Engine(model).generate(PROMPTS[2], max_new_tokens=1, embed=True))
    assert near(piece.vector, wanted, 0.05)


def test_one_that_waits_moves_as_any_other() -> None:
    model = tiny("Llama")
    here, there = Engine(model, name="m"), Engine(model, name="m")
    register = EpochRegister()
    ledger = TokenLedger(register)
    session = Session("r", "m", tuple(PROMPTS[0]), 5, 1, stop_at_eos=True, embed=True)
    ledger.open(session)
    waiting = here.adopt(session)
    here.hold("r")
    moved = Session.from_bytes(here.session("r").to_bytes())
    here.drop("r", "moved")
    epoch = register.claim("r", "there", 0)
    assert moved.embed and epoch is not None and waiting.finish == "moved"
    there.prepare(moved)
    with TokenFeed(there, ledger) as feed:
        feed.adopt(moved, Epoch(epoch), guest=True)
        there.step()
        (piece,) = ledger.stream("r", timeout=20)
    assert near(piece.vector, expected(model, PROMPTS[0])) and piece.text == ""


@pytest.mark.parametrize("options", [{"max_new_tokens": 2}, {"max_new_tokens": 1, "stop": "x"}, {"max_new_tokens": 1, "logprobs": 0}, {"max_new_tokens": 1, "embed": 1}])
def test_what_no_embedding_can_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"an embedding is one token|embed is 1"):
        Engine(tiny("Llama")).generate([5], **{"embed": True, **options})


def test_a_model_without_a_body_of_its_own_says_so() -> None:
    model = tiny("Llama")
    model.get_decoder = lambda: model
    engine = Engine(model)
    text = engine.generate([5], max_new_tokens=3, stop_at_eos=False)
    with pytest.raises(ModelError, match="no embeddings"):
        list(engine.generate([5], max_new_tokens=1, embed=True))
    assert len(list(text)) == 3


def test_an_engine_in_stages_makes_them_too(tmp_path: Path, world: World, oracle: Any) -> None:
    """Also of a prompt that goes through the stages in several passes."""
    from sllm_mini.inference import staged

    checkpoint = open_checkpoint(world.source)
    tensors = dict(oracle.state_dict(keep_vars=True))

    def piece(start: int, stop: int) -> Piece:
        needed = needed_tensors(checkpoint, build_skeleton(checkpoint), start, stop)
        return Piece(checkpoint, {name: tensors[name].detach() for name in needed}, start, stop)

    layers = oracle.config.num_hidden_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "PASS_TOKENS", 16)
        server = StageServer(piece(0, 2), tmp_path / "stage")
        engine = StagedEngine(piece(2, layers), [server.address])
        try:
            (found,) = list(engine.generate(PROMPTS[2], max_new_tokens=1, embed=True))
        finally:
            engine.close()
            server.close()
    assert near(found.vector, expected(oracle, PROMPTS[2]))


# --- over HTTP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With engines of our own: doubles have no hidden states."""
    with open_world(tmp_path_factory.mktemp("embeddings"), names=("a",), engine="", pace_seconds=0.0, limits=Limits(prompts=8)) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(world: World) -> Any:
    return load_model(open_checkpoint(world.source))


def embed(world: World, given: object, **body: Any) -> Any:
    return world.send("POST", "/v1/embeddings", {"model": "a", "input": given, **body})


def test_texts_and_ids_one_and_several(world: World, oracle: Any) -> None:
    tokenizer = load_tokenizer(world.source)
    assert tokenizer is not None
    texts = ["Once upon a time", "a", "there was a cat " * 30]
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    for given, prompts in ((texts[0], ids[:1]), (texts, ids), (ids[0], ids[:1]), (ids, ids)):
        document = embed(world, given).document
        assert [each["index"] for each in document["data"]] == list(range(len(prompts))) and {each["object"] for each in document["data"]} == {"embedding"}
        assert all(near(np.asarray(each["embedding"], "<f4").tobytes(), expected(oracle, prompt)) for each, prompt in zip(document["data"], prompts, strict=True))
        tokens = sum(map(len, prompts))
        assert document["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens} and (document["object"], document["model"]) == ("list", "a")


def test_batch_mates_leave_nothing(world: World, oracle: Any) -> None:
    """Beside texts that are written and other embeddings."""
    replies: list[Any] = []
    ids = [[5 + number] * (1 + 7 * number) for number in range(8)]
    mates = [threading.Thread(target=lambda: replies.append(world.complete(max_tokens=60, temperature=0))) for _ in range(2)]
    mates += [threading.Thread(target=lambda: replies.append(embed(world, ids))) for _ in range(2)]
    for mate in mates:
        mate.start()
    for mate in mates:
        mate.join()
    texts = {reply.document["choices"][0]["text"] for reply in replies if "choices" in reply.document}
    assert len(texts) == 1
    for reply in (reply for reply in replies if "data" in reply.document):
        assert all(near(np.asarray(each["embedding"], "<f4").tobytes(), expected(oracle, prompt)) for each, prompt in zip(reply.document["data"], ids, strict=True))


def test_fewer_dimensions_and_base64(world: World, oracle: Any) -> None:
    whole = expected(oracle, PROMPTS[0])
    cut = whole[:10] / np.linalg.norm(whole[:10])
    (one,) = embed(world, PROMPTS[0], dimensions=10, encoding_format="base64").document["data"]
    assert near(base64.b64decode(one["embedding"]), cut)
    (one,) = embed(world, PROMPTS[0], dimensions=len(whole), encoding_format="float", user="somebody").document["data"]
    assert near(np.asarray(one["embedding"], "<f4").tobytes(), whole)
    reply = embed(world, PROMPTS[0], dimensions=len(whole) + 1)
    assert (reply.status, reply.code, reply.document["error"]["param"]) == (400, "invalid_value", "dimensions")


def test_the_openai_package_reads_them(world: World, oracle: Any) -> None:
    """It asks for base64 unless told."""
    with OpenAI(base_url=f"{world.server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for options in ({}, {"encoding_format": "float"}):
            found = client.embeddings.create(model="a", input=PROMPTS[:2], **options)  # type: ignore[arg-type]
            assert all(near(np.asarray(each.embedding, "<f4").tobytes(), expected(oracle, ids)) for each, ids in zip(found.data, PROMPTS, strict=False))
            assert found.usage.prompt_tokens == found.usage.total_tokens == 7


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"), ({"input": []}, "invalid_value", "input"), ({"input": ["a", ""]}, "invalid_value", "input"), ({"input": [[]]}, "invalid_value", "input"),
        ({"input": ["a"] * 9}, "invalid_value", "input"), ({"input": [1.5]}, "invalid_value", "input"), ({"input": None}, "invalid_value", "input"), ({"input": [9999]}, "invalid_value", "input"),
        ({"input": [5] * 5000}, "context_length_exceeded", "input"), ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"), ({"input": ["a", [5]]}, "invalid_value", "input"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"), ({"input": "a", "keep_alive": "later"}, "invalid_value", "keep_alive"), ({}, "invalid_value", "input"),
    ],
)  # fmt: skip
def test_what_cannot_be(world: World, body: dict[str, Any], code: str, param: str) -> None:
    reply = world.send("POST", "/v1/embeddings", {"model": "a", **body})
    assert (reply.status, reply.code) == (400, code) and (reply.document["error"]["param"] or "").split(".")[0] == param, reply


def test_other_refusals(world: World) -> None:
    assert embed(world, "a", model="nobody").code == "model_not_found"
    assert world.send("GET", "/v1/embeddings").code == "method_not_allowed"
    assert world.send("POST", "/v1/embeddings", b"{").code == "invalid_json"
    reply = world.send("POST", "/v1/embeddings", {"model": "a", "input": "x"}, content_type="text/plain")
    assert reply.code == "unsupported_media_type"


def test_models_say_how_they_are_made_and_probabilities_come_from_engines_of_ours(world: World, oracle: Any) -> None:
    assert [each["embeddings"] for each in world.send("GET", "/v1/models").document["data"]] == ["mean of last hidden states"]
    document = world.complete(prompt=[5, 6, 7], temperature=0, max_tokens=6, logprobs=3).document
    with torch.inference_mode():
        row = oracle(torch.tensor([[5, 6, 7]])).logits[0, -1].double().log_softmax(-1)
    assert document["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(float(row.max()), abs=1e-4)
    assert json.dumps(document)


def test_engines_that_cannot_are_not_asked(tmp_path: Path, world: World) -> None:
    with open_world(tmp_path, names=("a",)) as doubles:
        reply = embed(doubles, [5, 6])
        assert (reply.status, reply.code, reply.document["error"]["param"]) == (400, "unsupported_model", "model")
        assert [each["embeddings"] for each in doubles.send("GET", "/v1/models").document["data"]] == [None]
        assert doubles.cluster.metrics().waiting == 0
    with open_cluster("simulated", folder=tmp_path / "simulated") as simulated:
        simulated.deploy(Deployment(ModelSpec(name="a", nbytes=MIB), str(world.source)))
        with pytest.raises(UnsupportedError, match="no embeddings"):
            simulated.submit(Ask("a", [5], 1, SamplingOptions(), embed=True))
