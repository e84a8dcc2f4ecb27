"""The two kernels that the partitions bring along: which SMs a launch runs on, and a steady load.

They are kept as PTX, which the driver compiles when it loads them, so that checking a partition
needs no compiler. `PTX` is what NVRTC 13.0.88 makes of `SOURCE` for compute_75, without comments
and with the lowest PTX version that knows this architecture, for older drivers to read it too;
tests/tvm/test_probe_kernels.py makes it again.

    sm_probe    the first thread of each block writes the number of its SM; all spin `cycles`, so
                that no SM is done before every SM had a block
    sentinel    `rounds` of a load from anywhere in `data` (`mask` + 1 floats) and 64 multiply-adds
"""

from __future__ import annotations

SOURCE = """\
extern "C" __global__ void sm_probe(unsigned int *ids, unsigned int cycles) {
  unsigned int sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0) ids[blockIdx.x] = sm;
  unsigned int start = clock();
  while ((unsigned int)clock() - start < cycles) { }
}
extern "C" __global__ void sentinel(float *data, unsigned int mask, unsigned int rounds) {
  unsigned int place = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = data[place & mask];
  for (unsigned int round = 0; round < rounds; ++round) {
    place = place * 1664525u + 1013904223u;
    sum += data[place & mask];
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = sum * 0.999f + 0.001f;
    }
  }
  data[(blockIdx.x * blockDim.x + threadIdx.x) & mask] = sum;
}
"""

PTX = """\
.version 6.3
.target sm_75
.address_size 64
.visible .entry sm_probe(
  .param .u64 sm_probe_param_0,
  .param .u32 sm_probe_param_1
)
{
  .reg .pred %p<3>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<7>;
  ld.param.u64 %rd1, [sm_probe_param_0];
  ld.param.u32 %r3, [sm_probe_param_1];
  mov.u32 %r4, %smid;
  mov.u32 %r5, %tid.x;
  setp.ne.s32 %p1, %r5, 0;
  @%p1 bra $L__BB0_2;
  cvta.to.global.u64 %rd2, %rd1;
  mov.u32 %r6, %ctaid.x;
  mul.wide.u32 %rd3, %r6, 4;
  add.s64 %rd4, %rd2, %rd3;
  st.global.u32 [%rd4], %r4;
$L__BB0_2:
  mov.u64 %rd5, %clock64;
  cvt.u32.u64 %r2, %rd5;
$L__BB0_3:
  mov.u64 %rd6, %clock64;
  cvt.u32.u64 %r7, %rd6;
  sub.s32 %r8, %r7, %r2;
  setp.lt.u32 %p2, %r8, %r3;
  @%p2 bra $L__BB0_3;
  ret;
}
.visible .entry sentinel(
  .param .u64 sentinel_param_0,
  .param .u32 sentinel_param_1,
  .param .u32 sentinel_param_2
)
{
  .reg .pred %p<4>;
  .reg .f32 %f<14>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<7>;
  ld.param.u64 %rd3, [sentinel_param_0];
  ld.param.u32 %r8, [sentinel_param_1];
  ld.param.u32 %r9, [sentinel_param_2];
  cvta.to.global.u64 %rd1, %rd3;
  mov.u32 %r10, %ntid.x;
  mov.u32 %r11, %ctaid.x;
  mov.u32 %r12, %tid.x;
  mad.lo.s32 %r18, %r11, %r10, %r12;
  and.b32 %r13, %r18, %r8;
  mul.wide.u32 %rd4, %r13, 4;
  add.s64 %rd2, %rd1, %rd4;
  ld.global.f32 %f11, [%rd2];
  setp.eq.s32 %p1, %r9, 0;
  @%p1 bra $L__BB1_5;
  mov.u32 %r14, 0;
  mov.u32 %r17, %r14;
$L__BB1_2:
  mad.lo.s32 %r18, %r18, 1664525, 1013904223;
  and.b32 %r16, %r18, %r8;
  mul.wide.u32 %rd5, %r16, 4;
  add.s64 %rd6, %rd1, %rd5;
  ld.global.f32 %f7, [%rd6];
  add.f32 %f11, %f11, %f7;
  mov.u32 %r19, %r14;
$L__BB1_3:
  .pragma "nounroll";
  fma.rn.f32 %f8, %f11, 0f3F7FBE77, 0f3A83126F;
  fma.rn.f32 %f9, %f8, 0f3F7FBE77, 0f3A83126F;
  fma.rn.f32 %f10, %f9, 0f3F7FBE77, 0f3A83126F;
  fma.rn.f32 %f11, %f10, 0f3F7FBE77, 0f3A83126F;
  add.s32 %r19, %r19, 1;
  setp.ne.s32 %p2, %r19, 16;
  @%p2 bra $L__BB1_3;
  add.s32 %r17, %r17, 1;
  setp.lt.u32 %p3, %r17, %r9;
  @%p3 bra $L__BB1_2;
$L__BB1_5:
  st.global.f32 [%rd2], %f11;
  ret;
}
"""
