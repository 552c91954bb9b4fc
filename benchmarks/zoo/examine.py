"""Three steps of one clause on one architecture: it works, with numbers that are checked, or it is refused by name."""

import json
import math
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import trainc
from benchmarks.zoo.architecture import Architecture
from benchmarks.zoo.checks import (
    Trained,
    Wrong,
    check_equal,
    check_finite,
    check_moves,
    check_signals,
    note_gradients,
    only_observes,
    optimizer_steps,
)
from benchmarks.zoo.clauses import BATCH
from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.driver.site_diagnostics import clause_diagnostic, loss_diagnostic
from trainc.compiler.driver.train import train
from trainc.compiler.errors import GraphRefused, SiteError
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.data.batch import WrongBatch, WrongOutput, compute_logits
from trainc.runtime.step.action import ClauseFailed, StopRun

STEPS = 3
LR, MOMENTUM = 0.02, 0.9
OTHERS = {
    "model": 'model "benchmarks.zoo.samples:model" {{ architecture = "{name}" }}',
    "data": 'data "benchmarks.zoo.samples:samples" {{ architecture = "{name}", batch = {batch} samples }}',
    "loss": "loss {loss}",
    "optimizer": f"optimizer sgd {{{{ lr = {LR}, momentum = {MOMENTUM} }}}}",
    "run": f"run {{{{ length = {STEPS} steps, seed = 3 }}}}",
}
"""What a spec needs besides the clause that is examined, by kind."""

Status = Literal["works", "refused", "wrong"]


@dataclass
class Outcome:
    """What a case did; `detail` says what was refused or is wrong, `notes` how it ran."""

    status: Status
    detail: str = ""
    notes: list[str] = field(default_factory=list)


def spec_text(architecture: Architecture, clause: str) -> str:
    """Return a spec with a clause, and what a program needs besides."""
    given = {"name": architecture.name, "loss": architecture.loss, "batch": BATCH}
    kind = clause.split()[0]
    others = [text.format(**given) for name, text in OTHERS.items() if name != kind]
    return "\n".join([*others, clause])


def examine(architecture: Architecture, clause: str, *, graph: bool = False) -> Outcome:
    """Train with a clause by the modules and by the graph, and check both.

    Without `graph` only clauses that change the forward pass, the loss or the optimizer run by it: for others it is the
    same graph.
    """
    return attempt(lambda: _examined(architecture, clause, graph))


def examine_without_effect(architecture: Architecture, clause: str) -> Outcome:
    """Compare a clause that declares that it does nothing with a loop of plain torch, bit for bit."""
    return attempt(lambda: _compared(architecture, clause))


def examine_run(architecture: Architecture) -> Outcome:
    """Plan without weights, train twice by spec alone, as `trainc run` does, and compare."""
    return attempt(lambda: _run(architecture))


def attempt(work: Callable[[], Outcome]) -> Outcome:
    """Return what some work found; a refusal, a wrong result or a crash, where it ended with one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except Wrong as wrong:
        return Outcome("wrong", str(wrong))
    except trainc.SpecError as error:
        return _refused(error)
    except SiteError as error:
        return Outcome("refused", f"{error.rule}: {error}")
    except (WrongBatch, WrongOutput, StopRun) as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return _crash(error)


def _refused(error: trainc.SpecError) -> Outcome:
    """Return a refusal; one that does not say where is wrong."""
    first = next(one for one in error.diagnostics if one.severity == "error")
    if first.span is None:
        return Outcome("wrong", f"{first.rule} without a place: {first.message}")
    place = first.span.text.splitlines()[0]
    advice = f" ({first.help})" if first.help else ""
    return Outcome("refused", f"{first.rule} at `{place}`: {first.message}{advice}")


def _crash(error: Exception) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
    reason = (str(error).strip() or "no message").splitlines()[0]
    return Outcome("wrong", f"{type(error).__name__}: {reason} ({places})")


def _examined(architecture: Architecture, text: str, by_graph: bool) -> Outcome:
    spec, _ = resolve_spec(spec_text(architecture, text))
    plan = _plan(spec, architecture)
    modules = _train(architecture, spec, "module")
    if modules.program.plan.hash != plan.hash:
        raise Wrong("the plan without weights differs from the program's plan")
    all_trained, notes = [modules], [f"warning: {w.rule}" for w in plan.warnings]
    clause = _clause(spec, text)
    if by_graph or modules.program.execution.method.rewrite or clause.kind in OTHERS:
        try:
            graph = _train(architecture, spec, "graph")
        except GraphRefused as error:
            notes.append(f"no graph: {str(error).splitlines()[0]}")
        else:
            all_trained.append(graph)
            check_equal(modules, graph, architecture.rounding)
            notes.append("graph and modules agree")
    for trained in all_trained:
        check_finite(trained)
        check_moves(trained)
        if not plan.warnings:
            check_signals(trained, clause)
    differs = not only_observes(clause) and clause.kind not in OTHERS and not plan.warnings
    if differs and _has_plain_loop(architecture):
        weights, losses = plain_loop(architecture)
        if losses == modules.losses and not _different(modules.program, weights):
            notes.append("the numbers of a plain loop")
    return Outcome("works", "", notes)


def _plan(spec: Spec, architecture: Architecture) -> trainc.compiler.plan.plan.Plan:
    """Return the plan on the meta device; what it refuses, the compiler must refuse alike."""
    try:
        return trainc.plan(spec, architecture.model())
    except trainc.SpecError as error:
        try:
            trainc.compile(spec, architecture.model())
        except trainc.SpecError as again:
            if str(again) != str(error):
                raise Wrong(f"plan and compile refuse differently: {error} / {again}") from None
            raise
        raise Wrong(f"compile takes what plan refuses: {error}") from None


def _clause(spec: Spec, text: str) -> Clause:
    """Return the clause that is examined."""
    return next(c for c in spec.clauses if c.kind == text.split()[0])


def _train(
    architecture: Architecture, spec: Spec, executor: Literal["auto", "graph", "module"]
) -> Trained:
    """Return the program of a spec after its steps and an evaluation."""
    model = architecture.model()
    program = trainc.compile(spec, model, executor=executor)
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    with_gradient: set[str] = set()
    for action in optimizer_steps(program):
        action.torch.register_step_pre_hook(note_gradients(action, with_gradient))
    shape, classes = logits_shape(architecture), program.loss_fn.of_classes
    metrics: list[dict[str, float]] = []
    notes: list[str] = []
    program.estimate_from(lambda: [architecture.batch(0, BATCH, classes, shape)])
    with located(program, spec):
        for seed in range(STEPS):
            torch.manual_seed(seed)
            metrics.append(program.step(architecture.batch(seed, BATCH, classes, shape)))
            notes += program.report().notes
        last = architecture.batch(STEPS, BATCH, classes, shape)
        total, count, _ = program.evaluate(*(last if isinstance(last, tuple) else (last,)))
    if not math.isfinite(total) or count <= 0:
        raise Wrong(f"the loss of an evaluation is {total} over {count} targets")
    measured = {name for name, value in program.signals.items() if not math.isnan(value)}
    measured |= {*program.evaluation_metrics(), *(name for one in metrics for name in one)}
    program.summary()
    return Trained(program, metrics, before, measured, with_gradient, notes)


@contextmanager
def located(program: Program, spec: Spec) -> Iterator[None]:
    """Raise errors of the losses with their places in the spec, as `trainc run` does."""
    try:
        yield
    except ClauseFailed as error:
        raise trainc.SpecError([clause_diagnostic(error, spec)]) from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if (
            isinstance(error, SiteError)
            or (found := loss_diagnostic(error, program.execution.losses, spec)) is None
        ):
            raise
        raise trainc.SpecError([found]) from error


@cache
def logits_shape(architecture: Architecture, examples: int = BATCH) -> tuple[int, ...]:
    """Return the shape of an architecture's logits for a batch; nothing where it computes its own loss."""
    if architecture.labels is not None:
        return ()
    inputs = architecture.inputs(torch.Generator().manual_seed(0), examples)
    with torch.no_grad():
        return tuple(compute_logits(architecture.model(), inputs).shape)


@cache
def plain_loop(architecture: Architecture) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses of a loop of plain torch with the zoo's loss and optimizer."""
    model = architecture.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    shape, classes = logits_shape(architecture), architecture.loss == "cross_entropy"
    losses = []
    for seed in range(STEPS):
        torch.manual_seed(seed)
        loss = _plain_loss(architecture, model, architecture.batch(seed, BATCH, classes, shape))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {n: t.detach().clone() for n, t in model.state_dict().items()}, losses


def _has_plain_loop(architecture: Architecture) -> bool:
    """Say whether the loop of plain torch knows the loss."""
    return architecture.labels is not None or architecture.loss in ("cross_entropy", "mse")


def _plain_loss(architecture: Architecture, model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch: the model's own, or that of its logits."""
    if architecture.labels is not None:
        found: Tensor = model(**batch).loss
        return found
    inputs, targets = batch
    logits = compute_logits(model, inputs)
    if architecture.loss == "cross_entropy":
        return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return functional.mse_loss(logits, targets)


def _different(program: Program, weights: dict[str, Tensor]) -> list[str]:
    """Return the names of weights that a program has not bit for bit."""
    own = program.module.state_dict()
    return [n for n, t in weights.items() if n not in own or not torch.equal(own[n], t)]


def _compared(architecture: Architecture, text: str) -> Outcome:
    spec, _ = resolve_spec(spec_text(architecture, text))
    trained = _train(architecture, spec, "auto")
    if not _has_plain_loop(architecture):
        check_finite(trained)
        return Outcome("works")
    weights, losses = plain_loop(architecture)
    if (different := _different(trained.program, weights)) or trained.losses != losses:
        raise Wrong(
            f"not the plain loop bit for bit: losses {trained.losses} and {losses}, other weights {different[:4]}"
        )
    return Outcome("works", "", ["the plain loop bit for bit"])


def _run(architecture: Architecture) -> Outcome:
    options = f"length = {STEPS} steps, seed = 3, eval = 1 steps, checkpoint = 2 steps"
    text = spec_text(architecture, f"run {{ {options} }}")
    plan, program = trainc.plan(text), trainc.compile(text)
    if plan.hash != program.plan.hash:
        raise Wrong("the plan without weights differs from the program's plan")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "again"):
            out = Path(folder, name)
            train(text, out, quiet=True)
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records.append([one for line in lines if "loss" in (one := json.loads(line))])
    losses, again = ([one["loss"] for one in record] for record in records)
    if losses != again or len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise Wrong(f"the losses of two equal runs are {losses} and {again}")
    return Outcome("works", "", ["two equal runs"])
