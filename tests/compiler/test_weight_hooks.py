"""Changed weights: what layers compute with, and where gradients go, against a model given the weights by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.execution.execution import Executor
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError
from trainc.kernels.noise.random_entries import random_entries

BASE = "optimizer sgd { lr = 0.05 } loss cross_entropy run { length = 20 steps, seed = 5 } "
DROP = "regularize drop_connect on "


class Words(nn.Module):
    """An embedding tied to its head, attention whose weight is a parameter of its own, a convolution, norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(self.norm(x).mT).mT
        y: Tensor = self.head(x)
        return y


def batch(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 11, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def compiled(text: str, model: nn.Module | None = None, executor: Executor = "auto") -> Program:
    return trainc.compile(BASE + text, (model or Words()).double(), executor=executor)


def key_of(program: Program) -> Tensor:
    """Return the key of the step that is about to run."""
    from trainc.compiler.execution.scalars import noise_scalars
    from trainc.compiler.per_example.micro_batch import MicroBatchSlice

    steps, cpu = program._machine.clock.steps, torch.device("cpu")
    return noise_scalars(program.execution.seed, steps, MicroBatchSlice(), cpu)["key"]


def dropped(program: Program, p: float) -> dict[str, Tensor]:
    """Return what the layers of a program compute with, as functions of its parameters."""
    sites = [site.weight for site in program.execution.rewrite.hooks if site.weight is not None]
    named, found = dict(program.module.named_parameters()), {}
    for name, index in {(weight.name, weight.index) for weight in sites}:
        kept = random_entries(named[name], key_of(program), index, "uniform") >= p
        found[name] = named[name] * kept / (1 - p)
    return found


def gradients(program: Program, weights: dict[str, Tensor], *given: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the stored parameters where the model is given these weights."""
    model, (x, y) = program.module, given
    tied = {"head.weight": weights["embed.weight"]} if "embed.weight" in weights else {}
    logits = functional_call(model, {**weights, **tied}, (x,), tie_weights=False)
    named = dict(model.named_parameters())
    loss = cross_entropy(logits.flatten(0, 1), y.flatten())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("on", "executor"),
    [
        ("all", "graph"),
        ("all", "module"),
        ('"embed.*"', "module"),
        ('"attention.*"', "module"),
        ('"conv.weight" | "norm.*"', "module"),
    ],
)
def test_layers_compute_with_the_changed_weight(on: str, executor: Executor) -> None:
    program = compiled(f'{DROP} {on} - "*.out_proj.*" {{ p = 0.3 }}', executor=executor)
    with program.execution.sites.inactive():
        want = gradients(program, dropped(program, 0.3), *batch())
    before = {name: p.detach().clone() for name, p in program.module.named_parameters()}
    x, y = batch()
    whole = executor == "graph"  # a second shape would be captured anew
    program.step((x, y) if whole else [(x[:1], y[:1]), (x[1:], y[1:])])
    for name, parameter in program.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.05 * want[name], msg=name)
    program.module.eval()
    x, _ = batch(1)
    by_hand = functional_call(
        Words().double().eval(), dict(program.module.named_parameters()), (x,)
    )
    assert torch.equal(program.module(x), by_hand)


def test_recurrent_layers_are_given_the_changed_weight() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lstm = nn.LSTM(5, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.lstm(x)[0][:, -1])

    program = compiled(f'{DROP} "lstm.weight_hh*" {{ p = 0.5 }}', Recurrent())
    (changed,) = dropped(program, 0.5).values()
    twin = Recurrent().double()
    twin.lstm.get_parameter("weight_hh_l0").data.copy_(changed)
    x, y = torch.randn(6, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = cross_entropy(twin(x), y).item()
    assert program.step((x, y))["loss"] == pytest.approx(loss, rel=1e-12)
    assert changed.eq(0).any()


def test_a_checkpoint_and_the_second_pass_of_sam_have_the_same_weights() -> None:
    text = f'{DROP} all - "*.out_proj.*" {{ p = 0.3 }} perturb sam {{ rho = 0.1 }}'
    plain = compiled(text, executor="graph")
    checkpointed = trainc.compile(
        (BASE + text).replace("seed = 5", 'seed = 5, checkpoint_activations = "conv"'),
        Words().double(),
    )
    with plain.execution.sites.inactive():
        first = gradients(plain, dropped(plain, 0.3), *batch())
        norm = torch.stack([g.square().sum() for g in first.values()]).sum().sqrt()
        stored = {n: p.detach().clone() for n, p in plain.module.named_parameters()}
        for name, parameter in plain.module.named_parameters():
            parameter.data += 0.1 * first[name] / norm
        second = gradients(plain, dropped(plain, 0.3), *batch())
        for name, parameter in plain.module.named_parameters():
            parameter.data.copy_(stored[name])
    for program in (plain, checkpointed):
        program.step(batch())
        for name, parameter in program.module.named_parameters():
            want = stored[name] - 0.05 * second[name]
            torch.testing.assert_close(parameter.detach(), want, msg=name)


def test_clauses_change_one_weight_in_their_order() -> None:
    model = nn.Linear(4, 3, bias=False)
    text = f"{DROP} all {{ p = 0.5 }} regularize drop_connect as again on all {{ p = 0.2 }}"
    program = compiled(text, model)
    one, two = (site.weight.index for site in program.execution.rewrite.hooks if site.weight)
    assert one != two
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        weight = model.weight
        for index, p in ((one, 0.5), (two, 0.2)):
            kept = random_entries(weight, key_of(program), index, "uniform") >= p
            weight = weight / (1 - p) * kept
        want = float(cross_entropy(x @ weight.T, y))
    assert program.step((x, y))["loss"] == pytest.approx(want, rel=1e-12)


class Direct(Words):
    """The head is a use of the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.embed(ids) @ self.embed.weight.T
        return y


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_use_outside_of_its_layers_is_an_error(executor: Executor) -> None:
    program = compiled(f'{DROP} "embed.*" {{ p = 0.3 }}', Direct(), executor)
    with pytest.raises(
        SiteError, match=r"`embed.weight` is also used outside `embed`, at .*stored"
    ):
        program.step(batch())


@pytest.mark.parametrize(
    ("model", "clause", "message"),
    [
        (nn.Embedding(4, 3, sparse=True), "", "is sparse, and a changed weight"),
        (nn.Embedding(4, 3, max_norm=1.0), "", "build it without `max_norm`"),
        (nn.Linear(4, 3), "noise_scale gns on all", "exclude `weight` from one of the two"),
    ],
)
def test_what_cannot_be_changed_is_refused(model: nn.Module, clause: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        compiled(f'{DROP} "weight" {{ p = 0.3 }} {clause}', model)
    assert "regularize drop_connect" in str(caught.value)
