"""Orthogonality: the definition by loops, gradients, the spectral norm, and what has no singular values."""

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.regularize.weights.orthogonal import Orthogonal

SPEC = "loss mse optimizer sgd { lr = 0.1 } run { length = 50 steps } "


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    text = SPEC + "regularize orthogonal on ndim(2) { weight = 0.3 }"
    program = trainc.compile(text, model(), executor="module")
    (x, y), named = data(), dict(program.module.named_parameters())
    penalty = program.loss((x, y)) - torch.nn.functional.mse_loss(program.module(x), y)
    wanted = torch.zeros((), dtype=torch.float64)
    for weight in (named["0.weight"], named["1.weight"]):
        gram = weight.T @ weight
        for i, row in enumerate(gram):
            for j, entry in enumerate(row):
                wanted = wanted + 0.3 * (entry - float(i == j)).square()
    results = []
    for value in (penalty, wanted):
        weights = [named["0.weight"], named["1.weight"]]
        found = torch.autograd.grad(value, weights)
        results.append({"penalty": value.detach(), "wide": found[0], "tall": found[1]})
    return results[0], results[1]


def test_srip_is_the_spectral_norm_after_a_few_steps() -> None:
    text = SPEC + "regularize orthogonal on ndim(2) { weight = 0.01, form = srip }"
    program = trainc.compile(text, model(), executor="module")
    for _ in range(20):
        norms = [
            torch.linalg.svdvals(p.detach()) for p in program.module.parameters() if p.dim() > 1
        ]
        found = program.step(data())["orthogonal"]
    assert found == pytest.approx(sum(float((s**2 - 1).abs().max()) for s in norms), rel=1e-3)


def test_an_orthogonal_matrix_has_no_penalty() -> None:
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for weight in (q, q[:, :4]):
        assert float(Orthogonal.reference(weight)) == pytest.approx(0, abs=1e-12)
    assert float(Orthogonal.reference(q[:4])) == pytest.approx(
        2
    )  # W^T W of a wide one has two zeros


def test_what_cannot_be_meant_is_refused() -> None:
    for clause, message in (
        ("on all { weight = 0.1 }", r"`0.bias` of shape \[3\] has no singular values"),
        ("on ndim(2) { weight = 0.1, iterations = 3 }", "part of `form = srip`"),
    ):
        with pytest.raises(trainc.SpecError, match=message):
            trainc.plan(f"{SPEC} regularize orthogonal {clause}", model())
