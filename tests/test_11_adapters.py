"""LoRA adapters of one base as models: what they answer, what they share, what is refused, and that they come back.

The oracles are the engine with the same adapter in this process, and PEFT itself where it is on the path.
"""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from safetensors.torch import save_file
from serving_world import MIB, Reply, World, open_world

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.cluster.api import Ask, Cluster, Deployment
from sllm_mini.cluster.live.options import LiveOptions, NodeOptions
from sllm_mini.cluster.node import Node
from sllm_mini.cluster.opening import open_cluster
from sllm_mini.control.messages import ModelSpec
from sllm_mini.errors import InUseError, ModelError
from sllm_mini.inference import Engine
from sllm_mini.inference.adapter_files import adapted_digest, open_adapter
from sllm_mini.inference.lora import Adapters
from sllm_mini.inference.text import load_tokenizer
from sllm_mini.loading import load_model
from sllm_mini.resources import resource
from sllm_mini.serving.folder import ServerFolder
from sllm_mini.storage import Store
from sllm_mini.types import Tier, Warmth

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SECONDS = 60.0
PROMPT, TOKENS = [5, 6, 7, 90, 12], 24
SHAPES = {"self_attn.q_proj": (192, 192), "self_attn.v_proj": (192, 64), "mlp.down_proj": (512, 192)}
"""What some layers of the tiny model take and give."""


def make_adapter(folder: Path, *, seed: int, rank: int = 4, layers: int = 6, widen: int = 1, kind: str = "LORA") -> Path:
    """As PEFT writes one; of another width or depth where that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(layers):
        for name, (inputs, outputs) in SHAPES.items():
            for letter, shape in (("A", (rank, inputs * widen)), ("B", (outputs * widen, rank))):
                tensors[f"base_model.model.model.layers.{number}.{name}.lora_{letter}.weight"] = torch.randn(shape, generator=generator) * 0.15
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": kind, "r": rank, "lora_alpha": 8, "target_modules": [name.rpartition(".")[2] for name in SHAPES], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapters")
    convert_checkpoint(resource("data/models/tiny"), made / "tiny.sllm")
    for seed, name in enumerate(("first", "second", "third")):
        make_adapter(made / name, seed=seed)
    convert_checkpoint(made / "second", made / "converted")
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """The engine's own text, with each adapter and, as "", without."""
    engine = Engine.load(folder / "tiny.sllm")
    adapters = Adapters(engine.model)
    found = {}
    for name in ("first", "second", "third", ""):
        if name:
            adapters.load(name, folder / name)
        adapters.use(name or None)
        found[name] = engine.complete(PROMPT, max_new_tokens=TOKENS).text
    assert len(set(found.values())) == 4, "each adapter says something else"
    return found


@pytest.fixture(scope="module")
def world(folder: Path) -> Iterator[World]:
    with open_world(folder, names=("base",), engine="", pace_seconds=0.0) as opened:
        yield opened


def put(world: World, name: str, **fields: Any) -> Reply:
    return world.send("PUT", f"/admin/models/{name}", fields)


def deployed(world: World, name: str, adapter: str, **fields: Any) -> dict[str, Any]:
    reply = put(world, name, base="base", adapter=adapter, max_instances=1, **fields)
    assert reply.status in (200, 201), reply
    return dict(reply.document)


def answer(world: World, model: str) -> tuple[str, list[float]]:
    """Greedy, over HTTP: the text, and the logarithm of each token's probability to the last digit."""
    reply = world.complete(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, logprobs=0)
    assert reply.status == 200, reply
    choice = reply.document["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def loaded(world: World) -> dict[Tier, int]:
    return dict(world.cluster.metrics().loads)


def used(world: World) -> int:
    (node,) = world.cluster.nodes()
    assert node.store is not None
    return node.store.dram_used_nbytes


@pytest.fixture
def gone_after(world: World) -> Iterator[None]:
    """No test leaves an adapter to the next."""
    yield
    for each in world.cluster.models():
        if each.base:
            world.cluster.delete(each.spec.name)


def test_adapters_of_one_base_answer_as_themselves_and_cost_one_base(world: World, expected: dict[str, str], gone_after: None) -> None:
    before = answer(world, "base")
    assert before[0] == expected[""]
    memory, loads, base = used(world), loaded(world), world.cluster.models()[0].spec.nbytes
    for name in ("first", "second", "third"):
        found = deployed(world, name, name)
        assert (found["base"], found["source"], found["nbytes"]) == ("base", str(world.source.parent / name), base + open_adapter(world.source.parent / name).nbytes)
        assert found["cached"] == {"node-0000": "dram"}, "it is where its base is"
    for name in ("first", "second", "third"):
        assert answer(world, name)[0] == expected[name]
        assert answer(world, "base") == before, "the base is served beside it, from the same memory, and is what it was to the last bit"
    assert used(world) == memory, "the store has the base once"
    assert {tier: count - loads[tier] for tier, count in loaded(world).items() if count > loads[tier]} == {Tier.DRAM: 3}, "nothing was read again"


def test_one_that_is_converted_is_the_same(world: World, expected: dict[str, str], gone_after: None) -> None:
    deployed(world, "other", "converted")
    assert answer(world, "other")[0] == expected["second"]


def test_all_at_once_each_as_alone(world: World, expected: dict[str, str], gone_after: None) -> None:
    names = ("base", "first", "second", "third")
    for name in names[1:]:
        deployed(world, name, name)
    streams = [world.cluster.submit(Ask(name, PROMPT, TOKENS)) for name in names * 2]
    for name, stream in zip(names * 2, streams, strict=True):
        assert "".join(piece.text for piece in stream) == expected["" if name == "base" else name]


def test_clients_see_whose_they_are(world: World, gone_after: None) -> None:
    deployed(world, "first", "first")
    models = {each["id"]: each for each in world.send("GET", "/v1/models").document["data"]}
    assert models["first"]["parent"] == "base" and models["base"]["parent"] is None
    assert world.send("GET", "/v1/models/first").document == models["first"]
    assert world.complete(model="first", prompt="Once upon a time").status == 200, "words are its base's"


def test_each_has_figures_of_its_own(world: World, gone_after: None) -> None:
    deployed(world, "first", "first", keep_alive="1m", concurrency=2)
    found = put(world, "first", min_instances=1).document
    assert (found["base"], found["keep_alive"], found["concurrency"], found["min_instances"]) == ("base", 60.0, 2, 1)
    reply = world.send("POST", "/admin/models/first/pin", {"tier": "dram"})
    assert (reply.status, reply.code) == (400, "invalid_value") and "those of base; give that the tier" in reply.document["error"]["message"]


def test_another_adapter_takes_its_place_once_nothing_runs(world: World, expected: dict[str, str], gone_after: None) -> None:
    deployed(world, "own", "first")
    assert answer(world, "own")[0] == expected["first"]
    reply = put(world, "own", adapter="second")
    assert (reply.status, reply.code) == (409, "in_use") and "unload it first" in reply.document["error"]["message"]
    assert answer(world, "own")[0] == expected["first"], "it is what it was"
    assert world.send("POST", "/admin/models/own/unload", {}).status == 200
    assert world.cluster.wait(lambda _: put(world, "own", adapter="second").status == 200, SECONDS)
    assert answer(world, "own")[0] == expected["second"]


@pytest.mark.parametrize(("fields", "status", "param", "words"), [
    ({"base": "nobody", "adapter": "first"}, 400, "base", "there is no model 'nobody' that could be the base"),
    ({"base": "base"}, 400, "adapter", "needs a base, the name of a deployed model, and an adapter"),
    ({"adapter": "first"}, 400, "base", "needs a base"),
    ({"base": "base", "adapter": "first", "source": "tiny.sllm"}, 400, "source", "a source, or a base and an adapter"),
    ({"base": "base", "adapter": "first", "tier": "dram"}, 400, None, "give that the tier"),
    ({"base": "base", "adapter": "../first"}, 400, "adapter", "no folder below those"),
    ({"base": "base", "adapter": "/etc"}, 400, "adapter", "no folder below those"),
    ({"base": "base", "adapter": "https://example.org/first"}, 400, "adapter", "no folder below those"),
    ({"base": "base", "adapter": "tiny.sllm"}, 400, None, "is not an adapter"),
    ({"base": "base", "adapter": "empty"}, 400, None, "there is no adapter_config.json"),
    ({"base": "base", "adapter": "wide"}, 400, None, r"A of layer 'model.layers.0.mlp.down_proj' has shape (4, 1024)"),
    ({"base": "base", "adapter": "deep"}, 400, None, "'model.layers.6.mlp.down_proj', which is not a linear layer of this base model"),
    ({"base": "base", "adapter": "ranked"}, 400, None, "this base and rank 9 need"),
    ({"base": "base", "adapter": "other"}, 400, None, "'IA3'"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(world: World, fields: dict[str, Any], status: int, param: str | None, words: str) -> None:
    root = world.source.parent
    if not (root / "empty").exists():
        (root / "empty").mkdir()
        make_adapter(root / "wide", seed=5, widen=2)
        make_adapter(root / "deep", seed=5, layers=7)
        make_adapter(root / "other", seed=5, kind="IA3")
        ranked = shutil.copytree(root / "first", root / "ranked") / "adapter_config.json"
        ranked.write_text(ranked.read_text().replace('"r": 4', '"r": 9'))
    reply = put(world, "own", **fields)
    assert reply.code and reply.status == status and words in reply.document["error"]["message"], reply
    assert param is None or reply.document["error"]["param"] == param
    assert [each.spec.name for each in world.cluster.models()] == ["base"]


def test_a_base_stays_while_it_has_adapters_and_a_name_is_of_one_kind(world: World, gone_after: None) -> None:
    deployed(world, "second", "second")
    deployed(world, "first", "first")
    for method, path, body, words in (
        ("DELETE", "/admin/models/base", None, "base cannot be deleted: it is the base of first, second; delete those first"),
        ("PUT", "/admin/models/first", {"source": "tiny.sllm"}, "first is deployed as an adapter of base; delete that first"),
        ("PUT", "/admin/models/base", {"base": "first", "adapter": "second"}, "base is deployed as a model of its own; delete that first"),
    ):
        reply = world.send(method, path, body)
        assert (reply.status, reply.code) == (409, "in_use") and words in reply.document["error"]["message"], reply
    reply = put(world, "third", base="first", adapter="third")
    assert reply.status == 400 and "first is an adapter itself; give its base base" in reply.document["error"]["message"]
    assert put(world, "third", base="third", adapter="third").status == 400
    assert [each.spec.name for each in world.cluster.models()] == ["base", "second", "first"]


def test_other_weights_do_not_come_under_an_adapter(folder: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "cluster", engine="fake_engine:make") as cluster:
        deploy(cluster, folder)
        moved = shutil.copytree(folder / "tiny.sllm", tmp_path / "moved.sllm")
        cluster.deploy(Deployment(ModelSpec(name="base", nbytes=10 * MIB), str(moved)))
        make_other(tmp_path / "other.sllm")
        with pytest.raises(InUseError, match="base cannot get other weights: it is the base of first"):
            cluster.deploy(Deployment(ModelSpec(name="base", nbytes=10 * MIB), str(tmp_path / "other.sllm")))
        assert cluster.models()[0].source == str(moved)
        stream = cluster.submit(Ask("first", PROMPT, 4, stop_at_eos=False))
        assert len(list(stream)) == 4 and stream.report.restarts == 0


def make_other(folder: Path) -> None:
    """The same model with one number changed."""
    source = Path(str(folder) + "-source")
    shutil.copytree(resource("data/models/tiny"), source)
    (weights,) = source.glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    convert_checkpoint(source, folder)


def opened(folder: Path, *, kind: str = "inprocess:1", engine: str = "", resume: Any = False, pace_seconds: float = 0.0, **live: Any) -> Any:
    node = NodeOptions(store_dram_nbytes=256 * MIB, engine=engine, pace_seconds=pace_seconds, beat_seconds=0.2, silent_seconds=5.0, stuck_seconds=30.0)
    return open_cluster(kind, folder=folder, options=LiveOptions(node=node, **live), resume=resume)


def deploy(cluster: Cluster, folder: Path, *names: str) -> None:
    cluster.deploy(Deployment(ModelSpec(name="base", nbytes=10 * MIB, max_instances=1), str(folder / "tiny.sllm")))
    for name in names or ("first",):
        cluster.deploy(Deployment(ModelSpec(name=name, nbytes=10 * MIB, max_instances=1), str(folder / name), base="base"))


def text_of(cluster: Cluster, model: str) -> str:
    return "".join(piece.text for piece in cluster.submit(Ask(model, PROMPT, TOKENS)))


def test_they_come_back_with_the_next_server(folder: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    with opened(tmp_path) as cluster:
        deploy(cluster, folder, "second", "first")
        before = cluster.models()
        assert text_of(cluster, "first") == expected["first"]
    with ServerFolder(tmp_path) as state:
        assert state._deployed("deployments.json") == before
    with opened(tmp_path, resume="models") as cluster:
        assert cluster.models() == before and [each.base for each in before] == ["", "base", "base"]
        assert text_of(cluster, "first") == expected["first"] and text_of(cluster, "base") == expected[""]
        with pytest.raises(InUseError, match="it is the base of first, second"):
            cluster.delete("base")
        cluster.delete("first")
        cluster.delete("second")
        cluster.delete("base")
        assert cluster.models() == []


def test_an_adapter_that_changed_in_its_folder_is_not_taken_for_the_old_one(folder: Path, tmp_path: Path) -> None:
    with Store(tmp_path, dram_nbytes=64 * MIB) as store, Node(store, node_id="n") as home:
        store.register("base", folder / "tiny.sllm")
        digest = adapted_digest(store.digest("base"), open_adapter(folder / "first").digest())
        with home.hold("base") as instance:
            with pytest.raises(ModelError, match="another one than was deployed; deploy it again"):
                instance.make_ready(adapter=str(folder / "second"), digest=digest)
            assert instance.make_ready(adapter=str(folder / "first"), digest=digest).name == digest
            dropped = weakref.ref(instance.engine.model)
            instance.fall(Warmth.DEVICE)
            assert dropped() is None, "its memory is given back at once"
            assert instance.make_ready().name == store.digest("base"), "and what was held is the base"


def test_pefts_own_text(world: World, gone_after: None) -> None:
    peft = pytest.importorskip("peft", reason="PEFT, the oracle of this test, is not on the path; make test runs this file again with it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(load_model(world.source), world.source.parent / "first", autocast_adapter_dtype=False).eval()
        found = wrapped.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)[0, len(PROMPT) :].tolist()
    deployed(world, "first", "first")
    assert [piece.token_id for piece in world.cluster.submit(Ask("first", PROMPT, TOKENS))] == found
    tokenizer = load_tokenizer(world.source)
    assert tokenizer is not None and answer(world, "first")[0] == tokenizer.decode([each for each in found if each != tokenizer.eos_token_id])


def test_from_the_command_line(world: World, capfd: pytest.CaptureFixture[str], gone_after: None) -> None:
    server = ("--server", world.server.url)
    given = run_command(capfd, "deploy", "first", "--base", "base", "--adapter", str(world.source.parent / "first"), *server)
    assert given.code == 0 and "first is deployed" in given.out and "on base" in given.out
    assert "first on base" in run_command(capfd, "ps", *server).out
    refused = run_command(capfd, "delete", "base", *server)
    assert refused.code == 1 and "it is the base of first; delete that first" in refused.err


def test_processes_share_the_base_too(folder: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    """Each worker maps the store's memory; its own are its adapter and its engine."""
    with opened(tmp_path, kind="local:1") as cluster:
        deploy(cluster, folder, "first", "second")
        for name in ("base", "first", "second"):
            assert text_of(cluster, name) == expected["" if name == "base" else name]
        (store,) = (node.store for node in cluster.nodes())
        assert store is not None and store.dram_used_nbytes < 2 * cluster.models()[0].spec.nbytes
        assert {tier: count for tier, count in cluster.metrics().loads.items() if count} == {Tier.DISK: 1, Tier.DRAM: 2}


def test_while_the_base_still_arrives(folder: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    """Its first token waits for the base's bytes, layer by layer, as the base's own does; nodes that start together feed each other the base."""
    with opened(tmp_path, kind="inprocess:2", overlap=True, multicast="binomial") as cluster:
        deploy(cluster, folder, "first", "second")
        streams = {name: cluster.submit(Ask(name, PROMPT, TOKENS)) for name in ("second", "first", "base")}
        for name, stream in streams.items():
            assert "".join(piece.text for piece in stream) == expected["" if name == "base" else name]


def test_one_whose_node_dies_goes_on_as_itself(folder: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    with opened(tmp_path, kind="inprocess:2", pace_seconds=0.03) as cluster:
        deploy(cluster, folder)
        stream = cluster.submit(Ask("first", PROMPT, TOKENS))
        pieces = iter(stream)
        text = "".join(next(pieces).text for _ in range(6))
        (home,) = (node.name for node in cluster.nodes() if any(each.model == "first" for each in node.instances))
        cluster.kill_node(home)
        assert text + "".join(piece.text for piece in pieces) == expected["first"]
        assert stream.report.restarts == 1
