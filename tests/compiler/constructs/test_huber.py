"""Huber's loss against its definition and torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.conformance import Setup
from tests.losses import double_and_reference, numbers_of_each_token
from trainc.compiler.constructs.loss.huber import Huber


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the loss and by definition."""
    return double_and_reference([Huber(delta=delta) for delta in (0.3, 1.0)])


def conformance() -> Setup:
    """Return the small language model with numbers as targets."""
    return Setup(batch=numbers_of_each_token)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_it_is_torchs_bit_for_bit(delta: float) -> None:
    output, target = torch.randn(5, 7), torch.randn(5, 7)
    found = Huber(delta=delta).make_loss()(output, target)
    assert torch.equal(found, functional.huber_loss(output, target, delta=delta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_targets_of_another_dtype_are_trained_on(dtype: torch.dtype) -> None:
    output = torch.randn(5, 7, requires_grad=True)
    target = torch.randn(5, 7).mul(3).to(dtype)
    found = Huber().make_loss()(output, target)
    found.backward()
    assert output.grad is not None
    want = functional.huber_loss(output.double(), target.double())
    torch.testing.assert_close(found.double(), want)
