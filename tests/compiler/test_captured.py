"""What modules give in the passes of a step equals forward hooks in eager training, for terms and for observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trainc
from tests.conformance import divided, tiny_gpt, tokens
from trainc.compiler.errors import GraphRefused, SiteError
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.selectors import Glob, Selector, Union
from trainc.dsl.values.value_json import Duration
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.observer import Observer, Seen

Value = Callable[[Mapping[str, Any], Tensor], Tensor]
"""A term of what the modules gave, and of the targets."""


class Kept(Construct):
    """A term of what the selected modules give."""

    kind: ClassVar = "regularize"
    name: ClassVar = "kept"
    targets: ClassVar = "modules"
    effects: ClassVar = (Effect("forward", "read modules", ("forward",), ("loss",)),)
    value: ClassVar[Any]

    def lower(self, to: Lowering) -> None:
        to.capture([entry.name for entry in to.modules()])
        to.term(lambda f: type(self).value(f.captured, f.targets), over="examples")


class Watch(Observer):
    """Counts the calls of the captured modules, and sums what they gave."""

    def __init__(self) -> None:
        self.calls = self.total = 0.0

    def see(self, forward: Seen) -> None:
        for tensors in forward.captured.values():
            self.calls += len(tensors)
            self.total += sum(float(one.sum()) for one in tensors)
            assert not any(one.requires_grad for one in tensors)

    def found(self, replicas: object = None) -> dict[str, float]:
        return {"calls": self.calls, "total": self.total}

    def forget(self) -> None:
        self.calls = self.total = 0.0


class Watched(Construct):
    """Reads what the selected modules give."""

    kind: ClassVar = "observe"
    name: ClassVar = "watched"
    targets: ClassVar = "modules"
    effects: ClassVar = (Effect("observe", "read modules", ("forward",), ("metrics",)),)

    def lower(self, to: Lowering) -> None:
        to.capture([entry.name for entry in to.modules()])
        to.observe(Watch())


class Model(nn.Module):
    """A module that is called twice, one with a tuple, one that is the identity, and one that never runs."""

    def __init__(
        self, checkpointed: Literal["reentrant", "other"] | None = None, in_place: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mix = nn.Linear(4, 6), nn.Linear(6, 6)
        self.plain, self.pair = nn.Identity(), Pair()
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        self.checkpointed, self.in_place = checkpointed, in_place

    def mixed(self, h: Tensor) -> Tensor:
        return torch.tanh(self.mix(h))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = h.tanh_() if self.in_place else h.tanh()
        for _ in range(2):
            if self.checkpointed is None:
                h = self.mixed(h)
            else:
                h = checkpoint(self.mixed, h, use_reentrant=self.checkpointed == "reentrant")
        first, second = self.pair(self.plain(h))
        logits: Tensor = self.head(first + second)
        return logits


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.own(x), x


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=made, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=made)


def first_of(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def mean_abs(captured: Mapping[str, Any], _: Tensor) -> Tensor:
    tensors = [one for module in sorted(captured) for one in captured[module]]
    return sum((one.abs().mean() for one in tensors), start=torch.zeros(()))


def contrast(captured: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Pull the features of a class together, in inner products of the mini-batch."""
    (tensors,) = captured.values()
    z = F.normalize(tensors[-1].flatten(1), dim=-1)
    same = targets.reshape(len(z), -1)[:, 0]
    return F.mse_loss(z @ z.T, (same[:, None] == same[None]).to(z.dtype))


def by_hand(
    made: nn.Module, batches: Iterable[Batch], names: Iterable[str], value: Value, start: int
) -> list[float]:
    """Train with forward hooks, and return the terms."""
    kept: dict[str, list[Tensor]] = {}
    for name in names:
        module = made.get_submodule(name)
        module.register_forward_hook(
            lambda _, __, y, name=name: kept.setdefault(name, []).append(first_of(y))
        )
    terms = []
    for step, (x, y) in enumerate(batches):
        kept.clear()
        logits = made(x)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        found = {name: [*tensors] for name, tensors in kept.items()}
        term = value(found, y) if step >= start else torch.zeros(())
        terms.append(float(term.detach()))
        made.zero_grad()
        (loss + term).backward()
        torch.optim.SGD(made.parameters(), 0.1).step()
    return terms


def either(names: tuple[str, ...]) -> Selector:
    """Return a selector of these modules."""
    first, *others = names
    return Union(Glob(first), either(tuple(others))) if others else Glob(first)


def spec(construct: type[Construct], on: tuple[str, ...], start: int = 0) -> Spec:
    base = trainc.check("loss cross_entropy optimizer sgd { lr = 0.1 }").spec
    assert base is not None
    begin = Duration(start, "steps") if start else None
    return Spec((*base.clauses, Clause(construct(), on=either(on), start=begin)))


CASES: dict[str, tuple[Value, tuple[str, ...]]] = {
    "twice": (mean_abs, ("mix",)),
    "tuple": (mean_abs, ("pair",)),
    "identity": (contrast, ("plain",)),
    "nested": (mean_abs, ("pair", "pair.own")),
    "several": (mean_abs, ("body", "mix", "pair")),
}


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_forward_hooks(name: str, executor: Any, start: int) -> None:
    value, modules = CASES[name]
    Kept.value = value
    wanted = Model().double()
    terms = by_hand(wanted, map(batch, range(4)), modules, value, start)
    program = trainc.compile(spec(Kept, modules, start), Model().double(), executor=executor)
    said = [program.step(batch(seed))["kept"] for seed in range(4)]
    assert said == pytest.approx(terms, rel=1e-12)
    for (label, got), want in zip(
        program.module.named_parameters(), wanted.parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=label)


@pytest.mark.parametrize("executor", ["auto", "module"])
@pytest.mark.parametrize("kind", ["reentrant", "other"])
def test_a_checkpoint_is_not_another_call_and_lets_gradients_through(
    kind: Any, executor: Any
) -> None:
    Kept.value = mean_abs
    plain, checkpointed = (
        trainc.compile(spec(Kept, ("mix",)), Model(again).double(), executor=executor)
        for again in (None, kind)
    )
    for seed in range(3):
        assert checkpointed.step(batch(seed)) == pytest.approx(plain.step(batch(seed)), rel=1e-12)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_result_is_kept_as_it_is_before_it_is_changed_in_place(executor: Any) -> None:
    Kept.value = mean_abs
    plain, changed = (
        trainc.compile(spec(Kept, ("body",)), Model(None, again).double(), executor=executor)
        for again in (False, True)
    )
    for seed in range(3):
        assert changed.step(batch(seed)) == pytest.approx(plain.step(batch(seed)), rel=1e-12)


def test_blocks_of_a_language_model_in_both_executors() -> None:
    Kept.value = contrast
    graph, modules = (
        trainc.compile(spec(Kept, ("blocks.0",)), tiny_gpt().double(), executor=executor)
        for executor in ("graph", "module")
    )
    for seed in range(3):
        parts = divided(tokens(seed), (2, 4))
        assert graph.step(parts) == pytest.approx(modules.step(parts), rel=1e-12)
    assert graph.graph_refused is None
    for got, want in zip(graph.module.parameters(), modules.module.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_observers_read_what_is_captured(executor: Any) -> None:
    program = trainc.compile(spec(Watched, ("mix",), 1), Model().double(), executor=executor)
    assert "watched.calls" not in program.step(batch(0))
    kept: list[Tensor] = []
    eager = Model().double()
    eager.load_state_dict(program.module.state_dict())
    eager.mix.register_forward_hook(lambda _, __, y: kept.append(y.detach()))
    metrics = program.step(batch(1))
    eager(batch(1)[0])
    assert metrics["watched.calls"] == 2
    assert metrics["watched.total"] == pytest.approx(sum(float(y.sum()) for y in kept), rel=1e-12)


def test_what_an_observer_finds_is_reported_under_the_label_of_its_clause() -> None:
    base = spec(Watched, ("mix",))
    (watched,) = (clause for clause in base.clauses if isinstance(clause.construct, Watched))
    others = [clause for clause in base.clauses if clause is not watched]
    named = Spec((*others, Clause(Watched(), on=watched.on, label="mine")))
    metrics = trainc.compile(named, Model().double()).step(batch(0))
    assert {"mine.calls", "mine.total"} <= metrics.keys()


@pytest.mark.parametrize("executor", ["auto", "graph", "module"])
def test_a_module_that_does_not_run_is_an_error(executor: Any) -> None:
    Kept.value = mean_abs
    program: Program = trainc.compile(spec(Kept, ("unused",)), Model().double(), executor=executor)
    with pytest.raises((SiteError, GraphRefused), match=r"`unused`.* did not run"):
        program.step(batch(0))
