"""The operators of convolutions, group norms and tied weights, for test_operators.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.kernels.case import Case, probe, randn

Moves = tuple[list[int], list[int], list[int], int]
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Moves, bool]] = {
    # Input and weight without the examples, how the kernel moves, and whether there is a bias.
    "1d": ((4, 9), (6, 2, 3), ([2], [1], [2], 2), True),
    "2d": ((3, 7, 6), (4, 3, 3, 2), ([1, 2], [1, 0], [1, 2], 1), False),
    "3d": ((2, 4, 3, 3), (4, 1, 2, 1, 3), ([1, 1, 2], [0, 0, 1], [1, 1, 1], 2), True),
    "whole": ((3, 4, 2), (5, 3, 4, 2), ([1, 1], [0, 0], [1, 1], 1), True),
}


def convolution_arguments(
    image: tuple[int, ...], kernel: tuple[int, ...], moves: Moves, with_bias: bool
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        x, weight = randn(examples, *image, dtype=dtype), randn(*kernel, dtype=dtype)
        bias = randn(kernel[0], dtype=dtype) if with_bias else None
        return x, weight, bias, probe(examples, 1 + with_bias, dtype), *moves

    return build


def convolution_reference(x: Tensor, weight: Tensor, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    plain = (functional.conv1d, functional.conv2d, functional.conv3d)[x.dim() - 3]
    return (plain(x, weight, bias, *rest[1:]),)


def group_norm_arguments(
    spatial: tuple[int, ...], groups: int
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        x = randn(examples, 6, *spatial, dtype=dtype)
        affine = (randn(6, dtype=dtype) for _ in range(2))
        return x, groups, *affine, probe(examples, 2, dtype), 1e-5

    return build


def group_norm_reference(x: Tensor, groups: int, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, _, eps = rest
    return (functional.group_norm(x, groups, weight, bias, eps),)


def tied_embedding_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    ids = torch.randint(0, 3, (examples, 6), dtype=torch.int32)
    return randn(4, 5, dtype=dtype), ids, 3, probe(examples, 1, dtype)  # 3 pads


def tied_embedding_reference(
    weight: Tensor, ids: Tensor, padding: int, *_: Any
) -> tuple[Tensor, ...]:
    y = functional.embedding(ids, weight, padding)
    return y, 0 * y


def tied_linear_arguments(
    middle: tuple[int, ...], with_bias: bool
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        bias = randn(7, dtype=dtype) if with_bias else None
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            randn(examples, *middle, 5, dtype=dtype),
            randn(7, 5, dtype=dtype),
            bias,
            probe(examples, 1 + with_bias, dtype),
            torch.zeros(examples, 6, 5, dtype=wide),
            torch.randint(0, 7, (examples, 6)),
        )

    return build


def tied_linear_reference(x: Tensor, weight: Tensor, bias: Any, *_: Any) -> tuple[Tensor, ...]:
    return (functional.linear(x, weight, bias),)


LAYERS = [
    *(
        Case(
            f"convolution-{name}",
            "convolution",
            convolution_arguments(*case),
            convolution_reference,
            3,
            "convolution_backward",
        )
        for name, case in CONVOLUTIONS.items()
    ),
    *(
        Case(
            f"group_norm-{len(spatial)}d-{groups}",
            "group_norm",
            group_norm_arguments(spatial, groups),
            group_norm_reference,
            4,
            "group_norm_backward",
        )
        for spatial, groups in (((3, 5), 2), ((4,), 6))
    ),
    Case(
        "tied_embedding",
        "tied_embedding",
        tied_embedding_arguments,
        tied_embedding_reference,
        3,
        "tied_embedding_backward",
    ),
    *(
        Case(
            f"tied_linear-{len(middle) + 2}d",
            "tied_linear",
            tied_linear_arguments(middle, with_bias),
            tied_linear_reference,
            3,
            "tied_linear_backward",
        )
        for middle, with_bias in (((4,), False), ((2, 3), True))
    ),
]
