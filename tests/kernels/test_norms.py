"""LayerNorm and RMSNorm: bit equality with torch, per-example norms, stored numbers, precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.compiler.image_models import import_library
from trainc.kernels.library import contracts
from trainc.kernels.norm import layer_norm as ln
from trainc.kernels.norm import rms_norm as rms
from trainc.kernels.norm import rows
from trainc.kernels.norm.add_rms_norm import add_rms_norm

Sizes = tuple[int, ...]


def inputs(x_shape: Sizes, tail: Sizes, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and dy, the first three requiring grad."""
    torch.manual_seed(seed)
    x, dy = torch.randn(x_shape).mul(2).add(0.5).to(dtype), torch.randn(x_shape).to(dtype)
    weight, bias = torch.randn(tail).to(dtype), torch.randn(tail).to(dtype)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy]


def run(kind: str, probed: bool, parts: list[Tensor], casting: str = "none") -> dict[str, Tensor]:
    """One forward and backward of our norm: y, dx, dweight, dbias, norms."""
    x, weight, bias = (p.detach().requires_grad_() for p in parts[:3])
    wide = contracts.accumulation_dtype(x.dtype)
    columns = 2 if kind == "layer_norm" else 1
    probe = torch.zeros(x.shape[0], columns, dtype=wide, requires_grad=True) if probed else None
    if kind == "layer_norm":
        y = ln.layer_norm(x, weight.shape, weight, bias, probe, 1e-5)
    else:
        y = rms.rms_norm(x, weight.shape, weight, probe, 1e-5, casting)
    y.backward(parts[3].to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}
    found["norms"] = None if probe is None else probe.grad
    return {name: value for name, value in found.items() if value is not None}


def torch_run(kind: str, parts: list[Tensor]) -> dict[str, Tensor]:
    """The same by torch's own function, without norms."""
    x, weight, bias = (p.detach().requires_grad_() for p in parts[:3])
    if kind == "layer_norm":
        y = functional.layer_norm(x, weight.shape, weight, bias, 1e-5)
    else:
        y = functional.rms_norm(x, weight.shape, weight, 1e-5)
    y.backward(parts[3])
    found = {"y": y.detach(), "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}
    return {name: value for name, value in found.items() if value is not None}


@pytest.fixture(params=["layer_norm", "rms_norm"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


SHAPES = [((4, 5, 16), (16,)), ((6, 9), (9,)), ((2, 3, 4, 5), (4, 5)), ((2, 300, 256), (256,))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_forward_is_torch_bit_for_bit(
    kind: str, dtype: torch.dtype, shape: tuple[Sizes, Sizes]
) -> None:
    parts = inputs(*shape, dtype)
    want = torch_run(kind, parts)["y"]
    for probed in (False, True):
        assert torch.equal(run(kind, probed, parts)["y"], want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layer_norm_without_probe_is_torch_bit_for_bit(
    dtype: torch.dtype, shape: tuple[Sizes, Sizes]
) -> None:
    parts = inputs(*shape, dtype)
    got, want = run("layer_norm", False, parts), torch_run("layer_norm", parts)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, None], ids=str)
def test_statistics_have_the_dtype_the_fake_kernel_promises(weight: torch.dtype | None) -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    w = None if weight is None else torch.randn(8, dtype=weight)
    for probe in (None, torch.zeros(2, 2)):
        arguments = (x, [8], w, None, probe, 1e-5)
        torch.library.opcheck(torch.ops.trainc.layer_norm.default, arguments)


def test_measuring_does_not_change_the_input_gradient(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small inputs without a probe are torch's composition, another formula than the operator's.
    monkeypatch.setattr(rms, "composition_is_cheaper", lambda *_: False)
    for shape in SHAPES:
        parts = inputs(*shape, torch.float32)
        assert torch.equal(run(kind, True, parts)["dx"], run(kind, False, parts)["dx"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_small_rms_norms_without_probe_are_torch_bit_for_bit(dtype: torch.dtype) -> None:
    parts = inputs((4, 5, 16), (16,), dtype)
    got, want = run("rms_norm", False, parts), torch_run("rms_norm", parts)
    assert all(torch.equal(got[name], want[name]) for name in want if name != "dbias")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_to_the_input_gradient_agree(
    shape: tuple[Sizes, Sizes], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _, dy = (p.detach() for p in inputs(*shape, torch.float64))
    tail, given = weight.shape, weight if weighted else None
    _, rstd = rms.eager_forward(x, tail, given, None, 1e-5, "none")
    want = rms.reference(x, tail, given, dy, 1e-5)["dx"]
    for small in (0, x.numel()):
        monkeypatch.setattr(rms, "SMALL", small)
        dx, *_ = rms.eager_backward(
            dy, x, tail, rstd, given, "none", [True, False], with_norms=False
        )
        torch.testing.assert_close(dx, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_are_those_of_one_backward_per_example(kind: str, shape: tuple[Sizes, Sizes]) -> None:
    parts = inputs(*shape, torch.float64)
    got, rows = run(kind, True, parts), []
    for example in range(parts[0].shape[0]):
        one = [parts[0][example : example + 1], *parts[1:3], parts[3][example : example + 1]]
        alone = torch_run(kind, one)
        rows.append([alone[n].square().sum() for n in ("dweight", "dbias") if n in alone])
    torch.testing.assert_close(got["norms"], torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 3, 127])
@pytest.mark.parametrize("width", [1, 3, 127])
def test_odd_sizes(kind: str, rows: int, width: int) -> None:
    for examples in (1, 3, 127):
        if examples * rows * width > 1 << 17:
            continue
        parts = inputs((examples, rows, width), (width,), torch.float64)
        x, weight, bias, dy = (p.detach() for p in parts)
        got = run(kind, True, parts)
        if kind == "layer_norm":
            want = ln.reference(x, (width,), weight, bias, dy, 1e-5)
        else:
            want = rms.reference(x, (width,), weight, dy, 1e-5)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8)


def test_both_regimes_give_the_same_sums(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = inputs((3, 17, 33), (33,), torch.float64)
    several = run(kind, True, parts)
    monkeypatch.setattr(rows, "FUSED_EXAMPLE_ELEMENTS", 0)
    for name, value in run(kind, True, parts).items():
        torch.testing.assert_close(value, several[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [((4, 30, 127), (127,)), ((2, 300, 256), (256,))], ids=str)
def test_low_precision_is_no_worse_than_torch(
    kind: str, dtype: torch.dtype, shape: tuple[Sizes, Sizes]
) -> None:
    parts = inputs(*shape, dtype)
    exact = run(kind, True, [p.detach().double() for p in parts])
    torchs = torch_run(kind, parts)
    ours = run(kind, True, parts)
    for name, low in torchs.items():
        allowed = 2 * (low.double() - exact[name]).abs().max() + 1e-3
        assert (ours[name].double() - exact[name]).abs().max() <= allowed, name
        assert ours[name].dtype == dtype
    assert ours["norms"].dtype == torch.float32
    torch.testing.assert_close(ours["norms"].double(), exact["norms"], rtol=1e-4, atol=0)


def test_llama_casting_is_the_transformers_module() -> None:
    def llama(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * wide.to(x.dtype)

    for dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, weight, _, dy = inputs((4, 6, 32), (32,), dtype)
        weight = weight.detach().to(weight_dtype).requires_grad_()
        want = llama(x, weight)
        got = rms.rms_norm(x, (32,), weight, None, 1e-5, "llama")
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
        for left, right in zip(
            torch.autograd.grad(got, (x, weight), dy.to(got.dtype)),
            torch.autograd.grad(want, (x, weight), dy.to(got.dtype)),
            strict=True,
        ):
            torch.testing.assert_close(left, right, rtol=2e-2, atol=6e-2)


def test_castings_differ_only_in_low_precision() -> None:
    for dtype, equal in ((torch.float32, True), (torch.bfloat16, False)):
        parts = inputs((4, 6, 32), (32,), dtype)
        pair = [run("rms_norm", True, parts, casting)["y"] for casting in rms.CASTINGS]
        assert torch.equal(*pair) == equal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_default_eps_is_that_of_the_torch_module(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8).mul(1e-3).to(dtype)
    module = torch.nn.RMSNorm(8, dtype=dtype)
    assert torch.equal(rms.rms_norm(x, (8,), module.weight), module(x))


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_weight_and_bias(affine: tuple[bool, bool], dtype: torch.dtype) -> None:
    x, weight, bias, dy = inputs((3, 5, 8), (8,), dtype)
    given = [p if there else None for p, there in zip((weight, bias), affine, strict=True)]
    probe = torch.zeros(3, 2, requires_grad=True)
    y = ln.layer_norm(x, (8,), given[0], given[1], probe)
    y.backward(dy)
    detached = [p if p is None else p.detach().float() for p in given]
    want = ln.reference(x.detach().float(), (8,), detached[0], detached[1], dy.float(), 1e-5)
    assert torch.equal(y, functional.layer_norm(x, (8,), given[0], given[1]))
    assert probe.grad is not None
    torch.testing.assert_close(probe.grad, want["norms"], rtol=1e-4, atol=1e-6)
    assert [bool(probe.grad[:, c].any()) for c in range(2)] == list(affine)


def test_gradients_are_made_only_where_wanted(kind: str) -> None:
    x, weight, bias, dy = inputs((3, 5, 8), (8,), torch.float32)
    for frozen in ((x,), (weight, bias), (x, weight, bias)):
        for parameter in (x, weight, bias):
            parameter.grad = None
            parameter.requires_grad_(all(parameter is not f for f in frozen))
        probe = torch.zeros(3, 2 if kind == "layer_norm" else 1, requires_grad=True)
        if kind == "layer_norm":
            ln.layer_norm(x, (8,), weight, bias, probe).backward(dy)
        else:
            rms.rms_norm(x, (8,), weight, probe).backward(dy)
        assert probe.grad is not None
        assert probe.grad.all()
        assert (x.grad is None) == (not x.requires_grad)
        assert (weight.grad is None) == (not weight.requires_grad)


def test_probes_accumulate_over_micro_batches_in_gradient_units() -> None:
    x, weight, bias, dy = inputs((4, 5, 8), (8,), torch.float64)
    probe = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        ln.layer_norm(x, (8,), weight, bias, probe).backward(dy / 3)
    once = run("layer_norm", True, [x, weight, bias, dy])["norms"]
    torch.testing.assert_close(probe.grad, 2 * once / 9)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_what_it_does_to_torch(kind: str, x_dtype: torch.dtype) -> None:
    x, weight, bias, _ = inputs((3, 5, 8), (8,), torch.float32)
    x = x.detach().to(x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if kind == "layer_norm":
            pair = (
                ln.layer_norm(x, (8,), weight, bias, torch.zeros(3, 2)),
                functional.layer_norm(x, (8,), weight, bias),
            )
        else:
            pair = (
                rms.rms_norm(x, (8,), weight.to(x_dtype)),
                functional.rms_norm(x, (8,), weight.to(x_dtype)),
            )
    assert torch.equal(*pair)
    assert pair[0].dtype == pair[1].dtype


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rule_for_cudas_autocast_is_torchs(x_dtype: torch.dtype) -> None:
    """Torch's rule there is float32; ours runs on any device."""
    x, weight, *_ = (p.detach() for p in inputs((3, 5, 8), (8,), x_dtype))
    wide = x if x_dtype == torch.float64 else x.float()
    got = rms.OPERATOR.autocast(x, (8,), weight, None, 1e-5, "none")[0]
    assert torch.equal(got, functional.rms_norm(wide, (8,), weight.to(wide.dtype), 1e-5))
    for casting in ("llama", rms.OFFSET):  # spelled out by modules, whose casts autocast keeps
        y = rms.OPERATOR.autocast(x, (8,), weight, None, 1e-5, casting)[0]
        assert torch.equal(y, rms.rms_norm(x, (8,), weight, None, 1e-5, casting))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_cudas_autocast_reaches_our_rule(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"trainc::{name}", "AutocastCUDA")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((3, 8), (4,), None, None), "must end in normalized_shape"),
        (((3, 8), (8,), (4,), None), "weight and bias"),
        (((3, 8), (8,), None, (3, 1)), "probe must be"),
        (((8,), (8,), None, (8, 2)), "example dim"),
    ],
)
def test_wrong_shapes_are_named(arguments: tuple[Any, ...], message: str) -> None:
    x, tail, weight, probe = arguments
    made = [None if shape is None else torch.zeros(shape) for shape in (weight, probe)]
    with pytest.raises(RuntimeError, match=message):
        ln.layer_norm(torch.zeros(x), tail, made[0], None, made[1])


def test_unknown_casting_is_refused() -> None:
    with pytest.raises(RuntimeError, match="casting"):
        rms.rms_norm(torch.zeros(2, 3), (3,), casting="rounded")


def gemma(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula of transformers' GemmaRMSNorm; float64 stays float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.to(wide.dtype))).type_as(x)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gemma_casting_is_the_transformers_formula(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, added: bool
) -> None:
    x, weight, _, dy = inputs((4, 6, 32), (32,), dtype)
    weight = weight.detach().to(weight_dtype or dtype).requires_grad_()
    wide = contracts.accumulation_dtype(dtype)
    probe = torch.zeros(4, 1, dtype=wide, requires_grad=True)
    other = x.detach().flip(0)
    if added:
        _, got = add_rms_norm(x, other, (32,), weight, probe, 1e-5, rms.OFFSET)
    else:
        got = rms.rms_norm(x, (32,), weight, probe, 1e-5, rms.OFFSET)
    source = x + other if added else x
    want = gemma(source, weight)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype == dtype
    low = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    ours = torch.autograd.grad(got, (x, weight, probe), dy)
    theirs = torch.autograd.grad(want, (x, weight), dy)
    for left, right in zip(ours, theirs, strict=False):
        torch.testing.assert_close(left, right, rtol=low, atol=low)
    # Norms by definition, in float64: the factor is one more than the weight.
    exact = rms.reference(
        source.detach().double(), (32,), 1 + weight.detach().double(), dy.double(), 1e-5
    )
    torch.testing.assert_close(ours[2].double(), exact["norms"], rtol=1e-4, atol=0)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(got.double(), exact["y"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[0].double(), exact["dx"], rtol=1e-5, atol=1e-5)


@pytest.mark.models
def test_gemma_casting_is_the_transformers_module() -> None:
    modeling = import_library("transformers.models.gemma.modeling_gemma")
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, *_ = (p.detach() for p in inputs((4, 6, 32), (32,), dtype))
        module = modeling.GemmaRMSNorm(32, eps=1e-5).to(dtype)
        module.weight.data.copy_(weight)
        assert torch.equal(rms.rms_norm(x, (32,), weight, None, 1e-5, rms.OFFSET), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("examples", [0, 3])
def test_gemma_casting_in_the_operators(examples: int, dtype: torch.dtype) -> None:
    x, weight, *_ = inputs((examples, 2, 8), (8,), dtype)
    probe = torch.zeros(examples, 1, requires_grad=True)
    rest = ([8], weight, probe, 1e-5, rms.OFFSET)
    residual = x.detach().clone().requires_grad_()
    for operator, given in (("rms_norm", (x,)), ("add_rms_norm", (x, residual))):
        overload = getattr(torch.ops.trainc, operator).default
        torch.library.opcheck(overload, (*given, *rest), rtol=2e-2, atol=2e-2)


def test_without_a_weight_gemma_scales_nothing() -> None:
    x = torch.randn(3, 4, 8)
    want = functional.rms_norm(x, (8,), None, 1e-5)
    assert torch.equal(rms.rms_norm(x, (8,), None, None, 1e-5, rms.OFFSET), want)


def test_stored_layer_norm(stored: Callable[[str], Any], lcg: Callable[..., Tensor]) -> None:
    case = stored("noise_scale")["cases"]["layernorm_3d"]
    parts = [lcg(case["inputs"][name]) for name in ("x", "weight", "bias", "dy")]
    compare(run("layer_norm", True, parts), case["outputs"], ("weight", "bias"))


def test_stored_rms_norm(stored: Callable[[str], Any], lcg: Callable[..., Tensor]) -> None:
    case = stored("noise_scale")["cases"]["rmsnorm_2d"]
    x, weight, dy = (lcg(case["inputs"][name]) for name in ("x", "weight", "dy"))
    compare(run("rms_norm", True, [x, weight, weight, dy]), case["outputs"], ("weight",))


def compare(got: dict[str, Tensor], want: dict[str, Any], parameters: tuple[str, ...]) -> None:
    """Per-example norms, gradients and dx against the stored float64 numbers."""

    def same(left: Tensor, right: Any) -> None:
        expected = torch.tensor(right, dtype=torch.float64)
        torch.testing.assert_close(left, expected, rtol=1e-10, atol=1e-10)

    for column, name in enumerate(parameters):
        same(got["norms"][:, column], want[f"pe_{name}"])
        same(got["norms"][:, column].sum(), want[f"S1_{name}"])
        same(got[f"d{name}"], want[f"grad_{name}"])
    same(got["dx"].sum(), want["dx_sum"])
    same(got["dx"].square().sum(), want["dx_sqnorm"])
    same(got["dx"].reshape(-1, got["dx"].shape[-1])[0], want["dx_first_row"])
