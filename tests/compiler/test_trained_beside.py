"""A module that trains beside the model: an adapter that changes nothing, whose parameters a loss term reads."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.test_captured import Model, batch, either
from trainc.compiler.lower.adapting import Adapting
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.method.term import Forward
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause


class AuxiliaryHead(Construct, AdapterRule):
    """A second classifier on the features of the selected layers; it trains, and is thrown away at the end."""

    kind: ClassVar = "regularize"
    name: ClassVar = "auxiliary"
    targets: ClassVar = "modules"
    effects: ClassVar = (Effect("forward", "classify features", ("forward",), ("loss",)),)

    def adapt(self, to: Adapting) -> None:
        for entry in to.modules():
            to.add(entry.name, lambda: {"head": nn.Linear(6, 3)})

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        tensor.fill_(0.1)

    def change_output(self, layer: Any, adapter: Any, inputs: Any, output: Tensor) -> Tensor:
        return output

    def merge(self, layer: Any, adapter: Any) -> None:
        """Throw the head away."""

    def lower(self, to: Lowering) -> None:
        names = [entry.name for entry in to.modules()]
        to.capture(names)

        def value(forward: Forward) -> Tensor:
            losses = []
            for name in names:
                weight, bias = (
                    forward.parameters[f"{name}.auxiliary.head.{part}"]
                    for part in ("weight", "bias")
                )
                logits = F.linear(forward.captured[name][-1], weight, bias)
                losses.append(F.cross_entropy(logits, forward.targets))
            return torch.stack(losses).sum()

        to.term(value, over="targets")


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_head_that_trains_beside_the_model(executor: Any) -> None:
    base = trainc.check("loss cross_entropy optimizer sgd { lr = 0.1 }").spec
    assert base is not None
    spec = Spec((*base.clauses, Clause(AuxiliaryHead(), on=either(("mix",)))))
    program = trainc.compile(spec, Model().double(), executor=executor)
    wanted, head = Model().double(), nn.Linear(6, 3).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(0.1)
    kept: list[Tensor] = []
    wanted.mix.register_forward_hook(lambda _, __, y: kept.append(y))
    optimizer = torch.optim.SGD([*wanted.parameters(), *head.parameters()], 0.1)
    for seed in range(3):
        x, y = batch(seed)
        loss = F.cross_entropy(wanted(x), y)
        loss = loss + F.cross_entropy(head(kept[-1]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        program.step((x, y))
    trained = dict(program.module.named_parameters())
    expected = dict(wanted.named_parameters())
    expected |= {f"mix.auxiliary.head.{n}": p for n, p in head.named_parameters()}
    assert trained.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(trained[name], want, rtol=1e-12, atol=1e-14, msg=name)
    state = copy.deepcopy(program.state_dict())
    assert "mix.auxiliary.head.weight" in state["model"]
    program.merge()
    assert dict(program.module.named_parameters()).keys() == dict(wanted.named_parameters()).keys()
