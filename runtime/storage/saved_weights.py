"""The weights that a run or a program left on disk, by name."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.foreign_files import interpreting, open_file


def read_weights(source: Path) -> dict[str, Tensor]:
    """Return the weights in a .safetensors file, or those that the run of a folder evaluated with last.

    Raises ValueError or OSError where there are none.
    """
    if not source.is_dir():
        with interpreting(source), open_file(source):
            return load_file(str(source))
    found = checkpoint.find_latest(source / "checkpoints")
    if found.path is None:
        raise ValueError(found.damage[0] if found.damage else "the folder has no checkpoint")
    program = checkpoint.load_checkpoint(found.path)["program"]
    weights: dict[str, Tensor] = program["model"] | program.get("evaluation", {})
    return weights
