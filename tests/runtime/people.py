"""Data as people have it, for the tests: data sets, tables, modules. Not one of them knows trainc."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SAMPLES, WIDTH = 40, 4
INPUTS = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(SAMPLES) % 3


class Pairs(Dataset[tuple[Tensor, int]]):
    """A map-style data set of torch."""

    def __init__(self, first: int = 0, last: int = SAMPLES) -> None:
        self.rows = range(first, last)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return INPUTS[self.rows[index]], int(CLASSES[self.rows[index]])


class Dicts(Pairs):
    """Samples as dicts, with the names that the test gives."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def __getitem__(self, index: int) -> Any:
        x, y = INPUTS[index], int(CLASSES[index])
        return {name: y if name[0] in "lty" else x for name in self.names}


class Augmented(Pairs):
    """Samples with random numbers from every generator that there may be."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__(0, samples)
        self.of_torch = torch.Generator().manual_seed(1)
        self.of_numpy = np.random.default_rng(1)
        self.of_python = random.Random(1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = [torch.rand(()).item(), float(np.random.rand()), random.random()]
        drawn += [torch.rand((), generator=self.of_torch).item()]
        drawn += [self.of_numpy.random(), self.of_python.random()]
        return torch.cat([INPUTS[index], torch.tensor(drawn)]), int(CLASSES[index])


class Table:
    """What Hugging Face's `datasets.Dataset` can do, as far as trainc asks: columns, formats, rows in batches."""

    def __init__(self, columns: dict[str, list[Any]], kind: str | None = None) -> None:
        self.columns = columns
        self.format = {"type": kind}
        self.column_names = list(columns)

    def with_format(self, kind: str) -> Table:
        return Table(self.columns, kind)

    def batch(self, batch_size: int, drop_last_batch: bool = False) -> Table:
        raise AssertionError("this is not the `batch` of a split")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = [{name: column[i] for name, column in self.columns.items()} for i in indices]
        if self.format["type"] != "torch":
            return rows
        return [
            {name: v if isinstance(v, str) else torch.tensor(v) for name, v in row.items()}
            for row in rows
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def table(first: int = 0, last: int = SAMPLES, **more: list[Any]) -> Table:
    return Table({"x": INPUTS[first:last].tolist(), "label": CLASSES[first:last].tolist(), **more})
