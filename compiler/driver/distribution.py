"""How `trainc run` divides a run over the processes that a launcher started, and the team that they are."""

from __future__ import annotations

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
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.processes.launch import Launch, find_launch, joined, lasting
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.processes.team import Ranks, Team
from trainc.runtime.processes.watch import Watch, follows_from_another


@dataclass(eq=False)
class Distribution:
    """The processes of one run, and the construct that joins them; one process is joined with none."""

    spec: Spec
    launch: Launch | None
    notes: list[str] = field(default_factory=list)
    """What to say of it when the run begins."""
    _model: nn.Module | None = field(default=None, init=False)

    @classmethod
    def of(cls, spec: Spec) -> Distribution:
        """Return that of this process's launch."""
        return cls(spec, find_launch())

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.launch is None else self.launch.size

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
            try:
                yield Ranks(ReplicaGroup(), watch, lasting(store))
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
        if self.size == 1:
            return
        joins = (clause for clause in binding.active if clause.construct.joins != "no")
        targets = next((clause.targets for clause in joins), ())
        modules = {name: model.get_submodule(name) for name in targets}
        self.joining.prepare(model, modules, device)

    def join(self, program: Program, device: torch.device) -> None:
        """Let the program train with the other processes; raises SpecError where its clauses have them train apart."""
        if self.size == 1:
            return
        if apart := program.execution.method.exchanges:
            raise self._error(
                f"`{apart[0]}` lets each process train on data of its own, and `trainc run` trains one model on one"
                " order of the data: remove the clause, or start the processes with a loop of your own",
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

    def _explained(self, error: RuntimeError) -> str | None:
        return None if self._model is None else self.joining.explain(error, self._model)

    def _error(self, message: str, label: str | None = None) -> SpecError:
        clauses = self.spec.clauses
        joins = (c for c in clauses if (c.name == label if label else c.construct.joins != "no"))
        clause = next(joins, None)
        at = labels((clause.span if clause else None, ""))
        return SpecError([Diagnostic("processes", message, at)])
