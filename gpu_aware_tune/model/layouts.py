"""Images between convolutions in blocks of as many channels as a vector has lanes (NCHW16c).

A convolution that writes images row by row fills its vectors with neighbouring pixels, of which rows
rarely hold a whole number. With the channels of a block side by side, a step takes one vector of
weights and a single number of the input for each vector of results, and every load is contiguous.

The graph stays as it is and nothing is copied: a kernel's arguments get another shape, the axes that
run over their channels become two, and the weights are stored in the blocks that go with it. What a
model takes and gives keeps its layout.

Source: Liu et al., "Optimizing CNN Model Inference on CPUs", 2019, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.tirx import PrimFunc

from gpu_aware_tune.errors import last_line
from gpu_aware_tune.kernels.schedules.channels import Kernel, Side


@dataclass(frozen=True)
class Blocked:
    """A module whose activations are in blocks, its weights as it takes them, and what was refused."""

    module: tvm.IRModule
    weights: dict[str, np.ndarray]
    notes: tuple[str, ...]


def to_nchwc(module: tvm.IRModule, weights: Mapping[str, np.ndarray], lanes: int) -> Blocked:
    """Store the images that convolutions read and write in blocks of `lanes` channels.

    Args:
        module: what `packing.mark_weights` gave; the parameters of `main` from its attribute
            `num_input` on are the weights, in the order of `weights`.
        weights: by name.
        lanes: float32 values of one vector register.

    Returns:
        The module, whose blocked kernels have names that end in `_nchw16c` (for 16 lanes), and the
        weights as it takes them. An image stays as it is where its channels are no multiple of
        `lanes`, where anything but a kernel reads it, or where a kernel walks over its channels in
        another way than one after another. A kernel that TVM refuses to transform keeps its layout,
        and so do the images that it shares with others; a note names it.
    """
    main = module["main"]
    first = int(main.attrs["num_input"])
    named = dict(zip(list(main.params)[first:], weights, strict=True))
    tuples = _Tuples(main)
    calls, elsewhere = list(_calls(module, lanes, tuples)), _used_elsewhere(main, tuples)
    refused: dict[str, str] = {}
    while True:
        kept = {
            v for call in calls if call.name in refused for v in call.variables if v is not None
        }
        images = _blocked(calls, elsewhere | set(named) | kept)
        chosen = {call: call.sides_in(images) for call in calls if call.name not in refused}
        filters = _filters(chosen, named, elsewhere | kept)
        kernels, failures = _transformed(chosen, filters, lanes)
        if not failures:
            break
        refused |= failures
    stored = dict(weights)
    parameters = {}
    for variable, dims in filters.items():
        name = named[variable]
        stored[name] = _in_blocks(weights[name], dims, lanes)
        parameters[variable] = relax.Var(
            name, relax.TensorType(stored[name].shape, variable.ty.dtype)
        )
    notes = tuple(f"kernel {name} keeps its layout: {why}" for name, why in refused.items())
    return Blocked(rewired(module, kernels, parameters), stored, notes)


def _transformed(
    chosen: Mapping[_Call, Sequence[Side]], filters: Mapping[Any, tuple[int, ...]], lanes: int
) -> tuple[dict[Any, tuple[str, PrimFunc]], dict[str, str]]:
    """The kernels in blocks by call, each with its name; and why, by name, TVM refused others."""
    made: dict[Any, PrimFunc] = {}
    kernels = {}
    refused: dict[str, str] = {}
    for call, sides in chosen.items():
        if not sides or call.name in refused:
            continue
        dims = filters.get(call.filter, ())
        key = call.name, dims, *(side.parameters for side in sides)
        try:
            if key not in made:
                made[key] = call.kernel.blocked(sides, dims)
        except Exception as error:  # TVM refuses with ScheduleError, ValueError and others
            refused[call.name] = last_line(error)
            continue
        kernels[call.expression] = f"{call.name}_nchw{lanes}c", made[key]
    return kernels, refused


class _Tuples:
    """The results of kernels that have several, and the variables that their elements are bound to."""

    def __init__(self, main: Any) -> None:
        self._elements: dict[Any, dict[int, list[Any]]] = {}
        self._known: set[Any] = set()
        for variable, value in bindings(main):
            if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Var):
                of_tuple = self._elements.setdefault(value.tuple_value, {})
                of_tuple.setdefault(int(value.index), []).append(variable)
            elif is_kernel_call(value):
                self._known.add(variable)

    def takes(self, value: Any) -> bool:
        """Whether a bound value is an element of a kernel's results."""
        return isinstance(value, relax.TupleGetItem) and value.tuple_value in self._known

    def elements(self, variable: Any, count: int) -> list[Any]:
        """The variable of each element; None where there is none, or more than one."""
        found = self._elements.get(variable, {})
        return [found[at][0] if len(found.get(at, ())) == 1 else None for at in range(count)]

    def repeated(self) -> Iterator[Any]:
        """The variables of elements that are bound more than once."""
        for of_tuple in self._elements.values():
            for variables in of_tuple.values():
                if len(variables) > 1:
                    yield from variables


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a kernel, with the variables of its arguments, then of its results; or None."""

    name: str
    expression: Any
    kernel: Kernel
    variables: tuple[Any, ...]

    @property
    def filter(self) -> Any:
        """The variable of its convolution's weights."""
        return self.variables[self.kernel.filter.parameter] if self.kernel.filter else None

    def members(self, side: Side) -> list[Any]:
        """The variables of a side's images; None for what is none."""
        return [self.variables[number] for number in side.parameters]

    def sides_in(self, images: set[Any]) -> tuple[Side, ...]:
        """The sides whose images are among these."""
        return tuple(s for s in self.kernel.sides if any(m in images for m in self.members(s)))


def _calls(module: tvm.IRModule, lanes: int, tuples: _Tuples) -> Iterator[_Call]:
    """The calls of kernels that are bound to a variable of `main` itself, not within a branch."""
    kernels: dict[str, Kernel] = {}
    for variable, value in bindings(module["main"]):
        if is_kernel_call(value):
            name = value.args[0].name_hint
            kernel = kernels.setdefault(name, Kernel(module[name], lanes))
            arguments = [each if isinstance(each, relax.Var) else None for each in value.args[1]]
            results = len(kernel.function.params) - len(arguments)
            given = [variable] if results == 1 else tuples.elements(variable, results)
            yield _Call(name, value, kernel, (*arguments, *given))


def bindings(main: Any) -> Iterator[tuple[Any, Any]]:
    for block in main.body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def is_kernel_call(value: Any) -> bool:
    call_tir = tvm.ir.Op.get("relax.call_tir")
    return isinstance(value, tvm.ir.Call) and value.op.same_as(call_tir)


def _used_elsewhere(main: Any, tuples: _Tuples) -> set[Any]:
    """Variables that anything but a kernel makes or uses, the inputs and the result of `main` too."""
    found = {*list(main.params)[: int(main.attrs["num_input"])], *tuples.repeated()}

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            found.add(node)

    relax.analysis.post_order_visit(main.body.body, visit)
    for variable, value in bindings(main):
        if not is_kernel_call(value) and not tuples.takes(value):
            found.add(variable)
            relax.analysis.post_order_visit(value, visit)
    return found


def _blocked(calls: Iterable[_Call], elsewhere: set[Any]) -> set[Any]:
    """The images that can be in blocks, with all that are then in blocks with them."""
    above: dict[Any, Any] = {}

    def first(variable: Any) -> Any:
        while variable in above:
            variable = above[variable]
        return variable

    every, plain, convolved = set(), set(elsewhere), set()
    for call in calls:
        for side in call.kernel.sides:
            members = call.members(side)
            images = [image for image in members if image is not None]
            every.update(images)
            if not side.uniform or len(images) < len(members):
                plain.update(images)
            if side.convolved:
                convolved.update(images)
            for one, other in pairwise(images):
                if not first(one).same_as(first(other)):
                    above[first(one)] = first(other)
    no, yes = {first(image) for image in plain}, {first(image) for image in convolved}
    return {image for image in every if first(image) in yes - no}


def _filters(
    chosen: Mapping[_Call, Sequence[Side]], named: Mapping[Any, str], elsewhere: set[Any]
) -> dict[Any, tuple[int, ...]]:
    """The filters to store in blocks, with the dimensions of which: where all readers agree."""
    wanted: dict[Any, set[tuple[int, ...]]] = {}
    for call, sides in chosen.items():
        for variable in call.variables:
            if variable in named:
                dims = call.kernel.filter_dims(sides) if variable.same_as(call.filter) else ()
                wanted.setdefault(variable, set()).add(dims)
    return {
        variable: dims
        for variable, (dims, *others) in wanted.items()
        if dims and not others and variable not in elsewhere
    }


def _in_blocks(array: np.ndarray, dims: Sequence[int], lanes: int) -> np.ndarray:
    """An array stored as `channels.filter_map` maps its indices."""
    shape: list[int] = []
    outer, inner = [], {}
    for dim, extent in enumerate(array.shape):
        outer.append(len(shape))
        inner[dim] = len(shape) + 1
        shape += [extent // lanes, lanes] if dim in dims else [extent]
    return np.ascontiguousarray(array.reshape(shape).transpose([*outer, *(inner[d] for d in dims)]))


def rewired(
    module: tvm.IRModule, kernels: Mapping[Any, tuple[str, PrimFunc]], parameters: Mapping[Any, Any]
) -> tvm.IRModule:
    """The module with other kernels, whose arguments and results have other shapes, for some calls.

    Args:
        module: the module.
        kernels: a name and a kernel by the call that is to go there.
        parameters: variables of another type by the parameter of `main` that they take the place of.
    """

    @relax.expr_functor.mutator
    class Rewire(relax.PyExprMutator):
        def visit_call_(self, op: Any) -> Any:
            if op not in kernels:
                return super().visit_call_(op)
            name, kernel = kernels[op]
            arguments = [self.visit_expr(argument) for argument in op.args[1]]
            results = list(kernel.params)[len(arguments) :]
            types = [relax.TensorType([int(e) for e in r.shape], str(r.dtype)) for r in results]
            return relax.call_tir(self.builder_.add_func(kernel, name), arguments, types)

        def visit_var_(self, op: Any) -> Any:
            return parameters[op] if op in parameters else super().visit_var_(op)

    main = module["main"]
    rewire = Rewire(module)
    body = rewire.visit_expr(main.body)
    changed = relax.Function(
        [parameters.get(old, old) for old in main.params],
        body,
        main.ret_ty,
        main.is_pure,
        main.attrs,
    )
    built = rewire.builder_.get()
    built.update_func(built.get_global_var("main"), changed)
    return relax.transform.DeadCodeElimination(["main"])(built)
