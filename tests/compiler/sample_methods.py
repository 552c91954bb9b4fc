"""Constructs that read which samples a batch holds, the data that they are tried on, and the same method by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.data.batch import Batch
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.step.record import Step

SAMPLES, CLASSES, WEIGHT, LR = 22, 3, 0.3, 0.2
BASE = f"loss cross_entropy optimizer sgd {{ lr = {LR} }} "


class Table(nn.Module):
    """The last logits of every sample."""

    rows: Tensor

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        rows = scale * torch.arange(SAMPLES * CLASSES, dtype=torch.float64).sin()
        self.register_buffer("rows", rows.reshape(SAMPLES, CLASSES))

    def write(self, ids: Sequence[int], logits: Tensor) -> None:
        for i, row in zip(ids, logits, strict=True):
            self.rows[i] = row


class Keep(Observer):
    """Writes the logits of a step into the table, those of all replicas."""

    sample_ids: ClassVar[bool] = True

    def __init__(self, table: Table) -> None:
        self.table = table
        self.seen: list[tuple[Tensor, Tensor]] = []

    def see(self, forward: Seen) -> None:
        self.seen.append((forward.sample_ids.clone(), forward.view(0).clone()))

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        if not self.seen:
            return {}
        ids, logits = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        if replicas is not None:
            numbers = torch.cat([ids[:, None].double(), logits], 1).flatten().tolist()
            rows = replicas.gather_rows(numbers).reshape(-1, 1 + CLASSES)
            ids, logits = rows[:, 0].long(), rows[:, 1:]
        self.table.write(ids.tolist(), logits)
        return {"first": float(ids[0]), "sum": float(ids.sum())}

    def forget(self) -> None:
        self.seen.clear()


class History(Construct):
    """Adds the squared distance of a sample's logits to those that it gave last."""

    kind: ClassVar = "regularize"
    name: ClassVar = "history"
    effects: ClassVar = (
        Effect("perturb", "keep a table", ("forward",), ("forward",)),
        Effect("forward", "compare", ("forward",), ("loss",)),
        Effect("observe", "write the table", ("forward",), ("metrics",)),
    )
    scale: float = 0.0

    def lower(self, to: Lowering) -> None:
        table = Table(self.scale)
        to.companion("table", module=table)
        to.term(
            lambda f: WEIGHT * distance(f.view(0), f.tensors["rows"][f.sample_ids]),
            over="examples",
            tensors={"rows": table.rows},
            sample_ids=True,
        )
        to.observe(Keep(table))


class Shift(BatchTransform):
    """Adds to every input a number of its sample."""

    name = "shifted"
    sample_ids: ClassVar[bool] = True

    def change(
        self, batch: Batch, step: Step, draw: torch.Generator, sample_ids: Tensor | None
    ) -> Batch:
        assert sample_ids is not None
        return shifted(batch, sample_ids)


class Shifted(Construct):
    """Changes batches by their sample ids."""

    kind: ClassVar = "perturb"
    name: ClassVar = "shifted"
    effects: ClassVar = (Effect("perturb", "shift inputs", ("inputs",), ("inputs",)),)

    def lower(self, to: Lowering) -> None:
        to.batch(Shift())


def shifted(batch: Batch, ids: Tensor) -> Batch:
    return batch[0] + ids[:, None].double().cos(), batch[1]


class Reads(Construct):
    """Observes ids that it has not asked for, or those of evaluations."""

    kind: ClassVar = "observe"
    name: ClassVar = "reads"
    effects: ClassVar = (Effect("observe", "read", ("forward",), ("metrics",)),)
    of: str = "training"
    asks: bool = False

    def lower(self, to: Lowering) -> None:
        observer = Keep(Table())
        observer.sample_ids = self.asks  # type: ignore[misc]
        to.observe(observer, of=self.of)  # type: ignore[arg-type]


def distance(logits: Tensor, last: Tensor) -> Tensor:
    return (logits - last).square().sum(-1).mean()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.body(x))))
        return logits


def net() -> Net:
    return Net().double()


class Split:
    """Samples by index; it notes which were read."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 4, generator=made, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (SAMPLES,), generator=made)
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, indices: Sequence[int]) -> Batch:
        self.asked.append(list(indices))
        return self.rows(indices)

    def rows(self, indices: Sequence[int]) -> Batch:
        return self.x[list(indices)], self.y[list(indices)]


class Data:
    evaluation, tokens_per_sample = None, 1

    def __init__(self, prefetch: bool = False) -> None:
        self.train, self.prefetch = Split(), prefetch


def data(prefetch: bool = False) -> Data:
    return Data(prefetch)


def spec(text: str = BASE, scale: float = 0.0, **times: Any) -> Spec:
    checked = trainc.check(text).spec
    assert checked is not None
    return Spec((*checked.clauses, Clause(History(scale=scale), **times)))


class Hand:
    """The method as a loop by hand."""

    def __init__(self, scale: float = 0.0, rho: float = 0.0) -> None:
        self.model, self.table, self.rho = net(), Table(scale).rows, rho
        self.terms: list[float] = []

    def loss(self, batch: Batch, ids: Sequence[int], acts: bool) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(batch[0])
        term = WEIGHT * distance(logits, self.table[list(ids)]) if acts else torch.zeros(())
        return cross_entropy(logits, batch[1]) + term, term, logits.detach()

    def step(self, batch: Batch, ids: Sequence[int], acts: bool = True) -> None:
        weights = list(self.model.parameters())
        shifts = [torch.zeros_like(w) for w in weights]
        if self.rho:
            first = torch.autograd.grad(self.loss(batch, ids, acts)[0], weights)
            norm = torch.stack([g.norm() for g in first]).norm()
            shifts = [self.rho * g / norm for g in first]
        with torch.no_grad():
            for w, shift in zip(weights, shifts, strict=True):
                w.add_(shift)
        loss, term, logits = self.loss(batch, ids, acts)
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, shift, g in zip(weights, shifts, grads, strict=True):
                w.sub_(shift + LR * g)
        self.terms.append(float(term.detach()))
        if acts:
            for i, row in zip(ids, logits, strict=True):
                self.table[i] = row


def assert_equal(program: Program, hand: Hand, terms: Iterable[float]) -> None:
    assert list(terms) == pytest.approx(hand.terms, rel=1e-9)
    for got, want in zip(program.module.parameters(), hand.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(table_of(program), hand.table, rtol=1e-9, atol=1e-12)


def table_of(program: Program) -> Tensor:
    found: Tensor = program.state_dict()["actions"]["history table"]["rows"]
    return found


def batches(*sizes: int, seed: int = 0) -> list[tuple[Batch, Tensor]]:
    """Return batches of samples drawn at random, each at most once in a batch."""
    made, split = torch.Generator().manual_seed(seed), Split()
    drawn = [torch.randperm(SAMPLES, generator=made)[:size] for size in sizes]
    return [(split.rows(ids.tolist()), ids) for ids in drawn]
