"""The zoo's models and data as a spec names them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.all_architectures import ARCHITECTURES
from benchmarks.zoo.examine import logits_shape


class Samples:
    """Random samples of an architecture, the same for the same indices."""

    def __init__(self, architecture: str, count: int) -> None:
        self._architecture, self._count = ARCHITECTURES[architecture], count

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> Any:
        """Return inputs and targets, which are the labels where it computes its own loss."""
        one = self._architecture
        batch = one.batch(indices[0], len(indices), one.loss == "cross_entropy", logits_shape(one))
        if one.labels is None:
            return batch
        names = one.labels(torch.Generator(), 1)
        inputs = {name: value for name, value in batch.items() if name not in names}
        return inputs, {name: batch[name] for name in names}


class Data:
    """What a spec's data is."""

    tokens_per_sample = 1

    def __init__(self, architecture: str) -> None:
        self.train, self.evaluation = Samples(architecture, 16), Samples(architecture, 4)


def samples(architecture: str) -> Data:
    """Return the data of an architecture."""
    return Data(architecture)


def model(architecture: str) -> nn.Module:
    """Return the model of an architecture."""
    return ARCHITECTURES[architecture].model()
