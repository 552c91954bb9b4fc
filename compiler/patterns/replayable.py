"""What of a graph's operators a recording of its kernels would lose: what the host reads, draws or copies, and
what is written to inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from trainc.compiler.graph.forward_graph import arguments
from trainc.compiler.patterns.shared_memory import families

_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index_put")
"""Operators that read the host's memory only where an index is a mask."""
_CHECKED = ("aten::_linalg_check_errors",)
"""Operators without a tag that read a number on the host."""
_COPIES = ("aten::_to_copy", "aten::copy", "aten::copy_", "prims::device_put")
_OF_ITS_FORM = ("aten::new_", "_like")
"""How names of operators begin or end that read of an operand its form alone."""


def host_reads(graph: fx.Graph) -> list[str]:
    """Return the operators whose results the host must read before the next kernel can be launched, each once."""
    return list(dict.fromkeys(str(node.target) for node in _calls(graph) if _reads(node)))


def host_draws(graph: fx.Graph, device: str) -> list[str]:
    """Return the operators that draw random numbers on another device than one of this type, each once."""
    seeded = torch.Tag.nondeterministic_seeded
    drawing = (node for node in _calls(graph) if seeded in node.target.tags)  # type: ignore[union-attr]
    return list(dict.fromkeys(str(node.target) for node in drawing if _is_elsewhere(node, device)))


def host_copies(graph: fx.Graph, device: str) -> list[str]:
    """Return the operators that copy between the host's memory and a device of this type, each once.

    A recording would keep the address of memory that the host frees after the pass. A 0-d tensor of the host that an
    operator computes with is none of these: a number goes with the kernel.
    """
    return list(dict.fromkeys(str(node.target) for node in _calls(graph) if _copies(node, device)))


def written(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs of a graph, and the tensors that it holds, to which its operators write, each once."""
    writing = [node for node in _calls(graph) if node.target._schema.is_mutable]  # type: ignore[union-attr]
    if not writing:
        return []
    share = families(graph)
    found = (other for node in writing for operand in _targets(node) for other in share[operand])
    return [one for one in dict.fromkeys(found) if one.op in ("placeholder", "get_attr")]


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _reads(node: fx.Node) -> bool:
    target: Any = node.target
    name = target._schema.name
    if name in _INDEXED:
        return _by_mask(node)
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return name in _CHECKED or bool(tags & set(target.tags))


def _by_mask(node: fx.Node) -> bool:
    """Say whether an index is a mask whose chosen entries must be counted; one number is written by the mask itself."""
    given = arguments(node)
    masks = (_value(one) for one in given["indices"] if one is not None)
    if not any(one is None or one.dtype in (torch.bool, torch.uint8) for one in masks):
        return False
    put = _value(given.get("values"))
    return put is None or put.numel() != 1 or bool(given.get("accumulate"))


def _is_elsewhere(node: fx.Node, device: str) -> bool:
    results = [one for one in pytree.tree_leaves(node.meta.get("val")) if isinstance(one, Tensor)]
    return bool(results) and results[0].device.type != device


def _copies(node: fx.Node, device: str) -> bool:
    name = node.target._schema.name  # type: ignore[union-attr]
    copies, by_form = (
        name in _COPIES,
        name.startswith(_OF_ITS_FORM[0]) or name.endswith(_OF_ITS_FORM[1]),
    )
    results = pytree.tree_leaves(node.meta.get("val"))
    here = [one.device.type == device for one in results if isinstance(one, Tensor)]
    operands = [value for one in node.all_input_nodes if (value := _value(one)) is not None]
    if not here or by_form:
        return False
    if here[0]:
        return any(one.device.type != device and (copies or one.dim() > 0) for one in operands)
    return copies and any(one.device.type == device for one in operands)


def _targets(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the operands that a call writes to."""
    given = arguments(node)
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            operands = pytree.tree_leaves(given.get(argument.name))
            yield from (one for one in operands if isinstance(one, fx.Node))


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None
