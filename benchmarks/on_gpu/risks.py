"""Rows on what may be wrong on a device and cannot be seen without one: they come before anything is timed."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import trainc.functional as ours
from benchmarks import updates
from benchmarks.device import Cuda, Lay, check, transposed, unaligned
from benchmarks.measure import Json
from benchmarks.on_gpu.record import Row
from benchmarks.on_gpu.timed import Build, label
from benchmarks.operators import (
    KEY,
    SITE,
    VIEWS,
    Problem,
    Size,
    batch_norm,
    embedding,
    head,
    linear,
    loss,
    noisy,
    norm,
    outputs,
    step,
)
from trainc.kernels.library.graph_capture import random_numbers_survive

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SECONDS = 10.0
REPEATS = 10
LAYER, RMS = norm(rms=False, add=False, probed=True), norm(rms=True, add=False, probed=True)
ADD_LAYER, ADD_RMS = norm(rms=False, add=True, probed=True), norm(rms=True, add=True, probed=True)
TOKEN, NONE, FAST = (noisy(add=True, share=share) for share in ("token", "none", "none_fast"))
# Every regime of the norms' backward, widths that are no power of two, wide rows.
NORM_SIZES = (
    Size(8, 512, 768), Size(64, 64, 4096), Size(256, 8, 4096), Size(1024, 8, 1024), Size(16384, 1, 1024),
    Size(1, 4096, 2048), Size(8, 256, 5120), Size(8, 256, 3584), Size(4, 256, 8192), Size(4, 128, 16384),
    Size(4, 64, 20000), Size(7, 33, 1001),
)  # fmt: skip
EVERY: tuple[tuple[str, Build, Size, torch.dtype], ...] = (
    *(("layer_norm", LAYER, size, BF16) for size in NORM_SIZES),
    ("layer_norm", LAYER, Size(8, 256, 4096), FP32), ("layer_norm", LAYER, Size(8, 256, 4096), FP16),
    *(("rms_norm", RMS, size, BF16) for size in NORM_SIZES[1:5]),
    ("add_layer_norm", ADD_LAYER, Size(8, 256, 4096), BF16), ("add_rms_norm", ADD_RMS, Size(8, 256, 4096), BF16),
    ("rms_norm, no probe", norm(rms=True, add=False, probed=False), Size(8, 256, 4096), BF16),
    *((f"loss, {kind}", loss(kind), Size(1, 512, classes), BF16)
      for kind in ("mse", "kl") for classes in (32768, 50257, 128256, 1000)),
    *((f"loss by the head, {kind}", head(kind, 512), Size(1, 512, 8192), BF16) for kind in ("mse", "kl")),
    ("noisy_add, token", TOKEN, Size(8, 256, 1024), BF16), ("noisy_add, none", NONE, Size(8, 256, 1024), BF16),
    ("noisy_add, none_fast", FAST, Size(8, 256, 1024), BF16),
    ("multiplicative_noise", noisy(add=False, share="token"), Size(8, 256, 1000), FP32),
    ("linear", linear, Size(8, 512, 1024), BF16), ("linear", linear, Size(64, 64, 768), BF16),
    ("linear", linear, Size(8, 128, 512), FP32), ("embedding", embedding, Size(8, 512, 768), BF16),
    ("ghost_batch_norm", batch_norm, Size(64, 196, 64), BF16),
    ("ghost_batch_norm", batch_norm, Size(64, 49, 512), FP32),
    ("multi_norm", updates.multi_norm, Size(20, 999, 1024), BF16),
    ("sparse_adamw_", updates.sparse_adamw, Size(1, 1024, 1024), BF16),
    ("masked_update_", updates.masked_update, Size(1, 1024, 1000), BF16),
)  # fmt: skip
LAID: tuple[tuple[str, Build, Size], ...] = (
    ("layer_norm", LAYER, Size(8, 512, 1024)), ("rms_norm", RMS, Size(8, 512, 3584)),
    ("loss, kl", loss("kl"), Size(1, 512, 4096)), ("noisy_add, token", TOKEN, Size(8, 256, 1024)),
    ("linear", linear, Size(8, 128, 512)),
)  # fmt: skip
CAPTURED: tuple[tuple[str, Build, Size], ...] = (
    *LAID, ("embedding", embedding, Size(8, 512, 768)), ("ghost_batch_norm", batch_norm, Size(64, 196, 64)),
    ("multi_norm", updates.multi_norm, Size(20, 64, 1024)),
    ("sparse_adamw_", updates.sparse_adamw, Size(1, 1024, 1024)),
    ("masked_update_", updates.masked_update, Size(1, 1024, 1024)),
)  # fmt: skip


def rows(large: bool) -> Iterator[Row]:
    """Yield them in order; where sizes are not large, every size is cut to what a CPU does at once."""
    seen: set[str] = set()
    for name, build, size, dtype in EVERY:
        one = _compared(label(name, fit(size, large), dtype), build, fit(size, large), dtype)
        if one.key not in seen:  # sizes that were cut may be the same
            seen.add(one.key)
            yield one
    for word, lay in (("unaligned", unaligned), ("transposed", transposed)):
        for name, build, size in LAID:
            yield _compared(f"{word} {name}", build, fit(size, large), BF16, lay)
    for name, build, size in CAPTURED:
        yield _row(f"captured {name}", partial(_replayed, build, fit(size, large)))
    for distance in ("mse", "kl"):
        yield _row(f"first half of the classes -inf, {distance}", partial(_masked, distance, large))
    yield _row("norm of more than 2^31 entries", partial(_far_norm, large), 20.0)
    yield _row("loss of more than 2^31 logits", partial(_far_loss, large), 20.0)
    yield _row("random numbers after a capture that fails", _random_numbers)
    yield _row("fast normals beside exact ones", partial(_fast_normals, large))
    yield _row("multi_norm in inductor's CUDA graphs", _in_a_pool, 20.0)


def fit(size: Size, large: bool) -> Size:
    """The size, or one that takes no time."""
    return size if large else Size(min(size.examples, 4), min(size.rows, 6), min(size.width, 40))


def _row(name: str, find: Callable[[Any], Json], seconds: float = SECONDS) -> Row:
    return Row("risks", name, seconds, lambda device, until: find(device))


def _compared(
    name: str, build: Build, size: Size, dtype: torch.dtype, lay: Lay | None = None
) -> Row:
    def find(device: Cuda) -> Json:
        found = check(build(size, dtype, device.kind), dtype, lay, REPEATS if device.large else 1)
        return {**found, "passed": found["passed"] and found["repeatable"]}

    return _row(name, find)


def _replayed(build: Build, size: Size, device: Cuda) -> Json:
    """Whether forward and backward can be captured, and a replay gives bit for bit what a call gives."""

    def results(problem: Problem) -> list[Tensor | None]:
        found = step(problem, problem.ours)
        return [one if one is None else one.detach().clone() for one in found]

    problem = build(size, BF16, device.kind)
    held = [one.detach().clone() if isinstance(one, Tensor) else one for one in problem.arguments]

    def reset() -> None:
        """Operators in place find what the first call found."""
        with torch.no_grad():
            for now, was in zip(problem.arguments, held, strict=True):
                if isinstance(now, Tensor):
                    now.copy_(was)

    wanted = results(problem)  # compiles, and draws the gradients of the results
    reset()
    kept: list[list[Tensor | None]] = []
    replay, how = device.captured(lambda: kept.append(results(problem)))
    for one in kept[-1] if kept else ():
        if one is not None:
            one.fill_(-1)
    reset()
    replay()
    device.wait()
    same = all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(kept[-1], wanted, strict=True)
    )
    return {
        "passed": same and (how == "graph" or not device.large),
        "how": how,
        "same as a call": same,
    }


def _masked(distance: str, large: bool, device: Cuda) -> Json:
    classes = 4096 if large else 64
    logits = torch.randn(8, classes, device=device.kind)
    logits[:, : classes // 2] = -math.inf
    targets = torch.full((4,), classes - 7, device=device.kind)
    found = ours.cross_entropy_consistency(
        logits, targets, torch.tensor(0.0, device=device.kind), distance
    )[1]
    error = abs(float(found) - float(functional.cross_entropy(logits[:4], targets)))
    return {"passed": error < 1e-3, "error": error}


def _fast_normals(large: bool, device: Cuda) -> Json:
    """How far normals by approximate functions are from those of the same words, and what a mean sees of it."""
    ones = torch.ones((2, 4096, 4096) if large else (2, 64, 64), device=device.kind)
    given = ones, torch.tensor(1.0, device=device.kind), KEY.to(device.kind), SITE, VIEWS
    fast, exact = (
        ours.multiplicative_noise(*given, share).double() - 1 for share in ("none_fast", "none")
    )
    error = (fast - exact).abs()
    found = {
        "largest error": float(error.max()),
        "above 1e-5": float((error > 1e-5).double().mean()),
        "mean": float(fast.mean()),
        "variance": float(fast.var()),
    }
    count = fast.numel()
    normal = (
        abs(found["mean"]) < 5 / count**0.5 and abs(found["variance"] - 1) < 5 * (2 / count) ** 0.5
    )
    return {
        "passed": normal and found["largest error"] < 6e-4 and found["above 1e-5"] < 1e-3,
        **found,
    }


def _far_norm(large: bool, device: Cuda) -> Json:
    """The last rows of one example with more entries than 32 bits count, against the same rows alone."""
    rows, width, last = (540_000, 4096, 64) if large else (64, 64, 8)
    problem = LAYER(Size(1, rows, width), BF16, device.kind)
    x, weight, bias, probe = problem.arguments
    (y,) = outputs(problem.ours, problem.arguments)
    dy = torch.randn_like(y)
    dx, _ = torch.autograd.grad(y, [x, probe], dy)
    tail = x[:, -last:].detach().requires_grad_()
    z = functional.layer_norm(tail, [width], weight, bias, 1e-5)
    (dz,) = torch.autograd.grad(z, [tail], dy[:, -last:])
    return _apart((y[:, -last:], z), (dx[:, -last:], dz))


def _far_loss(large: bool, device: Cuda) -> Json:
    """The last logits' gradients of many rows, against those rows alone."""
    rows, classes, last = (8704, 128256, 16) if large else (16, 64, 4)
    build = loss("kl")
    problem = build(Size(1, rows, classes), BF16, device.kind)
    (logits,) = problem.arguments
    targets = torch.randint(classes, (rows,), device=device.kind)
    weight = torch.tensor(0.5, device=device.kind)

    def gradient(logits: Tensor, targets: Tensor) -> Tensor:
        found = ours.cross_entropy_consistency(logits, targets, weight, "kl")[0]
        (slope,) = torch.autograd.grad(found * len(targets), [logits])
        return slope

    views = (
        logits.detach().unflatten(0, (2, rows))[:, -last:].flatten(0, 1).clone().requires_grad_()
    )
    whole = gradient(logits, targets).unflatten(0, (2, rows))[:, -last:].flatten(0, 1)
    return _apart((whole, gradient(views, targets[-last:])))


def _apart(*pairs: tuple[Tensor, Tensor]) -> Json:
    with torch.no_grad():
        errors = [
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in pairs
        ]
    return {"passed": all(error < 1e-2 for error in errors), "error": max(errors)}


def _random_numbers(device: Cuda) -> Json:
    """A capture that reads a number on the host fails; afterwards the generator has to draw."""
    failed = False
    if device.kind == "cuda":
        one = torch.ones(4, device=device.kind)
        try:
            with (
                random_numbers_survive(),
                torch.cuda.graph(torch.cuda.CUDAGraph(), stream=device.stream),
            ):
                float((one + torch.randn(4, device=device.kind)).sum())
        except RuntimeError:
            failed = True
        torch.cuda.synchronize()
    drawn = torch.randn(4, device=device.kind)
    return {
        "passed": bool(drawn.isfinite().all()) and (failed or device.kind != "cuda"),
        "the capture failed": failed,
    }


def _in_a_pool(device: Cuda) -> Json:
    """Inductor's graphs warm up in their own memory: nothing that a call leaves there may be read by the next one."""

    def sums(tensors: list[Tensor]) -> Tensor:
        return ours.multi_norm([one * 2 for one in tensors])

    graphs: Any = {"triton.cudagraphs": True}
    graphed = torch.compile(sums, options=graphs) if device.kind == "cuda" else sums
    pairs = []
    for call in range(5):
        given = [torch.full((999 + place,), float(call), device=device.kind) for place in range(20)]
        pairs.append((graphed(given).clone(), sums(given)))
        # Eager calls between find other tensors at the same addresses.
        ours.multi_norm([one[:9] for one in given])
    return _apart(*pairs)
