"""Kills and failing file operations: what `trainc run` loses at a hundred of them, with every construct in its specs.

A run is killed at a file operation, in the midst of a write, or by a signal some time after a step, two or three times,
also while it is resumed; then it is finished and compared with the undisturbed run, bit by bit.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from benchmarks.disturbed_runs import (
    Ended,
    Signal,
    differences,
    finish,
    resumable,
    run,
    undisturbed,
)
from benchmarks.file_operations import FAULTS, Fault
from benchmarks.kill_specs import every_construct
from benchmarks.measure import Json
from trainc.runtime.storage.checkpoint import find_latest

EXPECTED = (
    "every run ends as the undisturbed one: weights, optimizer state, metrics, events and summary; no file is"
    " left behind; a kill costs the steps since the checkpoint before it, of which there is one every 2 steps"
)
KILLS, TRIES, SEED = 100, 3, 11
SIGNALS = {
    "SIGKILL": (signal.SIGKILL, {-9}),
    "SIGTERM": (signal.SIGTERM, {143, -15}),  # before the run has begun nothing catches it
    "SIGINT": (signal.SIGINT, {130}),
}
TOO_LARGE = ("plan.json", "state.json", "tensors.safetensors")
"""Files that are not to fit: the system itself then cuts the write of such a one and refuses the next."""
GONE = "was removed or moved"


@dataclass
class Case:
    """A run with what happened to it, and what was not as it should be."""

    spec: int
    kinds: list[str] = field(default_factory=list)
    repeated: int = 0
    started_again: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A spec to disturb: its file, its undisturbed run, and the file operations and steps of that."""

    number: int
    path: Path
    whole: Path
    operations: tuple[str, ...]
    steps: int


def measure() -> Json:
    """Kill and fail, print each case, and return what was lost."""
    torch.set_num_threads(1)  # a forked process must find no threads
    specs = every_construct()
    draw = Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for number, spec in enumerate(specs):
            path, whole = Path(folder, f"{number}.train"), Path(folder, f"whole-{number}")
            path.write_text(spec.text, encoding="utf-8")
            ended = undisturbed(path, whole)
            subjects.append(Subject(number, path, whole, ended.operations, ended.steps))
            print(f"spec {number}: {', '.join(spec.names)}", flush=True)
        failed = [
            _fail(subject, kind, fault, largest)
            for kind, subject, fault, largest in _failures(subjects, draw)
        ]
        killed = _kill_all(subjects, draw)
    wrong = [case for case in (*killed, *failed) if case.wrong]
    return {
        "expected": EXPECTED,
        "met": not wrong,
        "measured": {
            "specs": [[spec.base, *spec.names] for spec in specs],
            "kills": _by_kind(killed) | {"runs": len(killed)},
            "steps that a kill cost, mean": round(
                sum(case.repeated for case in killed) / sum(len(c.kinds) for c in killed), 2
            ),
            "steps that a run repeated, most": max(case.repeated for case in killed),
            "runs killed before their first save": sum(case.started_again > 0 for case in killed),
            "faults": _by_kind(failed),
            "differences": [
                {"spec": case.spec, "kinds": case.kinds, "wrong": case.wrong} for case in wrong
            ],
        },
    }


def _by_kind(cases: Sequence[Case]) -> Json:
    kinds = [kind for case in cases for kind in case.kinds]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _kill_all(subjects: Sequence[Subject], draw: Random) -> list[Case]:
    cases: list[Case] = []
    landed = 0
    while landed < KILLS:
        case = _kill(subjects[len(cases) % len(subjects)], draw, min(TRIES, KILLS - landed))
        landed += len(case.kinds)
        cases.append(case)
        _tell(f"{landed:3d} of {KILLS}", case)
    return cases


def _kill(subject: Subject, draw: Random, most: int) -> Case:
    """Kill a run one to `most` times, and finish it."""
    case, out = Case(subject.number), subject.whole.with_name("killed")
    steps = 0
    for _ in range(draw.randint(min(2, most), most)):
        kind = draw.choice(["killed", "killed", "killed in a write", *SIGNALS])
        options = resumable(out)
        left = subject.steps - find_latest(out / "checkpoints").step
        if kind in SIGNALS:
            number, codes = SIGNALS[kind]
            sent = Signal(number, draw.randint(0, max(0, left - 1)), 0.3 * draw.random())
            ended = run(subject.path, out, options, sent=sent)
        else:
            codes = {-signal.SIGKILL}
            fault = FAULTS[kind](
                draw.randrange(10 + len(subject.operations) * left // (subject.steps + 1))
            )
            fault.end = _end_process
            ended = run(subject.path, out, options, fault)
        steps += ended.steps
        if ended.code in codes:
            case.kinds.append(f"{kind}{' while resumed' if options else ''}")
        elif ended.code != 0:  # 0: it was over before
            case.wrong.append(f"{kind} ended with {ended.code}: {_last_line(ended)}")
    return _finished(subject, case, out, steps)


def _end_process() -> None:
    signal.raise_signal(signal.SIGKILL)


def _failures(
    subjects: Sequence[Subject], draw: Random
) -> list[tuple[str, Subject, Fault | None, int | None]]:
    """Return the faults to try, each kind in three places."""
    found: list[tuple[str, Subject, Fault | None, int | None]] = []
    for kind, make in FAULTS.items():
        if kind.startswith("killed"):
            continue
        for third in range(3):
            subject = subjects[len(found) % len(subjects)]
            names = make(0).names
            places = [at for at, name in enumerate(subject.operations) if name in names]
            part = len(places) // 3
            found.append((kind, subject, make(places[third * part + draw.randrange(part)]), None))
    for name in TOO_LARGE:
        sizes = [max(p.stat().st_size for p in s.whole.rglob(name)) for s in subjects]
        subject = subjects[sizes.index(max(sizes))]  # what it prints fits
        found.append(("largest file", subject, None, max(sizes) - 1))
    return found


def _fail(subject: Subject, kind: str, fault: Fault | None, largest: int | None) -> Case:
    """Let a file operation of a run fail, look at what is said, and finish the run."""
    case, out = Case(subject.number, [kind]), subject.whole.with_name("failed")
    ended = run(subject.path, out, (), fault, largest_file=largest)
    line = _last_line(ended)
    if "Traceback" in ended.output:
        case.wrong.append("a traceback")
    if kind in ("folder removed", "folder moved") and ended.hit is not None:
        if ended.code != 1 or GONE not in line:
            case.wrong.append(f"ended with {ended.code}: {line}")
        moved = out.with_name(f"{out.name}.moved")
        if moved.exists():
            shutil.rmtree(out, ignore_errors=True)
            moved.rename(out)
    elif ended.code == 1:
        found = find_latest(out / "checkpoints").path
        known = "there is no checkpoint yet" if found is None else f"is {found.name}, and"
        known = known if (out / "events.jsonl").exists() else ""  # nothing was begun
        if not line.startswith(f"trainc: {out}/") or known not in line:
            case.wrong.append(f"ended with: {line}")
    elif ended.code != 0 or kind != "clock set back":
        case.wrong.append(f"ended with {ended.code} after {ended.hit}: {line}")
    case = _finished(subject, case, out, ended.steps)
    _tell(f"{kind}, at `{ended.hit}`: {ended.code} {line[:150]}", case)
    return case


def _finished(subject: Subject, case: Case, out: Path, steps: int) -> Case:
    """Finish a run, compare it with the undisturbed one, and remove it."""
    ended = finish(subject.path, out)
    case.repeated = steps + ended.steps - subject.steps
    case.started_again = len([*out.glob("previous-*")])
    if ended.code != 0:
        case.wrong.append(f"could not be finished: {ended.code}: {_last_line(ended)}")
    else:
        case.wrong += differences(subject.whole, out)
    shutil.rmtree(out, ignore_errors=True)
    return case


def _last_line(ended: Ended) -> str:
    return ([line for line in ended.output.splitlines() if line.strip()] or [""])[-1]


def _tell(what: str, case: Case) -> None:
    print(
        f"{what} | spec {case.spec} | {', '.join(case.kinds)} | {case.repeated} steps again |"
        f" {'; '.join(case.wrong) or 'equal'}",
        flush=True,
    )
