"""Compile a spec for a model: to a Program that trains, or only to a Plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainc.compiler.bind.binding import Binding, bind
from trainc.compiler.bind.rule_selectors import frozen_by_rules
from trainc.compiler.bind.signals import measured_signals, signal_units
from trainc.compiler.catalog import catalog, path_of
from trainc.compiler.driver.adaptation import (
    adapted,
    require_one_start,
    started_model,
    unused_init,
)
from trainc.compiler.lower.assemble import assemble
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.lower.when_rules import when_rules
from trainc.compiler.method.loss import NoLoss
from trainc.compiler.method.losses import LossPart
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.copied_layers import release_copies
from trainc.compiler.model.factories import (
    DataFacts,
    build_data,
    build_model,
    data_facts,
    facts_of,
    missing_clause,
    unnumbered_samples,
)
from trainc.compiler.model.import_path import searching
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.plan.make_plan import make_plan
from trainc.compiler.plan.plan import Plan
from trainc.compiler.structure.wrappers import name_through, unwrapped
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.runtime.data.stream import is_stream
from trainc.runtime.rules.fields import Fields
from trainc.runtime.rules.switches import Frozen, Switches
from trainc.runtime.step.record import Signals

if TYPE_CHECKING:
    from trainc.compiler.execution.execution import Executor
    from trainc.compiler.program.program import Program
    from trainc.runtime.data.order import Data


Prepare = Callable[[Binding, nn.Module], None]


def compile(
    spec: str | Path | Spec,
    model: nn.Module | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    executor: Executor = "auto",
) -> Program:
    """Return the program of a spec on a model, ready to train.

    `spec` is a path, a text or a Spec; `model` the module to bind, in place. Without a model the spec's `model` clause
    builds one, with the seed of its `run`. `overrides` sets `let` values, `without` turns graph passes off by name,
    `executor` is `graph`, `module`, or `auto`: the graph where the spec changes or measures the forward pass.

    Raises SpecError with every mistake found, each with its place in the text, and ValueError for a pass in `without`
    that does not exist.
    """
    checked, path = resolve_spec(spec, overrides)
    with searching(path):
        built = started_model(checked) if model is None else model
        said = () if model is None else unused_init(checked)
        return compile_model(checked, built, data_facts(checked), without, executor, warnings=said)


def compile_model(
    spec: Spec,
    model: nn.Module,
    facts: DataFacts,
    without: Iterable[str] = (),
    executor: Executor = "auto",
    prepare: Prepare | None = None,
    warnings: Iterable[Diagnostic] = (),
) -> Program:
    """Return the program of a checked spec on a model, with what is known of the data.

    `prepare` may change the model once it is bound, before the clauses are lowered; `warnings` join those of the plan.
    """
    from trainc.compiler.passes.pipeline import check_names

    disabled = frozenset(without)
    check_names(disabled)
    own = unwrapped(model)
    name_through(own)
    release_copies(own)
    with adapted(spec, own) as base:
        binding = _with_warnings(bind(spec, build_inventory(own), facts, base), warnings)
        if prepare is not None:
            prepare(binding, own)
        program = build_program(binding, own, disabled, executor)
    if own is not model:
        program.forward = model
    return program


def compile_with_data(
    spec: Spec,
    model: nn.Module,
    without: Iterable[str] = (),
    executor: Executor = "auto",
    prepare: Prepare | None = None,
    replicas: int = 1,
) -> tuple[Program, Data]:
    """Return the program of a checked spec on a model, and the data that the spec names.

    Data that describes itself is loaded when nothing else is wrong; any other has to be counted first. `replicas` is
    how many processes divide it, each with steps of its own.
    """
    facts = data_facts(spec)
    data = None if facts.samples is not None else build_data(spec)
    known = replace(facts if data is None else facts_of(data), replicas=replicas)
    program = compile_model(spec, model, known, without, executor, prepare)
    data = build_data(spec) if data is None else data
    if program.id_readers and is_stream(data.train):
        raise unnumbered_samples(spec, program.id_readers)
    return program, data


def plan(
    spec: str | Path | Spec,
    model: nn.Module | None = None,
    *,
    overrides: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan of a spec for `model`, or for the spec's own model without weights; no data is read.

    Raises SpecError with every mistake found.
    """
    from trainc.compiler.model.meta_device import SkipInitialization, on_meta

    checked, path = resolve_spec(spec, overrides)
    said = () if model is None else unused_init(checked)
    with searching(path):
        if model is None:
            require_one_start(checked)
            with torch.device("meta"), SkipInitialization():
                model = build_model(checked)
        else:
            model = on_meta(unwrapped(model))
        with adapted(checked, model) as base:
            bound = bind(checked, build_inventory(model), data_facts(checked), base)
            binding = _with_warnings(bound, said)
            return make_plan(binding, _lower(binding, model, _first_signals(binding), to_run=False))


def _with_warnings(binding: Binding, warnings: Iterable[Diagnostic]) -> Binding:
    return replace(binding, warnings=(*binding.warnings, *warnings))


def resolve_spec(
    spec: str | Path | Spec, overrides: Mapping[str, str] | None = None
) -> tuple[Spec, Path | None]:
    """Return the checked Spec and the file it came from, None for a text or a Spec; raises SpecError."""
    if isinstance(spec, Spec):
        return spec, None
    from trainc.dsl.resolve.resolver import load_spec

    path = spec if isinstance(spec, Path) else path_of(spec)
    given = [f"{name}={value}" for name, value in (overrides or {}).items()]
    return load_spec(path or str(spec), catalog(), given).unwrap(), path


def _first_signals(binding: Binding) -> Signals:
    """Return the signals that are known before the first step."""
    data: Any = binding.one("data")
    return Signals(batch=float(data.construct.start_size) if data else math.nan, step=0.0)


def _lower(
    binding: Binding, model: nn.Module, signals: Signals, *, to_run: bool = True
) -> LoweredMethod:
    units = signal_units(binding.clauses)
    spec, inventory = binding.spec, binding.inventory
    run: Any = binding.one("run")
    context = LoweringContext(
        model,
        inventory,
        binding.units,
        binding.length,
        signals,
        units,
        Fields(spec.fields_set),
        Switches(spec.switched),
        Frozen(frozen_by_rules(spec, inventory)),
        spec.switched,
        run.construct.seed if run else 0,
    )
    method = assemble(binding.clauses, context, to_run=to_run)
    names = {
        "loss",
        "gradient_norm",
        "lr",
        *(name for c in binding.clauses for name, _ in measured_signals(c)),
    }
    method.actions += when_rules(binding, context, names, method.exchanges)
    return method


def build_program(
    binding: Binding,
    model: nn.Module,
    without: frozenset[str] = frozenset(),
    executor: Executor = "auto",
) -> Program:
    """Return the program of a binding on its model; without a loss or an optimizer these are the user's own."""
    from trainc.compiler.driver.run_settings import run_settings
    from trainc.compiler.program.program import Program

    signals = _first_signals(binding)
    method = _lower(binding, model, signals)
    if not method.loss_parts:
        method.loss_parts.append(LossPart(NoLoss.name, NoLoss()))
    data: Any = binding.one("data")
    batch = data.construct.start_size if data else 0
    micro = data.construct.micro_size if data else 0
    return Program(
        make_plan(binding, method),
        model,
        method,
        run_settings(binding),
        binding.length,
        signals,
        batch_size=batch,
        micro_size=micro,
        halves_micro=bool(data and data.construct.halves_micro),
        clock=binding.units.clock(),
        executor=executor,
        without=without,
    )


def require_clauses(spec: Spec, *kinds: str) -> None:
    """Raise SpecError where a spec has no clause of one of these kinds, which a loop of one's own can do without."""
    for kind in kinds:
        if not spec.of_kind(kind):
            raise missing_clause(f"the spec has no {kind}", _examples(kind))


def _examples(kind: str) -> str:
    """Return the advice to write a clause of a kind, with the examples of all its constructs."""
    usages = [f"`{construct.usage}`" for key, construct in catalog().items() if key[0] == kind]
    return f"write one, such as {' or '.join(usages)}"
