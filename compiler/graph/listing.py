"""A graph as text for people: one operator a line, with shapes and the modules it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter

from trainc.compiler.graph.forward_graph import call_site

_SHORT = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "b8",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
}  # fmt: skip

Symbols = Mapping[Any, Any]
"""The symbols of the sizes of a graph that change from batch to batch, each with the symbol that has its name."""


def listing(graph: fx.Graph, sizes: Symbols | None = None) -> str:
    """Return a graph as text; equal graphs give equal texts. `sizes` are the names of sizes that change."""
    named = sizes or {}
    return "\n".join(_line(node, named) for node in graph.nodes if node.op != "get_attr")


def _line(node: fx.Node, sizes: Symbols) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0], sizes)}"
    head = f"{node.name}{_shape(node, sizes)}"
    if node.op == "placeholder":
        return f"input {head}"
    arguments = [_text(a, sizes) for a in node.args]
    arguments += [f"{name}={_text(value, sizes)}" for name, value in node.kwargs.items()]
    path = call_site(node)
    where = f"  # {path}" if path else ""
    return f"{head} = {target_name(node.target)}({', '.join(arguments)}){where}"


def target_name(target: Any) -> str:
    """Return `aten.add.Tensor` for an operator."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _shape(node: fx.Node, sizes: Symbols) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    name = dtype_name(value.dtype)
    return f": {_SHORT.get(name, name)}{_text(list(value.shape), sizes)}"


def _text(value: Any, sizes: Symbols) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v, sizes) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.SymInt):
        return size_text(value.node.expr, sizes)
    return str(value)


def size_text(expression: Any, sizes: Symbols) -> str:
    """Return an expression over symbols of sizes as text with their names."""
    return str(PythonPrinter().doprint(expression.xreplace(dict(sizes))))
