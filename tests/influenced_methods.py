"""Models, data and losses whose influence is compared with the definition, method by method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.influenced import Data, Samples
from tests.own_losses import OwnLoss, batch_of

WORDS, LENGTH = 11, 5
LossOf = Callable[[nn.Module, Any, Any], Tensor]


class Tokens(nn.Module):
    """Two blocks over tokens, each position of which sees those before it; the head may be the embedding; float64."""

    def __init__(
        self, tied: bool = True, reentrant: bool | None = None, dtype: str = "float64"
    ) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(WORDS, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant = reentrant
        self.to(getattr(torch, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            if self.reentrant is None:
                x = self._mixed(x, block)
            else:
                x = checkpoint(self._mixed, x, block, use_reentrant=self.reentrant)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def _mixed(self, x: Tensor, block: nn.Module) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        found: Tensor = x + self.drop(block(before).tanh())
        return found


def token_data() -> Data:
    """Windows of tokens, of which some do not count: none of the first two samples."""
    draw = torch.Generator().manual_seed(3)

    def part(count: int) -> Samples:
        ids = torch.randint(WORDS, (count, LENGTH + 1), generator=draw)
        targets = ids[:, 1:].clone()
        targets[:, 0] = -100
        targets[:2] = -100
        return Samples(ids[:, :-1], targets)

    return Data(part(9), part(4))


class Pairs:
    """Samples whose inputs and targets are a dict, or a tensor, each."""

    def __init__(self, inputs: Any, targets: Any) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        one = self.targets
        return len(one if isinstance(one, Tensor) else next(iter(one.values())))

    def batch(self, indices: Any) -> tuple[Any, Any]:
        rows = list(indices)

        def of(value: Any) -> Any:
            return (
                value[rows] if isinstance(value, Tensor) else {n: v[rows] for n, v in value.items()}
            )

        return of(self.inputs), of(self.targets)


def own_loss(rule: str = "shifted_targets") -> nn.Module:
    return OwnLoss(rule, 0.2).double()  # type: ignore[arg-type]


def labelled() -> Data:
    parts = []
    for seed, count in ((0, 6), (1, 4)):
        found = batch_of(seed, count)
        parts.append(Pairs({n: v for n, v in found.items() if n != "labels"}, found["labels"]))
    return Data(*parts)  # type: ignore[arg-type]


class TwoHeads(nn.Module):
    """A class and two numbers of each example; float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.bn = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.classes, self.numbers = nn.Linear(5, 3), nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.bn(self.body(x)).relu()
        return {"classes": self.classes(h), "numbers": self.numbers(h)}


class Only(TwoHeads):
    """One of the outputs."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[self.part]


def two_targets(only: str = "") -> Data:
    draw = torch.Generator().manual_seed(6)

    def part(count: int) -> Pairs:
        x = torch.randn(count, 4, generator=draw).double()
        y = torch.randint(3, (count,), generator=draw)
        y[1] = -100
        found = {"classes": y, "numbers": torch.randn(count, 2, generator=draw).double()}
        return Pairs(x, found[only] if only else found)

    return Data(part(9), part(4))  # type: ignore[arg-type]


def with_inputs(outputs: Tensor, batch: Any) -> Tensor:
    """A loss that reads the inputs too."""
    x, y = batch
    found: Tensor = ((outputs - y).square().mean(1) * (1 + x[:, 0].square())).mean()
    return found


class Answers(nn.Module):
    """Texts of two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tokens(tied=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids.flatten(0, 1))  # type: ignore[no-any-return]


def answers() -> Data:
    draw = torch.Generator().manual_seed(7)

    def part(count: int) -> Samples:
        ids = torch.randint(WORDS, (count, 2, LENGTH), generator=draw)
        targets = torch.randint(WORDS, (count, 2, LENGTH), generator=draw)
        targets[..., :2] = -100
        return Samples(ids, targets)

    return Data(part(6), part(3))


def cross_entropy(model: nn.Module, x: Any, y: Any) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())
