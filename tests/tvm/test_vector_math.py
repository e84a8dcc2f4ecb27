"""exp and its like as polynomials: their errors, their special values, and that they are vectors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from scipy import special
from tvm import te, tirx
from tvm.s_tir import Schedule

from gpu_aware_tune.codegen.build_options import build_options
from gpu_aware_tune.kernels.vector_math import MARK, constant_power, mark_vector_math

LANES = 16
REFERENCES: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "erf": special.erf,
    "sigmoid": special.expit,
}
ALLOWED_ULP = {"exp": 2.0, "log": 2.0, "tanh": 4.0, "erf": 4.0, "sigmoid": 4.0}
MIN_NORMAL = 2.0**-126
SPECIAL = [
    *(sign * x for x in (0.0, math.inf, 1.0, 1e-45, MIN_NORMAL, 3.4028235e38) for sign in (1, -1)),
    *(sign * x for x in (88.72283, 88.72284, 87.33654, 103.97, 103.98, 104.1) for sign in (1, -1)),
    math.nan,
]


def target(cpu: str = "") -> tvm.target.Target:
    return tvm.target.Target(
        {"kind": "llvm", "mcpu": cpu or str(tvm.target.codegen.llvm_get_system_cpu())}
    )


def elementwise(function: Callable[[Any], Any], length: int, dtype: str = "float32") -> Any:
    """A module that computes a function of each element, in vectors."""
    x = te.placeholder((length,), dtype, name="x")
    y = te.compute((length,), lambda i: function(x[i]), name="y")
    kernel = te.create_prim_func([x, y]).with_attr("global_symbol", "main")
    schedule = Schedule(tvm.IRModule({"main": kernel}))
    (loop,) = schedule.get_loops(schedule.get_sblock("y"))
    schedule.vectorize(schedule.split(loop, [None, LANES])[1])
    return schedule.mod


def computed(function: Callable[[Any], Any], x: np.ndarray, cpu: str = "") -> np.ndarray:
    padded = np.resize(x, math.ceil(x.size / LANES) * LANES)
    module = elementwise(function, padded.size, x.dtype.name)
    with build_options(module, host := target(cpu)):
        built = tvm.tirx.build(module, target=host)
    result = tvm.runtime.tensor(np.zeros_like(padded))
    built["main"](tvm.runtime.tensor(padded), result)
    return np.asarray(result.numpy()[: x.size])


def samples(step: int = 4099) -> np.ndarray:
    """Every so-manieth of all float32 numbers, NaN and denormals among them, and special ones."""
    every = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([every, np.linspace(-12, 12, 400_001, dtype="float32"), special_values()])


def special_values() -> np.ndarray:
    return np.array(SPECIAL, "float32")


def reference(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(REFERENCES[name](x.astype(np.float64)))


def worst_ulp(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error where the result is a normal number."""
    with np.errstate(over="ignore"):
        rounded = wanted.astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(rounded) >= MIN_NORMAL)
    ulp = np.spacing(np.abs(rounded[normal])).astype(np.float64)
    return float((np.abs(got[normal] - wanted[normal]) / ulp).max())


@pytest.mark.parametrize("cpu", ["", "x86-64"], ids=["this processor", "without fused arithmetic"])
@pytest.mark.parametrize("name", REFERENCES)
def test_errors_stay_below_a_few_ulp(name: str, cpu: str) -> None:
    x = samples(step=4099 if not cpu else 65_537)
    assert worst_ulp(computed(getattr(tirx, name), x, cpu), reference(name, x)) <= ALLOWED_ULP[name]


@pytest.mark.parametrize("name", REFERENCES)
def test_nan_infinity_zero_and_their_signs(name: str) -> None:
    x = samples(step=65_537)
    got, wanted = computed(getattr(tirx, name), x), reference(name, x)
    with np.errstate(over="ignore"):
        rounded = wanted.astype(np.float32)
    large = np.abs(rounded) >= MIN_NORMAL
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(rounded))
    known = ~np.isnan(rounded)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(rounded[known]))
    small = known & ~large
    assert (np.abs(got[small]) <= MIN_NORMAL).all()
    assert (got[rounded == 0] == 0).all()


def test_a_wrong_coefficient_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_aware_tune.kernels import vector_math

    x = np.linspace(-10, 10, 10_001, dtype="float32")
    monkeypatch.setattr(vector_math, "_EXP", (0.5, 0.1666, *vector_math._EXP[2:]))
    assert worst_ulp(computed(tirx.exp, x), reference("exp", x)) > 2


@pytest.mark.parametrize("name", REFERENCES)
def test_llvm_makes_vectors_of_them(name: str) -> None:
    module = elementwise(getattr(tirx, name), 1024)
    with build_options(module, cpu := target("skylake-avx512")):
        text = tvm.tirx.build(module, target=cpu).inspect_source("asm")
    assert re.search(r"\bv(mul|fn?madd\d+|fn?msub\d+)ps\s.*%zmm", text)
    called = re.findall(r"\bcallq?\s+(\w+)", text)
    assert not [function for function in called if function.startswith((name, "exp", "pow"))]


def test_float16_is_computed_in_float32() -> None:
    x = np.linspace(-8, 8, 4096).astype(np.float16)
    with np.errstate(over="ignore"):
        wanted = np.exp(x.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(computed(tirx.exp, x), wanted)


def test_float64_keeps_its_accuracy() -> None:
    x = np.linspace(-20, 20, 4096)
    for name, function in REFERENCES.items():
        positive = np.abs(x) if name == "log" else x
        got = computed(getattr(tirx, name), positive)
        np.testing.assert_allclose(got, function(positive), rtol=1e-14)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 1.0, 2.0, 3.0])
def test_constant_powers_are_products_and_square_roots(exponent: float) -> None:
    x = np.concatenate([np.geomspace(1e-9, 1e9, 1001, dtype="float32"), special_values()])
    with np.errstate(all="ignore"):
        wanted = np.power(x.astype(np.float64), np.full(x.shape, exponent)).astype(np.float32)
    got = computed(lambda v: tirx.pow(v, tirx.const(exponent, "float32")), x)
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=MIN_NORMAL)
    module = elementwise(lambda v: tirx.pow(v, tirx.const(exponent, "float32")), 64)
    with build_options(module, cpu := target("skylake-avx512")):
        text = tvm.tirx.build(module, target=cpu).inspect_source("asm")
    assert not re.search(r"\bcallq?\s+pow", text)


def test_other_powers_are_left_to_the_c_library() -> None:
    assert constant_power(tirx.Var("x", "float32"), 1.7) is None
    x = np.geomspace(1e-3, 1e3, 160, dtype="float32")
    got = computed(lambda v: tirx.pow(v, tirx.const(1.7, "float32")), x)
    np.testing.assert_allclose(got, x.astype(np.float64) ** float(np.float32(1.7)), rtol=3e-7)


def test_the_mark_is_on_the_kernels_that_change() -> None:
    def attributes(function: Callable[[Any], Any]) -> Any:
        module = mark_vector_math(elementwise(function, 64))
        return module["main"].attrs

    assert MARK in attributes(tirx.tanh)
    assert MARK not in attributes(tirx.sqrt)
