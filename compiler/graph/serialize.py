"""Graphs and steps as JSON, which loads without running code."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn

from trainc.compiler.errors import listed
from trainc.compiler.graph.interface import Interface, Port
from trainc.compiler.graph.listing import dtype_name, target_name
from trainc.compiler.graph.sizes import SIZE_FUNCTIONS, condition
from trainc.compiler.graph.step_graph import StepGraph

FORMAT = 7
"""Raised whenever a key or a name in the data changes."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {"getitem": operator.getitem, **SIZE_FUNCTIONS}
_NAMESPACES = ("aten", "prims", "trainc")
# ATen operators that reach outside the tensors they are given.
_REFUSED = {"from_file", "_print", "save"}
_ENUMS: dict[str, type[Any]] = {
    "dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout,
}  # fmt: skip


class GraphFormatError(ValueError):
    """The data is not a graph that this version can load, or the graph cannot be saved."""


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """Return a flat graph as JSON data: nodes with names, operator names and encoded arguments.

    Raises GraphFormatError for anything but calls of known operators.
    """
    nodes: list[dict[str, Any]] = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op in ("placeholder", "get_attr"):
            entry["target"] = str(node.target)
        elif node.op == "call_function":
            entry["target"] = target_name(node.target)
            _operator(entry["target"])  # raises for one that cannot be loaded
        elif node.op != "output":
            raise GraphFormatError(
                f"`{node.name}` is a {node.op} node: a graph can be saved only when all its calls are call_function"
            )
        if node.op in ("call_function", "output"):
            entry["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                entry["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        nodes.append(entry)
    return {"nodes": nodes}


def graph_from_json(data: Mapping[str, Any]) -> fx.Graph:
    """Rebuild a graph from JSON data, running no code of it.

    Raises GraphFormatError for damaged data and for operators outside aten, prims and trainc.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    try:
        for entry in data["nodes"]:
            made[str(entry["name"])] = _node(graph, entry, made)
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
        raise GraphFormatError(f"`{name}` is not a node name: it must be a Python identifier")
    if op == "output":
        values = tuple(_decode(entry["args"], made)[0])
        if not all(value is None or isinstance(value, fx.Node) for value in values):
            raise GraphFormatError("`output` returns what no node computes")
        output: fx.Node = graph.output(values)
        return output
    if op in ("placeholder", "get_attr"):
        target = str(entry["target"])
        parts = [target] if op == "placeholder" else target.split(".")
        if not all(_is_name(part) or (op == "get_attr" and part.isdigit()) for part in parts):
            raise GraphFormatError(f"`{target}` is not the name of an input or a tensor")
        return graph.create_node(op, target, name=name)
    if op != "call_function":
        raise GraphFormatError(f"`{name}` is a {op} node, which a saved graph cannot hold")
    args = tuple(_decode(entry["args"], made))
    kwargs = {k: _decode(v, made) for k, v in entry.get("kwargs", {}).items()}
    if not all(_is_name(k) for k in kwargs):
        raise GraphFormatError(
            f"`{name}` has a keyword argument whose name is not a Python identifier"
        )
    return graph.create_node(op, _operator(str(entry["target"])), args, kwargs, name=name)


def _is_name(text: str) -> bool:
    """Say whether a text is safe as a name in the code that torch.fx generates from a graph."""
    return text.isidentifier() and not iskeyword(text)


def _operator(name: str) -> Callable[..., Any]:
    """Return the operator of a name, from the allowed namespaces only."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in _NAMESPACES or parts[1] in _REFUSED:
        raise GraphFormatError(
            f"a saved graph cannot call the operator `{name}`: only aten, prims and trainc operators are allowed"
        )
    if parts[0] == "trainc":
        import_module("trainc.kernels.operators")  # registers them
    try:
        found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphFormatError(f"this torch ({torch.__version__}) has no operator `{name}`")
    return found


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
    for key, enum in _ENUMS.items():
        if isinstance(value, enum):
            return {key: str(value).removeprefix("torch.")}
    raise GraphFormatError(
        f"a graph with an argument of type {type(value).__name__} cannot be saved"
    )


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
        raise GraphFormatError(f"{text!r} is not a {key} of this torch ({torch.__version__})")
    return found


def step_to_json(step: StepGraph) -> dict[str, Any]:
    """Return a step's graph and interface as JSON data, without tensors.

    Raises RuntimeError for a step that has no graph yet.
    """
    interface = step.interface
    if interface is None:
        raise RuntimeError(
            "this step graph has no graph to save: it is captured at the first batch"
        )
    ports = [
        asdict(port) | {"shape": list(port.shape), "dtype": dtype_name(port.dtype)}
        for port in interface.ports
    ]
    return {
        "format": FORMAT,
        "graph": graph_to_json(step.graph),
        "inputs": {
            "structure": interface.structure,
            "ports": [
                entry
                for entry, port in zip(ports, interface.ports, strict=True)
                if not port.is_target
            ],
        },
        "targets": [
            entry for entry, port in zip(ports, interface.ports, strict=True) if port.is_target
        ],
        "scalars": [list(pair) for pair in interface.scalars],
        "outputs": list(interface.outputs),
        "views": interface.views,
        "hooks": list(interface.hooks),
        "conditions": list(interface.conditions),
        "constants": list(step.constants),
    }


def step_from_json(
    data: Mapping[str, Any], model: nn.Module, constants: Mapping[str, Tensor]
) -> StepGraph:
    """Rebuild a step over a model's own tensors; no code from the data is run.

    `constants` are the tensors of `StepGraph.constant_tensors`. Raises GraphFormatError for data of another format,
    and where the model or `constants` lack a tensor.
    """
    if data.get("format") != FORMAT:
        raise GraphFormatError(
            f"this graph was saved in format {data.get('format')!r}, but this version of trainc reads format {FORMAT}:"
            " compile the program again and save it"
        )
    missing = [name for name in data["constants"] if name not in constants]
    if missing:
        raise GraphFormatError(f"the saved constants lack {listed(missing)}")
    graph = graph_from_json(data["graph"])
    outputs = data["outputs"]
    if not (isinstance(outputs, list) and all(isinstance(name, str) for name in outputs)):
        raise GraphFormatError("`outputs` is not a list of names")
    returned = next((node.args[0] for node in graph.nodes if node.op == "output"), ())
    if not isinstance(returned, tuple) or len(returned) != len(outputs):
        raise GraphFormatError(f"the graph has other outputs than the {len(outputs)} named ones")
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)} | set(data["constants"])
    absent = [str(n.target) for n in graph.nodes if n.op == "get_attr" and n.target not in known]
    if absent:
        raise GraphFormatError(f"the model has no parameter or buffer {listed(absent)}")
    interface = Interface(
        data["inputs"]["structure"],
        tuple(_port_from_json(entry) for entry in (*data["inputs"]["ports"], *data["targets"])),
        tuple((str(name), str(placeholder)) for name, placeholder in data["scalars"]),
        tuple(outputs),
        int(data["views"]),
        tuple(int(index) for index in data["hooks"]),
        _conditions_from_json(data),
    )
    return StepGraph(model, graph, interface, {name: constants[name] for name in data["constants"]})


def _conditions_from_json(data: Mapping[str, Any]) -> tuple[str, ...]:
    texts = tuple(str(text) for text in data["conditions"])
    ports = (*data["inputs"]["ports"], *data["targets"])
    named = {size: 2 for port in ports for size in port["shape"] if isinstance(size, str)}
    for text in texts:
        try:
            condition(text)(named)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            raise GraphFormatError(
                f"`{text}` is not a condition on the sizes {[*named]}"
            ) from error
    return texts


def _port_from_json(data: Mapping[str, Any]) -> Port:
    name, key, device = data["name"], data["key"], data["device"]
    texts = isinstance(name, str) and isinstance(device, str)
    if not texts or not (key is None or isinstance(key, str | int)):
        raise GraphFormatError(f"an input has name {name!r}, key {key!r} and device {device!r}")
    if not all(isinstance(size, int | str) for size in data["shape"]):
        raise GraphFormatError(f"the shape of the input `{name}` is {data['shape']!r}")
    dtype = _decode({"dtype": data["dtype"]}, {})
    return Port(data["name"], data["key"], tuple(data["shape"]), dtype, data["device"])
