"""Adapters of an nn.Sequential: it runs its items, and the adapter is none of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.driver.adaptation import base_inventory
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.model.inventory import build_inventory

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.1 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS.roll(-1, 1))
CLAUSES = {
    "parallel": "parallel on SELECTED { rank = 3, init = xavier }",
    "apt": "apt on SELECTED { tokens = 3, rank = 2, init = published }",
    "prompt": "prompt on SELECTED { tokens = 2 }",
}
every_clause = pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)


class ThroughItems(nn.Sequential):
    """Passes a factor to each item, which nn.Sequential does not."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        for i in range(len(self)):
            x = self[i](x) * factor
        last: Tensor = self[-1](x)
        return x + last


class Mix(nn.Module):
    """Lets tokens see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh().mean(1, keepdim=True)


class Mlp(nn.Sequential):
    """A sequence with a constructor of its own, as that of torchvision's transformer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), Mix())


class Block(nn.Module):
    """A residual block whose MLP is a sequence, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = Mlp(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.mlp(self.norm(x))
        return found


def model(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    """Return an embedding, two blocks in a sequence, and a head."""
    torch.manual_seed(0)
    if kind is ThroughItems:
        square = kind(nn.Linear(16, 16), nn.Linear(16, 16))
        return nn.Sequential(nn.Embedding(24, 16), square, nn.Linear(16, 24)).double()
    blocks = nn.Sequential(Block(), Block())
    return nn.Sequential(nn.Embedding(24, 16), blocks, nn.Linear(16, 24)).double()


def on(clause: str, selected: str = '"1.*.mlp"') -> str:
    return BASE + "adapt " + clause.replace("SELECTED", selected)


@every_clause
@pytest.mark.parametrize("selected", ['"1.*.mlp"', '"1"'])
def test_a_sequence_computes_its_items_and_the_adapter_beside_them(
    clause: str, selected: str
) -> None:
    """The same adapter of a module around the same layers, which is no sequence, gives the same."""

    class Around(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

    def around(net: nn.Module) -> nn.Module:
        wrapped: Any = net
        if selected == '"1"':
            wrapped[1] = Around(wrapped[1])
        else:
            for block in wrapped[1]:
                block.mlp = Around(block.mlp)
        return net

    programs = [
        trainc.compile(on(clause, selected), net, executor=executor)
        for executor in ("graph", "module")
        for net in (model(), around(model()))
    ]
    losses = [[program.step(BATCH)["loss"] for _ in range(4)] for program in programs]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-12)
    assert len(set(losses[0])) == 4
    bare = trainc.compile(BASE, model())
    assert losses[0][3] != bare.step(BATCH)["loss"]
    one, two = (dict(p.module.named_parameters()) for p in programs[:2])
    for (name, a), b in zip(one.items(), two.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_a_sequence_of_ones_own_finds_its_items_alone() -> None:
    clause = CLAUSES["parallel"].replace("init = xavier", "init = up_zero")
    net: Any = model(ThroughItems)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    before = [net[1](x, 2.0), len(net[1]), [*net[1]], net[1][-1], net[1][0]]
    module: Any = trainc.compile(on(clause, '"1"'), net).module
    after = [module[1](x, 2.0), len(module[1]), [*module[1]], module[1][-1], module[1][0]]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert [*module[1][:1]] == [net[1][0]]
    assert [name for name, _ in module[1].named_children()] == ["0", "1", "parallel"]


@every_clause
def test_the_base_keeps_its_places_and_the_sequence_its_class(clause: str) -> None:
    net = model()
    before = build_inventory(net)
    trainc.compile(on(clause, '"1"'), net)
    assert base_inventory(net) == before
    after = build_inventory(net)
    for entry in before.modules:
        assert after.module[entry.name].place == entry.place, entry.name
        assert after.module[entry.name].types == entry.types, entry.name
    (one,) = adapters_of(net)
    assert isinstance(one.layer, nn.Sequential)
    one.remove()
    assert type(one.layer) is nn.Sequential


def test_copies_and_pickles_of_an_adapted_sequence_run_their_own_adapter() -> None:
    program = trainc.compile(on(CLAUSES["parallel"]), model())
    program.step(BATCH)
    module, buffer = program.module.eval(), io.BytesIO()
    want = module(IDS)
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(IDS), want)
        with torch.no_grad():
            for one in adapters_of(twin):
                for parameter in one.adapter.parameters():
                    parameter.add_(1)
        assert not torch.equal(twin(IDS), want)
        assert torch.equal(module(IDS), want)
        for one in adapters_of(twin):
            one.remove()
        assert torch.equal(twin(IDS), model()(IDS))


def test_a_sequence_that_a_program_checkpoints_stays_its_own_when_its_adapter_goes() -> None:
    text = on(CLAUSES["parallel"]).replace(
        "seed = 3", 'seed = 3, checkpoint_activations = "1.*.mlp"'
    )
    plain, program = trainc.compile(on(CLAUSES["parallel"]), model()), trainc.compile(text, model())
    assert [program.step(BATCH)["loss"] for _ in range(3)] == [
        plain.step(BATCH)["loss"] for _ in range(3)
    ]
    for one in adapters_of(program.module):
        one.remove()
    program.unbind()
    assert torch.equal(program.module(IDS), model()(IDS))


def test_a_mistake_gives_the_sequence_its_class_back() -> None:
    net: Any = model()
    with pytest.raises(trainc.SpecError):
        trainc.compile(on(CLAUSES["parallel"]) + 'lr layer_decay on "no" { decay = 0.5 }', net)
    assert {type(block.mlp) for block in net[1]} == {Mlp}


def test_noise_of_two_views_is_on_what_is_added() -> None:
    noise = 'regularize pace on "1.0.mlp" { sigma = 0.3, weight = 0.1 }'
    runs = []
    for executor in ("graph", "module"):
        program = trainc.compile(on(CLAUSES["parallel"]) + noise, model(), executor=executor)
        runs.append([program.step(BATCH)["consistency"] for _ in range(3)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)
    assert all(value > 0 for value in runs[0])


@pytest.mark.parametrize("own", [False, True])
def test_a_list_is_refused_with_what_to_select(own: bool) -> None:
    class Listed(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for one in self:
                x = one(x)
            return x

    net = nn.Sequential((Listed if own else nn.ModuleList)([nn.Linear(4, 4)]))
    with pytest.raises(trainc.SpecError, match="one more of them" if own else "never called"):
        trainc.compile(BASE + 'adapt parallel on "0" { rank = 2 }', net)
