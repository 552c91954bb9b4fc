"""The expected consistency: beside a backward pass for every logit, noise drawn many times, and published numbers."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.constructs.observe.consistency import Consistency

REST = "loss cross_entropy optimizer sgd on trainable { lr = 0.1 } run { length = 400 steps }"
SIGMA = 0.01
REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"


class Net(nn.Module):
    """Two layers over tokens, a mean or none, and a head."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.pooled = nn.Dropout(0.3), pooled

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        h = h + self.drop(torch.tanh(self.two(h)))
        logits: Tensor = self.head(h.mean(1) if self.pooled else h)
        return logits


def batch(pooled: bool, size: int = 40) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 4, generator=made, dtype=torch.float64)
    y = torch.randint(3, (size,) if pooled else (size, 3), generator=made)
    if not pooled:
        y[:, 0] = torch.where(torch.arange(size) % 2 == 0, -100, y[:, 0])
    return x, y


def clause(share: str = "token", on: str = '"one" | "two"', more: str = "every 1 steps") -> str:
    return f"{REST} observe consistency on {on} {more} {{ sigma = {SIGMA} * (2 - depth), share = {share} }}"


def sigmas() -> dict[str, float]:
    return {"one": SIGMA * 2, "two": SIGMA * 1.5}


@pytest.mark.parametrize(("share", "pooled"), [("token", True), ("token", False), ("none", False)])
def test_the_mean_over_signs_is_the_sum_over_logits(share: Any, pooled: bool) -> None:
    x, y = batch(pooled, 6)
    program = trainc.compile(clause(share), Net(pooled).double())
    construct = Consistency(sigma=1, share=share)  # type: ignore[arg-type]
    plain = Net(pooled).double().eval()
    means, held = [], 0
    counted = torch.ones(6, 1 if pooled else 3, dtype=torch.bool) if pooled else y != -100
    want = _by_logit(construct, plain, x, counted)
    seen = program._runner.execution.read(plain(x).detach(), (x, y))
    observer = next(a for a in program._machine.actions if a.name == "consistency")
    for i in range(100):
        observer.drawn = i  # type: ignore[attr-defined]
        observer.see(seen)  # type: ignore[attr-defined]
        observer.weights = [2 * s**2 for s in sigmas().values()]  # type: ignore[attr-defined]
        found = observer.found()  # type: ignore[attr-defined]
        observer.forget()  # type: ignore[attr-defined]
        means.append(found["expected"])
        held += found["low"] <= want <= found["high"]
    error = torch.tensor(means).std() / math.sqrt(len(means))
    assert abs(sum(means) / len(means) - want) < 4 * error
    assert error < 0.1 * want
    assert held > 0.7 * len(means)


def _by_logit(construct: Consistency, model: nn.Module, x: Tensor, counted: Tensor) -> float:
    """Return the mean over the counted rows, each logit that counts by a backward pass of its own."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = model.one, model.two

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = model(x)
            return logits * counted.view(*logits.shape[:-1], 1)

    each = construct.reference(Counted(), x, sigmas())
    return float(each.sum() / counted.sum())


def test_it_is_what_two_noisy_passes_differ_by() -> None:
    """The same noise drawn many times, at a small sigma: within the interval of both."""
    x, y = batch(True, 200)
    net = Net(True).double()
    program = trainc.compile(clause(), net)
    found = program.step((x, y))
    net = Net(True).double().eval()
    made = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(30):
        passes = []
        for _ in range(2):
            z = {
                n: 1 + s * torch.randn(len(x), 1, 6, generator=made, dtype=x.dtype)
                for n, s in sigmas().items()
            }
            h = torch.tanh(net.one(x) * z["one"])
            h = h + torch.tanh(net.two(h) * z["two"])
            passes.append(net.head(h.mean(1)).detach())
        drawn.append((passes[0] - passes[1]).square().sum(-1))
    each = torch.stack(drawn).mean(0)
    error = 1.96 * float(each.std()) / math.sqrt(len(each))
    assert abs(found["consistency.expected"] - float(each.mean())) < error + (
        found["consistency.high"] - found["consistency.expected"]
    )
    assert found["consistency.low"] < float(each.mean()) < found["consistency.high"]
    assert error < 0.2 * float(each.mean())


def test_the_published_monte_carlo_is_the_theory() -> None:
    for row in json.loads(REFERENCE.read_text())["pace"]["mc_thm2_feature_form"]:
        assert row["mc_20000"] == pytest.approx(row["first_order_theory"], rel=0.01)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_observing_changes_nothing_and_divided_steps_agree(executor: Any) -> None:
    x, y = batch(False, 6)
    plain = trainc.compile(REST, Net(False).double())
    seen = trainc.compile(clause(more="every 2 steps"), Net(False).double(), executor=executor)
    for t in range(3):
        torch.manual_seed(t)
        want = plain.step((x, y))
        torch.manual_seed(t)
        got = seen.step((x, y))
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
        assert ("consistency.expected" in got) is (t % 2 == 0)
    halves = trainc.compile(clause(), Net(False).double(), executor=executor)
    parts = halves.step([(x[:4], y[:4]), (x[4:], y[4:])])
    whole = trainc.compile(clause(), Net(False).double(), executor=executor).step((x, y))
    for name in ("expected", "low", "high"):
        assert parts[f"consistency.{name}"] == pytest.approx(
            whole[f"consistency.{name}"], rel=1e-12
        )


def test_of_an_adapted_layer_it_is_of_what_the_adapter_adds() -> None:
    text = clause(on='"two"') + ' adapt lora on "two" { rank = 2, alpha = 4 }'
    program = trainc.compile(text, Net(True).double())
    x, y = batch(True, 20)
    assert program.step((x, y))["consistency.expected"] == 0.0  # B is 0
    assert program.step((x, y))["consistency.expected"] > 0.0


def test_a_layer_without_channels_is_refused() -> None:
    with pytest.raises(trainc.SpecError, match="`drop` is a Dropout; noise is supported"):
        trainc.compile(clause(on='"drop"'), Net(True))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the value of a step with one logit, whose sign does not matter, and by definition."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    y = torch.randn(5, 1, dtype=torch.float64)
    text = "loss mse optimizer sgd { lr = 0.1 } run { length = 9 steps }"
    text += f' observe consistency on "0" every 1 steps {{ sigma = {SIGMA} }}'
    plain = copy.deepcopy(model)
    found = trainc.compile(text, model, executor="graph").step((x, y))["consistency.expected"]
    each = Consistency(sigma=1).reference(plain, x, {"0": SIGMA})  # type: ignore[arg-type]
    assert F.mse_loss(plain(x), y) > 0
    return {"expected": torch.tensor(found, dtype=torch.float64)}, {"expected": each.mean()}
