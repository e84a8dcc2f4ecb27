"""Dot products of small integers as intrinsics: `vpdpbusd` of four bytes, `vpmaddwd` of two 16-bit ones.

For each lane they add products to a 32-bit sum, without saturating: four of unsigned and signed bytes by
`vpdpbusd` (AVX512-VNNI, AVX-VNNI), two of bytes that were widened to 16 bits by `vpmaddwd` and an addition
(AVX2, AVX-512), which is still up to twice as fast as floats. `vpmaddubsw`, of four bytes without VNNI,
saturates. TVM 0.27 has such intrinsics (`tvm.s_tir.tensor_intrin.x86`), but passes LLVM's function vectors of
another type than the LLVM in its wheel takes, so that nothing which uses them compiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.target import codegen


@dataclass(frozen=True)
class DotProduct:
    """An instruction that adds the products of `terms` pairs of integers to each of `lanes` sums.

    Args:
        feature: what a processor must have, as LLVM names it.
        function: LLVM's name of it.
        types: of the values that all lanes share, and of those that each has for itself.
    """

    mnemonic: str
    lanes: int
    terms: int
    feature: str
    function: str
    types: tuple[str, str]

    @property
    def name(self) -> str:
        """What TVM knows the intrinsic by, once it is registered."""
        return f"{self.mnemonic}_{self.lanes}x{self.terms}"


_BYTES, _WIDENED = ("uint8", "int8"), ("int16", "int16")
# For each number of lanes the best comes first.
_ALL = (
    DotProduct("vpdpbusd", 16, 4, "avx512vnni", "llvm.x86.avx512.vpdpbusd.512", _BYTES),
    DotProduct("vpdpbusd", 8, 4, "avxvnni", "llvm.x86.avx512.vpdpbusd.256", _BYTES),
    DotProduct("vpmaddwd", 16, 2, "avx512bw", "llvm.x86.avx512.pmaddw.d.512", _WIDENED),
    DotProduct("vpmaddwd", 8, 2, "avx2", "llvm.x86.avx2.pmadd.wd", _WIDENED),
)


def dot_product_for(target: tvm.target.Target, lanes: int) -> DotProduct | None:
    """The best instruction that a CPU target has for sums in so many 32-bit lanes."""
    if target.kind.name != "llvm":
        return None
    fitting = (each for each in _ALL if each.lanes == lanes)
    return next(
        (each for each in fitting if codegen.target_has_features(each.feature, target)), None
    )


def names_dot_product(trace_json: str) -> bool:
    """Whether a trace uses one of the intrinsics."""
    return any(each.name in trace_json for each in _ALL)


@functools.cache
def register_intrinsics() -> None:
    """Register the intrinsics in this process; schedules name them."""
    from tvm.s_tir import TensorIntrin

    for each in _ALL:
        TensorIntrin.register(each.name, _described(each), _implemented(each))


def _described(instruction: DotProduct) -> Any:
    """What the intrinsic computes, as a schedule finds it."""
    lanes, terms = instruction.lanes, instruction.terms
    shared, own = instruction.types

    @T.prim_func(s_tir=True)
    def described(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (terms,), shared, offset_factor=1)
        B = T.match_buffer(b, (lanes, terms), own, offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:terms], B[0:lanes, 0:terms])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, terms):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return described


def _implemented(instruction: DotProduct) -> Any:
    lanes, terms = instruction.lanes, instruction.terms
    shared, own = instruction.types
    sums, function = f"int32x{lanes}", instruction.function
    few, left, right = f"{shared}x{terms}", f"{shared}x{terms * lanes}", f"{own}x{terms * lanes}"

    def added(total: Any, image: Any, weights: Any) -> Any:
        """The new sums: of `vpdpbusd`, which adds by itself, or of products in pairs."""
        found = T.llvm_lookup_intrinsic_id(function)
        if instruction.mnemonic == "vpdpbusd":
            return T.call_llvm_pure_intrin(found, total, image, weights, dtype=sums)
        return total + T.call_llvm_pure_intrin(found, image, weights, dtype=sums)

    @T.prim_func(s_tir=True)
    def implemented(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (terms,), shared, offset_factor=1)
        B = T.match_buffer(b, (lanes, terms), own, offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:terms], B[0:lanes, 0:terms])
            T.writes(C[0:lanes])
            together = T.reinterpret(A.vload([0], few), dtype="int32")
            C[T.ramp(T.int32(0), 1, lanes)] = added(
                C.vload([0], dtype=sums),
                T.reinterpret(T.broadcast(together, lanes), dtype=left),
                B.vload([0, 0], dtype=right),
            )

    return implemented
