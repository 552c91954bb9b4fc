"""What a spec names by import path: the model and the data, built, called and checked, with errors at their lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.compiler.model.facts import Facts
from trainc.compiler.model.import_path import ImportProblem, call, load
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError

if TYPE_CHECKING:
    from torch import nn

    from trainc.dsl.resolve.spec import Spec
    from trainc.dsl.resolve.statements import Clause


def seeded_model(spec: Spec) -> nn.Module:
    """Return the spec's model with the initial weights of its seed; the caller's random state is left alone."""
    import torch

    run = spec.one("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.construct.seed if run else 0)  # type: ignore[attr-defined]
        return build_model(spec)


@dataclass(frozen=True, slots=True)
class _Named:
    """A clause whose construct names a callable."""

    clause: Clause
    construct: Any


def _named(spec: Spec, kind: str) -> _Named | None:
    found = next((c for c in spec.clauses if c.construct.kind == kind), None)
    return None if found is None else _Named(found, found.construct)


def build_model(spec: Spec) -> nn.Module:
    """Return what the `model` clause builds; raises SpecError at its line."""
    from torch import nn

    named = _named(spec, "model")
    if named is None:
        help_ = 'write `model "module:callable"`, or pass one'
        raise missing_clause("the spec names no model", help_)
    model = _called(named, "model-failed")
    if not isinstance(model, nn.Module):
        raise SpecError(
            [
                _at(
                    named.clause,
                    "model-failed",
                    f"`{named.construct.path}` gives no torch.nn.Module",
                )
            ]
        )
    return model


def build_data(spec: Spec) -> Any:
    """Return what the `data` clause builds; raises SpecError at its line."""
    named = _named(spec, "data")
    if named is None:
        help_ = 'write `data "module:callable" { batch = 32 samples }`'
        raise missing_clause("the spec names no data", help_)
    data = _called(named, "data-failed")
    missing = [
        name for name in ("train", "evaluation", "tokens_per_sample") if not hasattr(data, name)
    ]
    if missing:
        raise SpecError(
            [
                _at(
                    named.clause,
                    "data-failed",
                    f"`{named.construct.path}` gives data without `{missing[0]}`",
                )
            ]
        )
    return data


def facts(spec: Spec) -> Facts:
    """Return what the data callable says of itself without being called."""
    named = _named(spec, "data")
    if named is None:
        return Facts()
    try:
        describe = getattr(load(named.construct.path), "describe", None)
        if describe is None:
            return Facts()
        said = describe(**named.construct.arguments)
    except ImportProblem as problem:
        raise SpecError(
            [_at(named.clause, problem.rule, str(problem), problem.help, problem.field)]
        ) from problem
    except TypeError as error:
        raise SpecError(
            [_at(named.clause, "wrong-argument", f"the data cannot be described: {error}")]
        ) from error
    return Facts(said.get("samples"), said.get("tokens_per_sample"))


def missing_clause(message: str, help: str) -> SpecError:
    """Return the error for a clause that a spec needs here and does not have."""
    return SpecError([Diagnostic("missing-clause", message, help=help)])


def _called(named: _Named, rule: str) -> Any:
    try:
        return call(named.construct.path, dict(named.construct.arguments), rule)
    except ImportProblem as problem:
        raise SpecError(
            [_at(named.clause, problem.rule, str(problem), problem.help, problem.field)]
        ) from problem


def _at(
    clause: Clause, rule: str, message: str, help: str | None = None, field: str = "path"
) -> Diagnostic:
    span = clause.part_span(field)
    labels = (Label(span),) if span else ()
    return Diagnostic(rule, message, labels, help=help)
