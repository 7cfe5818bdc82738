"""csrc/*.cu without a GPU: every file compiles for every GPU we name, and computes on the CPU what its reference does.

The kernels are run unchanged (see `cuda_on_cpu`), and the fake CUDA runtime launches them with the geometry that the
package really uses.
"""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
from cuda_on_cpu import Kernel, compile_for_cpu

from sllm_mini.device import CpuDevice, CudaDevice, get_device
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.device.kernels import (
    BLOCK_NBYTES,
    LEAF_NBYTES,
    enqueue_leaf_digests,
    enqueue_sum64,
    host_leaf_digests,
    host_sum64,
    leaf_count,
    leaf_digests,
    load_kernels,
    sum64,
)
from sllm_mini.errors import DeviceError, UnsupportedError
from sllm_mini.resources import resource

SOURCES = sorted(resource("csrc").glob("*.cu"))
ARCHITECTURES = (75, 80, 86, 89, 90, 100)

@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    folder = tmp_path_factory.mktemp("kernels")
    return {name: compile_for_cpu(resource("csrc") / f"{name}.cu", folder)(name) for name in ("sum64", "xxh3_leaves")}


@pytest.fixture
def gpu_of_fibres(emulated: dict[str, Kernel]) -> CudaDevice:
    return RecordingRuntime(kernels=emulated).device()


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def on_gpu(device: CudaDevice, data: bytes, offset: int = 0) -> Any:
    """A device buffer that holds `data` from `offset` on."""
    buffer, host, stream = device.allocate(offset + len(data)), device.allocate_host(len(data)), device.stream()
    host.view[:] = data
    stream.copy_from_host(buffer, offset, host, 0, len(data))
    stream.close()
    return buffer


# The host references


def test_host_sum_wraps_and_pads_the_tail():
    words = [(1 << 64) - 1, 5, 1 << 63, 1 << 63]
    data = b"".join(word.to_bytes(8, "little") for word in words)
    assert host_sum64(data) == sum(words) % (1 << 64) == 4
    assert host_sum64(data + b"\x01\x02\x03") == 4 + 0x030201
    assert host_sum64(b"") == 0
    assert host_sum64(memoryview(b"x" + data)[1:]) == 4  # at an odd address


def test_host_digests_are_one_per_leaf():
    import xxhash

    data = random_bytes(2 * LEAF_NBYTES + 4096)
    found = host_leaf_digests(data)
    assert found.dtype == numpy.uint64
    assert found.tolist() == [
        xxhash.xxh3_64_intdigest(data[:LEAF_NBYTES]),
        xxhash.xxh3_64_intdigest(data[LEAF_NBYTES : 2 * LEAF_NBYTES]),
        xxhash.xxh3_64_intdigest(data[2 * LEAF_NBYTES :]),
    ]
    assert host_leaf_digests(b"").tolist() == []
    assert [leaf_count(n) for n in (0, 1, LEAF_NBYTES, LEAF_NBYTES + 1)] == [0, 1, 1, 2]


def test_cpu_buffers_take_the_references():
    device = CpuDevice()
    data = random_bytes(LEAF_NBYTES + 100)
    buffer = device.allocate(len(data) + 7)
    buffer.view[7:] = data
    assert sum64(device, buffer, 7, len(data)) == host_sum64(data)
    assert leaf_digests(device, buffer, 7, len(data)).tolist() == host_leaf_digests(data).tolist()


# The kernels' own code, run on the CPU


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 15, 16, 17, 4096, 65_535, 65_536 * 3 + 24, 1_000_003])
def test_sum_kernel_equals_its_reference(gpu_of_fibres: CudaDevice, nbytes: int):
    data = random_bytes(nbytes, seed=nbytes)
    assert sum64(gpu_of_fibres, on_gpu(gpu_of_fibres, data, 48), 48, nbytes) == host_sum64(data)


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_sum_kernel_is_right_on_any_grid(emulated: dict[str, Kernel], grid: int):
    data = numpy.frombuffer(random_bytes(100_000), numpy.uint8)
    aligned = numpy.empty(len(data) + 16, numpy.uint8)
    start = -aligned.ctypes.data % 16
    aligned[start : start + len(data)] = data
    total = numpy.zeros(1, numpy.uint64)
    emulated["sum64"]((grid,), (256,), (aligned.ctypes.data + start, len(data), total.ctypes.data))
    assert int(total[0]) == host_sum64(data.tobytes())


@pytest.mark.parametrize("nbytes", range(BLOCK_NBYTES, LEAF_NBYTES + 1, BLOCK_NBYTES))
def test_digest_kernel_equals_xxhash_for_every_legal_leaf(gpu_of_fibres: CudaDevice, nbytes: int):
    data = random_bytes(nbytes, seed=nbytes)
    assert leaf_digests(gpu_of_fibres, on_gpu(gpu_of_fibres, data), 0, nbytes).tolist() == host_leaf_digests(data).tolist()


@pytest.mark.parametrize("leaves", [1, 7, 8, 9, 20])
def test_digest_kernel_does_many_leaves_and_a_shorter_last(gpu_of_fibres: CudaDevice, leaves: int):
    data = random_bytes(leaves * LEAF_NBYTES + 3 * BLOCK_NBYTES, seed=leaves)
    found = leaf_digests(gpu_of_fibres, on_gpu(gpu_of_fibres, data, 16), 16, len(data))
    assert found.tolist() == host_leaf_digests(data).tolist()


def test_digest_kernel_sees_every_bit(gpu_of_fibres: CudaDevice):
    data = bytearray(random_bytes(2 * BLOCK_NBYTES))
    before = leaf_digests(gpu_of_fibres, on_gpu(gpu_of_fibres, bytes(data)), 0, len(data))[0]
    for bit in random.Random(1).sample(range(8 * len(data)), 40):
        data[bit // 8] ^= 1 << bit % 8
        after = leaf_digests(gpu_of_fibres, on_gpu(gpu_of_fibres, bytes(data)), 0, len(data))[0]
        assert after != before and after == host_leaf_digests(bytes(data))[0]
        data[bit // 8] ^= 1 << bit % 8


# The wrappers


def test_results_of_enqueued_kernels_come_in_stream_order():
    runtime = RecordingRuntime()
    device, stream = runtime.device(), runtime.device().stream()
    data = random_bytes(2 * LEAF_NBYTES)
    buffer, out, host = device.allocate(len(data)), device.allocate(24), device.allocate_host(len(data))
    host.view[:] = data
    stream.copy_from_host(buffer, 0, host, 0, len(data))
    enqueue_leaf_digests(device, buffer, 0, len(data), stream, out)
    enqueue_sum64(device, buffer, 0, len(data), stream, out, 16)
    result = device.allocate_host(24)
    stream.copy_to_host(result, 0, out, 0, 24)
    work = [name for name in runtime.names() if name in ("memcpyAsync", "memsetAsync", "launch", "streamSynchronize")]
    assert work == ["memcpyAsync", "launch", "memsetAsync", "launch", "memcpyAsync"]  # nothing waited
    stream.synchronize()
    assert numpy.frombuffer(result.view, numpy.uint64).tolist() == [*host_leaf_digests(data), host_sum64(data)]


def test_wrappers_give_back_what_they_took():
    runtime = RecordingRuntime()
    device = runtime.device()
    buffer = on_gpu(device, random_bytes(BLOCK_NBYTES))
    sum64(device, buffer, 0, BLOCK_NBYTES)
    leaf_digests(device, buffer, 0, BLOCK_NBYTES)
    assert runtime.leaks() == {"device bytes": BLOCK_NBYTES}
    runtime.fail("launch")
    with pytest.raises(DeviceError, match="could not launch sum64"):
        sum64(device, buffer, 0, BLOCK_NBYTES)
    assert runtime.leaks() == {"device bytes": BLOCK_NBYTES}
    assert leaf_digests(device, buffer, 0, 0).tolist() == []


def test_launch_fills_the_gpu_and_no_more():
    runtime = RecordingRuntime()
    device = runtime.device()
    small, large = device.allocate(16 * 256), device.allocate(64 << 20)
    sum64(device, small, 0, small.nbytes)
    sum64(device, large, 0, large.nbytes)
    leaf_digests(device, large, 0, large.nbytes)
    grids = [call.args[1] for call in runtime.calls if call.name == "launch"]
    assert grids == [(1,), (8 * device.multiprocessors,), (64 * 16 // 8,)]


def test_kernels_refuse_what_they_cannot_do():
    device = RecordingRuntime().device()
    buffer = device.allocate(2 * LEAF_NBYTES)
    with pytest.raises(DeviceError, match="multiples of 16"):
        sum64(device, buffer, 8, 64)
    with pytest.raises(DeviceError, match="multiples of 4,096"):
        leaf_digests(device, buffer, 0, 1000)
    for reading in (sum64, leaf_digests):
        with pytest.raises(DeviceError, match="outside the"):
            reading(device, buffer, 0, buffer.nbytes + BLOCK_NBYTES)
    with pytest.raises(DeviceError, match="outside the result buffer"):
        enqueue_leaf_digests(device, buffer, 0, buffer.nbytes, device.stream(), device.allocate(8))
    with pytest.raises(UnsupportedError, match="cpu runs none"):
        load_kernels(CpuDevice(), "sum64.cu")
    with pytest.raises(UnsupportedError, match="on a GPU and cpu runs no kernels"):
        sum64(CpuDevice(), buffer, 0, 64)


def test_kernels_are_compiled_once_per_device():
    runtime = RecordingRuntime(devices=2)
    first = load_kernels(runtime.device(0), "sum64.cu")
    assert load_kernels(runtime.device(0), "sum64.cu") is first
    assert first["sum64"] is first["sum64"]
    assert load_kernels(runtime.device(1), "sum64.cu")["sum64"] is not first["sum64"]
    with pytest.raises(DeviceError, match="no kernel 'nonsense'"):
        first["nonsense"]


# Compilers


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_with_nvcc_for_every_architecture(source: Path, tmp_path: Path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed; it compiles csrc/ for GPUs that this machine lacks")
    targets = [part for arch in ARCHITECTURES for part in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = ["nvcc", "--std=c++17", "-fatbin", "--threads", "2", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
    done = subprocess.run([*command, source, "-o", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", report)]
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill", report)]
    assert len(registers) == len(ARCHITECTURES) * source.read_text().count("__global__")
    assert not any(spills), "a kernel that spills registers writes to memory what its source says it keeps"
    assert max(registers) <= {"sum64": 40, "xxh3_leaves": 80, "decode_attention": 168}[source.stem]  # what the comments on occupancy count on


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_with_nvrtc_as_cupy_does(source: Path):
    nvrtc = cupy_nvrtc()
    for arch in ARCHITECTURES:
        program = nvrtc.createProgram(source.read_text(), source.name, (), ())
        try:
            nvrtc.compileProgram(program, ("--std=c++17", f"-arch=sm_{arch}"))
            assert source.stem.encode() in nvrtc.getCUBIN(program)
        finally:
            nvrtc.destroyProgram(program)


def cupy_nvrtc() -> Any:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed; it brings the binding to NVRTC")
    from cupy.cuda import nvrtc, runtime

    from sllm_mini.device.cuda import _preload_nvrtc

    _preload_nvrtc(runtime)
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed ({error}); pip install nvidia-cuda-nvrtc")
    return nvrtc


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [0, 1, 17, 4096, 3 * LEAF_NBYTES + 24, (64 << 20) + 5])
def test_gpu_sum_equals_its_reference(nbytes: int):
    device = get_device("cuda")
    assert isinstance(device, CudaDevice)
    data = random_bytes(nbytes)
    assert sum64(device, on_gpu(device, data, 48), 48, nbytes) == host_sum64(data)


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [BLOCK_NBYTES, 5 * BLOCK_NBYTES, LEAF_NBYTES, 1000 * LEAF_NBYTES + 3 * BLOCK_NBYTES])
def test_gpu_digests_equal_xxhash(nbytes: int):
    device = get_device("cuda")
    assert isinstance(device, CudaDevice)
    data = random_bytes(nbytes)
    stream = device.stream()
    found = leaf_digests(device, on_gpu(device, data, 16), 16, nbytes, stream)
    stream.close()
    assert found.tolist() == host_leaf_digests(data).tolist()
