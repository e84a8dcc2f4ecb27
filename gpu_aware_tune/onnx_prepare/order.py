"""Settles orders that a file leaves open: of nodes, inputs first, and of what TopK returns."""

from __future__ import annotations

import graphlib

from onnx import GraphProto, NodeProto

from gpu_aware_tune.errors import UserError, one_line
from gpu_aware_tune.onnx_prepare.facts import bodies, walk


def sort_nodes(graph: GraphProto) -> None:
    """Sort a graph's nodes, and those of the graphs inside them, where they are out of order.

    Raises:
        UserError: nodes need each other.
    """
    for node in graph.node:
        for body in bodies(node):
            sort_nodes(body)
    if _in_order(graph):
        return
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output}
    needed = {
        index: {producer[name] for name in _read_by(node) if name in producer}
        for index, node in enumerate(graph.node)
    }
    try:
        order = list(graphlib.TopologicalSorter(needed).static_order())
    except graphlib.CycleError as error:
        names = [one_line(graph.node[index].output[0], 40) for index in error.args[1][:3]]
        raise UserError(
            f"the model is not valid: what makes {', '.join(map(repr, names))} needs its own result"
        ) from None
    nodes = [graph.node[index] for index in order]
    del graph.node[:]
    graph.node.extend(nodes)


def sort_top_k(graph: GraphProto) -> None:
    """Ask each TopK for the sorted order where any is allowed, so that all who run it agree."""
    for node in walk(graph):
        if node.op_type == "TopK" and not node.domain:
            for attribute in node.attribute:
                if attribute.name == "sorted":
                    attribute.i = 1


def _in_order(graph: GraphProto) -> bool:
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if not later.isdisjoint(_read_by(node)):
            return False
        later.difference_update(node.output)
    return True


def _read_by(node: NodeProto) -> set[str]:
    """Return the names that a node reads, or a graph inside it may read from outside."""
    names = {name for name in node.input if name}
    for body in bodies(node):
        names.update(name for inner in walk(body) for name in inner.input if name)
        names.update(value.name for value in body.output)
        names.difference_update(name for inner in body.node for name in inner.output)
        names.difference_update(value.name for value in (*body.input, *body.initializer))
    return names
