"""What one example is: a row of the batch, a document in a row, or a group of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainc.compiler.errors import SiteError
from trainc.compiler.method.losses import Losses
from trainc.runtime.data.batch import Batch, one_of


@dataclass(frozen=True, slots=True)
class ExampleIndex:
    """The number of examples, and where each lies in a micro-batch.

    `index` (rows, tokens) is the example of every token; without it an example is `rows` consecutive rows.
    """

    count: int
    rows: int = 1
    index: Tensor | None = None

    @property
    def all_rows(self) -> int:
        """Return the rows of the micro-batch."""
        return self.count * self.rows if self.index is None else self.index.shape[0]


@dataclass(frozen=True, slots=True)
class Groups:
    """Each `size` consecutive rows are one example, as BatchNorm over groups of this size needs."""

    size: int

    def divide(self, batch: Batch) -> ExampleIndex:
        """Return the groups of a micro-batch; raises SiteError when the last group is not full."""
        return self.of_rows(len(one_of(batch[1])))

    def of_rows(self, rows: int) -> ExampleIndex:
        """Return the groups of so many rows; raises SiteError when the last group is not full."""
        if rows % self.size:
            raise SiteError(
                f"a micro-batch of {rows} samples cannot be divided into groups of {self.size}: set `micro` in `data`"
                f" to a multiple of {self.size}, and let the data drop an incomplete last batch"
            )
        return ExampleIndex(rows // self.size, self.size)

    def weights(self, losses: Losses, batch: Batch, of_rows: Tensor) -> Tensor:
        """Return each group's weight in the step, (groups,), from those of its rows."""
        self.divide(batch)
        return of_rows.view(-1, self.size).sum(1)


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

    def of_rows(self, rows: int) -> ExampleIndex:
        """Raise SiteError: documents are found in the inputs."""
        raise SiteError(
            "a clause measures documents, which are found in the inputs, and in a `micro_batch` block your own code"
            " runs the model: in place of `micro_batch` and `backward` call `program.step(batch)`"
        )

    def weights(self, losses: Losses, batch: Batch, of_rows: Tensor) -> Tensor:
        """Return each document's weight in the step, (documents,), where the rows have these.

        Raises SiteError for several losses.
        """
        example_index = self.divide(batch)
        assert example_index.index is not None
        if len(losses.parts) > 1:
            raise SiteError(
                f"examples that are documents need one loss, and the spec has {len(losses.parts)}: measure rows, or"
                " remove the other losses"
            )
        own = losses.first.target_weights(losses.parts[0].targets(batch[1])).double()
        found = own.new_zeros(example_index.count)
        found.index_add_(0, example_index.index.flatten(), own.flatten())
        return found / found.sum() * of_rows.sum()

    def _tokens(self, batch: Batch) -> Tensor:
        inputs = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
        for tensor in pytree.tree_leaves(inputs):
            counted = isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32)
            if counted and tensor.dim() == 2 and tensor.shape == one_of(batch[1]).shape:
                found: Tensor = tensor
                return found
        raise SiteError(
            "examples that are documents need an integer input of the targets' shape"
            f" {tuple(one_of(batch[1]).shape)} to find separators in"
        )


ExampleUnits = Groups | Documents
