"""Chapter 01: checkpoints that are damaged or lie. Each is refused in one typed sentence that names the file; the lies
stand under a right digest, so that it is not the digest that finds them."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_mini.checkpoint import export_safetensors, open_checkpoint, verify_checkpoint
from sllm_mini.checkpoint.index import INDEX_FILE, MAX_INDEX_NBYTES, MAX_TENSORS, decode_index, partition_file
from sllm_mini.errors import CheckpointError, FormatError, IntegrityError, SllmError, WriteError
from sllm_mini.loading import LoadOptions, load_tensors

from .tools import (
    BAD_NUMBERS,
    nothing_left,
    places,
    put,
    read_body,
    refused,
    reseal,
    seal,
    set_at,
    small_checkpoint,
    write_body,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("pristine") / "model").path


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def assert_refused_everywhere(model: Path, kind: type[SllmError], place: Path, *says: str) -> None:
    for use in (open_checkpoint, verify_checkpoint, load_tensors):
        with refused(kind, place, *says, maps=use is load_tensors):
            use(model)


# Files that are not what the index says


@pytest.mark.parametrize("file", ["data-00000.bin", "data-00003.bin", "config.json"])
@pytest.mark.parametrize("missing_nbytes", [1, 100, None])
def test_a_truncated_file_is_named_with_the_byte_where_it_ends(model: Path, file: str, missing_nbytes: int | None) -> None:
    size = (model / file).stat().st_size
    left = 0 if missing_nbytes is None else max(size - missing_nbytes, 0)
    os.truncate(model / file, left)
    with refused(IntegrityError, model / file, "truncated", f"{left:,}") as found:
        open_checkpoint(model)
    assert isinstance(found[0], IntegrityError) and found[0].offset == left
    assert_refused_everywhere(model, IntegrityError, model / file)


@pytest.mark.parametrize("file", ["data-00001.bin", "tokenizer.json"])
def test_a_file_that_is_too_long_is_named(model: Path, file: str) -> None:
    with open(model / file, "ab") as stream:
        stream.write(b"\0")
    assert_refused_everywhere(model, IntegrityError, model / file, "too long")


@pytest.mark.parametrize("file", ["data-00000.bin", "data-00002.bin", "config.json"])
def test_a_missing_file_is_named(model: Path, file: str) -> None:
    (model / file).unlink()
    assert_refused_everywhere(model, IntegrityError, model / file, "missing")


@pytest.mark.parametrize("file", ["data-00007.bin", "data-99999.bin", "data-00000.bin.bak"])
def test_an_extra_partition_is_named(model: Path, file: str) -> None:
    (model / file).write_bytes(bytes(4096))
    assert_refused_everywhere(model, IntegrityError, model / file, "not listed")


def _as_link(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def _as_link_inside(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def _as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("change", [_as_link, _as_link_inside, _as_folder, _as_pipe, _as_socket, _as_device])
@pytest.mark.parametrize("file", [INDEX_FILE, "data-00000.bin", "data-00002.bin", "config.json"])
def test_only_plain_files_are_opened_and_nothing_hangs(model: Path, file: str, change: Callable[[Path], None]) -> None:
    change(model / file)
    assert_refused_everywhere(model, CheckpointError, model / file)


def test_a_partition_that_turns_into_a_link_after_opening_is_not_followed(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    _as_link(model / "data-00002.bin")
    with refused(FormatError, model / "data-00002.bin", "symbolic link"):
        load_tensors(checkpoint)
    with refused(FormatError, model / "data-00002.bin", "symbolic link"):
        verify_checkpoint(checkpoint)


def test_a_checkpoint_that_was_replaced_after_opening_is_not_read_as_a_mixture(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    small_checkpoint(model, seed=1, overwrite=True)
    for use in (lambda: load_tensors(checkpoint, verify=False), lambda: verify_checkpoint(checkpoint), lambda: checkpoint.read_companion("config.json")):
        with refused(CheckpointError, model, "replaced"):
            use()


@pytest.mark.parametrize("path", ["missing", "file", "missing/deeper", "file/deeper", "x" * 300, "nul\0byte", "loop"])
def test_a_path_that_is_no_checkpoint(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    for use in (open_checkpoint, verify_checkpoint, load_tensors):
        with refused(CheckpointError, None):
            use(tmp_path / path)


def test_a_directory_of_safetensors_is_told_how_to_become_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(CheckpointError, tmp_path, "sllm-mini convert"):
        open_checkpoint(tmp_path)


# Flipped bits


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(pristine: Path, data: st.DataObject) -> None:
    file = pristine / data.draw(st.sampled_from(sorted(os.listdir(pristine))))
    raw = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(raw)
    damaged[at] ^= 1 << bit
    put(file, bytes(damaged))
    try:
        with refused(CheckpointError, file):
            verify_checkpoint(pristine, threads=1)
    finally:
        put(file, raw)


def test_every_bit_of_the_padding_and_of_the_companions_is_found(pristine: Path, model: Path) -> None:
    index = open_checkpoint(pristine).index
    ends: dict[int, int] = {}
    for tensor in index.tensors:
        ends[tensor.partition] = max(ends.get(tensor.partition, 0), tensor.offset + tensor.nbytes)
    padded = [(partition_file(number), end, index.partitions[number].nbytes) for number, end in ends.items()]
    assert any(end < nbytes for _, end, nbytes in padded)
    for file, start, end in [*padded, ("config.json", 0, (pristine / "config.json").stat().st_size)]:
        for at in {start, (start + end) // 2, end - 1} if start < end else set():
            raw = bytearray((pristine / file).read_bytes())
            raw[at] ^= 0x10
            (model / file).write_bytes(raw)
            with refused(IntegrityError, model / file):
                verify_checkpoint(model)
        shutil.copy(pristine / file, model / file)
    verify_checkpoint(model)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\n", lambda raw: raw + b" ", lambda raw: b" " + raw, lambda raw: raw[:-1] + b",}", lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw + raw])
def test_an_index_has_exactly_the_bytes_that_were_written(model: Path, change: Callable[[bytes], bytes]) -> None:
    (model / INDEX_FILE).write_bytes(change((model / INDEX_FILE).read_bytes()))
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE)


# Indexes that are no index


NOT_AN_INDEX: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"1e999",
    "nan": b"NaN",
    "not UTF-8": b'{"magic":"\xff\xfe"}',
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 1_000_000,
    "deep body": seal(b"[" * 500_000 + b"]" * 500_000),
    "zeros": bytes(10_000),
    "pickle": b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "body is null": seal(b"null"),
    "body is a list": seal(b"[]"),
    "body is empty": seal(b"{}"),
    "body is NaN": seal(b"NaN"),
    "body is text": seal(b'"' + b"x" * 100_000 + b'"'),
    "long unknown key": seal(b'{"' + b"k" * 1_000_000 + b'":1}'),
    "long unknown key outside": b'{"' + b"k" * 1_000_000 + b'":1}',
    "keys twice outside": b'{"magic":"sllm-mini-checkpoint",' + seal(b"{}")[1:],
}


@pytest.mark.parametrize("raw", NOT_AN_INDEX.values(), ids=NOT_AN_INDEX)
def test_what_is_no_index_is_refused(model: Path, raw: bytes) -> None:
    (model / INDEX_FILE).write_bytes(raw)
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE)


def test_an_index_of_another_kind_or_version_says_which(model: Path) -> None:
    raw = (model / INDEX_FILE).read_bytes()
    for old, new, says in (
        (b'"version":1', b'"version":2', "version 2"),
        (b'"version":1', b'"version":-1', "version -1"),
        (b'"version":1', b'"version":1.0', "version"),
        (b'"version":1', b'"version":18446744073709551616', "version"),
        (b"sllm-mini-checkpoint", b"somebody-elses-index", "somebody-elses-index"),
        (b'"magic":', b'"magik":', "magi"),
    ):
        (model / INDEX_FILE).write_bytes(raw.replace(old, new, 1))
        assert_refused_everywhere(model, FormatError, model / INDEX_FILE, says)


def test_an_index_that_is_too_large_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(model / INDEX_FILE, MAX_INDEX_NBYTES + 1)  # sparse: it takes no room
    monkeypatch.setattr("sllm_mini.checkpoint.directory.decode_index", lambda *_: pytest.fail("it was read"))
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE, f"{MAX_INDEX_NBYTES:,}")


@pytest.mark.parametrize("tensors", [MAX_TENSORS + 1, 1_000_000])
def test_a_million_tensors_are_refused(model: Path, tensors: int) -> None:
    body = read_body(model)
    entry = json.dumps(body["tensors"][0], separators=(",", ":"))
    body["tensors"] = ["HERE"]
    text = json.dumps(body, separators=(",", ":")).replace('"HERE"', ",".join([entry] * tensors))
    with refused(FormatError, model / INDEX_FILE, f"{MAX_TENSORS}"):
        decode_index(seal(text.encode()), model / INDEX_FILE)


@pytest.mark.parametrize("field", ["partitions", "layers", "companions", "composites"])
def test_too_many_of_anything_are_refused(model: Path, field: str) -> None:
    body = read_body(model)
    body[field] = [{**body[field][0], "meta": {}} if field == "composites" else body[field][0]] * (MAX_TENSORS + 1)
    write_body(model, body)
    with refused(FormatError, model / INDEX_FILE):
        open_checkpoint(model)


# Lies under a right digest


_FREE_TEXT = {"name", "layers", "meta", "kind", "digests", "digest", "parts"}


def test_every_number_is_checked(model: Path) -> None:
    """No number of the index may be anything that its place does not allow."""
    body = read_body(model)
    text = json.dumps(body)
    numbers = [place for place in places(body, int) if "meta" not in place]
    assert len(numbers) > 100
    for place in numbers:
        # The other sizes of a tensor without elements mean nothing; a companion's is held against its file (see below).
        free = place[0] == "companions" or (place[0] == "tensors" and body["tensors"][place[1]]["name"] == "empty")
        for bad in (*BAD_NUMBERS, 2**31):
            if free and type(bad) is int and 0 <= bad < 2**53:
                continue
            changed = json.loads(text)
            set_at(changed, place, bad)
            raw = seal(json.dumps(changed, separators=(",", ":")).encode())
            with pytest.raises(FormatError) as caught:
                decode_index(raw, model / INDEX_FILE)
                pytest.fail(f"{bad!r} was accepted at {place}")
            assert str(model / INDEX_FILE) in str(caught.value) and len(str(caught.value)) < 2000, (place, bad)


def test_every_number_off_by_a_little_is_a_lie_or_harmless(model: Path) -> None:
    """A number one more, one less, zero or doubled is refused, or describes tensors that lie inside the files."""
    body = read_body(model)
    text, refusals = json.dumps(body), 0
    for place in [place for place in places(body, int) if "meta" not in place]:
        for change in (lambda n: n + 1, lambda n: max(n - 1, 0), lambda n: 2 * n + 4096):
            changed = json.loads(text)
            value: Any = changed
            for step in place:
                value = value[step]
            set_at(changed, place, change(value))
            write_body(model, changed)
            refusals += not _opens_and_loads_or_is_refused(model)
    assert refusals > 200


def test_every_text_is_checked(model: Path) -> None:
    """Names of files, codecs and dtypes are taken from fixed lists; nothing in the index can point outside."""
    body = read_body(model)
    text = json.dumps(body)
    texts = [place for place in places(body, str) if not _FREE_TEXT & set(place)]
    assert {place[-1] for place in texts} == {"file", "codec", "dtype"}
    for place in texts:
        for bad in ("", "..", "../data-00000.bin", "/etc/passwd", "a\0b", "x" * 100_000, "index.json", "qint8"):
            changed = json.loads(text)
            set_at(changed, place, bad)
            write_body(model, changed)
            with refused(CheckpointError, model, maps=False):
                open_checkpoint(model)


def _tensor(body: dict[str, Any], name: str) -> dict[str, Any]:
    return next(tensor for tensor in body["tensors"] if tensor["name"] == name)


def _overlap(body: dict[str, Any]) -> None:
    first, second = _tensor(body, "model.layers.0.up.weight"), _tensor(body, "model.layers.0.ids")
    second.update(partition=first["partition"], offset=first["offset"] + 8)


def _huge_expanded(body: dict[str, Any]) -> None:
    _tensor(body, "scalar").update(shape=[2**53 - 1, 2**53 - 1], stride=[0, 0])


def _many_dimensions(body: dict[str, Any]) -> None:
    _tensor(body, "scalar").update(shape=[1] * 1000, stride=[1] * 1000)


def _other_partition(body: dict[str, Any]) -> None:
    _tensor(body, "lm_head.weight").update(partition=3, offset=0)


def _part_twice(body: dict[str, Any]) -> None:
    body["composites"].append({**body["composites"][0], "name": "again"})


def _part_in_two_roles(body: dict[str, Any]) -> None:
    parts = body["composites"][0]["parts"]
    parts["values"] = parts["indices"]


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "total too small": (lambda b: b.update(total_nbytes=b["total_nbytes"] - 4096), "add up"),
    "total 2^53-1": (lambda b: b.update(total_nbytes=2**53 - 1), "add up"),
    "other blocks": (lambda b: b.update(block_nbytes=512), "blocks of 4096"),
    "other chunks": (lambda b: b.update(chunk_nbytes=1 << 30), "chunks"),
    "other leaves": (lambda b: b.update(leaf_nbytes=1), "leaves"),
    "no partitions": (lambda b: b.update(partitions=[]), "add up"),
    "partition order": (lambda b: b["partitions"].reverse(), "is named"),
    "partition file outside": (lambda b: b["partitions"][1].update(file="../outside.bin"), "data-00001.bin"),
    "partition file absolute": (lambda b: b["partitions"][1].update(file="/etc/passwd"), "data-00001.bin"),
    "codec": (lambda b: b["partitions"][0].update(codec="zstd"), "codec 'zstd'"),
    "size on disk": (lambda b: b["partitions"][0].update(file_nbytes=b["partitions"][0]["file_nbytes"] + 4096), "whole blocks"),
    "digest missing": (lambda b: b["partitions"][0].update(digests=""), "digests"),
    "digest too many": (lambda b: b["partitions"][0].update(digests=b["partitions"][0]["digests"] * 2), "digests"),
    "digest not hexadecimal": (lambda b: b["partitions"][0].update(digests="g" * 16), "hexadecimal"),
    "digest upper case": (lambda b: b["partitions"][0].update(digests="A" * 16), "hexadecimal"),
    "tensor in no partition": (lambda b: b["tensors"][0].update(partition=99), "does not exist"),
    "tensor ends outside": (lambda b: b["tensors"][0].update(offset=2**53 - 8), "outside"),
    "tensor misaligned": (lambda b: _tensor(b, "model.layers.0.ids").update(offset=4), "misaligned"),
    "tensor too long": (lambda b: b["tensors"][0].update(nbytes=b["tensors"][0]["nbytes"] + 4), "do not span"),
    "shape larger": (lambda b: b["tensors"][0].update(shape=[49, 16]), "do not span"),
    "shape overflows 64 bits": (lambda b: b["tensors"][0].update(shape=[2**32, 2**32], nbytes=0), "elements"),
    "shape without strides": (lambda b: b["tensors"][0].update(stride=[16]), "strides"),
    "stride leads outside": (lambda b: b["tensors"][0].update(stride=[2**40, 1], nbytes=(47 * 2**40 + 16) * 4), "outside"),
    "expanded beyond counting": (_huge_expanded, "elements"),
    "a thousand dimensions": (_many_dimensions, "dimensions"),
    "dtype unknown": (lambda b: b["tensors"][0].update(dtype="float33"), "unknown dtype 'float33'"),
    "dtype an attribute of torch": (lambda b: b["tensors"][0].update(dtype="load"), "unknown dtype"),
    "dtype quantised": (lambda b: b["tensors"][0].update(dtype="qint8"), "unknown dtype"),
    "storages overlap": (_overlap, "overlap"),
    "storage in two partitions": (_other_partition, "another partition"),
    "same name twice": (lambda b: b["tensors"][1].update(name=b["tensors"][0]["name"]), "two tensors are named"),
    "name empty": (lambda b: b["tensors"][0].update(name=""), "name"),
    "name too long": (lambda b: b["tensors"][0].update(name="n" * 1025), "name"),
    "layers out of order": (lambda b: b["tensors"].reverse(), "execution order"),
    "layer that is not there": (lambda b: b["tensors"][-1].update(layer=2**31 - 1), "execution order"),
    "no layers": (lambda b: b.update(layers=[]), "execution order"),
    "composite without its part": (lambda b: b["composites"][0]["parts"].update(values="nobody"), "'nobody'"),
    "composite without parts": (lambda b: b["composites"][0].update(parts={}), "no parts"),
    "composite with a tensor's name": (lambda b: b["composites"][0].update(name="scalar"), "two tensors are named"),
    "part of two composites": (_part_twice, "used twice"),
    "part in two roles": (_part_in_two_roles, "used twice"),
    "companion outside": (lambda b: b["companions"][0].update(file="../config.json"), "../config.json"),
    "companion absolute": (lambda b: b["companions"][0].update(file="/etc/passwd"), "/etc/passwd"),
    "companion in a folder": (lambda b: b["companions"][0].update(file="a/b.json"), "a/b.json"),
    "companion hidden": (lambda b: b["companions"][0].update(file=".bashrc"), ".bashrc"),
    "companion is the index": (lambda b: b["companions"][0].update(file="index.json"), "index.json"),
    "companion is a partition": (lambda b: b["companions"][0].update(file="data-00000.bin"), "data-00000.bin"),
    "companion with a line break": (lambda b: b["companions"][0].update(file="a\nb"), "a\\nb"),
    "companion twice": (lambda b: b["companions"].append(b["companions"][0]), "two companion files"),
    "companion digest": (lambda b: b["companions"][0].update(digest="xyz"), "digest"),
    "unknown field in the body": (lambda b: b.update(run="rm -rf"), "unknown field"),
    "unknown field in a tensor": (lambda b: b["tensors"][0].update(code="x"), "unknown field"),
    "unknown field in a partition": (lambda b: b["partitions"][0].update(url="http://x"), "unknown field"),
    "field missing": (lambda b: b["tensors"][0].pop("stride"), "missing required field"),
}  # fmt: skip


@pytest.mark.parametrize("change, says", LIES.values(), ids=LIES)
def test_a_lie_under_a_right_digest_is_named(model: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    reseal(model, change)
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE, says)


@pytest.mark.parametrize("size", [0, 1, 10**6, 2**53 - 1])
def test_a_companion_whose_size_is_a_lie_is_named(model: Path, size: int) -> None:
    reseal(model, lambda body: body["companions"][0].update(nbytes=size))
    assert_refused_everywhere(model, IntegrityError, model / "config.json")


def test_a_partition_whose_size_is_a_lie_is_found_before_memory_is_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim_a_terabyte(body: dict[str, Any]) -> None:
        nbytes = 1 << 40
        body["total_nbytes"] += nbytes - body["partitions"][0]["nbytes"]
        body["partitions"][0].update(nbytes=nbytes, file_nbytes=nbytes, digests="0" * 16 * (nbytes >> 21))

    reseal(model, claim_a_terabyte)
    monkeypatch.setattr("sllm_mini.device.cpu.CpuDevice.allocate", lambda *_: pytest.fail("memory was asked for"))
    assert_refused_everywhere(model, IntegrityError, model / "data-00000.bin", "truncated")


@pytest.mark.parametrize("old, new", [(b'"block_nbytes":4096', b'"block_nbytes":4096,"block_nbytes":4096'), (b'"layers":', b'"layers":[],"layers":'), (b'"device":null', b'"device":0,"device":null'), (b'"stride":', b'"stride":[0],"stride":'), (b'"kind":', b'"kind":"os.system","kind":'), (b'"coalesced":', b'"coalesced":true,"coalesced":')])
def test_a_key_that_stands_twice_is_found(model: Path, old: bytes, new: bytes) -> None:
    body = (model / INDEX_FILE).read_bytes().split(b'"body":', 1)[1][:-1]
    assert old in body
    write_body(model, body.replace(old, new, 1))
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE, "canonical")


@pytest.mark.parametrize("old, new", [(b":", b": "), (b'"scalar"', b'"\\u0073calar"'), (b'"scalar"', b'"\\ud800"'), (b'"scalar"', b'"\xff"'), (b'"offset":0', b'"offset":-0'), (b'"offset":0', b'"offset":0e0'), (b'"offset":0', b'"offset":00'), (b'"offset":0', b'"offset":NaN'), (b'"offset":0', b'"offset":Infinity'), (b'"offset":0', b'"offset":1e999')])
def test_other_spellings_of_the_same_index_are_refused(model: Path, old: bytes, new: bytes) -> None:
    body = (model / INDEX_FILE).read_bytes().split(b'"body":', 1)[1][:-1]
    assert old in body
    write_body(model, body.replace(old, new, 1))
    assert_refused_everywhere(model, FormatError, model / INDEX_FILE)


# Composites: nothing in a file can name code to run


@pytest.mark.parametrize("kind", ["os.system", "torch.nn.Linear", "builtins.eval", "antigravity.Tensor", "torch.sparse_coo_tensor", "torch.SPARSE_COO", "x" * 1000])
def test_a_composite_that_is_not_on_the_list_is_refused_before_a_byte_is_read(model: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    reseal(model, lambda body: body["composites"][0].update(kind=kind))
    verify_checkpoint(model)  # its bytes are in order, and looking at them runs nothing
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("bytes were read"))
    with refused(FormatError, model, "allow-list"):
        load_tensors(model)
    assert "antigravity" not in sys.modules


_BAD_META: list[dict[str, Any]] = [
    {},
    {"shape": [3, 2]},
    {"shape": [1, 1], "coalesced": False},
    {"shape": [-3, 2], "coalesced": False},
    {"shape": [2**62, 2**62], "coalesced": False},
    {"shape": [2**64, 2], "coalesced": False},
    {"shape": [10**30, 2], "coalesced": False},
    {"shape": [3.5, 2], "coalesced": False},
    {"shape": "32", "coalesced": False},
    {"shape": None, "coalesced": False},
    {"shape": [3, 2, 1], "coalesced": False},
    {"shape": [3, 2], "coalesced": "maybe"},
]


@pytest.mark.parametrize("meta", _BAD_META)
@pytest.mark.parametrize("kind", ["torch.sparse_coo", "torch.sparse_csr", "torch.sparse_bsc", "torch.per_tensor_affine", "torch.per_channel_affine"])
def test_a_composite_that_cannot_be_built_says_so(model: Path, kind: str, meta: dict[str, Any]) -> None:
    reseal(model, lambda body: body["composites"][0].update(kind=kind, meta=meta))
    with refused(FormatError, model, "'mask'", "cannot be built"):
        load_tensors(model)


@pytest.mark.parametrize("meta, says", [({"axis": 2}, "axis"), ({"axis": -1}, "axis"), ({"axis": 0}, "axis"), ({"axis": 2**40}, "axis"), ({"axis": None}, "axis"), ({"axis": 1, "dtype": "quint8"}, "quint8"), ({"axis": 1, "dtype": "float32"}, "float32"), ({"axis": 1, "dtype": ["qint8"]}, "qint8")])
def test_a_quantised_tensor_whose_scales_do_not_fit_is_refused(tmp_path: Path, meta: dict[str, Any], says: str) -> None:
    import torch

    from sllm_mini.checkpoint import save_checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says, once a process, that these dtypes will go
        quantised = torch.quantize_per_channel(torch.randn(4, 3), torch.ones(3), torch.zeros(3, dtype=torch.long), 1, torch.qint8)
    save_checkpoint({"q": quantised}, tmp_path / "q")
    reseal(tmp_path / "q", lambda body: body["composites"][0]["meta"].update(meta))
    with refused(FormatError, tmp_path / "q", says):
        load_tensors(tmp_path / "q")


def test_an_expanded_tensor_is_not_exported_to_a_petabyte(model: Path, tmp_path: Path) -> None:
    """A stride of 0 is allowed and takes no room; written out it would, and the disk is asked first."""
    reseal(model, lambda body: _tensor(body, "scalar").update(shape=[2**50], stride=[0]))
    assert load_tensors(model)["scalar"].shape == (2**50,)
    with refused(WriteError, tmp_path, "free"):
        export_safetensors(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model"]


# Fuzzing: whatever stands there, the answer is a checkpoint whose tensors lie inside its files, or one typed error


def _opens_and_loads_or_is_refused(model: Path) -> bool:
    try:
        open_checkpoint(model)
    except CheckpointError as error:
        assert str(model) in str(error) and "\n" not in str(error) and len(str(error)) < 3000, str(error)[:3000]
        return False
    try:
        tensors = load_tensors(model, options=LoadOptions(threads=1))
    except CheckpointError as error:  # what only shows when it is built: a composite
        assert str(model) in str(error) and "\n" not in str(error), str(error)
        return False
    for tensor in tensors.values():
        if tensor.layout is not None and str(tensor.layout) == "torch.strided" and tensor.numel():
            reach = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            assert reach * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return True


_VALUES: list[Any] = [0, 1, -1, 2, 3, 255, 4096, 2**21, 2**31, 2**53 - 1, 2**63, 2**64, 0.0, 1.5, True, None, "", "x", "../x", "float16", "int64", "bool", "uint1", "complex128", [], {}, [0], [1, 1], [2**53 - 1], "0" * 16]


def _mutated(text: bytes, spots: list[tuple[str | int, ...]], source: random.Random) -> Any:
    """A few changes at random places: another value, a neighbour's value, a list or object with one thing more or less."""
    changed = json.loads(text)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        place = source.choice(spots)
        if not place:
            continue
        parent: Any = changed
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
        if roll < 0.35:
            container[place[-1]] = source.choice(_VALUES)
        elif roll < 0.55 and type(value) is int:
            container[place[-1]] = value + source.choice((-4096, -8, -1, 1, 8, 4096))
        elif roll < 0.75 and isinstance(parent, list):
            other = source.randrange(len(parent))
            container[place[-1]], container[other] = container[other], value
        elif roll < 0.85 and isinstance(parent, list):
            container.append(json.loads(json.dumps(value)))
        elif roll < 0.95:
            del container[place[-1]]
        elif isinstance(parent, dict):
            container[source.choice(("name", "shape", "offset", "unknown"))] = value
    return changed


def _fuzz(model: Path, count: int, seed: int) -> tuple[int, int]:
    source = random.Random(seed)
    body, raw = read_body(model), (model / INDEX_FILE).read_bytes()
    text, spots = json.dumps(body).encode(), list(places(body, (int, str, list, dict, type(None))))
    opened = refusals = 0
    for number in range(count):
        if number % 4:
            write_body(model, _mutated(text, spots, source))
        else:  # no digest helps: every such change must be found
            damaged = bytearray(raw)
            for _ in range(source.choice((1, 1, 2, 8))):
                damaged[source.randrange(len(damaged))] = source.randrange(256)
            cut = source.randrange(len(damaged)) if source.random() < 0.2 else len(damaged)
            if damaged[:cut] == raw:
                continue
            put(model / INDEX_FILE, bytes(damaged[:cut]))
        if _opens_and_loads_or_is_refused(model):
            assert number % 4, "a damaged index was accepted"
            opened += 1
        else:
            refusals += 1
    return opened, refusals


def test_fuzzed_indexes_are_refused_or_harmless(model: Path) -> None:
    with nothing_left():
        opened, refusals = _fuzz(model, 1500, seed=1)
    assert opened > 20 and refusals > 1000, (opened, refusals)  # both branches were seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_hundred_thousand_fuzzed_indexes(model: Path, seed: int) -> None:
    with nothing_left():
        opened, refusals = _fuzz(model, 10_000, seed)
    assert opened > 100 and refusals > 5000, (opened, refusals)
