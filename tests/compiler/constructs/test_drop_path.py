"""Stochastic depth: each example keeps a branch or not, as often as `p` says, and only branches are taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import trainc
from tests.conformance import tiny_gpt
from trainc.compiler.constructs.regularize.activations.drop_path import DropPath
from trainc.compiler.errors import NoResidualBranch
from trainc.kernels.noise.philox import pack_key
from trainc.kernels.noise.uniforms import uniform
from trainc.runtime.data.batch import Batch
from trainc.runtime.storage.random_streams import derive_seed

SEED, P = 3, 0.4
BASE = (
    f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} run {{ length = 40 steps, seed = {SEED} }} "
)
DROP = f'regularize drop_path on "one" | "two" {{ p = {P} }} '


class Residual(nn.Module):
    """Two branches: one is scaled and reshaped before it is added, in place; the other by way of a second sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.skip, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.gamma = nn.Parameter(torch.full((6,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        branch = dropout(self.one(x), 0.0, self.training).view(-1, 6) * self.gamma
        branch += self.skip(x)
        beside = self.two(branch)
        beside = beside + self.three(torch.tanh(branch))
        out: Tensor = self.head(torch.tanh(beside + branch))
        return out


def net() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=made, dtype=torch.float64)
    return x, torch.randint(4, (examples,), generator=made)


def kept(step: int, site: int, examples: int = 6, p: float = P) -> Tensor:
    """Return which examples keep a branch, as a counter-based generator draws them."""
    key = pack_key(derive_seed(SEED, "noise") & 0xFFFFFFFF, step)
    first = torch.zeros((), dtype=torch.int64)
    return uniform(torch.ones(examples, 1), key, site, 1, "token", first)[:, 0] >= p


def by_hand(model: Residual, batches: list[Batch]) -> None:
    now: dict[str, Tensor] = {}
    for site, name in enumerate(("one", "two")):

        def drop(_: Any, given: Any, branch: Tensor, name: str = name) -> Tensor:
            return DropPath.reference(branch, now[name], P)

        model.get_submodule(name).register_forward_hook(drop)
        assert site < 2
    for step, (x, y) in enumerate(batches):
        now |= {name: kept(step, site) for site, name in enumerate(("one", "two"))}
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and by forward hooks."""
    ours, theirs = net(), net()
    batches = [batch(seed) for seed in range(3)]
    program = trainc.compile(BASE + DROP, ours, executor="graph")
    for one in batches:
        program.step(one)
    by_hand(theirs, batches)
    return dict(ours.state_dict()), dict(theirs.state_dict())


def test_examples_keep_a_branch_with_probability_one_minus_p() -> None:
    found = torch.stack([kept(step, 1, 500, p=0.3).double() for step in range(40)])
    assert float(found.mean()) == pytest.approx(0.7, abs=4 * (0.21 / 20000) ** 0.5)
    # Neither examples nor steps nor sites share their draws.
    apart = torch.corrcoef(torch.stack([found[:, ::2].flatten(), found[:, 1::2].flatten()]))[0, 1]
    assert abs(float(apart)) < 0.05
    assert not torch.equal(kept(0, 0, 500), kept(0, 1, 500))


def test_the_published_schedule_is_linear_in_the_blocks() -> None:
    text = BASE + 'regularize drop_path on "blocks.*.mlp" { p = 0.3 * block / (blocks - 2) }'
    program = trainc.compile(text, trainc_gpt(4))
    scalars = program.execution.method.scalars.values()
    assert [s(program.clock) for s in scalars] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def trainc_gpt(layers: int) -> nn.Module:
    from examples.models import gpt

    return gpt(layers=layers, width=8, heads=2, context=4, vocabulary=7)


def test_views_that_share_dropout_share_the_branches() -> None:
    """Without noise that differs, the distance of two views is 0; with dropout of their own it is not."""
    found = []
    for clause in ("pace", "r_drop"):
        views = (
            'regularize pace on "head" { sigma = 1e-30, weight = 1 }'
            if clause == "pace"
            else "regularize r_drop { weight = 1 }"
        )
        said = trainc.compile(BASE + DROP + views, net()).step(batch(0))
        found.append(next(v for n, v in said.items() if n in ("consistency", "r_drop")))
    assert found[0] == 0.0
    assert found[1] > 1e-3


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.*.mlp.fc", "`blocks.0.mlp.fc` is no residual branch.* select `blocks.0.mlp`"),
        ("embed", "`embed` is no residual branch.* exclude it from `on`"),
        ("head", "`head` is no residual branch"),
    ],
)
def test_what_is_added_to_nothing_is_refused(name: str, message: str, executor: Any) -> None:
    from tests.conformance import tokens

    clause = f'regularize drop_path on "{name}" from 3 steps {{ p = 0.1 }}'
    program = trainc.compile(BASE + clause, tiny_gpt(), executor=executor)
    with pytest.raises(NoResidualBranch, match=message):
        program.step(tokens(0))


def test_a_loop_of_ones_own_is_refused_it_too() -> None:
    model = net()
    program = trainc.compile(BASE + 'regularize drop_path on "head" { p = 0.1 }', model)
    x, y = batch(0)
    with (
        pytest.raises(NoResidualBranch, match="`head` is no residual branch"),
        program.micro_batch(len(y)),
    ):
        cross_entropy(model(x), y)


def test_the_check_leaves_the_run_as_it_is() -> None:
    """The pass that looks where branches go draws random numbers, and gives them back."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.5), net().float())
    twin = copy.deepcopy(model)
    programs = [
        trainc.compile(BASE + clause, made, executor="module")
        for made, clause in (
            (model, 'regularize drop_path on "1.one" { p = 0 * step }'),
            (twin, ""),
        )
    ]
    said = []
    for program in programs:
        torch.manual_seed(7)
        said.append([program.step((batch(s)[0].float(), batch(s)[1])) for s in range(2)])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "one" { p = 1 }', "below 1"),
        ('on "one" { p = 2 * (blocks - block) }', "below 1"),
        ('on "one" { p = -0.1 }', "0 or more"),
        ("on all { p = 0.1 }", "the model itself is selected"),
    ],
)
def test_bad_input(clause: str, message: str) -> None:
    with pytest.raises(trainc.SpecError, match=message):
        trainc.compile(BASE + "regularize drop_path " + clause, net())


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_what_adapters_add_to_a_branch_is_dropped_with_it(executor: Any) -> None:
    adapted = 'adapt lora on "one" | "two" { rank = 2, alpha = 6 } '
    program = trainc.compile(BASE + adapted + DROP, net(), executor=executor)
    with torch.no_grad():
        for name, one in program.module.named_parameters():
            if name.endswith("lora.b.weight"):
                one.copy_(torch.linspace(-1, 1, one.numel()).sin().view_as(one))
    twin, merged = net(), program.module
    with torch.no_grad():
        for name in ("one", "two"):
            a, b = (merged.get_parameter(f"{name}.lora.{letter}.weight") for letter in "ab")
            twin.get_parameter(f"{name}.weight").add_(3 * b @ a)
    x, y = batch(0)
    for site, name in enumerate(("one", "two")):

        def drop(_: Any, given: Any, branch: Tensor, site: int = site) -> Tensor:
            return DropPath.reference(branch, kept(0, site), P)

        twin.get_submodule(name).register_forward_hook(drop)
    expected = float(cross_entropy(twin(x), y).detach())
    assert program.step((x, y))["loss"] == pytest.approx(expected, rel=1e-12)
