"""The second capture front end: torch.compile, for models that torch.export refuses.

Everything that depends on the internals of torch.compile is in this file. Its graph is brought to
ATen and to the layout that torch.export gives, so that the same passes and the same differentiation
follow.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from trainc.compiler.graph.named_tensors import register_tensor
from trainc.compiler.graph.wrapped_model import WrappedModel


class _Caught(Exception):
    """Raised to stop torch.compile; carries its graph and the graph's arguments."""


def _catch(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """Serve as a torch.compile backend that never runs the one graph it is given."""

    def catch(*arguments: Any) -> Any:
        raise _Caught(graph, arguments)

    return catch


def dynamo_capture(wrapped: WrappedModel, arguments: tuple[Any, ...]) -> fx.GraphModule:
    """Capture with torch.compile(fullgraph=True); the model itself does not run."""
    if wrapped.hooks is not None and wrapped.hooks.captures:
        raise RuntimeError("results of layers are captured by torch.export alone")
    # torch.compile counts recompilations per code object and gives up after a few: take a new one.
    forward = type(wrapped).forward
    fresh = FunctionType(forward.__code__.replace(), forward.__globals__, "forward")
    step = torch.compile(MethodType(fresh, wrapped), backend=_catch, fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step(*arguments)
        except _Caught as caught:
            graph, given = caught.args
        else:
            raise RuntimeError("torch.compile ran the model without making a graph")
    if not all(isinstance(argument, Tensor) for argument in given):
        raise RuntimeError("torch.compile made a graph whose inputs are not all tensors")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(argument, static_shapes=True) for argument in given]
    with preserve_node_meta():
        inlined = make_fx(_Inlined(graph).run, pre_dispatch=True, _allow_non_fake_inputs=True)
        traced = inlined(*fakes)
    return _as_exported(traced, given, wrapped, pytree.tree_leaves(arguments))


class _Inlined(fx.Interpreter):
    """Runs a graph with its activation checkpoints inlined: passes do not look into nested graphs."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run the nested graph of an activation checkpoint as part of this one."""
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *rest = args
            return _Inlined(body).run(*rest)
        return super().call_function(target, args, kwargs)


def _as_exported(
    traced: fx.GraphModule, arguments: tuple[Any, ...], wrapped: nn.Module, leaves: list[Tensor]
) -> fx.GraphModule:
    """Turn lifted parameters back into attributes, and order the inputs as `leaves` are."""
    named = [*wrapped.named_parameters(), *wrapped.named_buffers()]
    names = {id(tensor): name for name, tensor in named}
    holder = fx.GraphModule(nn.Module(), fx.Graph())
    graph = fx.Graph()
    ports = {id(leaf): graph.placeholder(f"port_{i}") for i, leaf in enumerate(leaves)}
    environment: dict[fx.Node, Any] = {}
    pending = iter(arguments)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            tensor = next(pending)
            if id(tensor) in ports:
                environment[node] = ports[id(tensor)]
                continue
            name = names.get(id(tensor), f"lifted_{len(environment)}")
            register_tensor(holder, name, tensor)
            environment[node] = graph.get_attr(name)
        elif node.op == "get_attr":
            value = getattr(traced, str(node.target))
            if isinstance(value, Tensor):
                register_tensor(holder, str(node.target), value)
            else:
                holder.add_module(str(node.target), value)
            environment[node] = graph.get_attr(str(node.target))
        elif node.op == "output":
            graph.output(tuple(environment[n] for n in pytree.tree_leaves(node.args)))
        else:
            made = graph.node_copy(node, lambda n: environment[n])
            made.meta["nn_module_stack"] = _stack(node)
            environment[node] = made
    holder.graph = graph
    return holder


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return the module stack with torch.export's paths: `a.0` for `L['self'].a[0]`."""
    plain = {}
    for key, (path, module_type) in (node.meta.get("nn_module_stack") or {}).items():
        path = re.sub(r"^L\['\w+'\]\.?", "", path).replace("._modules", "")
        plain[key] = (re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path), module_type)
    return plain
