"""Multiplicative Gaussian noise N(1, sigma^2) on features; backward is the operator again, on dy."""

import math
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype, lazy, require
from trainc.kernels.library.register import register
from trainc.kernels.noise.factors import factor_once
from trainc.kernels.noise.normals import normal
from trainc.kernels.noise.philox import MAX_SITES, MAX_TOKENS, MAX_VIEWS

__all__ = ["multiplicative_noise", "noisy_add"]

SHARES = ("token", "none", "none_fast")


def multiplicative_noise(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str = "token",
    first_example: Tensor | None = None,
) -> Tensor:
    """Multiply `x` by z = 1 + sigma * eps, eps standard normal in float32 and the same for the same arguments.

    `x` is (views * B, ..., C), floating, rows ordered view by view; `views` is 1 to 256 and divides the rows. `sigma`
    is 0-d, the noise's standard deviation; at 0 the result is x bit for bit. `key` is the 0-d int64 of
    `philox.pack_key(seed, step)`, and `site`, in [0, 2^32), numbers the place in the model. `share` "token" draws eps
    per (view, example, channel), the same for all middle dims; "none" draws per token too, a token being an index of
    the flattened middle dims, of which there are 2^24 at most. "none_fast" is "none" with the approximate logarithms,
    roots, sines and cosines of a CUDA device, in half the instructions: not bit-equal to "none", nor to a CPU's. By the
    errors stated for these, eps is off by 6e-6 at most where its pair is not within 0.1 of 0 (199 of 200), and by 6e-4
    anywhere. Where no Triton kernel runs, on a CPU and in float64, it is "none". `first_example` (0-d int64, or None
    for 0) is the index of x's first example in the step's batch, so that micro-batches draw the noise of the whole
    batch.

    Returns a tensor of x's shape and dtype. Of the tensors x alone gets a gradient, z * dy, which can be differentiated
    again. Raises RuntimeError for arguments outside of this, and NotImplementedError for forward-mode derivatives.

    Source: PACE, Ni et al. 2024, arXiv:2409.17137, eq. 11.
    """
    y: Tensor = _multiply(x, sigma, key, site, views, share, first_example)
    return y


def composed_noise(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str = "token",
    first_example: Tensor | None = None,
) -> Tensor:
    """The same numbers in plain operators: the factor, which is the noise on ones, times x."""
    if x.dim() < 2 or not x.is_floating_point():  # the noise on ones checks the rest
        raise RuntimeError(_wrong_x(x))
    shape = [x.shape[0], *(x.shape[1:-1] if share != "token" else [1] * (x.dim() - 2)), x.shape[-1]]
    ones = torch.ones(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    z = multiplicative_noise(ones, sigma, key, site, views, share, first_example)
    y = x * z
    return y if y.dtype == x.dtype else y.to(x.dtype)


def noisy_add(
    h0: Tensor,
    delta: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str = "token",
    first_example: Tensor | None = None,
) -> Tensor:
    """Compute h0 + z * delta with the z of `multiplicative_noise`: a frozen layer plus its noisy adapter.

    `h0` and `delta` are floating tensors of one shape (views * B, ..., C), in one or two dtypes, rows ordered view by
    view. z = 1 + `sigma` * eps, with `sigma`, `key`, `site`, `views`, `share` and `first_example` as there: the
    standard deviation (0-d), seed and step (0-d int64), the place, views 1 to 256 that divide the rows, eps shared by
    all tokens of an example ("token") or not ("none", "none_fast"), and where delta's first example is in the step's
    batch (0-d int64, or None for 0).

    Returns their shape in the promoted dtype. h0 gets dy for its gradient and delta z * dy, which can be differentiated
    again. Raises RuntimeError for arguments outside of this, and NotImplementedError for forward-mode derivatives.

    Source: PACE, Ni et al. 2024, arXiv:2409.17137, eq. 11.
    """
    y: Tensor = _add(h0, delta, sigma, key, site, views, share, first_example)
    return y


def reference(
    x: Tensor,
    sigma: float,
    seed: int,
    step: int,
    site: int,
    views: int,
    share: str = "token",
    first_example: int = 0,
) -> Tensor:
    """The definition, one view and example at a time, in the dtype of x."""
    examples = x.shape[0] // views
    rows = []
    for row in range(x.shape[0]):
        view, example = divmod(row, examples)
        flat = x[row].reshape(-1, x.shape[-1])
        tokens = flat.shape[0] if share != "token" else None
        every = normal(
            (seed, step), site, view + 1, 1, x.shape[-1], tokens, first_example + example
        )
        rows.append((flat * (1 + sigma * every[view, 0].to(x.dtype))).reshape(x[row].shape))
    return torch.stack(rows) if rows else x.clone()


def check(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str,
    first_example: Tensor | None,
) -> None:
    """Reject arguments outside the contract, among them coordinates that do not fit the noise counters."""
    require(share in SHARES, lambda: f"share must be one of {SHARES}, not {share!r}")
    require(
        x.dim() >= 2 and x.is_floating_point(),
        lambda: _wrong_x(x),
    )
    require(1 <= views <= MAX_VIEWS, lambda: f"views must be 1 to {MAX_VIEWS}, not {views}")
    require(
        x.shape[0] % views == 0,
        lambda: f"views must divide the rows of x, {x.shape[0]}, and {views} does not",
    )
    require(0 <= site < MAX_SITES, lambda: f"site must be in [0, 2^32), not {site}")
    tokens = math.prod(x.shape[1:-1]) if share != "token" else 1
    require(tokens <= MAX_TOKENS, lambda: f"an example must have at most 2^24 tokens, not {tokens}")
    require(
        first_example is None
        or (first_example.dim() == 0 and not first_example.is_floating_point()),
        lambda: "first_example must be None or a 0-d integer tensor",
    )
    require(
        sigma.dim() == 0 and key.dim() == 0 and key.dtype == torch.int64,
        lambda: "sigma and key must be 0-d tensors, key of int64",
    )


def _wrong_x(x: Tensor) -> str:
    return f"x must be a floating-point (views * B, ..., C) tensor, not {tuple(x.shape)} {x.dtype}"


def eager_multiply(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str,
    first_example: Tensor | None,
) -> Tensor:
    check(x, sigma, key, site, views, share, first_example)
    z = factor_once(x, sigma, key, site, views, share, first_example)
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    if flat.dtype == z.dtype and flat.is_contiguous():
        return torch.mul(flat, z).view(x.shape)
    y = torch.empty_like(flat, memory_format=torch.contiguous_format)
    # `out` lets one pass read and write 16-bit values while multiplying in float32.
    return torch.mul(flat, z, out=y).view(x.shape)


def fake_multiply(x: Tensor, *noise: Any) -> Tensor:
    check(x, *noise)
    return x.new_empty(x.shape)


def eager_add(
    h0: Tensor,
    delta: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str,
    first_example: Tensor | None,
) -> Tensor:
    check_pair(h0, delta, sigma, key, site, views, share, first_example)
    z = factor_once(delta, sigma, key, site, views, share, first_example)
    shape = (delta.shape[0], math.prod(delta.shape[1:-1]), delta.shape[-1])
    y = h0.new_empty(shape, dtype=torch.promote_types(h0.dtype, delta.dtype))
    return torch.addcmul(h0.reshape(shape), delta.reshape(shape), z, out=y).view(h0.shape)


def check_pair(h0: Tensor, delta: Tensor, *noise: Any) -> None:
    """Reject arguments outside the contract; `noise` as `check` takes it."""
    check(delta, *noise)
    require(
        h0.shape == delta.shape,
        lambda: f"h0 {tuple(h0.shape)} and delta {tuple(delta.shape)} must have the same shape",
    )


def fake_add(h0: Tensor, delta: Tensor, *noise: Any) -> Tensor:
    check_pair(h0, delta, *noise)
    return h0.new_empty(h0.shape, dtype=torch.promote_types(h0.dtype, delta.dtype))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *values, sigma, key, site, views, share, first_example = inputs
    ctx.save_for_backward(sigma, key, first_example)
    ctx.place = (site, views, share)
    ctx.dtypes = [value.dtype for value in values]


def _through(ctx, dy: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
    """z * dy: the operator is its own derivative, with z drawn again from the same counters."""
    sigma, key, first_example = ctx.saved_tensors
    gradient: Tensor = _multiply(dy, sigma, key, *ctx.place, first_example)
    return gradient.to(dtype)


def _multiply_backward(ctx, dy):  # type: ignore[no-untyped-def]
    dx = _through(ctx, dy, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, None


def _add_backward(ctx, dy):  # type: ignore[no-untyped-def]
    wants = ctx.needs_input_grad
    dh0 = dy.to(ctx.dtypes[0]) if wants[0] else None
    ddelta = _through(ctx, dy, ctx.dtypes[1]) if wants[1] else None
    return dh0, ddelta, None, None, None, None, None, None


# No autocast rule: both keep the dtypes they are given.
_multiply = register(
    "multiplicative_noise",
    cpu=eager_multiply,
    cuda=lazy("noise.triton_noise", "multiplicative_noise"),
    fake=fake_multiply,
    setup_context=_setup_context,
    backward=_multiply_backward,
)
_add = register(
    "noisy_add",
    cpu=eager_add,
    cuda=lazy("noise.triton_noise", "noisy_add"),
    fake=fake_add,
    setup_context=_setup_context,
    backward=_add_backward,
)
