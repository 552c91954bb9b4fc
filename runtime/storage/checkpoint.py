"""Checkpoints: a folder per step with tensors, JSON and a manifest of checksums; never pickle.

A checkpoint is written beside its place and renamed into it, so a kill at any moment leaves the
ones before. A state is a tree of dicts with string keys, lists, tuples, tensors, numbers, strings,
booleans and None.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainc.kernels.library import atomic

FORMAT = 2
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")

CheckpointState = dict[str, Any]


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """The newest intact checkpoint, if there is one, and the damage of the newer ones."""

    path: Path | None
    step: int
    damage: tuple[str, ...]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Save a state under `folder`, remove all but the newest `keep` checkpoints, and return its path.

    Raises ValueError for a `keep` below 1 and for a state that JSON and tensors cannot hold.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: expected the number of checkpoints to keep, 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".writing-*"):
        shutil.rmtree(unfinished)
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors, {})
    place = folder / f".writing-{step}"
    place.mkdir()
    save_file(tensors, place / TENSORS)
    (place / STATE).write_text(json.dumps(tree, allow_nan=False))
    files = {
        name: {"sha256": _checksum(place / name), "bytes": (place / name).stat().st_size}
        for name in (TENSORS, STATE)
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*(place / name for name in (TENSORS, STATE, MANIFEST)), place):
        atomic.sync(path)
    attempts = [attempt for number, attempt, _ in _checkpoints(folder) if number == step]
    # A step is saved again only after a resume from before it: the older attempt stays until this
    # one is in place.
    suffix = f"-{max(attempts) + 1}" if attempts else ""
    target = folder / f"step-{step:08d}{suffix}"
    place.rename(target)
    atomic.sync(folder)
    _prune(folder, keep)
    return target


def find_latest(folder: Path) -> FoundCheckpoint:
    """Find the newest intact checkpoint under `folder`; skip and list damaged newer ones."""
    damage: list[str] = []
    for step, _, path in sorted(_checkpoints(folder), reverse=True):
        try:
            _verify(path, step)
        except DamagedCheckpoint as problem:
            damage.append(str(problem))
        else:
            return FoundCheckpoint(path, step, tuple(damage))
    return FoundCheckpoint(None, 0, tuple(damage))


def load_checkpoint(path: Path) -> CheckpointState:
    """Load a checkpoint on the CPU after checking every file; raises DamagedCheckpoint."""
    _verify(path)
    try:
        tensors = load_file(path / TENSORS)
    except SafetensorError as problem:
        raise DamagedCheckpoint(f"{path / TENSORS} cannot be read: {problem}") from problem
    state: CheckpointState = _restore(json.loads((path / STATE).read_text()), tensors)
    return state


def _verify(path: Path, step: int | None = None) -> None:
    """Raise `DamagedCheckpoint` unless every file is as the manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, found_step, files = manifest["format"], manifest["step"], manifest["files"]
        expected = {
            name: (files[name]["sha256"], files[name]["bytes"]) for name in (TENSORS, STATE)
        }
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DamagedCheckpoint(f"{path / MANIFEST} is missing or damaged") from problem
    if version != FORMAT:
        raise DamagedCheckpoint(
            f"{path / MANIFEST} has format {version}, but this version of trainc reads {FORMAT}: resume"
            " with the version that saved it, or start a new run"
        )
    if step not in (found_step, None):
        raise DamagedCheckpoint(
            f"{path / MANIFEST} says step {found_step}, the folder's name says step {step}"
        )
    for name, checked in expected.items():
        try:
            found = _checksum(path / name), (path / name).stat().st_size
        except OSError as problem:
            raise DamagedCheckpoint(f"{path / name} is missing") from problem
        if found != checked:
            raise DamagedCheckpoint(
                f"{path / name} is damaged: its checksum differs from that in the manifest"
            )


def _checkpoints(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield step, attempt and path of every checkpoint."""
    for path in folder.glob("step-*"):
        if match := _NAME.fullmatch(path.name):
            yield int(match[1]), int(match[2] or 0), path


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest attempt of the newest `keep` steps."""
    kept: set[int] = set()
    for step, _, path in sorted(_checkpoints(folder), reverse=True):
        if len(kept) < keep and step not in kept:
            kept.add(step)
            continue
        # Renamed first: a kill while it is being removed must not leave what looks like a damaged
        # checkpoint.
        removed = path.rename(folder / f".writing-{path.name}")
        shutil.rmtree(removed)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(
    value: Any, name: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]
) -> Any:
    """Return the JSON of a state; its tensors go to `tensors` under their path, each once."""
    match value:
        case Tensor():
            return {"$tensor": _store(value, name, tensors, seen)}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case list() | tuple():
            items = [_flatten(v, f"{name}/{i}", tensors, seen) for i, v in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case Mapping():
            for key in value:
                if not isinstance(key, str) or key.startswith("$"):
                    raise ValueError(
                        f"the state at `{name or '.'}` has the key {key!r}: expected a string"
                        " that does not begin with $"
                    )
            prefix = f"{name}/" if name else ""
            return {
                key: _flatten(
                    inner, prefix + key.replace("~", "~0").replace("/", "~1"), tensors, seen
                )
                for key, inner in value.items()
            }
    raise ValueError(
        f"the state at `{name or '.'}` is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings,"
        " booleans, None, and lists, tuples and dicts of these"
    )


def _store(
    tensor: Tensor, name: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]
) -> str:
    """Add a tensor and return the name it is stored under; tensors that are the same memory are stored once."""
    tensor = tensor.detach()
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if tensor.numel() and memory in seen:
        return seen[memory]
    # A copy of its own: safetensors takes neither strides nor memory that two tensors share.
    tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
    seen[memory] = name
    return name


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that a JSON tree describes."""
    match value:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$float": str(number)}:
            return float(number)
        case {"$tuple": list(items)}:
            return tuple(_restore(item, tensors) for item in items)
        case dict():
            return {key: _restore(inner, tensors) for key, inner in value.items()}
        case list():
            return [_restore(item, tensors) for item in value]
    return value
