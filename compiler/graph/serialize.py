"""Flat ATen graphs as a listing to read, and as JSON that loads without running code."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from importlib import import_module
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from trainc.compiler.graph.step_graph import StepGraph

NAMESPACES = ("aten", "prims", "trainc")
# ATen operators that reach outside the tensors they are given.
_REFUSED = {"from_file", "_print", "save"}
_SHORT = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "b8",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
}  # fmt: skip
_ENUMS: dict[str, type[Any]] = {
    "dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout,
}  # fmt: skip


class GraphFormatError(ValueError):
    """The data is not a graph this version can load."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def listing(graph: fx.Graph) -> str:
    """Return a stable text of a graph, one node a line, with shapes and the nodes' modules."""
    lines = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {_text(node.args[0])}")
            continue
        head = f"{node.name}{_shape(node)}"
        if node.op == "placeholder":
            lines.append(f"input {head}")
            continue
        arguments = [_text(a) for a in node.args] + [
            f"{k}={_text(v)}" for k, v in node.kwargs.items()
        ]
        where = _where(node)
        lines.append(f"{head} = {target_name(node.target)}({', '.join(arguments)}){where}")
    return "\n".join(lines)


def target_name(target: Any) -> str:
    """Return `aten.add.Tensor` for an operator."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    name = dtype_name(value.dtype)
    return f": {_SHORT.get(name, name)}{list(value.shape)}"


def _where(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry for entry, _ in reversed(list(stack.values()))), "")
    return f"  # {path}" if path else ""


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return str(value)


def to_json(source: fx.GraphModule | fx.Graph) -> dict[str, Any]:
    """Return a flat graph as JSON data: nodes with names, operator names and encoded arguments."""
    graph = source.graph if isinstance(source, fx.GraphModule) else source
    nodes: list[dict[str, Any]] = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op in ("placeholder", "get_attr"):
            entry["target"] = str(node.target)
        elif node.op == "call_function":
            entry["target"] = _checked_target(node.target)
        elif node.op != "output":
            raise GraphFormatError(
                f"`{node.name}` is a {node.op}: only flat ATen graphs can be saved"
            )
        if node.op in ("call_function", "output"):
            entry["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        nodes.append(entry)
    return {"nodes": nodes}


def from_json(data: Mapping[str, Any]) -> fx.Graph:
    """Rebuild a graph; operators outside the allowed namespaces are errors: no code is run."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    try:
        for entry in data["nodes"]:
            node = _node(graph, entry, made)
            made[str(entry["name"])] = node
        graph.lint()
    except GraphFormatError:
        raise
    except Exception as error:
        raise GraphFormatError(
            f"this is not a saved graph: {type(error).__name__}: {error}"
        ) from error
    return graph


def _node(graph: fx.Graph, entry: Mapping[str, Any], made: Mapping[str, fx.Node]) -> fx.Node:
    op, name = entry["op"], str(entry["name"])
    if not _is_name(name):
        raise GraphFormatError(f"`{name}` is not a node name")
    if op == "output":
        output: fx.Node = graph.output(tuple(_decode(entry["args"], made)[0]))
        return output
    if op in ("placeholder", "get_attr"):
        target = str(entry["target"])
        parts = [target] if op == "placeholder" else target.split(".")
        if not all(_is_name(part) or (op == "get_attr" and part.isdigit()) for part in parts):
            raise GraphFormatError(f"`{target}` is not the name of an input or a tensor")
        return graph.create_node(op, target, name=name)
    if op != "call_function":
        raise GraphFormatError(f"`{name}` is a {op}, which a saved graph cannot hold")
    args = tuple(_decode(entry["args"], made))
    kwargs = {k: _decode(v, made) for k, v in entry.get("kwargs", {}).items()}
    if not all(_is_name(k) for k in kwargs):
        raise GraphFormatError(f"`{name}` has arguments without proper names")
    return graph.create_node(op, _operator(str(entry["target"])), args, kwargs, name=name)


def _is_name(text: str) -> bool:
    """Say whether a text may stand as a name in the code that a graph is turned into."""
    return text.isidentifier() and not iskeyword(text)


def _checked_target(target: Any) -> str:
    name = target_name(target)
    _operator(name)
    return name


def _operator(name: str) -> Callable[..., Any]:
    """Return the operator of a name, from the allowed namespaces only."""
    if name == "getitem":
        return operator.getitem
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in NAMESPACES or parts[1] in _REFUSED:
        raise GraphFormatError(f"`{name}` is not an operator a saved graph may call")
    if parts[0] == "trainc":
        _register()
    try:
        found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphFormatError(f"this torch ({torch.__version__}) has no operator `{name}`")
    return found


def _register() -> None:
    """Import the files that define our operators."""
    import_module("trainc.kernels.operators")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, kind in _ENUMS.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise GraphFormatError(f"an argument of type {type(value).__name__} cannot be saved")


def _decode(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((key, text),) = value.items()
    if key == "node":
        return made[text]
    if key == "float":
        return float(text)
    if key == "device":
        return torch.device(text)
    found = getattr(torch, text, None) if key in _ENUMS else None
    if found is None or not isinstance(found, _ENUMS[key]):
        raise GraphFormatError(f"`{key}` {text!r} is unknown")
    return found


def step_to_json(step: StepGraph) -> dict[str, Any]:
    """Return a step's graph and interface."""
    from trainc.compiler.graph.step_graph import FORMAT

    interface = step.interface
    if interface is None:
        raise RuntimeError("no graph is installed yet: there is nothing to save")
    ports = [
        {
            "name": p.name,
            "key": p.key,
            "shape": list(p.shape),
            "dtype": dtype_name(p.dtype),
            "device": p.device,
        }
        for p in interface.ports
    ]
    return {
        "format": FORMAT,
        "graph": to_json(step),
        "inputs": {"kind": interface.kind, "ports": ports[:-1]},
        "targets": ports[-1],
        "scalars": [list(pair) for pair in interface.scalars],
        "outputs": list(interface.outputs),
        "views": interface.views,
        "constants": list(step.constants),
    }


def step_from_json(
    data: Mapping[str, Any], model: nn.Module, constants: Mapping[str, Tensor]
) -> StepGraph:
    """Rebuild a step on a model; its tensors must be the model's or given constants."""
    from trainc.compiler.graph.step_graph import FORMAT, Interface, Port, StepGraph

    if data.get("format") != FORMAT:
        raise GraphFormatError(f"format {data.get('format')!r} is not {FORMAT}")
    missing = [name for name in data["constants"] if name not in constants]
    if missing:
        raise GraphFormatError(f"the constants {missing} were not given")
    graph = from_json(data["graph"])
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)} | set(data["constants"])
    absent = [str(n.target) for n in graph.nodes if n.op == "get_attr" and n.target not in known]
    if absent:
        raise GraphFormatError(f"the model has no {', '.join(f'`{name}`' for name in absent)}")

    def port(entry: Mapping[str, Any]) -> Port:
        dtype = _decode({"dtype": entry["dtype"]}, {})
        return Port(entry["name"], entry["key"], tuple(entry["shape"]), dtype, entry["device"])

    interface = Interface(
        data["inputs"]["kind"],
        tuple(port(entry) for entry in data["inputs"]["ports"]),
        port(data["targets"]),
        tuple((str(a), str(b)) for a, b in data["scalars"]),
        tuple(data["outputs"]),
        int(data["views"]),
    )
    return StepGraph(model, graph, interface, {name: constants[name] for name in data["constants"]})
