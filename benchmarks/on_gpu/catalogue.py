"""Every row of the GPU benchmark, in the order of what it is worth: time may run out.

Risks first; then what was predicted; whole steps of a small model; every operator once; further sizes; larger steps.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from benchmarks import accuracy, updates, whole_steps
from benchmarks.device import Cuda
from benchmarks.measure import Json
from benchmarks.on_gpu import risks
from benchmarks.on_gpu.host import host
from benchmarks.on_gpu.record import Row
from benchmarks.on_gpu.timed import FEWER, VERSIONS, Build, timed
from benchmarks.operators import Size, batch_norm, embedding, head, linear, loss, noisy, norm

PARTS = ("risks", "operators", "steps", "host", "accuracy")
WANTED = PARTS[:-1]
"""What is measured where nothing else is said."""
BF16, FP32 = torch.bfloat16, torch.float32
LAYER, RMS = ("layer_norm, probe", risks.LAYER), ("rms_norm, probe", risks.RMS)
ADD_LAYER, ADD_RMS = (
    ("add_layer_norm, probe", risks.ADD_LAYER),
    ("add_rms_norm, probe", risks.ADD_RMS),
)
NORMS = (LAYER, RMS, ADD_LAYER, ADD_RMS, ("rms_norm", norm(rms=True, add=False, probed=False)))
MSE, KL = ((f"cross_entropy_consistency, {kind}", loss(kind)) for kind in ("mse", "kl"))
TOKEN, NONE, FAST = (
    (f"noisy_add, {share}", noisy(add=True, share=share))
    for share in ("token", "none", "none_fast")
)
Case = tuple[tuple[str, Build], Size, torch.dtype]
# Versions that a compiler makes take 5 to 15 s each.
LONG, SHORT = 25.0, 8.0
PREDICTED: tuple[Case, ...] = (
    (LAYER, Size(64, 64, 4096), BF16), (KL, Size(1, 4096, 32768), BF16), (LAYER, Size(64, 1024, 4096), BF16),
    (RMS, Size(64, 1024, 4096), BF16), (MSE, Size(1, 4096, 32768), BF16),
)  # fmt: skip
# Beside each other, ours alone: what another number of classes costs.
CLASSES: tuple[Case, ...] = tuple(
    (case, Size(1, 4096, classes), BF16) for classes in (50304, 50257) for case in (MSE, KL)
)
NOISE: tuple[Case, ...] = tuple((one, Size(64, 1024, 4096), BF16) for one in (TOKEN, NONE, FAST))
# The rivals of norms with statistics where partial rows weigh most, and at widths that are no power of two.
RIVALS: tuple[Case, ...] = (
    (LAYER, Size(8, 512, 768), BF16), (LAYER, Size(8, 2048, 4096), BF16), (RMS, Size(8, 2048, 5120), BF16),
    (ADD_RMS, Size(8, 2048, 4096), BF16), (LAYER, Size(256, 8, 4096), BF16), (RMS, Size(8, 2048, 3584), BF16),
)  # fmt: skip
ONCE: tuple[Case, ...] = (
    (("multi_norm", updates.multi_norm), Size(150, 4096, 1024), BF16),
    (("sparse_adamw_", updates.sparse_adamw), Size(1, 65536, 8192), BF16),
    (("masked_update_", updates.masked_update), Size(1, 32768, 4096), BF16),
    (("linear, probe", linear), Size(8, 1024, 4096), BF16),
    (("embedding, probe", embedding), Size(8, 2048, 4096), BF16),
    (ADD_LAYER, Size(8, 2048, 4096), BF16), (NORMS[-1], Size(8, 2048, 4096), BF16),
    (("ghost_batch_norm", batch_norm), Size(256, 3136, 64), FP32),
    (("multiplicative_noise, token", noisy(add=False, share="token")), Size(8, 2048, 4096), BF16),
    *(((f"linear_cross_entropy_consistency, {kind}", head(kind, 4096)), Size(1, 4096, 32768), BF16)
      for kind in ("mse", "kl")),
)  # fmt: skip
FURTHER: tuple[Case, ...] = (
    *((case, Size(1, 2048, 128256), BF16) for case in (MSE, KL)),
    *((LAYER, size, dtype) for size, dtype in (
        (Size(8, 2048, 1024), BF16), (Size(8, 2048, 8192), BF16), (Size(8, 2048, 4096), FP32),
        (Size(64, 1024, 1024), BF16), (Size(1, 16384, 2048), BF16), (Size(16384, 1, 1024), BF16),
        (Size(8, 1024, 16384), BF16), (Size(8, 2048, 3584), BF16), (Size(8, 2048, 5120), BF16),
    )),
    (RMS, Size(8, 2048, 4096), BF16), (RMS, Size(8, 2048, 8192), BF16),
    # By the launch rule: products of rows, twice; ATen's examples, in float32.
    *((("linear, probe", linear), size, dtype) for size, dtype in (
        (Size(64, 128, 4096), BF16), (Size(64, 512, 768), BF16), (Size(8, 2048, 1024), FP32),
    )),
    (("embedding, probe", embedding), Size(64, 512, 768), FP32),
    (("ghost_batch_norm", batch_norm), Size(256, 3136, 64), BF16),
    (("ghost_batch_norm", batch_norm), Size(256, 49, 512), BF16),
)  # fmt: skip
FULL = tuple(
    (case, Size(examples, tokens // examples, width), dtype)
    for case in (LAYER, RMS)
    for width, tokens, examples, dtype in product(
        (768, 1024, 2048, 4096, 8192), (4096, 16384, 65536), (1, 8, 64), (BF16, FP32)
    )
)
# So small that a call is the host's time.
HOST = Size(4, 16, 768)


def rows(large: bool, backend: str, full: bool, weights: str, only: Sequence[str]) -> list[Row]:
    """Return the rows in order; where sizes are not large, every size is cut to what a CPU does at once.

    `only` holds what the names of rows that are wanted begin with; empty for all.
    """
    found: dict[str, Row] = {}
    for row in _rows(large, backend, full, weights):
        if not only or row.name.startswith(tuple(only)):
            found.setdefault(
                row.key, row
            )  # sizes that were cut, and those of `full`, may be the same
    return list(found.values())


def _rows(large: bool, backend: str, full: bool, weights: str) -> Iterator[Row]:
    def cases(some: Sequence[Case], versions: Sequence[str], seconds: float) -> Iterator[Row]:
        for (name, build), size, dtype in some:
            yield timed(name, build, risks.fit(size, large), dtype, versions, seconds, backend)

    small, whole = next(iter(whole_steps.SHAPES)), list(whole_steps.SHAPES)
    yield from risks.rows(large)
    yield from cases(PREDICTED, VERSIONS, LONG)
    yield from cases(CLASSES, ("ours",), SHORT)
    yield from cases(NOISE, FEWER, SHORT)
    yield from whole_steps.rows([small], whole_steps.FIRST, weights, backend)
    yield from cases(RIVALS, VERSIONS, LONG)
    yield from cases(ONCE, FEWER, SHORT)
    yield from _host(large)
    yield from whole_steps.rows(whole, whole_steps.CASES, weights, backend)
    yield from cases(FURTHER, FEWER, SHORT)
    if full:
        yield from cases(FULL, VERSIONS, LONG)
    yield Row("accuracy", "hard inputs", 120.0, lambda device, until: _accuracy(device))


def _host(large: bool) -> Iterator[Row]:
    """What calls cost the host, forward and backward, beside ATen's."""
    for name, build in (LAYER, RMS, ADD_LAYER, MSE, KL, TOKEN, ("linear, probe", linear)):
        yield host(name, build, risks.fit(HOST, large))
    yield host("multi_norm", updates.multi_norm, risks.fit(Size(150, 64, 64), large))
    yield host("sparse_adamw_", updates.sparse_adamw, risks.fit(Size(1, 64, 64), large))


def _accuracy(device: Cuda) -> Json:
    """Errors on hard inputs; this compiles every kernel for other shapes."""
    found = accuracy.run([], draws=1, device=device.kind)
    return {"passed": True, "worst": accuracy.worst(found), "found": found}
