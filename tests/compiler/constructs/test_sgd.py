"""SGD by definition, with and without Nesterov momentum."""

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.optimizer.sgd import SGD
from trainc.dsl.values.value_json import Number


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after six updates, by the program and by definition from the gradients it met."""
    compiled, reference = {}, {}
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3, bias=False).double()
        start, gradients = model.weight.detach().clone(), []
        fields = f"lr = 0.05, momentum = {momentum}, nesterov = {str(nesterov).lower()}, weight_decay = 0.1"
        program = trainc.compile(f"loss mse optimizer sgd {{ {fields} }}", model)
        for _ in range(6):
            x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
            program.loss((x, y)).backward()
            assert model.weight.grad is not None
            gradients.append(model.weight.grad.clone())
            program.update()
        sgd = SGD(lr=Number(0.05), momentum=momentum, nesterov=nesterov)
        key = f"momentum {momentum}, nesterov {nesterov}"
        compiled[key] = model.weight.detach()
        reference[key] = sgd.reference(start, gradients, 0.05, 0.1)
    return compiled, reference


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(trainc.SpecError, match="momentum"):
        trainc.compile("loss mse optimizer sgd { lr = 0.1, nesterov = true }", nn.Linear(2, 2))
