"""Per-example norms of linear and embedding layers against one example at a time in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import embedding as embed
from trainc.kernels.layer import linear as lin
from trainc.kernels.layer import linear_norms

ALGORITHMS = ["auto", "simultaneous", "gram"]


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, algorithm: str
) -> dict[str, Any]:
    """One forward and backward: y, dx, dweight, dbias, norms."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    probe = torch.zeros(x.shape[0], 2 - (bias is None), dtype=wide, requires_grad=True)
    assert leaves[0] is not None
    assert leaves[1] is not None
    y = lin.linear(leaves[0], leaves[1], leaves[2], probe, algorithm)
    y.backward(dy)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(("y", "dx", "dweight", "dbias", "norms"), (y, *grads, probe.grad), strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(3, 5), (1, 1), (127, 3), (3, 7, 5), (2, 1, 127), (3, 2, 3, 5), (2, 40, 3), (1, 2, 8193)],
    ids=str,
)
def test_linear_against_one_example_at_a_time(
    shape: tuple[int, ...], with_bias: bool, algorithm: str
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double(), torch.randn(6, shape[-1]).double()
    bias = torch.randn(6).double() if with_bias else None
    dy = torch.randn(*shape[:-1], 6).double()
    got, want = run(x, weight, bias, dy, algorithm), lin.reference(x, weight, bias, dy)
    assert torch.equal(got["y"], functional.linear(x, weight, bias))
    torch.testing.assert_close(got["dx"], dy @ weight)
    for name in ("dweight", "norms", *(["dbias"] if with_bias else [])):
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chunks_of_examples_add_up(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (torch.randn(s).double() for s in ((7, 4, 5), (6, 5), (6,)))
    dy = torch.randn(7, 4, 6).double()
    monkeypatch.setattr(
        linear_norms, "HELD_CPU", 90
    )  # three examples' gradients, two examples' products
    got, want = run(x, weight, bias, dy, algorithm), lin.reference(x, weight, bias, dy)
    for name in ("dweight", "dbias", "norms"):
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_in_low_precision_is_no_worse_than_torch(algorithm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((3, 33, 40), (24, 40), (24,)))
    dy = torch.randn(3, 33, 24).to(dtype)
    got = run(x, weight, bias, dy, algorithm)
    exact = lin.reference(x.double(), weight.double(), bias.double(), dy.double())
    low = torch.autograd.grad(
        functional.linear(x, weight.requires_grad_(), bias.requires_grad_()), (weight, bias), dy
    )
    for name, theirs in zip(("dweight", "dbias"), low, strict=True):
        allowed = 2 * (theirs.double() - exact[name]).abs().max() + 1e-5
        assert (got[name].double() - exact[name]).abs().max() <= allowed
        assert got[name].dtype == dtype
    assert got["norms"].dtype == torch.float32
    torch.testing.assert_close(got["norms"].double(), exact["norms"], rtol=1e-4, atol=0)


def test_few_rows_take_products_of_rows_and_many_the_gradients() -> None:
    assert linear_norms.choose(16, 768, 768) == "gram"
    assert linear_norms.choose(79, 768, 768) == "simultaneous"  # 4 sqrt(KL / (K + L)) = 78.4
    assert (
        linear_norms.choose(6, 8, 8) == "simultaneous"
    )  # the products would be larger than the gradient


def test_linear_gradients_are_made_only_where_wanted() -> None:
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(6, 5), torch.randn(6)
    for algorithm in ALGORITHMS:
        for frozen in ((x,), (weight,), (bias,), (x, weight, bias)):
            for leaf in (x, weight, bias):
                leaf.grad = None
                leaf.requires_grad_(all(leaf is not f for f in frozen))
            probe = torch.zeros(3, 2, requires_grad=True)
            lin.linear(x, weight, bias, probe, algorithm).sum().backward()
            assert probe.grad is not None
            assert probe.grad.all()
            assert [leaf.grad is not None for leaf in (x, weight, bias)] == [
                leaf.requires_grad for leaf in (x, weight, bias)
            ]


def test_linear_under_autocast_is_torchs() -> None:
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(6, 5), torch.randn(6)
    weight.requires_grad_()
    probe = torch.zeros(3, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = lin.linear(x, weight, bias, probe), functional.linear(x, weight, bias)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype == torch.bfloat16
    got.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "algorithm", "message"),
    [
        (((3, 4), (6, 5), None, (3, 1)), "auto", "x must be"),
        (((3, 5), (6, 5), (5,), (3, 2)), "auto", "bias must"),
        (((3, 5), (6, 5), None, (3, 2)), "auto", "probe must"),
        (((3, 5), (6, 5), None, (3, 1)), "ghost", "algorithm must be one of"),
    ],
)
def test_linear_names_what_is_wrong(shapes: tuple[Any, ...], algorithm: str, message: str) -> None:
    x, weight, bias, probe = (None if s is None else torch.zeros(s) for s in shapes)
    assert x is not None
    assert weight is not None
    with pytest.raises(RuntimeError, match=message):
        lin.linear(x, weight, bias, probe, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stored_linear(
    algorithm: str, stored: Callable[[str], Any], lcg: Callable[..., Tensor]
) -> None:
    case = stored("noise_scale")["cases"]["linear_3d"]
    parts = {name: lcg(description) for name, description in case["inputs"].items()}
    got = run(parts["x"], parts["weight"], parts["bias"], parts["dy"], algorithm)
    want = torch.tensor([case["outputs"][n] for n in ("pe_weight", "pe_bias")]).double().T
    torch.testing.assert_close(got["norms"], want, rtol=1e-6, atol=1e-8)


IDS = [[1, 4, 3, 4, 2, 1, 3, 3], [1, 4, 4, 3, 3, 1, 0, 1], [0, 0, 3, 4, 1, 3, 0, 4]]


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("shape", [(3, 8), (6, 2, 2), (24,), (1, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_embedding_against_one_example_at_a_time(
    dtype: torch.dtype, shape: tuple[int, ...], padding: int | None
) -> None:
    torch.manual_seed(0)
    ids, weight = torch.tensor(IDS).view(shape), torch.randn(5, 4).to(dtype).requires_grad_()
    dy = torch.randn(*shape, 4).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probe = torch.zeros(shape[0], 1, dtype=wide, requires_grad=True)
    y = embed.embedding(ids, weight, padding, probe)
    plain = functional.embedding(ids, weight, padding)
    assert torch.equal(y, plain)
    got = torch.autograd.grad(y, (weight, probe), dy)
    assert torch.equal(got[0], torch.autograd.grad(plain, weight, dy)[0])
    want = embed.reference(ids, weight.detach().double(), dy.double(), padding)
    torch.testing.assert_close(got[1].double(), want["norms"], rtol=1e-5, atol=1e-12)


def test_stored_embedding(stored: Callable[[str], Any], lcg: Callable[..., Tensor]) -> None:
    case = stored("noise_scale")["cases"]["embedding"]
    probe = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(case["inputs"]["V"], 4, dtype=torch.float64, requires_grad=True)
    y = embed.embedding(torch.tensor(case["inputs"]["ids"]), weight, None, probe)
    y.backward(lcg(case["inputs"]["dy"]))
    assert probe.grad is not None
    assert probe.grad.flatten().tolist() == pytest.approx(case["outputs"]["pe_weight"])


def test_embedding_names_what_is_wrong() -> None:
    probe = torch.zeros(2, 1)
    with pytest.raises(RuntimeError, match="must be a row"):
        embed.embedding(torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4), 3, probe)
    with pytest.raises(RuntimeError, match="probe must"):
        embed.embedding(torch.zeros(5, dtype=torch.int64), torch.zeros(3, 4), None, probe)
    with pytest.raises(RuntimeError, match="int32 or int64"):
        embed.embedding(torch.zeros(2), torch.zeros(3, 4), None, probe)
