// CUDA C++ as TVM writes it, compiled for the CPU: one block at a time, its threads as fibers.
//
// A fiber runs until it waits for its block (__syncthreads) or for its warp (shuffles), so a kernel
// that waits wrongly hangs or computes nonsense here as it would there. A tile of the tensor cores is
// kept whole by each thread of its warp, which loads, adds up and stores all of it: how the hardware
// spreads it over the warp is not a kernel's business.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))
#define INFINITY __builtin_inff()

namespace fibers {
enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Index { unsigned x, y, z; };
struct Fiber { jmp_buf place; State state; Index index; };
const size_t STACK = 256 << 10;
static Fiber all[1024];
static unsigned count, now;
static jmp_buf scheduler;
static char* stacks;
static void (*body)(void**);
static void** arguments;
}  // namespace fibers
static fibers::Index threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {
// Jumps between stacks cost no system call, as switching contexts would; those begin fibers only.
static void wait(State state) {
  all[now].state = state;
  if (!_setjmp(all[now].place)) _longjmp(scheduler, 1);
}
static void start() {
  for (;;) {
    body(arguments);
    wait(DONE);  // until the next block
  }
}
static void begin(unsigned i) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + i * STACK;
  context.uc_stack.ss_size = STACK;
  makecontext(&context, start, 0);
  setcontext(&context);
}
// Lets those go on whom all others of `from` to `to` - 1 have caught up with.
static void release(State state, unsigned from, unsigned to) {
  for (unsigned i = from; i < to; ++i)
    if (all[i].state != state && all[i].state != DONE) return;
  for (unsigned i = from; i < to; ++i)
    if (all[i].state == state) all[i].state = READY;
}
static void run_block(bool first) {
  for (unsigned i = 0; i < count; ++i) all[i].state = READY;
  for (;;) {
    bool ran = false;
    for (now = 0; now < count; ++now) {
      if (all[now].state != READY) continue;
      ran = true;
      threadIdx = all[now].index;
      if (_setjmp(scheduler)) continue;
      if (first) begin(now);
      _longjmp(all[now].place, 1);
    }
    first = false;
    bool left = false;
    for (unsigned i = 0; i < count; ++i) left |= all[i].state != DONE;
    if (!left) return;
    if (!ran) {
      fprintf(stderr, "threads of a block wait for one another\n");
      abort();
    }
    for (unsigned i = 0; i < count; i += 32) release(AT_WARP, i, i + 32 < count ? i + 32 : count);
    release(AT_BLOCK, 0, count);
  }
}
static void prepare(void (*kernel)(void**), const unsigned* grid, const unsigned* block, void** args) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  count = block[0] * block[1] * block[2];
  body = kernel;
  arguments = args;
  for (unsigned i = 0; i < count; ++i)
    all[i].index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
}
template <class Block> static void each_block(Block run) {
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run();
      }
}
// Runs a kernel; one at a time in a process, as shared memory is static.
static void launch(void (*kernel)(void**), const unsigned* grid, const unsigned* block, void** args) {
  prepare(kernel, grid, block, args);
  if (!stacks)
    stacks = (char*)mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  bool first = true;
  each_block([&] { run_block(first); first = false; });
}
// The same for a kernel whose threads do not wait for one another.
static void launch_each(void (*kernel)(void**), const unsigned* grid, const unsigned* block,
                        void** args) {
  prepare(kernel, grid, block, args);
  each_block([] {
    for (now = 0; now < count; ++now) {
      threadIdx = all[now].index;
      body(arguments);
    }
  });
}
static char passed[1024][16];
template <class T> static T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) <= 16, "wider than what is passed on");
  unsigned first = now / 32 * 32;
  memcpy(passed[now], &value, sizeof(T));
  wait(AT_WARP);
  T found = value;
  if (lane < 32 && first + lane < count) memcpy(&found, passed[first + lane], sizeof(T));
  wait(AT_WARP);
  return found;
}
}  // namespace fibers

static inline void __syncthreads() { fibers::wait(fibers::AT_BLOCK); }
static inline void __syncwarp(unsigned = ~0u) { fibers::wait(fibers::AT_WARP); }
static inline unsigned __activemask() { return ~0u; }
template <class T> static T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  int own = fibers::now % 32;
  return fibers::from_lane(value, own / width * width + lane % width);
}
template <class T> static T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
  unsigned own = fibers::now % 32;
  return fibers::from_lane(value, own % width + by < (unsigned)width ? own + by : own);
}
template <class T> static T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
  unsigned own = fibers::now % 32;
  return fibers::from_lane(value, own % width >= by ? own - by : own);
}
template <class T> static T __shfl_xor_sync(unsigned, T value, unsigned mask, int = 32) {
  return fibers::from_lane(value, fibers::now % 32 ^ mask);
}

#define VECTORS(type, name) \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  struct name##3 { type x, y, z; }; \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(signed char, char)
VECTORS(unsigned char, uchar)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(long long, longlong)
VECTORS(float, float)
VECTORS(double, double)

template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline float __int_as_float(int bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline int __float_as_int(float v) { int bits; memcpy(&bits, &v, 4); return bits; }
// The C library has functions of these names that it does not show.
#define __expf(v) expf(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __log10f(v) log10f(v)
#define __exp10f(v) powf(10.f, v)
#define __powf(v, w) powf(v, w)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
#define __tanf(v) tanf(v)
static inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
static inline float __frcp_rn(float v) { return 1.f / v; }
static inline float __float_to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = (bits + 0x1000u) & 0xffffe000u;
  memcpy(&value, &bits, 4);
  return value;
}
