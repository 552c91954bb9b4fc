"""GroupNorm: per-example norms against per-example gradients in float64; torch's own results."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.norm import group_norm as gn

Shape = tuple[tuple[int, ...], int]
# x and groups.
SHAPES: list[Shape] = [
    ((3, 6, 5, 7), 2),
    ((2, 4, 9), 4),
    ((3, 4, 9), 1),
    ((2, 6, 3, 2, 5), 3),
    ((4, 8), 2),
    ((1, 32, 14, 14), 8),
]


def parts(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias and dy."""
    torch.manual_seed(0)
    x, channels = torch.randn(shape[0]).mul(2).add(0.5), shape[0][1]
    made = (x, torch.randn(channels), torch.randn(channels), torch.randn(shape[0]))
    return tuple(t.to(dtype) for t in made)


def run(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, dy: Tensor
) -> dict[str, Any]:
    """One forward and backward: y, dx, dweight, dbias, norms."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    probe = torch.zeros(x.shape[0], 2, dtype=accumulation_dtype(x.dtype), requires_grad=True)
    assert leaves[0] is not None
    y = gn.group_norm(leaves[0], groups, leaves[1], leaves[2], probe)
    y.backward(dy)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(("y", "dx", "dweight", "dbias", "norms"), (y, *grads, probe.grad), strict=True))


def by_vmap(x: Tensor, groups: int, weight: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    """(B, 2) squared norms of every example's gradients, by torch.func."""

    def loss(weight: Tensor, bias: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (functional.group_norm(x[None], groups, weight, bias)[0] * dy).sum()

    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))(weight, bias, x, dy)
    return torch.stack([g.square().sum(1) for g in each], 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_gradients_of_every_example(shape: Shape) -> None:
    x, weight, bias, dy = parts(shape, torch.float64)
    got = run(x, shape[1], weight, bias, dy)
    want = gn.reference(x, shape[1], weight, bias, dy, 1e-5)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)
    exact = by_vmap(x, shape[1], weight, bias, dy)
    torch.testing.assert_close(got["norms"], exact, rtol=1e-10, atol=1e-10)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(data: st.DataObject) -> None:
    groups, each, examples = (data.draw(st.integers(1, 4)) for _ in range(3))
    spatial = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    shape = ((examples, groups * each, *spatial, 2), groups)
    x, weight, bias, dy = parts(shape, torch.float64)
    got = run(x, groups, weight, bias, dy)["norms"]
    want = by_vmap(x, groups, weight, bias, dy)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [((3, 6, 5, 7), 6), ((2, 4, 9), 4)], ids=str)
def test_a_group_for_every_channel_is_instance_norm(shape: Shape) -> None:
    x, weight, bias, dy = parts(shape, torch.float64)
    got = run(x, shape[1], weight, bias, dy)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = functional.instance_norm(leaves[0], weight=leaves[1], bias=leaves[2])
    torch.testing.assert_close(got["y"], y)
    for name, want in zip(
        ("dx", "dweight", "dbias"), torch.autograd.grad(y, leaves, dy), strict=True
    ):
        torch.testing.assert_close(got[name], want)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_probe_changes_no_result(dtype: torch.dtype, last: bool) -> None:
    for shape in SHAPES:
        x, weight, bias, dy = parts(shape, dtype)
        if last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        got = run(x, shape[1], weight, bias, dy)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = gn.group_norm(leaves[0], shape[1], leaves[1], leaves[2])
        assert torch.equal(y, functional.group_norm(x, shape[1], weight, bias))
        assert torch.equal(got["y"], y)
        assert got["y"].stride() == y.stride()
        dx = torch.autograd.grad(y, leaves[0], dy)[0]
        if dtype == torch.bfloat16:  # ATen rounds mean and rstd to 16 bits, ours are float32
            continue
        torch.testing.assert_close(got["dx"], dx)
        assert last or torch.equal(got["dx"], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_precision_is_no_worse_than_torchs(shape: Shape, dtype: torch.dtype) -> None:
    x, weight, bias, dy = parts(shape, dtype)
    got = run(x, shape[1], weight, bias, dy)
    exact = gn.reference(x.double(), shape[1], weight.double(), bias.double(), dy.double(), 1e-5)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = functional.group_norm(leaves[0], shape[1], leaves[1], leaves[2])
    theirs = (y, *torch.autograd.grad(y, leaves, dy))
    for name, other in zip(("y", "dx", "dweight", "dbias"), theirs, strict=True):
        allowed = 2 * (other.double() - exact[name]).abs().max() + 1e-5
        assert (got[name].double() - exact[name]).abs().max() <= allowed
        assert got[name].dtype == dtype
    torch.testing.assert_close(got["norms"].double(), exact["norms"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("given_parts", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias_its_column_is_zero(given_parts: tuple[bool, bool]) -> None:
    shape = SHAPES[0]
    x, weight, bias, dy = parts(shape, torch.float64)
    w, b = (p if there else None for p, there in zip((weight, bias), given_parts, strict=True))
    got, want = run(x, 2, w, b, dy), gn.reference(x, 2, w, b, dy, 1e-5)
    for name in ("y", "dx", "norms"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)
    assert (got["norms"] != 0).any(0).tolist() == list(given_parts)


def test_gradients_are_made_only_where_wanted() -> None:
    x, weight, bias, _ = parts(SHAPES[0], torch.float32)
    for frozen in ((x,), (weight,), (bias,), (x, weight, bias)):
        for leaf in (x, weight, bias):
            leaf.grad = None
            leaf.requires_grad_(all(leaf is not f for f in frozen))
        probe = torch.zeros(3, 2, requires_grad=True)
        gn.group_norm(x, 2, weight, bias, probe).square().sum().backward()
        assert probe.grad is not None
        assert probe.grad.all()
        for leaf in (x, weight, bias):
            assert (leaf.grad is not None) == leaf.requires_grad


def test_no_examples() -> None:
    weight, bias = torch.ones(4), torch.ones(4)
    got = run(torch.zeros(0, 4, 3), 2, weight, bias, torch.zeros(0, 4, 3))
    assert got["norms"].shape == (0, 2)
    assert not got["dweight"].any()


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        (((3, 4, 5), (4,), (4,), (3, 2)), 3, "a multiple of 3 groups"),
        (((3, 4, 5), (5,), (4,), (3, 2)), 2, "weight and bias must"),
        (((3, 4, 5), (4,), (4,), (3, 1)), 2, "probe must"),
        (((3,), None, None, (3, 2)), 1, "not"),
    ],
)
def test_it_names_what_is_wrong(shapes: Any, groups: int, message: str) -> None:
    x, weight, bias, probe = (None if s is None else torch.zeros(s) for s in shapes)
    assert x is not None
    with pytest.raises(RuntimeError, match=message):
        gn.group_norm(x, groups, weight, bias, probe)
