"""How much memory an engine may give to keys and values, from a trial run or from the record of one.

An engine that fills a GPU's memory with its KV pool must know what a step needs beside it. The usual way is a trial: the
longest prompt and the largest batch, run once at every start (vLLM's profile run). The answer depends on the model, the
device and the libraries only, so it is kept as a small JSON file and read at the next start (Medusa, ASPLOS'25; DeepServe's
offline memory profile). A record of another model, device, version or size is refused. Costs one trial the first time and
one read after. Taught in chapter 06.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sllm_mini.device.base import Device
from sllm_mini.device.cuda import CudaDevice
from sllm_mini.errors import FormatError, ModelError, OutOfMemoryError

VERSION = 1
_PACKAGES = ("torch", "transformers", "sllm_mini")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What a profile holds for. `model` names its weights (the digest of a checkpoint's index), `device` what computes."""

    model: str
    device: str
    dtype: str
    max_batch: int
    max_tokens: int
    versions: tuple[str, ...]

    @classmethod
    def of(cls, model: str, device: Device, dtype: str, *, max_batch: int, max_tokens: int) -> ProfileKey:
        """The key on this machine, now. Raises ValueError for sizes below 1."""
        if max_batch < 1 or max_tokens < 1:
            raise ValueError(f"a worst case of {max_batch} rows and {max_tokens} tokens is none; give at least 1 of each")
        name = device.properties().model if isinstance(device, CudaDevice) else device.name
        return cls(model, name, dtype, max_batch, max_tokens, tuple(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES))

    @property
    def file_name(self) -> str:
        """The same for other versions, so that a stale record is found, refused and replaced."""
        parts = (hashlib.sha256(self.model.encode()).hexdigest()[:16], self.device, self.dtype, f"b{self.max_batch}", f"t{self.max_tokens}")
        return re.sub(r"[^\w.-]+", "_", "-".join(parts)) + ".json"


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What a worst-case step takes beside weights, keys and values: `step_nbytes` at its peak. `kv_nbytes_per_token` is one
    token's keys and values, `trial_seconds` what finding this out took."""

    key: ProfileKey
    step_nbytes: int
    kv_nbytes_per_token: int
    trial_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}


@dataclass(frozen=True, slots=True)
class FoundProfile:
    """A profile, whether it was "recorded" or "measured" just now, the seconds that took, and why a record was not used."""

    profile: MemoryProfile
    state: Literal["recorded", "measured"]
    seconds: float
    note: str = ""


def pool_tokens(profile: MemoryProfile, free_nbytes: int, *, share: float = 0.95) -> int:
    """How many tokens' keys and values fit into `share` of the free memory beside a worst-case step: `kv_tokens` of an `Engine`.

    Pure. Raises OutOfMemoryError where not one sequence of the profile's length does, naming the figures.
    """
    tokens = int(free_nbytes * share - profile.step_nbytes) // profile.kv_nbytes_per_token
    if tokens < profile.key.max_tokens:
        need = profile.step_nbytes + profile.key.max_tokens * profile.kv_nbytes_per_token
        raise OutOfMemoryError(
            f"{free_nbytes / 1e9:.2f} GB are free, {share:.0%} of which may be used, and one sequence of {profile.key.max_tokens:,} tokens "
            f"needs {need / 1e9:.2f} GB with its step; ask for a shorter context"
        )
    return tokens


def find_profile(key: ProfileKey, folder: str | os.PathLike[str], model: Any, device: Device) -> FoundProfile:
    """The record of `key` in `folder`, or a trial with `model`, recorded there. A folder that cannot be written is a note.
    Raises what the trial raises."""
    path, started, notes = Path(folder) / key.file_name, time.perf_counter(), []
    try:
        return FoundProfile(read_profile(path, key), "recorded", time.perf_counter() - started)
    except FileNotFoundError:
        pass
    except (FormatError, ModelError, OSError) as error:
        notes.append(str(error))
    profile = measure_profile(key, model, device)
    try:
        write_profile(path, profile)
    except OSError as error:
        notes.append(f"the profile was not recorded: {error}")
    return FoundProfile(profile, "measured", time.perf_counter() - started, "; ".join(notes))


def read_profile(path: str | os.PathLike[str], key: ProfileKey) -> MemoryProfile:
    """A record. Raises FileNotFoundError, FormatError for a file that is not one, ModelError if it is of another `key`,
    naming what differs."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"its version is {document['version']}, not {VERSION}")
        own = ProfileKey(**{**document["key"], "versions": tuple(document["key"]["versions"])})
        profile = MemoryProfile(own, document["step_nbytes"], document["kv_nbytes_per_token"], float(document["trial_seconds"]))
        if not all(type(number) is int and number > 0 for number in (profile.step_nbytes, profile.kv_nbytes_per_token)):
            raise ValueError("its sizes are not positive whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"this is no memory profile ({error}); delete it", path=path) from error
    if own != key:
        wanted, found = asdict(key), asdict(own)
        differ = "; ".join(f"{name} {found[name]} instead of {wanted[name]}" for name in wanted if wanted[name] != found[name])
        raise ModelError(f"{os.fspath(path)} is the profile of something else ({differ}); it has to be measured anew")
    return profile


def write_profile(path: str | os.PathLike[str], profile: MemoryProfile) -> None:
    """Writes a record as a whole or not at all; makes the folder. Raises OSError."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(profile.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def measure_profile(key: ProfileKey, model: Any, device: Device) -> MemoryProfile:
    """The trial: one prefill of `max_tokens`, then one step of `max_batch` rows; the memory's peak less what keys and values
    took. On a CPU the peak is the process's, and so also holds what other threads took meanwhile."""
    import torch
    from transformers import DynamicCache

    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def run(rows: int, tokens: int) -> int:
        cache = DynamicCache(config=model.config)
        ids = torch.zeros((rows, tokens), dtype=torch.int64, device=device.name)
        model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only)
        layers: Any = cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    started = time.perf_counter()
    with torch.inference_mode():
        per_token = run(1, 1)  # also makes what a first call makes once and keeps
        peak, kv = peak_nbytes(device, lambda: run(1, key.max_tokens))
        batched, kv_batched = peak_nbytes(device, lambda: run(key.max_batch, 1))
    return MemoryProfile(key, max(peak - kv, batched - kv_batched, 1), per_token, time.perf_counter() - started)


def peak_nbytes(device: Device, work: Callable[[], int]) -> tuple[int, int]:
    """By how much memory in use grew at most during `work`, and what it returned. On a GPU torch's own count, on a CPU the
    resident memory of the process (Linux)."""
    if isinstance(device, CudaDevice):
        import torch

        torch.cuda.synchronize(device.index)
        torch.cuda.reset_peak_memory_stats(device.index)
        before = torch.cuda.memory_allocated(device.index)
        found = work()
        torch.cuda.synchronize(device.index)
        return torch.cuda.max_memory_allocated(device.index) - before, found
    _give_back_free_memory()
    _CLEAR.write_text("5")  # sets the high-water mark to what is resident now
    before = _resident("VmRSS")
    found = work()
    return max(_resident("VmHWM") - before, 0), found


def _give_back_free_memory() -> None:
    """What the C library keeps of memory that was freed is resident, and a step could hide in it."""
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise ModelError(f"{_STATUS} has no {field}; measure the profile on Linux")
    return int(match[1]) * 1024
