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
from torch.utils.checkpoint import checkpoint

import trainc
from tests.conformance import divided
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.regularize.outputs.pace import Pace, is_zero
from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.layers.bound_modules import replace_layers
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.structure.places import Place
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
    assert [site.module for site in lowered.rewrite.hooks] == list(names[1:])
    assert lowered.rewrite.views == 2
    assert set(lowered.scalars) == {*sigmas, "weight:consistency"}


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
    assert [site.module for site in lowered.rewrite.hooks] == list(names[:2])
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
    weight = scalars["weight:consistency"]
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
        (("fc",), []),
        (("fc", "ln"), ["wrong-target-kind"]),
        (("attention.out_proj",), ["wrong-target-kind"]),
    ],
)
def test_what_cannot_be_noisy_is_an_error(names: tuple[str, ...], found: list[str]) -> None:
    inventory = build_inventory(Mixed())
    targets = Targets(inventory, tuple(inventory.module[n] for n in names), ())
    problems = list(pace(sigma=0.1, weight=1).validate_targets(targets))
    assert [p.rule for p in problems] == found
    assert all(p.severity == "error" for p in problems)


class Normed(nn.Sequential):
    """A BatchNorm between two layers, which may be kept in eval mode."""

    def __init__(self, frozen: bool) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> "Normed":
        super().train(mode)
        self[1].train(mode and not self.frozen)
        return self


@pytest.mark.parametrize(
    "clause",
    [
        'regularize pace on "2" { sigma = 0.1, weight = 1 }',
        'regularize pace on "2" { sigma = 0.1, weight = 1, mode = lazy(2) }',
        "regularize r_drop { weight = 1 }",
        "regularize consistency { target = view, weight = 1 }",
    ],
)
def test_views_over_a_batch_norm_in_train_mode_are_refused(clause: str) -> None:
    spec = f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} run {{ length = 9 steps }}\n{clause}"
    with pytest.raises(trainc.SpecError, match=r"BatchNorm `1` .*in train mode") as caught:
        trainc.compile(spec, Normed(False))
    (problem,) = caught.value.diagnostics
    assert problem.labels[0].span is not None
    assert "keep them in eval mode" in str(problem.help)
    trainc.compile(spec, Normed(True)).step((torch.randn(4, 4), torch.arange(4) % 3))
    if "pace" in clause and "lazy" not in clause:
        trainc.compile(spec.replace("weight = 1", "weight = 1, mode = history"), Normed(False))


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


class Tokens(nn.Module):
    """A model of tokens that looks at each one alone, so that padding changes no other logit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embedding(ids))))
        return logits


@pytest.mark.parametrize("sizes", [[4], [1, 3]], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_padding_changes_nothing(distance: str, executor: Any, sizes: list[int]) -> None:
    made = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(1, 12, (4, 6), generator=made) for _ in range(2))
    targets[0] = -100
    spec = f"""loss cross_entropy optimizer sgd {{ lr = 1 }} run {{ length = 9 steps, seed = 3 }}
    regularize pace on "body" {{ sigma = 0.5, weight = 1, distance = {distance} }}"""
    found = []
    for width in (0, 5):
        padded = F.pad(ids, (0, width)), F.pad(targets, (0, width), value=-100)
        program = trainc.compile(spec, Tokens().double(), executor=executor)
        metrics = program.step(divided(padded, sizes))
        found.append((metrics, dict(program.module.named_parameters())))
    (narrow, weights), (wide, others) = found
    assert wide == pytest.approx(narrow, rel=1e-12)
    assert narrow["consistency"] > 0
    torch.testing.assert_close(others, weights, rtol=1e-12, atol=1e-14)


class DropsByFunction(nn.Module):
    """A model whose dropout is a function, which no module stands for."""

    def __init__(self, function: str, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.function, self.p = function, p

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.function == "attention":
            one = h[:, None]
            h = F.scaled_dot_product_attention(one, one, one, dropout_p=self.p)[:, 0]
        elif self.function == "layer":
            h = nn.Dropout(self.p)(h)
        else:
            h = F.dropout(h, self.p, training=self.training)
        logits: Tensor = self.head(h)
        return logits


@pytest.mark.parametrize("executor", ["auto", "module"])
def test_functions_that_draw_for_each_view_apart_are_noted_once(executor: Any) -> None:
    spec = """loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps }
    regularize pace on "body" from 1 step { sigma = 0.1, weight = 1 }"""
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    for function, p in (("attention", 0.5), ("attention", 0.0), ("dropout", 0.5)):
        program = trainc.compile(spec, DropsByFunction(function, p), executor=executor)
        said = []
        for _ in range(3):
            program.step(batch)
            said += [n for n in program.report().notes if "each view of an example apart" in n]
        assert len(said) == (function == "attention" and p > 0), (function, p)
        assert all("scaled_dot_product_attention" in note for note in said)


def test_views_share_the_masks_of_functions_of_dropout_by_every_executor() -> None:
    spec = """loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps }
    regularize pace on "body" { sigma = 1e-9, weight = 1 }"""
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    found = {}
    for executor in ("graph", "module"):
        model = DropsByFunction("dropout").double()
        program = trainc.compile(spec, model, executor=executor)
        torch.manual_seed(0)
        found[executor] = [program.step(batch) for _ in range(3)]
        assert all(one["consistency"] < 1e-12 for one in found[executor])
    for one, two in zip(found["graph"], found["module"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)


class Again(DropsByFunction):
    """Runs its layers again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return logits


def test_what_runs_again_for_its_backward_pass_draws_for_each_view_apart() -> None:
    spec = """loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps }
    regularize pace on "body" { sigma = 1e-9, weight = 1 }"""
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    found = []
    for model in (Again("dropout"), DropsByFunction("dropout")):
        program = trainc.compile(spec, model.double(), executor="module")
        torch.manual_seed(0)
        found.append((program.step(batch), program.report().notes))
    (again, notes), (shared, none) = found
    assert again["consistency"] > 1e-3 > shared["consistency"]
    assert len(notes) == 1 + len(none)
    assert "`dropout` draws" in notes[-1]


class Routed(nn.Module):
    """An expert that gets the examples of which a number is positive, four or five rows of two views of four."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.drop, self.head = nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.where(x[:, 0] > 0)[0]
        logits: Tensor = self.head(x.index_add(0, rows, self.drop(self.expert(x[rows]))))
        return logits


@pytest.mark.parametrize("executor", ["auto", "module"])
@pytest.mark.parametrize("routed", [1, 2, 3])
def test_layers_that_get_other_rows_than_the_examples_are_refused(
    executor: Any, routed: int
) -> None:
    spec = """loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps }
    regularize pace on "{}" { sigma = 0.1, weight = 1 }"""
    x = torch.randn(4, 4)
    x[:, 0] = torch.where(torch.arange(4) < routed, 1.0, -1.0)
    program = trainc.compile(spec.replace("{}", "expert"), Routed(), executor=executor)
    with pytest.raises(ExampleAxisUnknown, match=r"`expert` gives .* 4 examples in 2 views"):
        program.step((x, torch.tensor([0, 1, 2, 0])))
    model = Routed()
    model.drop.p = 0.5
    program = trainc.compile(spec.replace("{}", "head"), model, executor=executor)
    with pytest.raises(ExampleAxisUnknown, match=r"`drop` gets .* share one dropout mask"):
        program.step((x, torch.tensor([0, 1, 2, 0])))


class Pairs(nn.Module):
    """Compares every example with all others of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.one(x) @ self.two(x).T
        return logits


@pytest.mark.parametrize("executor", ["auto", "module"])
def test_a_model_that_compares_the_examples_of_a_batch_has_no_two_views(executor: Any) -> None:
    spec = """loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps }
    regularize pace on "one" { sigma = 0.1, weight = 1 }"""
    program = trainc.compile(spec, Pairs(), executor=executor)
    with pytest.raises(SiteError, match="second view of an example would change the loss"):
        program.step((torch.randn(4, 4), torch.arange(4)))


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
