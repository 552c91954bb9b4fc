"""What a norm's backward pass costs in launches, and that each of its forms gives what the eager kernel gives."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trainc.kernels.library.grid import cdiv
from trainc.kernels.norm import add_layer_norm, layer_norm, rms_norm, tiles
from trainc.kernels.norm.tiles import Tile

# Operations of ATen that give memory or another view of it, and launch nothing on a device.
FREE = ("empty", "view", "reshape", "detach", "alias", "select", "slice", "unsqueeze", "expand")


class Launches(TorchDispatchMode):
    """Counts what a device would be given: Triton's kernels, and ATen's operations but for views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.lstrip("_").startswith(FREE) and not name.startswith(
            ("new_empty", "_unsafe_view")
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The launches of what runs in it; the interpreter's own operations are none."""
    from trainc.kernels.library import launch as launching
    from trainc.kernels.norm import triton_norm_launch, triton_wide_norm

    counted = Launches()
    run = launching.launch

    def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        counted.found.append(kernel.fn.__name__)
        with _disable_current_modes():
            run(kernel, grid, *arguments, **options)

    for module in (triton_norm_launch, triton_wide_norm):
        monkeypatch.setattr(module, "launch", launch)
    return counted


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows count as too wide for registers."""
    from trainc.kernels.norm import triton_wide_norm as wide

    monkeypatch.setattr(tiles, "HELD", 32)
    monkeypatch.setattr(wide, "TILE", Tile(rows=2, columns=32, warps=4, stages=2))
    monkeypatch.setattr(wide, "ROW_COLUMNS", 32)
    monkeypatch.setattr(wide, "ROW_PROGRAMS", 2)


# Shape, programs that run at once, and whether rows count as wide.
FORMS: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "split": ((2, 9, 20), 4, False),
    "split, one chunk": ((3, 2, 20), 5, False),
    "one example": ((1, 9, 20), 3, False),
    "whole": ((5, 3, 20), 2, False),
    "rows": ((9, 20), 2, False),
    "wide": ((2, 5, 70), 8, True),
    "wide rows": ((3, 70), 8, True),
}
# Whether the gradients of x, weight and bias, and norms are asked for.
ASKED = {
    "all": (True, True, True, True),
    "norms alone": (False, False, False, True),
    "norms and dx": (True, False, False, True),
    "gradients": (True, True, True, False),
    "bias and dx": (True, False, True, False),
    "dx": (True, False, False, False),
}
Build = Callable[..., tuple[Any, Any]]


def layer(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, asked: Any) -> Any:
    """Arguments of the launcher and results of the eager kernel."""
    tail, mask = [x.shape[-1]], asked
    mask = [mask[0], mask[1] and weight is not None, mask[2] and bias is not None]
    _, mean, rstd = layer_norm.eager_forward(x, tail, weight, bias, torch.zeros(len(x), 2), 1e-5)
    given = (dy, x, tail, mean, rstd)
    want = layer_norm.eager_backward(*given, weight, bias, mask, True)
    return (*given, (weight, bias), mask, False), want


def rms(x: Tensor, dy: Tensor, weight: Tensor | None, _: Tensor | None, asked: Any) -> Any:
    """The same for RMSNorm."""
    tail, mask = [x.shape[-1]], asked
    mask = [mask[0], mask[1] and weight is not None, False]
    _, rstd = rms_norm.eager_forward(x, tail, weight, None, 1e-5, "llama")
    dx, dweight, found = rms_norm.eager_backward(dy, x, tail, rstd, weight, "llama", mask[:2], True)
    return (dy, x, tail, rstd, rstd, (weight, None), mask, True, "llama"), (
        dx, dweight, torch.empty(0), found,
    )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "of a sum"])
@pytest.mark.parametrize("build", [layer, rms], ids=["layer", "rms"])
def test_a_backward_pass_takes_two_launches(
    build: Build, added: bool, form: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(build, form, ASKED["all"], launches, monkeypatch, added=added)
    assert len(launches.found) == 2, launches.found


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["split", "whole", "rows", "wide", "wide rows"])
@pytest.mark.parametrize(
    ("asked", "affine"),
    [
        *((asked, "weight+bias") for asked in ASKED),
        *(("all", one) for one in ("weight", "bias", "")),
    ],
)
def test_what_is_not_asked_for_costs_no_launch(
    asked: str, affine: str, form: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(layer, form, ASKED[asked], launches, monkeypatch, affine=affine)
    assert len(launches.found) <= 2, launches.found
    if asked == "dx" and "wide" not in form:
        assert launches.found == ["norm_backward_split"]


def compare(
    build: Build, form: str, asked: tuple[bool, ...], launches: Launches,
    monkeypatch: pytest.MonkeyPatch, affine: str = "weight+bias", added: bool = False,
) -> None:  # fmt: skip
    """Run a form by the interpreter and compare its results, of the right dtypes, with the eager kernel's."""
    backward: Any = import_module("trainc.kernels.norm.triton_norm_launch").backward
    shape, programs, wide = FORMS[form]
    if wide:
        narrow(monkeypatch)
    torch.manual_seed(0)
    x, dy, dtotal = (torch.randn(shape) for _ in range(3))
    weight = torch.randn(shape[-1]) if "weight" in affine else None
    bias = torch.randn(shape[-1]) if "bias" in affine else None
    arguments, want = build(x, dy, weight, bias, asked)
    with launches:
        got = backward(
            *arguments, with_norms=asked[3], programs=programs, dtotal=dtotal if added else None
        )
    if added and asked[0]:
        want = (want[0] + dtotal, *want[1:])
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    if asked[3]:
        torch.testing.assert_close(got[3], want[3], rtol=1e-4, atol=2e-5)
    else:
        assert got[3].numel() == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("form", ["split", "whole", "rows", "wide"])
def test_several_gradients_are_one_as_autograd_adds_them(
    form: str, terms: int, dtype: torch.dtype, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and without a launch for the sums, but for wide rows."""
    backward: Any = import_module("trainc.kernels.norm.triton_norm_launch").backward
    shape, programs, wide = FORMS[form]
    if wide:
        narrow(monkeypatch)
    torch.manual_seed(0)
    x, *parts = (torch.randn(shape).to(dtype) for _ in range(1 + terms))
    weight = torch.randn(shape[-1]).to(dtype)
    total = sum(parts[1:], parts[0])
    arguments, _ = layer(x, parts[0], weight, weight, ASKED["all"])
    with launches:
        got = backward(*arguments, programs=programs, more=parts[1:])
    assert len(launches.found) == 2 + (terms - 1 if wide else 0)
    for one, other in zip(got, backward(total, *arguments[1:], programs=programs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "operator", [layer_norm.OPERATOR, add_layer_norm.OPERATOR], ids=["layer_norm", "add_layer_norm"]
)
def test_the_operator_of_several_gradients_adds_them(operator: Any) -> None:
    torch.manual_seed(0)
    x, dtotal, *parts = (torch.randn(2, 3, 5) for _ in range(5))
    weight, bias = torch.randn(5), torch.randn(5)
    _, mean, rstd = layer_norm.eager_forward(x, [5], weight, bias, torch.zeros(2, 2), 1e-5)
    rest: tuple[Any, ...] = (x, [5], mean, rstd, weight, bias, [True] * 3)
    before: tuple[Any, ...] = (dtotal,) if operator.residual else ()
    rest += (True,) if operator.residual else ()
    for third in (None, parts[2]):
        total = parts[0] + parts[1] if third is None else parts[0] + parts[1] + third
        want = operator.backward_op(*before, total, *rest)
        given = (*before, *parts[:2], third, *rest)
        for one, other in zip(operator.backward_of_sum_op(*given), want, strict=True):
            assert torch.equal(one, other)
        torch.library.opcheck(operator.backward_of_sum_op, given)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", ["split", "whole", "rows", "wide", "wide rows"])
def test_memory_that_was_used_before_changes_nothing(
    form: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is set to zero before the launches: they must write whatever they read."""
    backward: Any = import_module("trainc.kernels.norm.triton_norm_launch").backward
    found = []
    empty = torch.empty
    shape, programs, wide = FORMS[form]
    if wide:
        narrow(monkeypatch)
    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    arguments, _ = layer(x, dy, None, torch.randn(shape[-1]), ASKED["all"])
    for poison in (0.0, math.nan):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, p=poison, **k: empty(*a, **k).fill_(p))
            patch.setattr(
                Tensor,
                "new_empty",
                lambda t, *a, p=poison, **k: empty(*a, **{"dtype": t.dtype, **k}).fill_(p),
            )
            found.append(backward(*arguments, programs=programs))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("sums", [1, 2])
@pytest.mark.parametrize(
    ("examples", "chunks", "width"),
    [
        (1, 1, 1),
        (1, 264, 4096),
        (8, 49, 768),
        (64, 4, 4096),
        (300, 1, 1024),
        (3, 700, 8192),
        (1, 90, 1 << 24),
    ],
)
def test_the_last_launch_is_a_short_chain_of_loads(
    examples: int, chunks: int, width: int, sums: int, squared: bool
) -> None:
    step = tiles.finish(examples, chunks, width, sums, squared, 132)
    loaded = step.examples * step.chunks * step.unroll * step.columns
    assert loaded <= tiles.FINISH_ELEMENTS
    assert step.lines * step.blocks <= tiles.FINISH_ELEMENTS // 2
    assert tiles.FINISH_LEAST <= step.columns <= tiles.FINISH_MOST
    lines = examples * chunks * cdiv(width, step.columns) * step.columns
    # Twice as many loads as there are numbers, at the most.
    steps = step.steps(examples, chunks, width, sums, False)
    assert steps <= 2 + 4 * lines / cdiv(width, step.columns) / tiles.FINISH_ELEMENTS


@pytest.mark.parametrize(
    ("examples", "chunks", "width", "steps"),
    [(8, 49, 768, 2), (1, 264, 4096, 4), (64, 4, 4096, 4), (256, 1, 4096, 8)],
)
def test_chains_of_usual_sizes(examples: int, chunks: int, width: int, steps: int) -> None:
    step = tiles.finish(examples, chunks, width, 2, True, 132)
    assert step.steps(examples, chunks, width, 2, True) == steps
