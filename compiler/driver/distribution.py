"""How `trainc run` divides a run over the processes that a launcher started, and the team that they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.report import labels
from trainc.compiler.catalog import catalog
from trainc.compiler.method.joining import Joining
from trainc.compiler.model.batch_statistics import depend_on_processes
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.order import Data
from trainc.runtime.data.stream import count_samples
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.processes.apart import Apart
from trainc.runtime.processes.launch import Launch, find_launch, joined, lasting
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.processes.team import Ranks, Team
from trainc.runtime.processes.torchft_connection import has_lighthouse
from trainc.runtime.processes.watch import Watch, follows_from_another
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.exchange import Exchange


@dataclass(eq=False)
class Distribution:
    """The processes of one run, and the construct that joins them; one process is joined with none."""

    spec: Spec
    launch: Launch | None
    notes: list[str] = field(default_factory=list)
    """What to say of it when the run begins."""
    _model: nn.Module | None = field(default=None, init=False)
    _units: UnitConversion = field(default_factory=UnitConversion, init=False)

    @classmethod
    def of(cls, spec: Spec) -> Distribution:
        """Return that of this process's launch."""
        return cls(spec, find_launch())

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.launch is None else self.launch.size

    @property
    def apart(self) -> Clause | None:
        """The clause by which each process trains a replica of its own; None where all train one model."""
        clauses = (c for c in self.spec.clauses if c.construct.joins == "apart")
        return next(clauses, None) if self.size > 1 else None

    @property
    def replicas(self) -> int:
        """How many processes have steps of their own."""
        return 1 if self.apart is None else self.size

    @property
    def joining(self) -> Joining:
        """The construct that joins the processes: the spec's, or else the one that does so by default."""
        own = (c.construct for c in self.spec.clauses if c.construct.joins != "no")
        default = (c for c in catalog().values() if c.joins == "by default")
        return cast(Joining, next(own, None) or next(default)())

    def placed(self, hardware: Hardware) -> Hardware:
        """Return the hardware of this process: the GPU of its number among those of its machine."""
        if self.launch is None or hardware.device.type != "cuda":
            return hardware
        number, found = self.launch.local_rank, torch.cuda.device_count()
        if number >= found:
            raise self._error(
                f"this machine has {found} GPUs, and this process is number {number} of it, counted from 0: start no"
                f" more than {found} processes with `--nproc-per-node`, or train on the CPU with `--device cpu`"
            )
        return replace(hardware, device=torch.device("cuda", number))

    @contextmanager
    def team(self, hardware: Hardware) -> Iterator[Team]:
        """Be one of the processes in this block."""
        if self.launch is None:
            yield Team()
            return
        seconds = self.joining.patience
        with joined(self.launch, hardware.device, seconds) as store:
            if self.size == 1:
                yield Team(lasting(store))
                return
            watch = Watch(store, self.launch.rank, self.size, seconds)
            watch.start()
            kind = Ranks if self.apart is None else Apart
            try:
                yield kind(ReplicaGroup(), watch, lasting(store))
            except BaseException as error:
                if isinstance(error, RuntimeError) and (why := self._explained(error)) is not None:
                    watch.fail()
                    raise self._error(why) from error
                if follows_from_another(error):
                    raise watch.other_failed() from error
                watch.fail()
                raise
            finally:
                watch.close()

    def prepare(self, binding: Binding, model: nn.Module, device: torch.device) -> None:
        """Let the construct change the model, before the clauses are lowered for it."""
        self._units = binding.units
        if self.size == 1 or self.apart is not None:
            return
        joins = (clause for clause in binding.active if clause.construct.joins != "no")
        targets = next((clause.targets for clause in joins), ())
        modules = {name: model.get_submodule(name) for name in targets}
        self.joining.prepare(model, modules, device)

    def join(self, program: Program, data: Data, device: torch.device) -> None:
        """Let the program train with the other processes; raises SpecError where its clauses do not have it so."""
        if (elastic := sorted(program.execution.method.elastic)) and (
            self.size > 1 or has_lighthouse()
        ):
            raise self._error(
                f"`{elastic[0]}` lets replicas leave and join, and `trainc run` divides its data over those that are"
                " started together: remove `membership`, or train in a loop of your own",
                elastic[0],
            )
        if self.size == 1:
            return
        if self.apart is not None:
            self._require_samples(program, data)
            self.notes += apart_notes(self.apart, self.size, program, self._units)
            return
        if apart := program.execution.method.exchanges:
            raise self._error(
                f"`{apart[0]}` lets each process train on data of its own, and does not say that `trainc run` divides"
                " the data for it (`joins`): remove the clause, or start the processes with a loop of your own",
                apart[0],
            )
        self._model, joining = program.module, self.joining
        wrapped = joining.wrap(program.module, device)
        if wrapped is not program.module:
            program.forward = wrapped
        said = program.execution.method.joined_by is not None
        self.notes.append(
            f"{self.size} processes train one model by `{joining.title}`"
            + ("" if said else ", as the spec has no `distribute` clause")
        )
        if differ := depend_on_processes(program.module):
            names = ", ".join(f"`{name}`" for name in [*differ][:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            self.notes.append(
                f"with another number of processes the numbers of this run are others: {names}{more}"
                f" {next(iter(differ.values()))}"
            )

    def _require_samples(self, program: Program, data: Data) -> None:
        """Raise SpecError where a step of all replicas would have some samples twice."""
        samples, batch = count_samples(data.train), program.batch_size
        if samples is not None and batch * self.size > samples:
            clause = self.spec.one("data")
            message = (
                f"{self.size} replicas with {batch} samples each take more in a step than the training data has,"
                f" {samples}: write at most `{samples // self.size} samples`, or start fewer processes"
            )
            at = labels((clause.part_span("batch") if clause else None, ""))
            raise SpecError([Diagnostic("processes", message, at)])

    def _explained(self, error: RuntimeError) -> str | None:
        return None if self._model is None else self.joining.explain(error, self._model)

    def _error(self, message: str, label: str | None = None) -> SpecError:
        clauses = self.spec.clauses
        joins = (c for c in clauses if (c.name == label if label else c.construct.joins != "no"))
        clause = next(joins, None)
        at = labels((clause.span if clause else None, ""))
        return SpecError([Diagnostic("processes", message, at)])


def apart_notes(clause: Clause, size: int, program: Program, units: UnitConversion) -> list[str]:
    """Return what to say of replicas that train apart when their run begins."""
    batch = program.batch_size
    text = (
        f"{size} processes train a replica each by `{clause.construct.title}`: {batch} samples a step each,"
        f" {size * batch} together; an epoch is one pass over the data by all of them. Shown, recorded and evaluated is"
        " the replica of rank 0"
    )
    found = [text]
    if (steps := _last_step(program.length, units)) is not None:
        last = Clock(steps, before=Clock(steps - 1))
        exchanges = (a for a in program.execution.method.actions if isinstance(a, Exchange))
        if any(a.gate is not None and not a.gate.fires(last) for a in exchanges):
            found.append(
                f"the last step, {steps}, has no turn of `{clause.name}`: the run ends with replicas that differ"
                " since the turn before, and its model is that of rank 0"
            )
    return found


def _last_step(length: RunLength | None, units: UnitConversion) -> int | None:
    """Return the number of the last step of a run; None where that shows only as it runs."""
    if length is None or (units.changing and length.unit != "steps"):
        return None
    try:
        return math.ceil(units.convert(length, "steps"))
    except ValueError:
        return None
