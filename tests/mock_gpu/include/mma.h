// Tiles of the tensor cores on the CPU; see cuda_on_cpu.h.
#pragma once
#include "cuda_fp16.h"

namespace nvcuda { namespace wmma {
struct matrix_a {}; struct matrix_b {}; struct accumulator {};
struct row_major { static const bool columns = false; };
struct col_major { static const bool columns = true; };
namespace precision { struct tf32 {}; }
enum layout_t { mem_row_major, mem_col_major };

template <class type> struct element { typedef type kept; };
template <> struct element<precision::tf32> { typedef float kept; };
template <class side, int m, int n, int k> struct extent;
template <int m, int n, int k> struct extent<matrix_a, m, n, k> { enum { rows = m, cols = k }; };
template <int m, int n, int k> struct extent<matrix_b, m, n, k> { enum { rows = k, cols = n }; };
template <int m, int n, int k> struct extent<accumulator, m, n, k> { enum { rows = m, cols = n }; };

template <class side, int m, int n, int k, class type, class layout = row_major> class fragment {
 public:
  typedef extent<side, m, n, k> shape;
  enum { rows = shape::rows, cols = shape::cols, num_elements = rows * cols };
  typename element<type>::kept x[num_elements];
};

template <class side, int m, int n, int k, class type, class layout, class value>
static void load_matrix_sync(fragment<side, m, n, k, type, layout>& tile, const value* from,
                             unsigned stride) {
  if ((uintptr_t)from % 32 || stride * sizeof(value) % 16) __builtin_trap();  // what CUDA asks for
  for (int i = 0; i < tile.rows; ++i)
    for (int j = 0; j < tile.cols; ++j)
      tile.x[i * tile.cols + j] = layout::columns ? from[j * stride + i] : from[i * stride + j];
}
template <int m, int n, int k, class type, class value>
static void fill_fragment(fragment<accumulator, m, n, k, type>& tile, value with) {
  for (int i = 0; i < tile.num_elements; ++i) tile.x[i] = type(with);
}
template <int m, int n, int k, class type>
static void store_matrix_sync(type* to, const fragment<accumulator, m, n, k, type>& tile,
                              unsigned stride, layout_t) {
  if ((uintptr_t)to % 32 || stride * sizeof(type) % 16) __builtin_trap();
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) to[i * stride + j] = tile.x[i * n + j];
}
template <int m, int n, int k, class sum, class type, class of_a, class of_b>
static void mma_sync(fragment<accumulator, m, n, k, sum>& d,
                     const fragment<matrix_a, m, n, k, type, of_a>& a,
                     const fragment<matrix_b, m, n, k, type, of_b>& b,
                     const fragment<accumulator, m, n, k, sum>& c) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float total = c.x[i * n + j];
      for (int t = 0; t < k; ++t) total += (float)a.x[i * k + t] * (float)b.x[t * n + j];
      d.x[i * n + j] = sum(total);
    }
}
} }
