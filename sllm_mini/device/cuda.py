"""An NVIDIA GPU as a device, through cupy. The only file that imports cupy, and only once a GPU is asked for.

Importing it costs nothing; asking whether CUDA can be used costs a look for the driver, and only where there is one the
import of cupy (~1 s) and a CUDA context. Works with cupy 13 and 14. Taught in chapter 02.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_mini.device.cuda_memory import DeviceMemory, OpenedMemory, PinnedMemory, PinnedRange
from sllm_mini.device.cuda_runtime import Binding, CudaRuntime, Launcher, Toolkit
from sllm_mini.device.cuda_stream import CudaStream
from sllm_mini.device.kernels_image import KernelFolders
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
        self.kernels: dict[str, Any] = {}  # by file and options, filled by kernels.load_kernels

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

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures torch's and our launches in `work` as a CUDA graph and returns what replays them, see `Toolkit`."""
        with self.binding.active("capture a graph"):
            return self.toolkit.capture(work, self.index)

    def synchronize(self) -> None:
        with self.binding.active("finish its work") as runtime:
            runtime.deviceSynchronize()


class CupyToolkit:
    """The toolkit that is really there: cupy for CUDA, torch for tensors and torch's streams."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy
        self._pools: dict[int, Any] = {}  # memory that the graphs of a GPU share: none runs beside another
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

    @cached_property
    def compiler(self) -> NvrtcCompiler:
        return NvrtcCompiler()

    @cached_property
    def kernel_folders(self) -> KernelFolders:
        return KernelFolders.of_user()

    def load(self, image: bytes, index: int) -> Callable[[str], Launcher]:
        driver = self._cupy.cuda.driver
        module = self._cupy.cuda.function.Module()
        try:
            module.load(image)
        except driver.CUDADriverError as error:
            raise DeviceError(f"cuda:{index} cannot run this compiled kernel ({error}); update the driver or delete it") from error

        def function(name: str) -> Launcher:
            try:
                found = module.get_function(name)
            except driver.CUDADriverError as error:
                raise DeviceError(f"the compiled kernels have no function {name!r} ({error}); name one of the source") from error

            def launch(grid: Sequence[int], block: Sequence[int], args: Sequence[object], handle: int) -> None:
                # An object with `ptr` is all that cupy 13 and 14 ask of a stream; ExternalStream, which the documentation
                # of 13 shows, is deprecated in 14.
                try:
                    found(tuple(grid), tuple(block), tuple(args), stream=_Handle(handle))
                except driver.CUDADriverError as error:
                    self.runtime.check_status(error.status)  # the same numbers; raises the runtime's error
                    raise

            return launch

        return function

    def capture(self, work: Callable[[], None], index: int) -> Callable[[], None]:
        import torch

        try:
            with torch.cuda.device(index):
                before, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(before)
                with torch.cuda.stream(side):  # libraries make their handles and workspaces here, not in the graph
                    for _ in range(2):
                        work()
                before.wait_stream(side)
                with self._lock:  # a capture forbids other threads' allocations, and the graphs of a GPU share their memory
                    pool = self._pools.setdefault(index, torch.cuda.graph_pool_handle())
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        work()
        except RuntimeError as error:
            raise DeviceError(f"this work cannot be captured on cuda:{index} ({error}); run it without a graph") from error
        return graph.replay

    def torch_stream(self, handle: int, index: int) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.stream(torch.cuda.ExternalStream(handle, device=torch.device("cuda", index)))

    def torch_stream_handle(self, index: int) -> int:
        import torch

        return torch.cuda.current_stream(index).cuda_stream


class NvrtcCompiler:
    """CUDA's own compiler for use at run time. Needs no GPU and no driver. Safe from several threads."""

    @cached_property
    def version(self) -> str:
        nvrtc = _nvrtc()
        try:
            return "NVRTC {}.{}".format(*nvrtc.getVersion())
        except RuntimeError as error:
            raise DeviceError(f"there is no NVRTC ({error}); it comes with the CUDA toolkit or with pip install nvidia-cuda-nvrtc") from error

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """What it makes code for: sm_75, …"""
        return tuple(f"sm_{number}" for number in _nvrtc().getSupportedArchs())

    def compile(self, source: Path, options: Sequence[str], architecture: str) -> bytes:
        """As `Compiler.compile`; ~0.3 to 1 s a source. Raises DeviceError where there is no NVRTC, too."""
        nvrtc, _ = _nvrtc(), self.version
        program = nvrtc.createProgram(source.read_text(encoding="utf-8"), source.name, (), ())
        try:
            nvrtc.compileProgram(program, ("--std=c++17", f"-arch={architecture}", *options))
            image: bytes = nvrtc.getCUBIN(program)
        except RuntimeError as error:
            first = next(iter(nvrtc.getProgramLog(program).strip().splitlines()), error)
            raise DeviceError(f"{source} could not be compiled for {architecture} ({first}); correct it") from error
        finally:
            nvrtc.destroyProgram(program)
        return image


def _nvrtc() -> Any:
    from cupy.cuda import nvrtc, runtime

    _preload_nvrtc(runtime)
    return nvrtc


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


def gpu_count() -> int:
    """How many GPUs the driver shows this process, 0 without one. Imports neither cupy nor torch and makes no context."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return 0
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


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
