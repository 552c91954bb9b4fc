"""TempBalance against the published code and the definition; its spectra have their own tests."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.lr.temp_balance import TempBalance
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.dsl.text.render import render_text
from trainc.dsl.values import value_json as v
from trainc.dsl.values.value_json import Range
from trainc.functional import balance, calibrated_alpha, hill_alpha, null_alpha, spread_gain
from trainc.kernels.parameter.spectral_null import null_law
from trainc.kernels.parameter.spectrum import alphas
from trainc.runtime.factors.action import BalanceFactors
from trainc.runtime.factors.maps import Map
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step

REFERENCE = json.loads((Path(__file__).parents[2] / "reference/layer_rates.json").read_text())


def published(**fields: Any) -> TempBalance:
    """Return the clause as published: it follows alpha itself, all of its spread."""
    return TempBalance(metric="alpha", shrink=False, split="whole", **fields)


def mlp() -> nn.Module:
    pairs = enumerate(pairwise([64, 256, 128, 96, 80]), start=1)
    layers = {f"fc{i}": nn.Linear(*pair) for i, pair in pairs}
    return nn.ModuleDict(layers | {"head": nn.Linear(80, 10)})


def convnet() -> nn.Module:
    layers: dict[str, nn.Module] = {}
    for i, (a, b, k) in enumerate([(3, 16, 3), (16, 32, 3), (32, 64, 3), (64, 64, 1)], start=1):
        layers |= {f"conv{i}": nn.Conv2d(a, b, k, bias=False), f"bn{i}": nn.BatchNorm2d(b)}
    return nn.ModuleDict(layers | {"norm5": nn.BatchNorm2d(64), "fc": nn.Linear(64, 100)})


def filled(case: dict[str, Any]) -> nn.Module:
    """Return the case's network with the weights of the reference's recipe."""
    net = {"MLP": mlp, "ConvNet": convnet}[case["net"]]()
    random = np.random.RandomState(case["seed"])
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            shape = tuple(parameter.shape)
            if parameter.ndim < 2:
                drawn = random.standard_normal(shape) * 0.01
            else:
                drawn = (
                    random.standard_normal(shape) if i % 2 else random.standard_t(3.0, shape)
                ) * 0.05
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return net


def measured(bench: "Bench", steps: int) -> list[int]:
    return [i for i in range(steps) if bench.step().series]


class Bench:
    """A clause lowered onto a network, its step machine, and the factors its parameters get."""

    def __init__(
        self,
        net: nn.Module,
        construct: TempBalance,
        only: str = "",
        leave: tuple[str, ...] = ("norm", "bn"),
        **timing: Any,
    ) -> None:
        inventory, self.lowered = build_inventory(net), LoweredMethod()
        self.net = net
        names = tuple(
            p.name
            for p in inventory.parameters
            if only in p.name and not any(part in p.name for part in leave)
        )
        clause = BoundClause(construct, "tb", names, **timing)
        construct.lower(
            Lowering(
                clause,
                LoweringContext(net, inventory, UnitConversion(), None, Signals()),
                self.lowered,
            )
        )
        self.machine = StepMachine(self.lowered.actions, Clock(), dict(net.named_parameters()))
        (action,) = self.machine.actions
        assert isinstance(action, BalanceFactors)
        self.action = action

    def step(self) -> Step:
        self.machine.begin()
        return self.machine.finish()

    def factors(self) -> dict[str, float]:
        lr_factors = self.lowered.lr_factors
        return {
            name: math.prod(lr_factor.factor for lr_factor in lr_factors.get(name, []))
            for name, _ in self.net.named_parameters()
        }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mlp_default", {"skip_first": True, "skip_last": True}),
        ("mlp_keep_all_thresh0", {"min_eigenvalues": 3}),
        ("conv_order_bn", {"skip_first": True, "skip_last": True}),
    ],
)
def test_rates_are_those_of_the_published_code(name: str, fields: dict[str, Any]) -> None:
    case = REFERENCE["scheduler"]["cases"][name]
    bench = Bench(filled(case), published(**fields, follow=True), leave=())
    step = bench.step()
    for module, alpha in step.series["tb.alpha"].items():
        assert alpha == pytest.approx(case["alpha_all_layers"][module], rel=1e-4)
    factors = bench.factors()
    for group in case["groups"]:
        # In the published code a norm after a norm follows nothing.
        for parameter in [p for p in group["params"] if not p.startswith("norm5")]:
            assert factors[parameter] * case["base_lr"] == pytest.approx(group["lr"], rel=1e-3), (
                parameter
            )


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.5), (0.6, 1.4), (1.0, 5.0)])
def test_the_map_is_that_of_the_published_code(low: float, high: float) -> None:
    known = REFERENCE["assign"]
    alphas = {str(i): alpha for i, alpha in enumerate(known["alphas"])}
    found = TempBalance(range=Range(low, high)).factors(alphas)
    rates = [factor * known["base_lr"] for factor in found.values()]
    assert rates == pytest.approx(known["tempbalance"][f"tb_linear_map_{low}_{high}"])


@pytest.mark.parametrize("map", ["sqrt", "log2", "step"])
def test_other_maps_are_those_of_the_published_code(map: Any) -> None:
    known = REFERENCE["assign"]
    found = balance(known["alphas"], known["base_lr"], map=map)
    assert found == pytest.approx(known["tempbalance"][f"tb_{map}_0.5_1.5"])
    assert found == pytest.approx(
        [0.1 * f for f in TempBalance(map=map).factors(dict(enumerate(known["alphas"]))).values()]  # type: ignore[arg-type]
    )


def test_the_sigmoid_is_the_formula_with_a_strength_for_each_side() -> None:
    alphas = [1.5, 2.0, 2.2, 3.4]
    mean = sum(alphas) / 4
    strengths = [2.0 if alpha <= mean else 1.0 for alpha in alphas]
    want = [
        10 ** (s * (1 / (1 + math.exp(-10 * (a - mean))) - 0.5))
        for s, a in zip(strengths, alphas, strict=True)
    ]
    found = balance(alphas, range=(0.1, math.sqrt(10)), map="sigmoid")
    assert found == pytest.approx(want)
    assert balance([0.0, 1e9], range=(0.1, 2), map="sigmoid") == pytest.approx([0.1, 2])


@pytest.mark.parametrize("map", get_args(Map))
def test_exponents_without_a_spread_or_a_number_leave_the_rate(map: Any) -> None:
    limits = (0.5, 1.5)
    for known in ([], [3.0], [3.0, 3.0, 3.0], [math.nan, 2.0], [math.nan, math.inf]):
        assert balance(known, 0.1, limits, map) == pytest.approx([0.1] * len(known))
    with_one = balance([2.0, math.nan, 4.0], 0.1, limits, map)
    assert with_one[1] == 0.1
    with pytest.raises(ValueError, match="steepness = -1"):
        balance([2.0, 4.0], steepness=-1)
    with pytest.raises(ValueError, match="above 0 for each figure"):
        spread_gain([2.0, 4.0], [0.1, 0.0])
    assert with_one[::2] == pytest.approx(balance([2.0, 4.0], 0.1, limits, map))


def test_modules_of_a_block_share_the_factor_of_their_mean() -> None:
    torch.manual_seed(2)
    net = gpt(layers=3, width=64, heads=2, context=8, vocabulary=70)
    bench = Bench(net, published(unit="block"), only="weight", leave=("embed", "ln"))
    step = bench.step()
    alphas_, factors = step.series["tb.alpha"], step.series["tb.lr_factor"]
    blocks = [[n for n in alphas_ if n.startswith(f"blocks.{i}.")] for i in range(3)]
    means = [sum(alphas_[n] for n in names) / len(names) for names in blocks]
    want = balance(means)
    for names, factor in zip(blocks, want, strict=True):
        assert len(names) == 4
        assert [factors[name] for name in names] == pytest.approx([factor] * 4)
    assert {factors[n] for n in factors if not n.startswith("blocks.")} == {1.0}


def test_controls_change_what_the_factors_follow_and_nothing_else() -> None:
    plain = Bench(same_size(5), published()).step()
    alphas_, factors = plain.series["tb.alpha"], plain.series["tb.lr_factor"]
    mirrored = Bench(same_size(5), published(control="reversed")).step()
    assert mirrored.series["tb.alpha"] == alphas_
    for name, factor in mirrored.series["tb.lr_factor"].items():
        assert factor == pytest.approx(2.0 - factors[name])
    seen = []
    for _ in range(2):
        bench = Bench(same_size(5), published(control="permuted"), every=TimeSpan(1, "steps"))
        first, second = bench.step(), bench.step()
        assert first.series["tb.alpha"] == alphas_
        for step in (first, second):
            found = step.series["tb.lr_factor"]
            assert sorted(found.values()) == pytest.approx(sorted(factors.values()))
            assert all(found[name] != pytest.approx(factors[name]) for name in found)
        assert first.series["tb.lr_factor"] != second.series["tb.lr_factor"]
        seen.append([first.series["tb.lr_factor"], second.series["tb.lr_factor"]])
    assert seen[0] == seen[1]


def test_a_static_control_keeps_the_factors_of_the_first_measurement() -> None:
    net = same_size(4)
    bench = Bench(net, published(control="static"), every=TimeSpan(1, "steps"))
    first = bench.step()
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(torch.randn(64, 64) ** 5)
    second = bench.step()
    assert second.series["tb.alpha"] != first.series["tb.alpha"]
    assert second.series["tb.lr_factor"] == first.series["tb.lr_factor"]


def test_a_static_control_waits_for_a_spread_that_is_more_than_noise() -> None:
    bench = Bench(same_size(4), TempBalance(control="static"), every=TimeSpan(1, "steps"))
    assert set(bench.step().series["tb.lr_factor"].values()) == {1.0}
    bench.net.load_state_dict(heavy(4).state_dict())
    found = bench.step().series["tb.lr_factor"]
    assert found == Bench(heavy(4), TempBalance()).step().series["tb.lr_factor"]
    assert set(found.values()) != {1.0}
    bench.net.load_state_dict(same_size(4, seed=1).state_dict())
    assert bench.step().series["tb.lr_factor"] == found


def test_what_can_never_move_a_factor_is_an_error() -> None:
    spec = "loss cross_entropy optimizer adamw { lr = 1e-3 } lr temp_balance on ndim(2)"
    with pytest.raises(trainc.SpecError, match=r"no-effect.*factors stay 1: between"):
        trainc.compile(f"{spec} {{ hysteresis = 0.5 }}", same_size(3))
    trainc.compile(f"{spec} {{ hysteresis = 0.49 }}", same_size(3))


def test_a_figure_that_a_map_has_no_factor_for_is_told_with_the_clause() -> None:
    bench = Bench(same_size(3), TempBalance(metric="spectral_norm", map="log2"))
    with torch.no_grad():
        next(bench.net.parameters()).mul_(1e-3)
    with pytest.raises(ValueError, match="tb: map = 'log2' needs figures above 1, and one is"):
        bench.step()


def test_what_a_field_freezes_takes_no_part() -> None:
    """The smallest and the largest alpha are those of modules that train."""
    net = heavy(4)
    spec = "loss cross_entropy optimizer adamw { lr = 1e-3%s } lr temp_balance on ndim(2)"
    names = [name for name, p in net.named_parameters() if p.ndim == 2]
    program = trainc.compile(spec % f', freeze = "{names[0]}"', net)
    assert list(program.begin().series["temp_balance.alpha"]) == ["1", "2", "3"]


def test_equal_figures_are_told() -> None:
    net = same_size(3)
    for i in range(3):
        net.get_submodule(str(i)).load_state_dict(net.get_submodule("0").state_dict())
    bench = Bench(net, published())
    assert "all have the same, so that all factors are 1" in bench.step().notes[0]
    assert set(bench.factors().values()) == {1.0}
    assert not bench.step().notes


def test_a_single_block_is_told() -> None:
    net = gpt(layers=1, width=64, heads=2, context=8, vocabulary=70)
    spec = "loss cross_entropy optimizer adamw { lr = 1e-3 }"
    clause = 'lr temp_balance on "blocks.**" & ndim(2) { unit = block }'
    warnings = trainc.compile(f"{spec} {clause}", net).plan.warnings
    assert "needs two blocks that can be measured, but the selection has 1" in render_text(warnings)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("range = 2..3, map = sigmoid", "limits on both sides of 1"),
        ("map = sqrt, range = 0.5..1.5", "has no `range`"),
        ("fit = dks, xmin_pos = 3", "are of `fit = median`, not `dks`"),
        ("fit = mode", "median"),
        ("map = cubic", "linear"),
        ("fit = dks, metric = calibrated", "write `metric = alpha`"),
        ("fit = peak, shrink = true", "remove `shrink = true`"),
        ("ramp = 0 steps", "a ramp needs a duration above 0"),
        ("limits = -1..1", "cannot be negative"),
        ("metric = entropy, map = log2", "`entropy` is at most 1"),
        ("xmin_pos = 1.01", "leaves no eigenvalue above the threshold"),
    ],
)
def test_fields_of_another_map_or_fit_are_refused(fields: str, said: str) -> None:
    spec = trainc.check(f"loss mse\noptimizer sgd {{ lr = 0.1 }}\nlr temp_balance {{ {fields} }}")
    assert said in render_text(spec.errors)


@pytest.mark.parametrize("fit", ["dks", "peak"])
def test_factors_of_other_fits_are_the_definition(fit: Any) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(70, 60), nn.Conv2d(20, 12, 3), nn.Linear(64, 90))
    construct = TempBalance(fit=fit, map="log2")
    bench = Bench(net, construct)
    step = bench.step()
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in "012"}
    assert step.series["tb.lr_factor"] == pytest.approx(construct.reference(weights), rel=1e-3)


@pytest.mark.parametrize("case", ["tb_linear_map all equal [3,3,3]", "tb_linear_map single [3]"])
def test_without_a_spread_nothing_is_scaled_unlike_in_the_published_code(case: str) -> None:
    published = REFERENCE["assign"]["edge_cases"][case]
    found = TempBalance().factors({str(i): 3.0 for i in range(len(published))})
    assert set(found.values()) == {1.0}
    assert published != [REFERENCE["assign"]["base_lr"]] * len(published)


def heavy(layers: int = 4) -> nn.Module:
    """Return layers of one size whose tails differ far more than those of random weights do."""
    net = same_size(layers)
    with torch.no_grad():
        for i, p in enumerate(p for p in net.parameters() if p.ndim == 2):
            p.mul_(torch.logspace(-2 * i, 0, 64)[:, None])
    return net


def same_size(layers: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_factors_are_the_definition(convention: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 60), nn.Conv2d(20, 12, 3), nn.Linear(64, 90))
    construct = published(range=Range(0.2, 3), convention=convention, xmin_pos=1.5)
    bench = Bench(net, construct)
    step = bench.step()
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in "012"}
    expected = construct.reference(weights)
    assert step.series["tb.lr_factor"] == pytest.approx(expected, rel=1e-3)
    assert bench.factors()["1.bias"] == bench.factors()["1.weight"]
    assert sorted(expected.values())[::2] == [pytest.approx(0.2), pytest.approx(3)]


def test_signals_tell_mean_and_spread_and_an_unselected_bias_keeps_its_rate() -> None:
    bench = Bench(same_size(), published(), only="weight")
    step = bench.step()
    assert {f for n, f in bench.factors().items() if n.endswith("bias")} == {1.0}
    values = torch.tensor(list(step.series["tb.alpha"].values()), dtype=torch.float64)
    assert step.signals["tb.alpha"] == pytest.approx(float(values.mean()))
    assert step.signals["tb.spread"] == pytest.approx(float(values.std(correction=0)))


def test_measured_as_often_as_the_clause_says_else_every_100_steps() -> None:
    every = TimeSpan(3, "steps")
    assert measured(Bench(same_size(), TempBalance(), every=every), 8) == [0, 3, 6]
    assert measured(Bench(same_size(), TempBalance()), 205) == [0, 100, 200]
    start = TimeSpan(7, "steps")
    assert measured(Bench(same_size(), TempBalance(), start=start), 120) == [7, 100]


def test_after_the_window_the_last_factors_hold() -> None:
    stop, every = TimeSpan(4, "steps"), TimeSpan(2, "steps")
    bench = Bench(same_size(), published(), stop=stop, every=every)
    assert measured(bench, 4) == [0, 2]
    before = bench.factors()
    assert measured(bench, 6) == []
    assert bench.factors() == before
    assert set(before.values()) != {1.0}


def test_resuming_is_bit_equal_between_measurements() -> None:
    every = TimeSpan(4, "steps")
    bench = Bench(same_size(), published(smooth=0.5), every=every)
    for _ in range(6):
        bench.step()
    saved = copy.deepcopy(bench.machine.state_dict())
    fresh = Bench(same_size(), published(smooth=0.5), every=every)
    fresh.machine.load_state_dict(saved)
    assert fresh.factors() == bench.factors()
    with torch.no_grad():
        for net in (bench.net, fresh.net):
            torch.manual_seed(3)
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert [s.series for s in (fresh.step(), fresh.step(), fresh.step())] == [
        s.series for s in (bench.step(), bench.step(), bench.step())
    ]
    assert fresh.factors() == bench.factors()
    assert fresh.action.summary() == bench.action.summary()


def test_a_checkpoint_of_other_modules_is_refused() -> None:
    bench = Bench(same_size(5), published())
    bench.step()
    with pytest.raises(ValueError, match="has a factor for `4`, which this clause does not select"):
        Bench(same_size(4), published()).machine.load_state_dict(bench.machine.state_dict())
    # One from before the first measurement undoes the factors.
    bench.machine.load_state_dict(Bench(same_size(5), published()).machine.state_dict())
    assert set(bench.factors().values()) == {1.0}


def test_smoothing_keeps_a_share_of_the_exponent_before() -> None:
    every = TimeSpan(1, "steps")
    bench = Bench(same_size(), published(smooth=0.25), every=every)
    first = bench.step().series["tb.alpha"]
    with torch.no_grad():
        bench.net.get_parameter("0.weight")[:, :16] *= 30
    (now,) = alphas([bench.net.get_parameter("0.weight")])
    second = bench.step().series["tb.alpha"]
    assert second["0"] == pytest.approx(0.25 * first["0"] + 0.75 * now)
    assert second["1"] == first["1"]


def test_a_weight_that_cannot_be_measured_keeps_its_rate_and_is_named_once() -> None:
    every = TimeSpan(1, "steps")
    bench = Bench(same_size(), published(), every=every)
    with torch.no_grad():
        bench.net.get_parameter("1.weight").zero_()
    notes = [bench.step().notes, bench.step().notes]
    assert [len(found) for found in notes] == [1, 0]
    assert "`1.weight`" in notes[0][0]
    assert bench.factors()["1.weight"] == 1.0
    assert {0.5, 1.5} <= set(bench.factors().values())


def test_copies_of_one_layer_have_no_spread_whatever_the_arithmetic_makes_of_them() -> None:
    net = same_size()
    common = torch.randn(64, 64)
    with torch.no_grad():
        for i in range(4):
            rotation = torch.linalg.qr(torch.randn(64, 64))[0]
            net.get_parameter(f"{i}.weight").copy_(rotation @ common)
    bench = Bench(net, published())
    bench.step()
    assert set(bench.factors().values()) == {1.0}


def test_few_eigenvalues_leave_a_module_at_its_rate_and_the_summary_says_so() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 80), nn.Linear(80, 10))
    bench = Bench(net, TempBalance())
    step = bench.step()
    assert set(step.series["tb.lr_factor"]) == {"0", "1"}
    assert bench.factors()["2.weight"] == 1.0
    summary = bench.action.summary()
    assert str(summary).endswith("factor 1: 2 (10 eigenvalues)")
    assert ", measured 1x, " in str(summary)


def problems(net: nn.Module, *names: str, **fields: Any) -> list[tuple[str, str]]:
    inventory = build_inventory(net)
    chosen = tuple(p for p in inventory.parameters if not names or p.name in names)
    found = TempBalance(**fields).validate_targets(Targets(inventory, (), chosen))
    return [(problem.rule, problem.severity) for problem in found]


def test_what_has_no_spectrum_may_not_be_selected() -> None:
    net = nn.ModuleDict(
        {"embed": nn.Embedding(80, 64), "norm": nn.LayerNorm(64), "fc": same_size()}
    )
    assert problems(net) == [("wrong-target-kind", "error")]
    assert problems(net, "fc.0.weight", "fc.0.bias", "fc.1.weight") == []
    assert problems(net, "fc.0.bias", "fc.1.weight", "fc.2.weight") == [
        ("wrong-target-kind", "error")
    ]
    table = nn.Module()
    table.bias = nn.Parameter(torch.randn(1, 4, 64))
    assert problems(nn.ModuleDict({"a": table, "fc": same_size()})) == [
        ("wrong-target-kind", "error")
    ]


def test_fewer_than_two_measured_modules_are_told_to_do_nothing() -> None:
    assert problems(same_size(1)) == [("no-effect", "warning")]
    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert problems(small) == [("no-effect", "warning")]
    assert problems(small, min_eigenvalues=8) == []


def test_matrices_of_one_module_are_measured_each_for_itself() -> None:
    bench = Bench(nn.GRU(64, 64), TempBalance())
    step = bench.step()
    assert set(step.series["tb.lr_factor"]) == {"weight_ih_l0", "weight_hh_l0"}
    assert bench.factors()["bias_ih_l0"] == 1.0


@pytest.mark.parametrize("wrong", [{"range": Range(-1, 1)}, {"xmin_pos": 1}, {"smooth": 1}])
def test_fields_have_bounds_and_a_range_of_one_is_the_identity(wrong: dict[str, Any]) -> None:
    assert TempBalance(range=Range(1, 1)).identity_setting()
    assert not TempBalance().identity_setting()
    with pytest.raises(ValidationError):
        TempBalance(**wrong)


@pytest.mark.parametrize(
    "shapes",
    [[(64, 64)] * 5, [(256, 64), (64, 192), (64, 64), (96, 160)], [(64, 32, 3, 3), (64, 64)]],
)
def test_random_weights_of_any_shape_leave_the_rates_near_their_base(shapes: Any) -> None:
    torch.manual_seed(4)
    kinds = [nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], 3) for s in shapes]
    bench = Bench(nn.Sequential(*kinds), TempBalance(range=Range(0.1, 10)), only="weight")
    step = bench.step()
    assert step.series["tb.alpha"].values() == pytest.approx([2.1217] * len(shapes), abs=0.2)
    assert step.signals["tb.gain"] == 0.0
    assert set(bench.factors().values()) == {1.0}
    plain = Bench(nn.Sequential(*kinds), published(range=Range(0.1, 10)), only="weight")
    assert {0.1, 10.0} <= {round(f, 9) for f in plain.step().series["tb.lr_factor"].values()}


def test_clearly_heavy_tails_give_the_published_factors() -> None:
    """Of one shape the calibrated exponent is alpha on another scale, which the linear map does not see."""
    step, plain = Bench(heavy(), TempBalance()).step(), Bench(heavy(), published()).step()
    assert 0.95 < step.signals["tb.gain"] < 1
    factors = plain.series["tb.lr_factor"]
    assert step.series["tb.lr_factor"] == pytest.approx(factors, abs=0.03)
    assert {0.5, 1.5} <= set(factors.values())


def test_the_gain_is_the_formula_whatever_the_factors_follow() -> None:
    weights = {n: p for n, p in heavy().named_parameters() if p.ndim == 2}
    assert [calibrated_alpha(null_law(s)[0], s) for s in [(64, 64), (8, 99), (9, 9, 3, 3)]] == (
        pytest.approx([1 + null_alpha(1.0) - 1] * 3)
    )
    levels = [calibrated_alpha(hill_alpha(w), tuple(w.shape)) for w in weights.values()]
    noise = 2.1 * (null_alpha(1.0) - 1) / (64 * math.sqrt(0.5)) * 31.5 / 32
    q = sum((x - sum(levels) / 4) ** 2 for x in levels) / noise**2
    want = 1 - 11.345 / q  # the 99 % quantile of chi-squared with 3 degrees of freedom
    for fields in ({}, {"metric": "alpha"}, {"control": "reversed"}, {"map": "sigmoid"}):
        found = Bench(heavy(), TempBalance(**fields | {"range": Range(0.5, 2)})).step()  # type: ignore[arg-type]
        assert 1 - found.signals["tb.gain"] == pytest.approx(1 - want, rel=0.01)


def test_norms_follow_and_embeddings_get_the_highest_factor() -> None:
    torch.manual_seed(0)
    net = gpt(layers=2, width=64, heads=2, context=8, vocabulary=70)
    top = 'type(Embedding) | "head"'
    bench = Bench(
        net, published(range=Range(1, 5), highest=top, follow=True, control="reversed"), leave=()
    )
    step = bench.step()
    factors, series = bench.factors(), step.series["tb.lr_factor"]
    assert max(series.values()) == series[top] == 5.0
    assert top not in step.series["tb.alpha"]
    assert factors["embed.token.weight"] == factors["head.weight"] == 5.0
    for name, module in {
        "blocks.0.ln1.weight": "blocks.0.attn.qkv",
        "blocks.0.ln2.bias": "blocks.0.attn.proj",
        "blocks.1.ln1.weight": "blocks.1.attn.qkv",
        "ln_f.weight": "blocks.1.mlp.proj",
        "blocks.1.mlp.fc.bias": "blocks.1.mlp.fc",
    }.items():
        assert factors[name] == series[module]
    assert len({series[f"blocks.{i}.attn.qkv"] for i in range(2)}) == 2


def test_the_plan_says_where_which_factors_go() -> None:
    net = gpt(layers=2, width=64, heads=2, context=8, vocabulary=70)
    spec = "loss cross_entropy optimizer adamw { lr = 1e-3 }"
    clause = 'lr temp_balance on "blocks.**" & ndim(2) { unit = block, range = 1.2..3 }'
    rows = {row["name"]: row for row in trainc.compile(f"{spec} {clause}", net).plan.parameters}
    row = rows["blocks.1.mlp.fc.weight"]
    assert (row["lr_units"], row["lr_values"]) == (["block 2"], ["1..3"])
    assert rows["head.weight"]["lr_factors"] == rows["blocks.1.mlp.fc.bias"]["lr_factors"] == []
    for fields, want in [
        ({"normalize": True}, None),
        ({"map": "log2", "limits": Range(0.5, 4)}, (0.5, 4.0)),
        ({"range": Range(0.2, 3), "limits": Range(0.5, 2)}, (0.5, 2.0)),
    ]:
        assert TempBalance(**fields).bounds == want  # type: ignore[arg-type]


def test_modules_of_one_type_share_the_factor_of_their_mean() -> None:
    torch.manual_seed(2)
    net = gpt(layers=3, width=64, heads=2, context=8, vocabulary=70)
    bench = Bench(net, published(unit="type"), only="weight", leave=("embed", "ln"))
    step = bench.step()
    alphas_, factors = step.series["tb.alpha"], step.series["tb.lr_factor"]
    kinds = ["attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"]
    names = [[f"blocks.{i}.{kind}" for i in range(3)] for kind in kinds] + [["head"]]
    want = balance([sum(alphas_[n] for n in group) / len(group) for group in names])
    for group, factor in zip(names, want, strict=True):
        assert [factors[n] for n in group] == pytest.approx([factor] * len(group))


def test_factors_ramp_on_after_the_window_and_resume_bit_equal() -> None:
    """One window of 4 steps with two measurements, and ramps of 5 steps, the second from where the first was."""
    times: dict[str, Any] = {"stop": TimeSpan(4, "steps"), "every": TimeSpan(3, "steps")}
    construct = published(ramp=v.Duration(5, "steps"), hysteresis=0.01)
    target = Bench(heavy(), published()).step().series["tb.lr_factor"]["0"]
    bench, seen = Bench(heavy(), construct, **times), []
    saved: dict[str, Any] = {}
    for i in range(10):
        bench.step()
        seen.append(bench.factors()["0.weight"])
        if i == 1:
            with torch.no_grad():
                order = [p for p in bench.net.parameters() if p.ndim == 2]
                first = order[0].detach().clone()
                order[0].copy_(order[1])
                order[1].copy_(first)
        if i == 5:
            saved = copy.deepcopy(bench.machine.state_dict())
    half = 1 + 3 / 5 * (target - 1)
    other = Bench(heavy(), published()).step().series["tb.lr_factor"]["1"]
    up = [1 + i / 5 * (target - 1) for i in range(4)]
    down = [half + i / 5 * (other - half) for i in range(1, 6)]
    assert seen == pytest.approx([*up, *down, other])
    fresh = Bench(bench.net, construct, **times)
    fresh.machine.load_state_dict(saved)
    for want in seen[6:]:
        fresh.step()
        assert fresh.factors()["0.weight"] == want


def test_a_factor_stays_until_another_differs_by_more_than_the_hysteresis() -> None:
    every = TimeSpan(1, "steps")
    bench = Bench(heavy(), published(hysteresis=0.2), every=every)
    free = Bench(bench.net, published(), every=every)
    before = bench.step().series["tb.lr_factor"]
    assert before == free.step().series["tb.lr_factor"] | {
        n: 1.0 for n, f in before.items() if f == 1
    }
    for part, moves in ((0.01, False), (10, True)):
        with torch.no_grad():
            w = bench.net.get_parameter("1.weight")
            w.add_(torch.randn_like(w) * w.std(), alpha=part)
        now, wanted = bench.step().series["tb.lr_factor"], free.step().series["tb.lr_factor"]
        assert wanted["1"] != before["1"]
        assert (abs(wanted["1"] - before["1"]) > 0.2) is moves
        assert now["1"] == (wanted["1"] if moves else before["1"])
        assert all(abs(now[n] - wanted[n]) <= 0.2 for n in now)


def test_normalized_factors_have_a_mean_of_one_and_limits_come_last() -> None:
    figures = {"a": 2.0, "b": 2.5, "c": 4.0}
    plain = TempBalance(range=Range(1, 5)).factors(figures)
    even = TempBalance(range=Range(1, 5), normalize=True).factors(figures)
    mean = sum(plain.values()) / 3
    assert even == pytest.approx({n: f / mean for n, f in plain.items()})
    cut = TempBalance(range=Range(1, 5), normalize=True, limits=Range(0.6, 1.5)).factors(figures)
    assert cut == {n: min(max(f, 0.6), 1.5) for n, f in even.items()}
    half = TempBalance(range=Range(1, 5)).factors(figures, gain=0.5)
    assert half == pytest.approx({n: 1 + 0.5 * (f - 1) for n, f in plain.items()})


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after one SGD step at rate 1, by the program and from singular values."""
    torch.manual_seed(0)
    pairs = pairwise([64, 80, 60, 96, 70])
    net = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairs)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn_like(p) * torch.rand(p.shape[1], dtype=p.dtype).pow(i + 1))
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    spec = "loss mse optimizer sgd { lr = 1 } lr temp_balance on all { range = 0.5..1.5 }"
    program = trainc.compile(spec, net)
    batch = torch.randn(4, 64, dtype=torch.float64), torch.randn(4, 70, dtype=torch.float64)
    program.loss(batch).backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    program.update()
    factors = TempBalance(range=Range(0.5, 1.5)).reference(start)
    reference = {name: w - factors[name] * gradients[name] for name, w in start.items()}
    return {name: p.detach() for name, p in net.named_parameters()}, reference
