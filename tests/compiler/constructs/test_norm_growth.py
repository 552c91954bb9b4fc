"""Norm growth against its definitions, and against weights whose growth has a closed form."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn

import trainc
from tests.compiler.observed_weights import machine as machine_of
from tests.compiler.observed_weights import net, noise, update, weights
from trainc.compiler.constructs.observe.weights._copies import Copies
from trainc.compiler.constructs.observe.weights._laws import LAWS, Fit
from trainc.compiler.constructs.observe.weights.norm_growth import NormGrowth
from trainc.compiler.errors import FieldError
from trainc.runtime.report.run_records import RecordedClause, RunRecords
from trainc.runtime.report.student_t import student_t_quantile
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.machine import StepMachine


def machine(
    net: nn.Module, construct: NormGrowth, every: int | None = None, only: str = ""
) -> StepMachine:
    """Return the machine of an observer of the parameters with `only` in their names."""
    return machine_of(net, construct, "ng", every, only=only)


def test_measures_are_their_definitions_per_selection_and_per_parameter() -> None:
    construct = NormGrowth()
    m = machine(net(), construct)
    update(m, noise)
    before = weights(m)
    step = update(m, noise)
    now = weights(m)
    expected = construct.reference(before, now)
    assert {name: step.metrics[f"ng.{name}"] for name in expected} == pytest.approx(expected, 1e-6)
    assert {name: step.signals[f"ng.{name}"] for name in expected} == pytest.approx(expected, 1e-6)
    for i, parameter in enumerate(m.parameters):
        one = construct.reference(before[i : i + 1], now[i : i + 1])
        found = {name: step.series[f"ng.{name}"][parameter] for name in one}
        assert found == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_the_change_is_that_since_the_observation_before() -> None:
    m = machine(net(), NormGrowth(), every=3)
    first = update(m, noise)
    before = weights(m)
    assert set(first.series) == {"ng.norm"}
    steps = [update(m, noise) for _ in range(3)]
    assert [bool(step.series) for step in steps] == [False, False, True]
    expected = NormGrowth().reference(before, weights(m))
    assert steps[-1].metrics["ng.step"] == pytest.approx(expected["step"], rel=1e-6)


def test_observing_changes_no_weight_and_no_random_number() -> None:
    results = []
    for observed in (False, True):
        m = machine(net(), NormGrowth()) if observed else None
        m = m or StepMachine([], Clock(), dict(net().named_parameters()))
        torch.manual_seed(1)
        for _ in range(4):
            update(m, noise)
        results.append(weights(m))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_that_step_along_themselves_are_aligned_and_grow_exponentially() -> None:
    torch.manual_seed(0)
    m = machine(net().double(), NormGrowth())
    norms = []
    for t in range(1, 200):
        step = update(m, lambda w, t=t: w * (math.exp(math.sqrt(t) - math.sqrt(t - 1)) - 1))
        norms.append(step.metrics["ng.norm"])
    assert step.metrics["ng.alignment"] == pytest.approx(1.0)
    assert step.metrics["ng.direction"] == pytest.approx(1.0)
    logs = [math.log(norm / norms[0]) for norm in norms]
    assert logs == pytest.approx([math.sqrt(t) - 1 for t in range(1, 200)], abs=1e-9)


def test_steps_at_right_angles_give_the_root_of_time() -> None:
    """With |d|^2 = |w|^2 / t at right angles, |w_t|^2 = |w_0|^2 * (t + 1)."""
    torch.manual_seed(0)
    m = machine(net().double(), NormGrowth(), only="0.weight")
    weight = m.parameters["0.weight"]
    start = float(weight.detach().norm())
    for t in range(1, 300):
        direction = torch.randn_like(weight)
        direction -= (
            weight.detach() * (direction * weight.detach()).sum() / weight.detach().norm() ** 2
        )
        change = direction / direction.norm() * weight.detach().norm() / math.sqrt(t)
        step = update(m, lambda w, c=change: c if w is weight else 0.0)
        assert step.metrics["ng.norm"] == pytest.approx(start * math.sqrt(t + 1))
    assert abs(step.metrics["ng.alignment"]) < 1e-9
    # cos(w_t, w_{t-1}) = |w_{t-1}| / |w_t|
    assert step.metrics["ng.direction"] == pytest.approx(math.sqrt(299 / 300))
    assert step.metrics["ng.fit"] == step.metrics["ng.fit.sqrt"] > 0.9999
    assert step.metrics["ng.fit.sqrt"] > max(step.metrics[f"ng.fit.{f}"] for f in ("linear", "log"))
    summary = m.actions[-1].summary()
    assert summary
    assert "best fit sqrt" in summary


@pytest.mark.parametrize("law", LAWS)
def test_a_norm_that_follows_a_law_fits_it_exactly(law: str) -> None:
    m = machine(nn.Linear(1, 1, bias=False).double(), NormGrowth())
    for t in range(1, 30):
        step = update(m, lambda w, t=t: 2 + 3 * LAWS[law](t) - w)
    assert step.metrics["ng.norm"] == pytest.approx(2 + 3 * LAWS[law](29))
    fits = {name: step.metrics[f"ng.fit.{name}"] for name in LAWS}
    assert fits.pop(law) == pytest.approx(1, abs=1e-12)
    assert max(fits.values()) < 1 - 1e-6


def test_fits_begin_with_the_third_observation() -> None:
    m = machine(net(), NormGrowth())
    assert ["ng.fit" in update(m, noise).metrics for _ in range(4)] == [False, False, True, True]


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=3, max_size=40, unique=True
    )
)
def test_running_moments_give_the_r2_of_a_regression(points: list[tuple[float, float]]) -> None:
    fit = Fit()
    for x, y in points:
        fit.add(x, y)
    x, y = torch.tensor(points, dtype=torch.float64).T
    xx, yy = (x - x.mean()).square().sum(), (y - y.mean()).square().sum()
    if xx < 1e-6 or yy < 1e-6:
        return
    line = (x - x.mean()) * ((x - x.mean()) * (y - y.mean())).sum() / xx + y.mean()
    expected = float(1 - (y - line).square().sum() / yy)
    assert fit.r2 == pytest.approx(expected, abs=1e-9)


def test_resuming_is_bit_equal() -> None:
    def continued(m: StepMachine) -> list[dict[str, float]]:
        torch.manual_seed(5)
        return [update(m, noise).metrics for _ in range(6)]

    m = machine(net(), NormGrowth(), every=2)
    for _ in range(5):
        update(m, noise)
    saved, values = copy.deepcopy(m.state_dict()), weights(m)
    expected = continued(m)
    fresh = machine(net(1), NormGrowth(), every=2)
    fresh.load_state_dict(saved)
    with torch.no_grad():
        for parameter, value in zip(fresh.parameters.values(), values, strict=True):
            parameter.copy_(value)
    assert continued(fresh) == expected
    assert fresh.actions[-1].summary() == m.actions[-1].summary()


def test_copies_are_counted() -> None:
    size = sum(p.numel() * p.element_size() for p in net().parameters())

    def memory(m: StepMachine) -> list[int]:
        return [action.memory() for action in m.actions if isinstance(action, Copies)]

    assert memory(machine(net(), NormGrowth())) == [size]


def regression(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return the slope with the ends of its interval by definition: residuals, their correlation, Student's t."""
    design = torch.stack([torch.ones_like(x), x], 1)
    a, b = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    residual = y - a - b * x
    r = max(0.0, float((residual[1:] * residual[:-1]).sum() / residual.square().sum()))
    freedom = len(x) * (1 - r) / (1 + r) - 2
    error = (residual.square().sum() / freedom / (x - x.mean()).square().sum()).sqrt()
    apart = student_t_quantile(0.95, freedom) * float(error)
    return float(b), float(b) - apart, float(b) + apart


@pytest.mark.parametrize("drift", [0.0, 0.8, 0.97])
def test_the_interval_of_a_slope_is_that_of_a_regression_with_correlated_residuals(
    drift: float,
) -> None:
    drawn = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise, last = torch.zeros_like(drawn), 0.0
    for i in range(60):
        noise[i] = last = drift * last + float(drawn[i])
    x = torch.arange(1, 61, dtype=torch.float64).sqrt()
    y = 40 + 3 * x + noise
    fit = Fit()
    for one, other in zip(x.tolist(), y.tolist(), strict=True):
        fit.add(one, other)
    assert fit.interval is not None
    assert (fit.slope, *fit.interval) == pytest.approx(regression(x, y), rel=1e-8)


def test_independent_residuals_have_the_interval_of_the_textbook() -> None:
    """Of (1, 2, 3, 4, 5) and (1, 3, 2, 5, 4): slope 0.8, residual sum 3.6, standard error sqrt(1.2 / 10)."""
    fit = Fit()
    for x, y in enumerate((1.0, 3.0, 2.0, 5.0, 4.0), start=1):
        fit.add(float(x), y)
    assert fit.correlation == 0  # neighbours are on opposite sides
    apart = 3.182446 * math.sqrt(1.2 / 10)  # Student's t, 3 degrees of freedom
    assert fit.interval == pytest.approx((0.8 - apart, 0.8 + apart), rel=1e-6)


def test_residuals_that_all_follow_each_other_have_no_interval() -> None:
    fit = Fit()
    for t in range(1, 31):
        fit.add(float(t), float(t * t))
    assert fit.r2 is not None
    assert fit.interval is None


def test_the_slope_is_that_of_the_best_law() -> None:
    m = machine(nn.Linear(1, 1, bias=False).double(), NormGrowth())
    torch.manual_seed(0)
    for t in range(1, 40):
        shift = 1e-3 * float(torch.randn(()))
        step = update(m, lambda w, t=t, shift=shift: 2 + 3 * math.sqrt(t) + shift - w)
    found = {name: step.signals[f"ng.{name}"] for name in ("slope", "slope_low", "slope_high")}
    assert found["slope_low"] < 3 < found["slope_high"]
    assert found["slope"] == pytest.approx(3, rel=1e-2)
    assert f"slope {found['slope']:.4g} [" in (m.actions[-1].summary() or "")


class Encoder(nn.Module):
    """What has an embedding, a block, a head and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scale = nn.Parameter(torch.ones(()))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) * self.scale
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.head(self.norm(h))
        return out


def test_the_encoder_is_without_embeddings_the_head_and_scalars() -> None:
    m = machine(Encoder(), NormGrowth(params="encoder"))
    step = update(m, noise)
    assert [*step.series["ng.norm"]] == [
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")),
        "norm.weight",
        "norm.bias",
    ]
    with pytest.raises(FieldError, match="in embeddings or the head"):
        machine(Encoder(), NormGrowth(params="encoder"), only="embed")


def test_pictures_and_the_table_are_of_the_recorded_norms() -> None:
    records = [
        {"step": t, "loss": 1.0, "ng.norm": 3 - math.sqrt(t), "ng.alignment": 0.1}
        for t in range(1, 30)
    ]
    (table,) = NormGrowth().tables("ng", records)
    assert ("sqrt", "1.0000", "-1 [-1, -1]") in table.rows
    runs = [RunRecords(name, records, "#000000") for name in ("a", "b")]
    clauses = [RecordedClause(run, "ng", NormGrowth()) for run in runs]
    for some in (1, 2):
        norm, cosines = NormGrowth.panels(clauses[:some], runs[:some])
        axes = Figure().add_subplot()
        norm.draw(axes)
        assert len(axes.lines) == (5 if some == 1 else 4)  # all laws of one run, the best of two
        cosines.draw(Figure().add_subplot())
    assert [*NormGrowth().tables("ng", records[:2])] == []


def test_still_weights_have_no_alignment() -> None:
    m = machine(net(), NormGrowth())
    for _ in range(4):
        step = update(m, lambda w: 0.0)
    assert step.metrics["ng.alignment"] == step.metrics["ng.step"] == 0.0
    assert step.metrics["ng.direction"] == pytest.approx(1.0)
    assert "ng.fit" not in step.metrics


def test_weights_that_are_not_finite_are_named_and_spoil_no_fit() -> None:
    m = machine(net(), NormGrowth())
    for _ in range(4):
        update(m, noise)
    step = update(m, lambda w: math.nan if w.dim() == 2 else 0.0)
    assert math.isnan(step.metrics["ng.norm"])
    assert "`0.weight` and 1 more" in step.notes[0]
    assert math.isfinite(step.metrics["ng.fit"])


def test_bfloat16_weights_are_observed_in_their_own_dtype() -> None:
    construct = NormGrowth()
    m = machine(net().bfloat16(), construct)
    update(m, noise)
    before = weights(m)
    step = update(m, noise)
    expected = construct.reference(before, weights(m))
    found = {name: step.metrics[f"ng.{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=0.01, abs=0.01)


def test_a_checkpoint_of_other_parameters_is_refused() -> None:
    m = machine(net(), NormGrowth(), only="weight")
    update(m, noise)
    with pytest.raises(ValueError, match=r"0\.bias"):
        machine(net(), NormGrowth()).load_state_dict(m.state_dict())


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the measures of two training steps, by the program and by definition."""
    model = net().double()
    spec = "loss mse optimizer sgd { lr = 0.1 } observe norm_growth on all every 1 steps"
    program = trainc.compile(spec, model)
    batch = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    program.step(batch)
    before = [p.detach().clone() for p in model.parameters()]
    program.step(batch)
    want = NormGrowth().reference(before, [p.detach() for p in model.parameters()])
    got = {name: program.signals[f"norm_growth.{name}"] for name in want}
    as_tensors = [
        {n: torch.tensor(x, dtype=torch.float64) for n, x in d.items()} for d in (got, want)
    ]
    return as_tensors[0], as_tensors[1]
