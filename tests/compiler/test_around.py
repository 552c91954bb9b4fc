"""What surrounds the passes of a step, by a construct that changes inputs along the sign of their gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
SIZE = 0.1


class Signs(Construct):
    """Trains at x + 0.1 sign(dL/dx)."""

    kind: ClassVar = "perturb"
    name: ClassVar = "signs"
    cite: ClassVar = "Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv:1412.6572"
    effects: ClassVar = (Effect("perturb", "change the inputs", ("inputs",), ("inputs",)),)

    def lower(self, to: Lowering) -> None:
        to.around(Attack(to.label))


class Attack(Around):
    def __init__(self, name: str) -> None:
        self.name = name

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        found, inputs = gradients(of="inputs"), gradients.inputs
        for gradient, x in zip(found, inputs, strict=True):
            for g, t in zip(flat(gradient), flat(x), strict=True):
                if g is not None:
                    t.add_(SIZE * g.sign())
        yield


def flat(tree: Any) -> Sequence[Any]:
    return tuple(tree.values()) if isinstance(tree, dict) else (tree,)


def program(model: nn.Module, executor: Any = "module", **clause: Any) -> Any:
    base = trainc.check("loss cross_entropy optimizer sgd { lr = 0.3 }").spec
    assert base is not None
    return trainc.compile(
        Spec((*base.clauses, Clause(Signs(), **clause))), model, executor=executor
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()


def data(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(7, 6, generator=g, dtype=torch.float64), torch.randint(
        0, 4, (7,), generator=g
    )


def hand(model: nn.Module, batch: Batch, sizes: Sequence[int]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    buffers = [b.clone() for b in model.buffers()]
    moved = []
    for x, y in zip(*(part.split(list(sizes)) for part in batch), strict=True):
        leaf = x.clone().requires_grad_()
        (cross_entropy(model(leaf), y) * (len(y) / 7)).backward()
        assert leaf.grad is not None
        moved.append((x + SIZE * leaf.grad.sign(), y))
    model.zero_grad()
    with torch.no_grad():
        for buffer, kept in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    for x, y in moved:
        (cross_entropy(model(x), y) * (len(y) / 7)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize(
    ("executor", "scale"), [("module", False), ("module", True), ("graph", False)]
)
def test_inputs_are_changed_as_by_hand(executor: Any, sizes: Sequence[int], scale: bool) -> None:
    theirs, ours = net(), net()
    made = program(ours, executor)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale else None
    for i in range(3):
        batch = data(i)
        before = batch[0].clone()
        hand(theirs, batch, sizes)
        made.step([*zip(*(part.split(list(sizes)) for part in batch), strict=True)], scaler)
        if scaler is not None:
            scaler.update()
        assert torch.equal(batch[0], before), "the user's tensors are the user's"
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


class Mixed(nn.Module):
    """Two inputs, of which one has no gradient, and one more that has no effect."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fc = nn.Embedding(5, 4).double(), nn.Linear(6, 4).double()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, ids: Tensor, x: Tensor, unused: Tensor) -> Tensor:
        self.seen.append((ids.detach().clone(), x.detach().clone(), unused.detach().clone()))
        return self.fc(x) + self.words(ids)  # type: ignore[no-any-return]


def test_inputs_by_name_keep_their_form() -> None:
    model = Mixed()
    x, y = data(0)
    ids = y % 5
    program(model).step(({"ids": ids, "x": x, "unused": x}, y))
    (first, second) = model.seen
    assert torch.equal(second[0], ids)
    assert torch.equal(second[2], x)
    assert first[1].equal(x)
    torch.testing.assert_close((second[1] - x).abs(), torch.full_like(x, SIZE))


def test_inputs_without_floats_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4)).double()
    with pytest.raises(ValueError, match="the inputs have no tensor of floating point"):
        program(model).step((torch.tensor([1, 2]), torch.tensor([0, 1])))
