"""A node starts engines on what its store lends; whatever is promised of an embedded store holds for one over a socket."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from range_server import RangeServer
from store_process import PATIENT, StoreProcess, eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, convert_checkpoint
from sllm_mini.cluster import Instance, Node, NodeError
from sllm_mini.device.cpu import CpuDevice
from sllm_mini.errors import IntegrityError, LoadCancelled, ModelError, StoreError
from sllm_mini.inference import Engine
from sllm_mini.inference.overlap import WAIT_LANE
from sllm_mini.resources import resource
from sllm_mini.storage import Store, StoreClient
from sllm_mini.storage.messages import Model, Residence
from sllm_mini.types import Tier, Warmth

MIB = 1 << 20
PROMPT = list(range(3, 15))
NEW_TOKENS = 6
LAST = "data-00003.bin"
Open = Callable[..., Node]


@dataclass
class GatedServer(RangeServer):
    """Keeps back one data file, by name, until `gate` is set; asking for its size, a range of one byte, is answered."""

    held_back: str = ""
    gate: threading.Event = field(default_factory=threading.Event)

    def _answer(self, handler: Any) -> None:
        if self.held_back and handler.path.endswith(self.held_back) and handler.headers.get("Range") != "bytes=0-0":
            self.gate.wait(30)
        super()._answer(handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model in four partitions, the last of which holds its last layers."""
    made = convert_checkpoint(resource("data/models/tiny"), tmp_path_factory.mktemp("models") / "tiny", options=WriteOptions(partition_nbytes=3_000_000))
    assert (made.path / LAST).exists() and len(made.index.partitions) == 4
    return made


@pytest.fixture(scope="module")
def wanted(tiny: Checkpoint) -> tuple[int, ...]:
    """What the model says, loaded by itself."""
    return Engine.load(tiny.path).complete(PROMPT, max_new_tokens=NEW_TOKENS, stop_at_eos=False).token_ids


@pytest.fixture
def server(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedServer]:
    """Serves the model, its last partition after `gate` is set."""
    monkeypatch.setenv("NO_PROXY", "*")
    found = GatedServer(tiny.path.parent, held_back=LAST)
    with found:
        try:
            yield found
        finally:
            found.gate.set()


@pytest.fixture(params=["embedded", "socket"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens nodes, each on a store of its own, here or in another process, and closes both with the test; nothing may stay."""
    before = set(threading.enumerate())
    with ExitStack() as until:

        def open_node(source: str | Path | None = None, name: str = "a", **options: Any) -> Node:
            options = {"chunk_nbytes": 2 * MIB, "dram_nbytes": 64 * MIB} | options
            store: Store | StoreClient
            if request.param == "embedded":
                store = until.enter_context(Store(tmp_path / name, remote=PATIENT, **options))
            else:
                store = until.enter_context(StoreProcess(tmp_path / name, **options)).client
            if source is not None:
                store.register("tiny", source)
            return until.enter_context(Node(store, node_id=name))

        yield open_node
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= before)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "sllm-chunk" not in maps.read()


def leases(node: Node) -> int:
    (model,) = node.store.models()
    return sum(place.leases for place in model.places)


def says(instance: Instance) -> tuple[int, ...]:
    return instance.engine.complete(PROMPT, max_new_tokens=NEW_TOKENS, stop_at_eos=False).token_ids


@contextmanager
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_two_instances_of_a_model_share_one_image(opened: Open, tiny: Checkpoint, wanted: tuple[int, ...]) -> None:
    node = opened(tiny.path)
    one = node.start("tiny", overlap=False)
    before = node.store.stats()
    two = node.start("tiny", overlap=False)
    after = node.store.stats()
    assert all(instance.engine.name == tiny.digest for instance in node.instances)
    assert [place.used_nbytes for place in after.places] == [place.used_nbytes for place in before.places]
    assert after.moved_nbytes == before.moved_nbytes and sum(after.moved_nbytes.values()) == tiny.nbytes
    assert after.attached["dram"] == 1 and leases(node) == 2
    assert says(one) == says(two) == wanted
    assert node.instances == (one, two) and one.instance_id != two.instance_id
    assert repr(one) == f"<Instance {one.instance_id} of tiny on cpu: READY>"
    assert (one.model, one.device, one.tier, one.reason) == ("tiny", "cpu", Tier.DRAM, "")
    with without_collection():
        one.stop()
        eventually(lambda: leases(node) == 1)
        with pytest.raises(StoreError, match="1 attachment or copy uses it"):
            node.evict("tiny")
        assert says(two) == wanted and node.instances == (two,) and node.warmth("tiny") is Warmth.READY
        two.stop()
        eventually(lambda: leases(node) == 0)
        assert node.warmth("tiny") is Warmth.DRAM
        assert node.evict("tiny") >= tiny.nbytes
    assert node.warmth("tiny") is Warmth.RUNTIME and node.instances == ()


def test_an_instance_runs_while_its_bytes_arrive(opened: Open, server: GatedServer, wanted: tuple[int, ...]) -> None:
    node = opened(f"{server.url}/tiny")
    instance = node.start("tiny")
    with pytest.raises(TimeoutError, match=r"a/0 of tiny was not ready after 0\.01 seconds"):
        instance.ready(0.01)
    assert (instance.warmth, node.warmth("tiny")) == (Warmth.DRAM, Warmth.RUNTIME)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(says, instance)
        eventually(lambda: any(span.lane == "compute" for span in instance.spans))
        assert not said.done() and instance.warmth is Warmth.DRAM
        server.gate.set()
        assert said.result(60) == wanted
    assert instance.ready(60) is instance.engine
    assert (instance.warmth, node.warmth("tiny")) == (Warmth.READY, Warmth.READY)
    (loaded,) = [span for span in instance.spans if span.lane == "loader"]
    computed = min(span.start for span in instance.spans if span.lane == "compute")
    assert loaded.nbytes == node.store.models()[0].nbytes and loaded.start < computed < loaded.end


def test_waiting_for_bytes_is_no_prefill(opened: Open, server: GatedServer) -> None:
    instance = opened(f"{server.url}/tiny").start("tiny")
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(instance.engine.complete, PROMPT, max_new_tokens=NEW_TOKENS, stop_at_eos=False)
        eventually(lambda: any(span.lane == "compute" for span in instance.spans))
        server.gate.set()
        timings = said.result(60).timings
    waited = sum(span.seconds for span in instance.spans if span.lane == WAIT_LANE)
    assert timings.load_seconds == pytest.approx(waited) and waited > 0


def test_a_start_without_overlap_is_ready_and_says_what_each_rung_took(opened: Open, tiny: Checkpoint) -> None:
    instance = opened(tiny.path).start("tiny", overlap=False)
    assert instance.warmth is Warmth.READY
    main = [span for span in instance.spans if span.lane == "main"]
    assert [span.name for span in main] == ["import", "attach", "skeleton", "fill", "tokenizer", "engine", "wait for bytes"]
    assert all(before.end <= after.start for before, after in pairwise(main))
    assert set(instance.rung_seconds) == {Warmth.RUNTIME, Warmth.DRAM, Warmth.DEVICE, Warmth.READY}
    assert sum(instance.rung_seconds.values()) == pytest.approx(sum(span.seconds for span in main))


def test_each_rung_of_a_fresh_process(tiny: Checkpoint, tmp_path: Path) -> None:
    """In a process that has imported nothing, and that collects no garbage of its own."""
    code = """
import gc, json, sys
from sllm_mini.cluster import Node
from sllm_mini.storage import Store
gc.disable()
with Store(sys.argv[1], dram_nbytes=64 << 20) as store, Node(store, node_id="a") as node:
    store.register("tiny", sys.argv[2])
    seen = [node.warmth("tiny"), "torch" in sys.modules]
    with node.start("tiny") as instance:
        instance.ready()
        seen.append(node.warmth("tiny"))
    seen += [store.models()[0].places[0].leases, node.warmth("tiny"), node.evict("tiny") > 0, node.warmth("tiny")]
    node.prefetch("tiny", "dram")
    seen.append(node.warmth("tiny"))
print(json.dumps(seen))
"""
    done = subprocess.run([sys.executable, "-c", code, os.fspath(tmp_path / "store"), os.fspath(tiny.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [Warmth.PROCESS, False, Warmth.READY, 0, Warmth.DRAM, True, Warmth.RUNTIME, Warmth.DRAM]


def test_only_what_a_place_holds_whole_counts() -> None:
    class Told:
        places: list[Residence]

        def models(self) -> list[Model]:
            return [Model("tiny", "/tiny", 100, 3, 0, self.places)]

    store: Any = Told()
    node = Node(store, node_id="a")
    low = {Warmth.PROCESS, Warmth.RUNTIME}
    for places, rungs in [
        ([], low),
        ([Residence("disk", 101, 0, False, False)], low),
        ([Residence("dram", 99, 0, False, False)], low),
        ([Residence("dram", 100, 1, False, True)], low),
        ([Residence("dram", 100, 0, False, False)], {Warmth.DRAM}),
        ([Residence("dram", 100, 0, False, False), Residence("cuda:0", 50, 0, False, False)], {Warmth.DRAM}),
        ([Residence("dram", 100, 0, False, False), Residence("cuda:0", 100, 0, False, False)], {Warmth.DEVICE}),
        ([Residence("cuda:0", 100, 0, False, False)], {Warmth.DEVICE}),
    ]:
        store.places = places
        assert node.warmth("tiny") in rungs, places


def test_prefetch_and_evict_are_the_stores(opened: Open, server: GatedServer) -> None:
    server.gate.set()
    node = opened(f"{server.url}/tiny", disk_nbytes=64 * MIB)
    seen: list[float] = []
    node.prefetch("tiny", "disk", on_progress=lambda progress: seen.append(progress.fraction))
    assert seen[-1] == 1.0 and node.warmth("tiny") is Warmth.RUNTIME  # the disk is no rung of its own
    node.prefetch("tiny")
    assert node.warmth("tiny") is Warmth.DRAM and node.evict("tiny", "disk") > 0
    with pytest.raises(StoreError, match="has no place 'cuda:7'"):
        node.prefetch("tiny", "cuda:7")


def test_stopping_while_it_loads_ends_the_lease_and_what_waits_and_not_the_load(opened: Open, server: GatedServer, wanted: tuple[int, ...]) -> None:
    node = opened(f"{server.url}/tiny")
    instance = node.start("tiny")
    assert leases(node) == 1
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(instance.ready)
        said = pool.submit(says, instance)
        eventually(lambda: any(span.lane == "compute" for span in instance.spans))
        instance.stop()
        for future in (waiting, said):
            with pytest.raises(LoadCancelled, match="the start was cancelled"):
                future.result(60)
        del future, said, waiting
    instance.stop()
    gc.collect()  # the errors of the two that waited
    eventually(lambda: leases(node) == 0)
    assert node.store.models()[0].places[0].loading and node.instances == () and instance.warmth is Warmth.COLD
    for ask in (lambda: instance.engine, instance.ready):
        with pytest.raises((NodeError, LoadCancelled), match="stopped"):
            ask()
    server.gate.set()
    assert says(node.start("tiny")) == wanted
    assert sum(node.store.stats().moved_nbytes.values()) == node.store.models()[0].nbytes


def test_a_generation_under_way_outlives_the_stop(opened: Open, tiny: Checkpoint, wanted: tuple[int, ...]) -> None:
    node = opened(tiny.path)
    instance = node.start("tiny", overlap=False)
    with ThreadPoolExecutor(4) as pool:
        generation = instance.engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, stop_at_eos=False)
        first = next(generation).token_id
        for stopping in [pool.submit(instance.stop) for _ in range(4)]:
            stopping.result(60)
    assert node.instances == () and leases(node) == 1
    assert (first, *(piece.token_id for piece in generation)) == wanted
    del generation
    gc.collect()
    eventually(lambda: leases(node) == 0)


def test_a_rung_prints_as_its_name_and_is_a_number() -> None:
    assert (str(Warmth.DRAM), repr(Tier.DISK), f"{Warmth.READY}", f"{Tier.DRAM:>6}") == ("DRAM", "Tier.DISK", "READY", "  DRAM")
    assert json.dumps([Warmth.DRAM, Tier.DISK]) == "[3, 1]" and max(Warmth) == 5


@pytest.mark.parametrize("how", ["without overlap", "a model that is loaded before it is filled"])
def test_closing_while_starting_leaves_no_lease(opened: Open, server: GatedServer, tiny: Checkpoint, tmp_path: Path, how: str) -> None:
    url, overlap = f"{server.url}/tiny", how != "without overlap"
    if overlap:
        server.folder = tmp_path
        in_halves(tiny, tmp_path / "tiny")
    node = opened(url)
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(node.start, "tiny", overlap=overlap)
        eventually(lambda: leases(node) == 1)
        pool.submit(node.close).result(60)
        with pytest.raises(LoadCancelled, match="its node closed") as kept:
            starting.result(60)
    del starting
    eventually(lambda: leases(node) == 0)
    assert kept.value is not None and node.store.models()[0].places[0].loading and node.instances == ()
    with pytest.raises(NodeError, match="node a is closed"):
        node.start("tiny")
    node.close()
    server.gate.set()
    node.store.prefetch("tiny")


def in_halves(tiny: Checkpoint, path: Path) -> None:
    """A copy of a model whose configuration asks for another dtype than its bytes have."""
    source = path.parent / "source"
    source.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        os.symlink(resource("data/models/tiny") / name, source / name)
    config = json.loads((resource("data/models/tiny") / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    convert_checkpoint(source, path, options=WriteOptions(partition_nbytes=3_000_000))


def test_a_start_that_fails_leaves_nothing_even_if_its_error_is_kept(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.symlink(resource("data/models/tiny/model.safetensors"), source / "model.safetensors")
    config = json.loads(resource("data/models/tiny/config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    node = opened(convert_checkpoint(source, tmp_path / "broken").path)
    before = threading.active_count()
    kept: list[BaseException] = []
    with without_collection():
        with pytest.raises(ModelError, match="the model needs tensor") as failed:
            node.start("tiny")
        kept.append(failed.value)
        with monkeypatch.context() as patched:
            patched.setattr("sllm_mini.inference.stream_model", lambda load, **_: pytest.fail(f"of {load.wait(60)['model.norm.weight']}"))
            with pytest.raises(pytest.fail.Exception) as odd:
                node.start("tiny")
            kept.append(odd.value)
        eventually(lambda: leases(node) == 0)
    eventually(lambda: threading.active_count() <= before + 1)  # the client's listener ends with the load
    assert len(kept) == 2 and node.instances == ()
    with pytest.raises(StoreError, match="no model is registered as 'other'"):
        node.start("other")
    with pytest.raises(StoreError, match="no model is registered as 'other'"):
        node.warmth("other")


def test_a_start_without_a_thread_to_spare_leaves_nothing(tmp_path: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path / "store", dram_nbytes=64 * MIB) as store, Node(store, node_id="a") as node:
        store.register("tiny", tiny.path)
        store.prefetch("tiny")
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "sllm-node-load":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NodeError, match=r"no thread can be started to watch the load of tiny \(can't start new thread\)"):
            node.start("tiny")
        assert leases(node) == 0 and node.evict("tiny") > 0


def test_a_load_that_fails_is_told_to_whoever_asks(opened: Open, server: GatedServer) -> None:
    server.gate.set()
    server.flip = [True] * 100
    node = opened(f"{server.url}/tiny")
    instance = node.start("tiny")
    for ask in (instance.ready, lambda: says(instance), instance.ready):
        with pytest.raises(IntegrityError):
            ask()
    assert instance.warmth is Warmth.COLD and node.warmth("tiny") is Warmth.RUNTIME and node.instances == (instance,)
    server.flip = []
    assert len(says(node.start("tiny"))) == NEW_TOKENS
    instance.stop()
    assert len(node.instances) == 1


def test_an_instance_outlives_its_store(tiny: Checkpoint, tmp_path: Path, wanted: tuple[int, ...]) -> None:
    with StoreProcess(tmp_path / "store", dram_nbytes=64 * MIB) as process, Node(process.client, node_id="a") as node:
        process.client.register("tiny", tiny.path)
        instance = node.start("tiny", overlap=False)
        process.kill()
        assert says(instance) == wanted and node.warmth("tiny") is Warmth.READY
        for ask in (lambda: node.start("tiny"), lambda: node.evict("tiny")):
            with pytest.raises(StoreError, match="no store answers"):
                ask()
        instance.stop()
        with pytest.raises(StoreError, match="no store answers"):
            node.warmth("tiny")
    with Store(tmp_path / "embedded", dram_nbytes=64 * MIB) as store:
        store.register("tiny", tiny.path)
        node = Node(store, node_id="b")
        instance = node.start("tiny", overlap=False)
    assert says(instance) == wanted
    with pytest.raises(StoreError):
        node.start("tiny")
    node.close()


def test_a_store_that_dies_in_the_middle_of_a_load_fails_the_instance(server: GatedServer, tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "store", dram_nbytes=64 * MIB) as process, Node(process.client, node_id="a") as node:
        process.client.register("tiny", f"{server.url}/tiny")
        instance = node.start("tiny")
        process.kill()
        with pytest.raises(StoreError, match="was stopped or died"):
            instance.ready(60)
        with pytest.raises(StoreError, match="was stopped or died"):
            says(instance)
        assert instance.warmth is Warmth.COLD


def test_without_room_in_the_store_it_loads_for_itself(opened: Open, tiny: Checkpoint, wanted: tuple[int, ...]) -> None:
    node = opened(tiny.path, dram_nbytes=4 * MIB)
    instance = node.start("tiny")
    assert (says(instance), instance.tier, leases(node)) == (wanted, Tier.DISK, 0) and "no room" in instance.reason
    instance.ready(60)
    assert node.warmth("tiny") is Warmth.READY
    instance.stop()
    assert node.warmth("tiny") is Warmth.RUNTIME


def test_starts_and_stops_from_many_threads(opened: Open, tiny: Checkpoint, wanted: tuple[int, ...]) -> None:
    node = opened(tiny.path)

    def live(number: int) -> str:
        instance = node.start("tiny", overlap=number % 2 == 0)
        assert says(instance) == wanted and instance in node.instances
        if number % 3:
            instance.stop()
        return instance.instance_id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(live, range(12)))
    assert len(set(ids)) == 12 and len(node.instances) == 4
    assert sum(node.store.stats().moved_nbytes.values()) == tiny.nbytes
    with ThreadPoolExecutor(3) as pool:
        for closing in [pool.submit(node.close) for _ in range(3)]:
            closing.result(60)
    assert node.instances == ()
    gc.collect()
    eventually(lambda: leases(node) == 0)


def test_an_instance_is_climbed_rung_by_rung_and_falls(opened: Open, tiny: Checkpoint, wanted: tuple[int, ...]) -> None:
    node = opened(tiny.path)
    before = threading.active_count()
    instance = node.hold("tiny")
    instance.wait(60)
    assert instance.arrived() and instance.digest == tiny.digest and leases(node) == 1 and node.instances == (instance,)
    eventually(lambda: threading.active_count() <= before)  # who only holds needs no thread
    for ask in (lambda: instance.engine, instance.ready):
        with pytest.raises(NodeError, match="holds weights and no engine"):
            ask()
    for _ in range(2):
        engine = instance.make_ready(max_batch=3)
        assert instance.make_ready() is engine is instance.ready(60) and engine.max_batch == 3
        assert instance.warmth is Warmth.READY and says(instance) == wanted
        with pytest.raises(NodeError, match="has an engine on cpu; let it fall to DEVICE first"):
            instance.hold(StubDevice())
        del engine
        instance.fall(Warmth.READY)
        assert instance.warmth is Warmth.READY
        instance.fall(Warmth.DEVICE)
        assert instance.warmth is Warmth.DRAM and leases(node) == 1
        with pytest.raises(NodeError, match="holds weights and no engine"):
            says(instance)
    instance.fall(Warmth.DRAM)
    assert leases(node) == 1
    with without_collection():
        instance.fall(Warmth.RUNTIME)
        eventually(lambda: leases(node) == 0)
    assert instance.warmth is Warmth.COLD and node.instances == () and node.evict("tiny") > 0
    for late in (instance.arrived, instance.wait, instance.make_ready, lambda: instance.hold("cpu")):
        with pytest.raises(NodeError, match="was stopped"):
            late()
    for foot in (Warmth.DEVICE, Warmth.DRAM, Warmth.RUNTIME):
        instance.fall(foot)  # it keeps less already


def test_a_wait_for_bytes_ends_with_its_instance(opened: Open, server: GatedServer) -> None:
    node = opened(f"{server.url}/tiny")
    instance = node.hold("tiny")
    with pytest.raises(TimeoutError, match=r"had not arrived after 0\.05 seconds"):
        instance.wait(0.05)
    assert not instance.arrived()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(instance.wait)
        node.close()
        with pytest.raises(LoadCancelled):
            waiting.result(60)
    del waiting
    gc.collect()
    eventually(lambda: leases(node) == 0)
    with pytest.raises(NodeError, match="node a is closed"):
        node.hold("tiny")


class StubDevice(CpuDevice):
    """A device that is not the host's, of which nothing is asked."""

    name = "stub:0"
    is_host = False


class StubAttachment:
    """Bytes that are somewhere, or fail to get there."""

    reason, layers = "", ["all"]

    def __init__(self, tiny: Checkpoint, place: str, failing: bool, said: list[str]) -> None:
        self.checkpoint, self.tier = tiny, Tier.DRAM if place == "cpu" else Tier.DEVICE
        self._place, self._failing, self._said = place, failing, said
        said.append(f"attach {place}")

    def wait_for(self, name: str, timeout: float | None = None) -> bool:
        self._said.append(f"wait {self._place}")
        if self._failing:
            raise IntegrityError("the bytes are wrong")
        return True

    def cancel(self) -> None:
        self.close()

    def close(self) -> None:
        self._said.append(f"close {self._place}")


def test_what_is_held_is_given_back_only_when_the_other_place_has_it_all(tiny: Checkpoint) -> None:
    said: list[str] = []
    failing: set[str] = set()
    store: Any = type("Told", (), {"attach": lambda self, model, device: StubAttachment(tiny, device.name, device.name in failing, said)})()
    node = Node(store, node_id="a")
    instance = node.hold("tiny")
    instance.hold(StubDevice())
    assert said == ["attach cpu", "attach stub:0", "wait stub:0", "close cpu"] and (instance.device, instance.tier, instance.warmth) == ("stub:0", Tier.DEVICE, Warmth.DEVICE)
    failing |= {"cpu"}
    said.clear()
    with pytest.raises(IntegrityError):
        instance.fall(Warmth.DRAM)
    assert said == ["attach cpu", "wait cpu", "close cpu"] and (instance.device, instance.tier, instance.warmth) == ("stub:0", Tier.DEVICE, Warmth.DEVICE)
    failing.clear()
    said.clear()
    instance.fall(Warmth.DRAM)
    instance.fall(Warmth.DRAM)
    assert said == ["attach cpu", "wait cpu", "close stub:0"] and instance.warmth is Warmth.DRAM
    node.close()


@pytest.mark.gpu
def test_instances_on_a_gpu_share_one_image(tiny: Checkpoint, tmp_path: Path) -> None:
    with Store(tmp_path / "store", dram_nbytes=64 * MIB, device_nbytes={"cuda:0": 64 * MIB}) as store, Node(store, node_id="a") as node:
        store.register("tiny", tiny.path)
        instances = [node.start("tiny", "cuda:0", overlap=overlap) for overlap in (True, False)]
        one, two = (says(instance) for instance in instances)
        assert one == two and node.warmth("tiny") is Warmth.READY
        assert {instance.tier for instance in instances} == {Tier.DEVICE} and sum(store.stats().moved_nbytes.values()) == tiny.nbytes
        for instance in instances:
            instance.stop()
        assert node.warmth("tiny") is Warmth.DEVICE
        held = node.hold("tiny")
        held.hold("cuda:0")
        held.make_ready()
        assert says(held) == one and store.evict("tiny", "dram") > 0
        held.fall(Warmth.DRAM)
        assert node.evict("tiny", "cuda:0") > 0 and held.warmth is Warmth.DRAM
