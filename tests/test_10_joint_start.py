"""Chapter 10, live: nodes serve a model together while it comes to them, and its texts go on where it is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from range_server import RangeServer

from sllm_mini.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint, save_checkpoint
from sllm_mini.cluster.api import Ask, Deployment
from sllm_mini.cluster.instance import Instance
from sllm_mini.cluster.live.carry import NodeHandle
from sllm_mini.cluster.live.driver import LiveCluster
from sllm_mini.cluster.live.options import ControlOptions, LiveOptions, NodeOptions
from sllm_mini.cluster.nodes.agent import NodeAgent
from sllm_mini.cluster.nodes.launchers import ENTRY, ZygoteLauncher
from sllm_mini.cluster.nodes.stages import Stages
from sllm_mini.cluster.nodes.threads import ThreadLauncher
from sllm_mini.cluster.nodes.worker_messages import Last
from sllm_mini.cluster.nodes.workers import Launcher
from sllm_mini.cluster.runtime import RUNTIME
from sllm_mini.cluster.simulated.run import even_cluster
from sllm_mini.cluster.zygote import Zygote
from sllm_mini.control.messages import ModelSpec, NodeSpec, SpecError
from sllm_mini.control.multicast import (
    binomial_pipeline,
    check,
    joint_stages,
    joint_start,
    k_way_pipeline,
    plan_of,
    stages_of,
)
from sllm_mini.control.replay import replay
from sllm_mini.errors import ResourceError
from sllm_mini.inference import Engine, SamplingOptions
from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.pieces import Piece, needed_tensors
from sllm_mini.inference.staged import StagedEngine
from sllm_mini.lab.joint_start import JOINT, WHOLE, Sample, row_of
from sllm_mini.loading.load import load_tensors
from sllm_mini.loading.model import build_skeleton
from sllm_mini.storage import Store, StoreClient, StoreServer
from sllm_mini.storage.arrivals import image_places
from sllm_mini.storage.incoming import Incoming, cut_blocks
from sllm_mini.storage.layer_blocks import blocks_of_layers

pytestmark = pytest.mark.usefixtures("one_torch_thread")
MIB = 1 << 20
BLOCK = 2 * MIB
SECONDS = 30.0
LAYERS = 6
HOLDERS, TARGETS = ["node-0000", "node-0001"], ["node-0002", "node-0003"]


def saved(folder: Path, *, tied: bool = False) -> Checkpoint:
    """A Llama of nine blocks, of which no layer has one to itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, vocab_size=96,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder / "source")
    return convert_checkpoint(folder / "source", folder / "model.sllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("m"))


TOKENS = 40


class Gate:
    """Lets no target have more than five of the nine blocks, which are then all there between two of them and none has a whole model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.images = threading.Event(), list[Incoming]()
        writing = Incoming.writing

        @contextmanager
        def gated(image: Incoming, block: int, source: str = "peers") -> Iterator[list[memoryview]]:
            if image not in self.images:
                self.images.append(image)
            if len(image.missing()) <= len(image.blocks) - 5:
                assert self.open.wait(2 * SECONDS)
            with writing(image, block, source) as views:
                yield views

        monkeypatch.setattr(Incoming, "writing", gated)


class World:
    """Two nodes that have the model and no device, and two with one that want it."""

    def __init__(self, folder: Path, model: Checkpoint, launcher: Callable[[Store], Launcher], **options: Any) -> None:
        self.origin = RangeServer(model.path.parent)
        self.origin.start()
        self.model, self.control = model, ControlOptions(retry_seconds=0.05)
        node = NodeOptions(store_dram_nbytes=64 * MIB, block_nbytes=BLOCK, beat_seconds=0.2, silent_seconds=5.0, pace_seconds=0.01)
        live = LiveOptions(node=node, multicast="binomial", overlap=True, joint=True, gather_seconds=0.1, **options)

        def handle(spec: NodeSpec, incarnation: int) -> NodeHandle:
            return NodeAgent(spec.name, incarnation, launcher, live.node, folder / spec.name, live.host)

        self.cluster = LiveCluster(handle, self.control, folder, live)
        for spec in even_cluster(4, devices=1, dram_nbytes=512 * MIB):
            self.cluster.add_node(replace(spec, devices=0) if spec.name in HOLDERS else spec)
        self.cluster.deploy(Deployment(ModelSpec(name="m", nbytes=model.nbytes, concurrency=1), f"{self.origin.url}/model.sllm"))
        assert not any(each.error for each in self.cluster.spread("m", HOLDERS, timeout=SECONDS).values())

    def ask(self, count: int, tokens: int = TOKENS, **options: Any) -> list[Any]:
        return [self.cluster.submit(Ask("m", [5, 6, 7, number], tokens, stop_at_eos=False, **options)) for number in range(count)]

    def check(self, streams: Sequence[Any], tokens: int = TOKENS, **options: Any) -> None:
        whole = Engine.load(self.model)
        for number, stream in enumerate(streams):
            pieces = list(stream)
            assert [piece.position for piece in pieces] == list(range(4, 4 + tokens))
            assert tuple(piece.token_id for piece in pieces) == whole.complete([5, 6, 7, number], max_new_tokens=tokens, stop_at_eos=False, **options).token_ids

    def agent(self, name: str) -> NodeAgent:
        found = self.cluster._loop.carry.handles[name]
        assert isinstance(found, NodeAgent)
        return found

    def first(self, streams: Sequence[Any], count: int = 1) -> Any:
        """The request that runs, once so many of its tokens are there."""
        found: list[Any] = []

        def look(_: object) -> bool:
            found[:] = [stream for stream in streams if self.cluster._router.ledger.count(stream.request_id) >= count]
            return bool(found)

        assert self.cluster.wait(look, SECONDS), self.cluster.nodes()
        return found[0]

    def close(self) -> None:
        self.cluster.close()
        self.origin.stop()
        replay(self.cluster.log(), self.control.controller())


@pytest.fixture
def opened(tmp_path: Path, model: Checkpoint) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def open_one(launcher: Callable[[Store], Launcher] = ThreadLauncher, **options: Any) -> World:
        worlds.append(World(tmp_path / f"c{len(worlds)}", model, launcher, **options))
        return worlds[-1]

    yield open_one
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote([*RUNTIME, "sllm_mini.cluster.runtime:build_tables"], [ENTRY]) as found:
        yield found


# --- through the driver ---


def test_nodes_serve_together_before_any_is_whole(opened: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text goes on in the middle where a node is whole, as if nothing had happened."""
    gone_on: list[int] = []
    go_on_with = TokenFeed.go_on_with

    def noted(feed: TokenFeed, engine: Engine) -> None:
        gone_on.append(len(feed.engine.requests))
        assert type(feed.engine) is StagedEngine
        go_on_with(feed, engine)
        assert type(feed.engine) is Engine and len(engine.requests) == gone_on[-1]

    monkeypatch.setattr(TokenFeed, "go_on_with", noted)
    world = opened()
    gate = Gate(monkeypatch)
    sampled = SamplingOptions(temperature=1.0, seed=7)
    streams = world.ask(2, sampling=sampled)
    first = world.first(streams, 5)
    assert len(gate.images) == 2 and all(len(image.missing()) == 4 for image in gate.images)
    assert world.cluster.result().events["InstanceReached"] == 1, "requests go to one of them"
    gate.open.set()
    world.check(streams, sampling=sampled)
    assert first.report.restarts == 0 and first.report.migrations == 0 and gone_on == [1]


def test_a_stage_that_is_killed_costs_no_token(opened: Callable[..., World], monkeypatch: pytest.MonkeyPatch, zygote: Zygote) -> None:
    """Over TCP, between processes: its text goes on where the model is whole."""
    world = opened(lambda _: ZygoteLauncher(path=zygote.path), host="127.0.0.1")
    gate = Gate(monkeypatch)
    streams = world.ask(2)
    first = world.first(streams, 5)
    assert not gate.open.is_set()
    (worker,) = [lane._worker for lane in world.agent(TARGETS[0])._lanes.values()]
    assert worker is not None and worker.pid != os.getpid()
    os.kill(worker.pid, signal.SIGKILL)
    assert world.cluster.wait(lambda cluster: cluster.result().events.get("InstanceFailed", 0) == 2, SECONDS), "the stage's instance and that of the pipeline"
    gate.open.set()
    world.check(streams)
    assert first.report.restarts == 1


def test_where_no_stage_answers_it_begins_when_it_is_whole(opened: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[str] = []
    join = Stages.join

    def noted(stages: Stages, instance: Instance, last: Last, max_batch: int) -> StagedEngine:
        joined.extend(last.addresses)
        return join(stages, instance, last, max_batch)

    monkeypatch.setattr(Stages, "serve", lambda _stages, _instance, _start, _stop, address, _holds: f"{address}-nobody" if address else "")
    monkeypatch.setattr(Stages, "join", noted)
    world = opened()
    gate = Gate(monkeypatch)
    streams = world.ask(2, tokens=6)
    assert world.cluster.wait(lambda _: bool(joined), SECONDS) and joined[0].endswith("-nobody")
    gate.open.set()
    world.check(streams, tokens=6)
    assert "InstanceFailed" not in world.cluster.result().events


def test_a_worker_hears_of_layers_in_the_order_in_which_they_come(tmp_path: Path, model: Checkpoint) -> None:
    """Not only of those before which all have come."""
    with Store(tmp_path / "store", dram_nbytes=64 * MIB) as store, StoreServer(store, tmp_path / "s") as server:
        store.register("m", model.path)
        with store.receive("m", BLOCK) as image:
            attached = StoreClient(server.address).attach("m")
            for block in (8, 7, 6):
                image.fall_back([block])
            assert attached.wait_for("model.layers.5", SECONDS) and attached.wait_for("lm_head.weight", SECONDS)
            assert not attached.ready("model.embed_tokens.weight") and not attached.done
            image.fall_back()
            assert torch.equal(attached.wait(SECONDS)["lm_head.weight"], load_tensors(model.path)["lm_head.weight"])
            attached.close()


def test_what_it_takes_is_asked_for() -> None:
    with pytest.raises(SpecError, match="give multicast and overlap with joint"):
        LiveOptions(joint=True, multicast="binomial")
    with pytest.raises(SpecError, match="give multicast and overlap with joint"):
        LiveOptions(joint=True, overlap=True)
    with pytest.raises(SpecError, match="leave joint out"):
        LiveOptions(joint=True, multicast="binomial", overlap=True, node=NodeOptions(cuda=True))


# --- which blocks, and when ---


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_s_blocks_are_those_of_the_tensors_that_a_stage_needs(tmp_path: Path, model: Checkpoint, tied: bool) -> None:
    checkpoint = saved(tmp_path, tied=True) if tied else model
    places = {tensor.name: (offset, offset + tensor.nbytes) for tensor, offset in image_places(checkpoint.index)}
    blocks = [(block.offset, block.offset + block.nbytes) for block in cut_blocks(checkpoint.index, BLOCK)]
    needs = blocks_of_layers(checkpoint.index, BLOCK)
    assert len(needs) == LAYERS and len(blocks) > LAYERS
    for layer, found in enumerate(needs):
        ranges = [places[name] for name in needed_tensors(checkpoint, build_skeleton(checkpoint), layer, layer + 1)]
        assert found == {number for number, (start, stop) in enumerate(blocks) if any(a < stop and start < b for a, b in ranges)}
    assert (0 in needs[-1]) is tied and len(blocks) - 1 not in needs[0]


def test_a_model_without_numbered_layers_has_no_stages(tmp_path: Path) -> None:
    save_checkpoint({"embed.weight": torch.zeros(4), "w": torch.zeros(8)}, tmp_path / "m")
    assert blocks_of_layers(open_checkpoint(tmp_path / "m").index, BLOCK) == []


@pytest.mark.parametrize("start, stop", [(0, 2), (2, 4), (4, LAYERS)])
def test_a_piece_looks_at_no_tensor_before_its_bytes_are_there(model: Checkpoint, start: int, stop: int) -> None:
    real = load_tensors(model.path)
    here = {name: torch.full_like(tensor, float("nan")) for name, tensor in real.items()}
    waited: list[str] = []

    def wait(name: str) -> None:
        here[name].copy_(real[name])
        waited.append(name)

    piece = Piece(model, here, start, stop, wait=wait)
    assert waited == needed_tensors(model, build_skeleton(model), start, stop)
    assert ("lm_head.weight" in waited) == (stop == LAYERS) and ("model.embed_tokens.weight" in waited) == (start == 0)
    kept = dict(piece.model.named_parameters())
    assert all(torch.equal(kept[name], real[name]) for name in waited)


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.data())
def test_the_first_tick_at_which_a_group_can_serve(nodes: int, ways: int, blocks: int, runs: bool, data: st.DataObject) -> None:
    plan = k_way_pipeline(nodes, blocks, ways, runs=runs) if nodes >= 2 * ways else binomial_pipeline(nodes, blocks)
    check(plan)
    needs = data.draw(st.lists(st.frozensets(st.integers(0, blocks - 1), max_size=3), min_size=1, max_size=5))
    arrivals = plan.arrivals()[plan.sources :]
    ticks = [joint_stages(needs, [{block for block, came in node.items() if came <= tick} for node in arrivals]) for tick in range(plan.ticks + 1)]
    found = joint_start(plan, needs)
    assert found.tick == next(tick for tick, stages in enumerate(ticks) if stages)
    assert [(stage.node - plan.sources, stage.start, stage.stop) for stage in found.stages] == [(stage.node, stage.start, stage.stop) for stage in ticks[found.tick]]


def test_layers_that_lie_in_two_blocks_are_served_sooner_where_sub_groups_get_runs() -> None:
    needs = [{layer, min(layer + 1, 15)} for layer in range(16)]
    strided, runs = (joint_start(k_way_pipeline(6, 16, 2, runs=runs), needs) for runs in (False, True))
    assert (strided.tick, runs.tick) == (16, 9) and len(runs.stages) == 2


def test_a_pipeline_is_of_nodes_that_start_and_sooner_than_one_of_them_alone() -> None:
    needs = [{block} for block in range(8)]
    gathered = plan_of("cdef", "ab", 8, "binomial", runs=True)
    assert gathered is not None and [stage.start for stage in stages_of(gathered, "cdef", needs)] == [0, 4]
    assert not stages_of(gathered, "cd", needs), "its other half is on nodes that do not start"
    assert not stages_of(gathered, "cdef", []) and not stages_of(gathered, "acdef", needs)
    one_source = plan_of("cdef", "a", 8, "chain")
    assert one_source is not None and not stages_of(one_source, "cdef", needs), "its first node is whole as soon"
    with pytest.raises(ValueError, match="never brings all layers"):
        joint_start(gathered.plan, [{99}])


# --- the bench ---


def test_a_row_says_what_was_measured_and_what_the_plan_takes_at_least() -> None:
    texts = ((1, 2), (3, 4))
    samples = {JOINT: [Sample(0.6, 0.9, 1.0, texts), Sample(0.5, 0.8, 1.1, texts)], WHOLE: [Sample(1.2, 1.2, 1.1, texts), Sample(1.0, 1.0, 0.9, texts)]}
    planned = joint_start(k_way_pipeline(4, 16, 2, runs=True), [{block} for block in range(16)])
    row = row_of(4, samples, planned, 16, (0.1, 0.04))
    assert (row["joint_ticks"], row["whole_ticks"], row["stages"], row["texts"]) == (planned.tick, 16, 2, 4)
    assert row["joint_floor"] == pytest.approx(0.1 * (planned.tick - 1) + 0.04) and row["ratio_median"] == pytest.approx(0.5) and row["lead_max"] == pytest.approx(0.6)
    with pytest.raises(ResourceError, match="are not those of one"):
        row_of(4, samples | {WHOLE: [Sample(1.2, 1.2, 1.1, ((1, 2), (3, 5)))] * 2}, planned, 16, (0.1, 0.04))


@pytest.mark.parametrize(("options", "what"), [(["--nodes", "2"], "even numbers of 4"), (["--nodes", "5"], "even numbers of 4"), (["--links", "netns"], "give bucket"), (["--blocks", "2"], "four blocks")])
def test_what_measures_nothing_is_refused(options: list[str], what: str, run: Run) -> None:
    ended = run("bench", "multicast", "--serve", *options, "--json")
    assert ended.code == 2 and what in ended.err


@pytest.mark.slow
def test_bench_multicast_serve_measures_both_ways(run: Run) -> None:
    ended = run("bench", "multicast", "--serve", "--rounds", 1, "--blocks", 8, "--rate", "10MB/s", "--json")
    assert ended.code == 0, ended.err
    (row,) = ended.document["results"]
    assert row["stages"] == 2 and row["texts"] == 2 and row["joint_ticks"] < row["whole_ticks"]
    assert row["joint_first_median"] > row["joint_floor"] and row["whole_first_median"] > row["whole_floor"]
    assert row["lead_median"] > 0, "together, nodes gave a token before any of them had the model whole"
