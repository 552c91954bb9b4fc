"""Mean absolute error against its definition."""

import torch
from torch import Tensor

from tests.conformance import Setup
from tests.losses import double_and_reference, numbers_of_each_token
from trainc.compiler.constructs.loss.l1 import AbsoluteError


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the loss and by definition."""
    return double_and_reference([AbsoluteError()])


def conformance() -> Setup:
    """Return the small language model with numbers as targets."""
    return Setup(batch=numbers_of_each_token)


def test_it_is_torchs_bit_for_bit() -> None:
    output, target = torch.randn(5, 7), torch.randn(5, 7)
    want = torch.nn.functional.l1_loss(output, target)
    assert torch.equal(AbsoluteError().make_loss()(output, target), want)
