"""Mean squared error against its definition."""

import pytest
import torch
from torch import Tensor

from trainc.compiler.constructs.loss.mse import MeanSquaredError


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the task and by definition."""
    g = torch.Generator().manual_seed(0)
    output, target = (
        torch.randn(4, 3, dtype=torch.float64, generator=g),
        torch.randn(4, 3, dtype=torch.float64, generator=g),
    )
    results = []
    for function in (MeanSquaredError().make_loss(), MeanSquaredError().reference):
        x = output.clone().requires_grad_()
        value = function(x, target)
        value.backward()
        assert x.grad is not None
        results.append({"loss": value.detach(), "gradient": x.grad})
    return results[0], results[1]


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        MeanSquaredError().make_loss()(torch.zeros(4, 1), torch.zeros(4))


def test_weights_are_equal() -> None:
    assert MeanSquaredError().make_loss().weights(torch.zeros(4, 2)).tolist() == [0.25] * 4
