"""Layer-wise decay against its definition and the convention of BEiT and timm."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.lr.layer_decay import LayerDecay
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.dsl.values.value_json import Number
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.record import Signals


def model(blocks: int = 3) -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "blocks": nn.Sequential(*(nn.Linear(4, 4) for _ in range(blocks))),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 2),
        }
    )


def factors(construct: LayerDecay, net: nn.Module, *, every: bool = False) -> dict[str, float]:
    inventory = build_inventory(net)
    clause = BoundClause(
        construct,
        "decay",
        tuple(p.name for p in inventory.parameters),
        every=TimeSpan(5, "steps") if every else None,
    )
    lowered = LoweredMethod()
    construct.lower(
        Lowering(
            clause, LoweringContext(net, inventory, UnitConversion(), None, Signals()), lowered
        )
    )
    assert not lowered.actions
    assert all(len(lr_factors) == 1 for lr_factors in lowered.lr_factors.values())
    return {name: lr_factors[0].factor for name, lr_factors in lowered.lr_factors.items()}


def test_the_head_keeps_its_rate_and_the_embeddings_are_slowest() -> None:
    assert factors(LayerDecay(decay=Number(0.5)), model()) == {
        "embed.weight": 0.5**4,
        **{f"blocks.{i}.{leaf}": 0.5 ** (3 - i) for i in range(3) for leaf in ("weight", "bias")},
        **{f"{name}.{leaf}": 1.0 for name in ("norm", "head") for leaf in ("weight", "bias")},
    }


def test_parameters_of_a_level_share_one_factor() -> None:
    net = model()
    inventory, lowered = build_inventory(net), LoweredMethod()
    names = tuple(p.name for p in inventory.parameters)
    construct = LayerDecay(decay=Number(0.5))
    clause = BoundClause(construct, "decay", names)
    construct.lower(
        Lowering(
            clause, LoweringContext(net, inventory, UnitConversion(), None, Signals()), lowered
        )
    )
    assert len({id(lr_factors[0]) for lr_factors in lowered.lr_factors.values()}) == 5
    assert {
        (s.policy, s.unit) for lr_factors in lowered.lr_factors.values() for s in lr_factors
    } == {("decay", f"level {level}") for level in range(5)}


def test_the_floor_is_the_smallest_factor() -> None:
    found = factors(LayerDecay(decay=Number(0.5), floor=0.2), model())
    assert found["embed.weight"] == found["blocks.0.weight"] == 0.2
    assert found["blocks.1.weight"] == 0.25


@given(st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0, 60), st.integers(0, 60))
def test_the_factor_is_the_definition(decay: float, floor: float, level: int, above: int) -> None:
    construct = LayerDecay(decay=Number(decay), floor=floor)
    expected = construct.reference(level, level + above, decay)
    assert construct.factor(level, level + above, decay) == pytest.approx(expected, rel=1e-12)


def test_a_decay_of_one_leaves_every_rate_bit_for_bit() -> None:
    assert LayerDecay(decay=Number(1)).identity_setting()
    assert not LayerDecay(decay=Number(0.99)).identity_setting()
    assert set(factors(LayerDecay(decay=Number(1.0)), model()).values()) == {1.0}


@pytest.mark.parametrize("wrong", [{"decay": 0.0}, {"decay": 1.5}, {"decay": 0.5, "floor": -1.0}])
def test_fields_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LayerDecay(**wrong)


def problems(inventory: Inventory, names: set[str]) -> list[str]:
    chosen = tuple(p for p in inventory.parameters if p.name in names)
    found = LayerDecay(decay=Number(0.5)).validate_targets(Targets(inventory, (), chosen))
    return [problem.rule for problem in found]


def test_a_selection_of_the_head_alone_is_told_to_do_nothing() -> None:
    inventory = build_inventory(model())
    assert problems(inventory, {"head.weight", "norm.bias"}) == ["no-effect"]
    assert problems(inventory, {"head.weight", "blocks.2.weight"}) == []


def test_a_clause_with_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="whole run"):
        factors(LayerDecay(decay=Number(0.5)), model(), every=True)


def test_a_decay_that_moves_is_the_definition_in_every_step() -> None:
    """Against a loop of SGD by hand in float64, at a floor."""
    nets = [gpt(layers=3, width=16, heads=2, context=8, vocabulary=11).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    clause = "lr layer_decay { decay = 0.5 + 0.5 * progress, floor = 0.2 }"
    spec = f"loss cross_entropy optimizer sgd {{ lr = 0.5 }} run {{ length = 4 steps }} {clause}"
    program = trainc.compile(spec, nets[0])
    places = {p.name: p.place for p in build_inventory(nets[1]).parameters}
    ids = torch.randint(0, 11, (4, 9))
    for step in range(4):
        program.step((ids[:, :-1], ids[:, 1:]))
        logits = nets[1](ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        names = dict(nets[1].named_parameters())
        found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        for (name, weight), gradient in zip(names.items(), found, strict=True):
            above = places[name].levels - places[name].level
            factor = max((0.5 + 0.5 * step / 4) ** above, 0.2)
            if gradient is not None:
                weight.data.sub_(gradient, alpha=0.5 * factor)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    last = program.plan.schedules[-1]["values"]
    assert last["layer_decay decay"] == 1.0
    told = next(line for line in program.summary() if line.startswith("layer_decay"))
    assert f"factors {0.875**4:.3g} to 1 in the last step on" in told


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after one SGD step at rate 1, by the program and by definition."""
    torch.manual_seed(0)
    net = gpt(layers=3, width=16, heads=2, context=8, vocabulary=11).double()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    spec = "loss cross_entropy optimizer sgd { lr = 1 } lr layer_decay on all { decay = 0.7 }"
    program = trainc.compile(spec, net)
    ids = torch.randint(0, 11, (4, 9))
    program.loss((ids[:, :-1], ids[:, 1:])).backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()
    }
    program.update()
    places = {p.name: p.place for p in build_inventory(net).parameters}
    construct = LayerDecay(decay=Number(0.7))
    reference = {
        name: w
        - construct.reference(places[name].level, places[name].levels, 0.7) * gradients[name]
        for name, w in start.items()
    }
    return {name: p.detach() for name, p in net.named_parameters()}, reference
