"""A run as it is on disk: continued from a checkpoint, and saved as one, by all of its processes together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainc.runtime.data.generators import generator_differences
from trainc.runtime.data.identity import data_differences, data_identity
from trainc.runtime.data.order import Data
from trainc.runtime.data.parts import Part
from trainc.runtime.data.reader import make_reader
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.processes.team import Team
from trainc.runtime.run.computation import Computation
from trainc.runtime.run.continuation import (
    continuing,
    load_program,
    newest_checkpoint,
    read_run,
    unwritten_stop,
)
from trainc.runtime.run.interface import (
    ChecksState,
    ComparesReplicas,
    HoldsParts,
    RunnableProgram,
)
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.preflight import Preflight
from trainc.runtime.run.recorder import FollowingRecorder, RunRecorder
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.storage.checkpoint import (
    CheckpointState,
    prune_checkpoints,
    save_checkpoint,
    save_shards,
)
from trainc.runtime.storage.run_folder import RunFolder


@dataclass(eq=False)
class SavedRun:
    """The state of a run in this process, and how it is saved and continued. Rank 0 alone writes."""

    program: RunnableProgram
    data: Data
    folder: RunFolder
    display: LiveDisplay | None
    keep: int
    hardware: Hardware | None = None
    preflight: Preflight | None = None
    team: Team = field(default_factory=Team)
    loss: float | None = field(default=None, init=False)
    eval_loss: float | None = field(default=None, init=False)
    saved_at: int = field(default=-1, init=False)
    checkpoint: Path | None = field(default=None, init=False)
    accepted: bool = field(default=False, init=False)
    """Whether the run continues another one: under another spec, or on other data."""
    unsound: str | None = field(default=None, init=False)
    """What was not finite in the last step, if it was not skipped."""
    stopped: str | None = field(default=None, init=False)
    """Why the run ends after the step that it is at, if it was stopped there."""
    withheld: str | None = field(default=None, init=False)
    """Why the last checkpoint that was due was not saved."""

    def __post_init__(self) -> None:
        if self.program.length is None:
            raise ValueError("this program has no length: write `length` in the spec's `run`")
        self.length, tokens = self.program.length, self.data.tokens_per_sample
        recorder = RunRecorder if self.team.rank == 0 else FollowingRecorder
        unit, preflight = self.length.unit, self.preflight
        self.recorder = recorder(self.folder, self.display, unit, tokens, preflight)
        self.data_identity = data_identity(self.data)
        self.computation = Computation(self.program, self.hardware, self.team)
        part = Part(self.team.rank, self.team.size)
        self.reader = make_reader(self.data, self.program.settings.seed, part)

    @property
    def clock(self) -> Clock:
        """Return the program's clock."""
        return self.program.clock

    def restore(self, accept: bool = False) -> None:
        """Continue from the newest intact checkpoint of a run that is resumed.

        Raises DamagedCheckpoint where none is intact, and ChangedRun where it was made by something else and `accept`
        is false, or cannot be accepted.
        """
        if not self.folder.resume:
            return
        self.team.at("looking for a checkpoint")
        found = Path(self.team.decided(lambda: str(newest_checkpoint(self.folder, self._event))))
        self.team.at("loading a checkpoint")
        with continuing(found, self.program):
            # All read it, and rank 0 has just compared its checksums.
            state = read_run(found, self.program, verified=self.team.size > 1)
            self._continue(found, state, accept)

    def _continue(self, found: Path, state: CheckpointState, accept: bool) -> None:
        """Load the state of a checkpoint into program, clock and data."""
        changes = [*data_differences(state["data"], self.data_identity)]
        changes += generator_differences(state["generators"], self.reader.generators)
        self.accepted, notes = load_program(self.program, state["program"], changes, accept)
        self.clock.load_state_dict(state["clock"])
        self.reader.load_state_dict(state)
        self.loss, self.eval_loss = state["loss"], state["eval_loss"]
        self.saved_at, self.checkpoint = self.clock.steps, found
        self.stopped = self.team.decided(lambda: unwritten_stop(self.folder, state, self.saved_at))
        self._event("resumed", f"resumed from step {self.clock.steps}", checkpoint=found.name)
        for note in (*notes, *self.computation.load_state_dict(state["computation"])):
            self._event("note", note)

    def save(self) -> None:
        """Save a checkpoint, once after each step, unless step, weights or optimizer state are not sound."""
        steps = self.clock.steps
        if self.saved_at == steps:
            return
        self.team.at(f"saving step {steps}")
        self.folder.check_present()
        self.withheld = self.unsound
        if self.withheld is None and isinstance(self.program, ChecksState):
            self.withheld = self.team.first(self.program.unsound_state())
        if self.withheld is not None:
            self._event("checkpoint-withheld", f"no checkpoint at step {steps}: {self.withheld}")
            return
        # The records up to here must be on the disk before the checkpoint.
        self.recorder.sync()
        self.checkpoint = self._saved()
        self.saved_at = steps
        self.team.at(f"going on after step {steps}")

    def _saved(self) -> Path:
        """Write a checkpoint, remove old ones, and return its path."""
        folder, steps = self.folder.checkpoints, self.clock.steps
        if isinstance(self.program, HoldsParts) and self.program.is_sharded:
            state = self._state(self.program.own_state_dict())
            saved = save_shards(folder, steps, state, self.team.decided)
        else:
            if isinstance(self.program, ComparesReplicas):
                self.team.compare(self.program.agree)
            state = self._state(self.program.state_dict())
            saved = Path(self.team.decided(lambda: str(save_checkpoint(folder, steps, state))))
        if self.team.rank == 0:
            self.folder.write_event("saved", steps, checkpoint=saved.name)
            prune_checkpoints(folder, self.keep, steps)
        return saved

    def _state(self, program: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "program": program,
            "clock": self.clock.state_dict(),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "stopped": self.stopped,
            "data": self.data_identity,
            **self.reader.state_dict(),
            "computation": self.computation.state_dict(),
        }

    def _event(self, event: str, text: str, **details: str) -> None:
        self.recorder.event(event, self.clock.steps, text, **details)
