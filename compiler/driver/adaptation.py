"""The model of a spec before it is bound: adapted, with the weights that it starts with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from trainc.compiler.bind.binding import bind_adapters
from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.lower.adapting import adapt_model
from trainc.compiler.model.adapters import base_of, restored_on_error
from trainc.compiler.model.factories import seeded_model
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.storage.saved_weights import read_origin, read_weights


@contextmanager
def adapted(
    spec: Spec, model: nn.Module, clauses: Sequence[BoundClause] | None = None
) -> Iterator[Inventory | None]:
    """Adapt the model in place, and yield its inventory as it was before; None for a spec that adapts nothing.

    `clauses` are the bound ones, if they are known. When the block raises, the model is as it was. Raises SpecError for
    what cannot be adapted.
    """
    if not any(clause.construct.adapts for clause in spec.clauses):
        yield None
        return
    with restored_on_error(model):
        base = base_inventory(model)
        bound = bind_adapters(spec, base) if clauses is None else clauses
        run = spec.one("run")
        adapt_model(model, bound, base, run.construct.seed if run else 0)  # type: ignore[attr-defined]
        yield base


def base_inventory(model: nn.Module) -> Inventory:
    """Return the inventory of a model without its adapters."""
    with base_of(model):
        return build_inventory(model)


def started_model(spec: Spec) -> nn.Module:
    """Return the spec's model with the initial weights of its seed, or those that its `init` names.

    Raises SpecError where these do not fit, and where `start` of `run` would put others in their place.
    """
    require_one_start(spec)
    model, source = seeded_model(spec), _init_of(spec)
    if source is not None:
        load_weights(model, source, spec, "model", "init")
    return model


def require_one_start(spec: Spec) -> None:
    """Raise SpecError where `start` of `run` would put its weights in place of those of `init`."""
    run, model = spec.one("run"), spec.one("model")
    start = None if run is None else run.construct.start  # type: ignore[attr-defined]
    if run is not None and model is not None and start is not None and _init_of(spec) is not None:
        at = labels((run.part_span("start"), ""), (model.part_span("init"), "here"))
        message = "`start` of `run` would put its weights in place of those of `init`: remove one of the two"
        raise SpecError([Diagnostic("bad-value", message, at)])


def unused_init(spec: Spec) -> list[Diagnostic]:
    """Return a warning for initial weights of a spec's model that a model which is passed does not get."""
    clause = spec.one("model")
    if clause is None or _init_of(spec) is None:
        return []
    message = "`init` has no effect: the model was passed, and trains from the weights that it has"
    help_ = "load them into the model before, or pass none, and the spec builds it"
    at = labels((clause.part_span("init"), ""))
    return [Diagnostic("no-effect", message, at, (), help_, "warning")]


def origins(spec: Spec) -> list[str]:
    """Return what a run says of the weights that the model of its spec starts with, where `init` names them."""
    source = _init_of(spec)
    return [] if source is None else [f"the model starts with {source}: {read_origin(source)}"]


def _init_of(spec: Spec) -> Path | None:
    clause: Any = spec.one("model")
    source = None if clause is None else clause.construct.init
    return None if source is None else Path(source)


def load_weights(
    model: nn.Module, source: Path, spec: Spec, kind: str = "run", field: str = "start"
) -> None:
    """Load weights from the newest checkpoint of a run's folder or from a .safetensors file.

    Of a run they are the weights that it evaluated with. Weights with more names than the model has are loaded into the
    model as the spec adapts it. Raises SpecError, at a field of the clause of this kind, where there are none or they
    do not fit the model.
    """
    try:
        weights = read_weights(source)
        if weights.keys() - model.state_dict().keys():
            with adapted(spec, model):  # the adapters stay, and `compile` finds them
                model.load_state_dict(weights)
        else:
            model.load_state_dict(weights)
    except (ValueError, OSError, LookupError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())  # torch writes a line for each name
        message = f"the weights in {source} cannot be loaded into this model: {why}"
        clause = spec.one(kind)
        at = labels((clause.part_span(field) if clause else None, ""))
        raise SpecError([Diagnostic("model-failed", message, at)]) from error
