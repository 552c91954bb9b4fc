"""The noise scale by other methods: groups, documents, per-example gradients, and calibration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.constructs.noise_scale.gns import Gns
from trainc.compiler.errors import SiteError
from trainc.runtime.noise_scale.action import NoiseScaleAction
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions

CASES = json.loads((Path(__file__).parents[2] / "reference/noise_scale.json").read_text())["cases"]
RUN = "loss cross_entropy optimizer {optimizer} {{ lr = {lr} }} run {{ length = 9 steps, seed = 4 }}\n"


class Small(nn.Module):
    """Tokens in, tokens out, one norm between; positions do not mix, so documents are independent."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = norm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.words(ids))))  # type: ignore[no-any-return]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


def made(kind: type[nn.Module] = Small, rows: int = 6) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(5)
    model = kind().double()
    if kind is Small:
        return model, torch.randint(7, (rows, 5)), torch.randint(7, (rows, 5))
    return model, torch.randn(rows, 2, 6, 6).double(), torch.randint(3, (rows,))


def compiled(model: nn.Module, clause: str, optimizer: str = "sgd", lr: float = 0.0) -> Any:
    return trainc.compile(RUN.format(optimizer=optimizer, lr=lr) + clause, model)


def gradients(model: nn.Module, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Return the part that some rows have in the gradient of the norm's and the head's parameters."""
    logits = model(x)
    loss = weight * F.cross_entropy(logits.flatten(0, -2), y.flatten())
    chosen = [p for n, p in model.named_parameters() if not n.startswith(("words", "conv"))]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])


@pytest.mark.parametrize("kind", [Small, Conv])
def test_micro_batches_are_compared(kind: type[nn.Module]) -> None:
    model, x, y = made(kind)
    on = 'all - "words" - "conv"'
    sizes = (1, 2, 3) if kind is Small else (2, 4)
    lowered = [
        gradients(model, a, b, len(a) / 6)
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
    ]
    model, x, y = made(kind)
    program = compiled(model, f"noise_scale gns on {on} {{ method = micro_batch }}")
    program.step(list(zip(x.split(sizes), y.split(sizes), strict=True)))
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in lowered),
        float(torch.stack(lowered).sum(0).square().sum()),
        sum((size / 6) ** 2 for size in sizes),
        1 / 6,
    )
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-9)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-9)


def test_replicas_of_one_process_are_refused() -> None:
    model, x, y = made()
    program = compiled(model, "noise_scale gns on all { method = replica }")
    with pytest.raises(
        SiteError, match="gradients of replicas are measured, but this process trains alone: wrap"
    ):
        program.step([(x[:3], y[:3]), (x[3:], y[3:])])


@pytest.mark.parametrize("on", ["all", "type(BatchNorm2d)"])
def test_groups_that_batch_norm_mixes_are_compared(on: str) -> None:
    model, x, y = made(Conv, rows=12)
    chosen = [p for n, p in model.named_parameters() if on == "all" or n.startswith("bn")]
    shares = []
    for rows in torch.arange(12).split(3):  # alone, a group is what BatchNorm normalizes over
        loss = F.cross_entropy(model(x[rows]), y[rows]) / 4
        shares.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]))
    running = [b.clone() for b in model.buffers()]
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        1 / 4,
        1 / 12,
    )
    model, _, _ = made(Conv, rows=12)
    program = compiled(model, f"noise_scale gns on {on} {{ method = ghost, group = 3 }}")
    program.step([(x[:6], y[:6]), (x[6:], y[6:])])
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-9)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-9)
    for found, wanted in zip(model.buffers(), running, strict=True):
        torch.testing.assert_close(found, wanted)


class Placed(Small):
    """Positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.norm(x)))  # type: ignore[no-any-return]


def test_groups_share_positions() -> None:
    torch.manual_seed(5)
    model, x, y = Placed().double(), torch.randint(7, (8, 5)), torch.randint(7, (8, 5))
    shares = []
    for rows in torch.arange(8).split(2):
        loss = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten()) / 4
        shares.append(torch.autograd.grad(loss, model.places.weight)[0].flatten())
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        1 / 4,
        1 / 8,
    )
    program = compiled(model, 'noise_scale gns on "places" { method = ghost, group = 2 }')
    program.step([(x[:4], y[:4]), (x[4:], y[4:])])
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-9)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-9)


def test_groups_are_whole() -> None:
    model, x, y = made(Conv, rows=8)
    program = compiled(model, "noise_scale gns on all { method = ghost, group = 3 }")
    with pytest.raises(SiteError, match="8 samples cannot be divided into groups of 3"):
        program.step((x, y))


def test_documents_inside_rows_are_examples() -> None:
    model, x, y = made()
    x = x.clamp(min=1)
    x[:, 2] = 0  # the first document of every row has three tokens
    y[1, 3:] = -100
    norm = list(model.norm.parameters())
    counted = (y >= 0).sum()
    shares, weights = [], []
    for row in range(6):
        for tokens in (slice(0, 3), slice(3, 5)):
            kept = (y[row, tokens] >= 0).sum()
            weights.append(float(kept / counted))
            loss = F.cross_entropy(model(x[row, tokens]), y[row, tokens], reduction="sum") / counted
            shares.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, norm)]))
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        sum(w * w for w in weights),
    )
    clause = 'noise_scale gns on "norm" { example = document, separator = 0 }'
    program = compiled(model, clause)
    program.step([(x[:2], y[:2]), (x[2:], y[2:])])
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-6)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-6)
    assert "need bound modules" in program.graph_refused


def test_documents_need_token_ids() -> None:
    program = compiled(
        nn.Sequential(nn.LayerNorm(4)), "noise_scale gns { example = document, separator = 0 }"
    )
    with pytest.raises(SiteError, match="need an integer input"):
        program.step((torch.randn(3, 4), torch.randint(4, (3,))))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_jackknife_changes_no_estimate_and_gives_an_interval_at_once(
    norm: type[nn.Module],
) -> None:
    found = {}
    for interval in ("steps", "jackknife"):
        torch.manual_seed(5)
        model = Small(norm).double()
        x, y = torch.randint(7, (12, 5)), torch.randint(7, (12, 5))
        program = compiled(model, f'noise_scale gns on "norm" {{ interval = {interval} }}')
        program.step([(x[:4], y[:4]), (x[4:], y[4:])])
        found[interval] = dict(program.signals)
    for name in ("gns.signal", "gns.noise"):
        assert found["jackknife"][name] == pytest.approx(found["steps"][name], rel=1e-9)
    assert math.isnan(found["steps"]["gns.low"])
    assert 0 <= found["jackknife"]["gns.low"] < found["jackknife"]["gns.high"]


def test_adams_geometry_weighs_by_the_moments_before_the_update() -> None:
    model, x, y = made()
    program = compiled(
        model, 'noise_scale gns on "norm" { geometry = adam, smooth = 1 steps }', "adamw", 0.01
    )
    program.step((x, y))
    assert math.isnan(program.signals["gns"])
    (optimizer,) = [a for a in program._machine.actions if hasattr(a, "preconditioner")]
    scale = torch.cat([optimizer.preconditioner(f"norm.{n}").flatten() for n in ("weight", "bias")])
    shares = [
        scale * torch.cat([g.flatten() for g in torch.autograd.grad(
            F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b]) / 6, list(model.norm.parameters()))])
        for b in range(6)
    ]  # fmt: skip
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        1 / 6,
    )
    program.step((x, y))
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-9)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-9)


def test_adams_geometry_needs_second_moments() -> None:
    model, x, y = made()
    program = compiled(model, 'noise_scale gns on "norm" { geometry = adam }')
    program.step((x, y))
    with pytest.raises(ValueError, match="needs an optimizer with second moments"):
        program.step((x, y))


def test_adams_geometry_waits_where_the_first_steps_were_skipped() -> None:
    model, x, y = made()
    text = (
        "loss cross_entropy run { length = 9 steps, on_nan = skip } optimizer adamw { lr = 1e-3 }"
    )
    program = trainc.compile(
        text + ' noise_scale gns on "norm" { geometry = adam, smooth = 1 steps }', model
    )
    assert program.step((x, torch.full_like(y, -100)))["skipped"] == 1
    for _ in range(2):
        program.step((x, y))
    assert program.signals["gns.noise"] > 0


def test_the_l1_geometry_is_the_published_one() -> None:
    published = CASES["tiny_transformer_ln"]["outputs"]["norm_only"]
    assert "l1_gns_plugin" in published  # the arithmetic is held to it in the runtime's tests
    model, x, y = made()
    program = compiled(model, 'noise_scale gns on "norm" { geometry = sign }')
    program.step((x, y))
    shares = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(
            F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b]), list(model.norm.parameters()))])
        for b in range(6)
    ])  # fmt: skip
    noise, signal = shares.std(0).sum() ** 2, shares.mean(0).abs().sum() ** 2
    assert program.signals["gns"] == pytest.approx(float(noise / signal), rel=1e-9)


def test_calibration_measures_every_parameter_and_changes_nothing() -> None:
    plain, x, y = made()
    trained = compiled(plain, "noise_scale gns", "adamw", 0.01)
    model, _, _ = made()
    program = compiled(
        model, "noise_scale gns { calibrate = 1 steps, calibrate_examples = 4 }", "adamw", 0.01
    )
    for _ in range(4):
        trained.step((x, y))
        program.step((x, y))
    for name, p in plain.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    assert program.signals["gns"] == trained.signals["gns"]
    assert program.signals["gns.slope"] > 0
    (measure,) = [a for a in program._machine.actions if isinstance(a, NoiseScaleAction)]
    assert measure.calibration is not None
    assert measure.calibration.count >= 2
    line = measure.summary()
    assert line is not None
    assert "times this noise scale" in line


def test_what_a_calibration_finds_is_brute_force() -> None:
    model, x, y = made()
    program = compiled(model, "noise_scale gns { calibrate = 5 steps, calibrate_examples = 4 }")
    program.step((x, y))
    shares = []
    for b in range(4):
        loss = F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b]) / 4
        shares.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        1 / 4,
    )
    (measure,) = [a for a in program._machine.actions if isinstance(a, NoiseScaleAction)]
    assert measure.calibration is not None
    assert measure.calibration.whole_model.estimate == pytest.approx(expected, rel=1e-9)


def test_calibrations_weigh_what_the_noise_scale_lets_them() -> None:
    """As long as calibrations are close together; further apart they fade by their own half-life."""
    from trainc.runtime.noise_scale.averages import Averages
    from trainc.runtime.noise_scale.estimate import Estimate
    from trainc.runtime.noise_scale.settings import NoiseScaleSettings
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Signals, Step

    measure = NoiseScaleAction(
        "gns", {"a": ("a.w",)}, NoiseScaleSettings(100.0, "samples", calibrations=2.0)
    )
    assert measure.calibration is not None
    expected, before = Averages(), 0
    for at, weight in ((0, 8), (40, 40), (60, 20), (1060, None)):
        step = Step(Clock(samples=at), {}, Signals(), 8, 8, samples=8)
        found = Estimate(1.0 + at, 20.0)
        measure._calibrate(measure.calibration, found, found, step)
        expected.add(found, 0.5**0.5 if weight is None else 0.5 ** (weight / 100))
        assert measure.calibration.measured.state() == pytest.approx(expected.state(), rel=1e-12)
        assert measure.calibrated_at == at + 8
        before = at
    assert before == 1060


def test_calibrations_average_over_the_window_of_the_noise_scale() -> None:
    """With all examples of all steps they find what the clause finds, and what one of all layers would."""
    model, x, y = made(rows=8)
    window = "smooth = 6 steps"
    program = compiled(
        model,
        f"noise_scale gns {{ {window}, calibrate = 1 steps, calibrate_examples = 8, calibrate_smooth = 1 }}"
        f" noise_scale gns as whole on all {{ {window} }}",
        "adamw",
        0.05,
    )
    measure, whole = (a for a in program._machine.actions if isinstance(a, NoiseScaleAction))
    assert measure.calibration is not None
    for step in range(9):
        shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(step))
        program.step((x[shuffled], y[shuffled].roll(step % 3, 1)))
        for found, same in (
            (measure.calibration.measured, measure.total),
            (measure.calibration.whole_model, whole.total),
        ):
            assert found.estimate == pytest.approx(same.estimate, rel=1e-9)


def test_a_resumed_calibration_is_the_uninterrupted_one() -> None:
    clause = "noise_scale gns { calibrate = 2 steps, calibrate_examples = 3 }"
    model, x, y = made()
    program = compiled(model, clause, "adamw", 0.01)
    for _ in range(3):
        program.step((x, y))
    state = torch.load(_saved(program.state_dict()))
    other = compiled(made()[0], clause, "adamw", 0.01)
    other.load_state_dict(state)
    for _ in range(3):
        first, second = program.step((x, y)), other.step((x, y))
        assert {k: v for k, v in first.items() if v == v} == {
            k: v for k, v in second.items() if v == v
        }


def _saved(state: dict[str, Any]) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_scaled_loss_gives_the_same_figures() -> None:
    model, x, y = made()
    program = compiled(model, "noise_scale gns")
    program.loss((x, y)).backward()
    program.update()
    model, x, y = made()
    scaled = compiled(model, "noise_scale gns")
    (scaled.loss((x, y)) * 1024).backward()
    for p in model.parameters():
        p.grad = p.grad / 1024
    scaled.update()
    for name in ("gns.signal", "gns.noise"):
        assert scaled.signals[name] == pytest.approx(program.signals[name], rel=1e-12)


def test_loss_weights_that_do_not_sum_to_one_are_an_error() -> None:
    model, x, y = made()
    program = compiled(model, "noise_scale gns")
    for rows in (slice(0, 3), slice(3, 6)):
        (program.loss((x[rows], y[rows])) / 2).backward()
    with pytest.raises(
        ValueError, match=r"multiplied by 0\.5, .* `program\.loss\(batch, loss_weight"
    ):
        program.update()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "ghost"}, "such as `group = 8`"),
        ({"group": 8}, "`group` needs `method = ghost`"),
        ({"example": "document"}, "such as `separator = 0`"),
        (
            {"method": "replica", "interval": "jackknife"},
            "`interval = jackknife` needs `method = per_example`",
        ),
        ({"geometry": "sign", "interval": "jackknife"}, "has no jackknife"),
    ],
)
def test_fields_that_do_not_go_together_are_an_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Gns(**fields)


@pytest.mark.parametrize("kind", ["tied", "jackknife", "documents"])
def test_verify_takes_the_modules_where_no_graph_can_be(kind: str) -> None:
    from trainc.compiler.driver.verify import compare

    model, x, y = made()
    clause = {
        "tied": "noise_scale gns on all",
        "jackknife": 'noise_scale gns on "norm" { interval = jackknife }',
        "documents": 'noise_scale gns on "norm" { example = document, separator = 0 }',
    }[kind]
    if kind == "tied":
        model.head = nn.Linear(6, 7, bias=False).double()
        model.head.weight = model.words.weight
    rows = compare(compiled(model, clause), (x, y))
    titles = [row.title for row in rows]
    assert all(row.ok for row in rows), rows
    assert titles[0] == "module at strength zero, original"
    assert ("per-example norms, one pass per example" in titles) == (kind != "documents")
