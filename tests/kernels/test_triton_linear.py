"""The Triton sources of linear and embedding layers: by the interpreter, and compiled without a GPU."""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.offline.machine_code import compiled, disassembled, resources
from tests.kernels.test_triton_architectures import OTHERS, REGISTER_FILE
from tests.kernels.test_triton_offline import (
    ARCHITECTURE,
    FULL,
    INDEX,
    SPILLS,
    spec,
    triton_version,
)
from trainc.kernels.layer import embedding, linear, linear_norms

NAMES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# What a launch finds divisible by 16 most of the time.
SIZES = ("inputs", "outputs", "width")
interpreter = pytest.mark.interpreter


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launch module with float32 operands: the interpreter has no 16-bit arithmetic."""
    import triton.language as tl

    from trainc.kernels.layer import triton_linear_launch

    torch.manual_seed(0)
    monkeypatch.setattr(triton_linear_launch, "OPERANDS", dict.fromkeys(DTYPES, tl.float32))
    return triton_linear_launch


def drawn(shape: tuple[int, int, int], outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (B, T, K) and dy (B, T, L)."""
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype), torch.randn(*shape[:2], outputs).to(dtype)


def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the norms in float64."""
    each = torch.einsum("btl,btk->blk", dy.double(), x.double())
    return each.sum(0), each.square().sum((1, 2))


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((3, 5, 7), 9), ((2, 33, 127), 3), ((1, 2, 1), 1), ((5, 17, 3), 127), ((4, 3, 130), 65)],
    ids=str,
)
@pytest.mark.parametrize("slots", [1, 4])
def test_the_fused_gradient_and_its_norms(
    shape: tuple[int, int, int], outputs: int, slots: int, dtype: torch.dtype, launched: Any
) -> None:
    x, dy = drawn(shape, outputs, dtype)
    total, norms = launched.weight_gradient(x, dy, dtype, slots)
    want, squares = exact(x, dy)
    # The interpreter truncates to bfloat16 where a device rounds: an ulp, not half of one.
    rtol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(total.double(), want, rtol=rtol, atol=1e-5)
    assert total.dtype == dtype
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), squares, rtol=1e-5, atol=0)


@interpreter
def test_the_large_tile_and_its_groups_of_examples(launched: Any) -> None:
    x, dy = drawn((3, 5, 130), 129, torch.bfloat16)
    shape = launched.tile(torch.bfloat16, 5)
    want, squares = exact(x, dy)
    for slots in (1, 8):  # one program a tile, then one an example too: more than 8 would be long
        total, norms = launched.weight_gradient(x, dy, torch.float32, slots, shape)
        torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norms.double(), squares, rtol=1e-5, atol=0)


@interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((3, 5, 7), 9), ((1, 150, 33), 3), ((2, 2, 1), 127), ((2, 127, 130), 65)],
    ids=str,
)
def test_products_of_rows(
    shape: tuple[int, int, int], outputs: int, dtype: torch.dtype, launched: Any
) -> None:
    x, dy = drawn(shape, outputs, dtype)
    norms = launched.gram(x, dy)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact(x, dy)[1], rtol=1e-5, atol=0)


@interpreter
def test_contributions_that_cancel_are_not_negative(launched: Any) -> None:
    x, dy = drawn((2, 33, 9), 5, torch.float32)
    x, dy = torch.cat([x, x], 1), torch.cat([dy, -dy], 1)
    norms = launched.gram(x, dy)
    assert (norms >= 0).all()
    assert (norms <= 1e-3).all()


@interpreter
@pytest.mark.parametrize("algorithm", linear_norms.ALGORITHMS)
@pytest.mark.parametrize(
    "shape", [(3, 5), (0, 4, 5), (2, 0, 5), (3, 4, 5), (2, 3, 2, 5), (3, 1, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_the_cpus(
    dtype: torch.dtype, shape: tuple[int, ...], algorithm: str, launched: Any
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(7, 5).to(dtype)
    dy = torch.randn(7, *shape[:-1]).to(dtype).movedim(0, -1)  # not contiguous
    for mask, with_norms in (([True] * 3, True), ([False, False, True], True), ([True] * 3, False)):
        arguments = (dy, x, weight, True, algorithm, mask, with_norms)
        got, want = launched.linear_backward(*arguments), linear.eager_backward(*arguments)
        for mine, theirs in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5
            )
        torch.testing.assert_close(got[3], want[3], rtol=1e-4, atol=1e-6)


@interpreter
def test_a_device_takes_the_form_that_costs_least(launched: Any) -> None:
    def chosen(*size: int, algorithm: str = "auto", float32: bool = False) -> str:
        name: str = launched.choose(algorithm, *size, float32, 132)
        return name

    assert chosen(8, 64, 4096, 4096) == "gram"
    assert chosen(8, 1024, 1024, 1024) == "fused"
    assert chosen(8, 64, 4096, 4096, algorithm="simultaneous") == "fused"
    # So many rows that ATen's faster products pay for gradients in memory.
    assert chosen(8, 8192, 4096, 4096) == "simultaneous"
    # Float32 products keep no tensor core busy.
    assert chosen(8, 1024, 4096, 4096, float32=True) == "simultaneous"
    # One example and few tiles: most of the device would wait.
    assert chosen(1, 1024, 256, 256) == "simultaneous"


@interpreter
def test_groups_hold_every_example_and_fill_the_device(launched: Any) -> None:
    for examples in (1, 7, 8, 64, 100):
        for tiles in (1, 36, 1024):
            each = launched.examples_per_group(examples, 16, tiles, 132)
            assert 1 <= each <= examples
            # Nothing is cut where tiles alone are waves enough.
            assert each == examples or tiles * -(-examples // each) <= 4 * 132 + tiles


@interpreter
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize(
    ("shape", "width"),
    [((1, 8), 127), ((2, 2, 2), 3), ((4,), 1), ((1, 3), 33), ((0, 3), 4)],
    ids=str,
)
def test_embedding(
    shape: tuple[int, ...], width: int, padding: int, kind: torch.dtype, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from trainc.kernels.layer import triton_embedding

    monkeypatch.setattr(triton_embedding, "ROWS", 2)  # runs of several steps
    monkeypatch.setattr(triton_embedding, "COLUMNS", 128)
    torch.manual_seed(0)
    ids, dy = torch.randint(0, 3, shape).to(kind), torch.randn(*shape, width).to(dtype)
    for mask in ([True, True], [False, True], [True, False]):
        got = triton_embedding.embedding_backward(dy, ids, 3, padding, mask)
        want = embedding.eager_backward(dy, ids, 3, padding, mask)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
    if shape[0]:
        weight, where = torch.zeros(3, width).double(), None if padding < 0 else padding
        norms = embedding.reference(ids, weight, dy.double(), where)["norms"]
        found = triton_embedding.embedding_backward(dy, ids, 3, padding, [True, True])[1]
        torch.testing.assert_close(found.double(), norms, rtol=1e-5, atol=0)


@interpreter
def test_a_run_in_several_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainc.kernels.layer import triton_embedding

    monkeypatch.setattr(triton_embedding, "COLUMNS", 16)
    ids, dy = torch.tensor([[1, 1, 1]]), torch.randn(1, 3, 33)
    torch.testing.assert_close(
        triton_embedding.norms(dy, ids, -1), dy.sum(1).square().sum(1, keepdim=True)
    )


def weight_gradient(name: str, rows: int, outputs: int, inputs: int, warps: int) -> Any:
    """One compilation of the fused gradient, at a tile of the launch table."""
    sizes = " ".join(
        f"{n}:i32" for n in ("examples", "rows", "inputs", "outputs", "tiles_l", "tiles_k", "share")
    )
    given = f"X:{NAMES[name]} DY:{NAMES[name]} TOTAL:{FULL} SQUARES:{FULL} {sizes}"
    return spec(
        "layer.triton_linear", "weight_gradient", given, OPERAND=name, PRECISION="ieee", STAGES=3,
        GROUP=8, BLOCK_T=rows, BLOCK_L=outputs, BLOCK_K=inputs, warps=warps,
    )  # fmt: skip


def gram(name: str, rows: int, columns: int, warps: int) -> Any:
    """One compilation of products of rows."""
    given = f"X:{NAMES[name]} DY:{NAMES[name]} PARTIAL:{FULL} "
    return spec(
        "layer.triton_linear", "gram", given + "rows:i32 inputs:i32 outputs:i32 tiles:i32 pairs:i32",
        OPERAND=name, PRECISION="ieee", STAGES=3, BLOCK_T=rows, BLOCK_C=columns, warps=warps,
    )  # fmt: skip


PRODUCTS = [
    weight_gradient("bfloat16", 64, 128, 128, 8),
    weight_gradient("float16", 64, 128, 128, 8),
    weight_gradient("bfloat16", 32, 128, 128, 8),
    weight_gradient("bfloat16", 64, 64, 64, 8),
    weight_gradient("float32", 32, 128, 64, 8),
    weight_gradient("float32", 32, 64, 64, 4),
    gram("bfloat16", 128, 64, 8),
    gram("bfloat16", 64, 64, 4),
    gram("bfloat16", 16, 64, 4),
    gram("float32", 64, 32, 8),
    gram("float32", 16, 32, 4),
]
RUNS = spec(
    "layer.triton_embedding", "run_squares",
    f"DY:*bf16 SORTED:{INDEX} ORDER:{INDEX} SQUARES:{FULL} rows:i32 width:i32 padding:i32",
    BLOCK_R=4, BLOCK_C=512, warps=1,
)  # fmt: skip


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [ARCHITECTURE, *OTHERS])
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), [*PRODUCTS, RUNS])
def test_kernels_fit_registers_and_take_the_tensor_cores(
    record_property: Callable[[str, object], None],
    module: str, name: str, arguments: str, options: dict[str, Any], warps: int, architecture: int,
) -> None:  # fmt: skip
    from trainc.kernels.layer import triton_linear_launch as launch

    in_16_bits = options.get("OPERAND") in ("bfloat16", "float16")
    old = triton_version() < launch.PRODUCTS_FROM
    if old and in_16_bits and architecture // 10 == launch.BLACKWELL:
        return  # no launch asks for it: `compiles` says no
    function = getattr(import_module(f"trainc.kernels.{module}"), name)
    code = compiled(function, arguments, options, warps, architecture, SIZES)
    ptx, taken = code.asm["ptx"], resources(code, architecture)
    record_property("registers", taken.registers)
    record_property("spilled", taken.spilled)
    assert taken.spilled <= SPILLS
    assert taken.registers * 32 * warps <= REGISTER_FILE
    assert re.search(r"ld\.global\.\S*v4|cp\.async\.cg.*, 0x10", ptx), "no 128-bit load"
    # Tiles of fewer than 64 rows are too low for the units of a warp group.
    low = name == "gram" and options["BLOCK_T"] < 64
    unit = UNITS[80 if low else architecture]
    # Float32 is multiplied exactly, as ATen multiplies it, on no tensor core.
    assert (unit in ptx) == in_16_bits
    if in_16_bits and not low and architecture == ARCHITECTURE:
        assert disassembled(code).count("HGMMA")
