"""PACE: the published step, the published schedule, and the statistics of our noise."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.regularize.pace import Pace, is_zero
from trainc.compiler.layers.bound_modules import replace_layers
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.model.roles import Place
from trainc.dsl.values import value_json as v
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.kernels.noise.factors import factor
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.record import Signals
from trainc.runtime.storage.random_streams import derive_seed

REFERENCE = json.loads((Path(__file__).parents[2] / "reference/regularizers.json").read_text())
PACE: dict[str, Any] = REFERENCE["pace"]


def tensor(stored: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, stored["dtype"])
    return torch.tensor(stored["data"], dtype=dtype).view(*stored["shape"])


def times(left: v.Expr, right: v.Expr) -> v.Expr:
    return v.Binary("*", left, right)


BLOCK, BLOCKS = v.Name("block"), v.Name("blocks")
# What Pace's docstring writes out as text.
PUBLISHED = v.Binary(
    "/",
    times(times(v.Number(1.2), v.called("min", BLOCK, v.Number(1))), v.Binary("-", BLOCKS, BLOCK)),
    v.Binary("-", BLOCKS, v.Number(1)),
)


def pace(sigma: Any, weight: Any, **fields: Any) -> Pace:
    """Return the clause; numbers stand for constant schedules."""
    return Pace(sigma=sigma, weight=weight, **fields)


def lower(rule: Pace, model: nn.Module, names: tuple[str, ...], **bounds: Any) -> LoweredMethod:
    context = LoweringContext(
        model, build_inventory(model), UnitConversion(8), RunLength(100, "steps"), Signals()
    )
    lowered = LoweredMethod()
    rule.lower(Lowering(BoundClause(rule, "pace", names, **bounds), context, lowered))
    return lowered


@pytest.mark.parametrize("case", ["mse", "mse_3d"])
def test_the_distance_and_its_gradients_are_the_published_ones(case: str) -> None:
    row = PACE[case]
    one, two = (tensor(row[name]).requires_grad_() for name in ("l1", "l2"))
    loss = pace(sigma=1, weight=1).distance_of(one, two)
    assert float(loss.detach()) == pytest.approx(row["loss"], rel=1e-6)
    loss.backward()
    if "grad_l1" in row:
        torch.testing.assert_close(one.grad, tensor(row["grad_l1"]))
        torch.testing.assert_close(two.grad, tensor(row["grad_l2"]))


def test_the_kl_distance_is_that_of_r_drop() -> None:
    row = REFERENCE["relatives"]["rdrop_official_readme"]
    one, two = (tensor(row[name]) for name in "pq")
    loss = pace(sigma=1, weight=1, distance="kl").distance_of(one, two)
    assert float(loss.detach()) == pytest.approx(row["loss_batchmean"], rel=1e-5)


class Delta(nn.Module):
    """The published adapter: a low-rank factor on the weight, a prompt and a bias factor."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        outs, ins = base.weight.shape
        self.delta_W_down = nn.Parameter(torch.empty(outs, rank))
        self.delta_W_up = nn.Parameter(torch.empty(rank, ins))
        self.delta_b = nn.Parameter(torch.empty(outs))
        self.delta_prompt_down = nn.Parameter(torch.empty(ins, rank))
        self.delta_prompt_up = nn.Parameter(torch.empty(rank, 1))
        self.base = (base.weight, base.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base
        prompt = (weight @ self.delta_prompt_down @ self.delta_prompt_up)[:, 0]
        product = weight * (self.delta_W_down @ self.delta_W_up)
        return F.linear(x, product, prompt + bias * self.delta_b)


class Adapted(nn.Module):
    """h = h0 + dh, with tanh and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.delta = Delta(self.base, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.base(x) + self.delta(x))


class Published(nn.Module):
    """The reference file's model: two adapted blocks, a mean over tokens, a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adapted(), Adapted()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_a_whole_step_with_adapters_is_the_published_one() -> None:
    row = PACE["full_step"]
    model = Published()
    mapped = {
        name: name.replace("fc.adapter.base_module", "base")
        .replace("fc.adapter", "delta")
        .replace("head.adapter.base_module", "head")
        for name in row["params"]
    }
    for theirs, ours in mapped.items():
        model.get_parameter(ours).data.copy_(tensor(row["params"][theirs]))
    draws = map(tensor, row["noise_draws_in_call_order"])
    names = ("blocks.0.delta", "blocks.1.delta", "head")
    factors = {
        name: 1 + sigma * draw
        for name, sigma, draw in zip(names, row["sigma_per_block"], draws, strict=True)
    }
    x, y, rule = tensor(row["X"]), tensor(row["Y"]), pace(sigma=1.2, weight=row["lambda"])
    out = rule.reference(model, x, y, factors, row["lambda"])
    assert float(out["data_loss"].detach()) == pytest.approx(row["cls_loss"], rel=1e-6)
    assert float(out["consistency"].detach()) == pytest.approx(row["pace_loss"], rel=1e-5)
    assert float(out["loss"].detach()) == pytest.approx(row["total_loss"], rel=1e-6)
    torch.testing.assert_close(out["logits"][:4], tensor(row["logits1"]))
    out["loss"].backward()
    for theirs, grad in row["grads"].items():
        found = model.get_parameter(mapped[theirs]).grad
        torch.testing.assert_close(found, tensor(grad), rtol=1e-4, atol=1e-7)


class Stack(nn.Module):
    """Blocks with one Linear layer each, then a head: B blocks counted with the head."""

    def __init__(self, blocks: int, width: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width)) for _ in range(blocks)])
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def test_the_published_schedule_is_an_expression_of_the_block() -> None:
    row = PACE["sigma_schedule_vit_b"]
    model = Stack(row["num_ids"] - 1)
    names = (*(f"blocks.{i}.0" for i in range(row["num_ids"] - 1)), "head")
    lowered = lower(pace(sigma=PUBLISHED, weight=1), model, names)
    sigmas = {f"sigma:{name}": sigma for name, sigma in zip(names, row["sigmas"], strict=True)}
    assert sigmas.pop("sigma:blocks.0.0") == 0.0
    found = {name: lowered.scalars[name](Clock()) for name in sigmas}
    assert found == pytest.approx(sigmas, rel=1e-12)
    assert [site.module for site in lowered.rewrite.noises] == list(names[1:])
    assert lowered.rewrite.pairing is not None
    assert set(lowered.scalars) == {*sigmas, lowered.rewrite.pairing.weight}


FIRST, MIDDLE, LAST = Place(0, 4, 1, 4), Place(1, 4, 2, 4), Place(3, 4, 4, 4)
FALLING = times(v.Number(1.2), v.Binary("-", v.Number(1), v.Name("depth")))
WARMUP = v.called("warmup", v.Quantity(v.Duration(0.05, "run")))


@pytest.mark.parametrize(
    ("sigma", "place", "expected"),
    [
        (v.Number(0), FIRST, True),
        (v.Number(0.1), FIRST, False),
        (FALLING, FIRST, False),
        (FALLING, LAST, True),
        (times(FALLING, WARMUP), MIDDLE, False),
        (times(FALLING, WARMUP), LAST, True),
        (WARMUP, FIRST, False),
        (v.Name("progress"), FIRST, False),
        (v.Name("steps"), FIRST, False),
        (v.Unary("neg", v.Name("depth")), FIRST, True),
        (PUBLISHED, FIRST, True),
        (PUBLISHED, LAST, False),
    ],
)
def test_a_layer_is_silent_only_if_it_always_is(
    sigma: v.Expr, place: Place, expected: bool
) -> None:
    assert is_zero(sigma, place) is expected


def bound_step(model: nn.Module, rule: Pace, names: tuple[str, ...]) -> tuple[LoweredMethod, Any]:
    lowered = lower(rule, model, names)
    return lowered, replace_layers(model, lowered.rewrite)


def test_the_bound_model_is_the_reference_under_its_own_draws() -> None:
    torch.manual_seed(0)
    model, names = Stack(2, 4).double(), ("blocks.0.0", "blocks.1.0", "head")
    rule = pace(sigma=FALLING, weight=0.5)
    x, y = torch.randn(5, 3, 4).double(), torch.randint(0, 4, (5, 3))
    lowered, sites = bound_step(model, rule, names)
    assert [site.module for site in lowered.rewrite.noises] == list(names[:2])
    scalars = {n: torch.tensor(s(Clock()), dtype=torch.float64) for n, s in lowered.scalars.items()}
    scalars["key"] = pack_key(7, 3)
    sites.activate(ExampleIndex(5), scalars, torch.float64, torch.device("cpu"))

    factors: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            factors[name] = out.detach()

        return hook

    # Noise on ones is z itself.
    for name in names[:2]:
        layer = model.get_submodule(name)
        plain = nn.Linear(4, 4).double()
        plain.weight.data.zero_()
        plain.bias.data.fill_(1.0)
        kept, layer._parameters = layer._parameters, plain._parameters
        handle = layer.register_forward_hook(record(name))
        layer(torch.cat([x, x]))
        handle.remove()
        layer._parameters = kept
    assert {z.shape for z in factors.values()} == {(10, 3, 4)}
    assert all(torch.equal(z[:, 0], z[:, 2]) for z in factors.values())

    logits = model(torch.cat([x, x]))
    assert lowered.rewrite.pairing is not None
    weight = scalars[lowered.rewrite.pairing.weight]
    found = cross_entropy_consistency(logits, y, weight, "mse")
    with sites.inactive():
        expected = rule.reference(model, x, y, factors, 0.5)
    for ours, part in zip(found, ("loss", "data_loss", "consistency"), strict=True):
        torch.testing.assert_close(ours, expected[part], rtol=1e-10, atol=0)


def test_two_views_of_one_layer_are_as_far_apart_as_theory_says() -> None:
    """E |f1 - f2|^2 = 2 sigma^2 |h|^2 for one Linear layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6))
    _, sites = bound_step(model, pace(sigma=0.7, weight=1), ("0",))
    x = torch.randn(1, 5).expand(4000, 5)
    expected = 2 * 0.7**2 * float(model(x[:1]).detach().square().sum())
    scalars = {"sigma:0": torch.tensor(0.7), "key": pack_key(11, 0)}
    found = []
    for step in range(5):
        sites.activate(
            ExampleIndex(4000),
            scalars | {"key": pack_key(11, step)},
            torch.float32,
            torch.device("cpu"),
        )
        one, two = model(torch.cat([x, x])).detach().chunk(2)
        found.append((one - two).square().sum(1))
    distances = torch.cat(found)
    error = float(distances.std()) / math.sqrt(len(distances))
    assert error < 0.02 * expected
    assert abs(float(distances.mean()) - expected) < 4 * error
    published = PACE["mc_single_linear"]
    assert published["mc_20000"] == pytest.approx(published["theory_2sigma2_norm_sq"], rel=0.01)


def test_evaluation_has_no_noise() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    _, sites = bound_step(model, pace(sigma=0.7, weight=1), ("0",))
    x = torch.randn(4, 5)
    sites.activate(
        ExampleIndex(2),
        {"sigma:0": torch.tensor(0.7), "key": pack_key(1, 0)},
        torch.float32,
        x.device,
    )
    with sites.inactive():
        plain = model(x)
    assert torch.equal(model.eval()(x), plain)
    assert not torch.equal(model.train()(x), plain)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.ln = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bn = nn.BatchNorm1d(4)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("fc",), ["pair-over-batch-norm"]),
        (("fc", "ln"), ["wrong-target-kind", "pair-over-batch-norm"]),
        (("attention.out_proj",), ["wrong-target-kind", "pair-over-batch-norm"]),
    ],
)
def test_what_cannot_be_noisy_is_an_error(names: tuple[str, ...], found: list[str]) -> None:
    inventory = build_inventory(Mixed())
    targets = Targets(inventory, tuple(inventory.module[n] for n in names), ())
    problems = list(pace(sigma=0.1, weight=1).validate_targets(targets))
    assert [p.rule for p in problems] == found
    severity = {"wrong-target-kind": "error", "pair-over-batch-norm": "warning"}
    assert all(p.severity == severity[p.rule] for p in problems)


def test_silence_everywhere_is_a_warning_and_no_pair() -> None:
    model = Stack(2)
    inventory = build_inventory(model)
    targets = Targets(inventory, (inventory.module["head"],), ())
    (problem,) = pace(sigma=FALLING, weight=1).validate_targets(targets)
    assert (problem.rule, problem.field, problem.severity) == ("no-effect", "sigma", "warning")
    assert not lower(pace(sigma=FALLING, weight=1), model, ("head",)).rewrite


def test_outside_its_time_there_is_neither_noise_nor_distance() -> None:
    start = TimeSpan(3, "steps")
    lowered = lower(pace(sigma=0.1, weight=2), Stack(2), ("head",), start=start)
    before = [schedule(Clock(steps=2)) for schedule in lowered.scalars.values()]
    after = [schedule(Clock(steps=3)) for schedule in lowered.scalars.values()]
    assert before == [0, 0]
    assert sorted(after) == [0.1, 2]


def test_either_zero_is_no_effect() -> None:
    assert pace(sigma=0.1, weight=0).identity_setting()
    assert pace(sigma=0, weight=1).identity_setting()
    assert not pace(sigma=0.1, weight=1).identity_setting()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of one step, by the graph and by definition with the same noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    spec = """loss cross_entropy optimizer sgd { lr = 0 } run { length = 5 steps, seed = 9 }
    regularize pace on "0" | "2" { sigma = 0.6, weight = 0.4 }"""
    program = trainc.compile(spec, model, executor="graph")
    loss = program.graph((x, y))
    named = dict(model.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    key, sigma = (
        pack_key(derive_seed(9, "noise") & 0xFFFFFFFF, 0),
        torch.tensor(0.6, dtype=torch.float64),
    )
    sizes = {"0": 8, "2": 7}
    factors = {
        name: factor(x.new_ones(12, size), sigma, key, site, 2, "token", None)[:, 0]
        for site, (name, size) in enumerate(sizes.items())
    }
    with program.sites.inactive():
        wanted = pace(sigma=0.6, weight=0.4).reference(model, x, y, factors, 0.4)["loss"]
        found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
