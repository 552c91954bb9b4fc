"""Find the user's hooks on modules and parameters, which a captured graph does not call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

_OF_MODULES = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_OF_PARAMETERS = {
    "_backward_hooks": "hook on its gradient",
    "_post_accumulate_grad_hooks": "hook after its gradient is accumulated",
}


class UserHooks:
    """The hooks of one model that are not trainc's own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # A module keeps its tables of hooks for life: to look at them costs microseconds, so every step does it.
        self._tables: list[tuple[str, nn.Module | None, Mapping[int, Any]]] = [
            (kind, module, module.__dict__[table])
            for module in model.modules()
            for table, kind in _OF_MODULES.items()
        ]
        self._tables += [
            (kind, None, getattr(module_hooks, f"_global{table}"))
            for table, kind in _OF_MODULES.items()
        ]

    def find(self, parameters: Mapping[str, nn.Parameter]) -> str | None:
        """Describe the first hook on a module or a parameter; None where there is none."""
        for kind, module, hooks in self._tables:
            if hooks and _has_foreign(hooks):
                return f"{self._name(module)} has a {kind}"
        return _parameter_hook(parameters)

    def _name(self, module: nn.Module | None) -> str:
        if module is None:
            return "every module"
        name = next(name for name, other in self._model.named_modules() if other is module)
        return f"`{name}`" if name else "the model itself"


def _parameter_hook(parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Describe the first hook of a parameter that is not trainc's own."""
    for name, parameter in parameters.items():
        for table, kind in _OF_PARAMETERS.items():
            if (hooks := getattr(parameter, table)) and _has_foreign(hooks):
                return f"`{name}` has a {kind}"
    return None


def _has_foreign(hooks: Mapping[int, Any]) -> bool:
    return not all(_is_ours(hook) for hook in hooks.values())


def _is_ours(hook: Any) -> bool:
    """Return whether a hook is a function of this package: it reads gradients, which a graph returns as well."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "trainc"
