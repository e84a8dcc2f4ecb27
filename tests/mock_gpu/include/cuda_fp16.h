// float16 on the CPU: every operation in float, rounded once.
#pragma once
#include <immintrin.h>

struct half {
  unsigned short bits;
  half() = default;
  half(const half&) = default;
  half& operator=(const half&) = default;
  half(const volatile half& o) : bits(o.bits) {}
  void operator=(half o) volatile { bits = o.bits; }
  half(float v) : bits((unsigned short)_cvtss_sh(v, 0)) {}
  half(double v) : half((float)v) {}
  half(int v) : half((float)v) {}
  half(long v) : half((float)v) {}
  half(long long v) : half((float)v) {}
  half(unsigned v) : half((float)v) {}
  half(bool v) : half((float)v) {}
  operator float() const volatile { return _cvtsh_ss(bits); }
  half& operator+=(half o) { return *this = half((float)*this + (float)o); }
};
#define HALF_OPERATOR(op) \
  static inline half operator op(half a, half b) { return half((float)a op (float)b); }
HALF_OPERATOR(+)
HALF_OPERATOR(-)
HALF_OPERATOR(*)
HALF_OPERATOR(/)
static inline half operator-(half a) { return half(-(float)a); }
typedef half __half;
struct alignas(4) half2 { half x, y; };
typedef half2 __half2;
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline bool __hgt(half a, half b) { return (float)a > (float)b; }
static inline bool __hlt(half a, half b) { return (float)a < (float)b; }
static inline bool __hisnan(half a) { return (float)a != (float)a; }
static inline float __half2float(half a) { return a; }
static inline half __float2half(float a) { return half(a); }
static inline half __float2half_rn(float a) { return half(a); }
static inline half hexp(half a) { return half(expf(a)); }
static inline half hsqrt(half a) { return half(sqrtf(a)); }
static inline half hrsqrt(half a) { return half(1.f / sqrtf(a)); }
static inline half htanh(half a) { return half(tanhf(a)); }
static inline half hlog(half a) { return half(logf(a)); }
static inline half hfloor(half a) { return half(floorf(a)); }
static inline half hfma(half a, half b, half c) { return half((float)a * (float)b + (float)c); }
static inline half __hfma(half a, half b, half c) { return hfma(a, b, c); }
