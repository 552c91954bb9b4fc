"""The training loop of `trainc run`: batches in, metrics and checkpoints out, resumed bit for bit.

A step is a function of the program's state, its clock and the seed: the order of the data and the
random numbers follow from them. So a run that was stopped, killed or signalled continues to the same
weights and the same `metrics.jsonl` as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainc.runtime.data.order import Data, Order
from trainc.runtime.data.reader import Reader
from trainc.runtime.run.interface import (
    LoadsCompatible,
    NonFiniteLoss,
    ReportsSteps,
    RunnableProgram,
    StepReport,
)
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.recorder import RunRecorder
from trainc.runtime.run.stop_signals import StopSignals
from trainc.runtime.run.summary import Summary, evaluate
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import StopRun
from trainc.runtime.storage.checkpoint import (
    DamagedCheckpoint,
    find_latest,
    load_checkpoint,
    save_checkpoint,
)
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.random_streams import seed_step
from trainc.runtime.storage.run_folder import RunFolder


def train(
    program: RunnableProgram,
    data: Data,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    display: LiveDisplay | None = None,
    stop_requested: Callable[[], str | None] | None = None,
    texts: Mapping[str, str] | None = None,
    keep: int = 2,
    load_compatible: bool = False,
) -> Summary:
    """Train to the program's length and return the summary; `out` is the folder of the run.

    `stop_requested` returns `interrupted` or `terminated` where the run is to save and end; without
    one, SIGINT and SIGTERM ask for it. `texts` are kept in the folder, by file name.
    `load_compatible`: the checkpoint is of another spec; load the parts of it that still hold.
    Raises RunExists, DamagedCheckpoint, and ValueError where the program has no length.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, resume=resume, overwrite=overwrite))
        if stop_requested is None:
            stop_requested = stack.enter_context(StopSignals()).requested
        loop = TrainingLoop(program, data, folder, display, stop_requested, keep)
        loop.restore(load_compatible)
        folder.keep_texts(texts or {}, program.clock.steps)
        with loop:
            return loop.train()


@dataclass(eq=False)
class TrainingLoop:
    """One run in one process."""

    program: RunnableProgram
    data: Data
    folder: RunFolder
    display: LiveDisplay | None
    stop_requested: Callable[[], str | None]
    keep: int
    loss: float | None = field(default=None, init=False)
    eval_loss: float | None = field(default=None, init=False)
    evaluated_at: int = field(default=-1, init=False)
    saved_at: int = field(default=-1, init=False)
    checkpoint: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.program.length is None:
            raise ValueError(
                "this program has no length: add `length` to the `run` clause of its spec"
            )
        self.length, tokens = self.program.length, self.data.tokens_per_sample
        self.recorder = RunRecorder(self.folder, self.display, self.length.unit, tokens)
        self.reader = Reader(self.data, Order(self.program.settings.seed, len(self.data.train)))

    @property
    def clock(self) -> Clock:
        """Return the program's clock."""
        return self.program.clock

    def restore(self, load_compatible: bool = False) -> None:
        """Load the newest intact checkpoint, if there is one; `load_compatible`: the parts of it that still hold.

        Raises DamagedCheckpoint where there are checkpoints and none is intact.
        """
        if not self.folder.resume:
            return
        found = find_latest(self.folder.checkpoints)
        for damage in found.damage:
            self._event("damaged-checkpoint", f"skipped a checkpoint: {damage}")
        if found.path is None:
            if found.damage:
                raise DamagedCheckpoint(f"no checkpoint can be used: {found.damage[0]}")
            return
        state = load_checkpoint(found.path)
        notes: list[str] = []
        if load_compatible and isinstance(self.program, LoadsCompatible):
            notes = self.program.load_compatible(state["program"])
        else:
            self.program.load_state_dict(state["program"])
        self.clock.load_state_dict(state["clock"])
        self.loss, self.eval_loss = state["loss"], state["eval_loss"]
        self.saved_at, self.checkpoint = found.step, found.path
        self._event("resumed", f"resumed from step {found.step}")
        for note in notes:
            self._event("note", note)

    def __enter__(self) -> TrainingLoop:
        self.recorder.open(self.clock)
        for record in read_jsonl(self.folder.metrics):
            if "eval_loss" in record:
                self.evaluated_at = record["step"]
        return self

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        if problem is not None:
            self.folder.write_event("failed", self.clock.steps, message=repr(problem))
        self.reader.close()
        self.recorder.close()

    def train(self) -> Summary:
        """Run steps until the run ends, and return its summary."""
        # A signal may have come between a step and its evaluation.
        if self.saved_at == self.clock.steps and self.due(self.program.settings.evaluate_every):
            self.evaluate()
        while True:
            if self.length.done(self.clock):
                return self.end("finished", "the run has reached its length")
            if request := self.stop_requested():
                return self.end(request, f"{request} by a signal")
            stop = self.step()
            if stop is not None:
                return self.end(*stop)

    def step(self) -> tuple[str, str] | None:
        """Run one step and what is due after the step; return reason and message if the run ends."""
        clock, program, reader = self.clock, self.program, self.reader
        first, number, seed = clock.samples, clock.steps, program.settings.seed
        begin = read_at = time.perf_counter()
        batch = 0
        stop: str | None = None
        try:
            seed_step(seed, number, 0)
            program.begin()
            batch = program.batch_size
            batches = reader.read(first, batch, program.micro_size)
            read_at = time.perf_counter()
            seed_step(seed, number, 1)
            metrics = program.step(batches)
        except StopRun as request:
            stop = str(request.args[0]) if request.args else "stopped by a `when` rule"
            metrics = request.args[1] if len(request.args) > 1 else {}
            if clock.steps == number:
                return "nan" if isinstance(request, NonFiniteLoss) else "stopped", stop
        if (clock.steps, clock.samples) != (number + 1, first + batch):
            raise RuntimeError(
                f"the program ran a step of {batch} samples and left the clock at {clock}:"
                f" expected {number + 1} steps and {first + batch} samples"
            )
        end = time.perf_counter()
        if clock.before is not None and clock.seconds == clock.before.seconds:
            clock.seconds += end - begin
        if reader.prefetches:
            reader.ahead(clock.samples, program.batch_size, program.micro_size)
        report = program.report() if isinstance(program, ReportsSteps) else StepReport()
        self.loss = metrics.get("loss", self.loss)
        self.recorder.step(clock, metrics, report.series, batch, read_at - begin, end - begin)
        for note in report.notes:
            self._event("note", note)
        return self.finish_step(report, stop if stop is not None else report.stop)

    def finish_step(self, report: StepReport, stop: str | None) -> tuple[str, str] | None:
        """Evaluate and save if that is due; return reason and message if the run ends."""
        settings, steps = self.program.settings, self.clock.steps
        if not self.loss_is_finite:
            message = f"the loss of step {steps} is {self.loss}"
            self._event("non-finite-loss", message)
            if settings.on_nan == "stop":
                return "nan", message
        if self.due(settings.evaluate_every):
            self.evaluate()
        if report.save or self.due(settings.checkpoint_every):
            self.save()
        return None if stop is None else ("stopped", stop)

    @property
    def loss_is_finite(self) -> bool:
        """Return whether the last loss was finite; true before the first."""
        return self.loss is None or math.isfinite(self.loss)

    def due(self, gate: Gate | None) -> bool:
        """Return whether a gate fires now, between two steps."""
        return gate is not None and self.clock.steps > 0 and gate.fires(self.clock)

    def evaluate(self) -> None:
        """Measure the loss on the held-out samples, once after each step."""
        split, steps = self.data.evaluation, self.clock.steps
        if split is None or not len(split) or self.evaluated_at == steps:
            return
        # As before a step, so that random numbers are the same after a resume.
        seed_step(self.program.settings.seed, steps, -1)
        means = evaluate(self.program, split)
        self.eval_loss, self.evaluated_at = means["eval_loss"], steps
        self.recorder.evaluation(steps, means)

    def save(self) -> None:
        """Save a checkpoint, once after each step, unless a non-finite loss may have damaged the weights."""
        steps = self.clock.steps
        if self.saved_at == steps:
            return
        if not self.loss_is_finite and self.program.settings.on_nan != "skip":
            message = f"no checkpoint at step {steps}: the loss is {self.loss}"
            self._event("checkpoint-withheld", message)
            return
        # The records up to here must be on the disk before the checkpoint.
        self.recorder.sync()
        state = {
            "program": self.program.state_dict(),
            "clock": self.clock.state_dict(),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
        }
        self.checkpoint = save_checkpoint(self.folder.checkpoints, steps, state, self.keep)
        self.saved_at = steps
        self.folder.write_event("saved", steps, checkpoint=self.checkpoint.name)

    def end(self, reason: str, message: str) -> Summary:
        """Evaluate and save at the end of a run, and return the summary."""
        if reason in ("finished", "stopped"):
            self.evaluate()
        self.save()
        name = self.checkpoint.name if self.checkpoint else None
        if reason == "nan" and name:
            message += f"; the last checkpoint before that is {name}"
        clock, lines = self.clock, self.program.summary()
        counted = (clock.steps, clock.samples, clock.tokens, clock.epochs, self.recorder.seconds)
        summary = Summary(reason, message, *counted, self.loss, self.eval_loss, name, lines)
        self.folder.write_summary(asdict(summary))
        self.folder.write_event(reason, clock.steps, message=message)
        return summary

    def _event(self, event: str, text: str) -> None:
        self.recorder.event(event, self.clock.steps, text)
