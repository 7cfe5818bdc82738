"""Runs csrc/*.cu unchanged on the CPU: g++ compiles them behind a small header, and each CUDA thread becomes a fibre.

The fibres of a block take turns from shuffle to shuffle and from barrier to barrier, and blocks run one after another,
so arithmetic and indexing are the kernels' own while time and memory order are not. Arguments are 8-byte integers, as the
package passes them. Only tests use it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SHIM = r"""
// CUDA, as far as the kernels use it, on one CPU thread. A shuffled value is posted in one of two slots by turns, so that
// no fibre overwrites what another has yet to read. Fibres switch by setjmp, which unlike swapcontext costs no system call.
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>
struct Dim { unsigned x, y, z; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
#define __global__
#define __device__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
struct alignas(16) ulonglong2 { unsigned long long x, y; };

enum { ARGUMENTS = 16 };
typedef uint64_t A;
typedef void (*Entry)(A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A);
struct Fibre {
    ucontext_t context; jmp_buf resume; std::unique_ptr<char[]> stack; bool begun = false, finished = false; unsigned turn = 0, barriers = 0;
};
static jmp_buf scheduler;
static std::vector<Fibre> fibres;
static std::vector<unsigned long long> posted[2];
static Entry entry;
static A arguments[ARGUMENTS];

static void yield_fibre() {
    if (_setjmp(fibres[threadIdx.x].resume) == 0) _longjmp(scheduler, 1);
}
[[maybe_unused]] static unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int lane) {
    const unsigned me = threadIdx.x;
    std::vector<unsigned long long>& slots = posted[fibres[me].turn++ & 1];
    slots[me] = value;
    yield_fibre();
    return mask == 0xffffffffu ? slots[me ^ (unsigned)lane] : 0xdeadbeef;
}
[[maybe_unused]] static void __syncthreads() {
    const unsigned mine = ++fibres[threadIdx.x].barriers;
    for (bool behind = true; behind;) {
        behind = false;
        for (const Fibre& other : fibres) behind |= !other.finished && other.barriers < mine;
        if (behind) yield_fibre();
    }
}
[[maybe_unused]] static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
[[maybe_unused]] static void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }
[[maybe_unused]] static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
[[maybe_unused]] static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
[[maybe_unused]] static float __shfl_xor_sync(unsigned mask, float value, int lane) {
    return __uint_as_float((unsigned)__shfl_xor_sync(mask, (unsigned long long)__float_as_uint(value), lane));
}
[[maybe_unused]] static float half_to_float(unsigned short half) {
    const unsigned rest = half & 0x7fff, sign = (unsigned)(half & 0x8000) << 16;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | rest << 13);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}
[[maybe_unused]] static unsigned short float_to_half(float value) {  // to the nearest, ties to even
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    const float size = fabsf(value);
    if (!(size < 65520.0f)) return (unsigned short)(sign | (size != size ? 0x7e00 : 0x7c00));
    int exponent;
    frexpf(size, &exponent);
    const int unit = (exponent < -13 ? -13 : exponent) - 11;  // of the last of eleven bits
    const unsigned steps = (unsigned)nearbyintf(ldexpf(size, -unit));
    return (unsigned short)(sign | (steps + ((unsigned)(unit + 24) << 10)));
}

static void run_fibre() {
    const A* a = arguments;
    entry(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
    fibres[threadIdx.x].finished = true;
    _longjmp(scheduler, 1);
}
static void run_block(unsigned block) {
    enum { STACK = 64 << 10 };
    if (fibres.size() != block) fibres = std::vector<Fibre>(block);
    posted[0].assign(block, 0); posted[1].assign(block, 0);
    for (Fibre& fibre : fibres) {
        if (!fibre.stack) fibre.stack.reset(new char[STACK]);
        fibre.begun = fibre.finished = false;
        fibre.turn = fibre.barriers = 0;
    }
    for (volatile bool some = true; some;) {
        some = false;
        for (volatile unsigned thread = 0; thread < block; thread = thread + 1) {
            Fibre& fibre = fibres[thread];
            if (fibre.finished) continue;
            some = true;
            threadIdx = {thread, 0, 0};
            if (_setjmp(scheduler) != 0) continue;
            if (fibre.begun) _longjmp(fibre.resume, 1);
            fibre.begun = true;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, run_fibre, 0);
            setcontext(&fibre.context);
        }
    }
}
extern "C" void launch(void* kernel, const unsigned* grid, unsigned block, const A* given) {
    entry = reinterpret_cast<Entry>(kernel);
    memcpy(arguments, given, sizeof arguments);
    gridDim = {grid[0], grid[1], grid[2]}; blockDim = {block, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) run_block(block);
}
"""

Kernel = Callable[[Sequence[int], Sequence[int], Sequence[Any]], None]


def compile_for_cpu(source: Path, folder: Path, options: Sequence[str] = ()) -> Callable[[str], Kernel]:
    """Compiles a .cu file for the CPU and returns its kernels by name, as the fake runtime wants them."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it runs the CUDA kernels' arithmetic on the CPU")
    shim, library = folder / "shim.h", folder / f"{source.stem}{''.join(options)}.so"
    shim.write_text(SHIM)
    command = ["g++", "-x", "c++", "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered", "-shared", "-fPIC"]
    done = subprocess.run([*command, *options, "-include", shim, source, "-o", library], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))

    def kernel(name: str) -> Kernel:
        address = ctypes.cast(getattr(loaded, name), ctypes.c_void_p)

        def run(grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
            given = (ctypes.c_uint64 * 16)(*args)
            loaded.launch(address, (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))), ctypes.c_uint(block[0]), given)

        return run

    return kernel
