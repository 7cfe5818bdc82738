"""What the tests of bad input share: a small checkpoint, indexes that lie under a right digest, and proof that a
refused call said what was wrong and left nothing behind."""

from __future__ import annotations

import gc
import json
import os
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sllm_mini.checkpoint import Checkpoint, WriteOptions, open_checkpoint
from sllm_mini.checkpoint.hashing import bytes_digest
from sllm_mini.checkpoint.index import INDEX_FILE, MAGIC, VERSION
from sllm_mini.checkpoint.torch_source import torch_source
from sllm_mini.checkpoint.writer import write_checkpoint
from sllm_mini.errors import SllmError

BAD_NUMBERS: list[Any] = [-1, -(2**63), 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, 0.5, 1.0, 1e300, True, None, "1", [1], {}]
"""What JSON may put where a size belongs."""
COMPANIONS: dict[str, bytes | Path] = {"config.json": b'{"model_type": "llama"}\n', "tokenizer.json": b"{}" * 50}


def small_tensors(seed: int = 0) -> dict[str, Any]:
    """A bit of everything: layers, a tie, a view, an empty and a 0-d tensor, a sparse composite."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(48, 16, generator=generator)
    tensors: dict[str, Any] = {"model.embed_tokens.weight": embedding}
    for number in range(3):
        tensors[f"model.layers.{number}.up.weight"] = torch.randn(40, 16, generator=generator)
        tensors[f"model.layers.{number}.ids"] = torch.arange(100 * number, 100 * number + 90)
    tensors["model.norm.weight"] = torch.randn(16, generator=generator).to(torch.bfloat16)
    tensors["view"] = embedding.t()[3:7]
    tensors["empty"] = torch.empty(0, 5)
    tensors["scalar"] = torch.tensor(True)
    tensors["mask"] = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([3.0, 4.0]), (3, 2), check_invariants=True)
    tensors["lm_head.weight"] = embedding
    return tensors


def small_checkpoint(path: Path, *, seed: int = 0, overwrite: bool = False) -> Checkpoint:
    """`small_tensors` in four partitions with two companion files: about 30 KB in all."""
    source = replace(torch_source(small_tensors(seed)), companions=COMPANIONS)
    write_checkpoint(source, path, WriteOptions(partition_nbytes=4096, threads=1, overwrite=overwrite), None)
    return open_checkpoint(path)


def large_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Seven tensors of 1.5 to 3 MiB: with partitions of 6 MB, nine chunks in three files."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{n}.w": torch.randint(0, 256, ((3 + n % 4) << 19,), dtype=torch.uint8, generator=generator) for n in range(7)}


def seal(body: bytes) -> bytes:
    """The bytes of an `index.json` around any body, with the digest that belongs to it."""
    return b'{"magic":"%s","version":%d,"digest":"%s","body":%s}' % (MAGIC.encode(), VERSION, bytes_digest(body).encode(), body)


def read_body(path: Path) -> dict[str, Any]:
    """The body of a checkpoint's index as plain JSON values."""
    return json.loads((path / INDEX_FILE).read_bytes())["body"]


def write_body(path: Path, body: Any) -> None:
    """Puts a changed body in the place of a checkpoint's own, in canonical form and under its right digest, so that
    the checks behind the digest are reached. Bytes are taken as they are."""
    put(path / INDEX_FILE, seal(body if isinstance(body, bytes) else msgspec.json.encode(body)))


def put(file: Path, content: bytes) -> None:
    """Puts a new file in the place of one. Cheaper than writing over it, which makes ext4 flush it to the disk."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the body of a checkpoint's index in place."""
    body = read_body(path)
    change(body)
    write_body(path, body)


def set_at(body: Any, place: tuple[str | int, ...], value: Any) -> None:
    """`body[place[0]][place[1]]… = value`."""
    for step in place[:-1]:
        body = body[step]
    body[place[-1]] = value


def places(value: Any, kind: type | tuple[type, ...], here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where in nested JSON values those of a type stand."""
    if type(value) is kind or (isinstance(kind, tuple) and type(value) in kind):
        yield here
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, kind, (*here, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, kind, (*here, number))


def safetensors_bytes(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file around any header, with any claim about its length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def _open_files() -> dict[str, str]:
    files = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            files[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of this very listing
    return files


def _mapped_partitions() -> int:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return sum("/data-" in line or ".safetensors" in line for line in file)


@contextmanager
def nothing_left(*, maps: bool = True) -> Iterator[None]:
    """Fails if the block leaves a thread, a descriptor or (unless `maps` is false: the kernel takes milliseconds to
    list them) a mapping of a weight file behind."""
    threads, files, mappings = set(threading.enumerate()), _open_files(), _mapped_partitions() if maps else 0
    yield
    if (maps and _mapped_partitions() > mappings) or _open_files().keys() - files.keys():
        gc.collect()  # what only a traceback's cycle still holds goes with the next collection
    assert {thread.name for thread in threading.enumerate() if thread not in threads} == set(), "threads are left"
    assert {name: file for name, file in _open_files().items() if name not in files} == {}, "descriptors are left"
    assert not maps or _mapped_partitions() <= mappings, "mappings are left"


@contextmanager
def refused(kind: type[SllmError], place: str | os.PathLike[str] | None, *says: str, maps: bool = False) -> Iterator[list[SllmError]]:
    """The block must raise `kind`, in one readable line that names `place` and says each of `says`, and leave nothing.
    The list holds the error afterwards. For `maps` see `nothing_left`."""
    found: list[SllmError] = []
    with nothing_left(maps=maps):
        try:
            yield found
        except SllmError as error:
            found.append(error)
            link: BaseException | None = error
            while link is not None:  # a traceback that is kept, here or by the machinery of `with`, keeps what its frames hold
                traceback.clear_frames(link.__traceback__)
                link.__traceback__, link = None, link.__context__
        if not found:
            pytest.fail(f"nothing was raised; {kind.__name__} was expected to say {says}")
        text = str(found[0])
        assert isinstance(found[0], kind), f"{type(found[0]).__name__}: {text}"
        assert "\n" not in text and len(text) < 3000, text[:3000]
        assert place is None or os.fspath(place) in text, text
        missing = [part for part in says if part not in text]
        assert not missing, f"{missing} not in: {text}"


def hidden(folder: Path) -> list[str]:
    """The hidden entries of a folder: what a writer is still busy with, or left when it was killed."""
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked process and returns how it ended, as `os.waitstatus_to_exitcode` says: 0, or 1 after an
    exception, or minus the signal. `work` must not use torch: its thread pool does not survive a fork."""
    return wait_for(start_child(work))


def start_child(work: Callable[[], object]) -> int:
    """The process id of a forked process that does `work`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    """How a child of `start_child` ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
