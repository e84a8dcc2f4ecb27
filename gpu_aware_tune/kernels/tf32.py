"""TF32: float32 products on an NVIDIA GPU's tensor cores, with inputs rounded to 10 bits of mantissa.

Kernels that may do so are marked, so that their records are never mixed with those of float32:

    mark_products         marks a model's matrix products and convolutions
    is_marked             tells whether a kernel is
    tensor_core_rule      what its search space has besides float32's
    register_intrinsics   what schedules of that space name

TVM 0.27 has no TF32: its rule for tensor cores takes any intrinsics, but its code generator refuses
tiles of floats. So the tiles of the two factors are declared as halves of a shape that CUDA does not
have (16 x 16 x 8), and `cuda_source` tells the compiler that these are TF32 tiles. Sums are float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm.ir.expr import TensorLoad
from tvm.s_tir import SBlock, Schedule
from tvm.tirx import Add, BufferStore, Mul, PrimFunc

from gpu_aware_tune.errors import UserError
from gpu_aware_tune.workers.warm import cheap_stack, load_intrinsics

MARK = "gpu_aware_tune.kernels.tf32"
LEAST_ARCH = 80  # compute capability 8.0
ROUNDING = 2.0**-11  # of one factor, relative

_ROWS, _COLUMNS, _TERMS = 16, 16, 8  # of a tile
_TENSORIZE = "meta_schedule.auto_tensorize"  # TVM's name
TF32_INTRINSICS = "wmma_tf32"  # what the names of all begin with; TVM's rule asks for "wmma"
_LOADS, _MATCH, _SYNC = (f"{TF32_INTRINSICS}_{name}" for name in ("load", "match", "sync"))
_FILL, _STORE = f"{TF32_INTRINSICS}_fill", f"{TF32_INTRINSICS}_store"
# Rows of shared memory are so many floats longer than a multiple of the 32 banks, by the intrinsic
# that reads them: the 32 lanes of a warp then read from 32 banks. Both keep rows on 16 bytes.
_SKEW = {f"{_LOADS}_a": 4, f"{_LOADS}_b": 8, f"{_LOADS}_b_trans": 4}
_BANKS = 32
_QUIET = logging.getLogger("gpu_aware_tune.kernels.tf32.rule")
_QUIET.setLevel(logging.ERROR)
# The sums that TVM's rule looks for in a kernel, of floats, and what they become.
_SUMS = {f"{_MATCH}{end}": f"{_SYNC}{end}" for end in ("", "_trans")}


def mark_products(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Mark the kernels of a fused module that sum products of float32 values.

    Raises:
        UserError: the target has no TF32, or the model nothing to use it for.
    """
    arch = str(target.attrs.get("arch", "")) if target.kind.name == "cuda" else target.kind.name
    digits = "".join(letter for letter in arch.removeprefix("sm_") if letter.isdigit())
    if not arch.startswith("sm_") or int(digits) < LEAST_ARCH:
        raise UserError(
            f"dtype tf32 needs an NVIDIA GPU of sm_{LEAST_ARCH} or newer, not {arch}: leave it out"
        )
    marked = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    found = False
    for variable, function in module.functions.items():
        if isinstance(function, PrimFunc) and _sums_products(function):
            marked.update_func(variable, function.with_attr(MARK, 1))
            found = True
    if not found:
        raise UserError(
            "dtype tf32: the model has no float32 matrix product or convolution; leave it out"
        )
    return marked


def is_marked(function: Any) -> bool:
    """Whether a kernel may compute its products in TF32."""
    return function.attrs is not None and MARK in function.attrs


def tensor_core_rule() -> Any:
    """TVM's rule for tensor cores with TF32's intrinsics; each kernel keeps its float32 design, too.

    Source: `MultiLevelTilingTensorCore` of `tvm.s_tir.meta_schedule.schedule_rule`, with the tiling
    that TVM's defaults for CUDA have.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule import TuneContext
    from tvm.s_tir.meta_schedule.schedule_rule import MultiLevelTilingTensorCore, PyScheduleRule
    from tvm.s_tir.meta_schedule.schedule_rule.multi_level_tiling import ReuseType

    register_intrinsics()

    @derived_object
    class Tf32(PyScheduleRule):
        def __init__(self) -> None:
            super().__init__()
            self.tiling = MultiLevelTilingTensorCore(
                intrin_groups=[_intrinsics(""), _intrinsics("_trans")],
                structure="SSSRRSRS",
                tile_binds=["blockIdx.y", "blockIdx.x", "threadIdx.y"],
                max_innermost_factor=4,
                vector_load_lens=[1, 2, 4],
                reuse_read=ReuseType("must", [4], "shared"),
                reuse_write=ReuseType("must", [2], "shared"),
            )

        def _initialize_with_tune_context(self, context: Any) -> None:
            # TVM's rule warns that it leaves floats' rows as they are: see `_SKEW`.
            quiet = TuneContext(mod=context.mod, target=context.target, logger=_QUIET)
            self.tiling._initialize_with_tune_context(quiet)

        def apply(self, schedule: Schedule, block: Any) -> list[Schedule]:
            others = _tiles(schedule, _SKEW)  # of another block that was tiled before
            tiled = []
            for design in self.tiling.apply(schedule.copy(), block):
                loads = [tile for tile in _tiles(design, _SKEW) if tile not in others]
                if loads:
                    _declare_tiles(design, loads)
                    tiled += [design, _fetching_ahead(design, loads)]
            return [*tiled, schedule]

        def clone(self) -> Any:
            return Tf32()

    return Tf32()


@functools.cache
def register_intrinsics() -> None:
    """Make the intrinsics known that schedules for TF32 name."""
    load_intrinsics("cuda")
    from tvm.s_tir import TensorIntrin
    from tvm.s_tir.tensor_intrin import cuda

    shape = (_ROWS, _COLUMNS, _TERMS)
    with cheap_stack():
        for name in _SKEW:
            of_b, transposed = name != f"{_LOADS}_a", name.endswith("_trans")
            TensorIntrin.register(name, *_load_intrinsic(of_b, transposed))
        for transposed in (False, True):
            end = "_trans" if transposed else ""
            floats = cuda.get_wmma_sync_intrin(*shape, "float32", "float32", transposed)
            TensorIntrin.register(_MATCH + end, *floats)
            tiles = cuda.get_wmma_sync_intrin(*shape, "float16", "float32", transposed)
            TensorIntrin.register(_SYNC + end, *tiles)
        fill = cuda.get_wmma_fill_intrin(*shape, "float32")
        TensorIntrin.register(_FILL, *fill)
        store = cuda.get_wmma_store_intrin(*shape, "float32", "shared")
        TensorIntrin.register(_STORE, *store)


def _intrinsics(end: str) -> dict[str, str]:
    """One group for TVM's rule; `end` is "_trans" where the second factor lies in columns."""
    return {
        "init": _FILL,
        "load_a": f"{_LOADS}_a",
        "load_b": f"{_LOADS}_b{end}",
        "compute": f"{_MATCH}{end}",
        "store": _STORE,
    }


def _load_intrinsic(of_b: bool, transposed: bool) -> tuple[Any, Any]:
    """(what it does, how) of loading a tile of floats from shared memory as a TF32 tile.

    Source: `get_wmma_load_intrin` of `tvm.s_tir.tensor_intrin.cuda`, which knows no two types.
    """
    from tvm.s_tir.tensor_intrin.cuda import get_wmma_fragment_index
    from tvm.script import tirx as T

    rows, columns = (_TERMS, _COLUMNS) if of_b else (_ROWS, _TERMS)
    if transposed:
        rows, columns = columns, rows
    layout = "col_major" if transposed else "row_major"
    scope = "wmma.matrix_b" if of_b else "wmma.matrix_a"
    shape = (rows, columns)
    m, n, k = _ROWS, _COLUMNS, _TERMS

    @T.prim_func(s_tir=True)
    def what(a: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, shape, "float32", align=64, offset_factor=columns, scope="shared")
        C = T.match_buffer(c, shape, "float16", align=64, offset_factor=columns, scope=scope)
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(C[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("load"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = T.Cast("float16", A[vi, vj])

    @T.prim_func(s_tir=True)
    def how(a: T.handle, c: T.handle) -> None:
        s1 = T.int32()
        s0 = T.int32()
        d1 = T.int32()
        d0 = T.int32()
        A = T.match_buffer(
            a, shape, "float32", align=64, offset_factor=columns, scope="shared", strides=[s1, s0]
        )
        C = T.match_buffer(
            c, shape, "float16", align=64, offset_factor=columns, scope=scope, strides=[d1, d0]
        )
        with T.sblock("root"):
            T.reads(A[0:rows, 0:columns])
            T.writes(C[0:rows, 0:columns])
            T.evaluate(
                T.tvm_load_matrix_sync(
                    C.data,
                    m,
                    n,
                    k,
                    get_wmma_fragment_index(C, d1, rows, columns),
                    A.access_ptr("r", ptr_type="float32"),
                    s1,
                    layout,
                    dtype="void",
                )
            )

    return what, how


def _declare_tiles(schedule: Schedule, loads: Sequence[tuple[str, str]]) -> None:
    """Give the tiles that TVM's rule has just made their type, and the rows they are read from a skew.

    Args:
        schedule: of the rule.
        loads: the blocks that load tiles, as `_tiles` gives them.
    """
    for name, intrinsic in loads:
        load = schedule.get_sblock(name)
        shared = schedule.get_producers(load)[0]
        schedule.storage_align(shared, 0, -2, _BANKS, _SKEW[intrinsic])
        schedule.unsafe_set_dtype(load, 0, "float16")
    for name, intrinsic in _tiles(schedule, _SUMS):
        block = schedule.get_sblock(name)
        schedule.unannotate(block, _TENSORIZE)
        schedule.annotate(block, _TENSORIZE, _SUMS[intrinsic])


def _tiles(schedule: Schedule, intrinsics: Collection[str]) -> list[tuple[str, str]]:
    """(block, intrinsic) of the blocks that are to become one of the intrinsics."""
    found: list[tuple[str, str]] = []

    def visit(block: Any) -> None:
        intrinsic = str(block.annotations.get(_TENSORIZE, ""))
        if intrinsic in intrinsics:
            found.append((str(block.name_hint), intrinsic))

    tvm_ffi.structural_walk(schedule.mod["main"].body, (SBlock, visit))
    return found


def _fetching_ahead(tiled: Schedule, loads: Sequence[tuple[str, str]]) -> Schedule:
    """The design with the next tiles on their way from global memory while this one is worked on.

    TVM's rule has a software pipeline of its own, which also loads tiles from shared memory ahead;
    TVM 0.27 cannot lower that one for tiles.
    """
    schedule = tiled.copy()
    shared = [schedule.get_producers(schedule.get_sblock(name))[0] for name, _ in loads]
    steps = schedule.get_loops(shared[0])[-2]
    for block in shared:
        schedule.annotate(block, "tirx.manifest_shared_memory_local_stage", 1)
        schedule.annotate(block, "double_buffer_scope", 0)
    # Each fetch in two, global memory to registers to shared memory, then the sums.
    schedule.annotate(steps, "software_pipeline_stage", [0, 0, 0, 0, 1])
    schedule.annotate(steps, "software_pipeline_order", [0, 3, 1, 4, 2])
    return schedule


def _sums_products(function: PrimFunc) -> bool:
    """Whether a kernel has a block that sums products of two float32 buffers' values."""
    found: list[Any] = []

    def visit(block: Any) -> None:
        if block.init is None or not isinstance(block.body, BufferStore):
            return
        value = block.body.value
        if not isinstance(value, Add) or not isinstance(value.b, Mul):
            return
        factors = (value.b.a, value.b.b)
        if not all(isinstance(factor, TensorLoad) for factor in factors):
            return
        buffers = [block.writes[0].source, *(factor.source for factor in factors)]
        types = {str(buffer.dtype) for buffer in buffers}
        if types == {"float32"} and not buffers[1].same_as(buffers[2]):
            found.append(block)

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return bool(found)
