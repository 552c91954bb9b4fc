"""Masks by which entries train: what is kept of 16-bit weights, and how many entries stay at the next choice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.program.program import Program

OPTIMIZERS = {
    "in place": "adamw { lr = RATE, weight_decay = 0.1 }",
    "by torch": 'torch("torch.optim:AdamW") { lr = RATE, weight_decay = 0.1 }',
}
MASK = "mask sift on ndim(2) { density = 30%, select = magnitude MORE }"


def made(spec: str, dtype: torch.dtype = torch.bfloat16) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))
    return trainc.compile(f"loss cross_entropy run {{ length = 60 steps }} {spec}", model.to(dtype))


def data(step: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, generator=source).to(dtype), torch.randint(4, (5,), generator=source)


def spec_of(optimizer: str, rate: float, more: str) -> str:
    return f"{MASK.replace('MORE', more)} optimizer {OPTIMIZERS[optimizer]}".replace(
        "RATE", f"{rate}"
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("master", ["true", "false"])
def test_updates_add_up_in_the_master_copy_or_are_rounded_one_by_one(
    master: str, optimizer: str
) -> None:
    """AdamW by hand in float64, from the weights as they were stored, or from a copy that is never rounded."""
    program: Any = made(spec_of(optimizer, 2e-4, f", master = {master}"))
    net: nn.Module = program.module
    copies: dict[str, Tensor] = {}
    m: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    for t in range(1, 31):
        x, y = data(t)
        leaf = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        loss = F.cross_entropy(torch.func.functional_call(net, leaf, (x,)), y)
        found = torch.autograd.grad(loss, [*leaf.values()])
        program.step((x, y))
        for (n, w), g in zip(leaf.items(), (one.double() for one in found), strict=True):
            trains = program._method.masks[n].trained_entries()
            m[n] = 0.9 * m.get(n, torch.zeros(())) + 0.1 * g
            v[n] = 0.999 * v.get(n, torch.zeros(())) + 0.001 * g * g
            before = copies.get(n, w.detach().double()) if master == "true" else w.detach().double()
            step = 2e-4 * m[n] / (1 - 0.9**t) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            copies[n] = torch.where(trains, before * (1 - 2e-5) - step, w.detach().double())
            now = net.get_parameter(n).detach().double()
            torch.testing.assert_close(now, copies[n], rtol=2**-8, atol=1e-5)
            assert torch.equal(net.get_parameter(n)[~trains], start[n][~trains])
    moved = {n: (net.get_parameter(n) != start[n]) for n in start}
    large = {
        n: start[n].abs() > 0.3 for n in start
    }  # where a step is far below half a unit of the last place
    assert any(bool((moved[n] & large[n]).any()) for n in start) == (master == "true")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_resumed_run_without_a_master_copy_is_the_uninterrupted_one(
    optimizer: str, dtype: torch.dtype
) -> None:
    spec = spec_of(optimizer, 3e-2, ", master = false")
    whole, resumed = made(spec, dtype), made(spec, dtype)
    for step in range(4):
        whole.step(data(step, dtype))
    state = whole.state_dict()
    assert not any(key.startswith("values/") for key in state["actions"]["sift choice"])
    resumed.module.load_state_dict({n: w.clone() for n, w in whole.module.state_dict().items()})
    resumed.load_state_dict(state)
    for step in range(4, 8):
        whole.step(data(step, dtype))
        resumed.step(data(step, dtype))
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_plan_counts_the_master_copy_and_says_where_it_is_none() -> None:
    def held(spec: str, dtype: torch.dtype = torch.bfloat16) -> int:
        rows: Any = made(spec, dtype).plan.memory
        return next(int(row["bytes"]) for row in rows if row["what"] == "sift choice")

    entries = 22 + 15  # int(0.3 * 72) + 1 and int(0.3 * 48) + 1
    kept, rounded = (held(spec_of("in place", 0.1, more)) for more in ("", ", master = false"))
    assert kept - rounded == 4 * entries
    assert held(spec_of("by torch", 0.1, ", master = false")) == kept
    plain = spec_of("in place", 0.1, ", master = true")
    found = trainc.plan(f"loss cross_entropy {plain}", nn.Sequential(nn.Linear(6, 12))).warnings
    (warning,) = [d for d in found if d.rule == "no-effect"]
    assert warning.message == "no selected parameter has 16 bits: `0.weight` is float32"


AGAIN = {
    "sift": "sift on ndim(2) every 2 steps { density = 30%, select = random }",
    "gradients": "sift on ndim(2) every 3 steps { density = 30%, scope = global }",
    "magnitude": "magnitude on ndim(2) every 2 steps { density = linear(from = 90%, to = 20%, over = 9 steps) }",
    "movement": "movement on ndim(2) every 1 steps { density = 60% }",
    "rigl": "rigl on ndim(2) every 2 steps { density = 40%, replace = 50% }",
    "set": "set on ndim(2) every 2 steps { density = 40%, replace = 50% }",
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_rule_reads_how_many_entries_stayed(name: str) -> None:
    """The signal is the fraction of all chosen entries that trained before; a rule sees it in the next step."""
    label = AGAIN[name].split()[0]
    program: Any = made(
        f"optimizer sgd {{ lr = 0.1 }} mask {AGAIN[name]} when {label}.overlap < 2 {{ sgd.lr = 0.05 }}",
        torch.float32,
    )
    masks, seen = program._method.masks, 0
    before: dict[str, Tensor] | None = None
    for step in range(10):
        metrics = program.step(data(step, torch.float32))
        report = program.report()
        chosen = all(getattr(one, "is_chosen", True) for one in masks.values())
        now = {n: one.trained_entries().clone() for n, one in masks.items()} if chosen else None
        if f"{label}.overlap" in metrics:
            assert before is not None
            assert now is not None
            stayed = sum(int((before[n] & now[n]).sum()) for n in now)
            want = stayed / sum(int(one.sum()) for one in now.values())
            assert metrics[f"{label}.overlap"] == pytest.approx(want)
            each = report.series[f"{label}.overlap"]
            assert each == {
                n: pytest.approx(float((before[n] & now[n]).sum() / now[n].sum())) for n in each
            }
            seen += 1
        before = now
    assert seen >= 2
    assert metrics["lr_max"] == 0.05


def test_a_rule_on_an_overlap_that_is_never_measured_is_an_error() -> None:
    spec = "optimizer sgd { lr = 0.1 } mask sift on ndim(2) { density = 30% } when sift.overlap > 0.9 { save }"
    with pytest.raises(trainc.SpecError, match=r"`sift\.overlap` is never measured") as caught:
        made(spec)
    assert "every 100 steps" in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            "magnitude on ndim(2) every 1 steps { density = linear(from = 100%, to = 0%, over = 9 steps) }",
            r"`density = .*` of `mask magnitude` is 0 after .*: expected a number above 0, at most 1",
        ),
        (
            "movement on ndim(2) { density = 150% }",
            r"expected a number above 0, at most 1, found 1\.5",
        ),
        (
            "sift on ndim(2) every 2 steps { density = 10%, batches = 3 }",
            r"gradients of 3 steps are summed before a choice, .* `every 2 steps`",
        ),
    ],
)
def test_what_cannot_be_chosen_is_one_located_error_before_the_run(mask: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=said) as caught:
        made(f"optimizer sgd {{ lr = 0.1 }} mask {mask}")
    (problem,) = caught.value.diagnostics
    assert problem.labels


def test_a_rank_that_approximates_nothing_is_a_warning() -> None:
    spec = "loss cross_entropy optimizer sgd { lr = 0.1 } mask sift on ndim(2) { density = 10%, select = principal(R) }"
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    (warning,) = trainc.plan(spec.replace("R", "6"), model).warnings
    assert "no selected parameter has a higher rank than 6" in warning.message
    assert not trainc.plan(spec.replace("R", "5"), model).warnings


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["global", "calibrated, unit = tensor"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_entries_that_only_a_choice_counts_resume_bit_equal(
    optimizer: str, scope: str, at: int
) -> None:
    """A new program does not know how many entries of each tensor a checkpoint has, nor those of their moments."""
    spec = f"mask sift on ndim(2) every 2 steps {{ density = 30%, batches = 2, scope = {scope} }}"
    spec += f" optimizer {OPTIMIZERS[optimizer].replace('RATE', '0.05')}"
    whole, resumed = made(spec, torch.float32), made(spec, torch.float32)
    for step in range(at):
        whole.step(data(step, torch.float32))
    resumed.module.load_state_dict({n: w.clone() for n, w in whole.module.state_dict().items()})
    resumed.load_state_dict(whole.state_dict())
    for step in range(at, 7):
        whole.step(data(step, torch.float32))
        resumed.step(data(step, torch.float32))
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)
