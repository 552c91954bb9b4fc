"""The picture of a mask: where the entries of its largest tensor train, as the last checkpoint of a run has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause

CELLS = 96
"""The most cells of a picture along an axis."""


def mask_panels(clauses: Sequence[RecordedClause]) -> Iterator[Panel]:
    """Yield a picture of the largest masked tensor of each run that has a checkpoint."""
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.pictures.matrix_map import draw_matrix

    for clause in clauses:
        found = None if clause.run.folder is None else largest_mask(clause.run.folder, clause)
        if found is not None:
            name, mask = found
            rows, columns = as_matrix(mask).shape
            draw = partial(
                draw_matrix,
                values=cells(mask),
                label="fraction that trains",
                rows=rows,
                columns=columns,
            )
            yield Panel(f"{clause.label}: entries of {name} that train", draw)


def largest_mask(folder: Path, clause: RecordedClause) -> tuple[str, Tensor] | None:
    """Return name and mask, bool in its shape, of the largest tensor that a clause masks; None without a checkpoint."""
    from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint

    path = find_latest(folder / "checkpoints").path
    if path is None:
        return None
    actions = load_checkpoint(path, verified=True)["program"]["actions"]
    state = actions.get(f"{clause.label} choice", {})
    shapes = {row["name"]: row["shape"] for row in clause.run.plan["parameters"]}
    masks = (
        (key.partition("/")[2], mask_of(state, key, shapes[key.partition("/")[2]]))
        for key in state
        if key.startswith(("index/", "kept/"))
    )
    return max(masks, key=lambda pair: pair[1].numel(), default=None)


def mask_of(state: Mapping[str, Any], key: str, shape: Sequence[int]) -> Tensor:
    """Return the mask that an entry of a checkpoint holds: positions, or a bit for each entry."""
    import torch

    from trainc.kernels.parameter.masked_update import unpack

    entries = torch.Size(shape).numel()
    if key.startswith("kept/"):
        return unpack(state[key], entries).view(*shape)
    mask = torch.zeros(entries, dtype=torch.bool)
    return mask.index_fill_(0, state[key].long(), True).view(*shape)


def as_matrix(mask: Tensor) -> Tensor:
    """Return a mask as a matrix: axis 0 by all others, and a vector as one row."""
    return mask.flatten(1) if mask.dim() > 1 else mask.view(1, -1)


def cells(mask: Tensor, most: int = CELLS) -> Tensor:
    """Return the density of a mask, as a matrix, in at most `most` times `most` cells of almost equal size."""
    from torch.nn.functional import adaptive_avg_pool2d

    matrix = as_matrix(mask).float()
    size = (min(most, matrix.shape[0]), min(most, matrix.shape[1]))
    return adaptive_avg_pool2d(matrix[None, None], size)[0, 0]
