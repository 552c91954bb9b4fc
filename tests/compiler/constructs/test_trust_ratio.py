"""The trust ratio against LAMB and LARS by definition, published numbers, and in company of the other clauses."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import trainc
from tests.compiler.image_models import import_library
from tests.processes import run_processes, run_rank
from trainc.compiler.constructs.lr.trust_ratio import TrustRatio
from trainc.compiler.constructs.optimizer.adamw import AdamW
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.program.program import Program
from trainc.dsl.values.value_json import Number, Range
from trainc.runtime.mask.selected_entries import SelectedEntries

METHODS = json.loads((Path(__file__).parents[2] / "reference/other_methods.json").read_text())
PUBLISHED, LARS = METHODS["lamb"], METHODS["lars"]
ADAMW = "loss mse optimizer adamw { lr = 0.01, weight_decay = 0.1, eps = 1e-6 }"


class Net(nn.Module):
    """Two matrices and two vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return Net().to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(8, n, generator=g, dtype=torch.float64) for n in (4, 3)]
    return drawn[0].to(dtype), drawn[1].to(dtype)


def compiled(spec: str, model: nn.Module | None = None) -> Program:
    return trainc.compile(spec, model or net())


def weights(program: Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.module.named_parameters()}


def gradients(program: Program, seed: int) -> dict[str, Tensor]:
    """Run the backward pass of a batch; return the gradients that it left."""
    program.loss(data(seed)).backward()
    return {n: p.grad.clone() for n, p in program.module.named_parameters() if p.grad is not None}


def trained(spec: str, steps: int = 4) -> tuple[Program, list[dict[str, Tensor]]]:
    program, met = compiled(spec), []
    for seed in range(steps):
        met.append(gradients(program, seed))
        program.update()
    return program, met


def of(met: Sequence[dict[str, Tensor]], name: str) -> list[Tensor]:
    return [one[name] for one in met]


def ratios(program: Program) -> dict[str, float]:
    return dict(program.report().series["trust_ratio.ratio"])


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after four steps over AdamW, by the program and as LAMB; vectors as AdamW has them."""
    decay = {"first.weight": 0.1, "second.weight": 0.0, "first.bias": 0.1, "second.bias": 0.0}
    options = 'lr = 0.01, eps = 1e-6, weight_decay = 0.1 on "first.*"'
    program, met = trained(f"loss mse optimizer adamw {{ {options} }} lr trust_ratio")
    plain = AdamW(lr=Number(0.01), eps=1e-6)
    expected = {}
    for name, start in net().named_parameters():
        make = TrustRatio().reference if start.dim() > 1 else plain.reference
        expected[name] = make(start.detach(), of(met, name), 0.01, decay[name])
    return weights(program), expected


def test_it_is_lamb_to_rounding() -> None:
    found, expected = compiled_and_reference()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-13)


class Published(nn.Module):
    """The parameters of the reference file."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList(
            nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in PUBLISHED["params"]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([p.sum() for p in self.all]).sum()


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ("", "paper_TFA (phi=id, debias, wd in update)"),
        ("", "timm.Lamb max_grad_norm=None"),
        ("weight_norm = 0..10", "paper_phi_clip(0,10)"),
        ("limits = 0..1", "timm.Lamb trust_clip (LAMBC), no grad clip"),
    ],
)
@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
def test_the_published_numbers(fields: str, row: str, implementation: str) -> None:
    options = f"lr = {PUBLISHED['lr']}, eps = 1e-6, weight_decay = {PUBLISHED['weight_decay']}"
    spec = f"loss mse optimizer adamw {{ {options}, implementation = {implementation} }}"
    program = compiled(f"{spec} lr trust_ratio on all {{ {fields} }}", Published())
    x = torch.zeros(2, 1, dtype=torch.float64)
    for step in (1, 2):
        program.loss((x, x)).backward()
        for p, grad in zip(
            program.module.parameters(), PUBLISHED[f"grads_step{step}"], strict=True
        ):
            p.grad = torch.tensor(grad, dtype=torch.float64)
        program.update()
        expected = PUBLISHED[row][f"params_after_step{step}"]
        for p, wanted in zip(program.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), p.new_tensor(wanted), rtol=0, atol=1e-12)
    wanted = [ratio for ratio in PUBLISHED[row]["trust_ratio_step2"] if ratio is not None]
    assert list(ratios(program).values())[: len(wanted)] == pytest.approx(wanted, rel=1e-9)


LARS_ROWS = {"paper (v=mu v+lr*lambda*(g+wd w); w-=v)": 1e-12, "timm.Lars": 1e-8}
"""Rows of the reference file, and how close they are: timm adds 1e-8 to what it divides by."""


@pytest.mark.parametrize("row", LARS_ROWS)
def test_of_gradients_it_is_lars_with_the_published_numbers(row: str) -> None:
    options = (
        f"lr = {LARS['lr']}, momentum = {LARS['momentum']}, weight_decay = {LARS['weight_decay']}"
    )
    clause = f"lr trust_ratio on all {{ of = gradient, coefficient = {LARS['eta']} }}"
    program = compiled(f"loss mse optimizer sgd {{ {options} }} {clause}", Published())
    x = torch.zeros(2, 1, dtype=torch.float64)
    for step in (1, 2):
        program.loss((x, x)).backward()
        gradients = PUBLISHED[f"grads_step{step}"]
        for p, grad in zip(program.module.parameters(), gradients, strict=True):
            p.grad = torch.tensor(grad, dtype=torch.float64)
        program.update()
        expected = LARS[row][f"params_after_step{step}"]
        for p, wanted in zip(program.module.parameters(), expected, strict=True):
            torch.testing.assert_close(
                p.detach(), p.new_tensor(wanted), rtol=0, atol=LARS_ROWS[row]
            )
    wanted = LARS["paper (v=mu v+lr*lambda*(g+wd w); w-=v)"]["trust_ratio_step2"]
    assert list(ratios(program).values()) == pytest.approx(wanted, rel=1e-12)


def lars(w: Tensor, met: Sequence[Tensor], decay: float, phi: Range | None = None) -> Tensor:
    """Return `w` after one LARS update per gradient, by definition, at a rate of 0.5 with momentum 0.9."""
    v = torch.zeros_like(w)
    for g in met:
        norm = float(w.norm()) if phi is None else min(max(float(w.norm()), phi.low), phi.high)
        v = 0.9 * v + 0.02 * norm / (g.norm() + decay * w.norm()) * (g + decay * w)
        w = w - 0.5 * v
    return w


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lars_to_rounding(decay: float) -> None:
    options = f"lr = 0.5, momentum = 0.9, weight_decay = {decay}"
    clause = "lr trust_ratio { of = gradient, coefficient = 0.02, weight_norm = 0..1.2 }"
    program, met = trained(f"loss mse optimizer sgd {{ {options} }} {clause}")
    assert sorted(ratios(program)) == ["first.weight", "second.weight"]
    for name in ratios(program):
        start = net().get_parameter(name).detach()
        expected = lars(start, of(met, name), decay, Range(0.0, 1.2))
        torch.testing.assert_close(weights(program)[name], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("rest", "rule", "spans", "said"),
    [
        ("optimizer adamw { lr = 1 }", "bad-value", 1, "of = update"),
        (
            "optimizer sgd { lr = 1, clip = 1, weight_decay = 0.1 }",
            "conflicting-effects",
            2,
            "decay",
        ),
        (
            "run { length = 3 steps, clip = 1 } optimizer sgd { lr = 1, weight_decay = 0.1 }",
            "conflicting-effects",
            2,
            "decay",
        ),
    ],
)
def test_lars_needs_decay_in_gradients_that_are_not_clipped(
    rest: str, rule: str, spans: int, said: str
) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"loss mse {rest} lr trust_ratio {{ of = gradient }}", net())
    (problem,) = error.value.diagnostics
    assert problem.rule == rule
    assert len(problem.labels) == spans
    assert said in problem.message + str(problem.help)


def test_gradients_of_lars_may_be_clipped_without_decay() -> None:
    spec = "loss mse optimizer sgd { lr = 1, clip = 1e-3 } lr trust_ratio { of = gradient }"
    program, _ = trained(spec, 1)
    moved = [weights(program)[n] - p.detach() for n, p in net().named_parameters()]
    assert torch.stack([m.norm() for m in moved]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_as_a_function_it_is_the_ratio_of_lamb_and_of_lars() -> None:
    found = trainc.functional.trust_ratio
    w, u = data(0)[0], data(1)[0]
    norm, other = float(w.norm()), float(u.norm())
    assert float(found(w, u)) == pytest.approx(norm / other, rel=1e-14)
    ratio = found(w, u, weight_decay=0.1, coefficient=1e-3)
    assert float(ratio) == pytest.approx(1e-3 * norm / (other + 0.1 * norm), rel=1e-14)
    assert float(found(w, u, weight_norm=(0.0, 2.0))) == pytest.approx(2.0 / other, rel=1e-14)
    assert float(found(w, u, limits=(3.0, 4.0))) == 3.0
    zero = torch.zeros_like(w)
    assert float(found(zero, u)) == float(found(w, zero)) == 1.0
    with pytest.raises(ValueError, match="expected the same shape"):
        found(w, u[1:])


def test_as_a_function_it_hides_nothing_that_is_wrong() -> None:
    w, u = torch.ones(3), torch.tensor([1.0, math.inf, 2.0])
    trust_ratio = trainc.functional.trust_ratio
    assert trust_ratio(w, u).isnan()
    assert trust_ratio(u - math.inf, w).isnan()
    wrong: list[dict[str, Any]] = [
        {"limits": (5, 1)},
        {"weight_norm": (-5, -1)},
        {"weight_decay": -1},
        {"coefficient": math.nan},
    ]
    for fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            trust_ratio(w, w, **fields)


@pytest.mark.models
@pytest.mark.parametrize(("kind", "close"), [("Lamb", 1e-12), ("Lars", 1e-8)])
def test_it_is_what_timm_computes(kind: str, close: float) -> None:
    timm = import_library("timm.optim")
    spec = {
        "Lamb": f"{ADAMW} lr trust_ratio on all",
        "Lars": "loss mse optimizer sgd { lr = 0.5, momentum = 0.9, weight_decay = 0.1 }"
        " lr trust_ratio on all { of = gradient }",
    }[kind]
    program, met = trained(spec)
    model = net()
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    if kind == "Lamb":
        options = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": None}
    theirs = getattr(timm, kind)(model.parameters(), **options)
    for found in met:
        for name, p in model.named_parameters():
            p.grad = found[name].clone()
        theirs.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights(program)[name], p.detach(), rtol=close, atol=close)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_over_sgd_it_is_lars_of_the_same_paper(momentum: float) -> None:
    options = f"lr = 0.01, momentum = {momentum}, weight_decay = 0.1"
    program, met = trained(f"loss mse optimizer sgd {{ {options} }} lr trust_ratio")
    for name in ("first.weight", "second.weight"):
        w = net().get_parameter(name).detach()
        m = torch.zeros_like(w)
        for g in of(met, name):
            m = momentum * m + (1 - momentum) * (g + 0.1 * w)
            w = w - 0.01 * w.norm() / m.norm() * m
        torch.testing.assert_close(weights(program)[name], w, rtol=1e-12, atol=1e-13)


def test_over_any_optimizer_it_is_the_difference_of_the_weights() -> None:
    torch_adam = (
        'optimizer torch("torch.optim:AdamW") { lr = 0.01, eps = 1e-6, weight_decay = 0.1 }'
    )
    other, _ = trained(f"loss mse {torch_adam} lr trust_ratio")
    own, _ = trained(f"{ADAMW} lr trust_ratio")
    for name, weight in weights(own).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_in_float32_large_weights_lose_no_bits(optimizer: str) -> None:
    single, double = net(torch.float32), net()
    with torch.no_grad():
        for one, other in zip(single.parameters(), double.parameters(), strict=True):
            one.mul_(1000)
            other.copy_(one)
    spec = f"loss mse optimizer {optimizer} {{ lr = 1e-7, weight_decay = 0.1 }} lr trust_ratio"
    programs = [compiled(spec, single), compiled(spec, double)]
    before = weights(programs[0])
    for program in programs:
        dtype = next(program.module.parameters()).dtype
        program.loss(data(0, dtype)).backward()
    for one, other in zip(single.parameters(), double.parameters(), strict=True):
        other.grad = None if one.grad is None else one.grad.double()
    for program in programs:
        program.update()
    assert ratios(programs[0]) == pytest.approx(ratios(programs[1]), rel=1e-6)
    for name in ("first.weight", "second.weight"):
        found, exact = weights(programs[0])[name], weights(programs[1])[name]
        ulp = torch.finfo(torch.float32).eps * exact.abs()
        assert ((found.double() - exact).abs() <= ulp).all()
        assert not torch.equal(found, before[name])


def test_bfloat16_weights_move_by_updates_that_adamw_could_not_add() -> None:
    """At 300 bfloat16 counts in twos: AdamW's 0.01 is lost, and LAMB's 3 is not."""

    def after(clauses: str) -> Tensor:
        model = net(torch.bfloat16)
        with torch.no_grad():
            model.get_parameter("first.weight").fill_(300.0)
        program = compiled(
            f"loss mse optimizer adamw {{ lr = 0.01, weight_decay = 0 }} {clauses}", model
        )
        program.loss(data(0, torch.bfloat16)).backward()
        model.get_parameter("first.weight").grad = torch.ones(5, 4, dtype=torch.bfloat16)
        program.update()
        return weights(program)["first.weight"]

    assert (after("") == 300).all()
    assert ((after("lr trust_ratio").float() - 297).abs() <= 1).all()


def test_zero_weights_keep_their_update() -> None:
    model, plain = net(), net()
    for one in (model, plain):
        nn.init.zeros_(one.get_parameter("second.weight"))
    program, other = compiled(f"{ADAMW} lr trust_ratio", model), compiled(ADAMW, plain)
    program.step(data(0))
    other.step(data(0))
    assert ratios(program)["second.weight"] == 1.0
    torch.testing.assert_close(weights(program)["second.weight"], weights(other)["second.weight"])


def test_a_lower_limit_of_the_norm_scales_zero_weights_too() -> None:
    rule = TrustRatio(weight_norm=Range(2.0, 10.0))
    assert rule.ratio(0.0, 4.0) == 0.5
    assert rule.ratio(3.0, 0.0) == 1.0
    assert TrustRatio().ratio(0.0, 4.0) == TrustRatio().ratio(4.0, 0.0) == 1.0
    assert rule.ratio(100.0, 4.0) == 2.5


def fitted(program: trainc.Program) -> tuple[Tensor, Tensor]:
    """Return a batch whose targets are the model's own outputs: its gradients are zero."""
    inputs, _ = data(0)
    return inputs, program.module(inputs).detach()


def test_an_update_of_zero_is_none() -> None:
    program = compiled("loss mse optimizer adamw { lr = 0.1 } lr trust_ratio")
    before = weights(program)
    program.loss(fitted(program)).backward()
    program.update()
    assert set(ratios(program).values()) == {1.0}
    assert all(torch.equal(w, before[n]) for n, w in weights(program).items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_alone_shrinks_by_the_rate(optimizer: str) -> None:
    """With u = decay w the step is lr w, whatever the decay."""
    spec = f"loss mse optimizer {optimizer} {{ lr = 0.1, weight_decay = 0.03 }} lr trust_ratio"
    program = compiled(spec)
    before = weights(program)
    program.loss(fitted(program)).backward()
    program.update()
    for name in ("first.weight", "second.weight"):
        torch.testing.assert_close(weights(program)[name], 0.9 * before[name], rtol=1e-14, atol=0)
    assert ratios(program) == pytest.approx(dict.fromkeys(ratios(program), 1 / 0.03))


def test_vectors_are_left_out_unless_selected() -> None:
    program, _ = trained(f"{ADAMW} lr trust_ratio")
    plain, _ = trained(ADAMW, 1)
    assert sorted(ratios(program)) == ["first.weight", "second.weight"]
    assert {n for n in weights(plain) if n.endswith("bias")}.isdisjoint(ratios(program))
    chosen, _ = trained(f"{ADAMW} lr trust_ratio on all", 1)
    assert len(ratios(chosen)) == 4


def test_factors_and_schedules_multiply_the_rate() -> None:
    from examples.models import gpt

    torch.manual_seed(0)
    model = gpt(layers=2, width=8, heads=2, context=6, vocabulary=7).double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    spec = (
        "loss cross_entropy run { length = 10 steps }"
        " optimizer adamw { lr = 0.02 * warmup(4 steps), weight_decay = 0.1, eps = 1e-6 }"
        " lr layer_decay { decay = 0.5 } lr trust_ratio"
    )
    program = trainc.compile(spec, model)
    ids = torch.randint(0, 7, (4, 7))
    met, rates = [], []
    for _ in range(3):
        program.loss((ids[:, :-1], ids[:, 1:])).backward()
        met.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        rates.append(program.signals["lr"])
        program.update()
    places = {p.name: p.place for p in build_inventory(model).parameters}
    for name, w in start.items():
        if w.dim() < 2:
            continue
        factor = 0.5 ** (places[name].levels - places[name].level)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, (g, lr) in enumerate(zip(of(met, name), rates, strict=True), start=1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + 0.1 * w
            w = w - lr * factor * w.norm() / u.norm() * u
        torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-11, atol=1e-13)


def test_it_multiplies_a_measured_factor() -> None:
    """The length of a step is the rate, with TempBalance's factor, times the norm."""
    spec = f"{ADAMW} lr temp_balance on ndim(2) {{ min_eigenvalues = 3, shrink = false }} lr trust_ratio"
    program = compiled(spec)
    before = weights(program)
    program.step(data(0))
    factors = program.report().series["temp_balance.lr_factor"]
    assert len(set(factors.values())) == 2
    for module, factor in factors.items():
        name = f"{module}.weight"
        moved = (weights(program)[name] - before[name]).norm()
        torch.testing.assert_close(moved, 0.01 * factor * before[name].norm(), rtol=1e-9, atol=0)


def test_a_rate_of_zero_measures_nothing() -> None:
    program = compiled(
        f"{ADAMW.replace('0.01', '0.01 * linear(from = 0, to = 1, over = 2 steps)')} lr trust_ratio"
    )
    before = weights(program)
    first = program.step(data(0))
    assert first["lr_max"] == 0
    assert "trust_ratio.mean" not in first
    assert all(torch.equal(w, before[n]) for n, w in weights(program).items())
    assert "trust_ratio: no update was scaled" in program.summary()
    assert "trust_ratio.mean" in program.step(data(1))


def test_gradients_are_clipped_before() -> None:
    program, met = trained(f"{ADAMW[:-2]}, clip = 0.05 }} lr trust_ratio")
    clipped = []
    for found in met:
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        assert norm > 0.05
        clipped.append({n: g * (0.05 / (norm + 1e-6)) for n, g in found.items()})
    for name in ("first.weight", "second.weight"):
        start = net().get_parameter(name).detach()
        expected = TrustRatio().reference(start, of(clipped, name), 0.01, 0.1)
        torch.testing.assert_close(weights(program)[name], expected, rtol=1e-11, atol=1e-13)


def test_under_a_mask_the_norms_are_of_the_selected_entries() -> None:
    program = compiled(f'{ADAMW} mask sift on "first.weight" {{ density = 30% }} lr trust_ratio')
    (entries,) = program._method.masks.values()
    assert isinstance(entries, SelectedEntries)
    program.step(data(0))
    assert "first.weight" not in ratios(program)
    assert entries.index is not None
    start = weights(program)["first.weight"]
    index = entries.index.long()
    w = start.flatten()[index]
    assert len(w) == 7
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 5):
        program.loss(data(step)).backward()
        assert entries.values.grad is not None
        g = entries.values.grad.clone()
        program.update()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.1 * w
        assert ratios(program)["first.weight"] == pytest.approx(float(w.norm() / u.norm()))
        w = w - 0.01 * w.norm() / u.norm() * u
    expected = start.flatten().scatter(0, index, w).view(5, 4)
    torch.testing.assert_close(weights(program)["first.weight"], expected, rtol=1e-11, atol=1e-13)
    assert int((expected == start).sum()) == 13


def test_several_optimizers_are_scaled_together() -> None:
    spec = (
        'loss mse optimizer adamw on "first.*" { lr = 0.01, eps = 1e-6 }'
        ' optimizer sgd on "second.*" { lr = 0.1, momentum = 0.9 } lr trust_ratio'
    )
    program, met = trained(spec)
    found = ratios(program)
    assert sorted(found) == ["first.weight", "second.weight"]
    mean = sum(found.values()) / 2
    assert program.signals["trust_ratio"] == program.signals["trust_ratio.mean"] == mean
    assert program.signals["trust_ratio.lowest"] == min(found.values())
    assert program.signals["trust_ratio.highest"] == max(found.values())
    start = net().get_parameter("first.weight").detach()
    expected = TrustRatio().reference(start, of(met, "first.weight"), 0.01)
    torch.testing.assert_close(weights(program)["first.weight"], expected, rtol=1e-12, atol=1e-13)
    w = net().get_parameter("second.weight").detach()
    b = torch.zeros_like(w)
    for g in of(met, "second.weight"):
        b = 0.9 * b + g
        w = w - 0.1 * w.norm() / b.norm() * b
    torch.testing.assert_close(weights(program)["second.weight"], w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("times", "scaled"),
    [
        ("from 2 steps", [False, False, True, True, True, True]),
        ("until 2 steps", [True, True, False, False, False, False]),
        ("every 3 steps", [True, False, False, True, False, False]),
        ("from 1 step until 5 steps every 2 steps", [False, True, False, True, False, False]),
    ],
)
def test_the_clauses_times_are_obeyed(times: str, scaled: list[bool]) -> None:
    """A step at which the gate is closed is plain AdamW's, bit for bit."""
    program = compiled(f"{ADAMW} lr trust_ratio {times}")
    for seed, expected in enumerate(scaled):
        twin = compiled(ADAMW)
        state = program.state_dict()
        twin.module.load_state_dict(program.module.state_dict())
        if seed:
            own = copy.deepcopy(state["actions"]["adamw"])
            fresh = next(a for a in twin._machine.actions if a.name == "adamw")
            fresh.load_state_dict(own)
        metrics = program.step(data(seed))
        twin.step(data(seed))
        assert ("trust_ratio.mean" in metrics) == expected
        same = [torch.equal(weights(twin)[n], w) for n, w in weights(program).items()]
        assert same == [not expected, True] * 2


def test_resuming_between_measurements_is_bit_equal() -> None:
    spec = f"{ADAMW} lr trust_ratio every 2 steps"
    program = compiled(spec)
    for seed in range(3):
        program.step(data(seed))
    state = copy.deepcopy(program.state_dict())
    later = compiled(spec)
    later.load_state_dict(state)
    for seed in range(3, 6):
        assert later.step(data(seed)) == program.step(data(seed))
    assert all(torch.equal(weights(later)[n], w) for n, w in weights(program).items())
    assert later.summary() == program.summary()
    (line,) = [line for line in program.summary() if line.startswith("trust_ratio")]
    assert line.endswith("in 3 steps")


def test_a_step_that_a_grad_scaler_skips_changes_nothing() -> None:
    program, scaler = compiled(f"{ADAMW} lr trust_ratio"), torch.amp.GradScaler("cpu")
    program.step(data(0))
    before, state = weights(program), copy.deepcopy(program.state_dict()["actions"])
    scaler.scale(program.loss(data(1))).backward()
    first = program.module.get_parameter("first.weight")
    first.grad = torch.full_like(first, math.inf)
    assert program.update(scaler)["skipped"] == 1.0
    assert all(torch.equal(w, before[n]) for n, w in weights(program).items())
    now = program.state_dict()["actions"]
    assert now["trust_ratio"] == state["trust_ratio"]
    assert all(torch.equal(now["adamw"][key], value) for key, value in state["adamw"].items())
    scaler.update()
    scaler.scale(program.loss(data(2))).backward()
    assert "trust_ratio.mean" in program.update(scaler)
    plain = compiled(f"{ADAMW} lr trust_ratio")
    for seed in (0, 2):
        plain.step(data(seed))
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(program)[name], weight, rtol=1e-11, atol=1e-13)


def test_micro_batches_and_graph_agree() -> None:
    spec = f"{ADAMW} lr trust_ratio"
    whole, split, graph = compiled(spec), compiled(spec), compiled(spec)
    for seed in range(3):
        x, y = data(seed)
        whole.loss((x, y)).backward()
        whole.update()
        split.step([(x[:2], y[:2]), (x[2:], y[2:])])
        graph.graph((x, y))
        graph.update()
    for other in (split, graph):
        assert ratios(other) == pytest.approx(ratios(whole), rel=1e-10)
        for name, weight in weights(whole).items():
            torch.testing.assert_close(weights(other)[name], weight, rtol=1e-11, atol=1e-13)


def test_a_tied_weight_is_scaled_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    model = Tied().double()
    start = model.embed.weight.detach().clone()
    spec = "loss cross_entropy optimizer adamw { lr = 0.01, eps = 1e-6 } lr trust_ratio"
    program = trainc.compile(spec, model)
    ids = torch.randint(0, 7, (4, 5))
    met = []
    for _ in range(3):
        program.loss((ids[:, :-1], ids[:, 1:])).backward()
        assert model.embed.weight.grad is not None
        met.append(model.embed.weight.grad.clone())
        program.update()
    assert list(ratios(program)) == ["embed.weight"]
    assert model.head.weight is model.embed.weight
    expected = TrustRatio().reference(start, met, 0.01)
    torch.testing.assert_close(model.embed.weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_the_plan_shows_where_it_acts() -> None:
    plan = trainc.plan(f"{ADAMW} lr layer_decay {{ decay = 0.5 }} lr trust_ratio", net())
    rows = {row["name"]: (row["lr_factors"], row["clauses"]) for row in plan.parameters}
    assert rows["first.weight"] == (["layer_decay"], ["trust_ratio"])
    assert rows["first.bias"] == (["layer_decay"], [])
    (step,) = [row for row in plan.steps if row["clause"] == "trust_ratio"]
    assert step["name"] == "deltas"
    memory = {row["what"]: row["bytes"] for row in plan.memory}
    assert memory["held updates"] == 8 * (20 + 15)


@pytest.mark.parametrize("field", ["weight_norm", "limits"])
def test_negative_limits_are_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="cannot be negative: -1"):
        TrustRatio.model_validate({field: Range(-1.0, 1.0)})
    found = trainc.check(f"{ADAMW} lr trust_ratio {{ {field} = -1..1 }}")
    (problem,) = found.diagnostics
    assert problem.labels


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        ("", "missing-clause"),
        ('optimizer adamw { lr = 0.01, freeze = "first.*" }', "selector-matches-frozen"),
    ],
)
def test_what_no_optimizer_trains_is_refused(optimizer: str, rule: str) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f'loss mse {optimizer} lr trust_ratio on "first.weight"', net())
    (problem,) = error.value.diagnostics
    assert problem.rule == rule
    assert problem.labels


def test_two_clauses_may_not_scale_one_parameter() -> None:
    with pytest.raises(trainc.SpecError, match="two `lr trust_ratio` clauses select"):
        trainc.plan(f"{ADAMW} lr trust_ratio lr trust_ratio as other {{ limits = 0..1 }}", net())


SHARDED = {"adamw": "update", "sgd": "update", "sgd of gradients": "gradient"}


def sharded_spec(case: str) -> str:
    clause = f"loss mse optimizer {case.split()[0]} {{ lr = 0.01, weight_decay = 0.1 }}"
    ratio = f"lr trust_ratio {{ of = {SHARDED[case]} }}"
    return f"{clause} {ratio} lr layer_decay on all {{ decay = 0.9 }}"


def shard(rank: int) -> Any:
    """Train on one half of every batch, sharded by FSDP2; run as a process of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for optimizer in SHARDED:
        own: Any = net()
        fully_shard(own, mesh=init_device_mesh("cpu", (2,)))
        program = trainc.compile(sharded_spec(optimizer), own, executor="module")
        for seed in range(4):
            x, y = data(seed)
            program.step((x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]))
        found[optimizer] = {
            "weights": {name: p.full_tensor().detach() for name, p in own.named_parameters()},
            "ratios": ratios(program),
        }
    return found


def test_sharded_parameters_are_scaled_by_their_whole_norms(tmp_path: Path) -> None:
    replicas = run_processes(__file__, 2, tmp_path)
    for optimizer in SHARDED:
        alone = compiled(sharded_spec(optimizer))
        for seed in range(4):
            alone.step(data(seed))
        for found in (replica[optimizer] for replica in replicas):
            assert found["ratios"] == pytest.approx(ratios(alone), rel=1e-9)
            for name, weight in weights(alone).items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-12)


def test_limits_of_one_are_nothing() -> None:
    assert TrustRatio(limits=Range(1.0, 1.0)).identity_setting() == "limits = 1..1"
    assert not TrustRatio(limits=Range(0.0, 1.0)).identity_setting()


if __name__ == "__main__":
    run_rank(shard)
