"""PACE: what of an example shares its noise, and that `none_fast` reaches the operator in every pass of a step."""

import copy
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import trainc
from tests.compiler.constructs.test_pace_modes import EXECUTORS, REST, model, samples, spec
from tests.conformance import divided
from trainc.compiler.constructs.regularize.outputs._noise import Share
from trainc.compiler.plan import site_tables
from trainc.compiler.program.program import Program
from trainc.kernels.noise import factors, multiplicative_noise
from trainc.runtime.storage.differences import ChangedRun

FAST = "none_fast by the Triton kernel, none elsewhere"
Batch = tuple[Tensor, Tensor]


def of(share: str, mode: str = "pair") -> str:
    return spec(mode, f", share = {share}")


def trained(program: Program, steps: int = 3, sizes: Sequence[int] = (6,)) -> list[Tensor]:
    """Return the parameters after some steps on two tokens an example."""
    for _ in range(steps):
        batch: Any = samples(6, 2)
        program.step(divided(batch, sizes) if len(sizes) > 1 else batch)
    return [p.detach().clone() for p in program.module.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


class Checkpointed(nn.Sequential):
    """Runs its layers again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Shares(TorchDispatchMode):
    """Keeps the `share` of every call of the operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.trainc.multiplicative_noise.default:
            self.found.append(args[5])
        return func(*args, **(kwargs or {}))


def approximate(patch: pytest.MonkeyPatch) -> None:
    """Have a CPU stand in for a device: what is fast there is coarse, so that another form would be seen."""
    exact = factors.factor_once

    def coarse(x: Tensor, *noise: Any) -> Tensor:
        z = exact(x, *noise)
        return z.bfloat16().to(z.dtype) if noise[4] == "none_fast" else z

    patch.setattr(multiplicative_noise, "factor_once", coarse)


def test_the_words_are_the_operator_s() -> None:
    assert get_args(Share) == multiplicative_noise.SHARES


@EXECUTORS
@pytest.mark.parametrize("mode", ["pair", "lazy(2)"])
def test_on_a_cpu_the_fast_form_is_the_exact_one(mode: str, executor: Any) -> None:
    token, exact, fast = (
        trained(trainc.compile(of(share, mode), model(), executor=executor))
        for share in get_args(Share)
    )
    assert equal(exact, fast)
    assert not equal(token, exact)


@EXECUTORS
@pytest.mark.parametrize("share", get_args(Share))
def test_every_pass_calls_the_operator_with_the_word(share: str, executor: Any) -> None:
    program = trainc.compile(of(share), model(torch.float32), executor=executor)
    x, y = samples(6, 2)
    program.step((x.float(), y))
    with Shares() as shares:
        program.step((x.float(), y))
    assert set(shares.found) == {share}
    assert len(shares.found) >= 4  # two layers, forward and backward


def test_every_form_of_a_step_has_the_noise_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    approximate(monkeypatch)
    want = trained(trainc.compile(of("none_fast"), model(), executor="graph"))
    assert not equal(want, trained(trainc.compile(of("none"), model(), executor="graph")))
    layers: Any = model()
    forms = {
        "modules": trainc.compile(of("none_fast"), model(), executor="module"),
        "without the pass": trainc.compile(of("none_fast"), model(), without=["add_noise"]),
        "checkpointed": trainc.compile(of("none_fast"), Checkpointed(*layers), executor="module"),
    }
    for form, program in forms.items():
        for one, other in zip(trained(program), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=form)
    for executor in ("graph", "module"):
        program = trainc.compile(of("none_fast"), model(), executor=executor)
        for one, other in zip(trained(program, sizes=(1, 3, 2)), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    # Forward's factors are kept for backward, or drawn again.
    monkeypatch.setattr(factors, "_kept", factors.FactorCache(0))
    assert equal(want, trained(trainc.compile(of("none_fast"), model(), executor="graph")))


def test_a_run_of_a_device_goes_on_elsewhere_in_the_same_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint has nothing of the noise: what is drawn next follows from seed and step."""
    with monkeypatch.context() as on_a_device:
        approximate(on_a_device)
        first = trainc.compile(of("none_fast"), model())
        trained(first, 2)
        state = copy.deepcopy(first.state_dict())
    on_a_cpu, exact = (trainc.compile(of(share), model()) for share in ("none_fast", "none"))
    on_a_cpu.load_state_dict(copy.deepcopy(state))
    with pytest.raises(ChangedRun, match=r"`pace\.share` was none_fast and is none"):
        exact.load_state_dict(copy.deepcopy(state))
    exact.load_compatible(copy.deepcopy(state))
    found = trained(on_a_cpu, 1)
    assert equal(found, trained(exact, 1))
    for one, other in zip(found, trained(first, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_the_plan_says_where_noise_is_approximate() -> None:
    for share, more in (("token", ""), ("none", ""), ("none_fast", f", {FAST}")):
        plan = trainc.plan(of(share), model())
        rows = [row for row in plan.sites if row["site"] != "loss"]
        assert [row["operator"] for row in rows] == [f"multiplicative_noise{more}"] * 2
        assert {row["pass"] for row in rows} == {"add_noise"}
        assert (FAST in str(plan)) is (share == "none_fast")
        # The table beside it says which of the two this machine has.
        assert [k["operator"] for k in plan.kernels if "noise" in k["operator"]] == [
            "multiplicative_noise"
        ]


@pytest.mark.parametrize(
    ("hip", "implementation", "reason"),
    [(None, "Triton kernel", None), ("6.4", "ATen composition", "NVIDIA")],
)
def test_a_plan_on_an_amd_gpu_says_that_no_kernel_of_triton_runs(
    hip: Any, implementation: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    row = site_tables._kernel_row("multiplicative_noise")
    assert row["implementation"] == implementation
    assert row["reason"] is None if reason is None else reason in row["reason"]


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        (of("fast"), "expected `token`, `none` or `none_fast`"),
        (
            f'{REST} observe consistency on "0" every 1 steps {{ sigma = 1, share = none_fast }}',
            "expected `token` or `none`",
        ),
    ],
)
def test_another_word_is_located(clause: str, said: str) -> None:
    (problem,) = trainc.check(clause).diagnostics
    assert problem.labels[0].text == said
    assert problem.labels[0].span is not None
    if "observe" in clause:  # it draws nothing
        assert "nothing is drawn" in str(problem.notes)
