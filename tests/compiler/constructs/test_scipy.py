"""Iterations of Powell, CG and BFGS against scipy's own methods, closed forms and resumed runs."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.data import curve_points
from tests.conformance import Setup
from trainc.compiler.constructs.optimizer.scipy import Scipy
from trainc.runtime.vector_optimizer import line_searches
from trainc.runtime.vector_optimizer.line_searches import LineSearches

BASE = "loss mse run { length = 40 steps } "
METHODS = ("Powell", "CG", "BFGS")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch() -> tuple[Tensor, Tensor]:
    x, y = curve_points(32)
    return x.double(), y.double()


def spec(method: str, fields: str = "") -> str:
    return BASE + f'optimizer scipy {{ method = "{method}"{fields} }}'


def bowl(x: Any) -> Any:
    """Return a smooth function of four numbers with a curved valley."""
    return (
        (x[0] - 1) ** 2 + 5 * (x[1] - x[0] ** 2) ** 2 + (x[2] * x[1] - x[3]) ** 2 + 0.1 * x[3] ** 2
    )


def minimized(method: Any, steps: int) -> tuple[LineSearches, nn.Parameter]:
    x = nn.Parameter(torch.tensor([-0.5, 0.3, 0.8, -1.0], dtype=torch.float64))
    optimizer = LineSearches([{"params": [x]}], method)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = bowl(x)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, x


def test_powell_is_that_of_scipy_iteration_by_iteration() -> None:
    """Its directions after k steps are those with which scipy begins the iteration k + 1."""
    from scipy.optimize import minimize

    for steps in range(1, 6):
        optimizer, x = minimized("Powell", steps)
        options = {"maxiter": steps + 1, "ftol": 0, "xtol": 1e-4}
        found = minimize(bowl, [-0.5, 0.3, 0.8, -1.0], method="Powell", options=options)
        np.testing.assert_allclose(optimizer.state[x]["directions"], found.direc, rtol=1e-9)
    assert not np.allclose(found.direc, np.eye(4))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_ends_where_that_of_scipy_does(method: str) -> None:
    from scipy.optimize import minimize

    _, x = minimized(method, 60)
    wanted = minimize(bowl, [-0.5, 0.3, 0.8, -1.0], method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(x.detach(), wanted.x, atol=1e-4)


@pytest.mark.parametrize("method", ["CG", "BFGS"])
def test_a_quadratic_bowl_is_minimized(method: str) -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64))
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = LineSearches([{"params": [x]}], method)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x @ matrix @ x / 2
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(25)]
    assert losses[-1] < 1e-10
    assert losses == sorted(losses, reverse=True)


def test_conjugate_gradients_end_on_a_quadratic_after_as_many_steps_as_it_has_numbers() -> None:
    """Hestenes and Stiefel; with searches that only meet both Wolfe conditions it takes more than 40 steps here."""
    drawn = np.random.default_rng(0)
    root = drawn.standard_normal((8, 8))
    matrix = torch.from_numpy(root @ root.T + 0.1 * np.eye(8))
    x = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = LineSearches([{"params": [x]}], "CG")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = x @ matrix @ x / 2 + x.sum()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert float((matrix @ x.detach() + 1).abs().max()) < 1e-6
    for _ in range(8):  # also when there is nothing left to gain
        optimizer.step(closure)
    assert float((matrix @ x.detach() + 1).abs().max()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_program_descends_and_resumes_bit_for_bit(method: str) -> None:
    program = trainc.compile(spec(method), net().float())
    data = curve_points(32)
    losses = [program.step(data)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert program.step(data)["scipy.evaluations"] >= 2
    fresh = trainc.compile(spec(method), net().float())
    fresh.load_state_dict(copy.deepcopy(program.state_dict()))
    for _ in range(3):
        assert program.step(data) == fresh.step(data)
    for name, value in program.module.state_dict().items():
        assert torch.equal(value, fresh.module.state_dict()[name])


def test_micro_batches_give_the_iteration_of_the_whole_batch() -> None:
    one, two = (trainc.compile(spec("BFGS"), net()) for _ in range(2))
    x, y = batch()
    for _ in range(3):
        one.step((x, y))
        two.step([(x[:9], y[:9]), (x[9:], y[9:])])
    for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_rate_goes_a_part_of_the_way() -> None:
    whole, part = (net() for _ in range(2))
    start = [p.detach().clone() for p in whole.parameters()]
    trainc.compile(spec("CG"), whole).step(batch())
    trainc.compile(spec("CG", ", lr = 0.25"), part).step(batch())
    for a, b, c in zip(start, whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(a + 0.25 * (b - a), c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["CG", "BFGS"])
def test_it_goes_on_after_steps_at_a_rate_of_0(method: str) -> None:
    """A loss that did not change says nothing on how far to go: scipy's search ends at once where it is told so."""
    late, now = net(), net()
    program = trainc.compile(spec(method, ", lr = max(0, min(1, step - 1))"), late)
    for _ in range(3):
        program.step(batch())
    trainc.compile(spec(method), now).step(batch())
    moved = [
        (a - b).abs().max() for a, b in zip(late.parameters(), net().parameters(), strict=True)
    ]
    assert max(moved) > 0
    for a, b in zip(late.parameters(), now.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Words(nn.Module):
    """An embedding whose gradient is sparse, and a line."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.line = nn.Embedding(6, 2, sparse=sparse), nn.Linear(2, 1)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.line(self.words(ids))
        return found


@pytest.mark.parametrize("clause", [*(f'scipy {{ method = "{m}" }}' for m in METHODS), "swarm"])
def test_sparse_gradients_are_those_of_dense_ones(clause: str) -> None:
    ids = torch.arange(5)
    batch = ids, torch.sin(ids.double())[:, None]
    sparse, dense = Words(True), Words(False)
    for model in (sparse, dense):
        program = trainc.compile(BASE + "optimizer " + clause, model)
        for _ in range(3):
            program.step(batch)
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_plan_counts_the_state_of_all_parameters_together() -> None:
    """By hand: 99 * 100 + 100 = 10,000 numbers in float64, whatever the weights are."""
    n, largest = 10_000, nn.Linear(99, 100)
    clauses = {spec("CG"): 3 * n, spec("BFGS"): 3 * n + n * n, spec("Powell"): n + n * n}
    for text, numbers in clauses.items():
        state = {"what": "scipy: optimizer state", "bytes": 8 * numbers}
        assert trainc.plan(text, largest).memory[0] == state
    rows = trainc.plan(BASE + "optimizer swarm { particles = 7 }", largest).memory
    assert rows[0]["bytes"] == 8 * 3 * 7 * n


def test_an_inverse_hessian_is_updated_in_parts_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, whole = minimized("BFGS", 6)
    monkeypatch.setattr(line_searches, "BLOCK", 5)
    _, parts = minimized("BFGS", 6)
    assert torch.equal(whole, parts)


def test_frozen_parameters_stay() -> None:
    model = net()
    kept = model[0].weight.detach().clone()  # type: ignore[index]
    program = trainc.compile(spec("Powell", ', freeze = "0.weight"'), model)
    program.step(batch())
    assert torch.equal(kept, model[0].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    ("fields", "clause", "model", "said"),
    [
        (", weight_decay = 0.1", "", net, "minimizes the loss as it is"),
        (", clip = 1", "", net, "remove `clip`"),
        (
            "",
            "",
            lambda: nn.Linear(101, 100),
            "at most 10,000 parameters together, and these are 10,200",
        ),
        ("", "mask magnitude on ndim(2) { density = 50% }", net, "several times"),
        ("", "lr trust_ratio", net, "several times"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    fields: str, clause: str, model: Any, said: str
) -> None:
    with pytest.raises(trainc.SpecError, match=said):
        trainc.compile(spec("CG", fields) + " " + clause, model())


def test_a_missing_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(trainc.SpecError, match=r"pip install trainc\[scipy\]"):
        trainc.plan(spec("CG"), net())


def conformance() -> Setup:
    """Return a small network in place of the language model, and a method that is smooth in rounding."""

    def rows(seed: int) -> tuple[Tensor, Tensor]:
        x, y = curve_points()
        at = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:6]
        return x[at], y[at]

    return Setup(lambda: net().float(), rows, "loss mse run { length = 400 steps, seed = 3 }")


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the direction of the first step of a linear model, whose exact size is known up to the search."""
    matrix = torch.tensor([[3.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    root = torch.linalg.cholesky(matrix)  # the squared error of x root is x A x
    model = nn.Linear(2, 2, bias=False).double()
    torch.manual_seed(3)
    start = torch.randn(2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.stack([start, start]))
    program = trainc.compile(spec("CG"), model)
    program.step((root.T.contiguous(), torch.zeros(2, 2, dtype=torch.float64)))
    moved = model.weight.detach()[0] - start
    wanted = Scipy(method="CG").reference(matrix, start) - start
    return {"direction": moved / moved.norm()}, {"direction": wanted / wanted.norm()}
