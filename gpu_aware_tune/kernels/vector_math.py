"""exp, log, tanh, erf and sigmoid as polynomials, which LLVM compiles to vector instructions.

TVM lowers these functions to LLVM's intrinsics or to calls of the C library, and on CPUs both become
one scalar call an element: 3 to 17 ns each, where a vector of polynomials takes under 0.5 ns. They are
replaced where TVM lowers intrinsics, after scheduling, so that schedules and traces know nothing of it.

Largest errors where the result is a normal number, in units in the last place (ulp), over every
seventh float32 argument (sigmoid: every 61st), with fused multiply-adds:

    exp 1.01    log 0.85    tanh 2.6    erf 1.1    sigmoid 2.4

NaN stays NaN, -0 keeps its sign, and overflow, underflow and poles are those of IEEE 754; exp and
sigmoid are 0 where they are no normal number. Powers with constant exponents such as 2 and -0.5 are
products and square roots. float16 is computed in float32; float64 keeps TVM's lowering.

Sources: argument reductions as in Cephes (Moshier, `expf`, `logf`); exp(n ln 2) in two factors and
tanh from exp(x) - 1 as in SLEEF (Shibata and Petrogalli, "SLEEF: A Portable Vectorized Library of C
Standard Mathematical Functions", 2020). The coefficients are minimax fits of our own (Lawson's
iteration), rounded to float32 one after another.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

MARK = "gpu_aware_tune.vector_math"
_VERSION = 1  # of the formulas
_LEVEL = 20  # TVM's own lowerings are registered at level 10; the highest counts

_LOG2_E = math.log2(math.e)
_LN2_HIGH, _LN2_LOW = (
    0.693359375,
    -2.12194440e-4,
)  # ln 2; the high part has 9 bits: n * high is exact
_ROUND = 1.5 * 2.0**23  # added to a number below 2^22 in magnitude, it leaves its nearest integer
_ROUND_BITS = 0x4B400000
# exp is no normal number, or infinite, beyond them. What is not normal becomes 0: the products behind
# a masked softmax (Swin adds -100 to what is masked) would take ten times as long with it.
_EXP_LOWEST, _EXP_HIGHEST = -87.33654, 89.0
_TANH_HIGHEST = 20.0  # twice the argument from which on tanh is 1
_ERF_HIGHEST = 3.93  # the argument from which on erf is 1
_ERF_NEAR = 0.93  # where erf's two polynomials meet
_MIN_NORMAL = 2.0**-126

# Coefficients, the lowest power first.
_EXP = (0.49999994, 0.16666517, 0.041668285, 0.00836925, 0.0013820468)  # (exp(r) - 1 - r) / r^2
_LOG = (  # (log(1 + r) - r + r^2 / 2) / r^3
    0.3333333134651184,
    -0.2500081956386566,
    0.2000124305486679,
    -0.1662341058254242,
    0.14201539754867554,
    -0.13159550726413727,
    0.12762485444545746,
    -0.07636940479278564,
)
_ERF = (  # erf(x) / x - 1 in x^2
    0.12837916612625122,
    -0.3761262893676758,
    0.11283625662326813,
    -0.02685573138296604,
    0.005192405078560114,
    -0.0008049769676290452,
    7.99664921942167e-05,
)
_ERFC = (  # log(1 - erf(x))
    -0.00016643943672534078,
    -1.127797245979309,
    -0.6369761228561401,
    -0.1041136160492897,
    0.02231517992913723,
    -0.003065485507249832,
    0.00019822015019599348,
)


class _Values:
    """The named values of one expression, so that nothing is computed twice."""

    def __init__(self, like: Any) -> None:
        self._floats = str(like.ty)
        self._ints = self._floats.replace("float", "int")
        self._bound: list[tuple[Any, Any]] = []

    def let(self, value: Any) -> Any:
        """Give a value a name; return the variable."""
        variable = tirx.Var(f"v{len(self._bound)}", str(value.ty))
        self._bound.append((variable, value))
        return variable

    def closed(self, body: Any) -> Any:
        """The expression `body` with all its named values."""
        for variable, value in reversed(self._bound):
            body = tirx.Let(variable, value, body)
        return body

    def number(self, value: float) -> Any:
        """A float32 constant."""
        return tirx.const(value, self._floats)

    def whole(self, value: int) -> Any:
        """An int32 constant."""
        return tirx.const(value, self._ints)

    def bits(self, value: Any) -> Any:
        """The bits of a float as an integer."""
        return tirx.reinterpret(self._ints, value)

    def from_bits(self, value: Any) -> Any:
        """The float of these bits."""
        return tirx.reinterpret(self._floats, value)

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """By Horner's rule; the lowest power first."""
        result = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = result * x + self.number(coefficient)
        return result

    def at_most(self, x: Any, bound: float) -> Any:
        """The smaller one; NaN stays NaN."""
        return tirx.Select(x > self.number(bound), self.number(bound), x)

    def at_least(self, x: Any, bound: float) -> Any:
        """The larger one; NaN stays NaN."""
        return tirx.Select(x < self.number(bound), self.number(bound), x)

    def with_sign(self, magnitude: Any, x: Any) -> Any:
        """A value that is not negative with the sign of another."""
        sign = self.bits(x) & self.whole(-(2**31))
        return self.from_bits(self.bits(magnitude) | sign)

    def reduced(self, x: Any) -> tuple[Any, Any]:
        """The integer n and the rest r, at most ln 2 / 2 in magnitude, of x = n ln 2 + r."""
        shifted = self.let(x * self.number(_LOG2_E) + self.number(_ROUND))
        n = self.let(shifted - self.number(_ROUND))
        rest = x - n * self.number(_LN2_HIGH)
        return self.bits(shifted) - self.whole(_ROUND_BITS), self.let(
            rest - n * self.number(_LN2_LOW)
        )

    def power_of_two(self, n: Any) -> Any:
        """2^n for -126 <= n <= 127."""
        return self.from_bits((n + self.whole(127)) << self.whole(23))


def _exp_of(values: _Values, x: Any) -> Any:
    """exp(x); x has a name."""
    # Where the result is 0, that of 0 is computed: the processor takes hundreds of cycles for a
    # product that underflows, and a masked softmax has many.
    vanishes = x < values.number(_EXP_LOWEST)
    bounded = values.at_most(x, _EXP_HIGHEST)
    n, r = values.reduced(values.let(tirx.Select(vanishes, values.number(0), bounded)))
    n = values.let(n)
    half = values.let(n >> values.whole(1))  # n reaches 128 and -150: no single float32 factor
    value = values.polynomial(r, _EXP) * (r * r) + r + values.number(1)
    value = value * values.power_of_two(half) * values.power_of_two(n - half)
    return tirx.Select(vanishes, values.number(0), value)


def _exp(values: _Values, x: Any) -> Any:
    return _exp_of(values, x)


def _sigmoid(values: _Values, x: Any) -> Any:
    one = values.number(1)
    return one / (one + _exp_of(values, values.let(values.number(0) - x)))


def _tanh(values: _Values, x: Any) -> Any:
    """(exp(2 |x|) - 1) / (exp(2 |x|) + 1) without cancellation near 0."""
    magnitude = values.from_bits(values.bits(x) & values.whole(2**31 - 1))
    double = values.let(values.at_most(magnitude * values.number(2), _TANH_HIGHEST))
    n, r = values.reduced(double)
    scale = values.let(values.power_of_two(n))
    near = values.polynomial(r, _EXP) * (r * r) + r  # exp(r) - 1
    less_one = values.let(scale * near + (scale - values.number(1)))  # exp(2 |x|) - 1
    return values.with_sign(less_one / (less_one + values.number(2)), x)


def _erf(values: _Values, x: Any) -> Any:
    magnitude = values.let(values.from_bits(values.bits(x) & values.whole(2**31 - 1)))
    near = values.polynomial(values.let(x * x), _ERF) * x + x
    bounded = values.let(values.at_most(magnitude, _ERF_HIGHEST))
    exponent = values.let(values.polynomial(bounded, _ERFC))
    far = values.with_sign(values.number(1) - _exp_of(values, exponent), x)
    return tirx.Select(magnitude < values.number(_ERF_NEAR), near, far)


def _log(values: _Values, x: Any) -> Any:
    is_tiny = x < values.number(_MIN_NORMAL)
    normal = values.let(tirx.Select(is_tiny, x * values.number(2.0**23), x))
    bits = values.let(values.bits(normal))
    sqrt_half = values.whole(0x3F3504F3)
    exponent = values.let((bits - sqrt_half) >> values.whole(23))
    r = values.let(values.from_bits(bits - (exponent << values.whole(23))) - values.number(1))
    n = tirx.Cast(str(x.ty), exponent)
    n = values.let(n - tirx.Select(is_tiny, values.number(23), values.number(0)))
    square = values.let(r * r)
    low = values.polynomial(r, _LOG) * (square * r) + n * values.number(_LN2_LOW)
    low = low - square * values.number(0.5)
    value = values.let(r + low + n * values.number(_LN2_HIGH))
    infinite = values.number(math.inf)
    value = tirx.Select(x < infinite, value, x)  # and NaN
    value = tirx.Select(x > values.number(0), value, values.number(math.nan))
    return tirx.Select(tirx.EQ(x, values.number(0)), values.number(-math.inf), value)


_FUNCTIONS: dict[str, Callable[[_Values, Any], Any]] = {
    "exp": _exp,
    "log": _log,
    "tanh": _tanh,
    "erf": _erf,
    "sigmoid": _sigmoid,
}


_UNROLLED_BY_TVM = ("erf", "rsqrt")  # its vector loops over them become scalar ones


def expanded(name: str, x: Any) -> Any:
    """Return a function of a float32 value, or of a vector of them, as plain arithmetic.

    Args:
        name: one of exp, log, tanh, erf, sigmoid.
        x: the argument.
    """
    values = _Values(x)
    return values.closed(_FUNCTIONS[name](values, values.let(x)))


def constant_power(x: Any, exponent: float) -> Any:
    """Return x to a constant power by multiplications and a square root; None where that needs more."""
    dtype = str(x.ty)
    value = tirx.Var("x", dtype)
    one, infinite = tirx.const(1, dtype), tirx.const(math.inf, dtype)
    root = tirx.abs(tirx.sqrt(value))  # the power of -0 is 0, and that of -inf is inf
    rooted = tirx.Select(tirx.EQ(value, tirx.const(-math.inf, dtype)), infinite, root)
    found = {
        -1.0: one / value,
        -0.5: one / rooted,
        0.5: rooted,
        1.0: value,
        2.0: value * value,
        3.0: value * value * value,
    }.get(exponent)
    return None if found is None else tirx.Let(value, x, found)


def mark_vector_math(module: tvm.IRModule) -> tvm.IRModule:
    """Mark the kernels whose functions `vector_math` replaces: what was measured before is stale.

    The attribute is part of a task's hash, and so is its value, the version of the formulas.
    """
    marked = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and _is_affected(function):
            marked.update_func(variable, function.with_attr(MARK, _VERSION))
    return marked


def _is_affected(function: tirx.PrimFunc) -> bool:
    names: set[str] = set()
    tvm_ffi.structural_walk(
        function.body, (tvm.ir.Call, lambda call: names.add(str(getattr(call.op, "name", ""))))
    )
    return any(f"tirx.{name}" in names for name in (*_FUNCTIONS, "pow"))


@contextlib.contextmanager
def vector_math() -> Iterator[None]:
    """Build for CPUs with these functions as plain arithmetic, in vectors.

    TVM keeps its lowerings in one table for the whole process, so from the first call on all of its
    builds for CPUs have ours. What TVM may vectorise it does not tell apart by target, and that
    holds within the context only.
    """
    _register_lowerings()
    operators = [tvm.ir.Op.get(f"tirx.{name}") for name in _UNROLLED_BY_TVM]
    for operator in operators:
        operator.set_attr("TVectorizable", True, _LEVEL)
    try:
        yield
    finally:
        for operator in operators:
            operator.reset_attr("TVectorizable")


@functools.cache
def _register_lowerings() -> None:
    for name in (*_FUNCTIONS, "pow"):
        operator = tvm.ir.Op.get(f"tirx.{name}")
        before = operator.get_attr("llvm.FLowerIntrinsic")
        tirx.register_intrin_lowering(
            f"tirx.{name}",
            target="llvm",
            f=functools.partial(_lowered, name, before),
            level=_LEVEL,
        )


def _lowered(name: str, before: Callable[[Any], Any] | None, call: Any) -> Any:
    """What a call becomes; the call itself leaves it to TVM's next rule."""
    dtype = str(call.ty)
    if name == "pow":
        found = _constant_power_of(call)
        if found is not None:
            return found
    elif dtype.startswith("float32"):
        return expanded(name, call.args[0])
    elif dtype.startswith("float16"):
        wide = tirx.Cast(dtype.replace("float16", "float32"), call.args[0])
        return tirx.Cast(dtype, expanded(name, wide))
    elif name in _UNROLLED_BY_TVM and (lanes := tvm.DataType(dtype).lanes) > 1:
        return _one_by_one(call, lanes)
    return call if before is None else before(call)


def _one_by_one(call: Any, lanes: int) -> Any:
    """A call of a vector as calls of its elements."""
    vector = tirx.Var("vector", str(call.ty))
    element = str(tvm.DataType(str(call.ty)).with_lanes(1))
    results = [
        tirx.call_intrin(element, str(call.op.name), tirx.Shuffle([vector], [lane]))
        for lane in range(lanes)
    ]
    return tirx.Let(vector, call.args[0], tirx.Shuffle(results, list(range(lanes))))


def _constant_power_of(call: Any) -> Any:
    base, exponent = call.args
    if isinstance(exponent, tirx.Broadcast):
        exponent = exponent.value
    return constant_power(base, float(exponent)) if isinstance(exponent, tirx.FloatImm) else None
