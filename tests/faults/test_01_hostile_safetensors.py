"""Chapter 01: sources that lie. Hostile safetensors headers, shards that disagree, directories of pickles: each is
refused in one typed sentence that names the file, and nothing of the target appears."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from sllm_mini.checkpoint import convert_checkpoint
from sllm_mini.checkpoint.index import MAX_TENSORS
from sllm_mini.checkpoint.safetensors_file import MAX_HEADER_NBYTES, read_header
from sllm_mini.errors import CheckpointError, CheckpointExistsError, FormatError, SllmError
from sllm_mini.loading import load_tensors

from .tools import BAD_NUMBERS, entry, nothing_left, places, put, refused, safetensors_bytes, set_at

pytestmark = pytest.mark.timeout(120)

INDEX = "model.safetensors.index.json"


def good_header() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("I64", [2], [24, 40]),
        "c": entry("BF16", [0, 7], [40, 40]),
        "d": entry("BOOL", [], [40, 41]),
        "e": entry("F8_E4M3", [3], [41, 44]),
    }


@pytest.fixture(autouse=True)
def nothing_appears(tmp_path: Path) -> Iterator[None]:
    """Whatever was refused, no target and no hidden directory may be there."""
    yield
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "out"))]


def assert_refused(source: Path, place: Path, *says: str, kind: type[SllmError] = FormatError) -> list[SllmError]:
    with refused(kind, place, *says) as found:
        convert_checkpoint(source, place.parent / "out")
    return found


def test_the_good_header_is_good(tmp_path: Path) -> None:
    """Otherwise everything below would be refused for another reason."""
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(good_header(), bytes(range(44))))
    (tmp_path / "deeper").mkdir()
    convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "deeper" / "out")
    assert {name: tuple(tensor.shape) for name, tensor in load_tensors(tmp_path / "deeper" / "out").items()} == {"a": (2, 3), "b": (2,), "c": (0, 7), "d": (), "e": (3,)}


# Headers


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be a safetensors file"),
    "seven bytes": (b"1234567", "cannot be a safetensors file"),
    "length 0": (safetensors_bytes(b""), "JSON"),
    "length beyond the file": (safetensors_bytes(b"{}", length=3), "claims 3 bytes"),
    "length 100 MB": (safetensors_bytes(b"{}", length=100_000_000), "claims 100,000,000"),
    "length 2^63": (safetensors_bytes(b"{}", length=2**63), "claims"),
    "length 2^64-1": (safetensors_bytes(b"{}", length=2**64 - 1), "claims"),
    "length 2^64-8": (safetensors_bytes(b"{}", length=2**64 - 8), "claims"),
    "length cuts the header": (safetensors_bytes(good_header(), bytes(44), length=20), "JSON"),
    "length reaches into the data": (safetensors_bytes({"a": entry()}, bytes(8), length=len(json.dumps({"a": entry()})) + 4), "JSON"),
    "not JSON": (safetensors_bytes(b"hello world"), "JSON"),
    "a list": (safetensors_bytes(b"[]"), "not a JSON object"),
    "null": (safetensors_bytes(b"null"), "not a JSON object"),
    "a number": (safetensors_bytes(b"1e999"), "not a JSON object"),
    "NaN": (safetensors_bytes(b"NaN"), "NaN"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "JSON"),
    "UTF-16": (safetensors_bytes('{"a": 1}'.encode("utf-16")), "JSON"),
    "byte order mark": (safetensors_bytes(b"\xef\xbb\xbf{}"), "JSON"),
    "two objects": (safetensors_bytes(b"{}{}"), "JSON"),
    "deep lists": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "JSON"),
    "deep objects": (safetensors_bytes(b'{"a":' * 200_000), "JSON"),
    "a number of a million digits": (safetensors_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,0]}}'), "JSON"),
    "key twice": (safetensors_bytes(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "field twice": (safetensors_bytes(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "name not text": (safetensors_bytes(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "not text"),
    "name empty": (safetensors_bytes({"": entry()}, bytes(8)), "empty"),
    "name too long": (safetensors_bytes({"n" * 5000: entry()}, bytes(8)), "1,024"),
    "trailing bytes": (safetensors_bytes(good_header(), bytes(45)), "end at byte"),
    "missing bytes": (safetensors_bytes(good_header(), bytes(43)), "end at byte"),
    "data without tensors": (safetensors_bytes({}, bytes(1)), "end at byte"),
    "metadata not an object": (safetensors_bytes({"__metadata__": 5}), "__metadata__"),
    "metadata not text": (safetensors_bytes({"__metadata__": {"a": 5}}), "__metadata__"),
    "metadata null": (safetensors_bytes({"__metadata__": None}), "__metadata__"),
    "pickle": (pickle.dumps({"a": [1, 2, 3]}), ""),
}


@pytest.mark.parametrize("raw, says", FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert_refused(tmp_path / "model.safetensors", tmp_path / "model.safetensors", says)
    assert_refused(tmp_path, tmp_path / "model.safetensors", says)


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "not an object": ({"a": 5}, "'a'"),
    "null": ({"a": None}, "'a'"),
    "empty": ({"a": {}}, "dtype"),
    "unknown field": ({"a": entry(run="rm -rf /")}, "run"),
    "long unknown field": ({"a": {**entry(), "k" * 1_000_000: 1}}, "'a'"),
    "dtype unknown": ({"a": entry("F33")}, "'F33'"),
    "dtype empty": ({"a": entry("")}, "dtype"),
    "dtype long": ({"a": entry("F" * 1_000_000)}, "dtype"),
    "dtype lower case": ({"a": entry("f32")}, "'f32'"),
    "dtype a number": ({"a": entry(5)}, "'a'"),
    "dtype of sub-bytes": ({"a": entry("F4", [4], [0, 2])}, "'F4'"),
    "shape negative": ({"a": entry(shape=[-2])}, "'a'"),
    "shape twice negative": ({"a": entry(shape=[-1, -2])}, "'a'"),
    "shape 2^63": ({"a": entry(shape=[2**63])}, "'a'"),
    "shape 2^64+2": ({"a": entry(shape=[2**64 + 2])}, "'a'"),
    "shape a float": ({"a": entry(shape=[2.0])}, "'a'"),
    "shape 1e308": ({"a": entry(shape=[1e308])}, "'a'"),
    "shape true": ({"a": entry(shape=[True, 2])}, "'a'"),
    "shape a text": ({"a": entry(shape="2")}, "'a'"),
    "shape an object": ({"a": entry(shape={"0": 2})}, "'a'"),
    "shape null": ({"a": entry(shape=None)}, "'a'"),
    "product overflows 64 bits to 2": ({"a": entry("U8", [2**32, 2**32], [0, 0])}, "elements"),
    "product overflows to 0": ({"a": entry("F32", [2**31, 2**31, 4], [0, 0])}, "elements"),
    "a hundred dimensions": ({"a": entry("U8", [1] * 100, [0, 1])}, "dimensions"),
    "shape larger than its bytes": ({"a": entry(shape=[3])}, "need 12"),
    "shape smaller than its bytes": ({"a": entry(shape=[1])}, "need 4"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, "'a'"),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, "'a'"),
    "offsets 2^63": ({"a": entry(offsets=[2**63, 2**63 + 8])}, "'a'"),
    "offsets 2^53": ({"a": entry(offsets=[2**53 - 9, 2**53 - 1])}, "hole"),
    "offsets floats": ({"a": entry(offsets=[0.0, 8.0])}, "'a'"),
    "offsets one": ({"a": entry(offsets=[8])}, "'a'"),
    "offsets three": ({"a": entry(offsets=[0, 8, 16])}, "'a'"),
    "offsets text": ({"a": entry(offsets="08")}, "'a'"),
    "hole at the start": ({"a": entry(offsets=[8, 16])}, "hole"),
    "hole": ({"a": entry(), "b": entry(offsets=[16, 24])}, "hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps"),
    "two in one place": ({"a": entry(), "b": entry()}, "overlaps"),
    "empty one in the middle of another": ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, "overlaps"),
    "ends outside": ({"a": entry("U8", [1000], [0, 1000])}, "end at byte"),
}


@pytest.mark.parametrize("header, says", ENTRIES.values(), ids=ENTRIES)
def test_a_hostile_header_is_refused(tmp_path: Path, header: dict[str, Any], says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(24)))
    assert_refused(tmp_path, tmp_path / "model.safetensors", says)


def test_a_header_of_nonsense_numbers_is_refused(tmp_path: Path) -> None:
    text = json.dumps(good_header())
    file = tmp_path / "model.safetensors"
    for place in places(good_header(), int):
        for bad in BAD_NUMBERS:
            header = json.loads(text)
            set_at(header, place, bad)
            put(file, safetensors_bytes(header, bytes(44)))
            if place[:2] == ("c", "shape") and type(bad) is int and 0 <= bad < 2**53:
                continue  # the other size of a tensor without elements
            with refused(FormatError, file):
                read_header(file)


@pytest.mark.parametrize("claim", [MAX_HEADER_NBYTES + 1, 1 << 40])
def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path: Path, claim: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", claim))
    os.truncate(file, claim + 100)  # sparse: the bytes it claims are there and take no room
    found = assert_refused(tmp_path, file, f"{claim:,}", f"{MAX_HEADER_NBYTES:,}")
    assert found[0].offset == 0  # type: ignore[attr-defined]


def test_a_header_of_100_mb_of_nothing_is_refused_quickly(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", MAX_HEADER_NBYTES))
    os.truncate(file, MAX_HEADER_NBYTES + 8)
    assert_refused(tmp_path, file, "JSON")


def test_a_shape_of_a_million_sizes_is_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    """The product of a million numbers of 53 bits takes minutes to compute."""
    sizes = ",".join(["9007199254740991"] * 1_000_000)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % sizes.encode(), b"x"))
    assert_refused(tmp_path, tmp_path / "model.safetensors", "dimensions")


def test_more_tensors_than_an_index_holds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    header = b"{%s}" % b",".join(b'"%d":0' % number for number in range(MAX_TENSORS + 1))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header))
    assert_refused(tmp_path, tmp_path / "model.safetensors", f"{MAX_TENSORS:,}")


# Directories


def _shard(path: Path, **tensors: float) -> None:
    """A file of one-number tensors, in the order given."""
    header = {name: entry("F32", [1], [4 * number, 4 * number + 4]) for number, name in enumerate(tensors)}
    path.write_bytes(safetensors_bytes(header, struct.pack(f"<{len(tensors)}f", *tensors.values())))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    _shard(tmp_path / "one.safetensors", a=1, b=2)
    _shard(tmp_path / "two.safetensors", c=3)
    _weight_map(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def _weight_map(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "./one.safetensors", ".hidden", "one.safetensors\0", "one.safetensors\n", "index.json", "x" * 5000, 5, None, ["one.safetensors"], {}]
)
def test_a_weight_map_that_points_outside_is_refused(sharded: Path, file: Any) -> None:
    _weight_map(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": file})
    assert_refused(sharded, sharded / INDEX, "'c'", "not a file of this directory")


@pytest.mark.parametrize("raw", [b"", b"hello", b"[]", b"null", b"5", b"{}", b'{"weight_map": null}', b'{"weight_map": []}', b'{"weight_map": "x"}', b'{"weight_map": {}}', b"\xff\xfe", b"[" * 500_000, b'{"weight_map":' * 100_000])
def test_an_index_of_shards_that_is_none_is_refused(sharded: Path, raw: bytes) -> None:
    put(sharded / INDEX, raw)
    assert_refused(sharded, sharded / INDEX, "weight_map")


def test_a_huge_index_of_shards_is_not_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX, MAX_HEADER_NBYTES + 1)
    assert_refused(sharded, sharded / INDEX, "at most")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    assert_refused(sharded, sharded / "two.safetensors", "missing", kind=CheckpointError)


def test_a_shard_that_lacks_a_tensor_is_named(sharded: Path) -> None:
    _weight_map(sharded, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"})
    assert_refused(sharded, sharded / "two.safetensors", "'d'")


def test_a_shard_that_has_a_tensor_too_many_is_named(sharded: Path) -> None:
    _shard(sharded / "two.safetensors", c=3, d=4)
    assert_refused(sharded, sharded / "two.safetensors", "'d'")


def test_one_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    _shard(sharded / "two.safetensors", c=3, a=9)
    assert_refused(sharded, sharded / "two.safetensors", "'a'")
    (sharded / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "a": "two.safetensors"}}')
    assert_refused(sharded, sharded / "one.safetensors", "'a'")


def test_shards_that_are_swapped_are_refused(sharded: Path) -> None:
    (sharded / "one.safetensors").rename(sharded / "three.safetensors")
    (sharded / "two.safetensors").rename(sharded / "one.safetensors")
    (sharded / "three.safetensors").rename(sharded / "two.safetensors")
    with refused(FormatError, sharded, "disagree"):
        convert_checkpoint(sharded, sharded / "out")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    os.truncate(sharded / "two.safetensors", (sharded / "two.safetensors").stat().st_size - 1)
    assert_refused(sharded, sharded / "two.safetensors", "end at byte")


class _Boom:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_a_directory_of_pickles_is_refused_and_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / name, "wb") as file:
        pickle.dump(_Boom(), file)
    with refused(CheckpointError, tmp_path, "pickles"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with refused(FormatError, tmp_path / "model.safetensors"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("source", ["missing", "empty", "empty/model.safetensors", "two", "folder", "x" * 300, "nul\0byte", "loop", "pipe", "pipes", "links"])
def test_a_source_that_is_none_is_refused_and_nothing_hangs(tmp_path: Path, source: str) -> None:
    for folder in ("empty", "two", "folder", "folder/model.safetensors", "pipes", "links"):
        (tmp_path / folder).mkdir()
    for file in ("one", "two"):
        _shard(tmp_path / "two" / f"{file}.safetensors", a=1)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipes" / "weights.safetensors")
    (tmp_path / "links" / "model.safetensors").symlink_to("/dev/zero")
    with refused(CheckpointError, None):
        convert_checkpoint(tmp_path / source, tmp_path / "out")


def test_a_pipe_among_the_companions_is_left_out(tmp_path: Path) -> None:
    """It would never end; and so would a link to a device."""
    (tmp_path / "source").mkdir()
    _shard(tmp_path / "source" / "model.safetensors", a=1)
    os.mkfifo(tmp_path / "source" / "config.json")
    (tmp_path / "source" / "tokenizer.json").symlink_to("/dev/zero")
    (tmp_path / "deeper").mkdir()
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "deeper" / "out")
    assert checkpoint.index.companions == []


def test_code_and_weights_are_never_companions(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "deeper").mkdir()
    _shard(tmp_path / "source" / "model.safetensors", a=1)
    for name in ("modeling.py", "run.sh", "pytorch_model.bin", "data-00000.bin", "index.json", ".env.json", "config.json", "x.pickle", "lib.so"):
        (tmp_path / "source" / name).write_bytes(b"{}")
    checkpoint = convert_checkpoint(tmp_path / "source", tmp_path / "deeper" / "out")
    assert [companion.file for companion in checkpoint.index.companions] == ["config.json"]


@pytest.mark.parametrize("target", [".", "..", "sub/.."])
def test_a_source_is_not_overwritten_by_its_own_checkpoint(tmp_path: Path, target: str) -> None:
    from sllm_mini.checkpoint import WriteOptions

    source = tmp_path / "models" / "one"
    (source / "sub").mkdir(parents=True)
    _shard(source / "model.safetensors", a=1)
    with refused(CheckpointExistsError, None, "delete"):
        convert_checkpoint(source, source / target, options=WriteOptions(overwrite=True))
    assert (source / "model.safetensors").exists()


# Fuzzing: what we accept, the safetensors library accepts too, and reads the same


def _mutated(text: bytes, spots: list[tuple[str | int, ...]], source: random.Random) -> Any:
    header = json.loads(text)
    for _ in range(source.choice((1, 1, 2, 3))):
        place = source.choice(spots)
        if not place:
            continue
        parent: Any = header
        try:
            for step in place[:-1]:
                parent = parent[step]
            value = parent[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
        if not isinstance(parent, (dict, list)):
            continue  # or put a text there
        container: Any = parent
        roll = source.random()
        if roll < 0.4:
            container[place[-1]] = source.choice((0, 1, 2, 3, 4, 8, 24, 40, 44, -1, 2**31, 2**63, 2**64, 0.5, 2.0, True, None, "", "F32", "I8", "U8", "BOOL", "F16", "C64", [], {}, [1], [0, 8]))
        elif roll < 0.7 and type(value) is int:
            container[place[-1]] = value + source.choice((-8, -4, -1, 1, 4, 8))
        elif roll < 0.8 and isinstance(parent, list):
            container.append(value)
        elif roll < 0.9:
            del container[place[-1]]
        elif isinstance(parent, dict):
            container[source.choice(("a", "z", "dtype", "shape", "__metadata__"))] = value
    return header


def _fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    source = random.Random(seed)
    file = folder / "model.safetensors"
    header, data = good_header(), bytes(range(44))
    good, text = safetensors_bytes(header, data), json.dumps(header).encode()
    spots = list(places(header, (int, str, list, dict)))
    accepted = refusals = 0
    for number in range(count):
        if number % 3:
            raw = safetensors_bytes(_mutated(text, spots, source), data)
        else:
            damaged = bytearray(good)
            for _ in range(source.choice((1, 1, 2, 6))):
                damaged[source.randrange(len(damaged) - len(data))] = source.randrange(256)
            raw = bytes(damaged[: source.randrange(len(damaged))] if source.random() < 0.2 else damaged)
        put(file, raw)
        try:
            entries = read_header(file)
        except CheckpointError as error:
            assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 3000, str(error)[:3000]
            refusals += 1
            continue
        ours = {found.name: (list(found.shape), raw[found.offset : found.offset + found.nbytes]) for found in entries}
        theirs = {name: (list(found["shape"]), bytes(found["data"])) for name, found in safetensors.deserialize(raw)}
        assert ours == theirs, raw
        accepted += 1
    return accepted, refusals


def test_fuzzed_headers_are_refused_or_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    with nothing_left():
        accepted, refusals = _fuzz(tmp_path, 1500, seed=1)
    assert accepted > 50 and refusals > 1000, (accepted, refusals)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_hundred_thousand_fuzzed_headers(tmp_path: Path, seed: int) -> None:
    with nothing_left():
        accepted, refusals = _fuzz(tmp_path, 10_000, seed)
    assert accepted > 300 and refusals > 5000, (accepted, refusals)


def test_a_fuzzed_source_converts_whole_or_not_at_all(tmp_path: Path) -> None:
    """The whole way, a few times: a target is there and verified, or it is not there."""
    source = random.Random(3)
    header, data = good_header(), torch.arange(44, dtype=torch.uint8).numpy().tobytes()
    text, spots = json.dumps(header).encode(), list(places(header, (int, str, list, dict)))
    folder = tmp_path / "model"
    folder.mkdir()
    converted = 0
    for number in range(150):
        put(folder / "model.safetensors", safetensors_bytes(_mutated(text, spots, source), data))
        target = tmp_path / "results" / str(number)
        try:
            convert_checkpoint(folder, target)
        except CheckpointError as error:
            assert str(folder) in str(error)
            assert not target.exists()
            continue
        load_tensors(target)
        converted += 1
    assert 3 < converted < 100
    assert len(os.listdir(tmp_path / "results")) == converted
