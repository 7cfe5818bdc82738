"""What a user would pick instead: each loader that exists, as its own documentation says it is used, one adapter each.

The settings are those that were fastest cold or warm on a CPU when tried, next to the defaults; each is its own entry.
Nothing of these packages is imported until a worker opens its adapter. Shown in chapter 02.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm_mini.errors import UnsupportedError
from sllm_mini.lab.bench.entry import Entry, Job
from sllm_mini.lab.bench.ours import model_tensors

if TYPE_CHECKING:
    import torch

    from sllm_mini.lab.bench.entry import Load

_HERE = "sllm_mini.lab.bench.peers"
_INSTANT = "it loads to CUDA devices only, as its documentation says"
_GPUDIRECT = "GPUDirect Storage moves bytes to a GPU only"
_STORE = "its loader allocates CUDA memory and has no CPU target"
_STORE_ADDRESS = "127.0.0.1:8073"


def _entry(name: str, opener: str, package: str, format: str = "safetensors", **rest: Any) -> Entry:
    return Entry(name, "peer", f"{_HERE}:{opener}", format, package, **rest)


def entries() -> list[Entry]:
    """Every peer in every setting worth naming."""
    runai, fast = "runai-model-streamer", "fastsafetensors"
    return [
        _entry("torch.load", "torch_load", "torch", "torch", setting="weights_only=True"),
        _entry("torch.load, mmap", "torch_load", "torch", "torch", setting="weights_only=True, mmap=True", arguments={"mmap": True}),
        _entry("safetensors load_file", "load_file", "safetensors"),
        _entry("safetensors load_file, pread", "load_file", "safetensors", setting='backend="pread"', arguments={"backend": "pread"}),
        _entry("safetensors safe_open", "safe_open", "safetensors", setting="get_tensor, one by one"),
        _entry("transformers from_pretrained", "from_pretrained", "transformers", setting='dtype="auto"', whole_model=True),
        _entry("Run:ai streamer", "runai", runai),
        _entry(
            "Run:ai streamer, 32 readers", "runai", runai,
            setting="RUNAI_STREAMER_CONCURRENCY=32", environment={"RUNAI_STREAMER_CONCURRENCY": "32"},
        ),
        _entry(
            "Run:ai streamer, buffered", "runai", runai,
            setting="RUNAI_STREAMER_FS_STRATEGY=sync_buffered", environment={"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"},
        ),
        _entry(
            "Run:ai streamer, io_uring buffered", "runai", runai,
            setting="RUNAI_STREAMER_FS_STRATEGY=io_uring_buffered", environment={"RUNAI_STREAMER_FS_STRATEGY": "io_uring_buffered"},
        ),
        _entry("fastsafetensors", "fastsafetensors", fast, setting="nogds=True"),
        _entry(
            "fastsafetensors, buffered", "fastsafetensors", fast,
            setting="nogds=True, FASTSAFETENSORS_ODIRECT=0", environment={"FASTSAFETENSORS_ODIRECT": "0"},
        ),
        _entry("fastsafetensors, GPUDirect", "fastsafetensors", fast, setting="nogds=False", arguments={"nogds": False}, cuda_only=_GPUDIRECT),
        _entry("tensorizer", "tensorizer", "tensorizer", "tensorizer"),
        _entry("tensorizer, 2 readers", "tensorizer", "tensorizer", "tensorizer", setting="num_readers=2", arguments={"num_readers": 2}),
        _entry("tensorizer, 4 readers", "tensorizer", "tensorizer", "tensorizer", setting="num_readers=4", arguments={"num_readers": 4}),
        _entry("InstantTensor", "instanttensor", "instanttensor", cuda_only=_INSTANT),
        _entry(
            "InstantTensor, buffered", "instanttensor", "instanttensor",
            setting="BackendPolicy.BUFFERED", arguments={"buffered": True}, cuda_only=_INSTANT,
        ),
        _entry("ServerlessLLM store", "serverless_llm", "serverless-llm-store", "serverless-llm-store", cuda_only=_STORE),
    ]  # fmt: skip


def torch_load(job: Job) -> Load:
    import torch

    mmap = bool(job.arguments.get("mmap", False))
    return lambda: torch.load(job.path, map_location=job.device, mmap=mmap, weights_only=True).values()


def load_file(job: Job) -> Load:
    import inspect

    from safetensors.torch import load_file as load

    options = dict(job.arguments)
    if not options.keys() <= inspect.signature(load).parameters.keys():
        raise UnsupportedError(f"this version of safetensors does not take {', '.join(options)}")
    return lambda: [tensor for file in job.files for tensor in load(file, device=job.device, **options).values()]


def safe_open(job: Job) -> Load:
    import safetensors

    def load() -> list[torch.Tensor]:
        found = []
        for path in job.files:
            with safetensors.safe_open(path, framework="pt", device=job.device) as file:
                found += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
        return found

    return load


def from_pretrained(job: Job) -> Load:
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM

    # What its documentation advises for a GPU, where the package that this needs is installed.
    mapped = job.device != "cpu" and importlib.util.find_spec("accelerate") is not None
    options = {"device_map": job.device} if mapped else {}

    def load() -> list[torch.Tensor]:
        made = AutoModelForCausalLM.from_pretrained(job.path, dtype="auto", local_files_only=True, **options)
        if not mapped and job.device != "cpu":
            torch.nn.Module.to(made, job.device)
        return model_tensors(made)

    return load


def runai(job: Job) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> list[torch.Tensor]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in job.files], device=job.device)
            return [tensor for _, tensor in streamer.get_tensors()]

    return load


def fastsafetensors(job: Job) -> Load:
    from fastsafetensors import SafeTensorsFileLoader

    options = {"nogds": True} | dict(job.arguments)

    def load() -> list[torch.Tensor]:
        loader = SafeTensorsFileLoader(None, device=job.device, **options)
        try:
            loader.add_filenames({0: [str(path) for path in job.files]})
            # Its tensors own their memory together, so they outlive the buffer that is closed here.
            buffer = loader.copy_files_to_device()
            try:
                return [buffer.get_tensor(name) for name in loader.get_keys()]
            finally:
                buffer.close()
        finally:
            loader.close()

    return load


def tensorizer(job: Job) -> Load:
    from tensorizer import TensorDeserializer

    options = dict(job.arguments)

    def load() -> list[torch.Tensor]:
        with TensorDeserializer(str(job.path), device=job.device, **options) as state:
            return list(state.values())

    return load


def instanttensor(job: Job) -> Load:
    import instanttensor as package

    options = {"backend": package.BackendPolicy.BUFFERED} if job.arguments.get("buffered") else {}

    def load() -> list[torch.Tensor]:
        # Tensors own their memory, because copy=True is its default.
        with package.safe_open([str(path) for path in job.files], framework="pt", device=job.device, **options) as file:
            return [tensor for _, tensor in file.tensors()]

    return load


def serverless_llm(job: Job) -> Load:
    import atexit
    import subprocess

    from sllm_store.client import SllmStoreClient
    from sllm_store.torch import load_dict

    # Its store is a server of its own; the pool must hold the whole model.
    pool = f"{-(-sum(path.stat().st_size for path in job.files) * 5 // (4 << 30))}GB"
    command = ["sllm-store", "start", "--storage-path", str(job.path.parent), "--mem-pool-size", pool, "--chunk-size", "16MB"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    atexit.register(server.kill)
    _wait_for_store(server)
    client = SllmStoreClient(_STORE_ADDRESS)
    name, number = job.path.name, int(job.device.partition(":")[2] or 0)

    def load() -> list[torch.Tensor]:
        found = list(load_dict(name, {"": number}, str(job.path.parent)).values())
        client.unload_from_cpu(name)  # else the next load would find it in the server's memory
        return found

    return load


def _wait_for_store(server: Any, seconds: float = 120.0) -> None:
    import socket
    import time

    host, _, port = _STORE_ADDRESS.partition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise UnsupportedError("its server does not start")
