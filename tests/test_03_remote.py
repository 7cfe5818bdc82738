"""Remote checkpoints and the disk cache they fill: every tier of addresses gives the same bits, in one pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from range_server import RangeServer

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint, verify_checkpoint
from sllm_mini.checkpoint.torch_source import torch_source
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.errors import RemoteError, UnsupportedError
from sllm_mini.loading.load import load_tensors, start_load
from sllm_mini.storage.disk import DiskCache
from sllm_mini.storage.remote import RemoteCheckpoint, RemoteOptions, open_remote

MIB = 1 << 20
Place = Callable[[Path], AbstractContextManager[tuple[str, RemoteOptions]]]
QUICK = RemoteOptions(timeout_seconds=5, deadline_seconds=5, backoff_seconds=0.01)


def write_model(path: Path, seed: int = 0) -> Checkpoint:
    """Seven tensors of 1.5 to 3 MiB in three partitions, and two companions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{n}.w": torch.randint(0, 256, ((3 + n % 4) << 19,), dtype=torch.uint8, generator=generator) for n in range(7)}
    source = replace(torch_source(tensors), companions={"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b"{}" * 50})
    write_checkpoint(source, path, WriteOptions(partition_nbytes=6_000_000, threads=1, overwrite=True), None)
    return open_checkpoint(path)


def read_all(checkpoint: RemoteCheckpoint, *, step: int = 4 * MIB, threads: int = 4) -> list[bytes]:
    """Every partition, read as a load does: several threads, `step` bytes at a time."""
    contents = []
    for number, entry in enumerate(checkpoint.index.partitions):
        reader = checkpoint.open_reader(number, direct=True)
        try:
            content = memoryview(bytearray(entry.nbytes))
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda at, reader=reader, content=content: reader.read(content[at : at + step], at, cached=False), range(0, entry.nbytes, step)))
        finally:
            reader.close()
        contents.append(bytes(content))
    return contents


def partitions(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("data-*.bin"))]


def occupied_nbytes(folder: Path) -> int:
    """What the file system says of everything below a folder."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny.sllm").path


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    with RangeServer(model.parent) as found:
        yield found


@contextmanager
def at_file(model: Path) -> Iterator[tuple[str, RemoteOptions]]:
    yield f"file://{model}", QUICK


@contextmanager
def at_http(model: Path) -> Iterator[tuple[str, RemoteOptions]]:
    with RangeServer(model.parent) as server:
        yield f"{server.url}/{model.name}", QUICK


@contextmanager
def at_memory(model: Path) -> Iterator[tuple[str, RemoteOptions]]:
    """Any other file system of fsspec."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(model), "/bucket/tiny.sllm", recursive=True)
    try:
        yield "memory://bucket/tiny.sllm", QUICK
    finally:
        files.rm("/bucket", recursive=True)


@contextmanager
def at_s3(model: Path) -> Iterator[tuple[str, RemoteOptions]]:
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        storage = {"endpoint_url": f"http://{host}:{port}", "key": "AKIAMINE", "secret": "SECRETKEY"}
        files = fsspec.filesystem("s3", **storage)
        files.makedirs("models", exist_ok=True)  # its memory is one for all servers of a process
        files.put(f"{model}/", "models/tiny.sllm/", recursive=True)
        yield "s3://models/tiny.sllm", replace(QUICK, storage=storage)
    finally:
        server.stop()


PLACES: list[Place] = [at_file, at_http, at_memory, at_s3]


@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_address_gives_the_same_bytes_once(place: Place, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with place(model) as (url, options), open_remote(url, tmp_path / "small", options=options) as remote:
        assert remote.index == open_checkpoint(model).index
        assert remote.read_companion("config.json") == (model / "config.json").read_bytes()
        assert read_all(remote) == partitions(model)
        assert remote.traffic.remote_nbytes == remote.nbytes
        assert (remote.traffic.cached_nbytes, remote.traffic.repeated_nbytes, remote.traffic.interruptions) == (0, 0, 0)
        assert "SECRET" not in repr(remote) + repr(options)


def test_s3_is_read_through_signed_addresses(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with at_s3(model) as (url, options):
        with open_remote(url, tmp_path / "small", options=options) as remote:
            assert type(remote.remote.source).__name__ == "HttpSource"
        with pytest.raises(RemoteError, match=r"s3://models/none/index\.json: there is no such file") as found:
            open_remote("s3://models/none", tmp_path / "none", options=options)
        assert "Signature" not in str(found.value)


def test_hf_is_read_with_the_token_from_the_hub_only(model: Path, tmp_path: Path) -> None:
    revision = {"id": "me/tiny", "sha": "0" * 40, "siblings": [], "tags": [], "private": False, "downloads": 0, "likes": 0}
    code = (
        "import sys; from pathlib import Path; from sllm_mini.storage.remote import open_remote, RemoteOptions\n"
        "from test_03_remote import read_all, partitions\n"
        "with open_remote('hf://me/tiny/sub', sys.argv[2], options=RemoteOptions(deadline_seconds=5, storage={'token': 'hf_SECRET'})) as remote:\n"
        "    assert read_all(remote) == partitions(Path(sys.argv[1])), 'other bytes'\n"
        "    assert 'SECRET' not in repr(remote)\n"
    )
    with RangeServer(model.parent) as files, RangeServer(model.parent, redirect=f"http://localhost:{files.port}") as hub:
        hub.api["/api/models/me/tiny"] = hub.api["/api/models/me/tiny/revision/main"] = json.dumps(revision).encode()
        (files.folder / "me" / "tiny" / "resolve" / "main").mkdir(parents=True, exist_ok=True)
        (files.folder / "me" / "tiny" / "resolve" / "main" / "sub").symlink_to(model)
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "PYTHONPATH": str(Path(__file__).parent), "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code, str(model), str(tmp_path / "small")], env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    ours = [asked for asked in hub.asked if asked.file.endswith((".json", ".bin"))]
    assert ours and all("Bearer hf_SECRET" in str(asked.headers) for asked in ours)
    assert files.sent_nbytes() > open_checkpoint(model).nbytes and "SECRET" not in str(files.asked)


def test_a_load_reads_from_afar(server: RangeServer, model: Path, tmp_path: Path) -> None:
    expected = load_tensors(model)
    cache = DiskCache(tmp_path / "cache", 64 * MIB)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
        assert remote.fill_cache(cache) is None
        with start_load(remote) as handle:
            tensors = handle.wait()
        assert handle.report.fallback is None
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert server.sent_nbytes() - len(remote.index.partitions) == remote.nbytes, "a byte was sent twice"  # one each to learn the sizes
    cached = cache.find(remote.cache_name)
    assert cached is not None and all(torch.equal(tensor, expected[name]) for name, tensor in load_tensors(cached).items())


def test_one_pass_fills_the_cache(server: RangeServer, model: Path, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 64 * MIB)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
        assert remote.fill_cache(cache) is None
        [entry] = cache.entries()
        assert entry.busy and not entry.complete and cache.find(remote.cache_name) is None
        assert cache.used_nbytes >= remote.nbytes, "the space is not reserved"
        assert cache.remove(entry.name) == 0, "an entry that is being filled was removed"
        read_all(remote)
    assert server.sent_nbytes() - len(remote.index.partitions) == remote.nbytes, "a byte was sent twice"
    [entry] = cache.entries()
    assert entry.complete and not entry.busy and entry.name == remote.cache_name
    checkpoint = cache.find(entry.name)
    assert checkpoint is not None and partitions(checkpoint.path) == partitions(model)
    verify_checkpoint(checkpoint.path)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as again:
        assert again.cache_name == entry.name and again.fill_cache(cache) == "the disk cache holds it already"


def test_the_accounts_are_the_file_systems(server: RangeServer, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 64 * MIB)
    for seed, kind in enumerate(("whole", "half")):
        write_model(server.folder / kind, seed)
        with open_remote(f"{server.url}/{kind}", tmp_path / kind, options=QUICK) as remote:
            assert remote.fill_cache(cache) is None
            assert abs(cache.used_nbytes - occupied_nbytes(cache.folder)) <= 4096 and cache.used_nbytes <= occupied_nbytes(cache.folder) + 4096
            if kind == "whole":
                read_all(remote)
    assert {(entry.name.partition("-")[0], entry.complete) for entry in cache.entries()} == {("whole", True), ("half", False)}
    assert cache.used_nbytes == occupied_nbytes(cache.folder) == sum(entry.nbytes for entry in cache.entries())
    before = cache.used_nbytes
    freed = [cache.remove(entry.name) for entry in cache.entries()]
    assert sum(freed) == before and cache.used_nbytes == occupied_nbytes(cache.folder) == 0 and list(cache.folder.iterdir()) == []


def test_a_budget_is_kept(server: RangeServer, model: Path, tmp_path: Path) -> None:
    nbytes = open_checkpoint(model).nbytes
    cache = DiskCache(tmp_path / "cache", nbytes + MIB)
    write_model(server.folder / "other", 5)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
        assert cache.lacking_nbytes(remote.index, remote.cache_name) == 0
        assert remote.fill_cache(cache) is None
        assert cache.lacking_nbytes(remote.index, remote.cache_name) == 0, "its own reservation counts against it"
        read_all(remote)
    with open_remote(f"{server.url}/other", tmp_path / "two", options=QUICK) as other:
        lacking = cache.lacking_nbytes(other.index, other.cache_name)
        assert 0 < nbytes - MIB <= lacking <= nbytes + MIB
        reason = other.fill_cache(cache)
        assert reason is not None and f"{lacking:,} bytes are lacking" in reason
        assert [entry.name for entry in cache.entries()] == [remote.cache_name], "something was evicted unasked, or left"
        reader = other.open_reader(0)
        assert reader.fallback == reason
        reader.close()
        assert read_all(other) == partitions(server.folder / "other"), "without a cache it is read all the same"
        assert cache.remove(remote.cache_name) >= lacking
        assert other.fill_cache(cache) is None
        assert cache.used_nbytes <= cache.budget_nbytes
    with pytest.raises(ValueError, match="holds nothing"):
        DiskCache(tmp_path / "none", 10)


def test_the_longest_unused_comes_first(server: RangeServer, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 64 * MIB)
    names = []
    for seed, name in enumerate(("a", "b")):
        write_model(server.folder / name, seed)
        with open_remote(f"{server.url}/{name}", tmp_path / name, options=QUICK) as remote:
            remote.fill_cache(cache)
            read_all(remote)
            names.append(remote.cache_name)
    for seconds, name in enumerate(names):
        os.utime(cache.folder / name, (seconds, seconds))
    assert [entry.name for entry in cache.entries()] == names
    assert cache.find(names[0]) is not None
    assert [entry.name for entry in cache.entries()] == names[::-1]


def test_an_open_descriptor_outlives_an_eviction(server: RangeServer, model: Path, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 64 * MIB)
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
        remote.fill_cache(cache)
        read_all(remote)
    cached = cache.find(remote.cache_name)
    assert cached is not None
    fd = cached.open_partition(0)
    try:
        assert cache.remove(remote.cache_name) > 0 and cache.find(remote.cache_name) is None
        assert os.pread(fd, 1 << 30, 0) == partitions(model)[0]
    finally:
        os.close(fd)
    with pytest.raises(Exception, match=r"no such directory|replaced or removed"):
        cached.open_partition(0)


def test_reads_that_cut_hash_chunks(server: RangeServer, model: Path, tmp_path: Path) -> None:
    content = partitions(model)[0]
    with open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK) as remote:
        reader = remote.open_reader(0)
        for offset, nbytes in ((4096, 4096), (2 * MIB - 4096, 8192), (0, 4096), (len(content) - 4096, 4096)):
            view = memoryview(bytearray(nbytes))
            assert reader.read(view, offset, cached=False) is False
            assert bytes(view) == content[offset : offset + nbytes]
        reader.close()


def test_names_in_the_cache_hold_no_secret_and_tell_versions_apart(server: RangeServer, model: Path, tmp_path: Path) -> None:
    plain = f"{server.url}/{model.name}"
    secret = f"http://me:SECRET@127.0.0.1:{server.port}/{model.name}/?sig=SECRET"
    names = []
    for number, url in enumerate((plain, secret, f"{server.url}//{model.name}")):
        with open_remote(url, tmp_path / str(number), options=QUICK) as remote:
            names.append(remote.cache_name)
            assert "SECRET" not in repr(remote) + remote.url + remote.cache_name
    assert names[0] == names[1] != names[2]
    assert any("Basic" in str(asked.headers) for asked in server.asked)
    write_model(server.folder / "changing", 1)
    versions = []
    for seed in (1, 2):
        write_model(server.folder / "changing", seed)
        with open_remote(f"{server.url}/changing", tmp_path / "changing", options=QUICK) as remote:
            versions.append(remote.cache_name)
            assert (tmp_path / "changing" / "index.json").read_bytes() == (server.folder / "changing" / "index.json").read_bytes()
    assert versions[0] != versions[1] and versions[0][:-16] == versions[1][:-16]


def test_companions_that_are_there_are_not_asked_for_again(server: RangeServer, model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        open_remote(f"{server.url}/{model.name}", tmp_path / "small", options=QUICK).close()
    assert [asked.file for asked in server.asked if asked.end - asked.start > 1].count("tokenizer.json") == 1


def test_wrong_use_says_what_would_be_right(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive"):
        RemoteOptions(deadline_seconds=0)
    with pytest.raises(ValueError, match="at least 1"):
        RemoteOptions(connections=0)
    with pytest.raises((UnsupportedError, RemoteError), match="nosuch://host/model"):
        open_remote("nosuch://host/model", tmp_path / "small")
    remote = open_remote(f"file://{model}", tmp_path / "small")
    with pytest.raises(Exception, match="remote"):
        remote.open_partition(0)
    remote.close()
    with pytest.raises(RemoteError, match="closed"):
        remote.open_reader(0)
    with pytest.raises(ValueError, match="not a name"):
        DiskCache(tmp_path / "cache", MIB).find("../up")
