"""What a run continues from: the newest checkpoint that is intact, and what is said of it when a file fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainc.runtime.run.interface import (
    ChecksState,
    HoldsParts,
    LoadsCompatible,
    RequiresSavable,
    RunnableProgram,
)
from trainc.runtime.storage.checkpoint import (
    CheckpointState,
    DamagedCheckpoint,
    find_latest,
    load_checkpoint,
)
from trainc.runtime.storage.clock_form import check_clock
from trainc.runtime.storage.differences import Difference, check_differences
from trainc.runtime.storage.foreign_files import read_json
from trainc.runtime.storage.form import (
    AnyNumber,
    Anything,
    Count,
    Form,
    ListOf,
    Optional,
    Plain,
    Record,
    StateProblem,
    Text,
)
from trainc.runtime.storage.run_folder import RunFolder, RunFolderLost


def newest_checkpoint(folder: RunFolder, tell: Callable[[str, str], None]) -> Path:
    """Return the newest intact checkpoint of a run, and tell of newer ones that are damaged.

    Raises DamagedCheckpoint where none is intact.
    """
    found = find_latest(folder.checkpoints)
    for problem in found.damage:
        tell("damaged-checkpoint", problem)
    if found.path is None:
        raise DamagedCheckpoint(f"no checkpoint can be used: {', '.join(found.damage)}")
    return found.path


@contextmanager
def continuing(found: Path, program: RunnableProgram) -> Iterator[None]:
    """Raise DamagedCheckpoint where the block cannot load a checkpoint, or what it loads is not sound."""
    try:
        yield
    except StateProblem as error:
        raise DamagedCheckpoint(
            f"{found} cannot be continued: {error}. Remove it to resume from an older checkpoint"
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DamagedCheckpoint(
            f"{found} does not hold the state of a run of this version of trainc ({problem})"
        ) from error
    if isinstance(program, ChecksState) and (why := program.unsound_state()) is not None:
        raise DamagedCheckpoint(
            f"{found} cannot be continued: {why}. Remove it to resume from an older checkpoint"
        )


def read_run(
    found: Path, program: RunnableProgram, *, verified: bool = False, rank: int = 0
) -> CheckpointState:
    """Return the state in a checkpoint; raises StateProblem unless it is that of a run.

    Where processes hold parts of the program's tensors, each reads its own parts; of replicas it is that of `rank`.
    """
    shared = isinstance(program, HoldsParts) and program.is_sharded
    part_for = program.part_for if shared and isinstance(program, HoldsParts) else None
    state = load_checkpoint(found, part_for, verified=verified, rank=rank)
    data = {
        "train": Optional(Count()),
        "evaluation": Optional(Count()),
        "tokens_per_sample": Plain(),
    }
    entries: dict[str, Form] = {"program": Record(more=Anything()), "clock": Anything()}
    entries |= {"loss": Optional(AnyNumber()), "eval_loss": Optional(AnyNumber())}
    entries |= {"data": Record(data | {"fingerprint": Optional(Text())})}
    entries |= {"generators": Record(more=Anything())}
    computation = Record({"scaler": Anything(), "device": Optional(Text())})
    more = {"stopped": Optional(Text()), "stream": Anything(), "computation": computation}
    more |= {"left_out": Count(), "rollbacks": ListOf(Count()), "good": ListOf(Count())}
    Record(entries, more).check(state, "")
    check_clock(state["clock"], "clock")
    own = state["program"].get("clock", state["clock"])
    if own != state["clock"]:
        raise StateProblem("program/clock", f"the run's own clock, {state['clock']}", str(own))
    return state


def load_program(
    program: RunnableProgram,
    state: Mapping[str, Any],
    changes: Sequence[Difference],
    accept: bool,
) -> tuple[bool, list[str]]:
    """Load a program's state; return whether another spec or other data made it, and notes on what differs.

    `changes` are those of the data. Raises ChangedRun where there are any and `accept` is false, or cannot be accepted.
    """
    if isinstance(program, LoadsCompatible):
        changes = [*dict.fromkeys([*program.differences(state), *changes])]
    check_differences(changes, accept)
    notes = [
        f"{'safe' if change.effect == 'safe' else 'accepted'}: {change.text}" for change in changes
    ]
    accepted = any(change.effect != "safe" for change in changes)
    if accepted and isinstance(program, LoadsCompatible):
        return True, notes + program.load_compatible(state)
    program.load_state_dict(state)
    return accepted, notes


def unwritten_stop(folder: RunFolder, state: CheckpointState, step: int) -> str | None:
    """Return why the run had stopped at a checkpoint, if it was killed before it could say so.

    A run whose summary says that it stopped there goes on when it is resumed.
    """
    stop: str | None = state.get("stopped")
    if stop is None or not folder.has_summary:
        return stop
    summary = read_json(folder.summary)
    return None if (summary.get("reason"), summary.get("steps")) == ("stopped", step) else stop


def explain(error: Exception, folder: RunFolder) -> None:
    """Raise a better error where a file of the run failed, such as on a full disk: with what the run can resume from.

    Where the folder is gone it is RunFolderLost, whatever file missed it first. Any other error is left to the caller.
    """
    try:
        folder.check_present()
        name = error.filename if isinstance(error, OSError) and folder.holds_run else None
        if not isinstance(name, str | Path) or not Path(name).is_relative_to(folder.path):
            return
        found = find_latest(folder.checkpoints).path
    except RunFolderLost as lost:
        raise lost from error
    except OSError:  # the disk can be read no longer
        return
    last = "there is no checkpoint yet, so start the run again"
    if found is not None:
        last = f"the last good checkpoint is {found.name}, and `--resume` continues from it"
    assert isinstance(error, OSError)
    raise OSError(error.errno, f"{error.strerror}; {last}", str(name)) from error


def require_savable(program: object) -> None:
    """Raise ValueError where the state of a program holds what no checkpoint can."""
    if isinstance(program, RequiresSavable):
        program.require_savable()
