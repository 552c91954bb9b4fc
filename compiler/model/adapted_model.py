"""What can be done with the adapters of a model: merge, write and load them, and explain where a layer fails."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from traceback import walk_tb

import torch
from torch import Tensor, nn

from trainc.compiler.model.adapter_rule import Adapted, AdapterRule
from trainc.compiler.model.adapters import (
    Adapter,
    FoundAdapter,
    PrepareAdapter,
    adapters_of,
    unfreeze,
)
from trainc.compiler.model.undisturbed import in_mode


def merge_adapters(model: nn.Module) -> None:
    """Fold every adapter into its layer and remove it; the other parameters train again where they did before.

    Raises ValueError, and changes nothing, where an adapter cannot be folded.
    """
    found = _required(model)
    kept = [
        (parameter, parameter.detach().clone())
        for one in found
        for parameter in one.layer.parameters(recurse=False)
    ]
    try:
        with torch.no_grad():
            for one in found:
                _refuse_shared(model, one)
            for _, several in groupby(found, lambda one: one.layer_name):
                _merge(list(several))
    except BaseException:
        with torch.no_grad():
            for parameter, value in reversed(kept):
                parameter.copy_(value)
        raise
    for one in found:
        one.remove()
    unfreeze(model)


def _merge(adapters: list[FoundAdapter]) -> None:
    """Fold the adapters of one layer into it, in the order in which they run; each computes with the first weight."""
    own = dict(adapters[0].layer.named_parameters(recurse=False))
    first = {name: parameter.clone() for name, parameter in own.items()}
    folded: dict[str, Tensor] = {}
    for one in adapters:
        for name, parameter in own.items():
            parameter.copy_(first[name])
        with in_mode(one.adapter, training=False):
            factor = one.adapter.rule.output_factor(one.layer, one.adapter)
            try:
                one.adapter.rule.merge(one.layer, one.adapter)
            except ValueError as error:
                raise ValueError(f"`{one.full_name}` cannot be merged: {error}") from error
        for name, parameter in own.items():
            change: Tensor | float = 0.0
            if name in folded:
                change = folded[name] - first[name]
                if factor is not None:
                    change = change * (factor if name == "weight" else factor.flatten())
            folded[name] = parameter + change
    for name, parameter in own.items():
        parameter.copy_(folded[name])


def _refuse_shared(model: nn.Module, one: FoundAdapter) -> None:
    """Raise ValueError where a parameter of the layer is used by another module, which has no adapter."""
    own = {id(parameter) for parameter in one.layer.parameters(recurse=False)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if module is not one.layer and id(parameter) in own:
                raise ValueError(
                    f"`{one.full_name}` cannot be merged, because `{one.layer_name}` shares a parameter with `{name}`,"
                    " which would change as well. Give the layer a parameter of its own first"
                )


@contextmanager
def explaining_failures() -> Iterator[None]:
    """Raise what an adapter's rule makes of an error inside a layer whose inputs the adapter changed.

    Running out of memory stays what it is.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        for adapter in () if "memory" in str(error) else _preparing(error):
            if (found := adapter.rule.failure(adapter, error)) is not None:
                raise found from error
        raise


def _preparing(error: Exception) -> Iterator[Adapter]:
    """Yield the adapters that changed the inputs of the layers in which an error was raised, outermost first."""
    for frame, _ in walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and frame.f_code.co_name == "forward":
            for hook in layer._forward_pre_hooks.values():
                adapter = layer._modules.get(getattr(hook, "name", ""))
                if isinstance(hook, PrepareAdapter) and isinstance(adapter, Adapter):
                    yield adapter


def silent_adapters(model: nn.Module, masked: Container[str]) -> Iterator[str]:
    """Yield a note for each adapter that trains and got no gradient, or one of zero.

    That of a masked parameter is not seen, and of a sharded one only that there is none.
    """
    for one in adapters_of(model):
        trained = [
            parameter
            for name, parameter in one.adapter.named_parameters()
            if parameter.requires_grad and f"{one.full_name}.{name}" not in masked
        ]
        if trained and all(parameter.grad is None for parameter in trained):
            yield (
                f"`{one.full_name}` did not run in the first step: a layer whose weight its parent uses directly is"
                " never called. Exclude such a layer from `on`"
            )
        elif trained and not any(map(_is_moved, trained)):
            yield (
                f"`{one.full_name}` had a gradient of 0 in the first step: what it changes does not reach the loss, as"
                " where a module computes each token by itself and others are added. Select another module, unless"
                " dropout left it out of this step"
            )


def _is_moved(parameter: nn.Parameter) -> bool:
    """Say whether a gradient is not zero, or is a shard or sparse, which may not tell."""
    gradient = parameter.grad
    if gradient is None:
        return False
    whole = type(gradient) is Tensor and gradient.layout == torch.strided
    return not whole or bool(gradient.any())


def write_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters, and what else trains, as their construct does; to subfolders where clauses share no files."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(rule: AdapterRule, adapted: Adapted, where: Path) -> None:
        where.mkdir(exist_ok=True)
        rule.write(adapted, where)

    _each(model, folder, write)


def read_adapters(model: nn.Module, folder: Path) -> None:
    """Load what `write_adapters` wrote; raises ValueError where it does not fit, and FileNotFoundError without it."""
    _each(model, folder, lambda rule, adapted, where: rule.read(adapted, where))


def _each(
    model: nn.Module, folder: Path, act: Callable[[AdapterRule, Adapted, Path], None]
) -> None:
    by_label: dict[str, list[FoundAdapter]] = {}
    for one in sorted(_required(model), key=lambda one: one.adapter.order):
        by_label.setdefault(one.adapter.label, []).append(one)
    together: list[tuple[str, list[FoundAdapter]]] = []
    for label, found in by_label.items():
        rule = found[0].adapter.rule
        for _, first in together:
            if first[0].adapter.rule.shares_files(rule):
                first += found
                break
        else:
            together.append((label, found))
    for label, found in together:
        adapted = Adapted(
            model,
            {one.layer_name: one.adapter for one in found},
            {one.layer_name: one.layer for one in found},
            tuple(sorted({name for one in found for name in one.adapter.trained})),
        )
        act(found[0].adapter.rule, adapted, folder / label if len(together) > 1 else folder)


def _required(model: nn.Module) -> list[FoundAdapter]:
    found = adapters_of(model)
    if not found:
        raise ValueError("the model has no adapters: no clause of its spec adapts it")
    return found
