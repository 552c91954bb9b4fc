"""The contracts at their edges: strides, empty tensors, meta tensors, autocast, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import trainc.functional as operators
from trainc.kernels.library import contracts

randn, zeros = torch.randn, torch.zeros
HALF = torch.tensor(0.5)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*shape, dtype=dtype, requires_grad=True)


def probe(examples: int, columns: int) -> Tensor:
    return zeros(examples, columns, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("casting", ["none", "llama", "gemma"])
@pytest.mark.parametrize("examples", [3, 3000])  # by definition, and by ATen's kernel
def test_weights_of_any_strides(casting: str, examples: int) -> None:
    torch.manual_seed(0)
    x, weight = leaf(examples, 2, 4, 6), randn(6, 4, dtype=torch.float64).t()
    found = []
    for one in (weight, weight.contiguous()):
        leaves = (x, one.detach().requires_grad_(), probe(examples, 1))
        y = operators.rms_norm(x, (4, 6), *leaves[1:], casting=casting)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_ghost_batch_norm_with_a_strided_weight(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    x, dy = randn(6, 3).to(dtype).requires_grad_(), randn(6, 3).to(dtype)
    mean, var = (None, None) if training else (randn(3).to(dtype), torch.rand(3).to(dtype) + 1)
    weight, found = randn(3, 2).to(dtype)[:, 0], []
    for one in (weight, weight.contiguous()):
        y = operators.ghost_batch_norm(x, mean, var, one, one, 3, training)
        found.append((y, *torch.autograd.grad(y, x, dy)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_ids_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    ids, weight = torch.randint(0, 6, (5, 3)).t(), leaf(6, 3)
    found = []
    for one in (ids, ids.contiguous()):
        at = probe(3, 1)
        y = operators.embedding(one, weight, None, at)
        found.append(torch.autograd.grad(y.square().sum(), (weight, at)))
    torch.testing.assert_close(*found)


def test_a_tied_weight_with_one_id_an_example() -> None:
    torch.manual_seed(0)
    ids, x, weight = torch.tensor([1, 2, 2, 4]), leaf(4, 3), leaf(6, 3)
    at, behind = probe(4, 1), probe(4, 1)
    y, rows = operators.tied_embedding(weight, ids, None, at)
    logits = operators.tied_linear(x, weight, None, behind, rows, ids)
    shares = torch.autograd.grad(y.square().sum() + logits.square().sum(), (at, behind))
    for example in range(4):
        one = slice(example, example + 1)
        plain = functional.embedding(ids[one], weight).square().sum()
        plain = plain + functional.linear(x[one], weight).square().sum()
        (whole,) = torch.autograd.grad(plain, weight)
        torch.testing.assert_close(sum(s[example, 0] for s in shares), whole.square().sum())


def test_no_examples_and_no_channels() -> None:
    bias = leaf(4)
    y = operators.group_norm(leaf(0, 4, 3), 2, None, bias, probe(0, 2))
    assert torch.autograd.grad(y.sum(), bias)[0].tolist() == [0.0] * 4
    key = torch.tensor(3)
    assert operators.multiplicative_noise(randn(4, 3, 0), HALF, key, 1, 2).shape == (4, 3, 0)


LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Any, ...]]]] = {
    "linear": (operators.linear, lambda make: (make(4, 5), make(6, 5), None, zeros(4, 1))),
    "convolution": (
        operators.convolution,
        lambda make: (make(4, 5, 7), make(6, 5, 3), None, zeros(4, 1)),
    ),
    "tied_linear": (
        operators.tied_linear,
        lambda make: (make(4, 5), make(6, 5), None, zeros(4, 1), zeros(4, 5), torch.ones(4).long()),
    ),
    "linear_cross_entropy_consistency": (
        operators.linear_cross_entropy_consistency,
        lambda make: (make(4, 5), make(6, 5), None, torch.tensor([0, 1]), HALF),
    ),
    "linear_cross_entropy": (
        operators.linear_cross_entropy,
        lambda make: (make(2, 5), make(6, 5), None, torch.tensor([0, 1])),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_meta_tensors_are_imagined(name: str) -> None:
    function, build = LAYERS[name]
    arguments = build(randn)
    imagined = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    got, want = function(*imagined), function(*arguments)
    for one, other in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True
    ):
        assert (one.device.type, one.shape, one.dtype) == ("meta", other.shape, other.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_leaves_float64_alone(name: str) -> None:
    function, build = LAYERS[name]
    torch.manual_seed(0)
    arguments = [
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in build(randn)
    ]
    want = function(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(*arguments), want, rtol=0, atol=0)


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_masked_classes_and_broken_ignored_rows_leave_the_cross_entropy_alone(
    distance: str,
) -> None:
    torch.manual_seed(0)
    logits, targets = leaf(6, 5), torch.tensor([0, 1, -100])
    with torch.no_grad():
        logits[:, 4] = -math.inf
        logits[2] = math.nan
    cross_entropy = operators.cross_entropy_consistency(logits, targets, HALF.double(), distance)[1]
    plain = functional.cross_entropy(logits[:3], targets)
    torch.testing.assert_close(cross_entropy, plain)
    got, want = (torch.autograd.grad(one, logits)[0] for one in (cross_entropy, plain))
    want[2] = 0  # torch multiplies what an ignored row holds by nothing
    torch.testing.assert_close(got, want)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # of what a mask leaves out
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of a row of nan
@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_by_triton_as_well(distance: str) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    torch.manual_seed(0)
    logits, targets = randn(6, 5), torch.tensor([0, 1, -100])
    logits[:, 4], logits[2] = -math.inf, math.nan
    options: Any = (distance, -100, 0.0)
    *_, kept = found = triton_loss.forward(logits, targets, HALF, *options)
    scales = (torch.tensor(1.0), torch.tensor(0.0))
    gradient = triton_loss.backward(logits, targets, kept, *scales, *options)
    plain = logits.clone().requires_grad_()
    cross_entropy = functional.cross_entropy(plain[:3], targets)
    torch.testing.assert_close(found[1], cross_entropy.detach())
    want = torch.autograd.grad(cross_entropy, plain)[0]
    want[2] = 0
    torch.testing.assert_close(gradient, want)
    beyond = triton_loss.forward(randn(4, 5), torch.tensor([0, 7]), HALF, *options)
    assert beyond[1].isnan()


@pytest.mark.interpreter
def test_an_index_outside_the_weight_breaks_its_state_alone() -> None:
    from trainc.kernels.parameter import triton_sparse_adamw

    weight, grad, mean, square = zeros(4, 4), torch.ones(4, 4), zeros(3), zeros(3)
    scalars = [torch.tensor(value) for value in (0.1, 0.0, 1)]
    lists = [[one] for one in (weight, grad, mean, square, torch.tensor([1, 16, -1]))]
    triton_sparse_adamw.sparse_adamw_(*lists, *scalars, 0.9, 0.999, 1e-8, False, 1, [])
    assert weight.flatten().nonzero().flatten().tolist() == [1]
    assert mean.isnan().tolist() == [False, True, True]


def adamw(**changed: Any) -> None:
    given: dict[str, Any] = {
        "weight": zeros(4, 4), "grad": zeros(2), "exp_avg": zeros(2), "exp_avg_sq": zeros(2),
        "index": torch.tensor([1, 2]), "lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "weight_decay": 0.0, "step": 1, "gathered": True, "master": zeros(2),
    }  # fmt: skip
    operators.sparse_adamw_(**(given | changed))


KEY = torch.tensor(3)
LOGITS, TARGETS = randn(4, 5), torch.tensor([0, 1])
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "whole numbers": (
        lambda: operators.rms_norm(torch.ones(2, 3).int(), (3,), None, zeros(2, 1)),
        "floating-point tensor, not torch.int32",
    ),
    "no dims": (
        lambda: operators.rms_norm(randn(2, 3), (), None, zeros(2, 1)),
        "at least one dim",
    ),
    "group norm of whole numbers": (
        lambda: operators.group_norm(torch.ones(2, 4).int(), 2, probe=zeros(2, 2)),
        "floating-point tensor, not torch.int32",
    ),
    "a weight's shape": (
        lambda: operators.rms_norm(randn(2, 3), (3,), randn(2), zeros(2, 1)),
        r"must have the shape \(3,\), not \(2,\)",
    ),
    "mixed dtypes": (
        lambda: operators.linear(randn(2, 3), randn(4, 3).bfloat16(), None, zeros(2, 1)),
        "must have the dtype of x, torch.float32",
    ),
    "an algorithm": (
        lambda: operators.linear(randn(2, 3), randn(4, 3), algorithm="foo"),
        "not 'foo'",
    ),
    "a bias of another dtype": (
        lambda: operators.linear_cross_entropy_consistency(
            LOGITS, randn(6, 5), randn(6).double(), TARGETS, HALF
        ),
        "torch.float64",
    ),
    "smoothing": (
        lambda: operators.cross_entropy_consistency(LOGITS, TARGETS, HALF, label_smoothing=2.0),
        r"in \[0, 1\], not 2.0",
    ),
    "no class": (
        lambda: operators.cross_entropy_consistency(randn(4, 0), TARGETS, HALF),
        "have no class",
    ),
    "many views": (
        lambda: operators.multiplicative_noise(randn(257, 2), HALF, KEY, 1, 257),
        "views must be 1 to 256, not 257",
    ),
    "no view": (
        lambda: operators.multiplicative_noise(randn(4, 2), HALF, KEY, 1, 0),
        "views must be 1 to 256, not 0",
    ),
    "a site": (
        lambda: operators.multiplicative_noise(randn(4, 2), HALF, KEY, 1 << 32, 2),
        r"in \[0, 2\^32\)",
    ),
    "half an example": (
        lambda: operators.multiplicative_noise(
            randn(4, 2), HALF, KEY, 1, 2, first_example=torch.tensor(1.5)
        ),
        "0-d integer tensor",
    ),
    "running statistics": (
        lambda: operators.ghost_batch_norm(randn(4, 3), zeros(2), zeros(2), training=True),
        r"running statistics must have the shape \(3,\), not \(2,\)",
    ),
    "fewer deltas": (lambda: operators.multi_norm([randn(2)], []), "0 deltas and 1 tensors"),
    "complex": (lambda: torch.ops.trainc.multi_norm([randn(2) * 1j], []), "complex"),
    "a step": (lambda: adamw(step=0), "must count from 1, and is 0"),
    "an index below": (
        lambda: adamw(index=torch.tensor([1, -1])),
        r"must be in \[0, 16\), and -1 is not",
    ),
    "an index above": (
        lambda: adamw(index=torch.tensor([1, 16])),
        r"must be in \[0, 16\), and 16 is not",
    ),
    "two dtypes of state": (
        lambda: adamw(exp_avg_sq=zeros(2).double()),
        "one floating-point dtype",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_outside_the_contract_is_refused_by_name(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_nothing_is_written_before_an_index_is_refused() -> None:
    master, state = torch.ones(2), torch.ones(2)
    with pytest.raises(RuntimeError, match="index must be in"):
        adamw(index=torch.tensor([1, 99]), master=master, exp_avg=state)
    assert master.tolist() == state.tolist() == [1.0, 1.0]


def test_sums_of_two_tensors_are_compiled_without_a_probe() -> None:
    for function in (operators.add_layer_norm, operators.add_rms_norm):
        compiled: Any = torch.compile(function, fullgraph=True, backend="eager")
        x = randn(2, 5)
        torch.testing.assert_close(compiled(x, x, (5,)), function(x, x, (5,)))


NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x, r, w, probe: operators.layer_norm(x, (5,), w, None, probe),
    "rms_norm": lambda x, r, w, probe: operators.rms_norm(x, (5,), w, probe),
    "rms_norm, llama": lambda x, r, w, probe: operators.rms_norm(x, (5,), w, probe, None, "llama"),
    "rms_norm, gemma": lambda x, r, w, probe: operators.rms_norm(x, (5,), w, probe, None, "gemma"),
    "add_layer_norm": lambda x, r, w, probe: operators.add_layer_norm(x, r, (5,), w, None, probe),
    "add_rms_norm": lambda x, r, w, probe: operators.add_rms_norm(x, r, (5,), w, probe),
    "add_rms_norm, llama": lambda x, r, w, probe: operators.add_rms_norm(
        x, r, (5,), w, probe, None, "llama"
    ),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_without_a_probe_is_compiled_in_torchs_operations(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CUDA, which is here what a CPU is taken for; with a probe there is the operator."""
    for module in ("rms_norm", "add_rms_norm", "add_layer_norm"):
        name = f"trainc.kernels.norm.{module}.compiler_fuses"
        monkeypatch.setattr(name, lambda x: torch.compiler.is_compiling())
    targets: list[str] = []

    def graph_only(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for columns in (None, 2 if "layer" in norm else 1):
        probe = None if columns is None else torch.zeros(3, columns, requires_grad=True)
        results = []
        for compiled in (False, True):
            torch.manual_seed(0)
            parts = [randn(3, 4, 5).requires_grad_(), randn(3, 4, 5), randn(5).requires_grad_()]
            function: Any = NORMS[norm]
            if compiled:
                torch.compiler.reset()
                function = torch.compile(function, fullgraph=True, backend=graph_only)
            found = function(*parts, probe)
            y = found[-1] if isinstance(found, tuple) else found
            y.square().sum().backward()
            results.append((y, parts[0].grad, parts[2].grad))
        torch.testing.assert_close(*results)
        assert any("trainc" in name for name in targets) == (probe is not None)
        targets.clear()


def test_what_is_refused_is_refused_in_compiled_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainc.kernels.norm.rms_norm.compiler_fuses", lambda x: True)
    with pytest.raises(RuntimeError, match="casting must be one of"):
        operators.rms_norm(randn(2, 5), (5,), None, None, None, "other")
    with pytest.raises(RuntimeError, match="must end in normalized_shape"):
        operators.rms_norm(randn(2, 5), (4,), None, None, None, "gemma")
    assert not contracts.compiler_fuses(randn(2))
