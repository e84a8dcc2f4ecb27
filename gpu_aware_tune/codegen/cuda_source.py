"""What is changed in TVM's CUDA source before it is compiled.

`lean_source` takes the C++ standard library out, `with_tf32_tiles` puts in what TF32 tiles are.
"""

from __future__ import annotations

import re

_LEAN_HEAD = """\
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef signed short int16_t;
typedef unsigned short uint16_t;
typedef signed int int32_t;
typedef unsigned int uint32_t;
typedef signed long long int64_t;
typedef unsigned long long uint64_t;
#define __asm__ asm
#define __volatile__ volatile
#define INFINITY (__int_as_float(0x7f800000))
"""

# The block with which TVM's code generator begins every source, up to the `#endif` of its #else.
_TVM_HEAD = re.compile(
    r"\A\s*#ifdef __CUDACC_RTC__\n(?:.*\n)*?#else\n(?:\s*#include <.*>\n)*#endif"
)
_USES_STD = re.compile(r"(?<!\w)(?:cuda::|std::|CUtensorMap)")

# CUDA has no tiles of 16 x 16 x 8 halves: `tf32` gives them this name where it means TF32 tiles,
# since TVM's code generator refuses tiles of floats. Rounding is what CUDA asks for after a load.
_TF32_TILE = re.compile(r"wmma::matrix_[ab], 16, 16, 8, half,")
_TF32_TILES = """\
namespace nvcuda { namespace wmma {
#define TF32_TILE(side, layout) \\
  template <> class fragment<side, 16, 16, 8, half, layout> \\
      : public fragment<side, 16, 16, 8, precision::tf32, layout> {}; \\
  static __device__ __forceinline__ void load_matrix_sync( \\
      fragment<side, 16, 16, 8, half, layout>& tile, const float* from, unsigned stride) { \\
    fragment<side, 16, 16, 8, precision::tf32, layout>& floats = tile; \\
    load_matrix_sync(floats, from, stride); \\
    for (int i = 0; i < tile.num_elements; ++i) tile.x[i] = __float_to_tf32(tile.x[i]); \\
  }
TF32_TILE(matrix_a, row_major)
TF32_TILE(matrix_b, row_major)
TF32_TILE(matrix_b, col_major)
} }
"""
_MMA_HEADER = "#include <mma.h>\n"


def lean_source(source: str) -> str | None:
    """The source without the C++ standard headers; None where it needs them or is not TVM's."""
    head = _TVM_HEAD.match(source)
    if head is None or _USES_STD.search(source, head.end()):
        return None
    return _LEAN_HEAD + source[head.end() :]


def with_tf32_tiles(source: str) -> str:
    """The source with the definition of TF32 tiles, where it uses them."""
    if not _TF32_TILE.search(source):
        return source
    return source.replace(_MMA_HEADER, _MMA_HEADER + _TF32_TILES, 1)
