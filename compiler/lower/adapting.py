"""Adapt a model: what `Construct.adapt` may do, before the inventory is made on which the other clauses select."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.compiler.model.adapters import (
    Adapter,
    Parts,
    adapters_of,
    attach,
    build_adapter,
    freeze,
    materialize,
    take_over,
    unfreeze,
)
from trainc.compiler.model.inventory import Inventory, ModuleEntry
from trainc.compiler.model.select import Target, select
from trainc.compiler.structure.wrappers import unwrapped
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Selector
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.storage.random_streams import derive_seed

_HALF = (torch.float16, torch.bfloat16)


class Adapting:
    """One clause's access to a model that it adapts. Names and selectors are those of the model without adapters."""

    def __init__(
        self,
        clause: BoundClause,
        model: nn.Module,
        base: Inventory,
        seed: int,
        taken: Container[str] = (),
    ) -> None:
        self.clause, self.model, self.base = clause, model, base
        self._seed, self._taken = seed, taken
        self.added: list[str] = []
        self.trained: set[str] | None = None

    @property
    def label(self) -> str:
        """Return the clause's name: its `as`, or else the name of its construct."""
        return self.clause.label

    def modules(self) -> tuple[ModuleEntry, ...]:
        """Return the selected modules."""
        return self.clause.modules(self.base)

    def select(self, selector: Selector, target: Target) -> tuple[str, ...]:
        """Return the names that the selector in a field matches."""
        return select(selector, self.base, target)

    def module(self, name: str) -> nn.Module:
        """Return the user's module of a name, inside of what `torch.compile` put around it."""
        return unwrapped(self.model.get_submodule(name))

    def add(
        self,
        layer_name: str,
        parts: Callable[[], Parts],
        start: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Add an adapter to a layer: a child with the construct's name, made of modules and parameters.

        `parts` makes them, without values, which the construct's `initialize` gives, or `start` of the layer, by name.
        They have the dtype of the layer,
        float32 where that is shorter. An adapter of the same form that is there already keeps its values.

        Raises ValueError where the layer has another adapter or attribute of the name, runs or holds its children as a
        list, or is sharded.
        """
        layer, name = self.module(layer_name), self.clause.construct.name
        _refuse_containers(layer_name, layer)
        rule = cast(AdapterRule, self.clause.construct)
        full_name = f"{layer_name}.{name}".removeprefix(".")
        self.added.append(full_name)
        if full_name in self._taken:
            return  # by another clause, which is said of both
        like = next((p for p in layer.parameters() if p.is_floating_point()), None)
        if like is None:
            raise ValueError(
                f"`{layer_name}` has no floating-point parameter: exclude it from `on`"
            )
        if is_sharded(like):
            raise ValueError(
                f"`{layer_name}` is sharded over processes (FSDP2) already: compile before you shard the model"
            )
        dtype = torch.float32 if like.dtype in _HALF else like.dtype
        made = build_adapter(rule, self.label, layer_name, parts, dtype)
        earlier = layer._modules.get(name)
        if isinstance(earlier, Adapter):
            for part in sorted(made.form.keys() | earlier.form.keys()):
                here, wanted = earlier.form.get(part), made.form.get(part)
                if here != wanted:
                    raise ValueError(
                        f"`{full_name}` is in the model already, with another form: `{part}` is {here or 'not there'},"
                        f" and this clause needs {wanted or 'none'}. Merge that adapter first (`program.merge()`), or"
                        " change the clause"
                    )
            layer._modules[name] = take_over(made, earlier)
        elif hasattr(layer, name):
            raise ValueError(
                f"`{layer_name}` has an attribute `{name}` of its own, the name that its adapter would have: exclude it"
                " from `on`"
            )
        else:
            if like.device.type != "meta":
                seed_of = partial(derive_seed, self._seed, "adapter", full_name)
                made = materialize(made, seed_of, like.device)
                with torch.no_grad():
                    for own, value in ({} if start is None else start(layer)).items():
                        made.get_parameter(own).copy_(value)
            attach(layer, name, made)

    def train_only(self, names: Iterable[str]) -> None:
        """Freeze the base, but for parameters of these names and those that another clause names here.

        Raises ValueError if all of them were frozen before.
        """
        named = set(names)
        if named and not any(self.base.parameter[name].trainable for name in named):
            raise ValueError(
                "all parameters that it is told to train are frozen: set `requires_grad = True` on them, or select"
                " others"
            )
        self.trained = (self.trained or set()) | named


def adapt_model(
    model: nn.Module, clauses: Sequence[BoundClause], base: Inventory, seed: int
) -> None:
    """Adapt a model in place as the clauses say; `base` is its inventory without adapters.

    Clauses that are dropped or adapt nothing are left out; without any other the model stays as it is, adapted or not.
    Raises SpecError for what a clause cannot adapt, and for an adapter in the model that no clause asks for.
    """
    active = [c for c in clauses if c.construct.adapts and c.dropped is None]
    if not active:
        return
    unfreeze(model)
    found: list[Diagnostic] = []
    owners: dict[str, BoundClause] = {}
    trained: set[str] | None = None
    for order, clause in enumerate(active):
        to = Adapting(clause, model, base, seed, owners)
        try:
            _refuse_times(clause)
            clause.construct.adapt(to)
        except ValueError as error:
            message = f"`{clause.title}` cannot adapt the model: {error}"
            found.append(Diagnostic("bad-value", message, labels((clause.span, ""))))
        for one in adapters_of(model):
            if one.full_name in to.added:
                one.adapter.trained, one.adapter.order = tuple(sorted(to.trained or ())), order
        found += [_added_twice(name, clause, owners[name]) for name in to.added if name in owners]
        owners |= {name: owners.get(name, clause) for name in to.added}
        if to.trained is not None:
            trained = (trained or set()) | to.trained
    if not found:
        found += _left_over(model, owners, active[0])
    if found:
        raise SpecError(found)
    if trained is not None:
        freeze(model, frozenset(p.name for p in base.parameters if p.name not in trained))


def _refuse_containers(layer_name: str, layer: nn.Module) -> None:
    """Raise ValueError for a module of which an adapter would be one more item, or that is never called."""
    own = getattr(type(layer), "unbound", type(layer))
    if not issubclass(own, (nn.ModuleList, nn.ModuleDict)):
        return
    why = "never called"
    if "forward" in {
        name for one in own.__mro__[: own.__mro__.index(nn.Module)] for name in vars(one)
    }:
        why = "its adapter would be one more of them"
    raise ValueError(
        f"`{layer_name}` is a list of modules and {why}: select those in it, or the module around it"
    )


def _refuse_times(clause: BoundClause) -> None:
    """Raise ValueError for a time of the clause."""
    for word, time in (("from", clause.start), ("until", clause.stop), ("every", clause.every)):
        if time is not None:
            raise ValueError(f"a model is adapted for the whole run: remove `{word} {time}`")


def _added_twice(name: str, clause: BoundClause, other: BoundClause) -> Diagnostic:
    layer = name.rpartition(".")[0]
    return Diagnostic(
        "claimed-twice",
        f"two `{clause.title}` clauses select `{layer}`",
        labels((clause.span, "selected again here"), (other.span, "first selected here")),
        help=f"change one of the two selectors so that it does not match `{layer}`",
    )


def _left_over(
    model: nn.Module, owners: dict[str, BoundClause], clause: BoundClause
) -> Iterable[Diagnostic]:
    """Yield an error for the first adapter of the model that no clause asks for."""
    for one in adapters_of(model):
        if one.full_name not in owners:
            yield Diagnostic(
                "bad-value",
                f"the model has an adapter `{one.full_name}` from an earlier program, which no clause of this spec"
                " asks for",
                labels((clause.span, "adapts other layers")),
                help=f"merge it first (`program.merge()`), or select `{one.layer_name}` as well",
            )
            return
