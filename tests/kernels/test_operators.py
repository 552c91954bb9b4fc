"""What every operator must do, whatever it computes."""

import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import trainc.kernels.operators  # noqa: F401


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in flat(part)] if isinstance(value, (list, tuple)) else []


def require(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def differentiate(results: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> list[Tensor]:
    """Gradients of a fixed combination of the results, the probe's extra numbers among them."""
    torch.manual_seed(11)
    totals = [(r * torch.randn(r.shape, dtype=r.dtype)).sum() for r in results]
    return list(torch.autograd.grad(totals, require(arguments), allow_unused=True))


def close(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    )


@pytest.mark.parametrize(
    ("dtype", "examples"), [(torch.float32, 0), (torch.float32, 3), (torch.bfloat16, 3)], ids=str
)
def test_opcheck(case: Any, dtype: torch.dtype, examples: int) -> None:
    if examples == 0 and "cross_entropy" in case.operator:
        # A mean over nothing is nan, which opcheck does not find equal to itself.
        assert all(one.isnan() for one in case.call(*case.arguments(dtype, examples)))
        return
    torch.library.opcheck(case.op, case.arguments(dtype, examples), rtol=2e-2, atol=2e-2)


def test_results_and_gradients_agree_with_the_definition(smooth: Any) -> None:
    arguments = smooth.arguments(torch.float64)
    got, want = smooth.call(*arguments), smooth.reference(*arguments)
    # The noise itself is float32.
    close(got, want, 1e-6 if "nois" in smooth.name else 1e-10)
    for index, (left, right) in enumerate(
        zip(differentiate(got, arguments), differentiate(want, arguments), strict=True)
    ):
        if require(arguments)[index] is not (smooth.probe and arguments[smooth.probe]):
            close(left, right, 1e-6 if "nois" in smooth.name else 1e-10)


def test_gradients_agree_with_finite_differences(smooth: Any) -> None:
    arguments = list(smooth.arguments(torch.float64, 2))
    if smooth.probe is not None:
        arguments[smooth.probe] = None  # its gradient is a statistic, not a derivative
    assert torch.autograd.gradcheck(smooth.call, arguments)


def test_non_contiguous_arguments_change_nothing(smooth: Any) -> None:
    arguments = smooth.arguments(torch.float64)
    strided = tuple(
        torch.stack([a, -a], -1)[..., 0].detach().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dim()
        else a
        for a in arguments
    )
    assert not all(a.is_contiguous() for a in require(strided))
    got, want = smooth.call(*strided), smooth.call(*arguments)
    close(got, want)
    close(differentiate(got, strided), differentiate(want, arguments))


def test_permuted_input_and_gradient(smooth: Any) -> None:
    arguments = smooth.arguments(torch.float64)
    x = arguments[0]
    moved = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    results = smooth.call(moved, *arguments[1:])
    expected = smooth.call(*arguments)
    close(results, expected)
    for result, want in zip(results, expected, strict=True):
        if result.dim() < 2:
            continue
        dy = torch.randn(result.shape[::-1], dtype=result.dtype).permute(
            *reversed(range(result.dim()))
        )
        got = torch.autograd.grad(result, moved, dy, retain_graph=True)
        close(got, torch.autograd.grad(want, x, dy.contiguous(), retain_graph=True))


def test_compiles_to_one_graph_with_the_same_results(case: Any) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    mine, theirs = (detached(case.arguments()) for _ in range(2))
    got, want = flat(compiled(*mine)), flat(case.op(*theirs))
    close(got, want, 0)
    close(flat(mine), flat(theirs), 0)  # operators that write in place
    if case.reference:
        got, want = ([r for r in rs if r.requires_grad] for rs in (got, want))
        close(differentiate(tuple(got), mine), differentiate(tuple(want), theirs), 0)


def test_a_new_batch_size_does_not_recompile(smooth: Any) -> None:
    torch._dynamo.reset()
    counter: Any = torch._dynamo.testing.CompileCounterWithBackend
    frames = counter("aot_eager")
    operator, counts = smooth.op, []
    compiled = torch.compile(lambda *a: operator(*a), fullgraph=True, dynamic=True, backend=frames)
    for examples in (11, 13, 17):  # no other extent: equal extents share a symbol
        arguments = smooth.arguments(torch.float32, examples)
        close(flat(compiled(*arguments)), flat(operator(*arguments)), 1e-6)
        counts.append(frames.frame_count)
    assert counts == counts[:1] * 3


def test_export_keeps_the_operator(smooth: Any) -> None:
    arguments = smooth.arguments()
    tensors = [index for index, a in enumerate(arguments) if isinstance(a, Tensor)]

    class Model(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            full = list(arguments)
            for index, value in zip(tensors, values, strict=True):
                full[index] = value
            return smooth.op(*full)

    program = torch.export.export(Model(), tuple(arguments[i] for i in tensors), strict=False)
    assert smooth.op in [node.target for node in program.graph.nodes]
    got = program.module()(*(arguments[i] for i in tensors))
    close(flat(got), flat(smooth.op(*arguments)), 0)


def test_make_fx_shows_forward_and_backward_as_operators(smooth: Any) -> None:
    arguments = smooth.arguments()

    def step(*values: Any) -> list[Tensor]:
        results = smooth.call(*values)
        return list(torch.autograd.grad([r.sum() for r in results], require(values)))

    graph = make_fx(step, tracing_mode="fake")(*arguments)
    targets = [node.target for node in graph.graph.nodes]
    assert smooth.op in targets
    assert getattr(torch.ops.trainc, smooth.backward).default in targets


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_tensors_have_the_real_shapes_and_dtypes(
    case: Any, dtype: torch.dtype, device: str
) -> None:
    arguments = case.arguments(dtype)

    def imagine(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=device)
        return [imagine(v) for v in value] if isinstance(value, list) else value

    with FakeTensorMode():
        imagined = flat(case.op(*(imagine(a) for a in arguments)))
    real = flat(case.op(*detached(arguments)))
    assert [(r.shape, r.dtype) for r in imagined] == [(r.shape, r.dtype) for r in real]
    assert {r.device.type for r in imagined} <= {device}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(smooth: Any, reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        arguments = smooth.arguments()
        results = (
            checkpoint(smooth.call, *arguments, use_reentrant=reentrant)
            if recompute
            else smooth.call(*arguments)
        )
        torch.autograd.backward([r.sum() for r in results])
        gradients.append([a.grad for a in require(arguments)])
    close(gradients[1], gradients[0], 0)


def test_second_derivatives_are_refused_not_wrong(smooth: Any) -> None:
    if smooth.backward == smooth.operator or smooth.operator == "noisy_add":
        # Linear in its input: its backward differentiates as it should.
        assert torch.autograd.gradgradcheck(smooth.call, smooth.arguments(torch.float64, 2))
        return
    arguments = smooth.arguments()
    results = smooth.call(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = torch.autograd.grad(
            [r.square().sum() for r in results], arguments[0], create_graph=True
        )
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.autograd.grad(first[0].sum(), arguments[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functional_transforms_find_the_same_gradients(smooth: Any) -> None:
    first, *rest = smooth.arguments(torch.float64)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in rest]

    def total(x: Tensor) -> Tensor:
        return torch.stack([r.square().sum() for r in smooth.call(x, *plain)]).sum()

    (want,) = torch.autograd.grad(total(first), first)
    close(torch.func.grad(total)(first.detach()), want)
    both = torch.stack([first.detach(), first.detach()])
    close(torch.func.vmap(torch.func.grad(total))(both), torch.stack([want, want]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused_not_zero(smooth: Any) -> None:
    first, *rest = smooth.arguments()
    plain = [a.detach() if isinstance(a, Tensor) else a for a in rest]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(first.detach(), first.detach())
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            smooth.call(dual, *plain)


def test_what_has_no_gradient_is_refused_where_one_would_be_wanted(update: Any) -> None:
    arguments = update.arguments()
    written, *_ = tensors = flat(arguments)
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    with pytest.raises(RuntimeError, match=r"no gradient: call it under torch\.no_grad"):
        update.op(*arguments)
    version = written._version
    with torch.no_grad():
        update.op(*arguments)
    assert (written._version > version) == update.operator.endswith("_")
