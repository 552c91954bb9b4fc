"""Checkpoints: a folder per step with tensors, JSON and a manifest of checksums; never pickle.

Where processes share parameters each writes its parts, by torch.distributed.checkpoint; where each trains a replica of
its own, each writes all that it has.

A checkpoint is written beside its place and renamed into it, so a kill at any moment leaves the
ones before. A state is a tree of dicts with string keys, lists, tuples, tensors, numbers, strings,
booleans and None.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainc.kernels.library import atomic
from trainc.runtime.storage.foreign_files import (
    MANIFEST,
    UnreadableFile,
    check_manifest,
    interpreting,
    read_json,
    write_manifest,
)
from trainc.runtime.storage.replica_files import read_replica, write_replica
from trainc.runtime.storage.state_tree import flatten, restore

FORMAT = 3
TENSORS, STATE = "tensors.safetensors", "state.json"
INDEX = "shards.json"
"""In place of TENSORS, where several processes wrote parts of them: see runtime/storage/shards.py."""
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")

CheckpointState = dict[str, Any]


PartFor = Callable[[Sequence[str], Sequence[int], torch.dtype], Tensor | None]
"""Of a tensor's keys in the state, its shape and dtype: an empty DTensor to load it into; None for a whole one."""


class DamagedCheckpoint(UnreadableFile):
    """A checkpoint cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """The newest intact checkpoint, if there is one, and the damage of the newer ones."""

    path: Path | None
    step: int
    damage: tuple[str, ...]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Save a state under `folder`, whose parent is there, and return the path of the checkpoint.

    Raises ValueError for a state that JSON and tensors cannot hold, and OSError that names the file.
    """
    tree, tensors = flatten(state)
    place = _begin(folder, step)
    with _removed_on_error(place):
        _write_tensors(place, tensors)
        return _finish(folder, place, step, tree, {TENSORS: None})


def _write_tensors(place: Path, tensors: dict[str, Tensor]) -> None:
    with _as_oserror(place / TENSORS):
        save_file(tensors, place / TENSORS)
        with safe_open(place / TENSORS, "pt"):  # refuses a file that is shorter than it says
            pass


def save_shards(
    folder: Path, step: int, state: Mapping[str, Any], decided: Callable[[Callable[[], str]], str]
) -> Path:
    """Save a state of which each process holds parts, as DTensors; all processes call this alike.

    `decided` runs a function on rank 0, which keeps the folder, and returns what it gave on all.
    """
    from trainc.runtime.storage.shards import write_shards

    tree, tensors = flatten(state)
    place = Path(decided(lambda: str(_begin(folder, step))))
    with _removed_on_error(place):
        files = write_shards(place, tensors)
        return Path(
            decided(lambda: str(_finish(folder, place, step, tree, {INDEX: None, **files})))
        )


def save_replicas(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    rank: int,
    decided: Callable[[Callable[[], str]], str],
    each: Callable[[Any], list[Any]],
) -> Path:
    """Save the states of replicas, of which each process has one; all processes call this alike.

    `decided` is as in `save_shards`; `each` returns a value of all processes, by rank.
    """
    tree, tensors = flatten(state)
    place = Path(decided(lambda: str(_begin(folder, step))))
    with _removed_on_error(place):
        own: dict[str, Any] = {}
        if rank:
            own = write_replica(place, rank, tree, tensors)
        else:
            _write_tensors(place, tensors)
        every = each(own)
        files = {TENSORS: None} | {name: found for one in every for name, found in one.items()}
        finish = partial(_finish, folder, place, step, tree, files, replicas=len(every))
        return Path(decided(lambda: str(finish())))


def _begin(folder: Path, step: int) -> Path:
    """Return a new folder for the files of a checkpoint, which is none before it is finished."""
    # Not its parents: a run whose folder is gone must not make another one.
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    place = folder / f".writing-{step}"
    place.mkdir()
    return place


@contextmanager
def _removed_on_error(place: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)  # the disk may be full
        raise


def _finish(
    folder: Path,
    place: Path,
    step: int,
    tree: Any,
    files: Mapping[str, dict[str, Any] | None],
    **facts: int,
) -> Path:
    """Write what a checkpoint has besides its tensors, force it to the disk, and put it in its place.

    `files` are those of its tensors, with their checksums where these are known; the manifest has the `facts`, too.
    """
    text = json.dumps(tree, allow_nan=False)
    with atomic.naming(place / STATE):
        (place / STATE).write_text(text)
    known = {name: found for name, found in files.items() if found is not None}
    others = [name for name in files if name not in known]
    write_manifest(place, (*others, STATE), {"format": FORMAT, "step": step, **facts}, known)
    for path in (*(place / name for name in (*others, STATE, MANIFEST)), place):
        atomic.sync(path)
    attempts = [attempt for number, attempt, _ in checkpoints_in(folder) if number == step]
    # A step is saved again only after a resume from before it: the older attempt stays until
    # this one is in place.
    suffix = f"-{max(attempts) + 1}" if attempts else ""
    target = folder / f"step-{step:08d}{suffix}"
    with atomic.naming(target):
        place.rename(target)
    atomic.sync(folder)
    return target


@contextmanager
def _as_oserror(path: Path) -> Iterator[None]:
    """Turn what safetensors raises for a file that cannot be written into an OSError that names the file."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"(?:code: |os error )(\d+)", str(error))
        why = os.strerror(int(code[1])) if code else f"it was not written whole ({error})"
        raise OSError(int(code[1]) if code else errno.EIO, why, str(path)) from error


def find_latest(folder: Path, among: Collection[int] | None = None) -> FoundCheckpoint:
    """Find the newest intact checkpoint, of some steps where `among` is given; skip and list damaged newer ones."""
    damage: list[str] = []
    found = (one for one in checkpoints_in(folder) if among is None or one[0] in among)
    for step, _, path in sorted(found, reverse=True):
        try:
            _verify(path, step)
        except DamagedCheckpoint as problem:
            damage.append(str(problem))
        else:
            return FoundCheckpoint(path, step, tuple(damage))
    return FoundCheckpoint(None, 0, tuple(damage))


def replicas_in(path: Path) -> int:
    """Return how many replicas wrote a checkpoint that was found intact; 1 for that of a model that all train."""
    count = read_json(path / MANIFEST).get("replicas", 1)
    if type(count) is not int or count < 1:
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: it says {count!r} replicas")
    return count


def load_checkpoint(
    path: Path, part_for: PartFor | None = None, *, verified: bool = False, rank: int = 0
) -> CheckpointState:
    """Load a checkpoint on the CPU after checking every file, unless it is `verified`; raises DamagedCheckpoint.

    With `part_for` tensors of which processes wrote parts are loaded into what it gives, a part of them; all processes
    that hold the other parts do so alike. Of several replicas' states it is that of `rank`.
    """
    if not verified:
        _verify(path)
    try:
        if rank:
            tree, tensors = read_replica(path, rank)
        elif (path / TENSORS).exists():
            tree = read_json(path / STATE)
            with interpreting(path / TENSORS):
                tensors = load_file(path / TENSORS)
        else:
            from trainc.runtime.storage.shards import read_shards

            tree = read_json(path / STATE)
            tensors = read_shards(path, part_for)
        with interpreting(path / STATE):
            state: CheckpointState = restore(tree, tensors)
    except UnreadableFile as problem:
        raise DamagedCheckpoint(str(problem)) from problem
    return state


def _verify(path: Path, step: int | None = None) -> None:
    """Raise `DamagedCheckpoint` unless every file is as the manifest says."""
    for place in (path, *path.iterdir()) if path.is_dir() else (path,):
        if place.is_symlink():
            raise DamagedCheckpoint(
                f"{place} is a symbolic link, which may lead anywhere: put a copy of the checkpoint in its place"
            )
    instead = "resume with the version that saved it, or start a new run"
    try:
        manifest = check_manifest(path, (STATE,), FORMAT, instead)
        if not {TENSORS, INDEX} & manifest["files"].keys():
            raise UnreadableFile(f"{path / MANIFEST} is damaged: it does not list {TENSORS}")
    except UnreadableFile as problem:
        raise DamagedCheckpoint(str(problem)) from problem
    if (found := manifest.get("step")) != step and step is not None:
        raise DamagedCheckpoint(
            f"{path / MANIFEST} says step {found}, the folder's name says step {step}"
        )


def checkpoints_in(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield step, attempt and path of every checkpoint in a folder of them, intact or not."""
    for path in folder.glob("step-*"):
        if match := _NAME.fullmatch(path.name):
            yield int(match[1]), int(match[2] or 0), path


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run that went back does not go on from."""
    for later, _, path in [*checkpoints_in(folder)]:
        if later > step:
            _remove_checkpoint(folder, path)


def prune_checkpoints(folder: Path, keep: int, newest: int, needed: Collection[int] = ()) -> None:
    """Remove all but the newest attempt of the newest `keep` steps, and of those `needed`, up to the one just saved.

    Those of later steps stay and do not count: a run that goes on from an earlier step could not use them.
    Raises ValueError for a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: expected the number of checkpoints to keep, 1 or more")
    kept: set[int] = set()
    for step, _, path in sorted(checkpoints_in(folder), reverse=True):
        if step > newest:
            continue
        if (len(kept) < keep or step in needed) and step not in kept:
            kept.add(step)
            continue
        _remove_checkpoint(folder, path)


def _remove_checkpoint(folder: Path, path: Path) -> None:
    """Remove a checkpoint, renamed first: a kill meanwhile must not leave what looks like a damaged one."""
    if not path.is_symlink():
        with atomic.naming(path), suppress(FileNotFoundError):  # somebody removed it
            _remove(path.rename(folder / f".writing-{path.name}"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it saved or pruned left in a folder of checkpoints."""
    for unfinished in folder.glob(".writing-*"):
        with atomic.naming(unfinished):
            _remove(unfinished)


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link that somebody put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
