"""Models that compute their own loss, functions that are losses, and their gradients example by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainc.compiler.execution.execution import Executor

WORDS, IGNORED = 13, -100
EXECUTORS: tuple[Executor, ...] = ("graph", "module")
Rule = Literal["targets", "shifted_targets", "examples"]


def of_rule(logits: Tensor, labels: Tensor, rule: Rule) -> Tensor:
    """Return the cross-entropy of tokens: each against its label, the next one, or as a mean over means of examples."""
    if rule == "shifted_targets":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if rule != "examples":
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    kept = labels != IGNORED
    return ((each * kept).sum(1) / kept.sum(1)).mean()


@dataclass
class Output:
    """What the models here return: a loss where they were given labels."""

    logits: Tensor
    loss: Tensor | None = None


class OwnLoss(nn.Module):
    """A model of tokens that returns its loss when it is given labels, as those of Hugging Face do."""

    def __init__(self, rule: Rule = "shifted_targets", drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule: Rule = rule
        self.words, self.norm = nn.Embedding(WORDS, 8), nn.LayerNorm(8)
        self.mix, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(drop), nn.Linear(8, WORDS)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        before = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype))
        x = self.drop(F.gelu(self.mix(before @ x)))
        found: Tensor = self.head(self.norm(x))
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        logits = self.logits(input_ids, attention_mask)
        if labels is None:
            return Output(logits)
        return Output(logits, of_rule(logits, labels, self.rule))


def batch_of(seed: int = 0, count: int = 6, length: int = 7) -> dict[str, Tensor]:
    """Return a dict as of a collator: some labels do not count, another number in each example."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (count, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(count):
        labels[row, : (2 * row) % (length - 2)] = IGNORED
        mask[row, length - row % 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(batch: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """Return examples of a batch."""
    return {name: one[first:last] for name, one in batch.items()}


@dataclass
class Examples:
    """The gradient of each example's own loss, by parameter, and its weight in the loss of all."""

    gradients: list[dict[str, Tensor]]
    weights: list[float]

    def mean(self) -> dict[str, Tensor]:
        """Return the gradient of the weighted mean."""
        names = self.gradients[0]
        pairs = list(zip(self.gradients, self.weights, strict=True))
        return {
            n: torch.stack([w * g[n] for g, w in pairs]).sum(0) / sum(self.weights) for n in names
        }

    def squares(self) -> dict[str, Tensor]:
        """Return the squared norm of each example's gradient, by parameter."""
        return {
            n: torch.stack([g[n].square().sum() for g in self.gradients]) for n in self.gradients[0]
        }


def one_by_one(
    model: nn.Module,
    loss_of: Callable[[dict[str, Any]], Tensor],
    batch: Mapping[str, Any],
    weights: list[float],
) -> Examples:
    """Return the gradients of examples from one backward pass each."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for i in range(len(weights)):
        loss = loss_of(rows(batch, i, i + 1))
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), grads, strict=True)
        found.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
    return Examples(found, weights)


def counted(labels: Tensor, rule: Rule) -> list[float]:
    """Return how much each example weighs by a rule."""
    if rule == "examples":
        return [1.0] * len(labels)
    own = labels[:, 1:] if rule == "shifted_targets" else labels
    kept: list[float] = (own != IGNORED).sum(1).double().tolist()
    return kept


def next_word(logits: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """Return a mean over the next tokens that are not ignored."""
    return scale * of_rule(logits, targets, "shifted_targets")


def sum_of_words(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a sum over tokens that are not ignored."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def each_word(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a number for each token, also for those that are ignored."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over all targets of a loss that refuses what is no class."""
    return F.multi_margin_loss(logits.flatten(0, -2), targets.flatten())


def each_example(outputs: Any, batch: Any) -> Tensor:
    """Return a number for each example, of the whole output and the whole batch."""
    (inputs, targets) = batch
    logits = getattr(outputs, "logits", outputs)
    kept = (targets != IGNORED) * inputs["attention_mask"]
    found: Tensor = (each_word(logits, targets) * kept).sum(1)
    return found


def apart(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a loss that compares the examples with each other."""
    flat = logits.flatten(1)
    return torch.logsumexp((flat @ flat.T) / 50, 1).mean()


def alone(logits: Tensor) -> Tensor:
    """Take no targets."""
    return logits.mean()


def detached(logits: Tensor, targets: Tensor) -> Tensor:
    """Return a loss without a gradient."""
    return sum_of_words(logits, targets).detach()


def as_number(logits: Tensor, targets: Tensor) -> float:
    """Return a Python number."""
    return float(sum_of_words(logits, targets).detach())


def broken(logits: Tensor, targets: Tensor) -> Tensor:
    """Fail for a reason of its own."""
    raise KeyError("nothing here")


def reading(logits: Tensor, targets: Tensor) -> Tensor:
    """Decide by the values of a tensor, which no graph can."""
    kept = (targets != IGNORED).nonzero()
    first: list[Tensor] = [
        logits[b, t].logsumexp(0) - logits[b, t, targets[b, t]] for b, t in kept.tolist()
    ]
    return torch.stack(first).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)
