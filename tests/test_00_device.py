"""The CPU as a device, its memory page by page, and how devices are found by name (GPUs: `test_00_cuda.py`)."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sllm_mini.device.cuda
from sllm_mini.device import (
    ALIGNMENT,
    CpuDevice,
    Device,
    HostBuffer,
    HostMemory,
    cuda_available,
    get_device,
    why_no_cuda,
)
from sllm_mini.device.cpu import available_nbytes
from sllm_mini.device.fake import RecordingRuntime
from sllm_mini.errors import DeviceError, OutOfMemoryError

PAGE = mmap.PAGESIZE
MIB = 1 << 20


# The CPU


def anonymous_huge_nbytes(address: int, nbytes: int) -> int:
    """Bytes of huge pages in the mappings that touch a range, as the kernel counts them."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start < address + nbytes and address < end
        elif inside and head == "AnonHugePages:":
            total += int(line.split()[1]) * 1024
    return total


def resident_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT + 5])
def test_host_memory_is_aligned_zeroed_and_writable_to_its_last_byte(nbytes: int):
    memory = HostMemory(nbytes)
    assert isinstance(memory, HostBuffer) and not memory.pinned
    assert memory.address % ALIGNMENT == 0
    assert len(memory.view) == memory.nbytes == nbytes
    assert not memory.view.readonly
    if nbytes:
        assert bytes(memory.view[:100]) == bytes(min(nbytes, 100))
        memory.view[0] = memory.view[nbytes - 1] = 7
        assert ctypes.c_ubyte.from_address(memory.address + nbytes - 1).value == 7
    assert memory.tensor().shape == (nbytes,) and memory.tensor().dtype == torch.uint8


def test_huge_pages_are_advised_only_inside_the_mapping(monkeypatch: pytest.MonkeyPatch):
    from sllm_mini.device import cpu

    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(cpu._libc, "madvise", lambda *args: advised.append(args) or 0)
    mapped: list[int] = []
    real = mmap.mmap

    def spy(fileno: int, length: int, **kwargs: Any) -> mmap.mmap:
        mapped.append(length)
        # Newer kernels put whole huge pages on a boundary by themselves; an odd page more, and they do not.
        return real(fileno, length + PAGE, **kwargs)

    monkeypatch.setattr(cpu.mmap, "mmap", spy)
    kept = []
    for nbytes in (ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT - 1, 7 * ALIGNMENT):
        kept.append(memory := HostMemory(nbytes))
        (start, length, advice), whole = advised.pop(), mapped.pop()
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory.view.obj))
        assert advice == 14 and start == memory.address
        assert start % ALIGNMENT == length % ALIGNMENT == 0
        assert nbytes <= length < nbytes + ALIGNMENT
        assert base <= start and start + length <= base + whole
    HostMemory(ALIGNMENT - 1)
    assert advised == []
    HostMemory(ALIGNMENT, huge_pages=False)
    assert [advice for _, _, advice in advised] == [15], "small pages are asked for where the system's mode is always"


def test_huge_pages_are_really_there_where_the_machine_allows():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel has transparent huge pages switched off")
    nbytes = 16 * ALIGNMENT
    memory = HostMemory(nbytes, populate=True)
    small = HostMemory(nbytes, huge_pages=False, populate=True)
    if "[madvise]" in enabled.read_text():
        assert anonymous_huge_nbytes(small.address, 1) == 0
    found = anonymous_huge_nbytes(memory.address, nbytes)
    if found == 0:
        pytest.skip("this machine has no huge page free")
    assert found >= nbytes // 2


def test_memory_is_really_returned_when_its_last_user_goes():
    nbytes = 64 * MIB
    before = resident_nbytes()
    memory = HostMemory(nbytes, populate=True)
    assert resident_nbytes() - before >= 0.9 * nbytes
    tensor = memory.tensor()[5:10]
    memory.close()
    assert resident_nbytes() - before >= 0.9 * nbytes
    del tensor
    assert resident_nbytes() - before < 0.1 * nbytes


def test_populate_keeps_bytes_and_backs_the_whole_range():
    memory = HostMemory(64 * PAGE, huge_pages=False)
    memory.view[10 * PAGE - 1] = 42
    memory.view[20 * PAGE] = 43
    memory.populate(9 * PAGE + 5, 12 * PAGE)
    assert memory.view[10 * PAGE - 1] == 42 and memory.view[20 * PAGE] == 43
    assert resident_pages(memory)[9:22] == [1] * 13


def test_populate_works_on_a_kernel_without_the_call_for_it(monkeypatch: pytest.MonkeyPatch):
    from sllm_mini.device import cpu

    def refuse(*args: Any) -> int:
        ctypes.set_errno(22)
        return -1

    memory = HostMemory(8 * PAGE, huge_pages=False)
    memory.view[3 * PAGE] = 9
    monkeypatch.setattr(cpu._libc, "madvise", refuse)
    memory.populate(PAGE - 1, 2 * PAGE + 2)  # the last byte of page 0 to the first of page 3
    assert memory.view[3 * PAGE] == 9
    assert resident_pages(memory) == [1, 1, 1, 1, 0, 0, 0, 0]


def resident_pages(memory: HostMemory) -> list[int]:
    count = -(-memory.nbytes // PAGE)
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(memory.address), ctypes.c_size_t(count * PAGE), found) == 0
    return [page & 1 for page in found]


def test_a_tensor_outlives_its_buffer():
    memory = HostMemory(PAGE)
    memory.view[:] = bytes(range(256)) * (PAGE // 256)
    tensor = memory.tensor()
    memory.close()
    memory.close()
    for use in (lambda: memory.view, lambda: memory.address, memory.tensor, partial(memory.populate, 0, 1)):
        with pytest.raises(DeviceError, match="closed"):
            use()
    assert tensor[:256].tolist() == list(range(256))


def test_host_memory_refuses_what_cannot_be():
    device = CpuDevice()
    for make in (HostMemory, device.allocate, device.allocate_host):
        with pytest.raises(ValueError, match="-1 bytes"):
            make(-1)
        for absurd in (1 << 62, 1 << 63, 1 << 80):
            with pytest.raises(OutOfMemoryError, match=f"{absurd:,}"):
                make(absurd)
    for allocate in (device.allocate, device.allocate_host):
        with pytest.raises(OutOfMemoryError, match="bytes free"):
            allocate(available_nbytes() + (1 << 33))
    memory = HostMemory(10)
    for offset, nbytes in ((0, 11), (5, 6), (-1, 2), (3, -1)):
        with pytest.raises(DeviceError, match="outside the host buffer of 10 bytes"):
            memory.populate(offset, nbytes)


def test_cpu_streams_copy_at_once_and_only_in_range():
    device = CpuDevice()
    source, target, stream = device.allocate_host(100), device.allocate(50), device.stream()
    source.view[:] = bytes(range(100))
    stream.copy_from_host(target, 10, source, 60, 40)
    event = stream.record()
    assert event.done() and bytes(target.view) == bytes(10) + bytes(range(60, 100))
    stream.copy_to_host(source, 0, target, 10, 5)
    stream.copy_on_device(target, 0, target, 10, 5)
    stream.wait_for(event)
    assert bytes(source.view[:5]) == bytes(target.view[:5]) == bytes(range(60, 65))
    for ends in ((101, 0, 0), (0, 101, 0), (0, 0, 101), (-1, 0, 1), (0, -1, 1), (1, 1, -1), (0, 1 << 63, 1)):
        for copy in (
            lambda a, b, n: stream.copy_from_host(target, a, source, b, n),
            lambda a, b, n: stream.copy_to_host(source, a, target, b, n),
            lambda a, b, n: stream.copy_on_device(source, a, source, b, n),
        ):
            with pytest.raises(DeviceError, match=r"outside the (source|destination) buffer"):
                copy(*ends)
    for closed in (target, source):
        closed.close()
        with pytest.raises(DeviceError, match="closed"):
            stream.copy_from_host(target, 0, source, 0, 1)


# Names


def test_devices_are_found_by_name():
    cpu = get_device("cpu")
    assert get_device() is cpu and get_device(torch.device("cpu")) is cpu and get_device(cpu) is cpu
    assert isinstance(cpu, Device) and cpu.is_host and cpu.name == "cpu"
    gpu = RecordingRuntime().device()
    assert get_device(gpu) is gpu and isinstance(gpu, Device) and not gpu.is_host
    for nonsense in ("mps", "cuda:", "cuda:-1", "cuda:x", "cpu:0:1", "", torch.device("meta")):
        with pytest.raises(DeviceError, match=r"use 'cpu', 'cuda' or 'cuda:N'"):
            get_device(nonsense)


@pytest.mark.skipif(cuda_available(), reason="this machine has a GPU; the test is about those without")
def test_without_a_gpu_the_reason_is_said():
    assert why_no_cuda()
    for name in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with pytest.raises(DeviceError, match=r"CUDA cannot be used: .+; "):
            get_device(name)


def test_every_reason_names_the_next_step(monkeypatch: pytest.MonkeyPatch):
    cuda = sllm_mini.device.cuda
    missing: set[str] = {"cupy"}
    toolkit = type("Toolkit", (), {"runtime": RecordingRuntime(devices=0)})
    real_find, real_open = cuda.importlib.util.find_spec, ctypes.CDLL
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda n: None if n in missing else real_find("sys"))
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda n: real_open("missing.so") if n in missing else None)
    monkeypatch.setattr(cuda, "_toolkit", toolkit)
    reasons = []
    for change in (lambda: missing.add("libcuda.so.1"), lambda: missing.remove("cupy"), lambda: missing.clear()):
        reasons.append(cuda.why_no_cuda.__wrapped__())
        change()
    reasons.append(cuda.why_no_cuda.__wrapped__())
    toolkit.runtime = RecordingRuntime()
    monkeypatch.setattr(torch.version, "cuda", None)
    reasons.append(cuda.why_no_cuda.__wrapped__())
    toolkit.runtime.fail("getDeviceCount", status=35)
    reasons.append(cuda.why_no_cuda.__wrapped__())
    steps = ["pip install", "pip install", "driver is loaded", "CUDA_VISIBLE_DEVICES", "a CUDA build of torch", "nvidia-smi"]
    assert [step for step, reason in zip(steps, reasons, strict=True) if reason and step in reason] == steps
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda.why_no_cuda.__wrapped__() is None


def test_gpus_are_numbered_as_the_machine_has_them(monkeypatch: pytest.MonkeyPatch):
    cuda = sllm_mini.device.cuda
    runtime = RecordingRuntime(devices=2)
    monkeypatch.setattr(cuda, "why_no_cuda", lambda: None)
    monkeypatch.setattr(cuda, "_toolkit", lambda: runtime.device().toolkit)
    monkeypatch.setattr(cuda, "_device", runtime.device)
    assert get_device("cuda:1") is runtime.device(1) and get_device("cuda").name == "cuda:0"
    runtime.setDevice(1)
    assert get_device(torch.device("cuda")).name == "cuda:1"
    with pytest.raises(DeviceError, match=r"cuda:2 is not there; this machine has 2 GPU\(s\), cuda:0 to cuda:1"):
        get_device("cuda:2")


def test_importing_devices_imports_neither_torch_nor_cupy():
    code = (
        "import sys, sllm_mini.device, sllm_mini.device.kernels, sllm_mini.device.fake\n"
        "print([name for name in ('torch', 'cupy', 'numpy', 'transformers', 'xxhash') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cupy_is_imported_in_one_file_only():
    package = Path(sllm_mini.device.cuda.__file__).parents[1]
    users = [path.name for path in package.rglob("*.py") if "import cupy" in path.read_text(encoding="utf-8")]
    assert users == ["cuda.py"]
