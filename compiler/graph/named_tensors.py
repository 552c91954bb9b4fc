"""Register a model's own tensors on another module, under the names they have in the model."""

from __future__ import annotations

import re

from torch import Tensor, nn


def identifier(name: str) -> str:
    """Turn a dotted or coloned name into a Python identifier."""
    text = re.sub(r"\W", "_", name)
    return f"_{text}" if not text or text[0].isdigit() else text


def register_tensor(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Register `tensor` itself under a dotted name, making empty modules on the way.

    Raises ValueError where an attribute of `root` has the name already.
    """
    *path, leaf = name.split(".")
    here = root
    for part in path:
        if part not in here._modules:
            if hasattr(here, part):
                raise _taken(name, part)
            here.add_module(part, nn.Module())
        child = here._modules[part]
        assert child is not None
        here = child
    if leaf not in here._parameters and leaf not in here._buffers and hasattr(here, leaf):
        raise _taken(name, leaf)
    if isinstance(tensor, nn.Parameter):
        here._parameters[leaf] = tensor
    else:
        here.register_buffer(leaf, tensor, persistent=persistent)


def _taken(name: str, attribute: str) -> ValueError:
    return ValueError(
        f"`{name}` cannot be captured under this name: a torch.fx.GraphModule has its own attribute `{attribute}`."
        " Rename it in the model"
    )


def register_model(root: nn.Module, model: nn.Module) -> None:
    """Register every parameter and buffer of a model, a shared one under each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                persistent = name not in module._non_persistent_buffers_set
                register_tensor(root, dot + name, tensor, persistent=persistent)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter and buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def first_module_names(model: nn.Module) -> dict[str, str]:
    """Map every name of every module to the first name of the same module."""
    first: dict[int, str] = {}
    named = model.named_modules(remove_duplicate=False)
    return {name: first.setdefault(id(module), name) for name, module in named}
