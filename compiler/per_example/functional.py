"""Per-example squared gradient norms of any model, in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.bound_modules import Sites, replace_layers
from trainc.compiler.layers.tied_weights import sites_of
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.sites import LayerSite, NormSite, Rewrite
from trainc.compiler.model.batch_statistics import batch_norms, uses_batch_statistics
from trainc.compiler.model.copied_layers import release_copies
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.compiler.model.select import expectations, select
from trainc.compiler.per_example.mixing import batch_norm_mixes
from trainc.compiler.per_example.preconditions import count_examples
from trainc.compiler.per_example.statistics import by_parameter
from trainc.compiler.per_example.weight_uses import run_checking_uses
from trainc.compiler.structure.wrappers import unwrapped
from trainc.dsl.reading.field_types import SELECTOR
from trainc.runtime.data.batch import call_model

On = str | Iterable[str] | None


def measured_parameters(model: nn.Module, on: On = None) -> tuple[str, ...]:
    """Return the names of the parameters that `per_example_sq_norms` measures, in the order of its columns.

    `model` is any module; it is not run. `on` is a selector of modules as a spec has it
    (`"type(LayerNorm, RMSNorm)"`, `"role(norm)"`), a list of names of modules or parameters, or None for all. Frozen
    parameters have no gradient: those of selected modules are left out.

    Raises ValueError where `on` cannot be read, selects nothing or another number of modules than its `expect` says,
    or names something that is neither a module nor a parameter, or is a frozen parameter.
    """
    return _columns(build_inventory(unwrapped(model)), on)


def per_example_sq_norms(
    model: nn.Module, loss_fn: Callable[[Any], Tensor], inputs: Any, on: On = None
) -> Tensor:
    """Return the squared norm of each example's contribution to each parameter's gradient, in one backward pass.

    `model` is any module; `inputs` is a tensor, a tuple (positional) or a dict (keyword) of tensors with the examples
    on their first axis; `loss_fn` takes the model's result for them and returns the loss, 0-d. `on` selects parameters
    as for `measured_parameters`; None is all. The contributions of all examples sum to `p.grad`: under a mean over B
    examples each contains the factor 1 / B.

    Returns (examples, parameters), one column for each name of `measured_parameters(model, on)`, in float64 for a
    float64 model, else float32. The model first runs on two and on three of the examples to check that it can be
    measured. Its mode, its buffers and `.grad` stay as they are.

    Raises ValueError for an `on` that measured_parameters refuses, layers that cannot be measured (a BatchNorm in
    train mode), inputs without examples and a loss that is not 0-d; SiteError where no axis counts examples, examples
    affect each other, or a layer is not used, runs twice or shares its weight.

    Source: Gray et al. 2024, arXiv:2411.00999; Goodfellow 2015, arXiv:1510.01799.
    """
    model = unwrapped(model)
    release_copies(model)
    inventory = build_inventory(model)
    columns = _columns(inventory, on)
    _refuse_mixing(model)
    # A tied weight is measured in every layer that uses it.
    names = [n for c in columns for n in (c, *inventory.parameter[c].aliases)]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = sites_of(owners, columns, model, inventory)
    rewrite = Rewrite(
        norms=[site for site in found if isinstance(site, NormSite)],
        layers=[site for site in found if isinstance(site, LayerSite)],
    )
    with _bound(model, rewrite) as sites:
        examples = count_examples(model, sites, inputs)
        squares = _measure(model, sites, loss_fn, inputs, examples)
    by_name = by_parameter(rewrite, squares)
    return torch.stack([by_name[name] for name in columns], 1)


def _measure(
    model: nn.Module, sites: Sites, loss_fn: Callable[[Any], Tensor], inputs: Any, examples: int
) -> dict[str, Tensor]:
    """Return the probes' gradients by module."""
    some = next(model.parameters())
    double = any(p.dtype == torch.float64 for p in model.parameters())
    dtype = torch.float64 if double else torch.float32

    def loss_of() -> Tensor:
        sites.activate(ExampleIndex(examples), {}, dtype, some.device)
        loss = loss_fn(call_model(model, inputs))
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(
                "`loss_fn` must return one number, a 0-d tensor: the mean or the sum over the batch"
            )
        return loss

    measured = {m.trainc.name: cast(nn.Module, m) for m in sites.layers}
    with torch.enable_grad():
        loss = run_checking_uses(loss_of, measured)
    probes = sites.probes()
    found = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
    silent = [name for name, gradient in zip(probes, found, strict=True) if gradient is None]
    if silent:
        raise SiteError(f"`{silent[0]}` does not affect the loss: exclude it from `on`")
    return {n: g for n, g in zip(probes, found, strict=True) if g is not None}


def _columns(inventory: Inventory, on: On) -> tuple[str, ...]:
    if on is None:
        chosen = {p.name for p in inventory.trainable}
    elif isinstance(on, str):
        chosen = _of_modules(inventory, _selected(inventory, on))
    else:
        chosen = set()
        for name in on:
            if name in inventory.parameter:
                if not inventory.parameter[name].trainable:
                    raise ValueError(
                        f"`{name}` is frozen (requires_grad is False): it has no gradient to measure"
                    )
                chosen.add(inventory.parameter[name].name)
            elif name in inventory.module:
                chosen |= _of_modules(inventory, [name])
            else:
                raise ValueError(f"`{name}` is neither a module nor a parameter of this model")
    names = tuple(p.name for p in inventory.parameters if p.name in chosen)
    if not names:
        raise ValueError(
            f"nothing to measure: {on!r} selects no parameter of this model that requires a gradient"
        )
    return names


def _selected(inventory: Inventory, on: str) -> tuple[str, ...]:
    """Return the modules that a selector matches; raises ValueError for another number than `expect` says."""
    selector = SELECTOR.accept(on)
    for expect, count in expectations(selector, inventory, "modules"):
        if expect.count != count:
            raise ValueError(f"`{on}`: the selector matches {count} modules, not {expect.count}")
    return select(selector, inventory, "modules")


def _of_modules(inventory: Inventory, modules: Iterable[str]) -> set[str]:
    """Return the modules' own parameters that require a gradient, by their first names."""
    held = (inventory.parameter[n] for m in modules for n in inventory.module[m].parameters)
    return {p.name for p in held if p.trainable}


def _refuse_mixing(model: nn.Module) -> None:
    for name, module in batch_norms(model).items():
        if uses_batch_statistics(module):
            raise ValueError(batch_norm_mixes(name, module))


@contextmanager
def _bound(model: nn.Module, rewrite: Rewrite) -> Iterator[Sites]:
    sites = replace_layers(model, rewrite)
    for module in sites.layers:
        module.trainc.also_in_eval = True
    try:
        yield sites
    finally:
        sites.unbind()
