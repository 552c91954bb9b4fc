"""Loggers: who else gets the metrics of a run, beside its folder. None of their libraries is required."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Gets what each step and each evaluation measured: anything with these two methods is one."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics after a step, by name; those of an evaluation come after those of its step."""

    def finish(self) -> None:
        """Take no more."""


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """What a logger is told of a run when it is opened: its folder, the step it is at, and the spec."""

    folder: Path
    step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name to show, that of the folder."""
        return self.folder.resolve().name

    def project(self, variable: str) -> str:
        """Return the project, from an environment variable where it is set."""
        return os.environ.get(variable) or "trainc"

    def identity(self) -> str:
        """Return an id of this run that it keeps when it is resumed, from a file in its folder."""
        path = self.folder / "logger.id"
        if not (self.step and path.is_file()):
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return path.read_text(encoding="utf-8")


OpenLogger = Callable[[LoggedRun], Logger]


class TensorBoard:
    """Event files in the run's folder, `tensorboard/`; steps after the one that a resumed run is at are dropped."""

    def __init__(self, run: LoggedRun) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases: project `WANDB_PROJECT`, or `trainc`; a resumed run continues its own."""

    def __init__(self, run: LoggedRun) -> None:
        self._run = import_module("wandb").init(
            project=run.project("WANDB_PROJECT"),
            name=run.name,
            id=run.identity(),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: project `TRACKIO_PROJECT`, or `trainc`; its name has an id, by which it is continued."""

    def __init__(self, run: LoggedRun) -> None:
        self._run = import_module("trackio").init(
            project=run.project("TRACKIO_PROJECT"),
            name=f"{run.name}-{run.identity()}",
            resume="allow",
            config=dict(run.config),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


LOGGERS: dict[str, OpenLogger] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class MissingLibrary(ValueError):
    """The library of a logger is not installed."""


@dataclass(frozen=True, slots=True)
class NamedLogger:
    """A logger that a run is to have: its name, what opens it, and what it is told of the spec."""

    name: str
    open: OpenLogger
    config: Mapping[str, Any] = field(default_factory=dict)


def find_logger(name: str) -> OpenLogger:
    """Return what opens a logger by name; raises ValueError for another name, and without its library."""
    if name not in LOGGERS:
        raise ValueError(f"there is no logger `{name}`: there are {', '.join(LOGGERS)}")
    found = find_spec(name)
    if (
        found is None or found.origin is None
    ):  # a folder of this name, as wandb leaves one, is no package
        raise MissingLibrary(
            f"the logger `{name}` needs the package {name}, which is not installed: run `pip install {name}`"
        )
    return LOGGERS[name]


class KeptGoing:
    """A logger whose failures end no run: the first is told, and it is tried again after 1, 2, 4, ... records.

    One that cannot be opened is not tried again.
    """

    def __init__(self, logger: NamedLogger, run: LoggedRun, tell: Callable[[str], None]) -> None:
        self._name, self._tell, self._told = logger.name, tell, False
        self._left_out = self._waiting = self._failures = 0
        self._logger: Logger | None = None
        try:
            self._logger = logger.open(run)
        except Exception as error:
            self._fail("could not be opened", error)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Pass the metrics on, unless the logger failed shortly before."""
        if self._logger is None:
            return
        if self._waiting:
            self._waiting -= 1
            self._left_out += 1
            return
        try:
            self._logger.log(metrics, step)
        except Exception as error:
            self._failures += 1
            self._waiting = 2 ** min(self._failures - 1, 10)
            self._left_out += 1
            self._fail(f"failed at step {step}", error)
        else:
            self._failures = 0

    def finish(self) -> None:
        """End the logger, and tell what it did not get."""
        if self._logger is None:
            return
        try:
            self._logger.finish()
        except Exception as error:
            self._fail("could not be ended", error)
        if self._left_out:
            self._tell(f"the logger `{self._name}` did not get {self._left_out} of the records")

    def _fail(self, what: str, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._tell(
                f"the logger `{self._name}` {what}, and the run goes on without it; metrics.jsonl has all:"
                f" {type(error).__name__}: {error}"
            )
