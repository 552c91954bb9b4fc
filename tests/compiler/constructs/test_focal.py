"""Focal loss against its definition, cross-entropy, and closed forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from tests.losses import double_and_reference
from trainc.compiler.constructs.loss.focal import Focal
from trainc.compiler.method.loss import LossMismatch

ALPHA = (0.5, 0.1, 0.9, 1.0, 0.0, 0.3, 0.2)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient of classes and of labels, by the loss and by definition."""

    def classes(target: Tensor) -> Tensor:
        return target.argmax(-1).index_fill(0, torch.tensor(1), -100)

    def labels(target: Tensor) -> Tensor:
        return target.sigmoid()

    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for kind, targets_of, alpha in (("softmax", classes, ALPHA), ("sigmoid", labels, 0.25)):
        fields: list[dict[str, Any]] = [{}, {"gamma": 0.5}, {"gamma": 3.0, "alpha": alpha}]
        made = [Focal.model_validate({"activation": kind, **one}) for one in fields]
        for all_of, found in zip(results, double_and_reference(made, targets_of), strict=True):
            all_of |= {f"{kind} {name}": value for name, value in found.items()}
    return results


def test_without_gamma_it_is_cross_entropy() -> None:
    logits, index = torch.randn(4, 3, 7).double(), torch.randint(7, (4, 3))
    index[0, 1] = -100
    found = Focal(gamma=0).make_loss()(logits, index)
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), index.flatten()))
    labels = torch.rand(4, 3, 7).double()
    found = Focal(gamma=0, activation="sigmoid").make_loss()(logits, labels)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, labels))


def test_a_target_at_one_half_weighs_a_quarter() -> None:
    logits, target = torch.zeros(1, 2), torch.tensor([1])
    assert float(Focal().make_loss()(logits, target)) == pytest.approx(math.log(2) / 4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_certain_predictions_have_finite_gradients(gamma: float, activation: Any) -> None:
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    targets = torch.tensor([0, 0]) if activation == "softmax" else torch.tensor([[1.0, 0.0]] * 2)
    loss = Focal(gamma=gamma, activation=activation).make_loss()(logits, targets)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1].any()


@pytest.mark.parametrize(
    ("fields", "targets", "says"),
    [
        ("", torch.ones(5, 7), "activation = sigmoid"),
        ("{ activation = sigmoid }", torch.ones(5, 7).long(), r"targets\.float\(\)"),
        ("{ alpha = [0.1, 0.2] }", torch.zeros(5).long(), "has 2 numbers, and the logits have 7"),
    ],
)
def test_targets_that_do_not_fit_say_what_to_write(fields: str, targets: Tensor, says: str) -> None:
    spec = trainc.check(f"loss focal {fields} optimizer sgd {{ lr = 0.1 }}").unwrap()
    program = trainc.compile(spec, torch.nn.Linear(7, 7))
    with pytest.raises((LossMismatch, trainc.SpecError, ValueError), match=says):
        program.step((torch.zeros(5, 7), targets))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("alpha = 0.25", "list with a factor for each class"),
        ("activation = sigmoid, alpha = [0.1, 0.2]", "one number"),
        ("activation = sigmoid, ignore_index = 0", "for class indices"),
    ],
)
def test_fields_that_do_not_fit_say_what_to_write(fields: str, says: str) -> None:
    spec = trainc.check(f"loss focal {{ {fields} }} optimizer sgd {{ lr = 0.1 }}").unwrap()
    with pytest.raises(trainc.SpecError, match=says):
        trainc.plan(spec, torch.nn.Linear(7, 7))
