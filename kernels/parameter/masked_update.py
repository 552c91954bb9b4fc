"""Set entries of a weight and of its optimizer state to zero, in place, so that a pruned weight stays pruned."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import lazy, require
from trainc.kernels.library.register import register_update

__all__ = ["masked_update_"]

# Entries handled at a time, a multiple of 8: fewer calls against masks in words that fit a cache.
BLOCK = 1 << 18
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked_update_(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """Zero, in place and in every one of `tensors`, the entries that `mask` leaves out.

    `tensors` have one shape, any strides and floating dtypes: a weight and its optimizer state. `mask` is bool in that
    shape, True where entries stay, or packed: uint8 (ceil(numel / 8),) with entry i of the flat tensor in bit i % 8,
    low bits first, of byte i // 8 (`trainc.kernels.parameter.masked_update.pack` makes one). Entries outside the mask
    become zero, whatever they held: nan does not survive as 0 * nan would. Entries inside keep their bits. Returns
    None; there is no gradient. An empty list is left as it is.

    Raises RuntimeError for tensors of several shapes and for a mask of another shape or dtype.
    """
    with torch.no_grad():
        _operator(list(tensors), mask)


def pack(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 (ceil(numel / 8),), an eighth of its size."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    bits = padded.new_tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (padded * bits).sum(1, dtype=torch.uint8)


@functools.cache
def _table(device: torch.device) -> Tensor:
    """The eight bools of every byte, as int64 (256,)."""
    bits = torch.arange(8, dtype=torch.int64, device=device)
    bytes_ = torch.arange(256, dtype=torch.int64, device=device).unsqueeze(1)
    return (bytes_ >> bits & 1).bool().view(torch.int64).view(256)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` entries of a packed mask, bool (count,)."""
    looked_up = _table(packed.device).index_select(0, packed.int())
    return looked_up.view(torch.bool)[:count]


def reference(tensor: Tensor, mask: Tensor) -> Tensor:
    """The definition, entry by entry, for a bool mask."""
    kept = zip(tensor.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return tensor.new_tensor([value if stays else 0.0 for value, stays in kept]).view(tensor.shape)


def check(tensors: Sequence[Tensor], mask: Tensor) -> None:
    """Reject tensors of several shapes, and a mask of another shape or dtype."""
    require(
        all(t.shape == tensors[0].shape for t in tensors),
        lambda: f"tensors must all have the same shape, not {[tuple(t.shape) for t in tensors]}",
    )
    if not tensors:
        return
    packed = mask.dtype == torch.uint8
    expected = ((tensors[0].numel() + 7) // 8,) if packed else tuple(tensors[0].shape)
    require(
        mask.dtype in (torch.bool, torch.uint8) and tuple(mask.shape) == expected,
        lambda: (
            f"mask must be bool in the shape of the tensors, {tuple(tensors[0].shape)}, or packed uint8, "
            f"not {tuple(mask.shape)} {mask.dtype}"
        ),
    )


def eager(tensors: Sequence[Tensor], mask: Tensor) -> None:
    check(tensors, mask)
    dense = [tensor.view(-1) for tensor in tensors if _in_words(tensor)]
    for tensor in tensors:
        if not _in_words(tensor):
            kept = unpack(mask, tensor.numel()) if mask.dtype == torch.uint8 else mask
            tensor.masked_fill_(~kept.view(tensor.shape), 0)
    entries = mask.reshape(-1)
    for start in range(0, dense[0].numel() if dense else 0, BLOCK):
        stop = min(start + BLOCK, dense[0].numel())
        if mask.dtype == torch.uint8:
            kept = unpack(entries[start // 8 : (stop + 7) // 8], stop - start)
        else:
            kept = entries[start:stop]
        words: dict[torch.dtype, Tensor] = {}
        for tensor in dense:
            bits = BITS[tensor.itemsize]
            if bits not in words:
                words[bits] = kept.to(bits).neg_()
            # ANDing all ones or none keeps or clears exactly, and unlike masked_fill_ in vectors.
            tensor[start:stop].view(bits).bitwise_and_(words[bits])


def _in_words(tensor: Tensor) -> bool:
    """Return whether entries lie one after the other, each an integer of torch's; complex128 has 16 bytes."""
    return tensor.is_contiguous() and tensor.itemsize in BITS


def fake(tensors: Sequence[Tensor], mask: Tensor) -> None:
    check(tensors, mask)


_operator = register_update(
    "masked_update_",
    cpu=eager,
    cuda=lazy("parameter.triton_masked_update", "masked_update_"),
    fake=fake,
    mutates=("tensors",),
)
