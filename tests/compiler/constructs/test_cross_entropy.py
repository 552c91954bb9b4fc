"""Cross-entropy against its definition, torch's, and exact weights under unequal counts."""

import pytest
import torch
from torch import Tensor

from trainc.compiler.constructs.loss.cross_entropy import CrossEntropy

LOGITS = torch.randn(5, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
TARGETS[0, 2:] = -100


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient, by the task and by definition."""
    compiled: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for smoothing in (0.0, 0.1):
        loss = CrossEntropy(label_smoothing=smoothing)
        for out, function in ((compiled, loss.make_loss()), (reference, loss.reference)):
            logits = LOGITS.clone().requires_grad_()
            value = function(logits, TARGETS)
            value.backward()
            assert logits.grad is not None
            out |= {f"loss {smoothing}": value.detach(), f"gradient {smoothing}": logits.grad}
    return compiled, reference


def test_it_is_torchs_bit_for_bit() -> None:
    want = torch.nn.functional.cross_entropy(LOGITS.flatten(0, 1), TARGETS.flatten())
    assert torch.equal(CrossEntropy().make_loss()(LOGITS, TARGETS), want)


def test_weights_are_each_examples_part_of_the_mean() -> None:
    task = CrossEntropy().make_loss()
    lowered = [task(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(5)]
    weights = task.weights(TARGETS)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float((weights * torch.stack(lowered)).sum()) == pytest.approx(
        float(task(LOGITS, TARGETS)), rel=1e-12
    )
    assert task.count(TARGETS) == 30


def test_accuracy_counts_only_what_counts() -> None:
    targets = LOGITS.argmax(-1)
    targets[1] = -100
    assert CrossEntropy().make_loss().metrics(LOGITS, targets) == {"accuracy": 28.0}
