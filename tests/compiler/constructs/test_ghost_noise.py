"""Ghost noise: the published shift and scale of resampled statistics, behind any norm, without their gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.conformance import Setup, tiny_gpt, tokens
from trainc.compiler.constructs.normalize.ghost_noise import GhostNoise
from trainc.kernels.noise.philox import pack_key
from trainc.kernels.noise.uniforms import uniform
from trainc.runtime.data.batch import Batch
from trainc.runtime.storage.random_streams import derive_seed

SEED, SIZE, CLASSES = 3, 3, 4
BASE = (
    f"loss cross_entropy optimizer sgd {{ lr = 0.2 }} run {{ length = 40 steps, seed = {SEED} }} "
)
NOISE = f'normalize ghost_noise on "first" | "second" {{ size = {SIZE}'


class Net(nn.Module):
    """Images through a BatchNorm, and then through a LayerNorm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.LayerNorm(3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)).movedim(1, -1))
        out: Tensor = self.head(x.square().mean((1, 2)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    made = Net().double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 2, 4, generator=made, dtype=torch.float64)
    return 2 * x + 1, torch.randint(CLASSES, (examples,), generator=made)


def ghosts(step: int, site: int, examples: int = 6) -> Tensor:
    key = pack_key(derive_seed(SEED, "noise") & 0xFFFFFFFF, step)
    like, first = torch.ones(examples, SIZE), torch.zeros((), dtype=torch.int64)
    return (uniform(like, key, site, 1, "token", first) * examples).long().clamp(max=examples - 1)


def by_hand(model: Net, batches: list[Batch], rule: GhostNoise) -> None:
    """Train with forward hooks, the LayerNorm's with its channels moved to the second axis."""
    now: dict[str, Tensor] = {}
    first = lambda *given: rule.reference(given[2], now["first"])  # noqa: E731
    second = lambda *given: rule.reference(given[2].movedim(-1, 1), now["second"]).movedim(1, -1)  # noqa: E731
    model.first.register_forward_hook(first)
    model.second.register_forward_hook(second)
    for step, (x, y) in enumerate(batches):
        now |= {name: ghosts(step, site) for site, name in enumerate(("first", "second"))}
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), 0.2).step()


@pytest.mark.parametrize(
    ("fields", "executor"),
    [({}, "graph"), ({}, "module"), ({"shift": False}, "module"), ({"scale": False}, "module")],
)
def test_it_is_the_published_noise(fields: dict[str, Any], executor: Any) -> None:
    ours, theirs = net(), net()
    text = "".join(f", {name} = {str(value).lower()}" for name, value in fields.items())
    program = trainc.compile(BASE + NOISE + text + " }", ours, executor=executor)
    batches = [batch(seed) for seed in range(2)]
    for one in batches:
        program.step(one)
    by_hand(theirs, batches, GhostNoise(size=SIZE, **fields))
    for (name, got), want in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)


def test_large_ghosts_have_little_noise_and_evaluation_none() -> None:
    model = net()
    plain = net()
    x, y = batch(0, 6)
    losses = {}
    for size in (2, 5000):
        text = BASE + f'normalize ghost_noise on "first" {{ size = {size} }}'
        losses[size] = trainc.compile(text, net()).step((x, y))["loss"]
    want = trainc.compile(BASE, plain).step((x, y))["loss"]
    assert abs(losses[5000] - want) < 0.1 * abs(losses[2] - want)
    program = trainc.compile(BASE + NOISE + " }", model)
    assert torch.equal(program.module.eval()(x), net().eval()(x))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_views_have_statistics_of_their_own(executor: Any) -> None:
    """Two equal views with equal draws are noisy alike."""
    pace = ' regularize pace on "head" { sigma = 1e-30, weight = 1 }'
    text = BASE + NOISE.replace('"first" | ', "") + " }" + pace
    made: Any = net()
    made.first = nn.Identity()  # two views and a BatchNorm do not go together
    said = trainc.compile(text, made, executor=executor).step(batch(0))
    assert said["consistency"] == pytest.approx(0.0, abs=1e-20)


def test_it_stands_behind_the_norms_of_a_language_model() -> None:
    losses = [
        trainc.compile(BASE + clause, tiny_gpt(), executor="module").step(tokens(0))["loss"]
        for clause in ("", "normalize ghost_noise { size = 2 }")
    ]
    assert losses[0] != losses[1]


def test_other_layers_and_no_noise_are_errors() -> None:
    with pytest.raises(trainc.SpecError, match="`head` is a Linear; which of its axes"):
        trainc.plan(BASE + 'normalize ghost_noise on "head" { size = 2 }', net())
    with pytest.raises(trainc.SpecError, match="neither means nor variances deviate"):
        trainc.plan(BASE + NOISE + ", shift = false, scale = false }", net())


def conformance() -> Setup:
    """Return the small network of images, without the reads that rounding would change."""
    return Setup(
        lambda: net().float(),
        lambda seed: (batch(seed)[0].float(), batch(seed)[1]),
        usage=NOISE + " }",
    )


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and by forward hooks."""
    ours, theirs = net(), net()
    batches = [batch(seed) for seed in range(2)]
    program = trainc.compile(BASE + NOISE + " }", ours, executor="graph")
    for one in batches:
        program.step(one)
    by_hand(theirs, batches, GhostNoise(size=SIZE))
    kept = {n: v for n, v in ours.state_dict().items() if v.is_floating_point()}
    return kept, {n: theirs.state_dict()[n] for n in kept}
