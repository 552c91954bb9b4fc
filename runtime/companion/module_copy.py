"""Copy a model as its user wrote it: without what trainc has put into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Place = tuple[Mapping[str, Tensor | None], str]
"""Where a module keeps a tensor: a table of its own, and the name in it."""


def saved_places(model: nn.Module) -> dict[str, Place]:
    """Return where parameters and the buffers that a state dict has are kept, by first name, each tensor once."""
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for prefix, module in model.named_modules():
            table: Mapping[str, Tensor | None] = getattr(module, kind)
            hidden = module._non_persistent_buffers_set
            for name, tensor in table.items():
                if tensor is not None and name not in hidden and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = table, name
    return found


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and the buffers that a state dict has, by first name, each tensor once."""
    return held_at(saved_places(model))


def held_at(places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the tensors that are at these places now."""
    held = {name: table[key] for name, (table, key) in places.items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def copy_module(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy of a model in which tensors are replaced, by `id`; every other parameter is the model's own.

    Its layers have the user's classes. The user's hooks on modules are part of the copy, as the same functions;
    trainc's are not. Raises ValueError where a module cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} | dict(tensors)
    inside = {id(module) for module in model.modules()}
    for module in model.modules():
        memo |= {id(hook): hook for hook in _hooks(module) if id(_owner(hook)) not in inside}
        if _is_bound(module):
            memo[id(module.trainc)] = None
        for value in vars(module).values():
            # Such as a layer's last output, which copy.deepcopy refuses.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the model cannot be copied ({what}): remove what `copy.deepcopy` cannot copy from its modules, or give"
            " them a `__deepcopy__`"
        ) from error
    for module in made.modules():
        _unbind(module)
    return made


def _is_bound(module: nn.Module) -> bool:
    """Return whether a layer has a class of trainc's, which says what it is otherwise as `unbound`."""
    return hasattr(type(module), "unbound") and hasattr(module, "trainc")


def _unbind(module: nn.Module) -> None:
    """Give a copied layer the user's own class back, and remove trainc's hooks."""
    if _is_bound(module):
        own: Any = module
        own.__class__ = own.unbound
        del own.trainc
    for name in _HOOKS:
        hooks = vars(module).get(name, {})
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for name in _HOOKS:
        yield from vars(module).get(name, {}).values()


def _owner(hook: Any) -> Any:
    """Return the object whose method a hook is: a method of a copied module becomes one of the copy."""
    return getattr(hook, "__self__", None)


def _is_ours(hook: Any) -> bool:
    """Return whether a hook is a function of this package, and not part of what the model computes."""
    if getattr(hook, "part_of_model", False):
        return False
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "trainc"
