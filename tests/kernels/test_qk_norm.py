"""QK-norm: the norm operators on (B, T, H, Dh), where tokens and heads share one weight of Dh."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.norm.layer_norm import layer_norm
from trainc.kernels.norm.rms_norm import rms_norm

SHAPES = [(3, 5, 2, 4), (2, 1, 3, 7), (1, 6, 1, 8), (4, 3, 5, 1)]


def by_vmap(parameters: tuple[Tensor, ...], x: Tensor, dy: Tensor) -> Tensor:
    """(B, 1 or 2) squared norms of every example's gradients, by torch.func."""

    def loss(parameters: tuple[Tensor, ...], x: Tensor, dy: Tensor) -> Tensor:
        weight, *bias = parameters
        if bias:
            return (functional.layer_norm(x, weight.shape, weight, bias[0], 1e-5) * dy).sum()
        return (functional.rms_norm(x, weight.shape, weight, 1e-5) * dy).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, dy)
    return torch.stack([g.flatten(1).square().sum(1) for g in each], 1)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_and_heads_of_an_example_add_up(
    shape: tuple[int, ...], columns: int, heads_first: bool
) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).double() for _ in range(2))
    if heads_first:  # (B, H, T, Dh) as a view, as attention has it
        x, dy = x.transpose(1, 2), dy.transpose(1, 2)
    affine = tuple(torch.randn(shape[-1]).double().requires_grad_() for _ in range(columns))
    probe = torch.zeros(shape[0], columns, dtype=torch.float64, requires_grad=True)
    if columns == 1:
        y = rms_norm(x, shape[-1:], affine[0], probe, 1e-5)
    else:
        y = layer_norm(x, shape[-1:], affine[0], affine[1], probe, 1e-5)
    (got,) = torch.autograd.grad(y, probe, dy)
    want = by_vmap(tuple(p.detach() for p in affine), x, dy)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
