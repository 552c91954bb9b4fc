"""The files of a checkpoint in which replicas that train each on their own keep what they have: two a replica.

That of rank 0 is kept as one process keeps its own, so that what reads a checkpoint of one process finds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainc.kernels.library.atomic import naming, sync
from trainc.runtime.storage.foreign_files import checksum, interpreting, read_json

Files = dict[str, dict[str, Any]]
"""The checksums of files, by name."""


def write_replica(place: Path, rank: int, tree: Any, tensors: Mapping[str, Tensor]) -> Files:
    """Write the state of a rank, and return its files with their checksums once they are on the disk."""
    of_tree, of_tensors = _names(rank)
    with naming(place / of_tensors):
        save_file(dict(tensors), place / of_tensors)
    with naming(place / of_tree):
        (place / of_tree).write_text(json.dumps(tree, allow_nan=False))
    for name in (of_tree, of_tensors):
        sync(place / name)
    return {name: checksum(place / name) for name in (of_tree, of_tensors)}


def read_replica(place: Path, rank: int) -> tuple[Any, dict[str, Tensor]]:
    """Return what `write_replica` wrote of a rank; raises UnreadableFile where the files hold something else."""
    of_tree, of_tensors = _names(rank)
    tree = read_json(place / of_tree)
    with interpreting(place / of_tensors):
        return tree, load_file(place / of_tensors)


def _names(rank: int) -> tuple[str, str]:
    return f"replica-{rank:05d}.json", f"replica-{rank:05d}.safetensors"
