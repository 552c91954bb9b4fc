"""Mean squared error against its definition."""

import pytest
import torch
from torch import Tensor

from tests.conformance import Setup
from tests.losses import double_and_reference, numbers_of_each_token
from trainc.compiler.constructs.loss.mse import MeanSquaredError


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the loss and by definition."""
    return double_and_reference([MeanSquaredError()])


def conformance() -> Setup:
    """Return the small language model with numbers as targets."""
    return Setup(batch=numbers_of_each_token)


def test_it_is_torchs_bit_for_bit() -> None:
    output, target = torch.randn(5, 7), torch.randn(5, 7)
    want = torch.nn.functional.mse_loss(output, target)
    assert torch.equal(MeanSquaredError().make_loss()(output, target), want)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\).*`targets.reshape\(\[4, 1\]\)`"):
        MeanSquaredError().make_loss()(torch.zeros(4, 1), torch.zeros(4))


def test_weights_are_equal() -> None:
    assert MeanSquaredError().make_loss().weights(torch.zeros(4, 2)).tolist() == [0.25] * 4
