"""Convolutions, group norms and tied weights beside ATen's, as problems like those of `operators`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import trainc.functional as ours
from benchmarks.operators import Make, Problem, Size
from trainc.kernels.layer import tied_linear
from trainc.kernels.library.contracts import accumulation_dtype

Build = Callable[[Size, torch.dtype, str], Problem]


def convolution(kernel: int, groups: int | None = 1, outputs: int | None = None) -> Build:
    """Square images of so many rows each; the width is channels. No groups: one for each channel."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make, parts = Make(dtype, device), size.width if groups is None else groups
        side, wide = round(size.rows**0.5), outputs or size.width
        x, bias = make.normal(size.examples, size.width, side, side), make.normal(wide)
        shape = (wide, size.width // parts, kernel, kernel)
        weight = (make.normal(*shape, grad=False) / kernel).requires_grad_()
        moves: tuple[Any, ...] = (1, kernel // 2, 1, parts)

        def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
            x, (dy,) = arguments[0].detach(), cotangents
            each = _gradients_of_examples(x, dy, weight.detach(), *moves)
            summed = dy.flatten(2).sum(2, dtype=accumulation_dtype(dtype))
            squares = [t.to(summed.dtype).square().flatten(1).sum(1) for t in (each, summed)]
            return torch.stack(squares, 1)

        moved = (x.numel() + size.examples * wide * size.rows + weight.numel()) * dtype.itemsize
        return Problem(
            [x, weight, bias, make.probe(size.examples, 2)],
            lambda x, weight, bias, probe: ours.convolution(x, weight, bias, probe, *moves),
            lambda x, weight, bias, probe: functional.conv2d(x, weight, bias, *moves),
            (moved, 2 * moved), statistics,
        )  # fmt: skip

    return build


def _gradients_of_examples(
    x: Tensor, dy: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """(B, *weight.shape) by unfolding the batch and one product, as published code does."""
    examples, kernel = x.shape[0], weight.shape[2:]
    seen = functional.unfold(x, tuple(kernel), dilation, padding, stride)
    seen = seen.view(examples, groups, -1, seen.shape[-1])
    grad = dy.reshape(examples, groups, -1, seen.shape[-1])
    return torch.matmul(grad, seen.mT).view(examples, *weight.shape)


def group_norm(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Groups of eight channels; the width is channels, the rows are pixels."""
    make, groups, eps = Make(dtype, device), size.width // 8, 1e-5
    x = make.normal(size.examples, size.width, size.rows)
    affine = [make.normal(size.width) for _ in range(2)]

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        wide = accumulation_dtype(dtype)
        x, dy = arguments[0].detach().to(wide), cotangents[0].to(wide)
        unit = functional.group_norm(x, groups, eps=eps)
        each = [(dy * unit).sum(2), dy.sum(2)]
        return torch.stack([one.square().sum(1) for one in each], 1)

    moved = x.numel() * dtype.itemsize
    return Problem(
        [x, *affine, make.probe(size.examples, 2)],
        lambda x, weight, bias, probe: ours.group_norm(x, groups, weight, bias, probe, eps),
        lambda x, weight, bias, probe: functional.group_norm(x, groups, weight, bias, eps),
        (2 * moved, 3 * moved), statistics,
    )  # fmt: skip


def tied_weight(size: Size, dtype: torch.dtype, device: str, words: int = 4096) -> Problem:
    """An embedding of so many words and a head of the same weight, nothing between them."""
    make = Make(dtype, device)
    ids = make.whole(words, size.examples, size.rows)
    weight = (make.normal(words, size.width, grad=False) / size.width**0.5).requires_grad_()
    probe = make.probe(size.examples, 1)

    def fused(weight: Tensor, probe: Tensor) -> Tensor:
        y, rows = ours.tied_embedding(weight, ids, None, probe)
        return ours.tied_linear(y, weight, None, probe, rows, ids)

    def aten(weight: Tensor, probe: Tensor) -> Tensor:
        return functional.linear(functional.embedding(ids, weight), weight)

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        wide = accumulation_dtype(dtype)
        table, dlogits = arguments[0].detach().to(wide), cotangents[0].to(wide)
        y = functional.embedding(ids, table)
        return tied_linear.reference(table, ids, None, dlogits @ table, y, dlogits).unsqueeze(1)

    logits = ids.numel() * words
    moved = (logits + 2 * ids.numel() * size.width + weight.numel()) * dtype.itemsize
    return Problem([weight, probe], fused, aten, (moved, 2 * moved), statistics)


CASES: dict[str, tuple[Build, tuple[Size, ...]]] = {
    "convolution 3x3, probe": (
        convolution(3),
        (Size(16, 1024, 32), Size(16, 1024, 64), Size(32, 256, 128), Size(32, 16, 512)),
    ),
    "convolution 1x1, probe": (convolution(1), (Size(16, 196, 256),)),
    "convolution 3x3, depthwise, probe": (convolution(3, groups=None), (Size(16, 256, 128),)),
    "group_norm, probe": (group_norm, (Size(16, 256, 64), Size(16, 1024, 128))),
    "tied weight, probe": (tied_weight, (Size(8, 128, 256),)),
}
