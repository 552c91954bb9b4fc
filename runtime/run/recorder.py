"""Record a run: metrics, times and events in its folder, and figures on the display."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from trainc.runtime.device.hardware import Hardware
from trainc.runtime.report.number_text import format_loss
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loggers import KeptGoing, LoggedRun, NamedLogger
from trainc.runtime.run.preflight import Preflight
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import Unit
from trainc.runtime.storage.jsonl import JsonlWriter, Record, damaged_records, read_jsonl
from trainc.runtime.storage.run_folder import RunFolder


@dataclass(eq=False)
class RunRecorder:
    """Writes `metrics.jsonl`, `timing.jsonl` and `events.jsonl` into an entered folder, and feeds the display."""

    folder: RunFolder
    display: LiveDisplay | None
    unit: Unit
    """The unit of the run's length."""
    tokens_per_sample: int
    preflight: Preflight | None = None
    """What says how much the run takes, before and after the first step."""
    seconds: float = field(default=0.0, init=False)
    """The time of this process's steps."""
    _samples_per_second: float = field(default=0.0, init=False)
    _logger: KeptGoing | None = field(default=None, init=False)
    _opened: ExitStack = field(default_factory=ExitStack, init=False)

    def open(self, clock: Clock) -> Record | None:
        """Open the files, cut after the step that the run is at, start the display, and return the last evaluation."""
        self._open_records(clock.steps)
        self._opened.callback(lambda: self.timing.close())
        self._opened.callback(lambda: self.metrics.close())
        self.folder.write_event("started", clock.steps)
        if self.display:
            self._opened.callback(self.display.stop)
            self.display.start(clock.read(self.unit))
        copies = damaged_records(self.metrics.copy, self.timing.copy)
        for event, text in (*self.folder.entered, *copies):
            self.event(event, clock.steps, text)
        records = read_jsonl(self.folder.metrics)
        known = len({record["step"] for record in records if "samples" in record})
        if known < clock.steps:
            text = f"metrics.jsonl has {known} of the {clock.steps} steps up to here: the others were removed from it"
            self.event("missing-records", clock.steps, text)
        return next((record for record in reversed(records) if "eval_loss" in record), None)

    def _open_records(self, step: int) -> None:
        # Times first: where they cannot be written, no line of what was measured is cut.
        self.timing = JsonlWriter(self.folder.timing, step)
        try:
            self.metrics = JsonlWriter(self.folder.metrics, step)
        except BaseException:
            self.timing.close()
            raise

    def go_back(self, clock: Clock) -> Record | None:
        """Leave out the records after the step that the run went back to, and return the last evaluation."""
        self.timing.close()
        self.metrics.close()
        self._open_records(clock.steps)
        records = read_jsonl(self.folder.metrics)
        return next((record for record in reversed(records) if "eval_loss" in record), None)

    def log_to(self, logger: NamedLogger | None, clock: Clock) -> None:
        """From now on pass what is measured on to a logger, whose failures are events."""
        if logger is not None:
            run = LoggedRun(self.folder.path, clock.steps, logger.config)
            self._logger = KeptGoing(
                logger, run, lambda text: self.event("logger", clock.steps, text)
            )

    def tell_hardware(self, hardware: Hardware | None, step: int) -> None:
        """Say what the run trains on, where that is known, and what the run takes."""
        if hardware is not None:
            self.event("hardware", step, f"trains on {hardware}")
        for text in () if self.preflight is None else self.preflight.lines():
            self.event("preflight", step, text)

    def close(self) -> None:
        """Close the files and stop the display."""
        if self._logger is not None:
            self._logger.finish()
        self._opened.close()

    def sync(self) -> None:
        """Force all records to the disk."""
        self.metrics.sync()
        self.timing.sync()
        self.folder.sync_events()

    def step(
        self,
        clock: Clock,
        metrics: Mapping[str, float],
        series: Mapping[str, Mapping[str, float]],
        batch: int,
        reading: float,
        total: float,
    ) -> None:
        """Record a step of `batch` samples that took `total` seconds, `reading` of them for its data.

        Raises DoesNotFit where it is the first of this process, and the next ones do not fit into memory.
        """
        measured = None if self.preflight is None else self.preflight.measured(clock, total)
        if measured is not None:
            self.event("preflight", clock.steps, measured)
        own: dict[str, float] = {"step": clock.steps, "samples": clock.samples}
        own |= {"tokens": clock.tokens, "epochs": clock.epochs, "batch": batch}
        timed = {name: value for name, value in metrics.items() if name.startswith("seconds")}
        plain = {name: value for name, value in metrics.items() if name not in timed}
        line: dict[str, Any] = {**own, **{k: v for k, v in plain.items() if k not in own}}
        if series:
            line["series"] = series
        self.metrics.write(line)
        self.seconds += total
        speed = batch / max(total, 1e-9)
        average = self._samples_per_second
        self._samples_per_second = 0.9 * average + 0.1 * speed if average else speed
        times = {"step": clock.steps, "seconds": total, "data_seconds": reading}
        times |= {"clock_seconds": clock.seconds, "samples_per_second": speed}
        self.timing.write({**times, **timed})
        if self._logger is not None:
            shown = {n: v for n, v in line.items() if n not in ("step", "series")}
            self._logger.log({**shown, "samples_per_second": speed}, clock.steps)
        if self.display:
            unit = "tokens" if self.tokens_per_sample > 1 else "samples"
            speed = self._samples_per_second * self.tokens_per_sample
            shown = {"position": clock.read(self.unit), "batch": batch, f"{unit}_per_second": speed}
            self.display.update({**plain, **shown})

    def evaluation(self, step: int, means: Mapping[str, float], others: str | None = None) -> None:
        """Record the means of an evaluation after a step; `others` names weights in place of the trained ones."""
        self.metrics.write({"step": step, **means})
        if self._logger is not None:
            self._logger.log(means, step)
        if self.display:
            self.display.update(means)
            used = "" if others is None else f", of the weights of `{others}`"
            loss = format_loss(means["eval_loss"])
            self.display.note(f"step {step}: evaluation loss {loss}{used}")

    def event(self, event: str, step: int, text: str, **details: Any) -> None:
        """Record an event and show its text."""
        self.folder.write_event(event, step, message=text, **details)
        if self.display:
            self.display.note(text)


class FollowingRecorder(RunRecorder):
    """Records nothing: rank 0 does."""

    def open(self, clock: Clock) -> Record | None:
        return None

    def go_back(self, clock: Clock) -> Record | None:
        return None

    def log_to(self, logger: NamedLogger | None, clock: Clock) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def step(
        self,
        clock: Clock,
        metrics: Mapping[str, float],
        series: Mapping[str, Mapping[str, float]],
        batch: int,
        reading: float,
        total: float,
    ) -> None:
        self.seconds += total

    def evaluation(self, step: int, means: Mapping[str, float], others: str | None = None) -> None:
        """Do nothing."""

    def event(self, event: str, step: int, text: str, **details: Any) -> None:
        """Do nothing."""
