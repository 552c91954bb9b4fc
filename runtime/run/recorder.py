"""Record a run: metrics, times and events in its folder, and figures on the display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import Unit
from trainc.runtime.storage.jsonl import JsonlWriter
from trainc.runtime.storage.run_folder import RunFolder


@dataclass(eq=False)
class RunRecorder:
    """Writes `metrics.jsonl`, `timing.jsonl` and `events.jsonl` into an entered folder, and feeds the display."""

    folder: RunFolder
    display: LiveDisplay | None
    unit: Unit
    """The unit of the run's length."""
    tokens_per_sample: int
    seconds: float = field(default=0.0, init=False)
    """The time of this process's steps."""
    _samples_per_second: float = field(default=0.0, init=False)

    def open(self, clock: Clock) -> None:
        """Open the files, cut after the step that the run is at, and start the display."""
        self.metrics = JsonlWriter(self.folder.metrics, clock.steps)
        self.timing = JsonlWriter(self.folder.timing, clock.steps)
        self.folder.write_event("started", clock.steps)
        if self.display:
            self.display.start(clock.read(self.unit))

    def close(self) -> None:
        """Close the files and stop the display."""
        self.metrics.close()
        self.timing.close()
        if self.display:
            self.display.stop()

    def sync(self) -> None:
        """Force all records to the disk."""
        self.metrics.sync()
        self.timing.sync()

    def step(
        self,
        clock: Clock,
        metrics: Mapping[str, float],
        series: Mapping[str, Mapping[str, float]],
        batch: int,
        reading: float,
        total: float,
    ) -> None:
        """Record a step of `batch` samples that took `total` seconds, `reading` of them for its data."""
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
        if self.display:
            unit = "tokens" if self.tokens_per_sample > 1 else "samples"
            speed = self._samples_per_second * self.tokens_per_sample
            shown = {"position": clock.read(self.unit), "batch": batch, f"{unit}_per_second": speed}
            self.display.update({**plain, **shown})

    def evaluation(self, step: int, means: Mapping[str, float]) -> None:
        """Record the means of an evaluation after a step."""
        self.metrics.write({"step": step, **means})
        if self.display:
            self.display.update({"eval_loss": means["eval_loss"]})
            self.display.note(f"step {step}: evaluation loss {means['eval_loss']:.4f}")

    def event(self, event: str, step: int, text: str) -> None:
        """Record an event and show its text."""
        self.folder.write_event(event, step, message=text)
        if self.display:
            self.display.note(text)
