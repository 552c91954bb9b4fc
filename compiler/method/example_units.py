"""What counts as one example in a noise scale: a row of the batch, a document inside a row, or a group of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainc.compiler.errors import SiteError
from trainc.compiler.method.example_index import Division

if TYPE_CHECKING:
    from trainc.compiler.method.loss import Loss
    from trainc.runtime.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Groups:
    """`size` consecutive rows together are one unit: what is legal where normalization mixes their examples."""

    size: int

    def divide(self, batch: Batch) -> Division:
        """Return the groups; raises SiteError when the micro-batch is not made of whole ones."""
        rows = batch[1].shape[0]
        if rows % self.size:
            raise SiteError(
                f"a micro-batch of {rows} samples is not made of whole groups of {self.size}:"
                " let `micro` in the `data` clause be a multiple of `group`, and let the data drop what is left over"
            )
        return Division(rows // self.size, self.size)

    def weights(self, task: Loss, batch: Batch) -> Tensor:
        """Return each group's share of the loss, (groups,)."""
        self.divide(batch)
        return task.weights(batch[1]).view(-1, self.size).sum(1)


@dataclass(frozen=True, slots=True)
class Documents:
    """Rows hold several documents, each ended by the token `separator`."""

    separator: int

    def divide(self, batch: Batch) -> Division:
        """Return the documents; raises SiteError when the inputs hold no token ids like the targets."""
        ids = self._tokens(batch)
        ends = (ids == self.separator).long()
        within = ends.cumsum(1) - ends  # the separator is the last token of its document
        per_row = within[:, -1] + 1
        first = per_row.cumsum(0) - per_row
        return Division(int(per_row.sum()), index=within + first[:, None])

    def weights(self, task: Loss, batch: Batch) -> Tensor:
        """Return each document's share of the counted targets, (documents,)."""
        division = self.divide(batch)
        assert division.index is not None
        counted = (batch[1] != task.ignore_index).double()
        found = counted.new_zeros(division.count)
        found.index_add_(0, division.index.flatten(), counted.flatten())
        return found / found.sum()

    def _tokens(self, batch: Batch) -> Tensor:
        inputs = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
        for tensor in pytree.tree_leaves(inputs):
            counted = isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32)
            if counted and tensor.dim() == 2 and tensor.shape == batch[1].shape:
                found: Tensor = tensor
                return found
        raise SiteError(
            f"`example = document` needs token ids of the targets' shape {tuple(batch[1].shape)} among the inputs,"
            " (rows, tokens) integers"
        )


ExampleUnits = Groups | Documents
