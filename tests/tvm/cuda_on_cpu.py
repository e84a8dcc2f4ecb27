"""Runs CUDA kernels that TVM generated on the CPU, thread for thread, to check their numbers.

Every thread of a block is a thread here, and `__syncthreads` a barrier. A tile of the tensor cores is
kept whole by each thread of its warp, which loads, adds up and stores all of it: what the hardware
spreads over a warp is not a kernel's business. Needs g++.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm

from gpu_aware_tune.cuda_source import TF32_TILES

_HEAD = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <pthread.h>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define alignas(n) __attribute__((aligned(n)))
typedef unsigned uint;
struct Index { unsigned x, y, z; };
static thread_local Index threadIdx;
static Index blockIdx;
static pthread_barrier_t the_barrier;
static inline void __syncthreads() { pthread_barrier_wait(&the_barrier); }
struct half {};
#define VECTORS(type) \
  struct alignas(8) type##2 { type x, y; }; \
  struct alignas(16) type##4 { type x, y, z, w; }; \
  static inline type##2 make_##type##2(type x, type y) { return {x, y}; } \
  static inline type##4 make_##type##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(int)
VECTORS(float)
using std::max; using std::min;
static inline float __float_to_tf32(float value) {
  uint32_t bits; memcpy(&bits, &value, 4);
  bits = (bits + 0x1000u) & 0xffffe000u;
  memcpy(&value, &bits, 4);
  return value;
}
namespace nvcuda { namespace wmma {
struct matrix_a {}; struct matrix_b {}; struct accumulator {};
struct row_major {}; struct col_major {};
namespace precision { struct tf32 {}; }
enum layout_t { mem_row_major, mem_col_major };
template <class side, int m, int n, int k, class type, class layout = void> class fragment;
template <class layout> class fragment<matrix_a, 16, 16, 8, precision::tf32, layout> {
 public: static const int num_elements = 128; float x[128]; };
template <class layout> class fragment<matrix_b, 16, 16, 8, precision::tf32, layout> {
 public: static const int num_elements = 128; float x[128]; };
template <> class fragment<accumulator, 16, 16, 8, float> {
 public: static const int num_elements = 256; float x[256]; };
typedef fragment<accumulator, 16, 16, 8, float> sums;
static void load_tile(float* x, bool columns, int m, int n, const float* from, unsigned stride) {
  if ((uintptr_t)from % 32 || stride % 4) __builtin_trap();  // what CUDA asks for
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) x[i * n + j] = columns ? from[j * stride + i] : from[i * stride + j];
}
static void load_matrix_sync(fragment<matrix_a, 16, 16, 8, precision::tf32, row_major>& tile,
                             const float* from, unsigned stride) {
  load_tile(tile.x, false, 16, 8, from, stride);
}
static void load_matrix_sync(fragment<matrix_b, 16, 16, 8, precision::tf32, row_major>& tile,
                             const float* from, unsigned stride) {
  load_tile(tile.x, false, 8, 16, from, stride);
}
static void load_matrix_sync(fragment<matrix_b, 16, 16, 8, precision::tf32, col_major>& tile,
                             const float* from, unsigned stride) {
  load_tile(tile.x, true, 8, 16, from, stride);
}
static void fill_fragment(sums& tile, float value) { for (float& x : tile.x) x = value; }
static void store_matrix_sync(float* to, const sums& tile, unsigned stride, layout_t) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * stride + j] = tile.x[i * 16 + j];
}
template <class layout>
static void mma_sync(sums& d, const fragment<matrix_a, 16, 16, 8, precision::tf32, row_major>& a,
                     const fragment<matrix_b, 16, 16, 8, precision::tf32, layout>& b,
                     const sums& c) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[i * 16 + j];
      for (int k = 0; k < 8; ++k) sum += a.x[i * 8 + k] * b.x[k * 16 + j];
      d.x[i * 16 + j] = sum;
    }
}
} }
"""

_RUN = """
extern "C" void run(void** buffers, const unsigned* grid, const unsigned* block) {
  unsigned count = block[0] * block[1] * block[2];
  pthread_barrier_init(&the_barrier, nullptr, count);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) threads.emplace_back([=] {
    threadIdx = {t % block[0], t / block[0] % block[1], t / block[0] / block[1]};
    for (unsigned z = 0; z < grid[2]; ++z)
      for (unsigned y = 0; y < grid[1]; ++y)
        for (unsigned x = 0; x < grid[0]; ++x) {
          __syncthreads();
          if (t == 0) blockIdx = {x, y, z};
          __syncthreads();
          CALL;
        }
  });
  for (std::thread& thread : threads) thread.join();
}
"""

_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')


def run_on_cpu(
    source: str, scheduled: tvm.IRModule, arrays: Sequence[np.ndarray], folder: Path
) -> list[np.ndarray]:
    """Run a kernel and return its buffers afterwards.

    Args:
        source: the CUDA source, with one kernel.
        scheduled: the module it was generated from, which tells how many threads it binds.
        arrays: the buffers, float32.
        folder: for what is compiled.
    """
    ((name, parameters),) = _KERNEL.findall(source)
    order = [word.split()[-1].removesuffix("_ptr") for word in parameters.split(",")]
    names = [str(buffer.name) for buffer in scheduled["main"].params]
    given = ", ".join(f"(float*)buffers[{names.index(each)}]" for each in order)
    code = source[source.index('extern "C" __global__') :]
    text = _HEAD + TF32_TILES + code + _RUN.replace("CALL", f"{name}({given})")
    (folder / "kernel.cpp").write_text(text)
    library = folder / "kernel.so"
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-pthread", "kernel.cpp"]
    subprocess.run([*command, "-o", library.name], cwd=folder, check=True)
    bound = re.findall(r'thread_binding\((\d+), thread="(\w+\.[xyz])"', scheduled.script())
    extents = {axis: int(extent) for extent, axis in bound}
    copies = [np.ascontiguousarray(array).copy() for array in arrays]
    pointers = (ctypes.c_void_p * len(copies))(*[copy.ctypes.data for copy in copies])
    sizes = [
        (ctypes.c_uint * 3)(*[extents.get(f"{kind}.{axis}", 1) for axis in "xyz"])
        for kind in ("blockIdx", "threadIdx")
    ]
    ctypes.CDLL(str(library)).run(pointers, *sizes)
    return copies
