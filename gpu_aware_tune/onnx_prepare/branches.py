"""Replaces an If whose condition is known by the branch that is taken."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from gpu_aware_tune.onnx_prepare.facts import Facts, attributes


def take_branches(model: ModelProto) -> bool:
    """Inline the branches that constants decide; tell whether there were any."""
    graph = model.graph
    if not any(node.op_type == "If" for node in graph.node):
        return False
    facts = Facts(model)
    nodes: list[NodeProto] = []
    taken = False
    for node in graph.node:
        condition = facts.constant(node.input[0]) if node.op_type == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        taken = True
        branch = attributes(node)["then_branch" if condition.all() else "else_branch"]
        inner, tensors = _renamed(branch, node.output[0])
        graph.initializer.extend(tensors)
        nodes.extend(inner)
        nodes.extend(
            helper.make_node("Identity", [_name(value.name, node.output[0], branch)], [output])
            for value, output in zip(branch.output, node.output, strict=True)
            if output
        )
    if taken:
        del graph.node[:]
        graph.node.extend(nodes)
    return taken


def _own_names(branch: GraphProto) -> set[str]:
    produced = {name for node in branch.node for name in node.output if name}
    return produced | {tensor.name for tensor in branch.initializer}


def _name(name: str, prefix: str, branch: GraphProto) -> str:
    """Two branches may use the same names inside, so each gets its If's output as a prefix."""
    return f"{prefix}/{name}" if name in _own_names(branch) else name


def _renamed(branch: GraphProto, prefix: str) -> tuple[list[NodeProto], list[TensorProto]]:
    names = {name: f"{prefix}/{name}" for name in _own_names(branch)}
    nodes, tensors = [], []
    for original in branch.node:
        node = NodeProto()
        node.CopyFrom(original)
        _rename(node, names)
        nodes.append(node)
    for tensor in branch.initializer:
        kept = TensorProto()
        kept.CopyFrom(tensor)
        kept.name = names[tensor.name]
        tensors.append(kept)
    return nodes, tensors


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                _rename(inner, names)
            for value in attribute.g.output:
                value.name = names.get(value.name, value.name)
