"""The tasks of a spec: its data callable takes `task = i`, and each is trained for a few steps from one start."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.bind.report import labels
from trainc.compiler.driver.adaptation import load_weights, started_model
from trainc.compiler.driver.compile import compile_with_data, require_clauses, resolve_spec
from trainc.compiler.driver.hardware import hardware_of, placed, require_hardware
from trainc.compiler.driver.site_diagnostics import explained
from trainc.compiler.driver.train import require_evaluations
from trainc.compiler.model.factories import build_data, missing_clause, seed_of
from trainc.compiler.model.import_path import searching
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.vocabulary import EVALUATED
from trainc.dsl.values.value_json import Name, walk
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.order import Data
from trainc.runtime.data.reader import make_reader
from trainc.runtime.data.stream import is_stream
from trainc.runtime.run.computation import Computation
from trainc.runtime.step.action import StopRun
from trainc.runtime.storage.random_streams import derive_seed, seeded

Weights = dict[str, Tensor]

TASK = "task"
"""The argument of the data callable."""


class Tasks:
    """Trains tasks one after the other by the spec's own optimizer and clauses, each from the first state of a program.

    Optimizer, clock and batch begin anew on each task, and so do samples that come in an order of their own.
    Raises SpecError for a spec whose data takes no `task`.
    """

    def __init__(
        self, spec: str | Path, overrides: dict[str, str] | None = None, seed: int | None = None
    ) -> None:
        self.spec, self.path = resolve_spec(spec, overrides)
        require_clauses(self.spec, "loss", "optimizer")
        run = self.spec.one("run")
        if run is None:
            raise missing_clause("the spec has no run", "write `run { length = 100 steps }`")
        self.seed = seed_of(self.spec) if seed is None else seed
        self._data_clause = _data_clause(self.spec)
        drawn = _of_seed(self.spec, run, self.seed)
        with self._searching():
            model = started_model(drawn)
            begun = getattr(run.construct, "start", None)
            if begun is not None:
                load_weights(model, Path(begun), self.spec)
            hardware = hardware_of(self.spec)
            model = placed(model, hardware, self.spec)
            self.program, first = compile_with_data(self._of_task(0, drawn), model)
            require_evaluations(self.spec, first)
            self.program.execution.autocast = hardware.autocast
            require_hardware(self.program, hardware, self.spec)
            self._hardware = hardware
        self._evaluates = reads_evaluations(self.spec)
        self._first = copy.deepcopy(self.program.state_dict())

    @contextmanager
    def _searching(self) -> Iterator[None]:
        with searching(self.path):
            yield

    def start(self) -> Weights:
        """Return the weights and buffers that the program begins with, by name."""
        return _copied(self._first_weights())

    def _first_weights(self) -> Weights:
        self.program.load_state_dict(copy.deepcopy(self._first))
        return dict(self.program.module.state_dict())

    @contextmanager
    def _task(self, task: int) -> Iterator[None]:
        """Turn errors of a task into ones that name it, at the clause that explains them where one does."""
        try:
            with explained(self.program.execution.losses, self.spec):
                yield
        except SpecError as error:
            raise SpecError([_in_task(task, one) for one in error.diagnostics]) from error
        except StopRun as stop:
            step = self.program.clock.steps
            raise ValueError(f"task {task} ends at step {step}: {stop}") from stop
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"task {task}: {error}") from error

    def train(self, task: int, start: Weights, steps: int) -> tuple[Weights, float, float]:
        """Return where some steps on a task lead from a start, and the losses of the first and of the last step."""
        with self._task(task):
            return self._train(task, start, steps)

    def _train(self, task: int, start: Weights, steps: int) -> tuple[Weights, float, float]:
        program, data = self.program, self._load(task)
        self._first_weights()
        program.module.load_state_dict(start)
        reader = make_reader(data, derive_seed(self.seed, "task", task))
        computation = Computation(program, self._hardware)
        losses, at = [], 0
        with closing(reader):
            for step in range(steps):
                with seeded(derive_seed(self.seed, "step", task, step)), self._hardware.products():
                    begun = perf_counter()
                    program.begin()  # rules and policies set the batch
                    size = program.batch_size
                    batches = reader.read(at, size, program.micro_size)
                    losses.append(computation.step(batches, reader, at)["loss"])
                    if program.clock.before is not None:
                        program.clock.seconds += perf_counter() - begun
                    self._evaluate(computation, data)
                at += size
        return _copied(dict(program.module.state_dict())), losses[0], losses[-1]

    def _evaluate(self, computation: Computation, data: Data) -> None:
        """Evaluate where a rule reads what evaluations measure, and the last step or the spec asks for one."""
        program, gate = self.program, self.program.settings.evaluate_every
        due = gate is not None and gate.fires(program.clock)
        if self._evaluates and (due or program.report().evaluate):
            means, _ = computation.evaluate(data, whole=True)
            program.measured(means)

    def value(self, task: int) -> float:
        """Return the mean loss on the held-out samples of the task that was trained last.

        Where it has none, it is that on the samples that train. Of samples in an order of their own, which may have no
        end, it is on the first `eval_batches` batches.
        """
        total, count = 0.0, 0.0
        with self._task(task):
            data = self._load(task)
            samples = data.train if data.evaluation is None else data.evaluation
            batches = self.program.settings.evaluation_batches if is_stream(samples) else 0
            for read in read_in_order(samples, batches, self.program.micro_size, self.seed, 0):
                loss, counted, _ = self.program.evaluate(*self._hardware.place(read.batch))
                total, count = total + loss, count + counted
        return total / count if count else float("nan")

    def _load(self, task: int) -> Data:
        with self._searching():
            return build_data(self._of_task(task))

    def _of_task(self, task: int, spec: Spec | None = None) -> Spec:
        """Return the spec, or one with the same data clause, with the data of a task."""
        old = self._data_clause
        construct: Any = old.construct
        arguments = {**construct.arguments, TASK: task}
        new = construct.model_copy(update={"arguments": arguments})
        return _replaced(spec or self.spec, old, new)


def reads_evaluations(spec: Spec) -> bool:
    """Say whether a rule reads what evaluations measure."""
    values = (value for rule in spec.rules for _, value in rule.expressions())
    names = (x for value in values for x in walk(value) if isinstance(x, Name))
    return any(name.id.startswith(EVALUATED) for name in names)


def _of_seed(spec: Spec, run: Clause, seed: int) -> Spec:
    """Return the spec with another seed, from which its model, adapters and noise are drawn."""
    construct: Any = run.construct
    return _replaced(spec, run, construct.model_copy(update={"seed": seed}))


def _replaced(spec: Spec, old: Clause, new: Any) -> Spec:
    """Return a spec with another construct in one of its clauses."""
    clauses = tuple(_with(one, new) if one is old else one for one in spec.clauses)
    return Spec(clauses, spec.rules)


def _with(clause: Clause, construct: Any) -> Clause:
    return Clause(
        construct,
        clause.on,
        clause.start,
        clause.stop,
        clause.every,
        clause.optional,
        clause.label,
        origin=clause.origin,
    )


def _data_clause(spec: Spec) -> Clause:
    clause = spec.one("data")
    if clause is None:
        raise missing_clause(
            "the spec has no `data` clause", 'write `data "module:callable" { batch = 10 samples }`'
        )
    construct: Any = clause.construct
    if not hasattr(construct, "arguments"):
        raise _at(
            clause,
            "head",
            'tasks need `data "module:callable" { ... }`, whose callable takes `task`',
        )
    return clause


def _at(clause: Clause, field: str, message: str) -> SpecError:
    at = labels((clause.part_span(field) or clause.span, ""))
    return SpecError([Diagnostic("data-failed", message, at)])


def _in_task(task: int, found: Diagnostic) -> Diagnostic:
    """Return a diagnostic with a note that says in which task it was found."""
    notes = (*found.notes, f"in task {task}, whose data is that of `{TASK} = {task}`")
    parts = (found.help, found.severity, found.edit, found.explanation)
    return Diagnostic(found.rule, found.message, found.labels, notes, *parts)


def _copied(weights: Weights) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}


@torch.no_grad()
def moved(start: Weights, end: Weights, fraction: float) -> Weights:
    """Return start + fraction (end - start); what is no floating-point number is that of the end."""
    return {
        name: torch.lerp(tensor, end[name], fraction) if tensor.is_floating_point() else end[name]
        for name, tensor in start.items()
    }
