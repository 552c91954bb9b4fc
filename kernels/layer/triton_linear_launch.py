"""Launch the Triton kernels of linear layers: tiles, groups of examples, and the choice of an algorithm.

Rates and costs below are reasoned, not measured: docs/kernels.md has the reasons.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.layer import linear, linear_norms
from trainc.kernels.layer import triton_linear as kernels
from trainc.kernels.library.contracts import REDUCED
from trainc.kernels.library.grid import cdiv, power_of_2, resident_programs
from trainc.kernels.library.launch import launch

# Triton before this version cannot compile 16-bit products for Blackwell's first GPUs (compute capability 10): its
# compiler fails in one of its passes, in 3.6 for `weight_gradient` and most of `gram`, in 3.7 for the first alone.
BLACKWELL, PRODUCTS_FROM = 10, (3, 8)
OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Tiles in one column of the order programs run in: what they load is shared by some GROUP * GROUP.
GROUP = 8
STAGES = 3
SMALL = 64
# Steps of rows that writing a partial total, and reading it back, costs a program.
TOTAL_STEPS = 2

# Multiplications a second, as a part of ATen's products in the same dtype.
RATE_16, RATE_32 = 0.6, 0.5
# ATen's operations in the time 12 bytes take: a number of an example's gradient written, read twice.
ENTRY_16, ENTRY_32 = 2000, 150


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, outputs and inputs of a step, its warps, and the programs a processor holds."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    resident: int


def tile(dtype: torch.dtype, rows: int, smaller: bool = False) -> Tile:
    """A tile whose two float32 sums stay in registers, as large as they allow or smaller."""
    if dtype not in REDUCED:
        return Tile(32, SMALL, SMALL, 4, 4) if smaller else Tile(32, 128, SMALL, 8, 2)
    fitting = min(64, max(16, power_of_2(rows)))
    return Tile(fitting, SMALL, SMALL, 8, 4) if smaller else Tile(fitting, 128, 128, 8, 1)


@lru_cache(maxsize=1024)
def examples_per_group(examples: int, blocks: int, tiles: int, slots: int) -> int:
    """Examples a program walks over: few enough to fill the device, many for few partial totals."""

    def cost(groups: int) -> int:
        each = cdiv(examples, groups)
        return cdiv(tiles * cdiv(examples, each), slots) * (
            each * blocks + TOTAL_STEPS * (groups > 1)
        )

    return cdiv(examples, min(range(1, min(examples, cdiv(4 * slots, tiles)) + 1), key=cost))


@lru_cache(maxsize=1024)
def choose(
    algorithm: str, examples: int, rows: int, inputs: int, outputs: int, float32: bool, slots: int
) -> str:
    """The algorithm of least time: `fused`, ATen's `simultaneous` and, where `auto` allows it, `gram`.

    Counted for an example in operations of ATen's, with those of the weight's gradient.
    """
    rate, entry = (RATE_32, ENTRY_32) if float32 else (RATE_16, ENTRY_16)
    entries, block = inputs * outputs, gram_rows(rows, float32)
    product = 2 * rows * entries
    pairs = _pairs(cdiv(rows, block))
    costs = {
        "fused": product / rate,
        "simultaneous": product + entry * entries,
        "gram": product + 2 * pairs * block * block * (inputs + outputs) / rate,
    }
    if 2 * examples * cdiv(inputs, SMALL) * cdiv(outputs, SMALL) < slots:
        # Rows of an example stay in one program: half of the device would have nothing to do.
        del costs["fused"]
    if algorithm != "auto":
        del costs["gram"]
    return min(costs, key=lambda algorithm: costs[algorithm])


def gram_rows(rows: int, float32: bool) -> int:
    """Rows on either side of a tile of products."""
    return min(64 if float32 else 128, max(16, power_of_2(rows)))


def gram_warps(block: int, float32: bool) -> int:
    """Warps that hold two tiles of products without spilling."""
    return 8 if block == (64 if float32 else 128) else 4


def _pairs(tiles: int) -> int:
    return tiles * (tiles + 1) // 2


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless torch's own products may take tf32."""
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if fast else "ieee"


@lru_cache(maxsize=1)
def _warn_of_products(version: str) -> None:
    warnings.warn(
        f"triton {version} cannot compile the kernels `weight_gradient` and `gram` in 16 bits for this GPU: "
        "per-example norms of linear layers take PyTorch's own products. Install triton 3.8 or later",
        stacklevel=2,
    )


def compiles(dtype: torch.dtype, device: torch.device, version: str = triton.__version__) -> bool:
    """Whether this Triton can compile the products for the device; warns once where it cannot."""
    if dtype not in REDUCED or device.type != "cuda":
        return True
    old = tuple(int(part) for part in version.split(".")[:2]) < PRODUCTS_FROM
    if not old or torch.cuda.get_device_capability(device)[0] != BLACKWELL:
        return True
    _warn_of_products(version)
    return False


def weight_gradient(
    x: Tensor, dy: Tensor, dtype: torch.dtype, slots: int, shape: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """(L, K) gradient in dtype and (B,) float32 norms from x (B, T, K) and dy (B, T, L)."""
    x, dy = x.contiguous(), dy.contiguous()
    (examples, rows, inputs), outputs = x.shape, dy.shape[2]
    shape = shape or _fitting(x.dtype, examples, rows, inputs, outputs, slots)
    tiles_l, tiles_k = cdiv(outputs, shape.outputs), cdiv(inputs, shape.inputs)
    each = examples_per_group(
        examples, cdiv(rows, shape.rows), tiles_l * tiles_k, slots * shape.resident
    )
    groups = cdiv(examples, each)
    totals = torch.empty(
        (groups, outputs, inputs), dtype=dtype if groups == 1 else torch.float32, device=x.device
    )
    squares = x.new_empty((examples, tiles_l * tiles_k), dtype=torch.float32)
    launch(
        kernels.weight_gradient, (tiles_l * tiles_k, groups),
        x, dy, totals, squares, examples, rows, inputs, outputs, tiles_l, tiles_k, each,
        OPERAND=OPERANDS[x.dtype], PRECISION=precision(x.dtype), STAGES=STAGES, GROUP=GROUP,
        BLOCK_T=shape.rows, BLOCK_L=shape.outputs, BLOCK_K=shape.inputs, num_warps=shape.warps,
    )  # fmt: skip
    total = totals[0] if groups == 1 else totals.sum(0).to(dtype)
    return total, squares.sum(1)


def _fitting(
    dtype: torch.dtype, examples: int, rows: int, inputs: int, outputs: int, slots: int
) -> Tile:
    """The large tile where it leaves enough programs to fill the device, the small tile otherwise."""
    large = tile(dtype, rows)
    tiles = cdiv(outputs, large.outputs) * cdiv(inputs, large.inputs)
    small = max(inputs, outputs) <= SMALL or tiles * examples < slots
    return tile(dtype, rows, smaller=True) if small else large


def gram(x: Tensor, dy: Tensor) -> Tensor:
    """(B,) float32 norms from x (B, T, K) and dy (B, T, L)."""
    x, dy = x.contiguous(), dy.contiguous()
    (examples, rows, inputs), outputs = x.shape, dy.shape[2]
    float32 = x.dtype == torch.float32
    block = gram_rows(rows, float32)
    tiles = cdiv(rows, block)
    partial = x.new_empty((examples, _pairs(tiles)), dtype=torch.float32)
    launch(
        kernels.gram, (partial.numel(),),
        x, dy, partial, rows, inputs, outputs, tiles, partial.shape[1],
        OPERAND=OPERANDS[x.dtype], PRECISION=precision(x.dtype), STAGES=STAGES,
        BLOCK_T=block, BLOCK_C=32 if float32 else 64, num_warps=gram_warps(block, float32),
    )  # fmt: skip
    # Rounding may leave a hair below zero where an example's contribution cancels.
    return partial.sum(1).clamp_(min=0)


def norms(
    x: Tensor, dy: Tensor, algorithm: str, dtype: torch.dtype, slots: int | None = None
) -> tuple[Tensor | None, Tensor]:
    """The weight's gradient in dtype, where the algorithm makes it, and the (B,) norms."""
    (examples, rows, inputs), outputs = x.shape, dy.shape[2]
    served = x.dtype in OPERANDS and x.numel() > 0 and dy.numel() > 0
    if rows == 1 or not served or not compiles(x.dtype, x.device):
        return linear_norms.norms_and_gradient(x, dy, algorithm, dtype)
    slots = slots or resident_programs(x.device, 1)
    if algorithm != "gram":
        algorithm = choose(
            algorithm, examples, rows, inputs, outputs, x.dtype == torch.float32, slots
        )
    if algorithm == "fused":
        return weight_gradient(x, dy, dtype, slots)
    return (
        (None, gram(x, dy))
        if algorithm == "gram"
        else linear_norms.norms_and_gradient(x, dy, algorithm, dtype)
    )


def linear_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CUDA kernel of trainc::linear_backward."""
    return linear.backward(norms, *arguments)
