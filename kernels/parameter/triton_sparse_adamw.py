"""Triton kernel for AdamW on chosen entries, with its launcher; imported by the first CUDA call.

One pass: gather the gradient, update the state (which is dense and read in full vectors), write the
weight's entries. Blocks of 16 neighbouring 16-bit entries fill whole memory sectors.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED
from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import sparse_adamw as operator
from trainc.kernels.parameter.triton_tables import Numbers, aligned, owner_of, pieces

BLOCK = 1024
REGISTERS = 64
"""A thread's of `adamw_together`: left to itself the assembler takes 56 on sm_80, and spills."""
TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip


@triton.jit
def _step(
    WEIGHT, GRAD, MEAN, SQUARE, MASTER, INDEX, program, decay, rate, root, count, blocks,
    beta1, beta2, eps,
    GATHERED: tl.constexpr, HAS_MASTER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A program's entries of one weight; WHOLE says that there are no fewer."""
    line = program.to(tl.int64) * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    within = tl.arange(0, WIDTH)
    counted = tl.full((BLOCK // WIDTH,), True, tl.int1) if WHOLE else line * WIDTH < count
    block = tl.load(INDEX + line, mask=counted, other=0).to(tl.int64)
    # Two dimensions let the compiler see that the entries of a block are neighbours.
    entry = line[:, None] * WIDTH + within[None, :]
    where = block[:, None] * WIDTH + within[None, :]
    mask = tl.broadcast_to(counted[:, None], [BLOCK // WIDTH, WIDTH])
    # No entry of this number: a device cannot raise, so its state becomes nan and nothing else is touched.
    inside = mask & ((block >= 0) & (block < blocks))[:, None]
    g = tl.load(GRAD + (entry if GATHERED else where), mask=inside, other=float("nan")).to(
        tl.float32
    )
    mean = tl.load(MEAN + entry, mask=mask, other=0.0)
    square = tl.load(SQUARE + entry, mask=mask, other=0.0)
    mean += (g - mean) * (1.0 - beta1)
    square = square * beta2 + g * g * (1.0 - beta2)
    tl.store(MEAN + entry, mean, mask=mask)
    tl.store(SQUARE + entry, square, mask=mask)
    if HAS_MASTER:
        w = tl.load(MASTER + entry, mask=mask, other=0.0)
    else:
        w = tl.load(WEIGHT + where, mask=inside, other=0.0).to(tl.float32)
    w = w * decay - rate * mean / (tl.sqrt(square) / root + eps)
    if HAS_MASTER:
        tl.store(MASTER + entry, w, mask=mask)
    tl.store(WEIGHT + where, w.to(WEIGHT.dtype.element_ty), mask=inside)


@triton.jit
def adamw(
    WEIGHT, GRAD, MEAN, SQUARE, INDEX, MASTER, SCALARS, decay, rate, root, count, blocks,
    beta1, beta2, eps, ON_DEVICE: tl.constexpr,
    GATHERED: tl.constexpr, HAS_MASTER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the count entries,); decay, rate and root of the step are given or, ON_DEVICE, in SCALARS."""
    if ON_DEVICE:
        decay, rate, root = tl.load(SCALARS), tl.load(SCALARS + 1), tl.load(SCALARS + 2)
    _step(
        WEIGHT, GRAD, MEAN, SQUARE, MASTER, INDEX, tl.program_id(0), decay, rate, root, count, blocks,
        beta1, beta2, eps, GATHERED, HAS_MASTER, WIDTH, BLOCK, False,
    )  # fmt: skip


@triton.jit
def _pointer(TABLE, place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = tl.load(TABLE + place).to(tl.pointer_type(TYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit(do_not_specialize=["tensors"])
def adamw_together(
    TABLE, SCALARS, tensors, decay, rate, root, beta1, beta2, eps,
    ON_DEVICE: tl.constexpr, W: tl.constexpr, G: tl.constexpr, TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, GATHERED: tl.constexpr, HAS_MASTER: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all entries,); TABLE is `_table_of`'s."""
    if ON_DEVICE:
        decay, rate, root = tl.load(SCALARS), tl.load(SCALARS + 1), tl.load(SCALARS + 2)
    pid = tl.program_id(0)
    ENDS = TABLE + 8 * tensors
    tensor = owner_of(ENDS, pid, tensors)
    program = pid - tl.load(ENDS + tensor)
    weight = _pointer(TABLE, tensor, W, ALIGNED)
    grad = _pointer(TABLE, tensors + tensor, G, ALIGNED)
    mean = _pointer(TABLE, 2 * tensors + tensor, tl.float32, ALIGNED)
    square = _pointer(TABLE, 3 * tensors + tensor, tl.float32, ALIGNED)
    index = _pointer(TABLE, 4 * tensors + tensor, TYPE, ALIGNED)
    master = _pointer(TABLE, 5 * tensors + tensor, tl.float32, ALIGNED)
    count, blocks = tl.load(TABLE + 6 * tensors + tensor), tl.load(TABLE + 7 * tensors + tensor)
    # Loads under a mask of unknown length would stay scalar.
    if (program + 1) * BLOCK <= count:
        _step(
            weight, grad, mean, square, master, index, program, decay, rate, root, count, blocks,
            beta1, beta2, eps, GATHERED, HAS_MASTER, WIDTH, BLOCK, True,
        )  # fmt: skip
    else:
        _step(
            weight, grad, mean, square, master, index, program, decay, rate, root, count, blocks,
            beta1, beta2, eps, GATHERED, HAS_MASTER, WIDTH, BLOCK, False,
        )  # fmt: skip


def coefficients(
    lr: Tensor, weight_decay: Tensor, step: Tensor, beta1: float, beta2: float,
    device: torch.device,
) -> tuple[float, float, float] | Tensor:  # fmt: skip
    """1 - lr * decay, lr / (1 - beta1^step), sqrt(1 - beta2^step).

    Numbers where a CPU has all three; else float32 (3,) on the device, which nobody waits for.
    """
    given: Any = (lr, weight_decay, step)
    rate, decay, count = (
        value.item() if value.device.type == "cpu" else value.to(device, torch.float64)
        for value in given
    )
    every = 1 - rate * decay, rate / (1 - beta1**count), (1 - beta2**count) ** 0.5
    if not any(isinstance(one, Tensor) for one in every):
        return every
    full = [
        one if isinstance(one, Tensor) else torch.full((), one, dtype=torch.float64, device=device)
        for one in every
    ]
    return torch.stack(full).float()


def supported(weight: Tensor, grad: Tensor, state: Sequence[Tensor], block: int, gathered: bool) -> bool:  # fmt: skip
    """Whether the Triton kernel takes these; ATen takes the rest."""
    narrow = all(t.dtype in (torch.float32, *REDUCED) for t in (weight, grad))
    dense = weight.is_contiguous() and (gathered or grad.is_contiguous())
    return (
        narrow and dense and block & (block - 1) == 0 and block <= BLOCK
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in state)
    )  # fmt: skip


def _table_of(group: Sequence[tuple[Any, ...]], block: int) -> list[int]:
    """Addresses by kind, counts of entries, blocks of the weights, and the program each weight begins with."""
    kinds = zip(*group, strict=True)
    addresses = [one.data_ptr() for kind in kinds for one in kind]
    counts = [tensors[2].numel() for tensors in group]
    blocks = [tensors[0].numel() // block for tensors in group]
    ends = accumulate((pieces(count, BLOCK) for count in counts), initial=0)
    return [*addresses, *counts, *blocks, *ends]


def sparse_adamw_(*arguments: Any) -> None:
    """The CUDA kernel of trainc::sparse_adamw_."""
    lr, weight_decay, step, beta1, beta2, eps, gathered, block, masters = arguments[5:]
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for weight, grad, mean, square, index, master in operator.each(*arguments[:5], *arguments[-3:]):
        state = [mean, square, *([] if master is None else [master])]
        if mean.numel() == 0:
            continue
        if not supported(weight, grad, state, block, gathered):
            lists = ([t] for t in (weight, grad, mean, square, index))
            alone: Any = (*lists, *arguments[5:-1], state[2:])
            operator.eager(*alone)
            continue
        tensors = (weight, grad.contiguous(), mean, square, index.contiguous())
        addresses = (one.data_ptr() for one in (*tensors, *state[2:]))
        key = (weight.dtype, grad.dtype, index.dtype, aligned(addresses))
        groups.setdefault(key, []).append((*tensors, mean if master is None else master))
    for key, group in groups.items():
        device = group[0][0].device
        scalars = coefficients(lr, weight_decay, step, beta1, beta2, device)
        on_device = isinstance(scalars, Tensor)
        numbers = (1.0, 1.0, 1.0) if on_device else scalars
        options = {
            "ON_DEVICE": on_device, "GATHERED": gathered, "HAS_MASTER": bool(masters), "WIDTH": block,
            "BLOCK": BLOCK, "num_warps": 4,
        }  # fmt: skip
        held = scalars if on_device else group[0][2]  # without ON_DEVICE it is not read
        if len(group) == 1:
            tensors = group[0]
            launch(
                adamw, (pieces(tensors[2].numel(), BLOCK),),
                *tensors, held, *numbers, tensors[2].numel(),
                tensors[0].numel() // block, beta1, beta2, eps, **options,
            )  # fmt: skip
            continue
        listed = _table_of(group, block)
        launch(
            adamw_together, (listed[-1],),
            Numbers(listed).on(device), held, len(group), *numbers, beta1, beta2, eps,
            W=TYPES[key[0]], G=TYPES[key[1]], TYPE=TYPES[key[2]], ALIGNED=key[3], maxnreg=REGISTERS, **options,
        )  # fmt: skip
