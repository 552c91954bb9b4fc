"""Triton kernel for multiplicative noise, with its launchers; imported by the first CUDA call.

The noise is drawn in registers from the counters of `philox.py` and never stored: forward reads x
(and h0) and writes y, backward is the same kernel on dy. With shared tokens a program draws its
channels' noise once and walks over tokens.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.grid import supported
from trainc.kernels.library.launch import launch
from trainc.kernels.noise import multiplicative_noise as operators
from trainc.kernels.noise.philox import MAX_VIEWS

BLOCK_GROUPS = 64
BLOCK_TOKENS = 8
# Exact noise of each token takes more registers: of 8 tokens some compilers spill a few.
BLOCK_TOKENS_ALONE = 4
PROGRAM_TOKENS = 64
# What the second axis of a grid may count: beyond, blocks are larger.
SIDE = 65535


# The interpreter has no assembler's instructions: there, approximations are what they approximate.
_ASSEMBLED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _normal_pair(first, second):
    """Box-Muller on the top 24 bits of two words, as philox.normal_pair."""
    unit: tl.constexpr = 5.9604644775390625e-08
    tau: tl.constexpr = 6.283185307179586
    radius = tl.sqrt(-2.0 * tl.log((first >> 8).to(tl.float32) * unit + unit))
    angle = (second >> 8).to(tl.float32) * unit * tau
    return tl.cos(angle) * radius, tl.sin(angle) * radius


@triton.jit
def _approximate(name: tl.constexpr, x):
    """One instruction of the device's unit for such functions."""
    return tl.inline_asm_elementwise(
        name + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _fast_normal_pair(first, second):
    """The same by approximations: off by 6e-6, and by 6e-4 for radii near 0, where the logarithm is near 0.

    That follows from the errors that PTX states: lg2 2^-22 above 1/2 and relative below, sqrt 2^-23 relative, and cos
    and sin 2^-20.5 within 2 pi.
    """
    unit: tl.constexpr = 5.9604644775390625e-08
    tau: tl.constexpr = 6.283185307179586
    uniform = (first >> 8).to(tl.float32) * unit + unit
    angle = (second >> 8).to(tl.float32) * (unit * tau)
    if _ASSEMBLED:
        squared = _approximate("lg2", uniform) * -1.3862943611198906
        radius = _approximate("sqrt", tl.maximum(squared, 0.0))
        return _approximate("cos", angle) * radius, _approximate("sin", angle) * radius
    radius = tl.sqrt(tl.maximum(tl.log2(uniform) * -1.3862943611198906, 0.0))
    return tl.cos(angle) * radius, tl.sin(angle) * radius


@triton.jit
def _normals(key, group, example, view_token, site, FAST: tl.constexpr = False):
    """Normals of four neighbouring channels per group; the last axis becomes channels."""
    w0, w1, w2, w3 = tl.philox(key, group, example, view_token, site)
    if FAST:
        z0, z1 = _fast_normal_pair(w0, w1)
        z2, z3 = _fast_normal_pair(w2, w3)
    else:
        z0, z1 = _normal_pair(w0, w1)
        z2, z3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["site"])
def noise(
    H0, X, Y, SIGMA, KEY, FIRST, site, examples, tokens, channels, program_tokens,
    HAS_H0: tl.constexpr, HAS_FIRST: tl.constexpr, SHARED: tl.constexpr, FAST: tl.constexpr,
    VIEWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Grid (view * example * token chunks, channel blocks)."""
    chunks = tl.cdiv(tokens, program_tokens)
    line, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    view, example = line // examples, line % examples
    if HAS_FIRST:
        example += tl.load(FIRST).to(tl.int32)
    sigma = tl.load(SIGMA).to(tl.float32)
    key = tl.load(KEY)
    block = tl.program_id(1)
    group = block * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    column = block * BLOCK_G * 4 + tl.arange(0, BLOCK_G * 4)
    zero = group * 0
    base = line.to(tl.int64) * tokens
    low = chunk * program_tokens
    high = tl.minimum(low + program_tokens, tokens)
    if SHARED:
        shared = 1.0 + sigma * _normals(key, group, zero + example, zero + view, zero + site)
    for start in range(low, high, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        mask = (token < high)[:, None] & (column < channels)[None, :]
        at = (base + token)[:, None] * channels + column[None, :]
        x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        if SHARED:
            y = x * shared
        else:
            where = view + token[:, None] * VIEWS
            full = zero + where * 0
            y = x * (
                1.0
                + sigma
                * _normals(key, full + group, full + example, full + where, full + site, FAST)
            )
        if HAS_H0:
            y += tl.load(H0 + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


def multiplied(
    h0: Tensor | None,
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str,
    first_example: Tensor | None,
) -> Tensor:
    """x * z, or h0 + x * z, for tensors the kernel takes."""
    tokens, channels = math.prod(x.shape[1:-1]), x.shape[-1]
    dtype = x.dtype if h0 is None else torch.promote_types(h0.dtype, x.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    x, h0 = x.contiguous(), None if h0 is None else h0.contiguous()
    groups = min(BLOCK_GROUPS, triton.next_power_of_2(triton.cdiv(channels, 4)))
    groups = max(groups, triton.next_power_of_2(triton.cdiv(channels, 4 * SIDE)))
    together = BLOCK_TOKENS_ALONE if share == "none" else BLOCK_TOKENS
    chunks, blocks = triton.cdiv(tokens, PROGRAM_TOKENS), triton.cdiv(channels, 4 * groups)
    launch(
        noise, (x.shape[0] * chunks, blocks),
        x if h0 is None else h0, x, y,
        sigma.to(x.device), key.to(x.device),
        key if first_example is None else first_example.to(x.device),
        site - (site >> 31 << 32), x.shape[0] // views, tokens, channels, PROGRAM_TOKENS,
        HAS_H0=h0 is not None, HAS_FIRST=first_example is not None, SHARED=share == "token", FAST=share == "none_fast",
        VIEWS=MAX_VIEWS, BLOCK_T=min(together, triton.next_power_of_2(tokens)), BLOCK_G=groups,
    )  # fmt: skip
    return y


def multiplicative_noise(x: Tensor, *noise: Any) -> Tensor:
    """The CUDA kernel of trainc::multiplicative_noise."""
    if not supported(x):
        return operators.eager_multiply(x, *noise)
    operators.check(x, *noise)
    return multiplied(None, x, *noise)


def noisy_add(h0: Tensor, delta: Tensor, *noise: Any) -> Tensor:
    """The CUDA kernel of trainc::noisy_add."""
    if not supported(h0, delta):
        return operators.eager_add(h0, delta, *noise)
    operators.check_pair(h0, delta, *noise)
    return multiplied(h0, delta, *noise)
