"""What one example of a noise scale is: a row of the batch, a document in a row, or a group of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainc.compiler.errors import SiteError
from trainc.compiler.method.loss import Loss
from trainc.runtime.data.batch import Batch


@dataclass(frozen=True, slots=True)
class ExampleIndex:
    """The number of examples, and where each lies in a micro-batch.

    `index` (rows, tokens) is the example of every token; without it an example is `rows` consecutive rows.
    """

    count: int
    rows: int = 1
    index: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """Each `size` consecutive rows are one example, as BatchNorm over groups of this size needs."""

    size: int

    def divide(self, batch: Batch) -> ExampleIndex:
        """Return the groups of a micro-batch; raises SiteError when the last group is not full."""
        rows = batch[1].shape[0]
        if rows % self.size:
            raise SiteError(
                f"a micro-batch of {rows} samples cannot be divided into groups of {self.size}: set `micro` in `data`"
                " to a multiple of `group`, and let the data drop an incomplete last batch"
            )
        return ExampleIndex(rows // self.size, self.size)

    def weights(self, loss: Loss, batch: Batch) -> Tensor:
        """Return each group's weight in the loss, (groups,), sum 1."""
        self.divide(batch)
        return loss.weights(batch[1]).view(-1, self.size).sum(1)


@dataclass(frozen=True, slots=True)
class Documents:
    """Each document in a row is one example; a document ends with the token `separator`."""

    separator: int

    def divide(self, batch: Batch) -> ExampleIndex:
        """Return the documents of a micro-batch; raises SiteError when no input holds the token ids."""
        ids = self._tokens(batch)
        ends = (ids == self.separator).long()
        within = ends.cumsum(1) - ends  # the separator is the last token of its document
        per_row = within[:, -1] + 1
        first = per_row.cumsum(0) - per_row
        return ExampleIndex(int(per_row.sum()), index=within + first[:, None])

    def weights(self, loss: Loss, batch: Batch) -> Tensor:
        """Return each document's weight in the loss, (documents,), sum 1."""
        example_index = self.divide(batch)
        assert example_index.index is not None
        counted = (batch[1] != loss.ignore_index).double()
        found = counted.new_zeros(example_index.count)
        found.index_add_(0, example_index.index.flatten(), counted.flatten())
        return found / found.sum()

    def _tokens(self, batch: Batch) -> Tensor:
        inputs = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
        for tensor in pytree.tree_leaves(inputs):
            counted = isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32)
            if counted and tensor.dim() == 2 and tensor.shape == batch[1].shape:
                found: Tensor = tensor
                return found
        raise SiteError(
            f"`example = document` needs an integer input of the targets' shape {tuple(batch[1].shape)} to find"
            " separators in"
        )


ExampleUnits = Groups | Documents
