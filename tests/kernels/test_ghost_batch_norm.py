"""Ghost batch norm against one torch batch norm per ghost batch, and the stored numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.batch_norm import ghost_batch_norm as operators
from trainc.kernels.batch_norm.ghost_batch_norm import ghost_batch_norm

SEQUENTIAL = "sequential_torch_BN_ghost4 (bigBatch main_gbn.py / pytorch_tabnet.GBN semantics)"


@pytest.fixture(autouse=True, params=["operator", "composition"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are torch's own calls on a CPU, and large ones the operator: both must hold."""
    if request.param == "operator":
        monkeypatch.setattr(operators, "SMALL", -1)


def sequential(
    x: Tensor, running: tuple[Tensor, Tensor], weight: Any, bias: Any, sizes: list[int]
) -> Tensor:
    """One F.batch_norm call per ghost batch, each updating the running statistics."""
    parts = [
        functional.batch_norm(ghost, *running, weight, bias, True, 0.3, 1e-5)
        for ghost in x.split(sizes)
    ]
    return torch.cat(parts)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape).mul(2).add(1).to(dtype)
    return [x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)]


def fresh(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), 0.2, dtype=dtype), torch.full((channels,), 1.5, dtype=dtype)


@pytest.mark.parametrize("shape", [(8, 3), (12, 5, 3, 4), (9, 4, 7), (3, 2, 2), (127, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("remainder", ["merge_last", "smaller", "even"])
def test_it_is_batch_norm_ghost_by_ghost(
    shape: tuple[int, ...], affine: bool, remainder: str
) -> None:
    x, weight, bias = inputs(shape, torch.float32)
    size = 4
    if remainder == "merge_last":
        count = max(1, shape[0] // size)
        sizes = [size] * (count - 1) + [shape[0] - size * (count - 1)]
    elif remainder == "smaller":
        sizes = [len(part) for part in x.split(size)]
    else:
        sizes = [len(part) for part in x.chunk(-(-shape[0] // size))]
    results = []
    for ours in (True, False):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        given: list[Any] = [*leaves[1:]] if affine else [None, None]
        running = fresh(shape[1], torch.float32)
        if ours:
            y = ghost_batch_norm(
                leaves[0], *running, given[0], given[1], size, True, 0.3, remainder=remainder
            )
        else:
            y = sequential(leaves[0], running, given[0], given[1], sizes)
        torch.manual_seed(1)
        wanted = leaves if affine else leaves[:1]
        results.append([y, *torch.autograd.grad(y, wanted, torch.randn(shape)), *running])
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        if index < (2 if affine else 1):
            assert torch.equal(got, want)  # y and dx; the rest adds in another order
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    parts = inputs((8, 5, 6, 7), dtype)
    dy = torch.randn(8, 5, 6, 7).to(dtype)

    def run(ours: bool, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in parts]
        running = fresh(5, torch.float64 if wide else torch.float32)
        if ours:
            y = ghost_batch_norm(leaves[0], *running, leaves[1], leaves[2], 4, True, 0.3)
        else:
            affine = leaves[1:] if wide else [p.float() for p in leaves[1:]]
            y = sequential(leaves[0], running, affine[0], affine[1], [4, 4])
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)), *running]

    exact = run(ours=True, wide=True)
    for got, low, want in zip(run(True, False), run(False, False), exact, strict=True):
        allowed = 2 * (low.double() - want).abs().max() + 1e-5
        assert (got.double() - want).abs().max() <= allowed
        assert got.dtype == low.dtype


def test_channels_last_stays_channels_last() -> None:
    x, weight, bias = inputs((8, 6, 4, 5), torch.float32)
    plain = ghost_batch_norm(x, None, None, weight, bias, 4, True)
    moved = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ghost_batch_norm(moved, None, None, weight, bias, 4, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain)
    y.square().sum().backward()
    arguments = (moved, weight, bias, 4, 1e-5, "error")
    torch.library.opcheck(torch.ops.trainc.ghost_batch_norm.default, arguments)


def test_evaluation_uses_the_running_statistics_and_changes_nothing() -> None:
    x, weight, bias = inputs((7, 3, 2), torch.float32)
    running = fresh(3, torch.float32)
    got = ghost_batch_norm(x, *running, weight, bias, 4, False)
    assert torch.equal(got, functional.batch_norm(x, *running, weight, bias))
    assert torch.equal(running[0], fresh(3, torch.float32)[0])


def test_an_empty_batch_leaves_the_running_statistics() -> None:
    running = fresh(3, torch.float32)
    y = ghost_batch_norm(torch.zeros(0, 3, 4), *running, training=True)
    assert y.shape == (0, 3, 4)
    assert torch.equal(running[1], fresh(3, torch.float32)[1])


@pytest.mark.parametrize(
    ("shape", "size", "remainder", "message"),
    [
        ((9, 3), 4, "error", "does not divide"),
        ((8, 3), 1, "error", "no variance"),
        ((1, 3), 4, "merge_last", "no variance"),
        ((9, 3), 4, "smaller", "no variance"),
        ((8, 3), 4, "drop", "remainder must be one of"),
        ((8, 3), 0, "merge_last", "must be at least 1"),
        ((8,), 4, "error", "must be \\(B, C"),
    ],
)
def test_wrong_ghosts_are_named(
    shape: tuple[int, ...], size: int, remainder: str, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ghost_batch_norm(
            torch.zeros(shape), None, None, None, None, size, True, remainder=remainder
        )


def test_stored_numbers(stored: Callable[[str], Any]) -> None:
    case = stored("other_methods")["ghost_bn"]
    want, closed = case[SEQUENTIAL], case["closed_form_running_stats"]
    x, dy, gamma, beta = (
        torch.tensor(case[name], dtype=torch.float64)
        for name in ("x", "upstream_grad", "gamma", "beta")
    )
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = ghost_batch_norm(x, *running, gamma, beta, 4, True, case["momentum"], case["eps"])
    found = [y, *torch.autograd.grad(y, leaves, dy), *running]
    names = ["y", "grad_x", "grad_gamma", "grad_beta", "running_mean", "running_var"]
    for got, name in zip(found, names, strict=True):
        torch.testing.assert_close(got, torch.tensor(want[name], dtype=torch.float64))
    for got, name in zip(running, ("mean", "var"), strict=True):
        torch.testing.assert_close(got, torch.tensor(closed[name], dtype=torch.float64))


def test_stored_numbers_of_other_implementations(stored: Callable[[str], Any]) -> None:
    case = stored("other_methods")["ghost_bn"]
    x = torch.tensor(case["x"], dtype=torch.float64)

    def run(size: int, **rules: Any) -> dict[str, Tensor]:
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = ghost_batch_norm(x, *running, None, None, size, True, 0.1, case["eps"], **rules)
        return dict(zip(("y", "running_mean", "running_var"), (y, *running), strict=True))

    plain, mean = run(8), run(4, running="mean")
    for name, found in plain.items():
        want = torch.tensor(case["plain_BN_batch8"][name], dtype=torch.float64)
        torch.testing.assert_close(found, want)
    for name, found in mean.items():
        want = torch.tensor(case["epfml_GhostBatchNorm2d_ghost4"][name], dtype=torch.float64)
        torch.testing.assert_close(found, want)
    ragged = torch.cat([x, x[:1]])
    parts = [ghost.shape[0] for ghost in ragged.chunk(-(-9 // 4))]
    assert f"chunks {parts}" == case["ragged_batch9_ghost4_tabnet"]
    even = ghost_batch_norm(ragged, None, None, None, None, 4, True, remainder="even")
    each = [
        functional.batch_norm(p, None, None, None, None, True, 0.1, 1e-5)
        for p in ragged.split(parts)
    ]
    torch.testing.assert_close(even, torch.cat(each), rtol=1e-12, atol=1e-12)
    with pytest.raises(
        RuntimeError, match="no variance"
    ):  # as the stored error of 101 examples in tens
        ghost_batch_norm(x.new_zeros(101, 3), None, None, None, None, 10, True, remainder="even")


def test_the_mean_of_ghosts_of_several_sizes() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 3, 2, dtype=torch.float64)
    running = fresh(3, torch.float64)
    rules = {"remainder": "smaller", "running": "mean"}
    ghost_batch_norm(x, *running, None, None, 4, True, 0.3, **rules)  # type: ignore[arg-type]
    ghosts = x.split(4)
    for got, before, own in zip(
        running,
        fresh(3, torch.float64),
        (
            [g.mean((0, 2)) for g in ghosts],
            [g.var((0, 2), correction=0) for g in ghosts],
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, 0.7 * before + 0.3 * torch.stack(own).mean(0))
    with pytest.raises(RuntimeError, match="running must be one of"):
        ghost_batch_norm(x, None, None, None, None, 5, True, running="last")
