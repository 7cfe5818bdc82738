"""What the fake GPU has in place of cupy and torch.cuda: sharing by DLPack, host kernels, a current torch stream.

Tensors of the fake GPU are CPU tensors of torch over its memory. A kernel is any Python callable with the launch's
grid, block and arguments; the package's own kernels come with their host references, so that whatever launches them
can be tested too. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sllm_mini.device.cuda_runtime import CudaRuntime, Launcher
from sllm_mini.device.fake_graph import capture_work, note_launch
from sllm_mini.device.kernels import host_leaf_digests, host_sum64
from sllm_mini.device.kernels_image import KernelFolders
from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

HostKernel = Callable[[Sequence[int], Sequence[int], Sequence[Any]], object]
"""Does on the host what a kernel does: grid, block, arguments."""


class LaunchingRuntime(CudaRuntime, Protocol):
    """What the toolkit asks of the fake runtime beyond CUDA's own calls."""

    def launch(
        self, kernel: HostKernel, grid: Sequence[int], block: Sequence[int], args: Sequence[object], stream: int
    ) -> None: ...

    def thread_has_context(self) -> bool: ...


FAKE_IMAGE = b"// an image of the fake's compiler\n"


class FakeCompiler:
    """"Compiles" a source into itself, its options before it. `compiled` lists what it was asked for, `refusal` is what it says instead."""

    def __init__(self, version: str = "fake 1.0") -> None:
        self.version = version
        self.refusal: str | None = None
        self.compiled: list[tuple[str, tuple[str, ...], str]] = []

    def compile(self, source: Path, options: Sequence[str], architecture: str) -> bytes:
        if self.refusal is not None:
            raise DeviceError(self.refusal)
        self.compiled.append((source.name, tuple(options), architecture))
        return FAKE_IMAGE + " ".join(options).encode() + b"\n" + source.read_bytes()


class FakeToolkit:
    """See the module. Safe from several threads."""

    def __init__(self, runtime: LaunchingRuntime, kernels: Mapping[str, HostKernel] | None) -> None:
        self.compiler: FakeCompiler = FakeCompiler()
        self.kernel_folders = KernelFolders()  # none: what the fake compiles is of no use to anybody else
        self._runtime = runtime
        self._given = kernels
        self._thread = threading.local()

    @property
    def runtime(self) -> LaunchingRuntime:
        return self._runtime

    def thread_has_context(self) -> bool:
        return self._runtime.thread_has_context()

    def share(self, address: int, nbytes: int, index: int, owner: object) -> torch.Tensor:
        import numpy
        import torch

        return torch.from_dlpack(numpy.asarray(_Shared(address, nbytes, owner)))

    def load(self, image: bytes, index: int) -> Callable[[str], Launcher]:
        if not image.startswith(FAKE_IMAGE):
            raise DeviceError(f"cuda:{index} cannot run this compiled kernel (it is not of this fake's compiler); delete it")
        options, _, text = image.removeprefix(FAKE_IMAGE).decode().partition("\n")

        def function(name: str) -> Launcher:
            kernel = _own(name, options.split()) if self._given is None else self._given.get(name)
            if kernel is None or f" {name}(" not in text.replace("\n", " "):
                raise DeviceError(f"the compiled kernels have no kernel {name!r} that this fake can run; give it one in `kernels`")

            def launch(grid: Sequence[int], block: Sequence[int], args: Sequence[object], handle: int) -> None:
                def work() -> None:
                    with self._runtime_on(index):
                        self._runtime.launch(kernel, grid, block, args, handle)
                        if handle == self.torch_stream_handle(index):
                            self._runtime.streamSynchronize(handle)  # torch's own work on the fake is done at once, too

                if not note_launch(work):
                    work()

            return launch

        return function

    @contextmanager
    def _runtime_on(self, index: int) -> Iterator[None]:
        before = self._runtime.getDevice()
        self._runtime.setDevice(index)
        try:
            yield
        finally:
            self._runtime.setDevice(before)

    def capture(self, work: Callable[[], None], index: int) -> Callable[[], None]:
        work()
        return capture_work(work)

    @contextmanager
    def torch_stream(self, handle: int, index: int) -> Iterator[None]:
        streams = self._torch_streams()
        before = streams.get(index, 0)
        streams[index] = handle
        try:
            yield
        finally:
            streams[index] = before

    def torch_stream_handle(self, index: int) -> int:
        return self._torch_streams().get(index, 0)

    def _torch_streams(self) -> dict[int, int]:
        if not hasattr(self._thread, "streams"):
            self._thread.streams = {}
        return self._thread.streams


def _own(name: str, options: Sequence[str]) -> HostKernel | None:
    """The host's reference for a kernel of the package that was compiled with `options`; None for one it does not have."""
    if name in ("decode_attention", "decode_attention_merge"):
        from sllm_mini.device.fake_attention import HostAttention

        attention = HostAttention(options)
        return attention.attend if name == "decode_attention" else attention.merge
    return {"sum64": _sum64, "xxh3_leaves": _xxh3_leaves}.get(name)


class _Shared:
    """Memory that numpy may look at; numpy keeps this object, and so the owner, as long as it looks."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def _bytes_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _sum64(grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
    data, nbytes, total = args
    ctypes.c_uint64.from_address(total).value += host_sum64(_bytes_at(data, nbytes))


def _xxh3_leaves(grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
    data, nbytes, digests = args
    found = host_leaf_digests(_bytes_at(data, nbytes)).tobytes()
    _bytes_at(digests, len(found))[:] = found
