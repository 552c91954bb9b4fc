"""Build the model and the data that a spec names by import path; mistakes are reported at their lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainc.compiler.model.import_path import ImportProblem, call
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.order import Data
from trainc.runtime.data.stream import count_samples
from trainc.runtime.storage.random_streams import seeded


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Numbers that are known of the data, mostly before it is loaded; None for those that are not."""

    samples: int | None = None
    tokens_per_sample: int | None = None
    replicas: int = 1
    """How many processes divide the samples, each with a step of its own."""


def seeded_model(spec: Spec) -> nn.Module:
    """Return the spec's model with the initial weights of its seed; the caller's random state stays as it is."""
    with seeded(seed_of(spec)):
        return build_model(spec)


def seed_of(spec: Spec) -> int:
    """Return the seed of the `run` clause, 0 without one."""
    run = spec.one("run")
    seed: int = run.construct.seed if run else 0  # type: ignore[attr-defined]
    return seed


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


def build_data(spec: Spec) -> Data:
    """Return what the `data` clause builds, with the seed of `run`; raises SpecError at its line."""
    clause = spec.one("data")
    if clause is None:
        help_ = 'write `data "module:callable" { batch = 32 samples }`'
        raise missing_clause("the spec has no `data` clause", help_)
    source: Any = clause.construct
    with seeded(seed_of(spec)), _reported(clause):
        data: Data = source.load()
    if too_small := small_data(spec, count_samples(data.train)):
        raise SpecError(too_small)
    run = spec.one("run")
    nothing = data.evaluation is None or count_samples(data.evaluation) == 0
    if nothing and getattr(run and run.construct, "eval", None) is not None:
        assert run is not None
        message = "`eval` says when the model is evaluated, and the data has no held-out samples"
        help_ = (
            "give training and held-out samples (`trainc explain data` says how), or remove `eval`"
        )
        raise _at(run, "data-failed", message, help_, "eval")
    return data


def unnumbered_samples(spec: Spec, readers: Sequence[str]) -> SpecError:
    """Return the error of clauses that read which samples a step holds, of data whose samples have no numbers."""
    names = ", ".join(f"`{name}`" for name in readers)
    clause = spec.one("data")
    assert clause is not None
    message = (
        f"{names} reads which samples a step holds, and the samples of this data have no numbers, since they come in an"
        " order of their own"
    )
    return _at(clause, "data-failed", message, "give a data set with `__len__` and `__getitem__`")


def small_data(spec: Spec, samples: int | None) -> list[Diagnostic]:
    """Return an error for a batch that is larger than training data of this size; none where it is not known."""
    clause = spec.one("data")
    if clause is None or samples is None:
        return []
    construct: Any = clause.construct
    policy = construct.policy
    largest = max(construct.start_size, policy.end if policy is not None else 0)
    if largest <= samples:
        return []
    span = clause.part_span("batch")
    labels = (Label(span, "each step would repeat samples"),) if span else ()
    message = f"a batch of {largest} samples is larger than the training data, which has {samples}"
    return [Diagnostic("never-acts", message, labels, (), f"write at most `{samples} samples`")]


def data_facts(spec: Spec) -> DataFacts:
    """Return what the `data` clause knows of its data without loading it."""
    clause = spec.one("data")
    if clause is None:
        return DataFacts()
    source: Any = clause.construct
    with _reported(clause):
        return DataFacts(*source.count())


def facts_of(data: Data) -> DataFacts:
    """Return the numbers of data that is there."""
    return DataFacts(count_samples(data.train), data.tokens_per_sample)


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
        labels = _labels(clause, problem.field)
        found = Diagnostic(problem.rule, str(problem), labels, problem.notes, problem.help)
        raise SpecError([found]) from problem


def _path(clause: Clause) -> str:
    construct: Any = clause.construct
    return str(construct.path)


def _at(
    clause: Clause, rule: str, message: str, help: str | None = None, field: str = "path"
) -> SpecError:
    return SpecError([Diagnostic(rule, message, _labels(clause, field), help=help)])


def _labels(clause: Clause, field: str) -> tuple[Label, ...]:
    span = clause.part_span(field)
    return (Label(span),) if span else ()
