"""Every operator beside the ATen composition it replaces, as problems of any size.

A problem holds arguments for both. Where ours takes a probe, the composition works out the same
per-example norms by hand after its backward pass, so that both yield the same results.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import trainc.functional as ours
from trainc.kernels.layer import embedding as embeddings
from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.noise import philox
from trainc.kernels.noise.factors import factor

Forward = Callable[..., Any]
KEY, SITE, VIEWS = philox.pack_key(seed=1, step=2), 3, 2


@dataclass(frozen=True, slots=True)
class Size:
    """Examples, rows an example, and the width of a row."""

    examples: int
    rows: int
    width: int


@dataclass(slots=True)
class Problem:
    """Arguments, the two ways to compute from them, and the fewest bytes forward and backward."""

    arguments: list[Any]
    ours: Forward
    aten: Forward
    moved: tuple[int, int]
    # From arguments and the gradients of the results: what the probe receives, by hand.
    statistics: Callable[[list[Any], list[Tensor]], Tensor] | None = None
    # In float64, where the composition computes another function, as one that draws its own noise.
    exact: Forward | None = None
    # From the same: one function that makes all gradients and the norms, and its arguments, for a compiler to fuse.
    rival: Callable[[list[Any], list[Tensor]], tuple[Forward, list[Tensor]]] | None = None
    # The name Liger's kernels give the operator.
    liger: str | None = None
    cotangents: list[Tensor] = field(default_factory=list)

    def leaves(self) -> list[Tensor]:
        """The arguments that receive gradients."""
        return [a for a in self.arguments if isinstance(a, Tensor) and a.requires_grad]


def outputs(forward: Forward, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results of one call as a tuple."""
    found = forward(*arguments)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def step(problem: Problem, forward: Forward, by_hand: bool = False) -> list[Tensor | None]:
    """Forward and backward: results, then the gradients of the leaves."""
    found = outputs(forward, problem.arguments)
    leaves = problem.leaves()
    if not leaves:
        return list(found)
    ends = [one for one in found if one.requires_grad]
    if not problem.cotangents:
        problem.cotangents = [torch.randn_like(one) for one in ends]
    grads = list(torch.autograd.grad(ends, leaves, problem.cotangents, allow_unused=True))
    if by_hand and problem.statistics is not None:
        with torch.no_grad():
            grads[-1] = problem.statistics(problem.arguments, problem.cotangents)
    return [*found, *grads]


class Make:
    """Random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        """Standard normals."""
        drawn = torch.randn(shape, device=self.device, dtype=torch.float32)
        return drawn.to(self.dtype).requires_grad_(grad)

    def probe(self, examples: int, columns: int) -> Tensor:
        """Zeros that receive per-example norms."""
        dtype = accumulation_dtype(self.dtype)
        zeros = torch.zeros(examples, columns, dtype=dtype, device=self.device)
        return zeros.requires_grad_()

    def whole(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, device=self.device)


def _traffic(make: Make, elements: int, forward: int, backward: int) -> tuple[int, int]:
    size = make.dtype.itemsize * elements
    return forward * size, backward * size


def _norm_statistics(rms: bool, add: bool, eps: float) -> Callable[..., Tensor]:
    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        x = arguments[0] + arguments[1] if add else arguments[0]
        dtype = accumulation_dtype(x.dtype)
        x, dy = x.to(dtype), cotangents[-1].to(dtype)
        centred = x if rms else x - x.mean(-1, keepdim=True)
        unit = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        each = [(dy * unit).sum(1)] if rms else [(dy * unit).sum(1), dy.sum(1)]
        return torch.stack([one.square().sum(1) for one in each], 1)

    return statistics


def _norm_rival(rms: bool, add: bool, eps: float) -> Callable[..., Any]:
    """Backward with per-example norms in plain operations, from the statistics that forward keeps."""

    def backward(
        x: Tensor,
        weight: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        dy: Tensor,
        dtotal: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wide, slope = x.float(), dy.float()
        unit = (wide if mean is None else wide - mean) * rstd
        g = slope * weight.float()
        dx = g - unit * (g * unit).mean(-1, keepdim=True)
        dx = rstd * (dx if mean is None else dx - g.mean(-1, keepdim=True))
        dx = dx if dtotal is None else dx + dtotal.float()
        each = [(slope * unit).sum(1)] if mean is None else [(slope * unit).sum(1), slope.sum(1)]
        norms = torch.stack([one.square().sum(1) for one in each], 1)
        return dx.to(x.dtype), *(one.sum(0).to(weight.dtype) for one in each), norms

    def prepare(arguments: list[Any], cotangents: list[Tensor]) -> tuple[Forward, list[Any]]:
        with torch.no_grad():
            x = arguments[0] + arguments[1] if add else arguments[0].detach()
            mean = None if rms else x.float().mean(-1, keepdim=True)
            centred = x.float() if mean is None else x.float() - mean
            rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        dtotal = cotangents[0] if add else None
        return backward, [
            x,
            arguments[2 if add else 1].detach(),
            mean,
            rstd,
            cotangents[-1],
            dtotal,
        ]

    return prepare


def norm(rms: bool, add: bool, probed: bool) -> Callable[[Size, torch.dtype, str], Problem]:
    """LayerNorm or RMSNorm, plain or of a residual sum, with or without a probe."""
    eps = 1e-5

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make, width = Make(dtype, device), size.width
        shape = (size.examples, size.rows, width)
        inputs = [make.normal(*shape) for _ in range(2 if add else 1)]
        affine = [make.normal(width) for _ in range(1 if rms else 2)]
        probe = [make.probe(size.examples, len(affine))] if probed else []
        plain: Forward = functional.rms_norm if rms else functional.layer_norm
        name = ("add_" if add else "") + ("rms_norm" if rms else "layer_norm")
        operator = getattr(ours, name)

        def fused(*given: Any) -> Any:
            parts = given[len(inputs) :]
            last = parts[len(affine) :] or (None,)
            return operator(*given[: len(inputs)], [width], *parts[: len(affine)], *last, eps)

        def aten(*given: Any) -> Any:
            total = given[0] + given[1] if add else given[0]
            y = plain(total, [width], *given[len(inputs) : len(inputs) + len(affine)], eps=eps)
            return (total, y) if add else y

        return Problem(
            [*inputs, *affine, *probe], fused, aten,
            _traffic(make, math.prod(shape), 4 if add else 2, 4 if add else 3),
            statistics=_norm_statistics(rms, add, eps) if probed else None,
            rival=_norm_rival(rms, add, eps) if probed else None,
            liger=None if add else name,
        )  # fmt: skip

    return build


def noisy(add: bool, share: str) -> Callable[[Size, torch.dtype, str], Problem]:
    """Noise on features, alone or on what is added to a frozen layer's; two views."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make = Make(dtype, device)
        shape = (VIEWS * size.examples, size.rows, size.width)
        inputs = [make.normal(*shape) for _ in range(2 if add else 1)]
        sigma, key = torch.tensor(0.5, device=device), KEY.to(device)
        operator: Forward = ours.noisy_add if add else ours.multiplicative_noise
        drawn = (shape[0], 1 if share == "token" else size.rows, size.width)

        def scaled(x: Tensor, z: Tensor, given: tuple[Any, ...]) -> Tensor:
            noised = (x * z).to(x.dtype)
            return given[0] + noised if add else noised

        def aten(*given: Any) -> Tensor:
            z = 1 + sigma * torch.randn(drawn, device=device)
            return scaled(given[-1], z.to(dtype), given)

        def exact(*given: Any) -> Tensor:
            z = factor(given[-1], sigma, key, SITE, VIEWS, share, None)
            return scaled(given[-1], z, given)

        return Problem(
            inputs, lambda *given: operator(*given, sigma, key, SITE, VIEWS, share), aten,
            _traffic(make, math.prod(shape), 3 if add else 2, 2), exact=exact,
        )  # fmt: skip

    return build


def _composed(logits: Tensor, targets: Tensor, weight: Tensor, distance: str) -> Tensor:
    """The loss of two views as a composition."""
    first, second = logits.chunk(2)
    cross_entropy = functional.cross_entropy(first, targets)
    if distance == "mse":
        return cross_entropy + weight * (first - second).square().sum(1).mean()
    log_p, log_q = first.log_softmax(1), second.log_softmax(1)
    gap = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return cross_entropy + weight * gap.sum(1).mean() / 2


def loss(distance: str) -> Callable[[Size, torch.dtype, str], Problem]:
    """Cross-entropy and consistency of two views; the width is the number of classes."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make = Make(dtype, device)
        rows = size.examples * size.rows
        logits, targets = make.normal(2 * rows, size.width), make.whole(size.width, rows)
        weight = torch.tensor(0.5, device=device)

        return Problem(
            [logits],
            lambda logits: ours.cross_entropy_consistency(logits, targets, weight, distance)[0],
            lambda logits: _composed(logits, targets, weight, distance), _traffic(make, logits.numel(), 1, 2),
        )  # fmt: skip

    return build


def head(distance: str, width: int) -> Callable[[Size, torch.dtype, str], Problem]:
    """The same loss from hidden states so wide, through a head without bias."""

    def build(size: Size, dtype: torch.dtype, device: str) -> Problem:
        make = Make(dtype, device)
        rows = size.examples * size.rows
        hidden, weights = make.normal(2 * rows, width), make.normal(size.width, width, grad=False)
        weights = (weights / width**0.5).requires_grad_()
        targets, weight = make.whole(size.width, rows), torch.tensor(0.5, device=device)

        def fused(hidden: Tensor, weights: Tensor) -> Tensor:
            found = ours.linear_cross_entropy_consistency(
                hidden, weights, None, targets, weight, distance
            )
            return found[0]

        return Problem(
            [hidden, weights], fused,
            lambda x, head: _composed(functional.linear(x, head), targets, weight, distance),
            _traffic(make, hidden.numel() + weights.numel(), 1, 2),
        )  # fmt: skip

    return build


def linear(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """A square linear layer with a probe."""
    make, width = Make(dtype, device), size.width
    x, bias = make.normal(size.examples, size.rows, width), make.normal(width)
    weight = (make.normal(width, width, grad=False) / width**0.5).requires_grad_()

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        (dy,) = cotangents
        each = torch.bmm(dy.transpose(1, 2), arguments[0])
        dtype = accumulation_dtype(dy.dtype)
        squares = [each.to(dtype).square().sum((1, 2)), dy.sum(1, dtype=dtype).square().sum(1)]
        return torch.stack(squares, 1)

    forward = (2 * x.numel() + weight.numel()) * dtype.itemsize
    return Problem(
        [x, weight, bias, make.probe(size.examples, 2)], ours.linear,
        lambda x, weight, bias, probe: functional.linear(x, weight, bias),
        (forward, forward + (x.numel() + weight.numel()) * dtype.itemsize), statistics,
    )  # fmt: skip


def embedding(size: Size, dtype: torch.dtype, device: str, words: int = 4096) -> Problem:
    """Rows of a table of so many words with a probe."""
    make = Make(dtype, device)
    ids, weight = make.whole(words, size.examples, size.rows), make.normal(words, size.width)

    def statistics(arguments: list[Any], cotangents: list[Tensor]) -> Tensor:
        table = arguments[0].detach()
        dtype = accumulation_dtype(table.dtype)
        return embeddings.reference(ids, table.to(dtype), cotangents[0].to(dtype))["norms"]

    moved = 2 * ids.numel() * size.width
    return Problem(
        [weight, make.probe(size.examples, 1)],
        lambda weight, probe: ours.embedding(ids, weight, probe=probe),
        lambda weight, probe: functional.embedding(ids, weight),
        (moved * dtype.itemsize, (moved // 2 + weight.numel()) * dtype.itemsize), statistics,
    )  # fmt: skip


def batch_norm(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Ghost batches of an eighth of the examples; the width is channels, the rows are pixels."""
    make = Make(dtype, device)
    x = make.normal(size.examples, size.width, size.rows)
    affine = [make.normal(size.width) for _ in range(2)]
    mean, var = (torch.ones(size.width, device=device) for _ in range(2))
    ghost = max(2, size.examples // 8)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ours.ghost_batch_norm(x, mean, var, weight, bias, ghost, training=True)

    def aten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Float64 and 16 bits, which only checks use, want their own statistics.
        state = mean.to(x.dtype), var.to(x.dtype)

        def ghosts(part: Tensor) -> Tensor:
            return functional.batch_norm(part, state[0], state[1], weight, bias, True)

        return torch.cat([ghosts(part) for part in x.split(ghost)])

    return Problem([x, *affine], fused, aten, _traffic(make, x.numel(), 2, 3))
