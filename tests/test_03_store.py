"""The store, embedded in this process and over its socket: whatever is promised of one holds for the other."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from range_server import RangeServer
from store_process import PATIENT, StoreProcess, eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint, save_checkpoint
from sllm_mini.checkpoint.composite import _wrappers, allow_composite
from sllm_mini.checkpoint.torch_source import torch_source
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import (
    CheckpointError,
    FormatError,
    IntegrityError,
    LoadCancelled,
    LoadError,
    NoRoomError,
    RemoteError,
    SllmError,
    StoreError,
    WireError,
)
from sllm_mini.loading.load import load_tensors
from sllm_mini.storage.attach import Attachment
from sllm_mini.storage.bringing import Bringer
from sllm_mini.storage.client import StoreClient
from sllm_mini.storage.holdings import Lease
from sllm_mini.storage.lending import attach_lease
from sllm_mini.storage.messages import Figures, Happened, Place, Residence
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.storage.store import Store
from sllm_mini.types import Progress, Tier

MIB = 1 << 20
CHUNK = 2 * MIB
HASTY = RemoteOptions(timeout_seconds=2, deadline_seconds=1, backoff_seconds=0.01)
Either = Store | StoreClient
Open = Callable[..., Either]


def write_model(path: Path, seed: int = 0, *, tensors: int = 7, nbytes: int = 3 << 19) -> Checkpoint:
    """Layers of 1.5 MiB and more in partitions of 6 MB, a tie, a 0-d and an empty tensor, two companions."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {"model.embed_tokens.weight": torch.randint(0, 256, (100, 32), dtype=torch.uint8, generator=generator)}
    for n in range(tensors):
        found[f"model.layers.{n}.w"] = torch.randint(0, 256, (nbytes + n % 4 * (nbytes // 3),), dtype=torch.uint8, generator=generator)
    found["model.norm.weight"] = torch.randn(16, generator=generator).to(torch.bfloat16)
    found["scalar"], found["empty"] = torch.tensor(3), torch.empty(0, 5)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    source = replace(torch_source(found), companions={"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b"{}" * 50})
    write_checkpoint(source, path, WriteOptions(partition_nbytes=6_000_000, threads=1, overwrite=True), None)
    return open_checkpoint(path)


@lru_cache(maxsize=8)
def _wanted(path: Path, identity: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    return load_tensors(path)


def assert_right(tensors: dict[str, torch.Tensor], path: Path) -> None:
    wanted = _wanted(path, open_checkpoint(path).identity)
    assert list(tensors) == list(wanted)
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def place_of(store: Either, place: str) -> Place:
    return next(found for found in store.stats().places if found.place == place)


def residence(store: Either, name: str, place: str = "dram") -> Residence | None:
    model = next(found for found in store.models() if found.name == name)
    return next((found for found in model.places if found.place == place), None)


def held_nbytes(store: Either, name: str, place: str = "dram") -> int:
    found = residence(store, name, place)
    return 0 if found is None else found.nbytes


def leases(store: Either, name: str, place: str = "dram") -> int:
    found = residence(store, name, place)
    return 0 if found is None else found.leases


def drop_lease(store: Either, name: str) -> None:
    """Waits until a lease that nothing holds any more has ended, which the store's process learns from its socket."""
    gc.collect()
    eventually(lambda: leases(store, name) == 0)


@dataclass
class GatedServer(RangeServer):
    """Keeps the answers for a data file back until its gate, an event by file name, is open."""

    gates: dict[str, threading.Event] = field(default_factory=dict)

    def __enter__(self) -> GatedServer:
        self.start()
        return self

    def _answer(self, handler: Any) -> None:
        gate = self.gates.get(handler.path.rpartition("/")[2])
        if gate is not None and handler.headers.get("Range") != "bytes=0-0":
            gate.wait(30)
        super()._answer(handler)

    def weight_nbytes(self) -> int:
        """Bytes of weights that were sent; a request for one byte asks for the size."""
        return sum(asked.sent for asked in self.asked if asked.file.endswith(".bin") and asked.end - asked.start > 1)


@contextmanager
def gated(server: GatedServer, *files: str) -> Iterator[None]:
    """Keeps files back for the block."""
    server.gates = {file: threading.Event() for file in files}
    try:
        yield
    finally:
        for gate in server.gates.values():
            gate.set()


def open_gate(server: GatedServer, *files: str) -> None:
    for file in files or tuple(server.gates):
        server.gates[file].set()


PARTITIONS = tuple(f"data-{number:05}.bin" for number in range(4))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A to D, alike in size, in a folder."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abcd"):
        write_model(folder / name, seed)
    assert tuple(sorted(path.name for path in (folder / "a").glob("*.bin"))) == PARTITIONS
    return folder


@pytest.fixture(scope="module")
def size(models: Path) -> int:
    return open_checkpoint(models / "a").nbytes


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    with GatedServer(models) as found:
        yield found


@pytest.fixture(params=["embedded", "socket"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a store with chunks of 2 MiB, here or in another process, and ends it with the test: it must leave nothing."""
    before = set(threading.enumerate())
    with ExitStack() as until:

        def open_store(name: str = "store", **options: Any) -> Either:
            options = {"chunk_nbytes": CHUNK, "dram_nbytes": 64 * MIB} | options
            if request.param == "embedded":
                return until.enter_context(Store(tmp_path / name, remote=PATIENT, **options))
            return until.enter_context(StoreProcess(tmp_path / name, **options)).client

        yield open_store
        gc.collect()
    eventually(lambda: set(threading.enumerate()) <= before)
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "sllm-chunk" not in maps.read()
    assert not [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}") and "sllm-chunk" in os.readlink(f"/proc/self/fd/{name}")]


# Names


def test_names_are_registered_listed_and_forgotten(opened: Open, models: Path, size: int) -> None:
    store = opened(disk_nbytes=64 * MIB)
    assert store.models() == []
    found = store.register("a", models / "a")
    assert (found.name, found.source, found.nbytes, found.uses, found.places) == ("a", str(models / "a"), size, 0, [])
    assert found.layers == len(open_checkpoint(models / "a").index.layers)
    store.register("b", os.fspath(models / "b"))
    assert [model.name for model in store.models()] == ["a", "b"]
    store.prefetch("a")
    store.forget("a")
    assert [model.name for model in store.models()] == ["b"] and place_of(store, "dram").used_nbytes == 0
    with pytest.raises(StoreError, match=r"no model is registered as 'a'; register it first \(known: b\)"):
        store.attach("a")
    with pytest.raises(CheckpointError):
        store.register("c", models / "nowhere")
    with pytest.raises(StoreError, match=r"has no place 'cuda:7'; it has dram(, disk)?; start it with --device cuda:7=SIZE$"):
        store.prefetch("b", "cuda:7")
    with pytest.raises(StoreError, match=r"has no place 'ram'; it has dram(, disk)?$"):
        store.prefetch("b", "ram")
    with pytest.raises(StoreError, match="not in a disk cache of the store's"):
        store.evict("b", "disk")


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a/b", "/a", ".hidden", "a\0b", "a\nb", "ä", "x" * 201, "\udcff"])
def test_no_name_leads_out_of_the_stores_folder(name: str, tmp_path: Path, models: Path) -> None:
    with Store(tmp_path / "s", dram_nbytes=CHUNK, chunk_nbytes=CHUNK) as store, StoreServer(store, tmp_path / "socket"):
        for either in (store, StoreClient(tmp_path / "socket")):
            with pytest.raises(StoreError):
                either.register(name, models / "a")
            with pytest.raises(StoreError):
                either.attach(name)
        assert store.models() == [] and [path.name for path in (tmp_path / "s").rglob("*")] == ["remote"]


def test_a_changed_model_is_served_once_it_is_registered_again(opened: Open, tmp_path: Path) -> None:
    store = opened()
    path = tmp_path / "model"
    write_model(path, seed=1)
    store.register("m", path)
    old = store.attach("m").wait()["model.layers.0.w"].clone()
    drop_lease(store, "m")
    store.register("m", path)  # the same: what is in memory stays
    assert held_nbytes(store, "m") > 0
    write_model(path, seed=2)
    assert torch.equal(store.attach("m").wait()["model.layers.0.w"], old)  # still the version that was registered
    drop_lease(store, "m")
    store.evict("m", "dram")
    with pytest.raises(StoreError, match="m changed at its source since it was registered; register it again"):
        store.attach("m")
    assert place_of(store, "dram").used_nbytes == 0
    store.register("m", path)
    model = store.attach("m")
    assert_right(model.wait(), path)
    write_model(path, seed=3)
    with pytest.raises(StoreError, match="m stays in dram: 1 attachment or copy uses it"):
        store.register("m", path)
    model.close()
    del model
    drop_lease(store, "m")
    store.register("m", path)
    assert_right(store.attach("m").wait(), path)


# Loading and attaching


def test_prefetch_reports_its_progress(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=64 * MIB)
    store.register("a", f"{server.url}/a")
    for place in ("disk", "dram"):
        seen: list[Progress] = []
        store.prefetch("a", place, on_progress=seen.append)
        assert seen[-1] == Progress(size, size) and {found.total_nbytes for found in seen} == {size}
        assert [found.done_nbytes for found in seen] == sorted(found.done_nbytes for found in seen)
    assert (store.stats().moved_nbytes, server.weight_nbytes()) == ({"remote->disk": size, "disk->dram": size}, size)
    store.prefetch("a")
    store.prefetch("a", "disk")
    assert store.stats().moved_nbytes == {"remote->disk": size, "disk->dram": size} and store.stats().attached == {}
    found = residence(store, "a")
    assert found == Residence("dram", size, leases=0, pinned=False, loading=False)
    store.evict("a", "dram")  # at once: nothing of the load is left under way
    assert store.evict("a", "disk") >= size and place_of(store, "disk").used_nbytes == 0


def test_attaching_before_while_and_after_loading_gives_the_same_bits(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened()
    store.register("a", f"{server.url}/a")
    with gated(server, *PARTITIONS):
        first = store.attach("a")
        eventually(lambda: server.asked and residence(store, "a") is not None)
        second = store.attach("a")
        assert first.tier is second.tier is Tier.DRAM and not first.done and not second.done and not first.ready("model.layers.0.w")
        assert residence(store, "a") == Residence("dram", held_nbytes(store, "a"), leases=2, pinned=False, loading=True)
        for refused in (lambda: store.evict("a", "dram"), lambda: store.forget("a")):
            with pytest.raises(StoreError, match=r"a stays in (dram|disk): it is loading"):
                refused()
        assert second.wait_for("model.layers.0.w", 0.05) is False
        with pytest.raises(TimeoutError):
            second.wait(0.05)
        with pytest.raises(LoadError, match="neither a tensor nor a layer"):
            first.ready("nothing")
        views = dict(first.tensors)
    assert_right(first.wait(), models / "a")
    assert_right(second.wait(), models / "a")
    assert torch.equal(views["model.layers.6.w"], load_tensors(models / "a")["model.layers.6.w"])
    third = store.attach("a")
    assert_right(third.wait(), models / "a")
    assert third.done and third.progress == Progress(size, size) and all(third.ready(name) for name in [*third.layers, *third.tensors])
    assert store.stats().attached == {"remote": 1, "dram": 2} and store.stats().moved_nbytes == {"remote->dram": size}
    assert server.weight_nbytes() == size  # without a disk cache too, no byte is asked for twice
    third.close()
    for closed in (lambda: third.tensors, third.wait):
        with pytest.raises(StoreError, match="was closed; attach the model again"):
            closed()


def test_layers_are_ready_as_their_bytes_arrive(opened: Open, models: Path, server: GatedServer) -> None:
    store = opened()
    store.register("a", f"{server.url}/a")
    index, wanted = open_checkpoint(models / "a").index, load_tensors(models / "a")
    last = {name: max((tensor.partition for tensor in index.tensors if index.layers[tensor.layer] == name and tensor.nbytes), default=0) for name in index.layers}
    with gated(server, *PARTITIONS):
        model = store.attach("a")
        assert model.layers == [name for name in index.layers if any(index.layers[tensor.layer] == name for tensor in index.tensors)]
        for number, file in enumerate(PARTITIONS):
            open_gate(server, file)
            for name in model.layers:
                if last[name] == number:
                    assert model.wait_for(name, 20)
                    for tensor in index.tensors:
                        if index.layers[tensor.layer] == name:
                            assert torch.equal(model.tensors[tensor.name], wanted[tensor.name])
            later = [name for name in model.layers if last[name] > number]
            assert not any(model.ready(name) for name in later) and bool(later) == (number < len(PARTITIONS) - 1)
            assert model.progress.done_nbytes >= index.partitions[number].nbytes
    model.wait()


def test_concurrent_attaches_share_one_load(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=64 * MIB)
    store.register("a", f"{server.url}/a")
    with gated(server, PARTITIONS[1]), ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(lambda: store.attach("a")) for _ in range(8)]
        prefetching = [pool.submit(store.prefetch, "a") for _ in range(2)]
        attached = [found.result(30) for found in waiting]
        on_disk = pool.submit(store.prefetch, "a", "disk")  # the same reading of the remote fills the disk
        assert leases(store, "a") >= 8 and not on_disk.done()
        open_gate(server)
        for model in attached:
            assert_right(model.wait(), models / "a")
        for done in (*prefetching, on_disk):
            done.result(30)
    assert store.stats().moved_nbytes == {"remote->dram": size} and server.weight_nbytes() == size
    assert place_of(store, "dram").used_nbytes == -(-size // CHUNK) * CHUNK


def test_a_write_is_seen_by_nobody_else(opened: Open, models: Path) -> None:
    store = opened()
    store.register("a", models / "a")
    wanted = load_tensors(models / "a")
    generator = random.Random(1)
    tenants = [store.attach("a").wait() for _ in range(3)]
    written = [{name: tensor.clone() for name, tensor in wanted.items()} for _ in tenants]
    for name in wanted:
        for copy, tenant in zip(written, tenants, strict=True):  # the tie too is each tenant's own
            assert tenant["lm_head.weight"].data_ptr() == tenant["model.embed_tokens.weight"].data_ptr()
            copy["lm_head.weight"] = copy["model.embed_tokens.weight"]
            if wanted[name].dtype != torch.uint8:
                continue
            for _ in range(8):
                at, value = generator.randrange(wanted[name].numel()), generator.randrange(256)
                tenant[name].view(-1)[at] = value
                copy[name].view(-1)[at] = value
    for copy, tenant in zip(written, tenants, strict=True):
        assert not torch.equal(copy["model.layers.3.w"], wanted["model.layers.3.w"])
        for name in wanted:
            assert torch.equal(tenant[name], copy[name]), name
    assert_right(store.attach("a").wait(), models / "a")
    del tenants, tenant
    drop_lease(store, "a")
    assert_right(store.attach("a").wait(), models / "a")


def test_a_lease_ends_with_the_last_tensor_and_not_earlier(opened: Open, models: Path, size: int) -> None:
    store = opened()
    store.register("a", models / "a")
    model = store.attach("a")
    kept = model.wait()["model.layers.2.w"][100:200]
    wanted = kept.clone()
    model.close()
    del model
    gc.collect()
    assert leases(store, "a") == 1
    with pytest.raises(StoreError, match="a stays in dram: 1 attachment or copy uses it"):
        store.evict("a", "dram")
    assert torch.equal(kept, wanted)
    del kept
    drop_lease(store, "a")
    assert store.evict("a", "dram") == -(-size // CHUNK) * CHUNK
    assert held_nbytes(store, "a") == 0 and place_of(store, "dram").used_nbytes == 0 == place_of(store, "dram").kernel_nbytes


def test_models_without_bytes_and_with_composites(opened: Open, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([3.0, 4.0]), (3, 2), check_invariants=True)
    for name, tensors in {"none": {"empty": torch.empty(0, 5)}, "some": {"mask": sparse, "w": torch.randn(3, 4, generator=generator)}}.items():
        write_checkpoint(torch_source(tensors), tmp_path / name, WriteOptions(threads=1), None)
    store = opened()
    for name in ("none", "some"):
        store.register(name, tmp_path / name)
        for _ in range(2):
            model = store.attach(name)
            found = model.wait()
            assert model.done and all(model.ready(layer) for layer in model.layers)
            assert torch.equal(found["empty"], torch.empty(0, 5)) if name == "none" else torch.equal(found["mask"].to_dense(), sparse.to_dense())
        del model, found
        drop_lease(store, name)
        store.evict(name, "dram")
    assert place_of(store, "dram").used_nbytes == 0


def test_the_end_of_a_load_shows_once_the_store_has_noted_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever evicts at once would be told that it loads, and whoever asks again would get the failure again."""
    settle = Bringer._settle

    def slowly(self: Bringer, *args: Any) -> None:
        time.sleep(0.2)
        settle(self, *args)

    monkeypatch.setattr(Bringer, "_settle", slowly)
    path = tmp_path / "damaged"
    shutil.copytree(models / "b", path)
    right = (path / PARTITIONS[1]).read_bytes()
    with Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK) as store:
        store.register("a", models / "a")
        store.prefetch("a")
        assert store.evict("a", "dram") > 0
        store.attach("a").wait()
        gc.collect()
        store.forget("a")
        store.register("b", path)
        (path / PARTITIONS[1]).write_bytes(bytes(len(right)))
        with pytest.raises(IntegrityError):
            store.attach("b").wait()
        (path / PARTITIONS[1]).write_bytes(right)
        assert_right(store.attach("b").wait(), path)


class Doubled(torch.Tensor):
    """A class that one program allows and the store's, another, does not know."""

    @staticmethod
    def __new__(cls, half: torch.Tensor) -> Doubled:
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half: torch.Tensor) -> None:
        self.half_ = half

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["half_"], {}

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], *_: Any) -> Doubled:
        return cls(parts["half_"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


def test_a_store_holds_for_others_what_it_could_not_build_itself(tmp_path: Path) -> None:
    allow_composite(Doubled)
    try:
        save_checkpoint({"w": Doubled(torch.arange(6)), "plain": torch.ones(4)}, tmp_path / "c")
        with Store(tmp_path / "s", dram_nbytes=CHUNK, chunk_nbytes=CHUNK) as store:
            store.register("a", tmp_path / "c")
            del _wrappers[f"{Doubled.__module__}.Doubled"]
            store.prefetch("a")
            with pytest.raises(FormatError, match="allow its class with allow_composite"):
                store.attach("a").wait()
            allow_composite(Doubled)
            found = store.attach("a").wait()
            assert isinstance(found["w"], Doubled) and torch.equal(found["w"].half_, torch.arange(6))
    finally:
        _wrappers.clear()


def test_what_happens_between_asking_and_getting(models: Path, tmp_path: Path) -> None:
    """Two races, taken apart: forgotten before its load begins, and failed before its memory is lent."""
    path = tmp_path / "damaged"
    shutil.copytree(models / "b", path)
    (path / PARTITIONS[1]).write_bytes(bytes((path / PARTITIONS[1]).stat().st_size))
    with Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK) as store:
        store.register("a", models / "a")
        entry = store._holdings.entry("a")
        store.forget("a")
        for _ in range(2):
            with pytest.raises(StoreError, match="a was forgotten or registered anew in this moment; ask for it again"):
                store._bringer.bring(entry, "dram", use=True)
            store.register("a", models / "a")
        store.register("b", path)
        lease = store.lend("b", "dram")
        assert isinstance(lease, Lease)
        with pytest.raises(IntegrityError):
            lease.arriving.wait()
        chunk = store.lend("a", "dram")  # in the memory that was the other's
        assert isinstance(chunk, Lease)
        with pytest.raises(IntegrityError):
            attach_lease(lease)
        assert not any(shared.lent for shared in chunk.image.chunks)
        chunk.arriving.wait()
        chunk.close()


# Eviction


@pytest.mark.parametrize(("policy", "gone"), [("lru", "b"), ("lfu", "a"), ("gdsf", None)])
def test_a_policy_says_what_goes(opened: Open, models: Path, size: int, policy: str, gone: str | None) -> None:
    store = opened(dram_nbytes=2 * -(-size // CHUNK) * CHUNK, policy=policy)
    for name in "abc":
        store.register(name, models / name)
    for name in "bbbaab"[:3] + "ab" + "a":
        store.attach(name).wait()
        drop_lease(store, name)
    # b was used four times and a twice, a last.
    store.prefetch("c")
    assert held_nbytes(store, "c") == size
    lost = [name for name in "ab" if held_nbytes(store, name) == 0]
    assert lost == [gone] if gone else len(lost) == 1
    assert store.stats().evicted_nbytes == {"dram": -(-size // CHUNK) * CHUNK}
    assert place_of(store, "dram").used_nbytes <= place_of(store, "dram").budget_nbytes
    assert_right(store.attach(lost[0]).wait(), models / lost[0])


def test_a_prefix_stays_and_only_the_tail_is_read_again(opened: Open, models: Path, size: int) -> None:
    chunks = -(-size // CHUNK)
    store = opened(dram_nbytes=(2 * chunks - 3) * CHUNK, policy="prefix")
    for name in "ab":
        store.register(name, models / name)
    assert_right(store.attach("a").wait(), models / "a")
    drop_lease(store, "a")
    assert_right(store.attach("b").wait(), models / "b")
    stays = (chunks - 3) * CHUNK
    assert held_nbytes(store, "a") == stays and store.stats().evicted_nbytes == {"dram": 3 * CHUNK}
    drop_lease(store, "b")
    before = store.stats().moved_nbytes["disk->dram"]
    model = store.attach("a")
    eventually(lambda: model.progress.done_nbytes >= stays - 4 * MIB)  # over a socket it is told a moment later
    assert_right(model.wait(), models / "a")
    assert store.stats().moved_nbytes["disk->dram"] - before == size - stays
    assert held_nbytes(store, "b") == stays


def test_leased_pinned_and_loading_bytes_are_never_evicted(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(dram_nbytes=2 * -(-size // CHUNK) * CHUNK, policy="lru")
    for name in "abd":
        store.register(name, models / name)
    store.register("c", f"{server.url}/c")
    model = store.attach("a")
    model.wait()
    store.prefetch("b")
    store.pin("b", "dram")
    for refused, why in ((lambda: store.evict("b", "dram"), "pinned"), (lambda: store.forget("b"), "pinned"), (lambda: store.evict("a", "dram"), "1 attachment or copy")):
        with pytest.raises(StoreError, match=why):
            refused()
    with pytest.raises(StoreError, match=r"dram has no room for d: .* bytes are lacking of its budget .* are leased, pinned or loading"):
        store.prefetch("d")
    streamed = store.attach("d")
    assert streamed.tier is Tier.DISK and "dram has no room for d" in streamed.reason
    assert_right(streamed.wait(), models / "d")
    assert {name: held_nbytes(store, name) for name in "abcd"} == {"a": size, "b": size, "c": 0, "d": 0}
    assert_right(model.wait(), models / "a")
    store.pin("b", "dram", False)
    with gated(server, *PARTITIONS):
        loading = store.attach("c")  # in b's place
        del model
        drop_lease(store, "a")
        store.prefetch("d")  # in a's, not in that of a load under way
        assert {name: held_nbytes(store, name) for name in "abd"} == {"a": 0, "b": 0, "d": size}
    assert_right(loading.wait(), models / "c")
    assert store.stats().attached == {"disk": 1, "elsewhere": 1, "remote": 1}


def test_a_model_larger_than_the_budget_streams_from_the_nearest_source(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(dram_nbytes=2 * CHUNK, disk_nbytes=64 * MIB)
    store.register("local", models / "a")
    store.register("remote", f"{server.url}/a")
    for name, reads in (("local", 0), ("remote", size)):
        before = server.weight_nbytes()
        model = store.attach(name)
        assert model.tier is Tier.DISK and f"dram has no room for {name}" in model.reason
        assert_right(model.wait(), models / "a")
        assert server.weight_nbytes() - before == reads
    assert place_of(store, "dram").used_nbytes == 0 == place_of(store, "disk").used_nbytes
    store.prefetch("remote", "disk")
    before = server.weight_nbytes()
    assert_right(store.attach("remote").wait(), models / "a")  # now from the disk cache
    assert server.weight_nbytes() == before


# Remote models


def test_a_remote_model_is_read_once(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=64 * MIB)
    store.register("a", f"{server.url}/a")
    model = store.attach("a")
    assert_right(model.wait(), models / "a")
    assert (model.checkpoint.path / "tokenizer.json").read_bytes() == b"{}" * 50
    assert server.weight_nbytes() == size and place_of(store, "disk").used_nbytes >= size
    del model
    drop_lease(store, "a")
    store.evict("a", "dram")
    asked = len(server.asked)
    assert_right(store.attach("a").wait(), models / "a")
    assert len(server.asked) == asked  # nothing at all, not even whether it is still there
    assert store.stats().moved_nbytes == {"remote->dram": size, "disk->dram": size}
    drop_lease(store, "a")
    store.forget("a")
    assert [place.used_nbytes for place in store.stats().places] == [0, 0]


def test_the_disk_cache_evicts_by_the_policy_what_nobody_reads(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=size * 5 // 2, policy="lru")
    for name in "abc":
        store.register(name, f"{server.url}/{name}")
    store.prefetch("a", "disk")
    store.prefetch("b", "disk")
    store.pin("a", "disk")
    store.prefetch("c", "disk")
    assert place_of(store, "disk").used_nbytes <= size * 5 // 2 and store.stats().evicted_nbytes["disk"] >= size
    for name, reads in (("a", 0), ("c", 0), ("b", size)):
        before = server.weight_nbytes()
        assert_right(store.attach(name).wait(), models / name)
        assert server.weight_nbytes() - before == reads, name
    with pytest.raises(StoreError, match="a stays in disk: it is pinned"):
        store.evict("a", "disk")


def test_two_names_of_one_source_share_its_copy_on_the_disk(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=64 * MIB)
    store.register("a", f"{server.url}/a")
    store.register("b", f"{server.url}/a")
    store.prefetch("a", "disk")
    store.pin("b", "disk")
    with pytest.raises(StoreError, match="a stays in disk: it is pinned"):
        store.evict("a", "disk")
    store.pin("b", "disk", False)
    store.forget("a")
    assert_right(store.attach("b").wait(), models / "a")
    assert server.weight_nbytes() == size
    drop_lease(store, "b")
    store.forget("b")
    assert place_of(store, "disk").used_nbytes == 0


# What is told


def test_events_tell_what_changes(models: Path, size: int, tmp_path: Path) -> None:
    nbytes = -(-size // CHUNK) * CHUNK
    with Store(tmp_path / "s", dram_nbytes=nbytes, chunk_nbytes=CHUNK) as store, StoreServer(store, tmp_path / "socket"):
        here: list[Happened] = []
        end = store.listen(here.append)
        told = StoreClient(tmp_path / "socket").events()
        for name in "ab":
            store.register(name, models / name)
            store.prefetch(name)
        store.evict("b", "dram")
        wanted = [Happened("loaded", "a", "dram", size), Happened("evicted", "a", "dram", nbytes), Happened("loaded", "b", "dram", size), Happened("evicted", "b", "dram", nbytes)]
        assert here == wanted and [next(told) for _ in wanted] == wanted
        end()
        end()
        store.prefetch("a")
        assert here == wanted and next(told) == Happened("loaded", "a", "dram", size)
        told.close()  # type: ignore[attr-defined]


def test_a_closed_store_says_so_and_what_was_attached_stays(models: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK)
    store.register("a", models / "a")
    model = store.attach("a")
    tensors = model.wait()
    store.close()
    store.close()
    for refused in (lambda: store.attach("a"), lambda: store.prefetch("a"), lambda: store.prefetch("a", "disk")):
        with pytest.raises(StoreError, match=r"the store is closed; open it again|has no place 'dram'"):
            refused()
    assert_right(tensors, models / "a")


def test_closing_a_store_ends_its_loads(models: Path, tmp_path: Path, server: GatedServer) -> None:
    store = Store(tmp_path / "s", dram_nbytes=64 * MIB, disk_nbytes=64 * MIB, chunk_nbytes=CHUNK, remote=PATIENT)
    for name in "ab":
        store.register(name, f"{server.url}/{name}")
    with gated(server, *PARTITIONS), ThreadPoolExecutor(2) as pool:
        model = store.attach("a")
        on_disk = pool.submit(store.prefetch, "b", "disk")
        eventually(lambda: sum(asked.start > 0 or asked.end > 1 for asked in server.asked) >= 0 and threading.active_count() > 8)
        closing = pool.submit(store.close)
        open_gate(server)
        closing.result(20)
        with pytest.raises(SllmError):
            on_disk.result(20)
        with pytest.raises(SllmError):
            model.wait(20)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm")]


@pytest.mark.parametrize("options", [{"dram_nbytes": MIB}, {"dram_nbytes": CHUNK, "policy": "fifo"}, {"disk_nbytes": 1}, {"device_nbytes": {"cpu": MIB}}, {"disk_nbytes": MIB, "backed_nbytes": 1}, {"dram_nbytes": CHUNK, "backed_nbytes": CHUNK + 1}, {"dram_nbytes": MIB * 3, "chunk_nbytes": MIB}])
def test_budgets_that_hold_nothing_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chunk|policy|holds nothing|dram_nbytes|back at most"):
        Store(tmp_path, **options)


def test_two_stores_share_neither_a_socket_nor_a_folder(models: Path, tmp_path: Path) -> None:
    with StoreProcess(tmp_path / "folder", dram_nbytes=CHUNK) as first:
        with Store(tmp_path / "other", dram_nbytes=CHUNK) as store, pytest.raises(WireError, match="a server listens there already"):
            StoreServer(store, first.address)
        with pytest.raises(StoreError, match=rf"another store works in {tmp_path / 'folder'}; ask that one, close it, or give this one a folder of its own"):
            Store(tmp_path / "folder", dram_nbytes=CHUNK)
        assert first.client.models() == []
        first.kill()
    with pytest.raises(ValueError, match="smaller than one chunk"):
        Store(tmp_path / "folder", dram_nbytes=CHUNK // 2)  # which must not keep it
    gone, go = os.pipe()
    with Store(tmp_path / "folder", dram_nbytes=CHUNK) as store:
        child = os.fork()
        if child == 0:  # has the store's descriptors as long as it lives
            os.close(go)
            os.read(gone, 1)
            os._exit(0)
        with pytest.raises(StoreError, match="another store works in"):
            Store(tmp_path / "folder", disk_nbytes=64 * MIB)
    with Store(tmp_path / "folder", dram_nbytes=CHUNK):
        for refused in (lambda: store.register("a", models / "a"), lambda: store.register("a", "http://127.0.0.1:1/a")):
            with pytest.raises(StoreError, match="the store is closed; open it again"):
                refused()
    os.close(gone)
    os.close(go)
    os.waitpid(child, 0)


def test_memory_is_backed_between_loads_and_told_apart(opened: Open, models: Path, size: int) -> None:
    chunks = -(-size // CHUNK)
    store = opened(dram_nbytes=(chunks + 2) * CHUNK, backed_nbytes=chunks * CHUNK)
    store.register("a", models / "a")
    eventually(lambda: place_of(store, "dram").ready_nbytes == chunks * CHUNK)
    for _ in range(2):
        place = place_of(store, "dram")
        assert (place.used_nbytes, place.kernel_nbytes, place.trouble) == (0, chunks * CHUNK, "")
        assert_right(store.attach("a").wait(), models / "a")
        eventually(lambda: place_of(store, "dram").ready_nbytes == 2 * CHUNK)  # all that the budget has left
        place = place_of(store, "dram")
        assert (place.used_nbytes, place.kernel_nbytes) == (chunks * CHUNK, place.budget_nbytes)
        drop_lease(store, "a")
        store.evict("a", "dram")
        eventually(lambda: place_of(store, "dram").ready_nbytes == chunks * CHUNK)


def test_nothing_is_backed_while_anything_is_loaded(models: Path, size: int, tmp_path: Path, server: GatedServer) -> None:
    nbytes = 2 * -(-size // CHUNK) * CHUNK
    with Store(tmp_path / "s", dram_nbytes=nbytes, backed_nbytes=nbytes, chunk_nbytes=CHUNK, remote=PATIENT) as store:
        eventually(lambda: place_of(store, "dram").ready_nbytes == nbytes)
        store.register("a", f"{server.url}/a")
        with gated(server, *PARTITIONS):
            model = store.attach("a")
            store.register("b", models / "b")
            store.prefetch("b")
            assert place_of(store, "dram").ready_nbytes == 0
            assert store.evict("b", "dram") == nbytes // 2
            store.register("b", models / "b")
            kept = place_of(store, "dram").ready_nbytes
            assert kept == nbytes // 2  # never lent, so it has its memory still
            store.attach("b").wait()
            drop_lease(store, "b")
            store.evict("b", "dram")
            time.sleep(0.4)
            assert place_of(store, "dram").ready_nbytes == 0
        model.wait()
        eventually(lambda: place_of(store, "dram").ready_nbytes == nbytes // 2)
        del model
        gc.collect()


def test_where_a_model_lies_is_told_with_the_bytes_so_far(opened: Open, models: Path, size: int, server: GatedServer) -> None:
    store = opened(disk_nbytes=64 * MIB)
    store.register("a", f"{server.url}/a")
    store.register("same", f"{server.url}/a")
    store.register("local", models / "a")
    store.prefetch("local")
    files = open_checkpoint(models / "a").index.partitions
    with gated(server, *PARTITIONS[2:]):
        model = store.attach("a")
        before = sum(entry.nbytes for entry in files[:2])
        eventually(lambda: held_nbytes(store, "a", "disk") == before == held_nbytes(store, "a"))
        assert residence(store, "a") == Residence("dram", before, leases=1, pinned=False, loading=True)
        on_disk = Residence("disk", before, leases=0, pinned=False, loading=True)
        assert residence(store, "a", "disk") == on_disk == residence(store, "same", "disk")
    model.wait()
    store.pin("a", "disk")
    assert residence(store, "a", "disk") == Residence("disk", size, leases=0, pinned=True, loading=False)
    assert residence(store, "a") == Residence("dram", size, leases=1, pinned=False, loading=False)
    assert [found.place for name in ("same", "local") for found in next(model for model in store.models() if model.name == name).places] == ["disk", "dram"]
    store.pin("a", "disk", False)
    store.evict("a", "disk")
    assert residence(store, "a", "disk") is None is residence(store, "same", "disk")


def test_credentials_are_used_and_not_told(opened: Open, models: Path, server: GatedServer) -> None:
    for name, dram in (("roomy", 64 * MIB), ("full", CHUNK)):
        store = opened(name, dram_nbytes=dram)
        told = [store.register("a", server.url.replace("//", "//me:secret@") + "/a?token=hidden")]
        model = store.attach("a")
        assert_right(model.wait(), models / "a")
        assert model.tier is (Tier.DRAM if name == "roomy" else Tier.DISK)  # the client reads for itself, by the same credentials
        told += store.models()
        assert {found.source for found in told} == {server.url.replace("//", "//***@") + "/a?***"}
        assert not any(secret in repr((told, store.stats(), model.reason, model.checkpoint)) for secret in ("secret", "hidden"))
        del model
    assert all(asked.headers.get("authorization", "").startswith("Basic ") for asked in server.asked)


def test_an_error_is_the_same_over_the_socket(models: Path, tmp_path: Path, server: GatedServer) -> None:
    shutil.copytree(models / "a", tmp_path / "damaged")
    right = (models / "a" / PARTITIONS[1]).read_bytes()
    (tmp_path / "damaged" / PARTITIONS[1]).write_bytes(bytes([right[0] ^ 1]) + right[1:])
    with Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK, remote=HASTY) as store, StoreServer(store, tmp_path / "socket"):
        client = StoreClient(tmp_path / "socket")
        store.register("damaged", tmp_path / "damaged")
        with Store(tmp_path / "small", dram_nbytes=CHUNK, chunk_nbytes=CHUNK) as small, StoreServer(small, tmp_path / "second"):
            small.register("a", models / "a")
            found: list[list[tuple[type, str, dict[str, Any]]]] = [[], []]

            def asked(either: Either, tiny: Either) -> list[Callable[[], object]]:
                return [
                    lambda: either.attach("damaged").wait(),
                    lambda: either.prefetch("damaged"),
                    lambda: either.register("b", models / "nowhere"),
                    lambda: either.register("b", f"{server.url}/nowhere"),
                    lambda: either.prefetch("unknown"),
                    lambda: tiny.prefetch("a"),
                ]

            for errors, asking in ((found[0], asked(store, small)), (found[1], asked(client, StoreClient(tmp_path / "second")))):
                for ask in asking:
                    with pytest.raises(SllmError) as error:
                        ask()
                    errors.append((type(error.value), str(error.value), {name: vars(error.value).get(name) for name in ("path", "offset")}))
                    del error
        assert found[0] == found[1]
        kinds = [kind for kind, _, _ in found[0]]
        assert kinds == [IntegrityError, IntegrityError, CheckpointError, RemoteError, StoreError, NoRoomError]
        assert found[0][0][2] == {"path": str(tmp_path / "damaged" / PARTITIONS[1]), "offset": 0} and found[0][3][2]["path"] == f"{server.url}/nowhere/index.json"
        del ask, asking, asked
        gc.collect()


@pytest.mark.parametrize("over_socket", [False, True])
def test_a_prefetch_of_a_silent_remote_ends_when_it_is_cancelled(models: Path, tmp_path: Path, server: GatedServer, over_socket: bool) -> None:
    """Its requests may hang for 30 seconds."""
    with gated(server, *PARTITIONS), Store(tmp_path / "s", disk_nbytes=64 * MIB, remote=PATIENT) as store, StoreServer(store, tmp_path / "socket"):
        store.register("a", f"{server.url}/a")
        if over_socket:
            program = f"from sllm_mini.storage import StoreClient; StoreClient({os.fspath(tmp_path / 'socket')!r}).prefetch('a', 'disk')"
            client = subprocess.Popen([sys.executable, "-c", program])
            eventually(lambda: residence(store, "a", "disk") is not None and len(server.asked) > len(PARTITIONS) + 2)
            began = time.monotonic()
            client.kill()
            client.wait()
        else:
            with ThreadPoolExecutor(1) as pool:
                prefetching = pool.submit(store.prefetch, "a", "disk")
                eventually(lambda: residence(store, "a", "disk") is not None and len(server.asked) > len(PARTITIONS) + 2)
                began = time.monotonic()
                store.close()
                with pytest.raises(LoadCancelled):
                    prefetching.result(1)
        eventually(lambda: residence(store, "a", "disk") is None)
        assert time.monotonic() - began < 5


# GPUs, on a runtime that records


@pytest.mark.parametrize("through_dram", [True, False])
def test_a_gpu_is_filled_from_the_nearest_place(models: Path, size: int, tmp_path: Path, through_dram: bool) -> None:
    runtime = RecordingRuntime(devices=1, queries_before_done=2)
    gpu = runtime.device()
    store = Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK, device_nbytes={gpu: -(-size // CHUNK) * CHUNK})
    for name in "ab":
        store.register(name, models / name)
    if through_dram:
        store.prefetch("a")
    model = store.attach("a", gpu)
    assert model.tier is Tier.DEVICE and model.wait_for(model.layers[0], 20)
    assert_right(model.wait(), models / "a")
    assert store.stats().moved_nbytes == ({"disk->dram": size, "dram->cuda:0": size} if through_dram else {"disk->cuda:0": size})
    assert residence(store, "a", "cuda:0") == Residence("cuda:0", size, leases=1, pinned=False, loading=False)
    assert leases(store, "a") == 0 and runtime.pageable_copies == 0
    again = store.attach("a", gpu)
    assert again.wait()["model.layers.0.w"].data_ptr() == model.tensors["model.layers.0.w"].data_ptr()
    with pytest.raises(StoreError, match="cuda:0 has no room for b"):
        store.prefetch("b", "cuda:0")
    own = store.attach("b", gpu)
    assert own.tier is Tier.DISK and "cuda:0 has no room for b" in own.reason
    assert_right(own.wait(), models / "b")
    kept = again.tensors["model.layers.1.w"][5:10]
    del model, again
    gc.collect()
    assert leases(store, "a", "cuda:0") == 1
    del kept, own
    gc.collect()
    store.prefetch("b", "cuda:0")
    assert held_nbytes(store, "a", "cuda:0") == 0 and held_nbytes(store, "b", "cuda:0") == size
    assert_right(store.attach("b", gpu).wait(), models / "b")
    gc.collect()
    store.close()
    del store
    gc.collect()
    assert runtime.leaks() == {}


@pytest.mark.parametrize("call", ["malloc", "memcpyAsync", "streamCreateWithFlags"])
def test_a_gpu_that_fails_costs_one_error_and_nothing_else(models: Path, tmp_path: Path, call: str) -> None:
    runtime = RecordingRuntime(devices=1)
    gpu = runtime.device()
    store = Store(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK, device_nbytes={gpu: 64 * MIB})
    store.register("a", models / "a")
    runtime.fail(call)
    with pytest.raises(SllmError):
        store.attach("a", gpu).wait()
    assert place_of(store, "cuda:0").used_nbytes == 0 and residence(store, "a", "cuda:0") is None
    assert_right(store.attach("a", gpu).wait(), models / "a")
    gc.collect()
    assert store.evict("a", "cuda:0") > 0
    store.close()
    del store
    gc.collect()
    assert runtime.leaks() == {}


# Anything, in any order


class StoreMachine(RuleBasedStateMachine):
    """Registers, prefetches, attaches, drops, pins, evicts and forgets, beside a model of what must be true."""

    folder: Path
    models: Path
    size: int
    attached: Bundle[str] = Bundle("attached")

    def __init__(self) -> None:
        super().__init__()
        self.chunks = -(-self.size // CHUNK)
        self.budget = (2 * self.chunks + 3) * CHUNK
        self.policy = "prefix"
        self.store = Store(self.folder, dram_nbytes=self.budget, chunk_nbytes=CHUNK, policy=self.policy)
        self.registered: set[str] = set()
        self.pinned: set[str] = set()
        self.held: dict[str, tuple[str, Tier, dict[str, torch.Tensor]]] = {}
        self.count = 0

    def leased(self) -> list[str]:
        return [name for name, tier, _ in self.held.values() if tier is Tier.DRAM]

    names = strategies.sampled_from("abcd")

    @rule(name=names)
    def register(self, name: str) -> None:
        self.store.register(name, self.models / name)
        self.registered.add(name)

    @rule(name=names)
    def forget(self, name: str) -> None:
        fixed = name not in self.registered or name in self.pinned or name in self.leased()
        self._try(lambda: self.store.forget(name), fixed)
        if not fixed:
            self.registered.discard(name)

    @rule(name=names)
    def prefetch(self, name: str) -> None:
        fixed = {other for other in {*self.leased(), *self.pinned} if held_nbytes_of(self.store, other) and other != name}
        taken = sum(occupied(self.store, other) for other in fixed)
        self._try(lambda: self.store.prefetch(name), name not in self.registered or taken + self.chunks * CHUNK > self.budget)
        if name in self.registered and not taken + self.chunks * CHUNK > self.budget:
            assert held_nbytes(self.store, name) == self.size

    @precondition(lambda self: self.registered)
    @rule(target=attached, data=strategies.data())
    def attach(self, data: strategies.DataObject) -> str:
        name = data.draw(strategies.sampled_from(sorted(self.registered)))
        model = self.store.attach(name)
        self.count += 1
        key = f"attachment {self.count}"
        self.held[key] = (name, model.tier, model.wait())
        for tensor, wanted in TENSORS[name].items():
            assert torch.equal(self.held[key][2][tensor], wanted)
        return key

    @rule(key=attached, value=strategies.integers(0, 255))
    def write(self, key: str, value: int) -> None:
        if key in self.held:
            self.held[key][2]["model.layers.6.w"][::4096] = value

    @rule(key=consumes(attached))
    def drop(self, key: str) -> None:
        del self.held[key]

    @precondition(lambda self: self.registered)
    @rule(data=strategies.data(), pinned=strategies.booleans())
    def pin(self, data: strategies.DataObject, pinned: bool) -> None:
        name = data.draw(strategies.sampled_from(sorted(self.registered)))
        self.store.pin(name, "dram", pinned)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule(name=names)
    def evict(self, name: str) -> None:
        before = occupied(self.store, name)
        fixed = name not in self.registered or name in self.pinned or name in self.leased()
        nbytes = self._try(lambda: self.store.evict(name, "dram"), fixed)
        if not fixed:
            assert nbytes == before and occupied(self.store, name) == 0

    def _try(self, work: Callable[[], Any], refused: bool) -> Any:
        try:
            found = work()
        except StoreError:
            assert refused
            return None
        assert not refused
        return found

    @invariant()
    def the_figures_agree(self) -> None:
        place = place_of(self.store, "dram")
        assert place.used_nbytes <= self.budget == place.budget_nbytes
        assert place.used_nbytes == sum(occupied(self.store, name) for name in self.registered)
        assert place.kernel_nbytes is not None and place.used_nbytes <= place.kernel_nbytes <= self.budget
        assert {model.name for model in self.store.models()} == self.registered
        leased = self.leased()
        for model in self.store.models():
            found = residence(self.store, model.name)
            assert (found.leases if found else 0) == leased.count(model.name)
            if model.name in leased:
                assert found is not None and found.nbytes == self.size
        for name, _, tensors in self.held.values():
            assert torch.equal(tensors["model.layers.2.w"], TENSORS[name]["model.layers.2.w"])

    def teardown(self) -> None:
        self.held.clear()
        gc.collect()
        for name in self.registered:
            self.store.pin(name, "dram", False)
            self.store.forget(name)
        assert place_of(self.store, "dram").used_nbytes == 0
        self.store.close()


TENSORS: dict[str, dict[str, torch.Tensor]] = {}


def occupied(store: Either, name: str) -> int:
    return -(-held_nbytes_of(store, name) // CHUNK) * CHUNK


def held_nbytes_of(store: Either, name: str) -> int:
    return sum(found.nbytes for model in store.models() if model.name == name for found in model.places)


def test_whatever_is_asked_for_in_whatever_order_the_figures_agree(tmp_path: Path, models: Path, size: int) -> None:
    TENSORS.update({name: load_tensors(models / name) for name in "abcd"})
    StoreMachine.folder, StoreMachine.models, StoreMachine.size = tmp_path, models, size
    run_state_machine_as_test(StoreMachine, settings=hypothesis.settings(max_examples=8, stateful_step_count=25, deadline=None))
    TENSORS.clear()


def test_a_crowd_leaves_nothing_behind(opened: Open, models: Path, size: int) -> None:
    """Eight threads do everything to three models at once; refusals are fine, wrong bytes and leftovers are not."""
    store = opened(dram_nbytes=2 * -(-size // CHUNK) * CHUNK, policy="prefix")
    wanted = {name: load_tensors(models / name)["model.layers.5.w"] for name in "abc"}
    wrong: list[object] = []

    def live(seed: int) -> None:
        generator = random.Random(seed)
        kept: list[tuple[str, Attachment]] = []
        for _ in range(25):
            name = generator.choice("abc")
            try:
                what = generator.randrange(8)
                if what == 0:
                    store.evict(name, "dram")
                elif what == 1:
                    store.forget(name)
                elif what == 2:
                    store.prefetch(name)
                elif what == 3 and kept:
                    kept.pop(generator.randrange(len(kept)))
                else:
                    store.register(name, models / name)
                    model = store.attach(name)
                    if not torch.equal(model.wait(30)["model.layers.5.w"], wanted[name]):
                        wrong.append(name)
                    kept = [*kept[-1:], (name, model)]
            except StoreError as error:
                if not any(text in str(error) for text in ("stays in", "no model is registered", "has no room", "forgotten or registered anew")):
                    wrong.append(error)
            except Exception as error:  # noqa: BLE001 - it is the test's result
                wrong.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(8)))
    assert wrong == []
    gc.collect()

    def empty() -> bool:
        for model in store.models():
            try:
                store.forget(model.name)
            except StoreError:
                return False  # a lease that the store has not seen end yet
        return True

    eventually(empty)
    figures: Figures = store.stats()
    dram = figures.places[0]
    assert dram.used_nbytes == 0 and dram.kernel_nbytes is not None and dram.kernel_nbytes <= dram.budget_nbytes
