"""DELTA: the distance by torch's mse_loss, and training equal to a loop by hand with features of a frozen start."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.regularize.outputs.delta import Delta
from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.action import ClauseFailed

SPEC = "loss cross_entropy optimizer sgd { lr = 0.3 } run { length = 20 steps, seed = 1 } regularize delta"
ON = ' on "conv" | "norm" '
OMEGAS = {"conv": torch.tensor([0.5, 2.0, 1.0]), "norm": torch.tensor([1.0, 0.0, 3.0])}


class Net(nn.Module):
    """A convolution and a norm, whose outputs are compared, and a head; the norm is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 2), nn.LayerNorm(3), nn.Linear(3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x).relu().mean((2, 3)))
        logits: Tensor = self.head(self.norm(pooled.tanh()))
        return logits


def omegas() -> Mapping[str, Tensor]:
    return OMEGAS


def too_few() -> Mapping[str, Tensor]:
    return OMEGAS | {"conv": torch.ones(2)}


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 1, 3, 3, generator=made, dtype=torch.float64)
    return x, torch.randint(4, (6,), generator=made)


def features(made: Net, x: Tensor) -> list[tuple[str, Tensor]]:
    conv = made.conv(x)
    first = made.norm(conv.relu().mean((2, 3)))
    return [("conv", conv), ("norm", first), ("norm", made.norm(first.tanh()))]


def distance(made: Net, start: Net, x: Tensor, weighted: bool, mean: bool) -> Tensor:
    """Return the term by its definition, channel by channel."""
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        fixed = features(start, x)
    for (name, own), (_, other) in zip(features(made, x), fixed, strict=True):
        for j in range(3):
            omega = float(OMEGAS[name][j]) if weighted else 1.0
            part = F.mse_loss(own[:, j], other[:, j], reduction="sum") / len(x)
            total = total + omega * part / (own[0].numel() if mean else 1)
    return total


@pytest.mark.parametrize(
    ("executor", "sizes", "fields"),
    [
        ("graph", (), ""),
        ("graph", (1, 2, 3), f', omega = "{__name__}:omegas"'),
        ("module", (1, 2, 3), f', reduction = mean, omega = "{__name__}:omegas"'),
    ],
    ids=["graph", "micro-batches", "module"],
)
def test_training_is_a_loop_by_hand(executor: Any, sizes: Any, fields: str) -> None:
    wanted = Net().double()
    start = copy.deepcopy(wanted)
    program = trainc.compile(
        f"{SPEC}{ON}{{ weight = 0.7{fields} }}", Net().double(), executor=executor
    )
    for given in map(batch, range(3)):
        said = program.step(divided(given, sizes) if sizes else given)
        wanted.zero_grad()
        term = distance(wanted, start, given[0], "omega" in fields, "mean" in fields)
        (F.cross_entropy(wanted(given[0]), given[1]) + 0.7 * term).backward()
        torch.optim.SGD(wanted.parameters(), 0.3).step()
        assert said["delta"] == pytest.approx(float(term.detach()), rel=1e-10)
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("on", "fields", "error", "said"),
    [
        ('"conv"', f', omega = "{__name__}:too_few"', ClauseFailed, "2 weights for 3 channels"),
        ('"unused"', "", SiteError, "`unused` was not called"),
    ],
)
def test_what_only_the_pass_shows_is_an_error_of_the_step(
    on: str, fields: str, error: Any, said: str
) -> None:
    program = trainc.compile(f"{SPEC} on {on} {{ weight = 1{fields} }}", Net(), executor="module")
    x, y = batch(0)
    with pytest.raises(error, match=said):
        program.step((x.float(), y))


def test_an_output_without_the_examples_first_is_an_error() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1).mean(1)
            return out

    program = trainc.compile(SPEC + ' on "inner" { weight = 1 }', Turned(), executor="module")
    with pytest.raises(ExampleAxisUnknown, match="needs them on the first axis"):
        program.step((torch.randn(6, 3, 4), torch.zeros(6, dtype=torch.long)))


def test_outputs_of_other_shapes_in_evaluation_mode_are_an_error() -> None:
    class Shorter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else x[:, :1]

    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Shorter(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x).mean(1))
            return out

    program = trainc.compile(SPEC + ' on "body" { weight = 1 }', Sequences(), executor="module")
    with pytest.raises(SiteError, match=r"\[\[6, 5, 8\]\].* \[\[6, 1, 8\]\].* Exclude it"):
        program.step((torch.randn(6, 5, 8), torch.zeros(6, dtype=torch.long)))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_an_adapter_of_the_layer_is_part_of_its_output(executor: Any) -> None:
    made = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    spec = SPEC.replace("lr = 0.3", "lr = 0.01") + ' on "0" { weight = 2 }'
    spec += ' adapt lora on "0" { rank = 2, alpha = 8 }'
    x, y = torch.linspace(-1, 1, 24).double().sin().view(6, 4), torch.arange(6) % 3
    start = made[0](x).detach()
    program = trainc.compile(spec, made, executor=executor)
    for step in range(3):
        with torch.no_grad():
            distance = (program.module.get_submodule("0")(x) - start).square().sum(1).mean()
        assert program.step((x, y))["delta"] == pytest.approx(float(distance), rel=1e-12)
        assert bool(distance) == (step > 0)


def test_bad_values_are_located_errors_of_the_plan() -> None:
    for clause, said in (
        (f'{ON}{{ weight = 1, omega = "{__name__}:batch" }}', "batch"),
        (f'{ON}{{ weight = 1, omega = "{__name__}:nothing" }}', "nothing"),
    ):
        with pytest.raises(trainc.SpecError, match=said) as caught:
            trainc.plan(SPEC + clause, Net())
        assert caught.value.diagnostics[0].labels
    listed = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(trainc.SpecError, match="holds modules and is never called"):
        trainc.plan(SPEC + ' on "1" { weight = 1 }', listed)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of the second step, by the graph and by definition."""
    made = Net().double()
    start = copy.deepcopy(made)
    program = trainc.compile(f"{SPEC}{ON}{{ weight = 0.7 }}", made, executor="graph")
    program.step(batch(0))
    x, y = batch(1)
    loss = program.graph((x, y))
    named = {n: p for n, p in made.named_parameters() if "unused" not in n}
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    rule = Delta(weight=0.7)  # type: ignore[arg-type]
    with torch.no_grad():
        fixed = features(start, x)
    pairs = zip(features(made, x), fixed, strict=True)
    wanted = F.cross_entropy(made(x), y)
    wanted = wanted + 0.7 * sum(rule.reference(own, other) for (_, own), (_, other) in pairs)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
