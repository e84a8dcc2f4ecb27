"""Canonical names inside kernels: structurally equal kernels are equal in their names, too.

A task is known by its structural hash, which ignores names, while traces look blocks up by name, and
TVM takes these names from the variables of the model. Two models that share a kernel can share its
traces only if its blocks and buffers are named by their order alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.tirx import PrimFunc

from gpu_aware_tune.kernels.traces import load_json

ROOT = "root"
# What TVM appends to a block's name for a block made from it; other suffixes are appended to the
# name of a buffer (`cache_read`, `cache_write`, `reindex`).
_OF_BLOCKS = ("_rf", "_init", "_update", "_o", "_i", "_pad_const", "_l")


@dataclass(frozen=True)
class Names:
    """The canonical name of each block and buffer of a kernel, by the name it had."""

    blocks: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)

    @property
    def are_canonical(self) -> bool:
        """Whether nothing has another name than its canonical one."""
        return all(
            old == new for names in (self.blocks, self.buffers) for old, new in names.items()
        )


def canonical_names(module: tvm.IRModule) -> tvm.IRModule:
    """Return a module whose kernels (PrimFuncs) have canonical names inside; their own names stay."""
    changed = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    for variable, function in module.functions.items():
        if isinstance(function, PrimFunc):
            text, _ = _renamed(str(tvm.ir.save_json(function)))
            changed.update_func(variable, load_json(text))
    return changed


def names_in(module_json: str) -> Names:
    """Return the names of the one kernel of a module, as `traces.module_to_json` wrote it."""
    return _renamed(module_json)[1]


def renamed_trace(trace_json: str, names: Names) -> str:
    """Return a trace for the kernel with canonical names, from one for the kernel with `names`."""
    instructions, decisions = json.loads(trace_json)
    for name, _inputs, attributes, _outputs in instructions:
        if name == "GetSBlock":
            attributes[0] = _canonical(attributes[0], names)
    return json.dumps([instructions, decisions], separators=(",", ":"))


def fits_names(trace_json: str, names: Names) -> bool:
    """Whether a trace looks up only blocks that a kernel has, or that are made from what it has."""
    known = {*names.blocks, *names.buffers, ROOT}
    return all(
        attributes[0] in known or any(attributes[0].startswith(f"{name}_") for name in known)
        for name, _inputs, attributes, _outputs in json.loads(trace_json)[0]
        if name == "GetSBlock"
    )


def _canonical(name: str, names: Names) -> str:
    if name in names.blocks:
        return names.blocks[name]
    for known in sorted({*names.blocks, *names.buffers}, key=len, reverse=True):
        suffix = name.removeprefix(known)
        if name.startswith(known) and suffix.startswith("_"):
            first, second = names.buffers, names.blocks
            if suffix.startswith(_OF_BLOCKS):
                first, second = second, first
            return (first.get(known) or second[known]) + suffix
    return name


def _renamed(text: str) -> tuple[str, Names]:
    """Rename in TVM's JSON, whose nodes stand in an order that only the structure decides."""
    graph = json.loads(text)
    nodes: list[dict[str, Any]] = graph["nodes"]
    blocks: dict[str, str] = {}
    buffers: dict[str, str] = {}
    counts = {"block": 0, "b": 0, "i": 0}

    def rename(data: dict[str, Any], key: str, prefix: str) -> tuple[str, str]:
        old = str(nodes[data[key]]["data"])
        new = f"{prefix}{counts[prefix]}"
        counts[prefix] += 1
        data[key] = len(nodes)
        nodes.append({"type": "ffi.String", "data": new})
        return old, new

    for node in list(nodes):
        data: dict[str, Any] = node.get("data", {})
        if node["type"] == "ir.Var":
            is_buffer = nodes[data["ty"]]["type"] == "tirx.BufferType"
            old, new = rename(data, "name", "b" if is_buffer else "i")
            if is_buffer:
                buffers[old] = new
        elif node["type"] == "s_tir.SBlock" and nodes[data["name_hint"]]["data"] != ROOT:
            old, new = rename(data, "name_hint", "block")
            blocks[old] = new
    return json.dumps(graph, separators=(",", ":")), Names(blocks, buffers)
