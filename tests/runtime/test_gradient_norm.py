"""The norm of a gradient is finite exactly where its entries are, whatever their size and dtype."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.run.interface import NonFiniteGradient, NonFiniteLoss, RunSettings
from trainc.runtime.run.skipped_steps import SkippedSteps
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.soundness.gradient_norm import (
    GradientNorms,
    ModelGradient,
    exact_norm,
    read_numbers,
)
from trainc.runtime.soundness.sound import unsound_step, unsound_tensor
from trainc.runtime.step.optimizer import ParamSlot
from trainc.runtime.step.record import Signals, Step

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def norm(*gradients: Tensor) -> float:
    found = GradientNorms.of([Parameter(torch.zeros(())) for _ in gradients], gradients)
    return found.keep(read_numbers(found.numbers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_that_of_all_gradients_together(dtype: torch.dtype) -> None:
    gradients = [torch.randn(4, 3).to(dtype), torch.randn(7).to(dtype)]
    expected = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert norm(*gradients) == pytest.approx(float(expected), rel=1e-6)


def test_dtypes_and_sparse_gradients_may_be_mixed() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]), torch.ones(3, 2), (5, 2), check_invariants=True
    )
    gradients = [sparse, torch.full((3,), 2.0, dtype=torch.float64), torch.ones(4).bfloat16()]
    assert norm(*gradients) == pytest.approx(math.sqrt(2 * 4 + 2 + 12 + 4))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 3e38),
        (torch.bfloat16, 1e30),
        (torch.float16, 6e4),
        (torch.float64, 1e200),
        (torch.float32, 1e-30),
        (torch.float64, 1e-200),
    ],
)
def test_it_overflows_only_where_the_true_norm_does(dtype: torch.dtype, size: float) -> None:
    one = torch.full((4,), size, dtype=dtype)
    assert norm(one, one) == pytest.approx(math.sqrt(8) * float(one[0]), rel=1e-6)
    assert exact_norm(one) == pytest.approx(2 * float(one[0]), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_makes_it_so(dtype: torch.dtype, bad: float) -> None:
    gradients = [torch.ones(3, 3).to(dtype), torch.ones(5).to(dtype)]
    gradients[1][4] = bad
    owners = [Parameter(torch.zeros(())) for _ in gradients]
    found = GradientNorms.of(owners, gradients)
    total = found.keep(read_numbers(found.numbers))
    assert math.isnan(total) if math.isnan(bad) else total == math.inf
    assert found.first_unsound() is owners[1]


def test_a_nan_beside_an_infinity_is_said() -> None:
    assert math.isnan(norm(torch.tensor([math.inf]), torch.tensor([math.nan])))


def test_no_gradient_and_zeros_have_norm_zero() -> None:
    assert norm() == norm(torch.zeros(3)) == norm(torch.zeros(0)) == 0.0


def slots(*gradients: Tensor | None) -> list[ParamSlot]:
    """Return parameters that have these gradients; one without a gradient is a vector."""
    found = []
    for i, gradient in enumerate(gradients):
        like = torch.zeros(3) if gradient is None else gradient
        parameter = Parameter(torch.zeros(like.shape, dtype=like.dtype))
        parameter.grad = gradient
        found.append(ParamSlot(f"p{i}", parameter, 0.0))
    return found


SPARSE_VECTOR = torch.sparse_coo_tensor(
    torch.tensor([[1, 1, 3]]), torch.ones(3), (5,), check_invariants=True
)


@pytest.mark.parametrize(
    ("gradients", "fewer"),
    [
        ([torch.randn(4, 3), torch.randn(7), torch.randn(()), torch.randn(5)], True),
        ([torch.randn(7), None, torch.randn(4, 3), torch.randn(5), None], True),
        ([torch.randn(7).bfloat16(), torch.randn(4, 3), torch.randn(5).double()], True),
        ([torch.full((9,), 1e30), torch.full((2,), -3e37), torch.ones(2, 2)], True),
        ([torch.randn(4, 3), torch.randn(7)], False),
        ([torch.randn(7), SPARSE_VECTOR, torch.randn(5)], False),
        ([], False),
    ],
)
def test_the_vectors_of_a_model_are_measured_by_one_norm(
    gradients: list[Tensor | None], fewer: bool
) -> None:
    found = ModelGradient(slots(*gradients)).measure()
    there = [g.to_dense().double().flatten() for g in gradients if g is not None]
    expected = torch.cat([*there, torch.zeros(1, dtype=torch.float64)]).norm()
    assert found.keep(read_numbers(found.numbers)) == pytest.approx(float(expected), rel=1e-6)
    assert (len(found.numbers) < len(found.gradients)) == fewer != found.each


def test_a_vector_that_is_not_finite_is_named_although_all_were_measured_together() -> None:
    gradients = [torch.ones(3), torch.ones(2, 2), torch.tensor([1.0, math.nan]), torch.ones(2, 2)]
    gradients[3][0, 0] = math.inf
    owners = slots(*gradients)
    gradient = ModelGradient(owners)
    found = gradient.measure()
    assert math.isnan(found.keep(read_numbers(found.numbers)))
    first = found.first_unsound()
    assert first is owners[2].tensor
    assert gradient.name_of(first) == "p2"


def test_a_step_is_sound_where_loss_and_gradient_are_finite() -> None:
    assert unsound_step(1.0, 2.0) is None
    assert unsound_step(math.nan, 2.0) == "the loss is nan"
    assert unsound_step(1.5, math.inf) == "the gradient norm is inf, although the loss is 1.5"


def test_a_tensor_that_is_not_finite_is_named() -> None:
    bad = torch.tensor([1.0, math.nan])
    huge = torch.full((9,), 3e38)
    sound = [("a", huge), ("steps", 3), ("index", torch.tensor([1])), ("none", None)]
    assert unsound_tensor(sound) is None
    assert unsound_tensor([*sound, ("b", [huge, bad]), ("c", bad)]) == "b"


def test_steps_are_skipped_up_to_the_limit_in_a_row() -> None:
    settings, skipped = RunSettings(on_nan="skip", skip_limit=2), SkippedSteps()
    step = Step(Clock(), {}, Signals(), 1, 1, loss=math.nan, unsound="the loss is nan")
    skipped.add(step, settings)
    skipped.in_row = 0
    skipped.add(step, settings)
    skipped.add(step, settings)
    with pytest.raises(NonFiniteLoss, match=r"the 2 steps before it were skipped"):
        skipped.add(step, settings)
    assert skipped.total == 3
    assert "skipped 3 of 9 steps" in next(skipped.lines(9))
    again = SkippedSteps()
    again.restore(skipped.state())
    assert again == skipped
    step.loss = 1.0
    with pytest.raises(NonFiniteGradient):
        SkippedSteps().add(step, RunSettings(on_nan="stop"))
