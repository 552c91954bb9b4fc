"""The training loop of `trainc run`: batches in, metrics and checkpoints out, resumed bit for bit.

A step is a function of the program's state, its clock and the seed: the order of the data and the
random numbers follow from them. So a run that was stopped, killed or signalled continues to the same
weights and the same `metrics.jsonl` as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from trainc.runtime.data.generators import kept
from trainc.runtime.data.stream import count_samples
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.processes.apart import Apart, Met
from trainc.runtime.processes.team import Team
from trainc.runtime.run.continuation import explain, require_savable
from trainc.runtime.run.interface import (
    ChecksState,
    MeasuresEvaluations,
    ReadsEvaluations,
    ReportsSteps,
    RunnableProgram,
    StepReport,
    TrainsApart,
    UnsoundStep,
)
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loggers import NamedLogger
from trainc.runtime.run.meetings import Meetings
from trainc.runtime.run.preflight import Preflight
from trainc.runtime.run.saved_run import SavedRun
from trainc.runtime.run.stop_signals import StopSignals
from trainc.runtime.run.summary import Summary
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.soundness.sound import name_unsound, unsound_step
from trainc.runtime.sources.adapt import as_data
from trainc.runtime.step.action import RollBack, StopRun
from trainc.runtime.storage.checkpoint import prune_checkpoints
from trainc.runtime.storage.random_streams import seed_step
from trainc.runtime.storage.run_folder import FollowedFolder, RunFolder


def train(
    program: RunnableProgram,
    data: object,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    display: LiveDisplay | None = None,
    stop_requested: Callable[[], str | None] | None = None,
    texts: Mapping[str, str] | None = None,
    keep: int = 2,
    accept: bool = False,
    hardware: Hardware | None = None,
    logger: NamedLogger | None = None,
    preflight: Preflight | None = None,
    team: Team | None = None,
    notes: Sequence[tuple[str, str]] = (),
) -> Summary:
    """Train to the program's length and return the summary; `out` is the folder of the run.

    `data` may be what `as_data` makes data of: data sets, loaders, pairs of them. `preflight` says what the run takes.
    `stop_requested` returns `interrupted` or `terminated` where the run is to save and end; without
    one, SIGINT and SIGTERM ask for it. `texts` are kept in the folder, by file name.
    `accept`: where another spec or other data made the checkpoint, load the parts of it that still hold.
    `logger` gets what is measured as well.
    `hardware` is where the model is and how it computes; without it batches stay where the data puts them.
    `team` are the processes of the run, all of which call this alike; without it this one is alone. One that a
    launcher started again goes on from the newest checkpoint. `notes` are kinds of events and texts to begin with.
    Raises RunExists, NoCheckpoint, DamagedCheckpoint, ChangedRun, RunFolderLost, and ValueError where the program has
    no length.
    """
    with contextlib.ExitStack() as stack:
        if stop_requested is None:
            stop_requested = stack.enter_context(StopSignals()).requested
        team = team or Team()
        if team.decided(partial(team.claimed, out)):
            resume, overwrite = team.decided(lambda: RunFolder(out).has_checkpoint), False
        kind = RunFolder if team.rank == 0 else FollowedFolder
        folder = kind(out, resume=resume, overwrite=overwrite)
        try:
            stack.enter_context(folder)
            team.decided(lambda: team.claim(out))
            options = display, keep, hardware, preflight, team
            loop = TrainingLoop(program, as_data(data), folder, *options)
            loop.asks_for_stops(stop_requested)
            team.watched(stop_requested, loop.ended)
            loop.restore(accept)
            with loop:
                loop.begin(texts or {}, notes)
                loop.recorder.log_to(logger, loop.clock)
                return loop.train()
        except Exception as error:
            explain(error, folder)
            raise


@dataclass(eq=False)
class TrainingLoop(SavedRun):
    """One run in this process, which may be one of several."""

    stop_requested: Callable[[], str | None] = lambda: None
    _began: bool = field(default=False, init=False)
    _meetings: Meetings | None = field(default=None, init=False)
    """Where each process trains a replica of its own."""

    def asks_for_stops(self, stop_requested: Callable[[], str | None]) -> None:
        """Ask by this function whether to stop, between steps, and in those of replicas."""
        self.stop_requested = stop_requested
        if isinstance(self.team, Apart) and isinstance(self.program, TrainsApart):
            self._meetings = Meetings(self.team, stop_requested)
            self.program.meet_with(self._meetings.meet)

    def begin(self, texts: Mapping[str, str], notes: Sequence[tuple[str, str]] = ()) -> None:
        """Open the records at the step that the run is at, tell notes, and keep the texts that it is started with."""
        if (last := self.team.decided(lambda: self.recorder.open(self.clock))) is not None:
            self.evaluated_at, self.eval_loss = last["step"], last["eval_loss"]
        self.recorder.tell_hardware(self.hardware, self.clock.steps)
        for event, note in notes:
            self._event(event, note)
        if self.accepted:
            # From here on the run is that of the new spec, whatever happens before the next save.
            self.saved_at = -1
            self.save()
        elif self.checkpoint is not None and self.team.rank == 0:
            prune_checkpoints(self.folder.checkpoints, self.keep, self.saved_at, self.good)
        if self.checkpoint is None:
            for note in getattr(self.data, "notes", ()):
                self._event("note", note)
        self.folder.keep_texts(texts, self.clock.steps)

    def __enter__(self) -> TrainingLoop:
        return self

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        self.reader.close()
        if problem is None:
            self.recorder.close()
            return
        with contextlib.suppress(OSError):  # the disk may be full, and the problem says so
            self.folder.write_event("failed", self.clock.steps, message=repr(problem))
        with contextlib.suppress(OSError):
            self.recorder.close()

    def ended(self, message: str) -> None:
        """Write why the process is ended from outside of the loop."""
        if message:
            self.folder.write_event("failed", self.clock.steps, message=message)
        self.recorder.close()

    def train(self) -> Summary:
        """Run steps until the run ends, and return its summary."""
        # A signal may have come between a step and its evaluation.
        if self.saved_at == self.clock.steps and self.due(self.program.settings.evaluate_every):
            self.evaluate()
        if self.stopped is not None:
            return self.end("stopped", self.stopped)
        while True:
            if self.length.done(self.clock):
                return self.end("finished", "the run has reached its length")
            if request := self.team.requested(self.stop_requested):
                return self.end(request, f"{request} by a signal")
            stop = self.step()
            if stop is not None:
                return self.end(*stop)

    def step(self) -> tuple[str, str] | None:
        """Run one step and what is due after the step; return reason and message if the run ends."""
        self.folder.check_present()
        clock, program, reader = self.clock, self.program, self.reader
        number, seed = clock.steps, program.settings.seed
        begun, first = clock.samples, clock.samples + self.left_out
        self.team.at(f"reading the data of step {number + 1}")
        begin = read_at = time.perf_counter()
        batch = 0
        stop: str | None = None
        meetings = self._meetings
        if meetings is not None:
            meetings.begin()
        try:
            seed_step(seed, number, 0)
            program.begin()
            batch = program.batch_size
            batches = reader.read(first, batch, program.micro_size)
            read_at = time.perf_counter()
            self.team.at(f"running step {number + 1}")
            seed_step(seed, number, 1, self.team.rank)
            with self._noticing_draws():
                metrics = self.computation.step(batches, reader, first)
        except StopRun as asked:
            self._tell(asked.notes)
            request = asked if meetings is None else meetings.ending(asked)
            if isinstance(request, RollBack):
                return self.go_back(request)
            stop = str(request.args[0]) if request.args else "stopped by a `when` rule"
            metrics = request.args[1] if len(request.args) > 1 else {}
            if clock.steps == number:
                return "nan" if isinstance(request, UnsoundStep) else "stopped", stop
        if (clock.steps, clock.samples) != (number + 1, begun + batch):
            raise RuntimeError(
                f"the program ran a step of {batch} samples and left the clock at {clock}:"
                f" expected {number + 1} steps and {begun + batch} samples"
            )
        self.team.at(f"waiting for the others after step {number + 1}")
        took = self.team.after_step(self.stop_requested, time.perf_counter() - begin)
        if clock.before is not None and clock.seconds == clock.before.seconds:
            clock.seconds += took
        if reader.prefetches:
            reader.ahead(clock.samples + self.left_out, program.batch_size, program.micro_size)
        report = program.report() if isinstance(program, ReportsSteps) else StepReport()
        if meetings is not None and meetings.met is not None:
            report, metrics = self._with_others(report, metrics, meetings.met)
        self.loss = metrics.get("loss", self.loss)
        self.recorder.step(clock, metrics, report.series, batch, read_at - begin, took)
        self._tell(report.notes)
        if report.decided:
            self.folder.write_event("decided", clock.steps, numbers=report.decided)
        if (why := self._ends_unsound(report, metrics)) is not None:
            return "nan", why
        return self.finish_step(report, stop if stop is not None else report.stop)

    def _ends_unsound(self, report: StepReport, metrics: Mapping[str, float]) -> str | None:
        """Tell of a step that is not sound, or was skipped; return why the run ends at it, where it does."""
        steps, loss = self.clock.steps, metrics.get("loss", 0.0)
        why = report.unsound or unsound_step(loss, metrics.get("gradient_norm", 0.0))
        skipped = bool(metrics.get("skipped"))
        self.unsound = None if skipped else why
        if why is not None:
            self._event(name_unsound(loss), f"{why} at step {steps}{': skipped' * skipped}")
            if not skipped and self.program.settings.on_nan == "stop":
                return f"{why} at step {steps}"
        elif skipped:
            self._event("skipped-step", f"skipped step {steps}: a gradient overflowed")
        return None

    def _with_others(
        self, report: StepReport, metrics: dict[str, float], met: Met
    ) -> tuple[StepReport, dict[str, float]]:
        """Return what a step gave, with what other replicas had in it."""
        others = [rank for rank in met.skipping if rank != self.team.rank]
        notes = [f"rank {rank} skips step {self.clock.steps}" for rank in others]
        joined = replace(report, save=report.save or met.saves, notes=(*report.notes, *notes))
        losses = {"mean_loss": met.loss, "min_loss": met.lowest, "max_loss": met.highest}
        return joined, metrics | losses

    def _tell(self, notes: Sequence[str]) -> None:
        for note in notes:
            self._event("note", note)

    @contextlib.contextmanager
    def _noticing_draws(self) -> Iterator[None]:
        """Tell, in the first step of several processes, that the model draws torch's random numbers."""
        if self.team.size == 1 or self.team.apart or self._began:
            yield
            return
        self._began, before = True, torch.get_rng_state()
        yield
        if not torch.equal(before, torch.get_rng_state()):
            text = (
                "the model draws torch's random numbers, in each process others: with another number of processes the"
                " numbers of this run are others"
            )
            self._event("processes", text)

    def finish_step(self, report: StepReport, stop: str | None) -> tuple[str, str] | None:
        """Evaluate and save if that is due; return reason and message if the run ends."""
        settings, self.stopped = self.program.settings, stop
        if self.clock.steps == 1:  # not hours later, when the first checkpoint is due
            require_savable(self.program)
        if report.evaluate or self.due(settings.evaluate_every):
            self.evaluate()
        if report.save or self.due(settings.checkpoint_every):
            self.save(due=True)
        return None if stop is None else ("stopped", stop)

    def due(self, gate: Gate | None) -> bool:
        """Return whether a gate fires now, between two steps."""
        return gate is not None and self.clock.steps > 0 and gate.fires(self.clock)

    @property
    def _evaluates_all(self) -> bool:
        """Whether this process must evaluate all batches, also where it is one of several."""
        program, drawn = self.program, bool(self.reader.generators)
        return (
            drawn
            or self.team.apart
            or (isinstance(program, MeasuresEvaluations) and bool(program.evaluation_readers))
        )

    def evaluate(self) -> None:
        """Measure the loss on the held-out samples, once after each step."""
        split, steps = self.data.evaluation, self.clock.steps
        if split is None or count_samples(split) == 0 or self.evaluated_at == steps:
            return
        # A run of another length evaluates elsewhere, and must draw the same for its steps.
        with kept(self.reader.generators):
            means, others = self.computation.evaluate(self.data, whole=self._evaluates_all)
        own, means = means["eval_loss"], self.team.of_first(means)
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if isinstance(self.program, ReadsEvaluations):
            self.program.measured(means)
        if isinstance(self.program, MeasuresEvaluations):
            means |= self.program.evaluation_metrics()
        if isinstance(self.team, Apart):
            names = ("mean_eval_loss", "min_eval_loss", "max_eval_loss")
            means |= zip(names, self.team.spread(own), strict=True)
        self.eval_loss, self.evaluated_at = means["eval_loss"], steps
        self.recorder.evaluation(steps, means, others)
        if bad:
            text = f"the evaluation after step {steps} is not finite: {bad[0]} is {means[bad[0]]}"
            self._event("non-finite-evaluation", text)

    def end(self, reason: str, message: str) -> Summary:
        """Evaluate and save at the end of a run, and return the summary."""
        if reason in ("finished", "stopped"):
            self.evaluate()
        self.save()
        name = self.checkpoint.name if self.checkpoint else None
        if self.withheld is not None and reason in ("finished", "stopped"):
            reason, message = "nan", f"{message}, but {self.withheld}: it is not saved"
        if reason == "nan" and name:
            message += f"; the last checkpoint before that is {name}"
        clock, lines = self.clock, self.computation.summary()
        counted = (clock.steps, clock.samples, clock.tokens, clock.epochs, self.recorder.seconds)
        skipped = self.program.unsound_steps if isinstance(self.program, ChecksState) else 0
        if isinstance(self.team, Apart):
            skipped = round(self.team.group.total(skipped))
        summary = Summary(
            reason, message, *counted, self.loss, self.eval_loss, name, lines, skipped
        )
        self.team.decided(partial(self._conclude, summary))  # the others end after rank 0 wrote it
        return summary

    def _conclude(self, summary: Summary) -> None:
        self.folder.write_summary(asdict(summary))
        self.folder.write_event(summary.reason, summary.steps, message=summary.message)
        self.recorder.sync()
        self.folder.check_present()
