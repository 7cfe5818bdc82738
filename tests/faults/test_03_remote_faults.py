"""Remote servers, disks and readers that fail: one clear error within the deadline or none at all, nothing corrupt in
the cache, nothing secret in a message, and the next request works."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import range_server
from range_server import RangeServer
from test_03_remote import QUICK, occupied_nbytes, partitions, read_all, write_model

from sllm_mini.checkpoint import open_checkpoint, verify_checkpoint
from sllm_mini.errors import FormatError, IntegrityError, LoadCancelled, RemoteError, SllmError, UnsupportedError
from sllm_mini.loading.load import start_load
from sllm_mini.storage import filling, source
from sllm_mini.storage.disk import DiskCache
from sllm_mini.storage.remote import RemoteCheckpoint, RemoteOptions, open_remote
from sllm_mini.storage.source import fetch, redacted, shown
from sllm_mini.storage.source_http import HttpSource

from .tools import reseal, start_child, wait_for

MIB = 1 << 20
HASTY = RemoteOptions(timeout_seconds=1, deadline_seconds=0.4, backoff_seconds=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny.sllm").path


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    with RangeServer(model.parent) as found:
        yield found


@pytest.fixture
def remote(server: RangeServer, model: Path, tmp_path: Path) -> Iterator[RemoteCheckpoint]:
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 64 * MIB)


@contextmanager
def told(kind: type[SllmError], place: str | Path, *says: str) -> Iterator[list[Any]]:
    """The block must raise `kind`, in one line that names `place` and says each of `says`; the list gets the error."""
    errors: list[Any] = []
    with pytest.raises(kind) as found:
        yield errors
    errors.append(found.value)
    text = str(found.value)
    assert "\n" not in text and text.startswith(str(place)) and all(part in text for part in says), text


def cut() -> None:
    """As something for the server to do before it answers: it ends the connection instead."""
    raise ConnectionAbortedError


def no_threads_of_ours(remote: RemoteCheckpoint) -> bool:
    return remote.remote.readers == 0 and not [thread for thread in threading.enumerate() if thread.name.startswith("sllm-")]


def data_requests(server: RangeServer) -> list[range_server.Asked]:
    return [asked for asked in server.asked if asked.file.endswith(".bin") and asked.end - asked.start > 1]


# --- the network


def test_a_dropped_connection_goes_on_at_the_missing_byte(server: RangeServer, remote: RemoteCheckpoint, model: Path) -> None:
    server.cut_after = [3 * MIB + 5, 10, 0]
    assert read_all(remote, threads=1) == partitions(model)
    assert [(asked.start, asked.sent) for asked in data_requests(server)[:3]] == [(0, 3 * MIB + 5), (3 * MIB + 5, 10), (3 * MIB + 15, 0)]
    assert sum(asked.sent for asked in data_requests(server)) == remote.nbytes == remote.traffic.remote_nbytes, "a byte was sent twice"
    assert remote.traffic.interruptions == 3


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: RangeServer, remote: RemoteCheckpoint, model: Path, status: int) -> None:
    server.statuses = [status, status]
    assert read_all(remote) == partitions(model)
    assert remote.traffic.interruptions == 2


def test_a_server_that_is_killed_and_comes_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/{model.name}"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, range_server.__file__, str(model.parent), str(port)])

    patient = RemoteOptions(timeout_seconds=5, deadline_seconds=30, backoff_seconds=0.02)
    child = start()
    try:
        with open_remote(url, tmp_path / "small", options=patient) as remote:
            handle = start_load(remote)
            child.kill()
            child.wait()
            child = start()
            handle.wait(60)
            assert remote.traffic.remote_nbytes == remote.nbytes and no_threads_of_ours(remote)
        child.kill()  # and now for good
        child.wait()
        began = time.monotonic()
        with told(RemoteError, f"http://127.0.0.1:{port} refuses the connection; is a server running there?") as found:
            open_remote(url, tmp_path / "none", options=patient)
        assert time.monotonic() - began < 8 < patient.deadline_seconds and found[0].path == f"{url}/index.json"
    finally:
        child.kill()
        child.wait()


def test_a_name_that_does_not_resolve_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    began = time.monotonic()
    with told(RemoteError, "the name of http://nosuch.invalid:8000 does not resolve; check the address"):
        open_remote("http://nosuch.invalid:8000/a", tmp_path / "none")
    assert time.monotonic() - began < 8 < RemoteOptions().deadline_seconds


def test_a_server_that_was_reached_is_waited_for(server: RangeServer, model: Path, tmp_path: Path) -> None:
    """It may be restarting: for longer than one that was never there, and without asking all the time."""
    options = RemoteOptions(timeout_seconds=5, deadline_seconds=30, backoff_seconds=0.3)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=options) as remote, ThreadPoolExecutor(1) as pool:
        reader = remote.open_reader(0)
        view = memoryview(bytearray(2 * MIB))
        server.stop()
        try:
            reading = pool.submit(reader.read, view, 0)
            time.sleep(2)
            assert not reading.done()
        finally:
            server.start()
        reading.result(20)
        assert 1 <= remote.traffic.interruptions <= 8 and view == partitions(model)[0][: 2 * MIB]
        reader.close()


@pytest.mark.parametrize(
    ("url", "kind", "says"),
    [
        ("hf://x", RemoteError, "hf://x is not an address; write hf://OWNER/NAME"),
        ("hf://a/b@", RemoteError, "hf://a/b@ is not an address; write hf://OWNER/NAME"),
        ("http://[x/a", RemoteError, "http://[x/a is not an address (Invalid IPv6 URL); write for example https://HOST/FOLDER"),
        ("http://me:SECRET@a:b/c?t=SECRET", RemoteError, "http://a:b/c is not an address; write for example https://HOST/FOLDER"),
        ("foo://x", UnsupportedError, "foo://x is not an address: no file system reads foo://; write https://…, s3://… or hf://OWNER/NAME"),
    ],
)
def test_what_is_no_address_is_refused_at_once(url: str, kind: type[SllmError], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(source.time, "sleep", slept.append)
    with told(kind, says):
        open_remote(url, tmp_path / "none")
    assert slept == []


def test_a_server_without_ranges_is_noticed_when_it_is_opened(server: RangeServer, model: Path, tmp_path: Path) -> None:
    server.ignore_ranges = True
    with told(RemoteError, f"{server.url}/{model.name}/data-0000", "does not answer byte ranges; serve it from one that does, as nginx and object stores do"):
        open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK)


def test_a_server_that_does_not_come_back_fails_the_load(server: RangeServer, model: Path, tmp_path: Path) -> None:
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=HASTY) as remote:
        server.cut_after = [2 * MIB + 7]
        server.before = [lambda: None, *[cut] * 500]
        reader = remote.open_reader(0)
        view = memoryview(bytearray(remote.index.partitions[0].nbytes))
        with told(RemoteError, f"{remote.url}/data-00000.bin at byte 2,097,159:", "nothing came for 0.4 seconds"):
            reader.read(view, 0, cached=False)
        reader.close()


def test_a_load_that_has_ended_does_not_go_on_trying(server: RangeServer, model: Path, tmp_path: Path) -> None:
    ended = threading.Event()
    options = RemoteOptions(timeout_seconds=5, deadline_seconds=100, backoff_seconds=60)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=options) as remote:
        server.statuses = [503] * 9
        reader = remote.open_reader(0, stopped=ended.is_set)
        threading.Timer(0.2, ended.set).start()
        began = time.monotonic()
        with pytest.raises(LoadCancelled, match="has ended"):
            reader.read(memoryview(bytearray(4096)), 0, cached=False)
        assert time.monotonic() - began < 5
        reader.close()


@pytest.mark.parametrize("at", ["its first byte", "its middle"])
def test_a_load_that_has_ended_does_not_wait_for_a_silent_server(
    server: RangeServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    ended, over, asked = threading.Event(), threading.Event(), threading.Event()
    options = RemoteOptions(timeout_seconds=30, deadline_seconds=100)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=options) as remote:

        def hang() -> None:
            asked.set()
            over.wait(60)

        if at == "its first byte":
            server.before = [hang]
        else:
            send = server._send
            server.cut_after = [MIB + 5]

            def send_and_hang(*args: Any) -> None:
                send(*args)
                hang()

            monkeypatch.setattr(server, "_send", send_and_hang)
        reader = remote.open_reader(0, stopped=ended.is_set)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(reader.read, memoryview(bytearray(2 * MIB)), 0)
            assert asked.wait(10)
            began = time.monotonic()
            ended.set()
            try:
                with pytest.raises(LoadCancelled, match="has ended"):
                    reading.result(10)
            finally:
                over.set()
        assert time.monotonic() - began < 5
        reader.close()


def test_a_load_that_has_ended_does_not_wait_to_be_connected() -> None:
    ended = threading.Event()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        clients = [socket.socket() for _ in range(4)]
        for client in clients:  # the kernel answers nobody else
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        options = RemoteOptions(timeout_seconds=30, deadline_seconds=100)
        asked = HttpSource(f"http://127.0.0.1:{full.getsockname()[1]}", lambda _: f"http://127.0.0.1:{full.getsockname()[1]}/f", {}, options)
        threading.Timer(0.3, ended.set).start()
        began = time.monotonic()
        with pytest.raises(LoadCancelled, match="has ended"):
            fetch(asked, "f", 0, memoryview(bytearray(10)), 10, options, stopped=ended.is_set)
        assert time.monotonic() - began < 5
        asked.close()
        for client in clients:
            client.close()


def test_a_silent_server_is_given_its_whole_timeout(server: RangeServer, model: Path, tmp_path: Path) -> None:
    """Looking up now and then is not giving up: an answer after two looks still counts, and no answer ends in one attempt."""
    options = RemoteOptions(timeout_seconds=1.6, deadline_seconds=1.5)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=options) as remote:
        reader = remote.open_reader(0)
        before = len(server.asked)
        server.before = [lambda: time.sleep(1.2)]
        reader.read(memoryview(bytearray(2 * MIB)), 0)
        assert len(server.asked) == before + 1 and remote.traffic.interruptions == 0
        over = threading.Event()
        server.before = [lambda: over.wait(20)] * 9
        with told(RemoteError, f"{remote.url}/data-00000.bin", "nothing came for 1.5 seconds (ReadTimeoutError"):
            reader.read(memoryview(bytearray(2 * MIB)), 0)
        over.set()
        reader.close()


@pytest.mark.parametrize(
    ("url", "bare", "told_as"),
    [
        ("https://host/a/b", "https://host/a/b", "https://host/a/b"),
        ("https://me:se@cret@host:8/a?token=secret#x", "https://host:8/a", "https://***@host:8/a?***"),
        ("https://me:se?cr#et@host/a", "https://host/a", "https://***@host/a"),
        ("simplecache::https://me:secret@host/a/?t=secret", "simplecache::https://host/a", "simplecache::https://***@host/a/?***"),
        ("s3://bucket/a#secret", "s3://bucket/a", "s3://bucket/a"),
        ("hf://owner/repo@main/a", "hf://owner/repo@main/a", "hf://owner/repo@main/a"),
        ("file:///a@b/c@d/e", "file:///a@b/c@d/e", "file:///a@b/c@d/e"),
    ],
)
def test_what_is_shown_of_an_address(url: str, bare: str, told_as: str) -> None:
    assert (shown(url), redacted(url)) == (bare, told_as)


def test_a_folder_is_shown_as_it_is() -> None:
    assert redacted("/models/what?/a#b@c") == "/models/what?/a#b@c"


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ({"ignore_ranges": True}, RemoteError, "ignores ranges"),
        ({"shift": (4096, 0)}, RemoteError, "the server answers 'bytes 4096-2097151/"),
        ({"shift": (0, 4096)}, RemoteError, "the server answers 'bytes 0-2101247/"),
        ({"shift": (0, -(3 << 20))}, RemoteError, "the server answers 'bytes 0--1048577/"),
        ({"headers": {"Content-Encoding": "gzip"}}, RemoteError, "'gzip'"),
        ({"statuses": [403]}, RemoteError, "status 403; check the credentials"),
        ({"statuses": [400]}, RemoteError, "status 400"),
        ({"statuses": [404]}, IntegrityError, "no such file on the server, though its index has not changed"),
        ({"claim_nbytes": {"data-00000.bin": 4096}}, IntegrityError, "4,096 bytes instead of"),
        ({"claim_nbytes": {"data-00000.bin": 10**12}}, IntegrityError, "1,000,000,000,000 bytes instead of"),
        ({"flip": [True] * 9}, IntegrityError, "is not the one that was written, though its index has not changed"),
    ],
)
def test_a_wrong_answer_is_refused(server: RangeServer, remote: RemoteCheckpoint, model: Path, fault: dict[str, object], kind: type, says: str) -> None:
    reader = remote.open_reader(0)
    keep = {name: getattr(server, name) for name in fault}
    for name, value in fault.items():
        setattr(server, name, value)
    sent = server.sent_nbytes()
    with told(kind, f"{remote.url}/data-00000.bin at byte 0:", says):
        reader.read(memoryview(bytearray(2 * MIB)), 0, cached=False)
    assert server.sent_nbytes() - sent <= 3 * 2 * MIB + remote.nbytes
    reader.close()
    for name, value in keep.items():
        setattr(server, name, value)
    assert read_all(remote) == partitions(model), "the next request does not work"


def test_a_bit_that_flips_on_its_way_is_asked_for_again(server: RangeServer, remote: RemoteCheckpoint, model: Path) -> None:
    server.flip = [True, False, True]
    assert read_all(remote, threads=1) == partitions(model)
    assert 0 < remote.traffic.repeated_nbytes <= 4 * MIB and remote.traffic.remote_nbytes == remote.nbytes


def test_a_failed_load_leaves_nothing(server: RangeServer, remote: RemoteCheckpoint, cache: DiskCache) -> None:
    remote.fill_cache(cache)
    server.statuses = [0, 0, 403]
    with pytest.raises(RemoteError, match="status 403"), start_load(remote) as handle:
        handle.wait()
    assert no_threads_of_ours(remote)


# --- what the server holds


def test_an_index_that_is_too_large_is_not_read(server: RangeServer, model: Path, tmp_path: Path) -> None:
    server.claim_nbytes = {"index.json": 10**12}
    with told(FormatError, f"{server.url}/{model.name}/index.json", "1,000,000,000,000 bytes"):
        open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK)
    assert server.sent_nbytes("index.json") <= 1


@pytest.mark.parametrize("name", ["../up.json", "/etc/passwd", "a/../../b.json", "index.json", ".hidden", "data-00000.bin"])
def test_a_companion_cannot_leave_its_folder(server: RangeServer, tmp_path: Path, name: str) -> None:
    path = write_model(server.folder / "evil").path
    reseal(path, lambda body: body["companions"][0].update(file=name))
    with told(FormatError, f"{server.url}/evil/index.json", "not valid"):
        open_remote(f"{server.url}/evil", tmp_path / "out" / "small", options=QUICK)
    assert not (tmp_path / "out").exists() and {asked.file for asked in server.asked} == {"index.json"}


def test_numbers_of_the_index_are_checked_before_memory_is_asked_for(server: RangeServer, tmp_path: Path) -> None:
    path = write_model(server.folder / "evil").path
    reseal(path, lambda body: body["companions"][0].update(nbytes=2**52))
    with told(FormatError, f"{server.url}/evil/index.json", "companions have"):
        open_remote(f"{server.url}/evil", tmp_path / "small", options=QUICK)
    path = write_model(server.folder / "evil").path
    reseal(path, lambda body: body["companions"][0].update(nbytes=2**29))
    with told(IntegrityError, f"{server.url}/evil/", "not those that were written"):
        open_remote(f"{server.url}/evil", tmp_path / "small", options=QUICK)


@pytest.mark.parametrize(("change", "kind", "says"), [("cut", IntegrityError, "instead of"), ("remove", RemoteError, "no such file"), ("companion", IntegrityError, "not those")])
def test_a_damaged_upload_is_refused_when_it_is_opened(server: RangeServer, tmp_path: Path, change: str, kind: type, says: str) -> None:
    path = write_model(server.folder / "damaged").path
    if change == "cut":
        os.truncate(path / "data-00001.bin", 4096)
    elif change == "remove":
        (path / "data-00001.bin").unlink()
    else:
        (path / "config.json").write_bytes(b'{"model_type": "other"}\n')
    with told(kind, f"{server.url}/damaged/", says):
        open_remote(f"{server.url}/damaged", tmp_path / "small", options=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_under_the_reader(server: RangeServer, tmp_path: Path, cache: DiskCache) -> None:
    path = write_model(server.folder / "changing", 1).path
    with open_remote(f"{server.url}/changing", tmp_path / "small", options=QUICK) as remote:
        assert remote.fill_cache(cache) is None
        server.before = [lambda: None, lambda: None, lambda: write_model(path, 2)]
        with told(RemoteError, f"{server.url}/changing/data-", "changed since it was opened; open it again"):
            read_all(remote, threads=1)
        assert cache.entries() == [] and occupied_nbytes(cache.folder) == 0, "the old version is still in the cache"
    server.before = []
    with open_remote(f"{server.url}/changing", tmp_path / "small", options=QUICK) as remote:
        assert remote.fill_cache(cache) is None
        assert read_all(remote) == partitions(path)
    assert [entry.complete for entry in cache.entries()] == [True]


def test_a_model_that_is_removed_under_the_reader(server: RangeServer, tmp_path: Path) -> None:
    path = write_model(server.folder / "gone").path
    with open_remote(f"{server.url}/gone", tmp_path / "small", options=QUICK) as remote:
        for file in path.iterdir():
            file.unlink()
        with told(RemoteError, f"{server.url}/gone/data-00000.bin at byte 0:", "no such file", "removed"):
            read_all(remote)


# --- secrets


def test_redirects_are_followed_and_get_no_credentials(server: RangeServer, model: Path, tmp_path: Path) -> None:
    with RangeServer(model.parent, redirect=f"http://localhost:{server.port}") as front:
        with open_remote(f"http://me:SECRET@127.0.0.1:{front.port}/{model.name}", tmp_path / "small", options=QUICK) as remote:
            assert read_all(remote) == partitions(model)
        assert all("Basic" in str(asked.headers) for asked in front.asked)
        assert server.asked and not any("Basic" in str(asked.headers) for asked in server.asked)


@pytest.mark.parametrize("fault", ["refused", "404", "403", "503", "ranges", "flip", "redirects"])
def test_no_error_shows_a_secret(server: RangeServer, model: Path, tmp_path: Path, fault: str) -> None:
    host = f"127.0.0.1:{server.port if fault != 'refused' else 1}"
    url = f"http://me:SECRET@{host}/{model.name if fault != '404' else 'none'}?sig=SECRET#SECRET"
    server.statuses = {"403": [403], "503": [503] * 500}.get(fault, [])
    server.flip = [fault == "flip"] * 9
    options = RemoteOptions(timeout_seconds=1, deadline_seconds=0.2, backoff_seconds=0.01, storage={"headers": {"X-Token": "SECRET"}})
    assert "SECRET" not in repr(options)
    with pytest.raises((RemoteError, IntegrityError)) as found:
        if fault == "redirects":
            server.redirect = f"http://me:SECRET@127.0.0.1:{server.port}/x?sig=SECRET&"
        with open_remote(url, tmp_path / "small", options=options) as remote:
            server.ignore_ranges = fault == "ranges"
            read_all(remote)
    shown = "".join(traceback.format_exception(found.value))
    assert "SECRET" not in shown.replace("SECRET@{host}", "").replace('"X-Token": "SECRET"', ""), shown
    assert host in str(found.value)


def test_no_error_of_a_file_system_shows_a_secret(tmp_path: Path) -> None:
    storage = {"endpoint_url": "http://127.0.0.1:1", "key": "AKIAMINE", "secret": "SECRETKEY", "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1}}
    with pytest.raises(RemoteError, match=r"s3://models/tiny/index\.json") as found:
        open_remote("s3://models/tiny", tmp_path / "small", options=RemoteOptions(timeout_seconds=1, deadline_seconds=0.2, storage=storage))
    assert not re.search(r"AKIAMINE|SECRETKEY|Signature=", str(found.value) + repr(found.value.__cause__))


# --- the cache


def test_a_reader_that_is_killed_is_gone_on_with(server: RangeServer, model: Path, tmp_path: Path, cache: DiskCache) -> None:
    url, sizes = f"{server.url}/{model.name}", [file.stat().st_size for file in sorted(model.glob("data-*.bin"))]

    def load() -> None:
        remote = open_remote(url, tmp_path / "small", options=QUICK)
        assert remote.fill_cache(cache) is None
        reader = remote.open_reader(0)
        reader.read(memoryview(bytearray(2 * MIB)), 0, cached=False)
        other = remote.open_reader(1)
        other.read(memoryview(bytearray(sizes[1])), 0, cached=False)
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for(start_child(load)) == -signal.SIGKILL
    [entry] = cache.entries()
    assert not entry.complete and not entry.busy and cache.find(entry.name) is None, "half a model can be seen"
    assert cache.used_nbytes == occupied_nbytes(cache.folder) >= sum(sizes)
    with open(entry.path / "data-00001.bin", "r+b") as file:  # torn by the crash
        file.seek(3 * MIB)
        byte = file.read(1)
        file.seek(3 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    with open_remote(url, tmp_path / "small", options=QUICK) as remote:
        assert remote.fill_cache(cache) is None
        assert read_all(remote) == partitions(model)
        assert (remote.traffic.cached_nbytes, remote.traffic.remote_nbytes) == (sizes[1], sum(sizes) - sizes[1])  # the torn chunk is as large as the first
    checkpoint = cache.find(remote.cache_name)
    assert checkpoint is not None
    verify_checkpoint(checkpoint.path)
    assert partitions(checkpoint.path) == partitions(model)


def test_kills_at_any_moment_leave_nothing_corrupt(server: RangeServer, model: Path, tmp_path: Path, cache: DiskCache) -> None:
    chance = random.Random(3)

    def load() -> None:
        with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
            remote.fill_cache(cache)
            read_all(remote, step=2 * MIB)

    for _ in range(8):
        child = start_child(load)
        time.sleep(chance.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        wait_for(child)
        for entry in cache.entries():
            assert not entry.busy
            if entry.complete:
                verify_checkpoint(entry.path)
                cache.remove(entry.name)
        assert cache.used_nbytes == occupied_nbytes(cache.folder)
    assert wait_for(start_child(load)) == 0
    [entry] = cache.entries()
    assert entry.complete
    verify_checkpoint(entry.path)


@pytest.mark.parametrize("when", ["reserving", "writing", "publishing"])
def test_a_full_disk_does_not_end_the_load(remote: RemoteCheckpoint, model: Path, cache: DiskCache, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "reserving":
        monkeypatch.setattr(filling, "_reserve", full)
        assert "No space left" in (remote.fill_cache(cache) or "")
    else:
        assert remote.fill_cache(cache) is None
    if when == "writing":
        monkeypatch.setattr(filling.os, "pwrite", full)
    handle = start_load(remote)
    handle.wait()
    assert remote.traffic.remote_nbytes == remote.nbytes
    assert when == "publishing" or "No space left" in (handle.report.fallback or "")
    if when == "publishing":
        monkeypatch.setattr(filling.os, "fsync", full)
    remote.close()
    assert cache.entries() == [] and list(cache.folder.iterdir()) == [], "it is still in the cache"
    monkeypatch.undo()
    with open_remote(remote.url, remote.path, options=QUICK) as again:
        assert again.fill_cache(cache) is None
        assert read_all(again) == partitions(model)
    assert [entry.complete for entry in cache.entries()] == [True]


def test_two_processes_never_fill_one_entry(server: RangeServer, remote: RemoteCheckpoint, model: Path, tmp_path: Path, cache: DiskCache) -> None:
    ready, go = os.pipe(), os.pipe()

    def hold() -> None:
        with open_remote(remote.url, tmp_path / "child", options=QUICK) as own:
            assert own.fill_cache(DiskCache(cache.folder, cache.budget_nbytes)) is None
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            read_all(own)

    child = start_child(hold)
    os.read(ready[0], 1)
    reason = remote.fill_cache(cache)
    assert reason == "another process is filling the disk cache with it"
    [entry] = cache.entries()
    assert entry.busy and cache.remove(entry.name) == 0, "an entry that is being filled was removed"
    handle = start_load(remote)
    handle.wait()
    assert handle.report.fallback == reason
    os.write(go[1], b"x")
    assert wait_for(child) == 0
    for fd in (*ready, *go):
        os.close(fd)
    [entry] = cache.entries()
    assert entry.complete and partitions(entry.path) == partitions(model)


def test_an_old_version_that_nobody_finished_gives_way(server: RangeServer, tmp_path: Path, cache: DiskCache) -> None:
    names = []
    for seed in (1, 2):
        write_model(server.folder / "changing", seed)
        with open_remote(f"{server.url}/changing", tmp_path / "small", options=QUICK) as remote:
            assert remote.fill_cache(cache) is None
            names.append(remote.cache_name)
    assert [entry.name for entry in cache.entries()] == names[1:]


@pytest.mark.parametrize("damage", ["cut", "index", "missing"])
def test_a_damaged_entry_is_fetched_again(remote: RemoteCheckpoint, model: Path, cache: DiskCache, damage: str) -> None:
    remote.fill_cache(cache)
    read_all(remote)
    remote.close()
    [entry] = cache.entries()
    if damage == "cut":
        os.truncate(entry.path / "data-00000.bin", 4096)
    elif damage == "index":
        (entry.path / "index.json").write_bytes(b"{}")
    else:
        (entry.path / "config.json").unlink()
    assert cache.find(entry.name) is None and cache.entries() == []
    with open_remote(remote.url, remote.path, options=QUICK) as again:
        assert again.fill_cache(cache) is None
        read_all(again)
    found = cache.find(entry.name)
    assert found is not None and partitions(found.path) == partitions(model)


def test_what_a_killed_removal_left_goes_with_the_next_cache(cache: DiskCache) -> None:
    left = cache.folder / ".x-1.removed"
    left.mkdir()
    (left / "data-00000.bin").write_bytes(b"x" * 5000)
    assert cache.used_nbytes == 0 and cache.entries() == []
    assert DiskCache(cache.folder, MIB).entries() == [] and not left.exists()


def test_a_folder_that_others_may_write_to_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with told(UnsupportedError, tmp_path / "open", "other users"):
        DiskCache(tmp_path / "open", MIB)


def test_a_file_system_without_reservation_or_holes(remote: RemoteCheckpoint, model: Path, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoReservation:
        @staticmethod
        def fallocate(*_: object) -> int:
            filling.ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    def no_holes(fd: int, at: int, how: int, seek: Callable[..., int] = os.lseek) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return seek(fd, at, how)

    monkeypatch.setattr(filling, "_libc", NoReservation)
    monkeypatch.setattr(filling.os, "lseek", no_holes)
    assert remote.fill_cache(cache) is None
    assert cache.used_nbytes >= remote.nbytes, "the space that will be taken does not count"
    assert read_all(remote) == partitions(model) and remote.traffic.cached_nbytes == 0
    remote.close()
    [entry] = cache.entries()
    verify_checkpoint(entry.path)


def test_a_lock_dies_with_its_process(cache: DiskCache, model: Path) -> None:
    index = open_checkpoint(model).index
    files = {"index.json": (model / "index.json").read_bytes()}

    def hold() -> None:
        assert not isinstance(cache.fill("x", index, files), str)
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait_for(start_child(hold)) == -signal.SIGKILL
    found = cache.fill("x", index, files)
    assert not isinstance(found, str)
    found.close()
    fd = os.open(cache.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
