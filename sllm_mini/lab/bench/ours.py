"""Our own loaders as a bench measures them, and the mapped file that is the limit of a warm load (chapter 02)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sllm_mini.lab.bench.entry import Entry, Job

if TYPE_CHECKING:
    import torch

    from sllm_mini.lab.bench.entry import Load

_HERE = "sllm_mini.lab.bench.ours"
FORMAT = "sllm"
REFERENCE = "sllm_mini load_tensors"
"""The loader that all ratios between loaders are taken against: the product in its default setting."""
MAPPED = "mapped file"
"""The limit of a warm load to a CPU: the file mapped and populated, then summed like every other."""


def entries(*, ladder: bool = True) -> list[Entry]:
    """The product in its settings and, with `ladder`, the rungs below it."""
    made = [
        Entry(REFERENCE, "ours", f"{_HERE}:tensors", FORMAT, setting="default: every chunk hashed as it arrives", arguments={"verify": True}),
        Entry(f"{REFERENCE}, no hashing", "ours", f"{_HERE}:tensors", FORMAT, setting="verify=False", arguments={"verify": False}),
        Entry(
            f"{REFERENCE}, pool kept", "ours", f"{_HERE}:tensors", FORMAT, setting="a ChunkPool pinned once for all loads",
            arguments={"verify": True, "pool": True}, cuda_only="a load to a CPU reads in place and has no use for a pool",
        ),
        Entry("sllm_mini load_model", "ours", f"{_HERE}:model", FORMAT, setting="default, the transformers model built too", whole_model=True),
    ]
    if ladder:
        from sllm_mini.loading.ladder import LADDER

        made += [
            Entry(f"ladder: {rung.name}", "ladder", f"{_HERE}:rung", FORMAT, setting=rung.idea, arguments={"rung": rung.name}) for rung in LADDER
        ]
    return made


def limit_entries(device: str) -> list[Entry]:
    """What is measured as a loader but is a limit."""
    return [Entry(MAPPED, "limit", f"{_HERE}:mapped", package="torch", setting="mapped and populated", states=("warm",))] if device == "cpu" else []


def tensors(job: Job) -> Load:
    from sllm_mini.device import get_device
    from sllm_mini.loading import ChunkPool, LoadOptions, load_tensors

    verify, pool = bool(job.arguments["verify"]), None
    if job.arguments.get("pool"):
        pool = ChunkPool(get_device(job.device), chunk_nbytes=LoadOptions().chunk_nbytes, chunks=LoadOptions().ring_chunks)
        pool.fill()
    return lambda: load_tensors(job.path, job.device, verify=verify, pool=pool).values()


def model(job: Job) -> Load:
    from sllm_mini.loading import load_model

    return lambda: model_tensors(load_model(job.path, job.device))


def rung(job: Job) -> Load:
    from sllm_mini.checkpoint import open_checkpoint
    from sllm_mini.device import get_device
    from sllm_mini.loading.ladder import LADDER

    chosen = next(rung for rung in LADDER if rung.name == job.arguments["rung"])
    device = get_device(job.device)
    return lambda: chosen.load(open_checkpoint(job.path), device).values()


def mapped(job: Job) -> Load:
    """Every safetensors file mapped and populated, its tensors views of the mapping: no byte is copied."""
    import mmap
    import warnings

    import torch

    from sllm_mini.checkpoint.dtypes import torch_dtype
    from sllm_mini.checkpoint.safetensors_file import read_header

    def load() -> list[torch.Tensor]:
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody writes to these read-only tensors
            for path in job.files:
                with path.open("rb") as file:
                    view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
                whole = torch.frombuffer(view, dtype=torch.uint8)
                for entry in read_header(path):
                    part = whole[entry.offset : entry.offset + entry.nbytes]
                    aligned = entry.offset % torch_dtype(entry.dtype).itemsize == 0
                    found.append(part.view(torch_dtype(entry.dtype)) if aligned else part)
        return found

    return load


def model_tensors(built: torch.nn.Module) -> list[torch.Tensor]:
    """A model's own tensors, each tied one once."""
    return list({(tensor.data_ptr(), tensor.shape): tensor for tensor in built.state_dict().values()}.values())
