"""The loop of `trainc run`: batches in, metrics and checkpoints out, resumed bit for bit.

All that decides a step is the program's state, its clock and the seed: the order of the data and
the random numbers are functions of them, so a run that was stopped, killed or signalled goes on as
if nothing had happened, and leaves the same weights and the same `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from trainc.runtime.data.order import Data, Order
from trainc.runtime.data.reader import Reader
from trainc.runtime.run.interface import (
    LoadsCompatible,
    NonFiniteLoss,
    Report,
    Reporting,
    RunnableProgram,
)
from trainc.runtime.run.live_display import Display
from trainc.runtime.run.stop_signals import StopSignals
from trainc.runtime.run.summary import Summary, evaluate
from trainc.runtime.schedule.clock import Clock, Gate
from trainc.runtime.step.action import StopRun
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import Writer, read
from trainc.runtime.storage.random_streams import seed_step
from trainc.runtime.storage.run_folder import RunFolder


def train(
    program: RunnableProgram,
    data: Data,
    *,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    stop_requested: Callable[[], str | None] | None = None,
    texts: Mapping[str, str] | None = None,
    keep: int = 2,
    load_compatible: bool = False,
) -> Summary:
    """Train to the program's length and return how it went; `out` is the folder of the run.

    `stop_requested` returns `interrupted` or `terminated` when the run is to save and leave;
    without one, SIGINT and SIGTERM ask for it. `texts` are kept beside the run, by file name.
    `adopt`: the checkpoint is another spec's, take over what fits of it and say what does not.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out, resume=resume, overwrite=overwrite))
        if stop_requested is None:
            stop_requested = stack.enter_context(StopSignals()).requested
        run = Run(program, data, folder, display, stop_requested, keep)
        run.restore(load_compatible)
        folder.keep_texts(texts or {}, program.clock.steps)
        with run:
            return run.train()


class Run:
    """One run in one process."""

    def __init__(
        self,
        program: RunnableProgram,
        data: Data,
        folder: RunFolder,
        display: Display | None,
        stop_requested: Callable[[], str | None],
        keep: int,
    ) -> None:
        if program.length is None:
            raise ValueError("the program cannot be run: its run has no length")
        self.program = program
        self.length = program.length
        self.data = data
        self.folder = folder
        self.display = display
        self.stop_requested = stop_requested
        self.keep = keep
        self.reader = Reader(data, Order(program.settings.seed, len(data.train)))
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.evaluated = -1
        self.saved = -1
        self.path: Path | None = None
        self.seconds = 0.0
        self.rate = 0.0

    @property
    def clock(self) -> Clock:
        """Return the program's clock."""
        return self.program.clock

    def restore(self, load_compatible: bool = False) -> None:
        """Load the newest intact checkpoint, if there is one; with `adopt` what fits of it."""
        if not self.folder.resume:
            return
        found = checkpoint.latest(self.folder.checkpoints)
        for damage in found.damage:
            self.tell("damaged-checkpoint", f"passed over: {damage}")
        if found.path is None:
            if found.damage:
                raise checkpoint.DamagedCheckpoint(f"no checkpoint is intact: {found.damage[0]}")
            return
        state = checkpoint.load(found.path)
        told: list[str] = []
        if load_compatible and isinstance(self.program, LoadsCompatible):
            told = self.program.load_compatible(state["program"])
        else:
            self.program.load_state_dict(state["program"])
        self.clock.load_state_dict(state["clock"])
        self.loss, self.eval_loss = state["loss"], state["eval_loss"]
        self.saved, self.path = found.step, found.path
        self.tell("resumed", f"resumed from step {found.step}")
        for line in told:
            self.tell("note", line)

    def __enter__(self) -> Run:
        steps = self.clock.steps
        self.metrics = Writer(self.folder.metrics, steps)
        self.timing = Writer(self.folder.timing, steps)
        for record in read(self.folder.metrics):
            if "eval_loss" in record:
                self.evaluated = record["step"]
        self.folder.event("started", steps)
        if self.display:
            self.display.start(self.clock.read(self.length.unit))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if problem is not None:
            self.folder.event("failed", self.clock.steps, message=repr(problem))
        self.reader.close()
        self.metrics.close()
        self.timing.close()
        if self.display:
            self.display.stop()

    def train(self) -> Summary:
        """Run steps until the run ends, and return how it did."""
        # A signal may have come between a step and its evaluation.
        if self.saved == self.clock.steps and self.due(self.program.settings.evaluate_every):
            self.evaluate()
        while True:
            if self.length.done(self.clock):
                return self.end("finished", "the run has reached its length")
            if signal := self.stop_requested():
                return self.end(signal, f"{signal} by a signal")
            stop = self.step()
            if stop is not None:
                return self.end(*stop)

    def step(self) -> tuple[str, str] | None:
        """Run one step and what is due after it; return reason and message if the run ends."""
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
            stop = str(request.args[0]) if request.args else "a rule said so"
            metrics = request.args[1] if len(request.args) > 1 else {}
            if clock.steps == number:
                return "nan" if isinstance(request, NonFiniteLoss) else "stopped", stop
        if (clock.steps, clock.samples) != (number + 1, first + batch):
            raise RuntimeError(f"a step over {batch} samples left the clock at {clock}")
        end = time.perf_counter()
        if clock.before is not None and clock.seconds == clock.before.seconds:
            clock.seconds += end - begin
        if reader.prefetches:
            reader.ahead(clock.samples, program.batch_size, program.micro_size)
        report = program.report() if isinstance(program, Reporting) else Report()
        self.record(metrics, report, batch, read_at - begin, end - begin)
        for note in report.notes:
            self.tell("note", note)
        stop = stop if stop is not None else report.stop
        return self.follow(report, stop)

    def follow(self, report: Report, stop: str | None) -> tuple[str, str] | None:
        """Do what is due after a step; return reason and message if the run ends here."""
        settings, steps = self.program.settings, self.clock.steps
        if not self.sound:
            self.tell("non-finite-loss", f"the loss of step {steps} is {self.loss}")
            if settings.on_nan == "stop":
                return "nan", f"the loss of step {steps} is {self.loss}"
        if self.due(settings.evaluate_every):
            self.evaluate()
        if report.save or self.due(settings.checkpoint_every):
            self.save()
        return None if stop is None else ("stopped", stop)

    @property
    def sound(self) -> bool:
        """Say whether the loss was finite when it was last seen."""
        return self.loss is None or math.isfinite(self.loss)

    def due(self, gate: Gate | None) -> bool:
        """Say whether something is due now, after a step."""
        return gate is not None and self.clock.steps > 0 and gate.fires(self.clock)

    def record(
        self, metrics: Mapping[str, float], report: Report, batch: int, reading: float, total: float
    ) -> None:
        """Write the metrics and the times of a step, and show them."""
        clock = self.clock
        own: dict[str, float] = {"step": clock.steps, "samples": clock.samples}
        own |= {"tokens": clock.tokens, "epochs": clock.epochs, "batch": batch}
        timed = {name: value for name, value in metrics.items() if name.startswith("seconds")}
        plain = {name: value for name, value in metrics.items() if name not in timed}
        line: dict[str, Any] = {**own, **{k: v for k, v in plain.items() if k not in own}}
        if report.series:
            line["series"] = report.series
        self.metrics.write(line)
        self.loss = metrics.get("loss", self.loss)
        self.seconds += total
        speed = batch / max(total, 1e-9)
        self.rate = 0.9 * self.rate + 0.1 * speed if self.rate else speed
        times = {"step": clock.steps, "seconds": total, "data_seconds": reading}
        self.timing.write(
            {**times, "clock_seconds": clock.seconds, "samples_per_second": speed, **timed}
        )
        if self.display:
            unit = "tokens" if self.data.tokens_per_sample > 1 else "samples"
            speed = self.rate * self.data.tokens_per_sample
            position = clock.read(self.length.unit)
            shown = {"position": position, "batch": batch, f"{unit}_per_second": speed}
            self.display.update({**plain, **shown})

    def evaluate(self) -> None:
        """Measure the loss on the held-out samples, once at each step."""
        split, steps = self.data.evaluation, self.clock.steps
        if split is None or not len(split) or self.evaluated == steps:
            return
        # As before a step: whatever draws random numbers here draws the same after a resume.
        seed_step(self.program.settings.seed, steps, -1)
        means = evaluate(self.program, split)
        self.eval_loss, self.evaluated = means["eval_loss"], steps
        self.metrics.write({"step": steps, **means})
        if self.display:
            self.display.update({"eval_loss": self.eval_loss})
            self.display.note(f"step {steps}: evaluation loss {self.eval_loss:.4f}")

    def save(self) -> None:
        """Save a checkpoint, once at each step, unless a non-finite loss may have spoilt it."""
        steps = self.clock.steps
        if self.saved == steps:
            return
        if not self.sound and self.program.settings.on_nan != "skip":
            self.tell(
                "checkpoint-withheld", f"no checkpoint at step {steps}: the loss is {self.loss}"
            )
            return
        # The lines up to here must be on the disk before the checkpoint that stands for them.
        self.metrics.sync()
        self.timing.sync()
        state = {
            "program": self.program.state_dict(),
            "clock": self.clock.state_dict(),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
        }
        self.path = checkpoint.save(self.folder.checkpoints, steps, state, self.keep)
        self.saved = steps
        self.folder.event("saved", steps, checkpoint=self.path.name)

    def end(self, reason: str, message: str) -> Summary:
        """Evaluate and save where that belongs to the end, and return the summary."""
        if reason in ("finished", "stopped"):
            self.evaluate()
        self.save()
        if reason == "nan" and self.path:
            message += f"; the last checkpoint before it is {self.path.name}"
        measured = (self.seconds, self.loss, self.eval_loss, self.path.name if self.path else None)
        summary = Summary.of(self.program, reason, message, *measured)
        self.folder.write_summary(asdict(summary))
        self.folder.event(reason, self.clock.steps, message=message)
        return summary

    def tell(self, kind: str, text: str) -> None:
        """Put on record, and show, what happened."""
        self.folder.event(kind, self.clock.steps, message=text)
        if self.display:
            self.display.note(text)
