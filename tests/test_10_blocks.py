"""Chapter 10, live: a model's blocks pushed into a store, plans carried out between nodes, and what happens when one dies or lies."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from command_line import Run
from hypothesis import given
from hypothesis import strategies as st
from processes import children_of
from store_process import eventually

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint
from sllm_mini.checkpoint.torch_source import torch_source
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.cluster import netns
from sllm_mini.cluster.block_board import Board
from sllm_mini.cluster.block_messages import Step, parts_of
from sllm_mini.cluster.blocks import BlockPeer, FetchReport
from sllm_mini.cluster.netns import Links, why_no_namespaces
from sllm_mini.cluster.rate import TokenBucket
from sllm_mini.control.multicast import (
    Plan,
    Transfer,
    binary_tree,
    binomial_pipeline,
    k_way_pipeline,
    serial_chain,
    store_reads,
)
from sllm_mini.errors import IntegrityError, LoadCancelled, NoRoomError, StoreError, UnsupportedError, WireError
from sllm_mini.lab.multicast_live import live_text, plot_live
from sllm_mini.lab.multicast_node import Answer, Fleet, Spread, Spreaded
from sllm_mini.loading.load import load_tensors
from sllm_mini.storage.holdings import Lease
from sllm_mini.storage.incoming import HeldBlocks, Incoming, cut_blocks
from sllm_mini.storage.store import Store
from sllm_mini.wire import connect, set_key, tcp

MIB = 1 << 20
BLOCK = 2 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Six layers of 1.5 to 3 MiB in partitions of 6 MB, so that hash chunks lie across chunks of memory."""
    path = tmp_path_factory.mktemp("m") / "model.sllm"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{n}.w": torch.randint(0, 256, ((3 + n % 4) * MIB // 2,), dtype=torch.uint8, generator=generator) for n in range(6)}
    write_checkpoint(torch_source(tensors), path, WriteOptions(partition_nbytes=6_000_000, threads=1), None)
    return open_checkpoint(path)


@contextmanager
def a_store(folder: Path, model: Checkpoint, *, dram_nbytes: int = 32 * MIB) -> Iterator[Store]:
    with Store(folder, dram_nbytes=dram_nbytes, chunk_nbytes=BLOCK) as store:
        store.register("m", model.path)
        yield store


@pytest.fixture
def store(tmp_path: Path, model: Checkpoint) -> Iterator[Store]:
    with a_store(tmp_path / "store", model) as made:
        yield made


@pytest.fixture
def whole(tmp_path: Path, model: Checkpoint) -> Iterator[HeldBlocks]:
    """The model's blocks in a store that has all of it."""
    with a_store(tmp_path / "whole", model) as store:
        store.prefetch("m")
        lease = store.lend("m", "dram")
        assert isinstance(lease, Lease)
        with lease:
            yield HeldBlocks(lease, BLOCK)


def push(image: Incoming, whole: HeldBlocks, block: int, *, flip: bool = False) -> None:
    with whole.reading(block) as theirs, image.writing(block) as ours:
        content = bytearray(b"".join(theirs))
        content[7] ^= flip
        at = 0
        for view in ours:
            view[:] = content[at : at + len(view)]
            at += len(view)


def assert_right(tensors: dict[str, torch.Tensor], model: Checkpoint) -> None:
    wanted = load_tensors(model.path)
    assert list(tensors) == list(wanted) and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def used(store: Store) -> int:
    gc.collect()
    return store.stats().places[0].used_nbytes


# --- blocks and rates ---


@pytest.mark.parametrize("nbytes", [BLOCK, 3 * MIB, 5 * MIB, 1 << 30])
def test_blocks_cover_the_image_in_whole_hash_chunks(model: Checkpoint, nbytes: int) -> None:
    blocks = cut_blocks(model.index, nbytes)
    assert sum(block.nbytes for block in blocks) == model.nbytes and all(0 < block.nbytes <= nbytes for block in blocks)
    assert [block.offset for block in blocks[1:]] == [block.offset + block.nbytes for block in blocks[:-1]]
    chunks = [chunk for block in blocks for chunk in block.chunks]
    assert "".join(chunk.digest for chunk in chunks) == "".join(partition.digests for partition in model.index.partitions)
    assert len(blocks) == 1 if nbytes == 1 << 30 else len(blocks) > 2


def test_a_block_that_cannot_be_checked_is_refused(model: Checkpoint) -> None:
    with pytest.raises(ValueError, match="give at least"):
        cut_blocks(model.index, MIB)


@given(st.lists(st.tuples(st.integers(1, 200_000), st.floats(0, 0.01)), min_size=1, max_size=40), st.floats(1e6, 1e9))
def test_a_bucket_never_lets_more_pass_than_its_rate_and_a_burst(takes: list[tuple[int, float]], rate: float) -> None:
    now = [0.0]
    bucket = TokenBucket(rate, 65_536, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    passed, idle = 0, 0.0
    for nbytes, pause in takes:
        bucket.take(nbytes)
        passed += nbytes
        assert now[0] >= (passed - 65_536) / rate - 1e-9
        assert now[0] <= passed / rate + idle + 1e-9
        now[0] += pause
        idle += pause


# --- an image that others fill ---


def test_a_layer_is_ready_when_its_blocks_have_landed_and_not_before(store: Store, whole: HeldBlocks, model: Checkpoint) -> None:
    with store.receive("m", BLOCK) as image, store.attach("m") as attached:
        last = attached.layers[-1]
        with pytest.raises(TimeoutError):
            attached.wait(0.01)
        for block in reversed(range(len(image.blocks))):
            assert not image.wait_block(block, 0)
            push(image, whole, block)
            assert image.wait_block(block) and attached.ready(attached.layers[0]) == (block == 0)
            if attached.ready(last):
                assert torch.equal(attached.tensors["model.layers.5.w"], load_tensors(model.path)["model.layers.5.w"])
        assert_right(attached.wait(10), model)
    assert store.stats().moved_nbytes == {"peers->dram": model.nbytes}
    del attached
    gc.collect()
    store.evict("m", "dram")
    assert used(store) == 0


def test_bytes_that_are_not_the_models_do_not_land(store: Store, whole: HeldBlocks, model: Checkpoint) -> None:
    with store.receive("m", BLOCK) as image:
        with pytest.raises(IntegrityError, match="ask another") as error:
            push(image, whole, 1, flip=True)
        assert error.value.offset is not None and image.missing() == list(range(len(image.blocks)))
        for block in range(len(image.blocks)):
            push(image, whole, block)
        with pytest.raises(StoreError, match="there or on its way"):
            push(image, whole, 0)
    assert_right(store.attach("m").wait(10), model)


def test_what_never_comes_is_read_from_the_models_source(store: Store, whole: HeldBlocks, model: Checkpoint) -> None:
    with store.receive("m", BLOCK) as image:
        for block in (0, 3):
            push(image, whole, block)
        pushed = sum(image.blocks[block].nbytes for block in (0, 3))
        image.fall_back([1])
        assert image.missing() == [block for block in range(len(image.blocks)) if block not in (0, 1, 3)]
        image.fall_back()
        image.wait(10)
    assert_right(store.attach("m").wait(10), model)
    assert store.stats().moved_nbytes == {"peers->dram": pushed, "disk->dram": model.nbytes - pushed}


def test_memory_is_given_back_only_when_nobody_writes_into_it(store: Store, whole: HeldBlocks) -> None:
    image = store.receive("m", BLOCK)
    attached = store.attach("m")
    with pytest.raises(IntegrityError), image.writing(0):  # and nothing was written
        image.cancel()
        assert not image.done and used(store) > 0
        with pytest.raises(LoadCancelled):
            push(image, whole, 1)
    with pytest.raises(LoadCancelled):
        attached.wait(10)
    image.close()
    assert used(store) == 0
    with store.receive("m", BLOCK) as again:
        again.fall_back()
    assert used(store) > 0


def test_a_store_that_closes_ends_what_is_being_received(tmp_path: Path, model: Checkpoint) -> None:
    with a_store(tmp_path / "s", model) as store:
        image = store.receive("m", BLOCK)
    with pytest.raises(LoadCancelled):
        image.wait_block(0, 10)


def test_a_store_refuses_to_receive_what_it_has_or_has_no_room_for(tmp_path: Path, store: Store, model: Checkpoint) -> None:
    with store.receive("m", BLOCK), pytest.raises(StoreError, match="on its way"):
        store.receive("m", BLOCK)
    store.prefetch("m")
    with pytest.raises(StoreError, match="attach it instead"):
        store.receive("m", BLOCK)
    with a_store(tmp_path / "small", model, dram_nbytes=4 * MIB) as small, pytest.raises(NoRoomError):
        small.receive("m", BLOCK)


# --- plans between nodes ---


class Lying(HeldBlocks):
    """Sends a block with one bit flipped, so many times."""

    def __init__(self, honest: HeldBlocks, block: int, times: int) -> None:
        self.blocks, self._honest, self._block, self._times = honest.blocks, honest, block, times

    @contextmanager
    def reading(self, block: int) -> Iterator[list[memoryview]]:
        with self._honest.reading(block) as views:
            content = bytearray(b"".join(views))
        if block == self._block and self._times:
            self._times -= 1
            content[5] ^= 1
        yield [memoryview(content)]


def carry_out(
    plan: Plan, folder: Path, model: Checkpoint, source: HeldBlocks, *, patience: float = 20.0, before: Callable[[int, Store], None] | None = None, over_tcp: bool = False
) -> list[FetchReport]:
    """A plan between peers of this process, each with a store of its own; every receiver is whole in the end."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        peers = [BlockPeer("tcp://127.0.0.1:0" if over_tcp else str(folder / f"p{node}"), patience_seconds=patience) for node in range(plan.nodes)]
        for peer in peers:
            stack.callback(peer.close)
        parts = parts_of(plan, "a plan", [peer.address for peer in peers], BLOCK)

        def node(number: int) -> FetchReport:
            if number < plan.sources:
                return peers[number].run(parts[number], source)
            with a_store(folder / f"s{number}", model) as store:
                if before is not None:
                    before(number, store)
                with store.receive("m", BLOCK) as image:
                    report = peers[number].run(parts[number], image)
                assert_right(store.attach("m").wait(10), model)
                return report

        with ThreadPoolExecutor(plan.nodes) as pool:
            return list(pool.map(node, range(plan.nodes)))


@pytest.mark.parametrize("make", [binomial_pipeline, serial_chain, binary_tree, store_reads, lambda n, b: k_way_pipeline(n, b, 2), lambda n, b: store_reads(n, b, 3)])
def test_every_plan_brings_every_node_every_block_as_planned(make: Callable[[int, int], Plan], tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    blocks = len(whole.blocks)
    plan = make(5, blocks)
    reports = carry_out(plan, tmp_path, model, whole)
    assert [report.planned for report in reports] == [0] * plan.sources + [blocks] * (5 - plan.sources)
    sent = [sum(transfer.source == node for transfer in plan.transfers) for node in range(5)]
    assert [report.sent for report in reports] == sent and not any(report.begged or report.fell_back or report.corrupt for report in reports)


def test_a_plan_is_carried_out_over_tcp_by_address_alone(tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    set_key(bytes(range(32)))
    try:
        reports = carry_out(binomial_pipeline(4, len(whole.blocks)), tmp_path, model, whole, over_tcp=True)
    finally:
        set_key(None)
    assert [report.planned for report in reports] == [0] + [len(whole.blocks)] * 3


def test_a_store_that_sends_several_at_once_sends_each_receiver_its_blocks_in_order() -> None:
    board, steps = Board(), [Step(1, 0), Step(1, 1), Step(2, 0)]
    assert board.next(steps) == Step(1, 0) and board.next(steps) == Step(2, 0)
    board.busy.discard(1)
    assert board.next(steps) == Step(1, 1) and board.next(steps) is None


def test_a_corrupt_block_is_asked_for_once_more_and_then_from_whoever_has_it(tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    once = carry_out(store_reads(2, len(whole.blocks)), tmp_path / "once", model, Lying(whole, 2, 1))[1]
    assert (once.corrupt, once.begged, once.fell_back) == (1, 1, 0)
    always = carry_out(store_reads(2, len(whole.blocks)), tmp_path / "always", model, Lying(whole, 2, 9))[1]
    assert (always.corrupt, always.begged, always.fell_back) == (2, 0, 1)


def test_a_plan_that_forgets_blocks_is_made_good(tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    plan = Plan("forgetful", 2, len(whole.blocks), (Transfer(1, 0, 1, 1),))
    report = carry_out(plan, tmp_path, model, whole)[1]
    assert report.planned == 1 and report.begged + report.fell_back == len(whole.blocks) - 1


def test_what_a_node_has_kept_is_not_sent_again(tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    def keep_a_prefix(number: int, store: Store) -> None:
        store.prefetch("m")
        with store._holdings.locked():
            store._holdings.places["dram"].shrink("m", model.nbytes // 2)

    kept = carry_out(binomial_pipeline(3, len(whole.blocks)), tmp_path, model, whole, before=keep_a_prefix)
    for report in kept[1:]:
        assert 0 < report.planned < len(whole.blocks) and not report.begged and not report.fell_back


def test_a_receiver_that_never_comes_does_not_hold_up_the_others(tmp_path: Path, model: Checkpoint, whole: HeldBlocks) -> None:
    """Node 2 of three is not there; nodes 0 and 1 wait for it once, and node 1 gets by itself what 2 should have sent."""
    plan = binomial_pipeline(3, len(whole.blocks))
    source, target = (BlockPeer(str(tmp_path / name), patience_seconds=0.3) for name in "ab")
    parts = parts_of(plan, "p", [source.address, target.address, str(tmp_path / "nobody")], BLOCK)
    with a_store(tmp_path / "s", model) as store, store.receive("m", BLOCK) as image, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(source.run, parts[0], whole)
        report = target.run(parts[1], image)
        sending.result()
    target.close()
    source.close()
    assert report.planned + report.begged + report.fell_back == len(whole.blocks)


def test_a_plan_for_other_blocks_is_refused(tmp_path: Path, whole: HeldBlocks) -> None:
    peer = BlockPeer(str(tmp_path / "p"))
    part = parts_of(store_reads(2, len(whole.blocks) + 1), "p", [peer.address, "nowhere"], BLOCK)[0]
    with pytest.raises(StoreError, match="make the plan for this model's blocks"):
        peer.run(part, whole)
    peer.close()
    with pytest.raises(ValueError, match="3 nodes and 1 addresses"):
        parts_of(store_reads(3, 1), "p", ["x"], BLOCK)


def test_a_run_whose_source_is_gone_too_ends_with_its_error_and_no_memory(tmp_path: Path, model: Checkpoint) -> None:
    copy = tmp_path / "copy.sllm"
    copy.mkdir()
    for file in model.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    peer = BlockPeer(str(tmp_path / "p"), patience_seconds=0.2)
    before = threading.active_count()
    with Store(tmp_path / "s", dram_nbytes=32 * MIB, chunk_nbytes=BLOCK) as store:
        store.register("m", copy)
        for file in copy.iterdir():
            file.unlink()
        part = parts_of(store_reads(2, len(cut_blocks(model.index, BLOCK))), "p", [str(tmp_path / "nobody"), peer.address], BLOCK)[1]
        with store.receive("m", BLOCK) as image, pytest.raises(Exception, match=r"index\.json|replaced|no such"):
            peer.run(part, image)
        eventually(lambda: used(store) == 0)
    peer.close()
    assert threading.active_count() <= before


# --- processes that die ---


@pytest.mark.parametrize(("make", "victim"), [(binomial_pipeline, 0), (binomial_pipeline, 1), (serial_chain, 2), (serial_chain, 4)], ids=["source", "sender", "middle", "last"])
def test_survivors_are_whole_when_a_process_is_killed(make: Callable[[int, int], Plan], victim: int, tmp_path: Path, model: Checkpoint) -> None:
    blocks = len(cut_blocks(model.index, BLOCK))
    plan = make(5, blocks)
    with Fleet(plan.nodes, tmp_path, bytes_per_second=20e6, dram_nbytes=32 * MIB, patience_seconds=2.0) as fleet:
        fleet.prepare("m", model.path, plan.nodes, 1)
        for node, part in enumerate(parts_of(plan, "p", fleet.addresses, BLOCK)):
            fleet.give(node, Spread("m", part))
        time.sleep(0.25)  # two to three of eight blocks have gone out
        fleet.processes[victim].kill()
        answers: dict[int, Answer] = {node: fleet.answer(node) for node in range(plan.nodes) if node != victim}
        done = {node: answer for node, answer in answers.items() if isinstance(answer, Spreaded)}
        assert len(done) == plan.nodes - 1, answers
        assert all(found.planned + found.begged + found.fell_back == blocks for node, found in done.items() if node)  # each checked by its hash
        assert not any(found.corrupt for found in done.values())
        helped = sum(found.begged + found.fell_back for found in done.values())
        assert helped > 0 if victim != 4 else helped == 0


# --- the bench ---


def test_bench_multicast_measures_every_plan(run: Run) -> None:
    ended = run("bench", "multicast", "--rounds", 1, "--nodes", "2,4", "--blocks", 4, "--rate", "60MB/s", "--json")
    assert ended.code == 0, ended.err
    rows = {(row["plan"], row["nodes"]): row for row in ended.document["results"]}
    assert set(rows) == {(plan, nodes) for plan in ("binomial", "chain", "tree", "store", "2-way") for nodes in (2, 4)} - {("2-way", 2)}
    assert all(row["strayed_blocks"] == 0 and row["block_seconds_median"] > 0 for row in rows.values())
    assert rows["binomial", 4]["ticks"] == rows["binomial", 4]["bound_block_times"] == 5 and rows["store", 4]["ticks"] == 12
    said = live_text(ended.document, 4)
    assert plot_live(ended.document, 4).get_yticklabels()[0].get_text() == "everyone reads the store" and "by ticks x0.42" in said and "TCP" in said
    with pytest.raises(ValueError, match=r"give one of \[2, 4\]"):
        live_text(ended.document, 3)
    assert rows["binomial", 4]["ratio_to_reference_median"] < 1 == rows["store", 4]["ratio_to_reference_median"]


def test_nodes_in_namespaces_reach_each_other_at_the_rate_of_their_links_and_leave_nothing(tmp_path: Path, model: Checkpoint) -> None:
    if (reason := why_no_namespaces()) is not None:
        pytest.skip(f"needs network namespaces: {reason}")
    blocks = len(cut_blocks(model.index, BLOCK))
    rate = 20e6
    processes = set(children_of(os.getpid()))
    with Links(["0", "1", "2"], rate) as links, Fleet(3, tmp_path, bytes_per_second=None, dram_nbytes=32 * MIB, links=links) as fleet:
        assert [tcp.split_address(address)[0] for address in fleet.addresses] == [links.host(name) for name in "012"]
        with pytest.raises(WireError, match="no server answers there"):  # it listens there, and not here
            connect(tcp.join_address("127.0.0.1", tcp.split_address(fleet.addresses[0])[1]), key=bytes(32), timeout=20)
        fleet.prepare("m", model.path, 3, 1)
        for node, part in enumerate(parts_of(serial_chain(3, blocks), "p", fleet.addresses, BLOCK)):
            fleet.give(node, Spread("m", part))
        for found in [fleet.answer(node) for node in range(3)][1:]:
            assert isinstance(found, Spreaded) and found.planned == blocks
            assert found.whole_seconds > 0.9 * model.nbytes / rate, "a link was faster than it may be"
    assert set(children_of(os.getpid())) == processes
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="are no network"):
            Links(names, rate)


def test_a_machine_without_namespaces_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "_ALONE", (["false"], ["false"]))
    netns._found.cache_clear()
    try:
        assert why_no_namespaces() == "as this user, exit status 1; in a namespace of users, exit status 1"
        with pytest.raises(UnsupportedError, match="use token buckets instead"):
            Links(["a"], 1e6)
        monkeypatch.setattr(netns, "_TOOLS", ("no-such-tool",))
        netns._found.cache_clear()
        assert "no-such-tool" in str(why_no_namespaces())
    finally:
        netns._found.cache_clear()


@pytest.mark.parametrize(("option", "value"), [("--nodes", "1"), ("--nodes", "two"), ("--rate", "fast"), ("--rate", "10kB/s")])
def test_bench_multicast_refuses_what_measures_nothing(option: str, value: str, run: Run) -> None:
    ended = run("bench", "multicast", option, value, "--json")
    assert (ended.code == 2 and "give" in ended.err) or "write for example" in ended.err
