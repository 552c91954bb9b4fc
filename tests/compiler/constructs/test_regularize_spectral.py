"""Spectral norm regularization: the exact gradient once the vectors are found, which they are soon and stay."""

import copy

import torch
from torch import Tensor, nn

import trainc

SPEC = "loss mse optimizer sgd { lr = 0.1 } run { length = 50 steps } "
CLAUSE = "regularize spectral on ndim(2) { weight = 0.5, iterations = 40 }"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    program, twin = trainc.compile(SPEC + CLAUSE, model(), executor="module"), model()
    x, y = data()
    program.step((x, y))
    loss = torch.nn.functional.mse_loss(twin(x), y)
    for weight in (twin.get_parameter("0.weight"), twin.get_parameter("1.weight")):
        loss = loss + 0.5 / 2 * torch.linalg.svdvals(weight)[0] ** 2
    loss.backward()
    for parameter in twin.parameters():
        assert parameter.grad is not None
        parameter.data -= 0.1 * parameter.grad
    return dict(program.module.named_parameters()), dict(twin.named_parameters())


def test_the_vectors_follow_the_weights_from_step_to_step() -> None:
    program = trainc.compile(SPEC + CLAUSE.replace("40", "1").replace("0.5", "0.01"), model())
    for _ in range(8):
        before = copy.deepcopy(program.module)
        found = program.step(data())["spectral"]
    sigma = [torch.linalg.svdvals(p.detach())[0] for p in before.parameters() if p.dim() == 2]
    exact = sum(float(s) ** 2 / 2 for s in sigma)
    assert 0.99 * exact < found <= exact * (1 + 1e-12)
