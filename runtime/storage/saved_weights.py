"""The weights that a run or a program left on disk, by name; and what a run changed of those it started from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.foreign_files import MANIFEST, interpreting, open_file
from trainc.runtime.storage.weight_delta import TensorDelta, entries_of


def read_weights(source: Path) -> dict[str, Tensor]:
    """Return the weights in a .safetensors file, or those that the run of a folder evaluated with last.

    Raises ValueError or OSError where there are none.
    """
    if not source.is_dir():
        with interpreting(source), open_file(source):
            return load_file(str(source))
    program = _program_in(source)
    weights: dict[str, Tensor] = program["model"] | program.get("evaluation", {})
    return weights


ORIGIN = "trainc"
"""The entry of a .safetensors file's metadata that says how its weights were made: JSON."""


def read_origin(source: Path) -> str:
    """Return what is known of the weights in a .safetensors file or a run's folder, as a phrase."""
    if source.is_dir():
        return "weights that a run evaluated with"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    with interpreting(source), safe_open(str(source), "pt") as file:
        about = (file.metadata() or {}).get(ORIGIN)
    with suppress(ValueError, LookupError, TypeError):  # of another program, it says nothing
        return f"sha256 {digest}, {json.loads(about or '')['what']}"
    return f"sha256 {digest}"


def read_changes(source: Path, base: Path | None = None) -> list[TensorDelta]:
    """Return what a run changed of its weights, of a run's folder or of a checkpoint.

    Where a mask chose the entries of a parameter that train, these are its entries; other parameters that an optimizer
    trained, and buffers, are whole. With `base`, a .safetensors file or another run, they are those that differ from
    it. Raises ValueError or OSError where there is no run, where `base` does not fit, and where there is none although
    a mask has chosen other entries before.
    """
    program = _program_in(source)
    before = None if base is None else read_weights(base)
    with interpreting(source):
        tensors: dict[str, Tensor] = program["model"] | program.get("evaluation", {})
        parameters = {name for name, *_ in program["made_by"]["signature"]}
        aliases = {id(program["model"][name]) for name in parameters}
        buffers = {n for n, t in program["model"].items() if id(t) not in aliases}
        trained = {*program["rates"]["in_force"], *buffers}
        indices = _kept_under("index/", program["actions"])
        left = _kept_under("left/", program["actions"])
    return entries_of(tensors, trained, indices, before, str(base), left)


def _program_in(source: Path) -> dict[str, Any]:
    """Return the state of the program in a checkpoint, or in the newest one of a run."""
    if not (source / MANIFEST).exists():
        found = checkpoint.find_latest(source / "checkpoints")
        if found.path is None:
            raise ValueError(found.damage[0] if found.damage else "the folder has no checkpoint")
        source = found.path
    program: dict[str, Any] = checkpoint.load_checkpoint(source)["program"]
    return program


def _kept_under(prefix: str, actions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what masks keep in their states by parameter: under `index/` the positions that they chose."""
    return {
        key.removeprefix(prefix): value
        for state in actions.values()
        for key, value in state.items()
        if key.startswith(prefix)
    }
