"""What the launchers ask of a device, with none at hand: grids within its limits, and kernels it can be given."""

import ast
import math
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.kernels.library.launch import PINNED

# Triton's interpreter calls kernels in another way; what is recorded here is the same in both.
pytest.importorskip("triton")

# Programs along the axes of a grid, by CUDA's limits.
LIMITS = (2**31 - 1, 65535, 65535)
SOURCES = Path(__file__).parents[2] / "kernels"
LAUNCHER = SOURCES / "library" / "launch.py"


class Recorder:
    """Stands in for a kernel: keeps the grid and options of each launch, and runs nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.options: list[dict[str, Any]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.grids.append(tuple(grid))
        return lambda *arguments, **options: self.options.append(options)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def gram(rows: int, examples: int) -> Any:
    launch = import_module("trainc.kernels.layer.triton_linear_launch")
    return lambda: launch.gram(meta(examples, rows, 64), meta(examples, rows, 32))


def norm(*shape: int, tail: int) -> Any:
    """Forward and backward of a LayerNorm over the last `tail` dims."""
    launch = import_module("trainc.kernels.norm.triton_norm_launch")
    x, normalized = meta(*shape), list(shape[-tail:])
    weight = meta(*normalized)
    statistics = meta(*shape[:-tail], *[1] * tail, dtype=torch.float32)

    def run() -> None:
        launch.forward(x, normalized, weight, weight, 1e-5, x.dtype, rms=False)
        launch.backward(
            x, x, normalized, statistics, statistics, (weight, weight), [True] * 3, rms=False
        )

    return run


def noise(*shape: int) -> Any:
    multiplied = import_module("trainc.kernels.noise.triton_noise").multiplied
    sigma, key = meta(dtype=torch.float32), meta(dtype=torch.int64)
    return lambda: multiplied(None, meta(*shape), sigma, key, 0, 1, "none", None)


def ghosts(*shape: int) -> Any:
    norm = import_module("trainc.kernels.batch_norm.triton_ghost_batch_norm").ghost_batch_norm
    return lambda: norm(meta(*shape), None, None, 2, 1e-5, "error")


def embedding(*shape: int) -> Any:
    norms = import_module("trainc.kernels.layer.triton_embedding").norms
    return lambda: norms(meta(*shape), meta(*shape[:-1], dtype=torch.int64), -1)


def loss(rows: int, classes: int) -> Any:
    module = import_module("trainc.kernels.loss.triton_cross_entropy_consistency")
    logits, labels = meta(2 * rows, classes), meta(rows, dtype=torch.int64)
    number, kept = meta(dtype=torch.float32), meta(rows, 2, dtype=torch.float32)

    def run() -> None:
        module.row_losses(logits, labels, "mse", -100, 0.0, kept)
        module.write_gradients(logits, labels, number, number, "mse", -100, 0.0, kept, out=logits)

    return run


def norms(*shapes: tuple[int, ...]) -> Any:
    multi_norm = import_module("trainc.kernels.parameter.triton_multi_norm").multi_norm
    return lambda: multi_norm([meta(*shape) for shape in shapes], [])


LAUNCHES = {
    "layer.triton_linear": {
        "long": lambda: gram(1 << 20, 2), "many": lambda: gram(48_000, 400),
        "longer than a second axis holds": lambda: gram(46_209, 1), "short": lambda: gram(2, 1 << 20),
    },
    "norm.triton_norm": {
        "images": lambda: norm(4, 64, 512, 512, tail=3), "rows": lambda: norm(1 << 22, 256, tail=1),
    },
    "norm.triton_wide_norm": {
        "one row": lambda: norm(2, 1 << 28, tail=1), "rows": lambda: norm(1 << 17, 1 << 17, tail=1),
    },
    "noise.triton_noise": {
        "pixels": lambda: noise(4, 4096, 4096, 8), "channels": lambda: noise(2, 1 << 26),
        "examples": lambda: noise(1 << 20, 4, 64),
    },
    "batch_norm.triton_ghost_batch_norm": {
        "rows": lambda: ghosts(1 << 20, 64), "channels": lambda: ghosts(8, 1 << 20, 4),
    },
    "layer.triton_embedding": {"ids": lambda: embedding(64, 1 << 20, 1024)},
    "parameter.triton_multi_norm": {
        "many": lambda: norms(*[(64, 64)] * 70_000), "large": lambda: norms((1 << 20, 1 << 20)),
    },
    "loss.triton_cross_entropy_consistency": {"rows": lambda: loss(1 << 21, 262_144)},
}  # fmt: skip
CASES = [
    pytest.param(module, launch, id=f"{module}-{name}")
    for module, launches in LAUNCHES.items()
    for name, launch in launches.items()
]


@pytest.mark.parametrize(("module", "prepared"), CASES)
def test_no_grid_exceeds_a_device(
    module: str, prepared: Callable[[], Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Recorder()
    for file in LAUNCHES:
        source = import_module(f"trainc.kernels.{file}")
        for name, value in vars(source).items():
            if hasattr(value, "arg_names") and not name.startswith("_"):
                monkeypatch.setattr(source, name, kernels)
    prepared()()
    assert kernels.grids
    for grid in kernels.grids:
        assert all(count <= limit for count, limit in zip(grid, LIMITS, strict=False)), grid
        assert math.prod(grid) > 0
    assert all(options.items() >= PINNED.items() for options in kernels.options)


def own_launches(source: str) -> list[int]:
    """The lines on which a module of kernels runs one by itself: `kernel[grid](..)`, or the methods below that."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
    if not any("triton" in ast.unparse(one) for one in imports):
        return []
    return [
        call.lineno
        for call in nodes
        if isinstance(call, ast.Call)
        and (
            isinstance(call.func, ast.Subscript)
            or (isinstance(call.func, ast.Attribute) and call.func.attr in ("run", "warmup"))
        )
    ]


def test_no_launch_forgets_the_compilers_options() -> None:
    assert own_launches("import triton\nnoise[(rows,)](x, y)\ngram.run(x, grid=(1,))") == [2, 3]
    assert PINNED == {"enable_fp_fusion": True}
    paths = [path for path in SOURCES.rglob("*.py") if path != LAUNCHER]
    assert sum("launch(" in path.read_text() for path in paths) >= 11
    found = {path.name: own_launches(path.read_text()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.fixture
def launched() -> Any:
    """The launch module of linear layers, which has warned of nothing yet."""
    launch = import_module("trainc.kernels.layer.triton_linear_launch")
    launch._warn_of_products.cache_clear()
    yield launch
    launch._warn_of_products.cache_clear()


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "served"),
    [
        ("3.6.0", (10, 0), torch.bfloat16, False),
        ("3.6.0+git1", (10, 3), torch.float16, False),
        ("3.6.0", (10, 0), torch.float32, True),
        ("3.6.0", (9, 0), torch.bfloat16, True),
        ("3.6.0", (12, 0), torch.bfloat16, True),
        ("3.7.1", (10, 0), torch.bfloat16, False),
        ("3.8.0", (10, 0), torch.bfloat16, True),
        ("3.10.0", (10, 0), torch.bfloat16, True),
    ],
)
def test_products_that_triton_cannot_compile_are_named_once(
    version: str, capability: tuple[int, int], dtype: torch.dtype, served: bool, launched: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert launched.compiles(dtype, device, version) == served
        assert launched.compiles(dtype, device, version) == served
    texts = [str(one.message) for one in said]
    assert len(texts) == (not served)
    assert all(
        version in t and "`weight_gradient` and `gram`" in t and "3.8 or later" in t for t in texts
    )


@pytest.mark.parametrize("algorithm", ["auto", "simultaneous", "gram"])
def test_norms_then_take_torchs_products(
    algorithm: str, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(launched, "compiles", lambda dtype, device: False)
    monkeypatch.setattr(launched, "weight_gradient", refuse)
    monkeypatch.setattr(launched, "gram", refuse)
    x, dy = (torch.randn(4, 6, n).to(torch.bfloat16) for n in (32, 16))
    _, norms = launched.norms(x, dy, algorithm, torch.bfloat16, slots=132)
    each = torch.einsum("btl,btk->blk", dy.double(), x.double())
    torch.testing.assert_close(norms.double(), each.square().sum((1, 2)), rtol=1e-2, atol=0)
