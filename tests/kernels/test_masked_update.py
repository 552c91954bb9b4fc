"""Zeroing what a mask leaves out: bool and packed masks, any strides, and values that are no numbers."""

import pytest
import torch

from trainc.kernels.parameter import masked_update
from trainc.kernels.parameter.masked_update import masked_update_, pack, unpack

SHAPES = [(), (1,), (3,), (8,), (127,), (5, 7), (2, 3, 4), (0,), (33000, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_keeps_every_entry(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.3
    packed = pack(mask)
    assert packed.shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(unpack(packed, mask.numel()).view(shape), mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128],
    ids=str,
)
def test_entries_outside_become_zero(
    shape: tuple[int, ...], packed: bool, dtype: torch.dtype
) -> None:
    mask = torch.rand(shape) < 0.5
    tensors = [torch.randn(shape).to(dtype), torch.randn(shape)]
    if mask.numel() < 1000:
        want = [masked_update.reference(t, mask) for t in tensors]
    else:
        want = [t.where(mask, 0) for t in tensors]
    masked_update_(tensors, pack(mask) if packed else mask)
    assert all(torch.equal(*pair) for pair in zip(tensors, want, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_parameters_strides_and_broken_values(packed: bool) -> None:
    mask = torch.rand(6, 5) < 0.5
    mask[0, 0] = False
    mask[1, 1] = True
    weight = torch.nn.Parameter(torch.randn(6, 5))
    moment = torch.randn(5, 6).T
    with torch.no_grad():
        weight[0, 0] = weight[1, 1] = torch.nan
    masked_update_([weight, moment], pack(mask) if packed else mask)
    assert weight[0, 0] == 0
    assert weight[1, 1].isnan()
    assert not moment[~mask].any()
    assert moment[mask].all()


def test_masks_that_fit_nothing_are_refused() -> None:
    weight = torch.zeros(3, 4)
    for mask in (torch.ones(4, 3).bool(), torch.ones(3, dtype=torch.uint8), torch.ones(3, 4)):
        with pytest.raises(RuntimeError, match="mask must be"):
            masked_update_([weight], mask)
    with pytest.raises(RuntimeError, match="the same shape"):
        masked_update_([weight, weight[0]], torch.ones(3, 4).bool())
    masked_update_([], torch.ones(3, 4).bool())
