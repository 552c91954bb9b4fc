"""Build the model and the data that a spec names by import path; mistakes are reported at their lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainc.compiler.model.import_path import ImportProblem, call, import_attribute
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Numbers that the data callable's `describe` gives before the data is built; None for those not given."""

    samples: int | None = None
    tokens_per_sample: int | None = None


def seeded_model(spec: Spec) -> nn.Module:
    """Return the spec's model with the initial weights of its seed; the caller's random state stays as it is."""
    run = spec.one("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.construct.seed if run else 0)  # type: ignore[attr-defined]
        return build_model(spec)


def build_model(spec: Spec) -> nn.Module:
    """Return what the `model` clause builds; raises SpecError at its line."""
    clause = spec.one("model")
    if clause is None:
        help_ = 'write `model "module:callable"`, or pass a model'
        raise missing_clause("the spec has no `model` clause", help_)
    model = _build(clause, "model-failed")
    if not isinstance(model, nn.Module):
        found = f"returns a {type(model).__name__}, not a torch.nn.Module"
        raise _at(clause, "model-failed", f"`{_path(clause)}` {found}")
    return model


def build_data(spec: Spec) -> Any:
    """Return what the `data` clause builds; raises SpecError at its line."""
    clause = spec.one("data")
    if clause is None:
        help_ = 'write `data "module:callable" { batch = 32 samples }`'
        raise missing_clause("the spec has no `data` clause", help_)
    data = _build(clause, "data-failed")
    for name in ("train", "evaluation", "tokens_per_sample"):
        if not hasattr(data, name):
            message = f"the object that `{_path(clause)}` returns has no attribute `{name}`"
            raise _at(clause, "data-failed", message)
    return data


def data_facts(spec: Spec) -> DataFacts:
    """Return what the data callable's `describe` says, without building the data."""
    clause = spec.one("data")
    if clause is None:
        return DataFacts()
    construct: Any = clause.construct
    try:
        with _reported(clause):
            describe = getattr(import_attribute(construct.path), "describe", None)
        if describe is None:
            return DataFacts()
        described = describe(**construct.arguments)
    except TypeError as error:
        message = f"`{construct.path}` cannot describe the data: {error}"
        raise _at(clause, "wrong-argument", message) from error
    return DataFacts(described.get("samples"), described.get("tokens_per_sample"))


def missing_clause(message: str, help: str) -> SpecError:
    """Return the error for a spec without a clause that is needed."""
    return SpecError([Diagnostic("missing-clause", message, help=help)])


def _build(clause: Clause, rule: str) -> Any:
    construct: Any = clause.construct
    with _reported(clause):
        return call(construct.path, dict(construct.arguments), rule)


@contextmanager
def _reported(clause: Clause) -> Iterator[None]:
    """Turn an ImportProblem into a SpecError at the clause's path or argument."""
    try:
        yield
    except ImportProblem as problem:
        raise _at(clause, problem.rule, str(problem), problem.help, problem.field) from problem


def _path(clause: Clause) -> str:
    construct: Any = clause.construct
    return str(construct.path)


def _at(
    clause: Clause, rule: str, message: str, help: str | None = None, field: str = "path"
) -> SpecError:
    span = clause.part_span(field)
    labels = (Label(span),) if span else ()
    return SpecError([Diagnostic(rule, message, labels, help=help)])
