"""Wrappers of modules, DistributedDataParallel and `torch.compile`: names are those that modules have without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_COMPILED = "_orig_mod"
"""Where `torch.compile` keeps the module that it wraps."""


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper wraps; None for a module that is no wrapper."""
    if isinstance(module, DistributedDataParallel):
        inside: nn.Module = module.module
        return inside
    return module._modules.get(_COMPILED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers around it, and one that has none as it is."""
    while (inside := wrapped_in(module)) is not None:
        module = inside
    return module


def inner_wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the wrappers of submodules, each once."""
    yield from {id(one): one for _, _, one in _places(model)}.values()


def name_through(model: nn.Module) -> None:
    """Let names of modules and parameters of a model pass through the wrappers in it; its `state_dict` stays.

    The wrappers become subclasses of themselves.
    """
    for wrapper in inner_wrappers(model):
        if not isinstance(wrapper, _Transparent):
            # `torch.compile` would set the class of what it wraps.
            object.__setattr__(wrapper, "__class__", _subclass(cast("Any", type(wrapper))))


class Unwrapped:
    """The state of a model under the names of the model without wrappers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._prefixes = [(raw, plain) for raw, plain, _ in _places(model)][::-1]

    def state_dict(self) -> dict[str, Any]:
        return {self._plain(name): value for name, value in self._model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:
        """Load a state with the names of the model without wrappers, as `nn.Module.load_state_dict` does."""
        names = {self._plain(name): name for name in self._model.state_dict()}
        own = {names.get(name, name): value for name, value in state.items()}
        return self._model.load_state_dict(own, strict=strict)

    def _plain(self, name: str) -> str:
        for raw, plain in self._prefixes:
            if name.startswith(raw):
                return plain + name.removeprefix(raw)
        return name


def _places(
    model: nn.Module, raw: str = "", plain: str = ""
) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield for every wrapper in a model what names inside of it begin with, with it and without, from outside in."""
    for name, child in model._modules.items():
        if child is None:
            continue
        own = (f"{raw}{name}.", f"{plain}{name}.")
        while (inside := wrapped_in(child)) is not None:
            key = next(key for key, one in child._modules.items() if one is inside)
            own = (f"{own[0]}{key}.", own[1])
            yield *own, child
            child = inside
        yield from _places(child, *own)


class _Transparent:
    """Marks wrappers whose names pass through."""


@cache
def _subclass(kind: Any) -> Any:
    def named_modules(
        self: Any,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Any:
        """Yield what is wrapped under the name of the wrapper."""
        return wrapped_in(self).named_modules(memo, prefix, remove_duplicate)  # type: ignore[union-attr]

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return kind.__getattr__(self, name)
        except AttributeError:
            if name in ("module", _COMPILED):
                raise
            return getattr(wrapped_in(self), name)

    own = {
        "named_modules": named_modules,
        "__getattr__": __getattr__,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (_Transparent, kind), own)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the state of a model under the names of the model without wrappers."""
    found = Unwrapped(model).state_dict().items()
    return {name: value for name, value in found if isinstance(value, Tensor)}
