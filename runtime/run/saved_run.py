"""A run as it is on disk: continued from a checkpoint, and saved as one, by all of its processes together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    Decides,
    HoldsParts,
    RollsBack,
    RunnableProgram,
    TrainsApart,
)
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.preflight import Preflight
from trainc.runtime.run.recorder import FollowingRecorder, RunRecorder
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import RollBack
from trainc.runtime.storage.checkpoint import (
    CheckpointState,
    find_latest,
    prune_checkpoints,
    remove_later,
    replicas_in,
    save_checkpoint,
    save_replicas,
    save_shards,
)
from trainc.runtime.storage.differences import Difference, OtherReplicas
from trainc.runtime.storage.run_folder import RunFolder

ROLLBACK_LIMIT = 10
"""How often a run may go back to one step: it makes no progress."""


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
    evaluated_at: int = field(default=-1, init=False)
    left_out: int = field(default=0, init=False)
    """The samples that the run has read and does not count, because it went back from where they ended."""
    rollbacks: list[int] = field(default_factory=list, init=False)
    """The steps that the run went back to."""
    good: list[int] = field(default_factory=list, init=False)
    """The last two steps at which a checkpoint was due, where a rule may go back to one: no others, since those that an
    interruption saves are no function of the run."""
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
        part = Part(self.team.rank, self.team.size, apart=self.team.apart)
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
            state = self._read(found)
            self._continue(found, state, accept)

    def _read(self, found: Path) -> CheckpointState:
        """Return the state in a checkpoint: of this replica, where so many replicas wrote it, else that of rank 0."""
        own = self.team.apart and replicas_in(found) == self.team.size
        rank = self.team.rank if own else 0
        return read_run(found, self.program, verified=self.team.size > 1, rank=rank)

    def _continue(self, found: Path, state: CheckpointState, accept: bool) -> None:
        """Load the state of a checkpoint into program, clock and data."""
        changes = [*data_differences(state["data"], self.data_identity)]
        changes += generator_differences(state["generators"], self.reader.generators)
        changes += self._other_replicas(replicas_in(found))
        self.accepted, notes = load_program(self.program, state["program"], changes, accept)
        self.clock.load_state_dict(state["clock"])
        self.reader.load_state_dict(state)
        self.loss, self.eval_loss = state["loss"], state["eval_loss"]
        self.saved_at, self.checkpoint = self.clock.steps, found
        self.left_out, self.rollbacks = state.get("left_out", 0), list(state.get("rollbacks", ()))
        self.good = list(state.get("good", ()))
        self.stopped = self.team.decided(lambda: unwritten_stop(self.folder, state, self.saved_at))
        if self.accepted:
            self.folder.write_event("decided", self.clock.steps, numbers={}, anew=True)
        elif isinstance(self.program, Decides) and self.team.rank == 0:
            self.program.recall(self.folder.decided())
        self._event("resumed", f"resumed from step {self.clock.steps}", checkpoint=found.name)
        for note in (*notes, *self.computation.load_state_dict(state["computation"])):
            self._event("note", note)

    def _other_replicas(self, before: int) -> Iterator[Difference]:
        """Yield the difference between the numbers of replicas that train each on their own, then and now.

        Raises OtherReplicas where states of several would be left without one.
        """
        now = self.team.size if self.team.apart else 1
        if before == now:
            return
        text = (
            f"the checkpoint is of {_replicas(before)}, and the run goes on with {_replicas(now)}"
        )
        program = self.program
        still = isinstance(program, TrainsApart) and program.exchanges is not None
        if before > 1 and still:
            text += (
                f": start {before} processes, since each replica has weights and optimizer state of its own; a number"
                " of your choice can begin with the weights of rank 0"
            )
            raise OtherReplicas([Difference(text, "impossible")])
        elif before > 1:
            yield Difference(f"{text}: it goes on from the replica of rank 0")
        else:
            yield Difference(f"{text}: all of them begin with its state")

    def go_back(self, request: RollBack) -> tuple[str, str] | None:
        """Go on from the last intact checkpoint that was due before this step; return why the run ends, where it does.

        The data goes on where it is, so that the samples since then are left out; so do the seconds of the clock. What
        rules decided holds on. The checkpoint is saved again with that, for a run that is killed and resumed.
        """
        asked = str(request).partition(": in a loop")[0]
        clock, folder = self.clock, self.folder.checkpoints
        before, seconds = clock.steps, clock.seconds
        good = [step for step in self.good if step < before]
        self.team.at(f"going back from step {before}")
        found = self.team.decided(lambda: str(find_latest(folder, good).path or ""))
        if not found or not isinstance(self.program, RollsBack):
            text = f"{asked}, and none was due before step {before}"
            return (
                "stopped",
                f"{text}: let its condition be true later only, as `steps > 500 and ...`",
            )
        with continuing(Path(found), self.program):
            state = self._read(Path(found))
            target = int(state["clock"]["steps"])
            if self.rollbacks.count(target) >= ROLLBACK_LIMIT:
                return "stopped", f"{asked}, for the {ROLLBACK_LIMIT + 1}th time to step {target}"
            samples = clock.samples
            self.program.roll_back(state["program"])
        self.left_out += samples - clock.samples
        clock.seconds = seconds
        self.rollbacks.append(target)
        self.good = [step for step in good if step <= target]
        self.loss, self.eval_loss = state["loss"], state["eval_loss"]
        list(self.computation.load_state_dict(state["computation"]))
        last = self.team.decided(lambda: self.recorder.go_back(clock))
        self.evaluated_at = -1 if last is None else last["step"]
        if self.team.rank == 0:
            remove_later(folder, target)
        text = f"{asked}: from step {before} to step {target}; the next samples follow those of step {before}"
        self._event("rolled-back", text, checkpoint=Path(found).name)
        self.unsound, self.saved_at = None, -1
        self.save()
        return None

    def save(self, *, due: bool = False) -> None:
        """Save a checkpoint, once after each step, unless step, weights or optimizer state are not sound."""
        steps = self.clock.steps
        if self.saved_at == steps:
            return
        self.team.at(f"saving step {steps}")
        self.folder.check_present()
        unsound = self.unsound
        if unsound is None and isinstance(self.program, ChecksState):
            unsound = self.program.unsound_state()
        self.withheld = self.team.first(unsound)
        if self.withheld is not None:
            self._event("checkpoint-withheld", f"no checkpoint at step {steps}: {self.withheld}")
            return
        if due and isinstance(self.program, RollsBack) and self.program.rolls_back:
            self.good = [*(step for step in self.good if step != steps), steps][-2:]
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
        elif self.team.apart:
            state, rank = self._state(self.program.state_dict()), self.team.rank
            saved = save_replicas(folder, steps, state, rank, self.team.decided, self.team.each)
        else:
            if isinstance(self.program, ComparesReplicas):
                self.team.compare(self.program.agree)
            state = self._state(self.program.state_dict())
            saved = Path(self.team.decided(lambda: str(save_checkpoint(folder, steps, state))))
        if self.team.rank == 0:
            self.folder.write_event("saved", steps, checkpoint=saved.name)
            prune_checkpoints(folder, self.keep, steps, self.good)
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
            **({"left_out": self.left_out, "rollbacks": self.rollbacks} if self.rollbacks else {}),
            **({"good": self.good} if self.good else {}),
            "computation": self.computation.state_dict(),
        }

    def _event(self, event: str, text: str, **details: str) -> None:
        self.recorder.event(event, self.clock.steps, text, **details)


def _replicas(count: int) -> str:
    return "one model" if count == 1 else f"{count} replicas"
