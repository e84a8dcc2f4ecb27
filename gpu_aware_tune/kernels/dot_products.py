"""Dot products of four 8-bit integers: the instruction `vpdpbusd` (AVX512-VNNI, AVX-VNNI) as intrinsics.

For each lane it adds four products of unsigned and signed bytes to a 32-bit sum, without saturating. TVM
0.27 has such an intrinsic (`tvm.s_tir.tensor_intrin.x86`), but passes LLVM's function vectors of another
type than the LLVM in its wheel takes, so that nothing which uses it compiles.
"""

from __future__ import annotations

import functools
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.target import codegen

TERMS = 4  # products in one sum
INTRINSICS = "vpdpbusd"  # what the names of all begin with

_FEATURES = {16: "avx512vnni", 8: "avxvnni"}  # by lanes


def has_dot_products(target: tvm.target.Target, lanes: int) -> bool:
    """Whether a CPU target sums four products of bytes in each of so many 32-bit lanes."""
    if target.kind.name != "llvm" or lanes not in _FEATURES:
        return False
    return bool(codegen.target_has_features(_FEATURES[lanes], target))


def dot_product(lanes: int) -> str:
    """The name of the intrinsic for vectors of so many lanes, registered with TVM."""
    register_intrinsics()
    return f"{INTRINSICS}_{lanes}x{TERMS}"


@functools.cache
def register_intrinsics() -> None:
    """Register the intrinsics in this process; schedules name them."""
    from tvm.s_tir import TensorIntrin

    for lanes in _FEATURES:
        name = f"{INTRINSICS}_{lanes}x{TERMS}"
        TensorIntrin.register(name, _described(lanes), _implemented(lanes))


def _described(lanes: int) -> Any:
    """What the intrinsic computes, as a schedule finds it."""

    @T.prim_func(s_tir=True)
    def described(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "int8", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return described


def _implemented(lanes: int) -> Any:
    bits, bytes_ = 32 * lanes, TERMS * lanes
    sums, unsigned, signed = f"int32x{lanes}", f"uint8x{bytes_}", f"int8x{bytes_}"
    function = f"llvm.x86.avx512.vpdpbusd.{bits}"

    @T.prim_func(s_tir=True)
    def implemented(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "int8", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            quad = T.reinterpret(A.vload([0], "uint8x4"), dtype="int32")
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(function),
                C.vload([0], dtype=sums),
                T.reinterpret(T.broadcast(quad, lanes), dtype=unsigned),
                B.vload([0, 0], dtype=signed),
                dtype=sums,
            )

    return implemented
