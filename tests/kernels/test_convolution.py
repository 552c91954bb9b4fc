"""Convolutions: per-example norms by every algorithm against per-example gradients in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import convolution as conv
from trainc.kernels.layer import convolution_norms
from trainc.kernels.layer.convolution_norms import Geometry
from trainc.kernels.library.contracts import accumulation_dtype

Shape = tuple[tuple[int, ...], tuple[int, ...], Geometry]
PLAIN: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
# x, weight, and how the kernel moves over x.
SHAPES: dict[str, Shape] = {
    "1d": ((3, 5, 11), (4, 5, 3), Geometry([1], [0], [1], 1)),
    "1d-causal-depthwise": ((2, 4, 7), (8, 1, 4), Geometry([1], [3], [1], 4)),
    "1d-all-at-once": ((3, 2, 13), (6, 1, 2), Geometry([3], [2], [4], 2)),
    "2d": ((3, 4, 7, 5), (6, 4, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 1)),
    "2d-1x1": ((3, 4, 5, 5), (3, 4, 1, 1), Geometry([1, 1], [0, 0], [1, 1], 1)),
    "2d-1x1-stride": ((2, 4, 5, 6), (3, 4, 1, 1), Geometry([2, 2], [0, 0], [1, 1], 1)),
    "2d-even-kernel": ((2, 6, 6, 5), (6, 3, 2, 4), Geometry([2, 1], [1, 3], [1, 2], 2)),
    "2d-depthwise": ((3, 5, 6, 7), (5, 1, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 5)),
    "2d-patches": ((3, 3, 8, 8), (7, 3, 4, 4), Geometry([4, 4], [0, 0], [1, 1], 1)),
    "2d-leaves-a-border": ((3, 2, 8, 9), (3, 2, 3, 3), Geometry([3, 4], [0, 1], [1, 1], 1)),
    "2d-whole-image": ((3, 4, 3, 5), (6, 2, 3, 5), Geometry([1, 1], [0, 0], [1, 1], 2)),
    "3d": ((2, 3, 5, 4, 3), (4, 3, 3, 2, 1), Geometry([1, 1, 1], [1, 0, 0], [1, 1, 1], 1)),
    "3d-all-at-once": (
        (2, 4, 5, 6, 7),
        (8, 2, 2, 3, 2),
        Geometry([2, 1, 3], [0, 2, 1], [2, 1, 3], 2),
    ),
    "one-example": ((1, 3, 5), (2, 3, 3), Geometry([1], [1], [1], 1)),
}


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def moves(geometry: Geometry) -> tuple[Any, ...]:
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


def parts(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """x, weight, bias and dy."""
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtype) for shape in (x, weight, weight[:1])]
    y = PLAIN[len(x) - 3](*made, *moves(geometry))
    return *made, torch.randn(y.shape).to(dtype)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, geometry: Geometry
) -> dict[str, Any]:
    """One forward and backward: y, dx, dweight, dbias, norms."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    columns = 1 if bias is None else 2
    probe = torch.zeros(x.shape[0], columns, dtype=accumulation_dtype(x.dtype), requires_grad=True)
    assert leaves[0] is not None
    assert leaves[1] is not None
    y = conv.convolution(leaves[0], leaves[1], leaves[2], probe, *moves(geometry))
    y.backward(dy)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(("y", "dx", "dweight", "dbias", "norms"), (y, *grads, probe.grad), strict=True))


def by_vmap(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, geometry: Geometry) -> Tensor:
    """(B, 2) squared norms of every example's gradients, by torch.func."""

    def loss(weight: Tensor, bias: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (PLAIN[x.dim() - 2](x[None], weight, bias, *moves(geometry))[0] * dy).sum()

    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))(weight, bias, x, dy)
    return torch.stack([g.flatten(1).square().sum(1) for g in each], 1)


@pytest.mark.parametrize("with_bias", [True, False])
def test_against_gradients_of_every_example(shape: Shape, with_bias: bool) -> None:
    x, weight, bias, dy = parts(*shape, torch.float64)
    got = run(x, weight, bias if with_bias else None, dy, shape[2])
    want = conv.reference(x, weight, bias, dy, shape[2])
    assert torch.equal(
        got["y"], PLAIN[x.dim() - 3](x, weight, bias if with_bias else None, *moves(shape[2]))
    )
    for name in ("dx", "dweight", *(["dbias"] if with_bias else [])):
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)
    exact = by_vmap(x, weight, bias, dy, shape[2])
    torch.testing.assert_close(want["norms"], exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["norms"], exact[:, : 1 + with_bias], rtol=1e-10, atol=1e-10)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_geometry(data: st.DataObject) -> None:
    def numbers(low: int, high: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    spatial, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    examples, inputs, outputs = numbers(1, 3, 3)
    kernel = numbers(1, 3, spatial)
    geometry = Geometry(
        numbers(1, 3, spatial), numbers(0, 2, spatial), numbers(1, 2, spatial), groups
    )
    room = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, kernel, strict=True)]
    image = [n + e for n, e in zip(room, numbers(0, 4, spatial), strict=True)]
    shapes = (examples, inputs * groups, *image), (outputs * groups, inputs, *kernel)
    x, weight, bias, dy = parts(*shapes, geometry, torch.float64)
    got, want = run(x, weight, bias, dy, geometry), by_vmap(x, weight, bias, dy, geometry)
    torch.testing.assert_close(got["norms"], want, rtol=1e-10, atol=1e-10)
    for algorithm in convolution_norms.ALGORITHMS:
        norms, _ = convolution_norms.norms_and_gradient(dy, x, weight, geometry, algorithm)
        torch.testing.assert_close(norms, want[:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("held", [1, 1 << 19])
@pytest.mark.parametrize("algorithm", convolution_norms.ALGORITHMS)
def test_forms_and_chunks_agree(
    shape: Shape, algorithm: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution_norms, "HELD_CPU", held)
    x, weight, bias, dy = parts(*shape, torch.float64)
    want = conv.reference(x, weight, bias, dy, shape[2])
    norms, dweight = convolution_norms.norms_and_gradient(dy, x, weight, shape[2], algorithm)
    torch.testing.assert_close(norms, want["norms"][:, 0], rtol=1e-10, atol=1e-10)
    assert algorithm != "gram" or dweight is None
    if dweight is not None:
        torch.testing.assert_close(dweight, want["dweight"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", convolution_norms.ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_in_low_precision(shape: Shape, algorithm: str, dtype: torch.dtype) -> None:
    x, weight, bias, dy = parts(*shape, dtype)
    norms, _ = convolution_norms.norms_and_gradient(dy, x, weight, shape[2], algorithm)
    want = conv.reference(x.double(), weight.double(), bias.double(), dy.double(), shape[2])
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), want["norms"][:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_no_worse_than_torchs(shape: Shape, dtype: torch.dtype) -> None:
    x, weight, bias, dy = parts(*shape, dtype)
    got = run(x, weight, bias, dy, shape[2])
    exact = conv.reference(x.double(), weight.double(), bias.double(), dy.double(), shape[2])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = PLAIN[x.dim() - 3](*leaves, *moves(shape[2]))
    assert torch.equal(got["y"], y)
    for name, theirs in zip(
        ("dx", "dweight", "dbias"), torch.autograd.grad(y, leaves, dy), strict=True
    ):
        allowed = 2 * (theirs.double() - exact[name]).abs().max() + 1e-5
        assert (got[name].double() - exact[name]).abs().max() <= allowed
        assert got[name].dtype == dtype
    torch.testing.assert_close(got["norms"].double(), exact["norms"], rtol=1e-5, atol=0)


def test_the_choice_follows_positions_and_sizes() -> None:
    assert convolution_norms.choose(3136, 576, 64) == "patches"
    assert convolution_norms.choose(16, 4608, 512) == "gram"
    assert convolution_norms.choose(64, 2304, 256) == "patches"  # 64^2 (K + L) is over 16 K L
    assert convolution_norms.choose(256, 9, 1) == "grouped"
    assert convolution_norms.choose(1, 9, 1) == "gram"


def test_channels_last_images_stay_so() -> None:
    x, weight, bias, dy = parts(*SHAPES["2d"], torch.float32)
    plain = run(x, weight, bias, dy, SHAPES["2d"][2])
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy)]
    got = run(last[0], last[1], bias, last[2], SHAPES["2d"][2])
    for name in ("y", "dx", "dweight"):
        assert got[name].is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_gradients_are_made_only_where_wanted() -> None:
    x, weight, bias, _ = parts(*SHAPES["2d"], torch.float32)
    for frozen in ((x,), (weight,), (bias,), (x, weight, bias)):
        for leaf in (x, weight, bias):
            leaf.grad = None
            leaf.requires_grad_(all(leaf is not f for f in frozen))
        probe = torch.zeros(3, 2, requires_grad=True)
        conv.convolution(x, weight, bias, probe, 1, 1).sum().backward()
        assert probe.grad is not None
        assert probe.grad.all()
        for leaf in (x, weight, bias):
            assert (leaf.grad is not None) == leaf.requires_grad


def test_without_a_probe_it_is_torchs() -> None:
    x, weight, bias, _ = parts(*SHAPES["2d"], torch.float32)
    want = functional.conv2d(x, weight, bias, 2, 1)
    assert torch.equal(conv.convolution(x, weight, bias, None, 2, 1), want)


def test_under_autocast_it_is_torchs() -> None:
    x, weight, bias, _ = parts(*SHAPES["2d"], torch.float32)
    weight.requires_grad_()
    probe = torch.zeros(3, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = conv.convolution(x, weight, bias, probe), functional.conv2d(x, weight, bias)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype == torch.bfloat16
    got.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_no_examples() -> None:
    _, weight, bias, _ = parts(*SHAPES["2d-whole-image"], torch.float32)
    got = run(
        torch.zeros(0, 4, 3, 5), weight, bias, torch.zeros(0, 6, 1, 1), SHAPES["2d-whole-image"][2]
    )
    assert got["norms"].shape == (0, 2)
    assert not got["dweight"].any()


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (((3, 5), (6, 5, 1), None, (3, 1)), {}, r"must be \(B, C, \*spatial\)"),
        (((3, 4, 9), (6, 4, 3), None, (3, 1)), {"groups": 2}, "2 groups"),
        (((3, 4, 9), (6, 4, 3), None, (3, 1)), {"stride": [1, 1]}, "stride must be 1 numbers"),
        (((3, 4, 9), (6, 4, 3), None, (3, 1)), {"dilation": 0}, "dilation must be 1 numbers, one"),
        (((3, 4, 9), (6, 4, 3), None, (3, 1)), {"dilation": 5}, "does not fit"),
        (((3, 4, 9), (6, 4, 3), (5,), (3, 2)), {}, "bias must"),
        (((3, 4, 9), (6, 4, 3), None, (3, 2)), {}, "probe must"),
        (((3, 4, 9), (6, 4), None, (3, 1)), {}, "1 to 3 dims"),
    ],
)
def test_it_names_what_is_wrong(shapes: Any, arguments: Any, message: str) -> None:
    x, weight, bias, probe = (None if s is None else torch.zeros(s) for s in shapes)
    assert x is not None
    assert weight is not None
    with pytest.raises(RuntimeError, match=message):
        conv.convolution(x, weight, bias, probe, **arguments)


def test_a_padding_in_words_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pad x by F\.pad"):
        conv.convolution(torch.zeros(3, 4, 9), torch.zeros(6, 4, 3), padding="same")  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", convolution_norms.ALGORITHMS)
def test_stored_convolution(
    algorithm: str, stored: Callable[[str], Any], lcg: Callable[..., Tensor]
) -> None:
    case = stored("noise_scale")["cases"]["conv2d"]
    held, wanted = case["inputs"], case["outputs"]
    x, weight, bias, dy = (lcg(held[name]) for name in ("x", "weight", "bias", "dy"))
    geometry = Geometry([held["stride"]] * 2, [held["padding"]] * 2, [1, 1], held["groups"])
    want = torch.tensor([wanted["pe_weight"], wanted["pe_bias"]]).double().T
    torch.testing.assert_close(
        run(x, weight, bias, dy, geometry)["norms"], want, rtol=1e-6, atol=1e-8
    )
    norms, _ = convolution_norms.norms_and_gradient(dy, x, weight, geometry, algorithm)
    assert norms.tolist() == pytest.approx(wanted["pe_weight"], rel=1e-10)
    assert norms.sum().item() == pytest.approx(wanted["S1_weight"], rel=1e-10)
