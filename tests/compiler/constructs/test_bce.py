"""Binary cross-entropy against its definition and torch's."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.conformance import Setup, tokens
from tests.losses import double_and_reference
from trainc.compiler.constructs.loss.bce import BinaryCrossEntropy
from trainc.compiler.method.loss import LossMismatch
from trainc.runtime.data.batch import Batch

EACH = (0.5, 2.0, 3.0, 1.0, 0.0, 7.0, 1.5)


def labels(seed: int) -> Batch:
    """Return six sequences, of which each token has any number of 24 labels."""
    generator = torch.Generator().manual_seed(seed)
    return tokens(seed)[0], torch.rand(6, 8, 24, generator=generator).round()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the loss and by definition."""
    weights = (None, 2.0, EACH)
    made = [BinaryCrossEntropy(pos_weight=weight) for weight in weights]
    return double_and_reference(made, lambda target: target.sigmoid())


def conformance() -> Setup:
    """Return the small language model with labels of each token as targets."""
    return Setup(batch=labels)


@pytest.mark.parametrize("weight", [None, 2.0, EACH])
def test_it_is_torchs_bit_for_bit(weight: float | tuple[float, ...] | None) -> None:
    logits, target = torch.randn(5, 7), torch.rand(5, 7).round()
    given = None if weight is None else torch.tensor(weight)
    want = binary_cross_entropy_with_logits(logits, target, pos_weight=given)
    assert torch.equal(BinaryCrossEntropy(pos_weight=weight).make_loss()(logits, target), want)


@pytest.mark.parametrize(
    ("loss", "targets", "says"),
    [
        (BinaryCrossEntropy(), torch.ones(5, 7).long(), r"targets\.float\(\)"),
        (BinaryCrossEntropy(), torch.ones(5), r"\(5, 7\) and the targets \(5,\)"),
        (BinaryCrossEntropy(pos_weight=(1.0, 2.0)), torch.ones(5, 7), "has 2 numbers"),
    ],
)
def test_targets_that_do_not_fit_say_what_to_write(
    loss: BinaryCrossEntropy, targets: Tensor, says: str
) -> None:
    with pytest.raises(LossMismatch, match=says):
        loss.make_loss()(torch.zeros(5, 7), targets)


def test_one_logit_an_example_says_how_to_reshape_the_targets() -> None:
    with pytest.raises(LossMismatch, match=r"targets\.reshape\(\[5, 1\]\)"):
        BinaryCrossEntropy().make_loss()(torch.zeros(5, 1), torch.zeros(5))


def test_accuracy_is_at_one_half() -> None:
    logits, target = torch.tensor([[2.0, -1.0], [0.1, 0.3]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert BinaryCrossEntropy().make_loss().metrics(logits, target) == {"accuracy": (2.0, 4)}
