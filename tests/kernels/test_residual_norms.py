"""Residual add and norm: the composition bit for bit, and the Triton sources against it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

Norms = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], int]
NORMS: dict[str, Norms] = {
    "layer": (
        lambda x, r, w, b, probe: add_layer_norm.add_layer_norm(x, r, w.shape, w, b, probe),
        lambda x, w, b, probe: layer_norm.layer_norm(x, w.shape, w, b, probe),
        lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
        2,
    ),
    "rms": (
        lambda x, r, w, b, probe: add_rms_norm.add_rms_norm(x, r, w.shape, w, probe),
        lambda x, w, b, probe: rms_norm.rms_norm(x, w.shape, w, probe),
        lambda x, w, b: functional.rms_norm(x, w.shape, w),
        1,
    ),
}


@pytest.fixture(params=NORMS)
def norms(request: pytest.FixtureRequest) -> Any:
    return NORMS[request.param]


def inputs(dtype: torch.dtype, residual: torch.dtype | None = None) -> list[Tensor]:
    """x, residual, weight and bias, each requiring grad."""
    torch.manual_seed(0)
    made = [torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)]
    dtypes = [dtype, *[residual or dtype] * 3]
    return [t.to(d).requires_grad_() for t, d in zip(made, dtypes, strict=True)]


def gradients(results: tuple[Tensor, Tensor], parts: list[Tensor], used: str) -> list[Any]:
    torch.manual_seed(1)
    weights = [torch.randn(r.shape).to(r.dtype) for r in results]
    pairs = zip(used, results, weights, strict=True)
    kept = [(r, w) for letter, r, w in pairs if letter != "-"]
    outputs, seeds = ([pair[side] for pair in kept] for side in range(2))
    return list(torch.autograd.grad(outputs, parts, seeds, allow_unused=True))


def same(got: list[Any], want: list[Any]) -> None:
    for left, right in zip(got, want, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize("used", ["ty", "t-", "-y"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_probe_it_is_torchs_composition(
    norms: Norms, dtype: torch.dtype, used: str
) -> None:
    fused, _, theirs, _ = norms
    parts = inputs(dtype)
    x, residual, weight, bias = parts
    total = x + residual
    got, want = fused(*parts, None), (total, theirs(total, weight, bias))
    same(list(got), list(want))
    # ATen's RMSNorm backward is another formula; LayerNorm's is the one called.
    if norms is NORMS["layer"]:
        same(gradients(got, parts, used), gradients(want, parts, used))


@pytest.mark.parametrize("used", ["ty", "-y"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_with_probe_it_is_our_composition(
    norms: Norms, dtypes: tuple[torch.dtype, torch.dtype], used: str
) -> None:
    fused, ours, _, columns = norms
    parts = inputs(*dtypes)
    probes = [torch.zeros(3, columns, requires_grad=True) for _ in range(2)]
    total = parts[0] + parts[1]
    got = fused(*parts, probes[0])
    want = (total, ours(total, parts[2], parts[3], probes[1]))
    same(list(got), list(want))
    same(
        gradients(got, [*parts, probes[0]], used),
        gradients(want, [*parts, probes[1]], used),
    )


def test_only_what_requires_grad_gets_one(norms: Norms) -> None:
    parts = inputs(torch.float32)
    parts[0] = parts[0].detach()
    parts[2] = parts[2].detach()
    total, y = norms[0](*parts, None)
    (total.sum() + y.square().sum()).backward()
    assert parts[0].grad is None
    assert parts[1].grad is not None
    assert parts[2].grad is None


def test_summands_of_other_shapes_are_refused(norms: Norms) -> None:
    x, _, weight, bias = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="must have the same shape"):
        norms[0](x, x[:1], weight, bias, None)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("probed", [False, True])
def test_autocast_on_a_cpu_does_what_it_does_to_the_composition(
    norms: Norms, dtypes: tuple[torch.dtype, torch.dtype], probed: bool
) -> None:
    fused, _, theirs, columns = norms
    x, residual = (part.to(d) for part, d in zip(inputs(torch.float32), dtypes, strict=False))
    dtype = torch.promote_types(*dtypes)
    weight, bias = (part.to(dtype) for part in inputs(torch.float32)[2:])
    probe = torch.zeros(3, columns, dtype=accumulation_dtype(dtype)) if probed else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(x, residual, weight, bias, probe)
        total = x + residual
        same(list(got), [total, theirs(total, weight, bias)])
    assert [one.dtype for one in got] == [dtype, dtype]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_rule_for_cudas_autocast_is_that_of_the_composition(
    norms: Norms, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Torch adds in the promoted dtype there and normalises in float32; our rule runs anywhere."""
    x, residual = (part.to(d) for part, d in zip(inputs(torch.float32), dtypes, strict=False))
    total = x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    weight, bias = (part.to(wide.dtype) for part in inputs(torch.float32)[2:])
    rest: tuple[Any, ...] = (weight, bias, None, 1e-5)
    rule: Any = add_layer_norm.OPERATOR.autocast
    if norms is NORMS["rms"]:
        rest = (weight, None, torch.finfo(wide.dtype).eps, "none")
        rule = add_rms_norm.OPERATOR.autocast
    got = rule(x, residual, [16], *rest)
    same(list(got[:2]), [total, norms[2](wide, weight, bias)])


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(got, want, strict=True):
        scale = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(
            mine.float(), theirs.float(), rtol=tolerance, atol=tolerance * scale
        )
        assert mine.dtype == theirs.dtype


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(2, 9, 40), (7, 1, 127), (9, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operator = add_layer_norm.OPERATOR
    torch.manual_seed(0)
    x, residual, dy, dtotal = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    arguments = (x, residual, shape[-1:], weight, bias, torch.zeros(shape[0], 2), 1e-5)
    want = operator.eager_forward(*arguments)
    close(operator.cuda_forward(*arguments), want, dtype)
    total, _, mean, rstd = want
    for reached in (dtotal, None):
        back = (reached, dy, total, shape[-1:], mean, rstd, weight, bias, [True] * 3, True)
        close(operator.cuda_backward(*back), operator.eager_backward(*back), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("casting", [*rms_norm.CASTINGS, rms_norm.OFFSET])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_rms_norm(casting: str, dtype: torch.dtype) -> None:
    operator = add_rms_norm.OPERATOR
    torch.manual_seed(0)
    x, residual, dy, dtotal = (torch.randn(3, 5, 33).to(dtype) for _ in range(4))
    weight = torch.randn(33).to(dtype)
    arguments = (x, residual, [33], weight, None, 1e-5, casting)
    want = operator.eager_forward(*arguments)
    close(operator.cuda_forward(*arguments), want, dtype)
    for with_norms in (True, False):
        back = (dtotal, dy, want[0], [33], want[2], weight, casting, [True] * 2, with_norms)
        close(operator.cuda_backward(*back), operator.eager_backward(*back), dtype)
