"""The state of a run as JSON and tensors: a tree of dicts with string keys, lists, tuples, tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flatten(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return the JSON of a state, and its tensors by their paths, each once.

    Raises ValueError for what neither can hold.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(state, "", tensors, {}), tensors


def _flatten(
    value: Any,
    name: str,
    tensors: dict[str, Tensor],
    seen: dict[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """Return the JSON of a part of a state; its tensors go to `tensors`."""
    match value:
        case Tensor():
            return _store(value, name, tensors, seen)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case list() | tuple():
            items = [_flatten(v, f"{name}/{i}", tensors, seen) for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case Mapping():
            for key in value:
                if not isinstance(key, str) or key.startswith("$"):
                    raise ValueError(
                        f"the state at `{name or '.'}` has the key {key!r}: expected a string"
                        " that does not begin with $"
                    )
            prefix = f"{name}/" if name else ""
            return {
                key: _flatten(
                    inner, prefix + key.replace("~", "~0").replace("/", "~1"), tensors, seen
                )
                for key, inner in value.items()
            }
    raise ValueError(
        f"the state at `{name or '.'}` is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings,"
        " booleans, None, and lists, tuples and dicts of these"
    )


def _store(
    tensor: Tensor,
    name: str,
    tensors: dict[str, Tensor],
    seen: dict[tuple[Any, ...], dict[str, Any]],
) -> dict[str, Any]:
    """Add a tensor and return the JSON that stands for it; tensors that are the same memory are stored once."""
    tensor = tensor.detach()
    if hasattr(tensor, "device_mesh"):  # of which this process holds a part
        tensors[name] = tensor
        return {"$tensor": name}
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if tensor.numel() and memory in seen:
        return seen[memory]
    found: dict[str, Any] = {"$tensor": name}
    # The order of the axes in memory decides how products round, and a file has none but the usual one.
    axes = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    if not tensor.is_contiguous() and tensor.permute(axes).is_contiguous():
        tensor = tensor.permute(axes)
        found["$axes"] = axes
    # A copy of its own: safetensors takes neither strides nor memory that two tensors share.
    tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
    seen[memory] = found
    return found


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that a JSON tree describes."""
    match value:
        case {"$tensor": str(name), "$axes": list(axes)}:
            return tensors[name].permute([axes.index(i) for i in range(len(axes))])
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$float": str(number)}:
            return float(number)
        case {"$tuple": list(items)}:
            return tuple(restore(item, tensors) for item in items)
        case dict():
            return {key: restore(inner, tensors) for key, inner in value.items()}
        case list():
            return [restore(item, tensors) for item in value]
    return value
