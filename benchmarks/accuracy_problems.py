"""Accuracy problems: operators in the variants and with the results that no benchmark times."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import trainc.functional as ours
from benchmarks import updates
from benchmarks.operators import (
    KEY,
    SITE,
    VIEWS,
    Make,
    Problem,
    Size,
    batch_norm,
    linear,
    noisy,
    norm,
)
from trainc.kernels.batch_norm import ghost_batch_norm as ghosts
from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.loss import cross_entropy_consistency as consistency
from trainc.kernels.loss import linear_cross_entropy as chunked
from trainc.kernels.loss import linear_cross_entropy_consistency as heads
from trainc.kernels.noise.factors import factor
from trainc.kernels.norm import group_norm as groups_of
from trainc.kernels.parameter import sparse_adamw as adamw

Build = Callable[[Size, torch.dtype, str], Problem]


def with_algorithm(algorithm: str) -> Build:
    """A linear layer whose norms are made by one algorithm."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        return replace(linear(size, dtype, device), ours=partial(ours.linear, algorithm=algorithm))

    return build


def llama(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """RMSNorm that rounds before its weight, with a probe."""
    problem, eps = norm(rms=True, add=False, probed=True)(size, dtype, device), 1e-5

    def unit(x: Tensor) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        product = cotangents[0].to(arguments[-1]) * unit(arguments[0])
        return product.sum(1).square().sum(1, keepdim=True)

    return replace(
        problem,
        ours=lambda x, weight, probe: ours.rms_norm(x, [size.width], weight, probe, eps, "llama"),
        aten=lambda x, weight, probe: unit(x) * weight,
        statistics=statistics,
    )


def same_noise(add: bool, share: str) -> Build:
    """Noise beside a composition that is given the same draws instead of its own."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        problem = noisy(add, share)(size, dtype, device)
        sigma, key = torch.tensor(0.5, device=device), KEY.to(device)

        def aten(*given: Tensor) -> Tensor:
            z = factor(given[-1], sigma, key, SITE, VIEWS, share, None).to(dtype)
            return given[0] + given[-1] * z if add else given[-1] * z

        return replace(problem, aten=aten)

    return build


def loss(distance: str, smoothing: float) -> Build:
    """The three results of the loss, every fourth target ignored where labels are smoothed."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make, rows = Make(dtype, device), size.examples * size.rows
        targets = make.whole(size.width, rows)
        if smoothing:
            targets[::4] = -100
        weight = torch.tensor(0.5, dtype=accumulation_dtype(dtype), device=device)

        def fused(logits: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return ours.cross_entropy_consistency(
                logits, targets, weight, distance, -100, smoothing
            )

        def aten(logits: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            found = consistency.reference(logits, targets, weight, distance, -100, smoothing)
            return tuple(one.to(weight.dtype) for one in found)

        def exact(logits: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return exactly(logits, targets, weight, distance, smoothing)

        arguments = [make.normal(2 * rows, size.width), weight.requires_grad_()]
        return Problem(arguments, fused, aten, (0, 0), exact=exact)

    return build


def head(distance: str, smoothing: float) -> Build:
    """The three results of the loss through a head whose logits are not held."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make, (examples, rows, width) = Make(dtype, device), (size.examples, size.rows, size.width)
        targets, classes = make.whole(2 * width, examples, rows), 2 * width
        weight = torch.tensor(0.5, dtype=accumulation_dtype(dtype), device=device)
        options = distance, -100, smoothing

        def fused(hidden: Tensor, head: Tensor, bias: Tensor, weight: Tensor) -> Any:
            return ours.linear_cross_entropy_consistency(
                hidden, head, bias, targets, weight, *options
            )

        def aten(hidden: Tensor, head: Tensor, bias: Tensor, weight: Tensor) -> Any:
            found = heads.reference(hidden, head, bias, targets, weight, *options)
            return tuple(one.to(weight.dtype) for one in found)

        def exact(hidden: Tensor, head: Tensor, bias: Tensor, weight: Tensor) -> Any:
            logits = functional.linear(hidden, head, bias).flatten(0, -2)
            return exactly(logits, targets.flatten(), weight, distance, smoothing)

        hidden, bias = make.normal(2 * examples, rows, width), make.normal(classes)
        matrix = (make.normal(classes, width, grad=False) / width**0.5).requires_grad_()
        arguments = [hidden, matrix, bias, weight.requires_grad_()]
        return Problem(arguments, fused, aten, (0, 0), exact=exact)

    return build


def chunked_head(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """The cross-entropy through a head whose logits are not held, in three chunks."""
    make, (examples, rows, width) = Make(dtype, device), (size.examples, size.rows, size.width)
    targets, classes = make.whole(2 * width, examples, rows), 2 * width
    wide = accumulation_dtype(dtype)

    def fused(hidden: Tensor, head: Tensor, bias: Tensor) -> Any:
        return (
            ours.linear_cross_entropy(hidden, head, bias, targets, label_smoothing=0.1, chunks=3),
        )

    def aten(hidden: Tensor, head: Tensor, bias: Tensor) -> Any:
        return (chunked.reference(hidden, head, bias, targets, -100, 0.1).to(wide),)

    hidden, bias = make.normal(examples, rows, width), make.normal(classes)
    matrix = (make.normal(classes, width, grad=False) / width**0.5).requires_grad_()
    return Problem([hidden, matrix, bias], fused, aten, (0, 0))


def exactly(
    logits: Tensor, targets: Tensor, weight: Tensor, distance: str, smoothing: float
) -> tuple[Tensor, ...]:
    """Loss, cross-entropy and consistency of (2n, C) logits, for float64 on any input."""
    _, cross_entropy, mean_distance = consistency.reference(
        logits, targets, weight, distance, -100, smoothing
    )
    if distance == "kl":
        mean_distance = divergence(*logits.chunk(2))
    return cross_entropy + weight * mean_distance, cross_entropy, mean_distance


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """The symmetric divergence <p - q, log p - log q> / 2 with gradients that keep p - q.

    Each view counts log p - log q from its own likeliest class: beside 1e18, float64 loses p - q.
    """
    apart, parts = first.log_softmax(1) - second.log_softmax(1), []
    for view in (first, second):
        level = apart.gather(1, view.argmax(1, keepdim=True)).detach()
        parts.append((view.softmax(1) * (apart - level)).sum(1) + level.squeeze(1))
    return (parts[0] - parts[1]).mean() / 2


def ghost_operator(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Ghost batch norm by the operator, which small inputs on a CPU do without."""
    ghost = max(2, size.examples // 8)
    return replace(
        batch_norm(size, dtype, device),
        ours=lambda x, w, b: torch.ops.trainc.ghost_batch_norm(x, w, b, ghost, 1e-5, "error")[0],
    )


def running(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """The running statistics that ghost batches leave."""
    make, ghost = Make(dtype, device), max(2, size.examples // 8)
    x = make.normal(size.examples, size.width, size.rows, grad=False)
    state = [torch.ones(size.width, dtype=dtype, device=device) for _ in range(2)]

    def fused(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        _, means, _, variances = torch.ops.trainc.ghost_batch_norm(
            x, None, None, ghost, 1e-5, "error"
        )
        ghosts.advance_(mean, var, means, variances, 0.1)
        return mean, var

    def aten(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        for part in x.split(ghost):
            functional.batch_norm(part, mean, var, training=True)
        return mean, var

    return Problem([x, *state], fused, aten, (0, 0))


def chosen_adamw(with_master: bool) -> Build:
    """One AdamW step on single entries with their gradient gathered; a master copy may lead."""
    options = (updates.BETA1, updates.BETA2, updates.EPS, updates.DECAY, updates.STEP)
    beta1, beta2, eps, decay, step = options

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make, count = Make(dtype, device), size.examples * size.rows
        weight = make.normal(count, size.width, grad=False)
        index = torch.randperm(weight.numel(), device=device)[:count].int()
        gradient = make.normal(count, grad=False)
        state = [torch.rand(count, device=device) for _ in range(2)]
        master = [torch.randn(count, device=device)] if with_master else []

        def fused(*given: Tensor) -> tuple[Tensor, ...]:
            weight, gradient, first, second, *leading = given
            ours.sparse_adamw_(
                weight, gradient, first, second, index, lr=updates.LR, beta1=beta1, beta2=beta2,
                eps=eps, weight_decay=decay, step=step, gathered=True,
                master=leading[0] if leading else None,
            )  # fmt: skip
            return weight, first, second, *leading

        def aten(*given: Tensor) -> tuple[Tensor, ...]:
            weight, gradient, first, second, *leading = given
            values = leading[0] if leading else weight.take(index.long()).to(first.dtype)
            values, first, second = adamw.reference(
                values, gradient.to(first.dtype), first, second, updates.LR, beta1, beta2, eps,
                decay, step,
            )  # fmt: skip
            weight.put_(index.long(), values.to(weight.dtype))
            return weight, first, second, *([values] if leading else [])

        return Problem([weight, gradient, *state, *master], fused, aten, (0, 0))

    return build


def group_norm(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Three groups of channels with a probe; the width is channels, the rows are pixels."""
    make, groups, eps = Make(dtype, device), 3, 1e-5
    x = make.normal(size.examples, size.width, size.rows)
    affine = [make.normal(size.width) for _ in range(2)]

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        wide = accumulation_dtype(arguments[0].dtype)
        x, weight, bias, dy = (one.to(wide) for one in (*arguments[:3], cotangents[0]))
        return groups_of.reference(x, groups, weight, bias, dy, eps)["norms"]

    return Problem(
        [x, *affine, make.probe(size.examples, 2)],
        lambda x, weight, bias, probe: ours.group_norm(x, groups, weight, bias, probe, eps),
        lambda x, weight, bias, probe: functional.group_norm(x, groups, weight, bias, eps),
        (0, 0), statistics,
    )  # fmt: skip


def convolution(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Kernels of 3 by 3 with a probe; the width is channels, images are as wide as they are high."""
    make, side = Make(dtype, device), size.rows
    x, bias = make.normal(size.examples, size.width, side, side), make.normal(5)
    weight = make.normal(5, size.width, 3, 3)

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        x, weight, bias, probe = (one.detach() for one in arguments)
        norms = []
        for one, dy in zip(x.split(1), cotangents[0].split(1), strict=True):
            leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
            with torch.enable_grad():
                y = functional.conv2d(one, *leaves)
            found = torch.autograd.grad(y, leaves, dy)
            norms.append(torch.stack([part.to(probe.dtype).square().sum() for part in found]))
        return torch.stack(norms)

    return Problem(
        [x, weight, bias, make.probe(size.examples, 2)], ours.convolution,
        lambda x, weight, bias, probe: functional.conv2d(x, weight, bias), (0, 0), statistics,
    )  # fmt: skip


def split_columns(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Sums over tensors, columns apart: products may cancel and squares may not."""
    problem = updates.multi_norm(size, dtype, device)

    def apart(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def columns(*given: Tensor) -> tuple[Tensor, ...]:
            sums = forward(*given)
            return sums[:, :2], sums[:, 2], sums[:, 3]

        return columns

    assert problem.exact is not None
    return replace(
        problem,
        ours=apart(problem.ours),
        aten=apart(problem.aten),
        exact=apart(problem.exact),
    )
