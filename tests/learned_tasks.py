"""Tasks of learned starts whose data has an order of its own, or is read by processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from examples.data import sines
from examples.models import tanh_net


def points(task: int) -> tuple[TensorDataset, TensorDataset]:
    """The samples of the sines as data sets."""
    parts = [part.batch(range(10)) for part in sines(task)]
    return TensorDataset(*parts[0]), TensorDataset(*parts[1])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """The samples of a task again and again."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from (self.samples[i] for i in range(len(self.samples)))


def endless(task: int) -> tuple[Endless, Endless]:
    """Samples without an end, to train on and held out."""
    train, held_out = points(task)
    return Endless(train), Endless(held_out)


def noisy(task: int) -> Any:
    """Random numbers that are drawn while they are read."""

    class Drawn(Endless):
        def __iter__(self) -> Iterator[Any]:
            for x, y in super().__iter__():
                yield x + 0.1 * torch.randn_like(x), y

    return Drawn(points(task)[0])


class In16Bits(nn.Module):
    """A net whose weights are of 16 bits, between numbers of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = tanh_net(width).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.bfloat16()).float()  # type: ignore[no-any-return]


def in_16_bits(width: int) -> nn.Module:
    """Build such a net."""
    return In16Bits(width)


def odd(task: int) -> TensorDataset:
    """Tasks of which one does not fit the model: the classes of task 1, or the inputs of task 2."""
    generator = torch.Generator().manual_seed(task)
    width, classes = (2 if task == 2 else 1), (4 if task == 1 else 3)
    x = torch.randn(20, width, generator=generator)
    y = torch.arange(20) % classes
    return TensorDataset(x, y)


def classes() -> nn.Module:
    """A linear model of one input and three classes."""
    return nn.Linear(1, 3)
