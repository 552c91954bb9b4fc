"""Inputs that make arithmetic fail: families of tensors, the same on every device.

A family is a function of float64 standard normals, examples first, and of the dtype they are to be
rounded to, which decides what is large and what is denormal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators import Problem, outputs

Family = Callable[[Tensor, torch.dtype], Tensor]
HALF = torch.float16


def _normal(z: Tensor, dtype: torch.dtype) -> Tensor:
    return z


def _large_mean(z: Tensor, dtype: torch.dtype) -> Tensor:
    # In 16 bits the spread is then a few units in the last place, or one.
    return z + (1e4 if dtype == torch.float32 else 1e3)


def _tiny_variance(z: Tensor, dtype: torch.dtype) -> Tensor:
    level = z[:1, ..., :1] if z.dim() > 1 else z[:1]  # one for all examples, as for a channel
    spread = torch.full_like(z, 1e-6)
    spread[1::2] = 1e-8
    return level + spread * z


def _denormal(z: Tensor, dtype: torch.dtype) -> Tensor:
    return z * (1e-6 if dtype == HALF else 1e-40)


def _large(z: Tensor, dtype: torch.dtype) -> Tensor:
    return (1e4 * z).clamp(-6e4, 6e4) if dtype == HALF else 1e18 * z


def _huge_entry(z: Tensor, dtype: torch.dtype) -> Tensor:
    found = z.clone()
    found.view(z.shape[0], -1)[::7, 0] = 3e4 if dtype == HALF else 1e10
    return found


def _zeros(z: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(z)


def _wide_range(z: Tensor, dtype: torch.dtype) -> Tensor:
    most = 3 if dtype == HALF else 6
    exponents = torch.linspace(-most, most, z.shape[0], dtype=z.dtype)
    return z * (10**exponents).view(-1, *[1] * (z.dim() - 1))


def _confident(z: Tensor, dtype: torch.dtype) -> Tensor:
    """One entry of each row ahead of the others, by 100 to 10,000."""
    rows = z.flatten(0, -2).clone()
    gaps = torch.logspace(2, 4, rows.shape[0], dtype=z.dtype)
    # Another order than by row, so that the two views of an example differ in confidence.
    rows[torch.arange(rows.shape[0]), torch.arange(rows.shape[0]) % rows.shape[1]] += gaps.flip(0)
    return rows.view(z.shape)


FAMILIES: dict[str, Family] = {
    "normal": _normal,
    "large mean": _large_mean,
    "tiny variance": _tiny_variance,
    "denormal": _denormal,
    "large": _large,
    "huge entry": _huge_entry,
    "zeros": _zeros,
    "wide range": _wide_range,
    "small gradients": _normal,
}
LOGITS: dict[str, Family] = {**FAMILIES, "confident": _confident}
# What gradients of results are multiplied by in the family that is about them.
SMALL = {torch.float16: 1e-6, torch.bfloat16: 1e-20, torch.float32: 1e-20}


def fill(problem: Problem, family: str, data: tuple[int, ...], dtype: torch.dtype) -> None:
    """Put the family's numbers into the arguments numbered by `data`, and draw new gradients.

    No number at all stands for the gradients of the results, which are normal otherwise.
    """
    make = LOGITS[family]
    for number in data:
        argument = problem.arguments[number]
        drawn = make(_draw(argument), dtype).to(dtype)
        with torch.no_grad():
            argument.copy_(drawn)
    if not problem.leaves():
        return
    scale = SMALL[dtype] if family == "small gradients" else 1.0
    problem.cotangents = []
    for result in outputs(problem.ours, problem.arguments):
        if result.requires_grad:
            z = scale * _draw(result)
            rounded = (z if data else make(z, dtype)).to(dtype)
            problem.cotangents.append(rounded.to(result))


def _draw(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float64)
