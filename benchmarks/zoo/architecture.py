"""What the zoo knows of a model: how it is built, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[torch.Generator, int], Any]
"""Inputs for a number of examples."""


@dataclass(frozen=True)
class Architecture:
    """A model of few weights, random ones, and inputs for it; its logits decide what targets fit."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    loss: str = "cross_entropy"
    rounds: bool = False
    """Whether it computes parts in float32 whatever it is given."""
    labels: Inputs | None = None
    """What it is given besides, of which it computes a loss of its own: batches are then dicts with both."""
    tokens_as_targets: bool = False
    """Whether the targets are a class at each place, also for a loss that is of no classes."""
    example_targets: bool = False
    """Whether the right class of an example is its number in the batch, as where two towers are compared."""

    def model(self) -> nn.Module:
        """Build it, with the same weights each time, in float64 unless it rounds to float32 anyway."""
        torch.manual_seed(0)
        model = self.build().train()
        return model if self.rounds else model.double()

    def batch(self, seed: int, count: int, classes: bool, shape: tuple[int, ...]) -> Any:
        """Return inputs and targets: classes, or numbers from 0 to 1, for logits of this shape."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.inputs(generator, count)
        if self.labels is not None:
            return inputs | self.labels(generator, count)
        if self.example_targets and classes:
            return inputs, torch.arange(count)
        if classes or self.tokens_as_targets:
            return inputs, torch.randint(0, shape[-1], (count, *shape[1:-1]), generator=generator)
        return inputs, torch.rand((count, *shape[1:]), generator=generator, dtype=self.dtype)

    @property
    def rounding(self) -> float:
        """How far apart two ways to compute the same may be."""
        return 2e-3 if self.rounds else 1e-8

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers it is given."""
        return torch.float32 if self.rounds else torch.float64


def tokens(length: int, vocabulary: int, name: str | None = None, answers: int = 0) -> Inputs:
    """Return sequences of tokens, as the only argument or by name; `answers` of each example, if any."""

    def draw(generator: torch.Generator, count: int) -> Any:
        shape = (count, answers, length) if answers else (count, length)
        ids = torch.randint(2, vocabulary, shape, generator=generator)
        return ids if name is None else {name: ids}

    return draw


def labels_of_tokens(length: int, vocabulary: int) -> Inputs:
    """Return a label for each token, of which some are ignored, another number in each example."""

    def draw(generator: torch.Generator, count: int) -> Any:
        found = torch.randint(2, vocabulary, (count, length), generator=generator)
        for row in range(count):
            found[row, : row % (length - 1)] = -100
        return {"labels": found}

    return draw


def classes(number: int, name: str = "labels") -> Inputs:
    """Return a class for each example."""

    def draw(generator: torch.Generator, count: int) -> Any:
        return {name: torch.randint(0, number, (count,), generator=generator)}

    return draw


def numbers(*shape: int, name: str | None = None, rounds: bool = False) -> Inputs:
    """Return normal numbers of a shape, as the only argument or by name."""

    def draw(generator: torch.Generator, count: int) -> Any:
        dtype = torch.float32 if rounds else torch.float64
        found: Tensor = torch.randn((count, *shape), generator=generator, dtype=dtype)
        return found if name is None else {name: found}

    return draw


def together(*parts: Inputs) -> Inputs:
    """Return the inputs of several, each by its names."""

    def draw(generator: torch.Generator, count: int) -> Any:
        return {name: one for part in parts for name, one in part(generator, count).items()}

    return draw
