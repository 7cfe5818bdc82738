"""A store whose clients, disk, remote or own process fail: one clear error within seconds, the kernel's figures equal to the
store's, nothing corrupt in the cache, and the next request works."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_process import PATIENT, StoreProcess, eventually
from test_03_store import (
    CHUNK,
    HASTY,
    MIB,
    PARTITIONS,
    GatedServer,
    assert_right,
    drop_lease,
    gated,
    held_nbytes,
    leases,
    open_gate,
    place_of,
    residence,
    write_model,
)

from sllm_mini.checkpoint import open_checkpoint, verify_checkpoint
from sllm_mini.errors import IntegrityError, LoadCancelled, RemoteError, SllmError, StoreError, WireError
from sllm_mini.storage import filling, messages
from sllm_mini.storage import server as server_module
from sllm_mini.storage.client import StoreClient
from sllm_mini.storage.server import StoreServer
from sllm_mini.storage.source import RemoteOptions
from sllm_mini.storage.store import Store
from sllm_mini.types import Tier
from sllm_mini.wire import Channel, WireTimeout, connect

_CLIENT = """
import sys
from sllm_mini.storage import StoreClient
model = StoreClient(sys.argv[1]).attach(sys.argv[2])
print(model.done, flush=True)
model.wait()
print(model.done, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        write_model(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def size(models: Path) -> int:
    return open_checkpoint(models / "a").nbytes


@pytest.fixture
def remote(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedServer]:
    """Serves a copy of the models, which a test may change."""
    monkeypatch.setenv("NO_PROXY", "*")
    shutil.copytree(models, tmp_path / "served")
    with GatedServer(tmp_path / "served") as found:
        yield found


@contextmanager
def embedded(tmp_path: Path, remote: RemoteOptions = PATIENT, *, disk_nbytes: int = 0) -> Iterator[Store]:
    """A store here, whose end must leave no thread and no memory."""
    with Store(tmp_path / "store", dram_nbytes=64 * MIB, disk_nbytes=disk_nbytes, chunk_nbytes=CHUNK, remote=remote) as store:
        yield store
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("sllm-") and thread.name != "sllm-attach"] == []
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "sllm-chunk" not in maps.read()


def client_process(store: StoreProcess, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _CLIENT, os.fspath(store.address), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def assert_figures_agree(store: StoreProcess, used_nbytes: int) -> None:
    """The store's account, its own count of the kernel's pages, and what its process has open."""
    dram = place_of(store.client, "dram")
    assert dram.used_nbytes == used_nbytes and dram.kernel_nbytes == store.shared_nbytes()
    assert used_nbytes <= store.shared_nbytes() <= dram.budget_nbytes


# Processes that are killed


def test_a_client_killed_in_the_middle_of_a_load_costs_nothing(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    with StoreProcess(tmp_path / "s", dram_nbytes=64 * MIB, chunk_nbytes=CHUNK) as store:
        store.client.register("a", f"{remote.url}/a")
        before, threads = len(store.descriptors()), store.threads()
        with gated(remote, *PARTITIONS):
            clients = [client_process(store, "a") for _ in range(2)]
            assert [says(client) for client in clients] == ["False", "False"]
            assert leases(store.client, "a") == 2
            clients[0].kill()
            clients[0].communicate()
            eventually(lambda: leases(store.client, "a") == 1)  # while the load still goes on
            assert residence(store.client, "a") is not None
        assert says(clients[1]) == "True"
        clients[1].kill()
        clients[1].communicate()
        drop_lease(store.client, "a")
        assert_right(store.client.attach("a").wait(), models / "a")
        assert store.client.stats().moved_nbytes == {"remote->dram": size}
        drop_lease(store.client, "a")
        assert_figures_agree(store, -(-size // CHUNK) * CHUNK)
        assert store.client.evict("a", "dram") == -(-size // CHUNK) * CHUNK
        assert_figures_agree(store, 0)
        eventually(lambda: (len(store.descriptors()), store.threads()) <= (before, threads))


def test_a_killed_store_leaves_readable_tensors_and_a_place_to_start_again(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    with StoreProcess(tmp_path / "s", dram_nbytes=64 * MIB, disk_nbytes=64 * MIB, chunk_nbytes=CHUNK) as store:
        store.client.register("b", models / "b")
        store.client.register("a", f"{remote.url}/a")
        whole = store.client.attach("b")
        whole.wait()
        events = store.client.events()
        with gated(remote, PARTITIONS[-1]), ThreadPoolExecutor(2) as pool:
            loading = store.client.attach("a")
            assert loading.wait_for(loading.layers[1], 20)
            assert not loading.done
            prefetching = pool.submit(store.client.prefetch, "a")
            eventually(lambda: leases(store.client, "a") == 2)
            store.kill()
            for waiting in (lambda: loading.wait(10), lambda: prefetching.result(10), lambda: [*events]):
                with pytest.raises(StoreError, match="was stopped or died"):
                    waiting()
            with pytest.raises(StoreError, match="was stopped or died"):
                _ = loading.ready(loading.layers[1])
        with pytest.raises(StoreError, match="no store answers"):
            store.client.models()
        assert_right(whole.wait(), models / "b")
        whole.tensors["model.layers.0.w"].zero_()  # still this process's own
        assert store.address.is_socket()
    read_before = remote.weight_nbytes()
    with StoreProcess(tmp_path / "s", dram_nbytes=64 * MIB, disk_nbytes=64 * MIB, chunk_nbytes=CHUNK) as again:
        assert not list((tmp_path / "s" / "remote").glob(".opened-*"))
        assert again.client.models() == []
        again.client.register("a", f"{remote.url}/a")
        assert_right(again.client.attach("a").wait(), models / "a")
        assert remote.weight_nbytes() - read_before < size  # what the killed one had kept is not read again
        moved = again.client.stats().moved_nbytes
        assert set(moved) == {"remote->dram", "disk->dram"} and sum(moved.values()) == size
        drop_lease(again.client, "a")
        (cached,) = (path for path in (tmp_path / "s" / "models").iterdir() if not path.name.startswith("."))
        verify_checkpoint(cached)


def test_a_server_killed_in_a_range_fails_the_load_and_the_next_goes_on(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    with embedded(tmp_path, HASTY, disk_nbytes=64 * MIB) as store:
        store.register("a", f"{remote.url}/a")
        remote.cut_after = [1 << 30, 1 << 20, 1 << 19]  # two of the answers end in the middle
        with gated(remote, PARTITIONS[-1]):
            model, second = store.attach("a"), store.attach("a")
            assert model.wait_for(model.layers[1], 20)
            open_gate(remote)
            remote.gates = {}
            killing = threading.Thread(target=remote.stop)
            remote.before = [killing.start]
            started = time.monotonic()
            failures = []
            for waiting in (model, second):
                try:
                    waiting.wait(20)
                except RemoteError as error:
                    failures.append(str(error))
            killing.join() if killing.ident else remote.stop()
        if failures:  # it may have been read before the kill
            assert len(failures) == 2 and "nothing came for 1 seconds" in failures[0] and time.monotonic() - started < 15
            assert place_of(store, "dram").used_nbytes == 0
            with pytest.raises(StoreError, match="was closed"):
                _ = model.tensors
            with pytest.raises(RemoteError):
                store.attach("a")
        model.close()
        second.close()
        del model, second, waiting
        remote.start()
        before = remote.weight_nbytes()
        assert_right(store.attach("a").wait(), models / "a")
        assert remote.weight_nbytes() - before < size
        drop_lease(store, "a")


# Disks


def test_a_full_disk_costs_the_cache_and_not_the_load(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    """No file may be larger than 4 MiB: the system refuses to reserve the cache's."""
    with StoreProcess(tmp_path / "s", dram_nbytes=64 * MIB, disk_nbytes=64 * MIB, chunk_nbytes=CHUNK, limits={"fsize": 4 * MIB}) as store:
        store.client.register("a", f"{remote.url}/a")
        with pytest.raises(StoreError, match="a was not brought to the disk: the disk cache cannot be filled: File too large"):
            store.client.prefetch("a", "disk")
        for _ in range(2):
            assert_right(store.client.attach("a").wait(), models / "a")
            drop_lease(store.client, "a")
            store.client.evict("a", "dram")
        assert place_of(store.client, "disk").used_nbytes == 0 and list((tmp_path / "s" / "models").iterdir()) == []


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, models: Path, size: int, remote: GatedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = os.pwrite, [0]

    def full(fd: int, data: bytes, offset: int) -> int:
        writes[0] += 1
        if writes[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    with embedded(tmp_path, disk_nbytes=64 * MIB) as store:
        store.register("a", f"{remote.url}/a")
        with monkeypatch.context() as patch:
            patch.setattr(filling.os, "pwrite", full)
            with pytest.raises(StoreError, match="a was not brought to the disk: the disk cache could not be filled: No space left on device"):
                store.prefetch("a", "disk")
            assert place_of(store, "disk").used_nbytes == 0
            writes[0] = 0
            assert_right(store.attach("a").wait(), models / "a")
            drop_lease(store, "a")
            store.evict("a", "dram")
        store.prefetch("a", "disk")
        before = remote.weight_nbytes()
        assert_right(store.attach("a").wait(), models / "a")
        assert remote.weight_nbytes() == before
        drop_lease(store, "a")


def test_a_damaged_copy_on_the_disk_is_thrown_away(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    with embedded(tmp_path, disk_nbytes=64 * MIB) as store:
        store.register("a", f"{remote.url}/a")
        store.prefetch("a", "disk")
        (file,) = (tmp_path / "store" / "models").glob(f"*/{PARTITIONS[2]}")
        flip(file, 1000)
        before = remote.weight_nbytes()
        with pytest.raises(IntegrityError, match="not the one that was written"):
            store.prefetch("a")
        assert place_of(store, "dram").used_nbytes == 0 == place_of(store, "disk").used_nbytes
        assert_right(store.attach("a").wait(), models / "a")
        assert remote.weight_nbytes() - before == size
        drop_lease(store, "a")


def flip(file: Path, offset: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))
        opened.flush()
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("over_socket", [False, True])
def test_a_damaged_checkpoint_fails_everyone_who_waits(tmp_path: Path, models: Path, over_socket: bool) -> None:
    path = tmp_path / "model"
    shutil.copytree(models / "a", path)
    flip(path / PARTITIONS[1], 5000)
    with embedded(tmp_path) as store, StoreServer(store, tmp_path / "socket"):
        asked = StoreClient(tmp_path / "socket") if over_socket else store
        asked.register("a", path)

        def attach(_: int) -> str:
            try:
                model = asked.attach("a")
                views = dict(model.tensors)  # the error's traceback keeps this frame, and the store's transfer the error
                model.wait(20)
            except IntegrityError as error:
                return str(error)
            return str(views)

        with ThreadPoolExecutor(6) as pool:
            errors = list(pool.map(attach, range(6)))
        assert all(PARTITIONS[1] in error and "\n" not in error for error in errors), errors
        assert place_of(store, "dram").used_nbytes == 0 and residence(store, "a") is None
        flip(path / PARTITIONS[1], 5000)
        assert_right(asked.attach("a").wait(), path)
        gc.collect()
        eventually(lambda: leases(store, "a") == 0)
        store.evict("a", "dram")
        assert place_of(store, "dram").used_nbytes == 0


# Remote models that change


def test_a_remote_model_that_changes_under_the_reader(tmp_path: Path, models: Path, remote: GatedServer) -> None:
    with embedded(tmp_path, disk_nbytes=64 * MIB) as store:
        store.register("a", f"{remote.url}/a")
        with gated(remote, *PARTITIONS[2:]):
            model = store.attach("a")
            assert model.wait_for(model.layers[1], 20)
            write_model(remote.folder / "new", seed=7)
            (remote.folder / "a").rename(remote.folder / "old")  # at once: a reader that asks again must not find nothing
            (remote.folder / "new").rename(remote.folder / "a")
        with pytest.raises(RemoteError, match="changed since it was opened; open it again"):
            model.wait(20)
        del model
        gc.collect()
        assert place_of(store, "dram").used_nbytes == 0 == place_of(store, "disk").used_nbytes
        with pytest.raises(StoreError, match="a changed at its source since it was registered; register it again"):
            store.attach("a")
        store.register("a", f"{remote.url}/a")
        assert_right(store.attach("a").wait(), remote.folder / "a")
        drop_lease(store, "a")
        for path in (tmp_path / "store" / "models").iterdir():
            verify_checkpoint(path)
        assert len(list((tmp_path / "store" / "remote").iterdir())) == 1  # the companions of the version that counts


# Room


def test_two_clients_that_want_the_last_bytes(tmp_path: Path, models: Path, size: int) -> None:
    nbytes = -(-size // CHUNK) * CHUNK
    with StoreProcess(tmp_path / "s", dram_nbytes=nbytes, chunk_nbytes=CHUNK) as store, ThreadPoolExecutor(2) as pool:
        for name in "ab":
            store.client.register(name, models / name)
        for _ in range(4):
            together = threading.Barrier(2)

            def attach(name: str, together: threading.Barrier = together) -> tuple[str, Tier]:
                together.wait(10)
                model = store.client.attach(name)
                assert_right(model.wait(), models / name)
                together.wait(20)
                return name, model.tier

            found = dict(pool.map(attach, "ab"))
            assert sorted(tier.name for tier in found.values()) == ["DISK", "DRAM"]
            assert_figures_agree(store, nbytes)
            for name in "ab":
                drop_lease(store.client, name)
            assert held_nbytes(store.client, next(name for name in "ab" if found[name] is Tier.DRAM)) == size


# Clients that misbehave


def raw(address: str | os.PathLike[str]) -> socket.socket:
    sock = connect(address, timeout=5)
    sock.setblocking(True)
    sock.settimeout(10)
    return sock


def ends(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # with some of ours unread
        return True


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"SLM\x01" + b"\xff" * 40, b"\0" * 4096, b"SLM\x01" + b"\0" * 4 + b"\x08\0\0\0" + b"\0" * 8 + b"\x81\xa1x\xa1y....", b""])
def test_garbage_ends_its_connection_and_no_other(tmp_path: Path, models: Path, garbage: bytes) -> None:
    with embedded(tmp_path) as store, StoreServer(store, tmp_path / "socket"):
        client = StoreClient(tmp_path / "socket")
        client.register("a", models / "a")
        model = client.attach("a")
        model.wait()
        for close in (True, False):
            with raw(tmp_path / "socket") as sock:
                sock.sendall(garbage)
                if close:
                    sock.shutdown(socket.SHUT_WR)
                if close or len(garbage) > 20:
                    assert ends(sock)
        assert leases(client, "a") == 1
        assert_right(client.attach("a").wait(), models / "a")
        model.close()
        del model
        drop_lease(client, "a")


def test_a_connection_that_speaks_while_it_is_a_lease_loses_it(tmp_path: Path, models: Path, remote: GatedServer) -> None:
    with embedded(tmp_path) as store, StoreServer(store, tmp_path / "socket"):
        store.register("a", f"{remote.url}/a")
        for files in (PARTITIONS, ()):
            with gated(remote, *files), answers(tmp_path / "socket") as channel:
                channel.send(messages.Attach("a", "cpu"))
                with channel.receive(10, into=lambda _, nbytes: bytearray(nbytes)) as first:
                    assert isinstance(first.message, messages.Image)
                assert leases(store, "a") == 1
                channel.send(messages.List())
                while not isinstance(answer := answer_of(channel), messages.Failed):
                    assert isinstance(answer, messages.Ready | messages.Descriptors)
                assert "takes no other request" in answer.message
                eventually(lambda: leases(store, "a") == 0)
                channel.send(messages.List())
                assert isinstance(answer_of(channel), messages.Models)
            store.prefetch("a")


def answers(address: Path) -> Channel[messages.Answer]:
    return Channel(connect(address), messages.Answer, name="store")


def answer_of(channel: Channel[messages.Answer]) -> messages.Answer:
    with channel.receive(10) as received:
        return received.message


def test_a_client_that_stops_reading_is_given_up(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0.3)
    with embedded(tmp_path) as store, StoreServer(store, tmp_path / "socket"):
        client = StoreClient(tmp_path / "socket")
        for number in range(200):
            store.register(f"model-{number}", models / "a")
        before = threading.active_count()
        with answers(tmp_path / "socket") as silent:
            with pytest.raises(WireError):  # until the server has closed it
                for _ in range(100_000):
                    silent.send(messages.List(), timeout=5)
            assert len(client.models()) == 200
        eventually(lambda: threading.active_count() <= before)


def test_closing_a_server_does_not_wait_for_its_clients_loads(tmp_path: Path, remote: GatedServer) -> None:
    with embedded(tmp_path, disk_nbytes=64 * MIB) as store:
        for name in "ab":
            store.register(name, f"{remote.url}/{name}")
        server = StoreServer(store, tmp_path / "socket").__enter__()
        client = StoreClient(tmp_path / "socket")
        with gated(remote, *PARTITIONS), ThreadPoolExecutor(3) as pool, raw(tmp_path / "socket") as half:
            half.sendall(b"SLM\x01")
            model = client.attach("a")
            others = [pool.submit(client.prefetch, "a"), pool.submit(client.prefetch, "b", "disk")]
            eventually(lambda: leases(store, "a") == 2)
            time.sleep(0.2)
            server.close()
            for waiting in (lambda: model.wait(5), *(lambda other=other: other.result(5) for other in others)):
                with pytest.raises(StoreError, match="was stopped or died"):
                    waiting()
            assert not (tmp_path / "socket").exists()
            del waiting
            model.close()


def test_without_descriptors_a_store_waits_for_some(tmp_path: Path, models: Path) -> None:
    with StoreProcess(tmp_path / "s", dram_nbytes=32 * MIB, chunk_nbytes=CHUNK, limits={"nofile": 48}) as store:
        store.client.register("a", models / "a")
        idle = len(store.descriptors())
        many = [raw(store.address) for _ in range(60)]
        eventually(lambda: len(store.descriptors()) >= 46)
        for sock in many:
            sock.close()
        assert_right(store.client.attach("a").wait(), models / "a")
        drop_lease(store.client, "a")
        eventually(lambda: len(store.descriptors()) <= idle + 8)
        before = [raw(store.address) for _ in range(48 - idle - 8 - 4)]  # too few are left to lend eight chunks
        eventually(lambda: len(store.descriptors()) >= 42)
        with pytest.raises(StoreError, match=r"no descriptors are left|was stopped or died|ended the conversation"):
            store.client.attach("a").wait()
        for sock in before:
            sock.close()
        assert_right(store.client.attach("a").wait(), models / "a")
        drop_lease(store.client, "a")


def test_without_threads_a_load_is_refused(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded(tmp_path) as store:
        store.register("a", models / "a")
        real: Callable[[threading.Thread], None] = threading.Thread.start
        for refused in ("sllm-store-load", "sllm-read-1", "sllm-load"):

            def start(thread: threading.Thread, refused: str = refused) -> None:
                if thread.name == refused:
                    raise RuntimeError("can't start new thread")
                real(thread)

            with monkeypatch.context() as patch, pytest.raises(SllmError, match="no thread can be started"):
                patch.setattr(threading.Thread, "start", start)
                store.attach("a")
            assert place_of(store, "dram").used_nbytes == 0 and residence(store, "a") is None
        assert_right(store.attach("a").wait(), models / "a")
        drop_lease(store, "a")


# Sockets


def test_only_a_stale_socket_is_replaced(tmp_path: Path, models: Path) -> None:
    place = tmp_path / "socket"
    place.write_text("precious")
    with embedded(tmp_path) as store:
        with pytest.raises(WireError, match="is no socket"):
            StoreServer(store, place)
        assert place.read_text() == "precious"
        place.unlink()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(os.fspath(place))
        with pytest.raises(StoreError, match="no store answers"):
            StoreClient(place).models()
        with StoreServer(store, place) as server:
            assert oct(os.stat(place).st_mode)[-3:] == "600"
            assert StoreClient(server.address).models() == []
        assert not place.exists()


def test_a_load_cancelled_by_closing_leaves_a_cache_to_go_on_with(tmp_path: Path, models: Path, size: int, remote: GatedServer) -> None:
    with gated(remote, PARTITIONS[-1]), embedded(tmp_path, disk_nbytes=64 * MIB) as store, ThreadPoolExecutor(1) as pool:
        store.register("a", f"{remote.url}/a")
        events: list[messages.Happened] = []
        store.listen(events.append)
        model = store.attach("a")
        assert model.wait_for(model.layers[1], 20)
        closing = pool.submit(store.close)
        time.sleep(0.1)
        open_gate(remote)
        closing.result(20)
        with pytest.raises(LoadCancelled):
            model.wait(10)
        assert [(event.what, event.name, event.reason) for event in events] == [("cancelled", "a", "")]
        del model
        gc.collect()
    before = remote.weight_nbytes()
    with embedded(tmp_path, disk_nbytes=64 * MIB) as store:
        store.register("a", f"{remote.url}/a")
        assert_right(store.attach("a").wait(), models / "a")
        assert remote.weight_nbytes() - before < size
        drop_lease(store, "a")


def test_timeouts_of_an_idle_channel_do_not_end_it(tmp_path: Path) -> None:
    with embedded(tmp_path) as store, StoreServer(store, tmp_path / "socket"), answers(tmp_path / "socket") as channel:
        with pytest.raises(WireTimeout):
            channel.receive(0.05)
        channel.send(messages.Stats())
        assert isinstance(answer_of(channel), messages.Figures)
