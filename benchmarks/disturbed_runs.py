"""Processes of `trainc run` to which something happens: a signal, a kill at a file operation, a failing operation.

A process is forked from one that has imported trainc and torch, so that a hundred of them do not take an hour.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.file_operations import Fault, FileOperations
from trainc.cli import failures
from trainc.cli.app import main
from trainc.kernels.library import atomic
from trainc.runtime.run.recorder import RunRecorder
from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

HISTORY = {"started", "started-again", "resumed", "failed", "interrupted", "terminated"}
"""Events that say how often a run was started, and why it ended before its end."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code or minus the signal, what it printed, its steps, its operations by name."""

    code: int
    output: str
    steps: int
    operations: tuple[str, ...]
    hit: str | None


@dataclass(frozen=True)
class Signal:
    """A signal that is sent `seconds` after the process has made this many steps."""

    number: int
    steps: int
    seconds: float


def run(
    spec: Path,
    out: Path,
    options: Sequence[str] = (),
    fault: Fault | None = None,
    sent: Signal | None = None,
    largest_file: int | None = None,
) -> Ended:
    """Run `trainc run` in a process of its own; no file of it gets larger than `largest_file` bytes."""
    log, notes = out.with_suffix(".log"), out.with_suffix(".notes")
    notes.unlink(missing_ok=True)
    marks, mark = os.pipe()
    process = os.fork()
    if not process:
        os.close(marks)
        arguments = ["trainc", "run", str(spec), "--out", str(out), "--plain", *options]
        _become(arguments, log, mark, FileOperations(out, fault or Fault()), notes, largest_file)
    os.close(mark)
    steps = 0
    if sent is not None:
        while steps < sent.steps and (more := len(os.read(marks, 1))):
            steps += more
        time.sleep(sent.seconds)
        os.kill(process, sent.number)
    while more := len(os.read(marks, 4096)):
        steps += more
    os.close(marks)
    _, status = os.waitpid(process, 0)
    said = json.loads(notes.read_text()) if notes.exists() else {}
    return Ended(
        os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), steps,
        tuple(said.get("operations", ())), said.get("hit"),
    )  # fmt: skip


def _become(
    arguments: list[str],
    log: Path,
    mark: int,
    operations: FileOperations,
    notes: Path,
    largest_file: int | None,
) -> None:
    """Be the command line in this process, and end it."""
    code: object = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = arguments
        _hide_this_folder()
        torch.set_num_threads(1)
        _mark_steps(mark)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        with operations.installed():
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        hit = operations.fault.hit
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        told = {
            "hit": hit and f"{hit.name} {hit.path}",
            "operations": [one.name for one in operations.seen],
            "modules": [*sys.modules],
        }
        atomic.write_text(notes, json.dumps(told))
        os._exit(code if isinstance(code, int) else 1)


def _hide_this_folder() -> None:
    """Let errors that come through these files look as the system's own, not as those of a user's code."""
    users = failures._is_users
    here = str(Path(__file__).parent)
    failures._is_users = lambda trace: (
        not trace.tb_frame.f_code.co_filename.startswith(here) and users(trace)
    )


def _mark_steps(mark: int) -> None:
    """Write a byte for each step, before what follows a step: an evaluation, a checkpoint."""
    record = RunRecorder.step

    def marked(*given: Any, **named: Any) -> None:
        os.write(mark, b".")
        record(*given, **named)

    RunRecorder.step = marked  # type: ignore[method-assign]


def resumable(out: Path) -> tuple[str, ...]:
    """Return the option with which the run in a folder goes on; none where it starts from the beginning."""
    return ("--resume",) if find_latest(out / "checkpoints").path is not None else ()


def undisturbed(spec: Path, out: Path) -> Ended:
    """Run without a disturbance, and import what that imported; raises RuntimeError where it fails."""
    ended = run(spec, out)
    if ended.code != 0:
        raise RuntimeError(f"{spec} ended with {ended.code}: {ended.output}")
    for name in json.loads(out.with_suffix(".notes").read_text())["modules"]:
        with suppress(Exception):  # such as modules that are made while they run
            import_module(name)
    return ended


def finish(spec: Path, out: Path) -> Ended:
    """Go on with a run until its end."""
    return run(spec, out, resumable(out))


def differences(whole: Path, out: Path) -> list[str]:
    """Return what of a run is not as in the undisturbed one: records, state, events, figures of the summary, files."""
    found = []
    if (out / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl differs")
    found += [f"{name} differs" for name in _state_differences(_state(whole), _state(out), "")]
    lost, more = _story(whole) - _story(out), _story(out) - _story(whole)
    found += [f"event lost: {event}" for event in sorted(map(str, lost))]
    found += [f"event too many: {event}" for event in sorted(map(str, more))]
    ours, theirs = (json.loads((top / "summary.json").read_text()) for top in (whole, out))
    for name in sorted((ours.keys() | theirs.keys()) - {"seconds"}):
        if ours.get(name) != theirs.get(name):
            found.append(f"summary: {name} is {theirs.get(name)}, and was {ours.get(name)}")
    found += [f"file lost: {name}" for name in sorted(_files(whole) - _files(out))]
    return found + [f"file left behind: {name}" for name in sorted(_files(out) - _files(whole))]


def _files(out: Path) -> set[str]:
    """Return the files of a run; its checkpoints by their number, as a signal saves at steps of its own."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    saved = sorted(path for path in names if path.count("/") == 1 and "/step-" in path)
    others = {name for name in names if not name.startswith(("previous-", "checkpoints/step-"))}
    return others | {saved[-1], f"{len(saved)} checkpoints"}


def _state(out: Path) -> Any:
    path = find_latest(out / "checkpoints").path
    return {} if path is None else load_checkpoint(path)


def _state_differences(ours: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = {
            key: (ours.get(key), theirs.get(key))
            for key in (ours.keys() | theirs.keys()) - {"seconds"}
        }
    elif isinstance(ours, list | tuple) and len(ours) == len(theirs):
        pairs = {str(i): pair for i, pair in enumerate(zip(ours, theirs, strict=True))}
    else:
        return [] if _same(ours, theirs) else [name]
    return [d for key, pair in pairs.items() for d in _state_differences(*pair, f"{name}/{key}")]


def _same(ours: Any, theirs: Any) -> bool:
    """Compare bit by bit."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        described = [(one.dtype, one.shape, one.numpy().tobytes()) for one in (ours, theirs)]
        return described[0] == described[1]
    return repr(ours) == repr(theirs)


def _story(out: Path) -> set[tuple[Any, ...]]:
    """Return what happened, each event once, and the newest checkpoint, which may be told as that of a resume.

    Every process says once how the steps run, in a note; that it has no step here.
    """
    records = read_jsonl(out / "events.jsonl")
    saved = [r for r in records if "checkpoint" in r]
    return {
        (r["step"] if r["event"] != "note" else 0, r["event"], r.get("message"))
        for r in records
        if r["event"] not in HISTORY and "checkpoint" not in r
    } | {(r["step"], "saved", r["checkpoint"]) for r in saved[-1:]}
