"""An NVIDIA GPU as a device, through cupy. The only file that imports cupy, and only once a GPU is asked for.

Importing it costs nothing; asking whether CUDA can be used costs a look for the driver, and only where there is one the
import of cupy (~1 s) and a CUDA context. Works with cupy 13 and 14. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.device.cuda_memory import DeviceMemory, OpenedMemory, PinnedMemory, PinnedRange
from sllm_mini.device.cuda_runtime import Binding, CudaRuntime, Launcher, Toolkit
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.errors import DeviceError

if TYPE_CHECKING:
    import torch

_INSTALL = 'install the extra for your driver: pip install "sllm_mini[cuda13]" or "sllm_mini[cuda12]"'


@dataclass(frozen=True, slots=True)
class CudaProperties:
    """What a GPU is. `memory_bytes_per_second` is its memory's nominal speed, 0 where the driver does not say."""

    model: str
    compute_capability: tuple[int, int]
    total_nbytes: int
    multiprocessors: int
    memory_bytes_per_second: float
    pci_bus: str


class CudaDevice:
    """One GPU. Safe from several threads; each thread better has streams of its own."""

    is_host = False

    def __init__(self, toolkit: Toolkit, index: int) -> None:
        self.binding = Binding(toolkit, index)
        self.name = self.binding.name
        self.index = index
        self.toolkit = toolkit
        self.kernels: dict[str, Any] = {}  # by file, filled by kernels.load_kernels

    def __repr__(self) -> str:
        return f"CudaDevice({self.name!r})"

    def properties(self) -> CudaProperties:
        with self.binding.active("read its properties") as runtime:
            found = runtime.getDeviceProperties(self.index)
        model = found["name"]
        # The clock is in kHz and memory moves data twice per cycle.
        speed = 2.0 * 1000 * found.get("memoryClockRate", 0) * found.get("memoryBusWidth", 0) / 8
        return CudaProperties(
            model=model.decode() if isinstance(model, bytes) else str(model),
            compute_capability=(found["major"], found["minor"]),
            total_nbytes=found["totalGlobalMem"],
            multiprocessors=found["multiProcessorCount"],
            memory_bytes_per_second=speed,
            pci_bus=f"{found.get('pciDomainID', 0):04x}:{found.get('pciBusID', 0):02x}:{found.get('pciDeviceID', 0):02x}",
        )

    @cached_property
    def multiprocessors(self) -> int:
        return self.properties().multiprocessors

    def free_nbytes(self) -> int:
        with self.binding.active("say how much memory is free") as runtime:
            return runtime.memGetInfo()[0]

    def allocate(self, nbytes: int) -> DeviceMemory:
        return DeviceMemory(self.binding, nbytes)

    def allocate_host(self, nbytes: int) -> PinnedMemory:
        return PinnedMemory(self.binding, nbytes)

    def pin(self, address: int, nbytes: int) -> PinnedRange:
        return PinnedRange(self.binding, address, nbytes)

    def open_exported(self, handle: bytes, nbytes: int) -> OpenedMemory:
        """The first `nbytes` of memory of this GPU that another process made known by `DeviceMemory.export`."""
        return OpenedMemory(self.binding, handle, nbytes)

    def stream(self) -> CudaStream:
        return CudaStream(self.binding)

    def synchronize(self) -> None:
        with self.binding.active("finish its work") as runtime:
            runtime.deviceSynchronize()


class CupyToolkit:
    """The toolkit that is really there: cupy for CUDA, torch for tensors and torch's streams."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy
        self._modules: dict[Path, Any] = {}
        self._lock = threading.Lock()

    @property
    def runtime(self) -> CudaRuntime:
        return self._cupy.cuda.runtime

    def thread_has_context(self) -> bool:
        return self._cupy.cuda.driver.ctxGetCurrent() != 0

    def share(self, address: int, nbytes: int, index: int, owner: object) -> torch.Tensor:
        import torch

        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}")
        return torch.from_dlpack(self.array(address, nbytes, index, owner))

    def array(self, address: int, nbytes: int, index: int, owner: object) -> Any:
        """The memory as a cupy array, which, and each view of which, keeps `owner` alive."""
        cupy = self._cupy
        memory = cupy.cuda.UnownedMemory(address, nbytes, owner, index)
        return cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))

    def function(self, source: Path, name: str, index: int) -> Launcher:
        """Called with the GPU current. Costs ~0.3 s for a new source, ~1 ms from cupy's cache on disk."""
        cupy = self._cupy
        try:
            with self._lock:
                if source not in self._modules:
                    _preload_nvrtc(self.runtime)
                    code = source.read_text(encoding="utf-8")
                    self._modules[source] = cupy.RawModule(code=code, options=("--std=c++17",))
                kernel = self._modules[source].get_function(name)
        except (RuntimeError, OSError, cupy.cuda.compiler.CompileException) as error:
            raise DeviceError(
                f"{name} of {source} could not be compiled for cuda:{index} ({error});"
                f" NVRTC comes with the CUDA toolkit or with pip install nvidia-cuda-nvrtc"
            ) from error

        def launch(grid: Sequence[int], block: Sequence[int], args: Sequence[object], handle: int) -> None:
            # `stream` goes through RawKernel to Function.__call__ in cupy 13 and 14; ExternalStream, which the
            # documentation of 13 shows, is deprecated in 14.
            try:
                kernel(tuple(grid), tuple(block), tuple(args), stream=_Handle(handle))
            except cupy.cuda.driver.CUDADriverError as error:
                self.runtime.check_status(error.status)  # the same numbers; raises the runtime's error
                raise

        return launch

    def torch_stream(self, handle: int, index: int) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.stream(torch.cuda.ExternalStream(handle, device=torch.device("cuda", index)))

    def torch_stream_handle(self, index: int) -> int:
        import torch

        return torch.cuda.current_stream(index).cuda_stream


@dataclass(frozen=True, slots=True)
class _Handle:
    ptr: int


def _preload_nvrtc(runtime: Any) -> None:
    # cupy 13 looks for NVRTC among the system's libraries only, not where pip puts it; a library once loaded is found.
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        for folder in spec.submodule_search_locations or ():
            for library in Path(folder).glob(f"*/lib/libnvrtc.so.{runtime.runtimeGetVersion() // 1000}"):
                ctypes.CDLL(str(library))


@cache
def why_no_cuda() -> str | None:
    """Why this process cannot use a GPU, with what to do about it; None if it can. Looks once per process."""
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed; {_INSTALL}"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is loaded (libcuda.so.1 is not there); install one, or use the device 'cpu'"
    try:
        toolkit = _toolkit()
        count = toolkit.runtime.getDeviceCount()
    except (ImportError, OSError, RuntimeError) as error:
        return f"cupy cannot reach a GPU ({error}); check nvidia-smi, then {_INSTALL}"
    if count == 0:
        return "the NVIDIA driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    return None


def cuda_available() -> bool:
    """Whether `get_device("cuda")` works."""
    return why_no_cuda() is None


@cache
def _toolkit() -> CupyToolkit:
    return CupyToolkit()


@cache
def _device(index: int) -> CudaDevice:
    return CudaDevice(_toolkit(), index)


def cuda_device(index: int | None = None) -> CudaDevice:
    """The GPU `cuda:index`, by default the calling thread's current one. Raises DeviceError where it is not there."""
    reason = why_no_cuda()
    if reason is not None:
        raise DeviceError(f"CUDA cannot be used: {reason}")
    runtime = _toolkit().runtime
    count = runtime.getDeviceCount()
    if index is None:
        index = runtime.getDevice()
    if not 0 <= index < count:
        raise DeviceError(f"cuda:{index} is not there; this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return _device(index)
