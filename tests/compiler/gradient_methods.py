"""Constructs that change gradients, as somebody else would write them, and the model they are tried on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
TRUST = 0.02


TIMES: list[tuple[dict[str, Duration], Callable[[int], bool]]] = [
    ({"start": Duration(2, "steps")}, lambda t: t >= 2),
    ({"stop": Duration(2, "steps")}, lambda t: t < 2),
    ({"every": Duration(3, "steps")}, lambda t: t % 3 == 0),
]
"""Times of a clause, and whether it is open in a step."""


class Method(Construct):
    """Base of the constructs below."""

    kind: ClassVar = "lr"
    cite: ClassVar = "-"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "all"
    effects: ClassVar = (Effect("gradients", "change", ("gradient", "params"), ("gradient",)),)
    make: ClassVar[type["Change"]]

    def lower(self, to: Lowering) -> None:
        to.gradient(self.make(to.label), [entry.name for entry in to.parameters()])


class Change(GradientTransform):
    """Base of the transforms below; keeps what it was given."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        self.seen.append({g.name: (g.weight.clone(), g.gradient.clone()) for g in gradients})
        for one in gradients:
            self.change_one(one, step)

    def change_one(self, one: ParameterGradient, step: Step) -> None:
        """Change one gradient in place."""


class LarsChange(Change):
    """You, Gitman and Ginsburg 2017: g becomes trust |w| / (|g| + decay |w|) (g + decay w), before the momentum."""

    def change_one(self, one: ParameterGradient, step: Step) -> None:
        lars(one.weight, one.gradient, one.weight_decay)


def lars(w: Tensor, g: Tensor, decay: float) -> None:
    """Change `g` in place; the optimizer adds the decay itself, so that here only its factor is made up for."""
    factor = TRUST * w.norm() / (g.norm() + decay * w.norm())
    g.add_(w, alpha=decay).mul_(factor).sub_(w, alpha=decay)


class Lars(Method):
    name: ClassVar = "lars"
    make: ClassVar = LarsChange


class ProjectChange(Change):
    """Takes out of each gradient what lies along the one before it, whose memory is the state."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.last: dict[str, Tensor] = {}

    def change_one(self, one: ParameterGradient, step: Step) -> None:
        before, now = self.last.get(one.name), one.gradient.clone()
        if before is not None:
            one.gradient.sub_((before * now).sum() / before.square().sum() * before)
        self.last[one.name] = now

    def state_dict(self) -> ActionState:
        return dict(self.last)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = dict(state)


class Project(Method):
    name: ClassVar = "project"
    make: ClassVar = ProjectChange


class SignsChange(Change):
    """The sign of every entry: each is changed by itself."""

    elementwise: ClassVar = True

    def change_one(self, one: ParameterGradient, step: Step) -> None:
        one.gradient.sign_()


class Signs(Method):
    name: ClassVar = "signs"
    make: ClassVar = SignsChange


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batch(seed: int, rows: int = 7) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=g)


def spec(text: str, *clauses: Clause | Construct) -> Spec:
    base = trainc.check(text).spec
    assert base is not None
    return Spec((*base.clauses, *(c if isinstance(c, Clause) else Clause(c) for c in clauses)))


def changes(program: Any) -> list[Change]:
    return [action for action in program._machine.actions if isinstance(action, Change)]
