"""The means of a loss over rows by Triton: those of the CPU, in one launch each."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.kernels.loss import row_losses

pytestmark = pytest.mark.interpreter
LENGTHS = [1, 7, 32, 75]


@pytest.fixture
def triton_means(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with blocks of 32 rows."""
    from trainc.kernels.loss import triton_means

    monkeypatch.setattr(triton_means, "ROWS", 32)
    return triton_means


def rows(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies, distances and labels, of which every third is ignored but the first."""
    torch.manual_seed(length)
    labels = torch.arange(length)
    labels[1::3] = -100
    kept = labels != -100
    return torch.rand(length) * kept, torch.rand(length) * kept, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_means_are_those_of_the_cpu(triton_means: Any, length: int, dtype: torch.dtype) -> None:
    arguments = (*rows(length), torch.tensor(0.5, dtype=dtype), -100)
    got, want = triton_means.means(*arguments), row_losses.means(*arguments)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert one.dim() == 0
        torch.testing.assert_close(one, other.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_factors_are_those_of_the_cpu(triton_means: Any, length: int) -> None:
    *_, labels = rows(length)
    arguments = torch.tensor(0.7), torch.tensor(-3.0), labels, -100
    got, want = triton_means.row_factors(*arguments), row_losses.row_factors(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_of_ignored_rows_alone_means_are_nan_and_factors_finite(triton_means: Any) -> None:
    labels, nothing = torch.full((40,), -1), torch.zeros(40)
    assert all(
        x.isnan() for x in triton_means.means(nothing, nothing, labels, torch.tensor(1.0), -1)
    )
    factors = triton_means.row_factors(torch.tensor(2.0), torch.tensor(3.0), labels, -1)
    assert [float(x) for x in factors] == [2.0, 3.0]


def test_labels_of_any_stride_are_read_where_they_are(triton_means: Any) -> None:
    cross_entropies, distances, labels = rows(7)
    apart = torch.stack([labels, torch.full_like(labels, -100)], 1)[:, 0]
    arguments = cross_entropies, distances, torch.tensor(1.0)
    got = triton_means.means(*arguments[:2], apart, arguments[2], -100)
    assert got == triton_means.means(*arguments[:2], labels, arguments[2], -100)


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_a_loss_is_two_launches_forward_and_two_backward(
    distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss
    from trainc.kernels.loss import triton_means

    launches: list[str] = []
    for module in (triton_loss, triton_means):

        def launch(
            kernel: Any, *arguments: Any, known: Any = module.launch, **options: Any
        ) -> None:
            launches.append(kernel.__name__)
            known(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", launch)
    torch.manual_seed(0)
    logits, targets, options = torch.randn(6, 5), torch.tensor([0, 1, -100]), (distance, -100, 0.0)
    *_, kept = triton_loss.forward(logits, targets, torch.tensor(0.5), *options)
    triton_loss.backward(logits, targets, kept, torch.tensor(1.0), torch.tensor(0.5), *options)
    assert launches == ["loss_forward", "loss_means", "loss_factors", "loss_backward"]
