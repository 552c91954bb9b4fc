"""The noise scale from norm layers: against brute force, and against published numbers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.image_models import import_library
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.noise_scale.gns import Gns
from trainc.compiler.errors import SiteError
from trainc.compiler.layers.bound_modules import replace_layers
from trainc.compiler.layers.norm import norm_site
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.dsl.reading.construct import Problem
from trainc.dsl.values.value_json import Duration
from trainc.runtime.noise_scale.action import NoiseScaleAction
from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions
from trainc.runtime.noise_scale.settings import NoiseScaleSettings
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Contribution, Signals, Step

CASES = json.loads((Path(__file__).parents[2] / "reference/noise_scale.json").read_text())["cases"]


def lcg(shape: Sequence[int], seed: int, scale: float = 1.0, plus: float = 0.0) -> Tensor:
    """Return the reference file's numbers, from its linear congruential generator."""
    x, values = seed & 0x7FFFFFFF, []
    for i in range(math.prod(shape) + 8):
        x = (1103515245 * x + 12345) & 0x7FFFFFFF
        if i >= 8:
            values.append(scale * (2 * (x >> 8) / 2**23 - 1))
    return torch.tensor(values, dtype=torch.float64).view(*shape) + plus


def measure(
    model: nn.Module, names: Sequence[str], rule: Gns | None = None
) -> tuple[NoiseScaleAction, Any]:
    """Lower the clause onto `model` by hand; return its action and the bound sites."""
    context = LoweringContext(
        model, build_inventory(model), UnitConversion(8, 4, 800), RunLength(100, "steps"), Signals()
    )
    lowered = LoweredMethod()
    rule = rule or Gns()
    rule.lower(Lowering(BoundClause(rule, "gns", tuple(names)), context, lowered))
    (action,) = lowered.actions
    assert isinstance(action, NoiseScaleAction)
    return action, replace_layers(model, lowered.rewrite)


class Tiny(nn.Module):
    """The reference file's transformer: V=11, T=6, D=8, two heads."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.ln1 = norm(8, eps=1e-5)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.ln2 = norm(8, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.lnf = norm(8, eps=1e-5)
        self.head = nn.Linear(8, 11, bias=False)
        for i, (name, p) in enumerate(self.double().named_parameters()):
            is_norm = name.startswith("ln")
            plus = float(is_norm and name.endswith("weight"))
            p.data = lcg(p.shape, 1000 + i, 0.2 if is_norm else 0.5, plus)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1])[None].expand_as(ids))
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2)
            for part in self.attn["qkv"](self.ln1(x)).split(8, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.ln2(x))))
        return self.head(self.lnf(x))  # type: ignore[no-any-return]


def run_step(
    action: NoiseScaleAction,
    sites: Any,
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    clock: Clock | None = None,
) -> Step:
    """Run one step of token-mean cross-entropy over micro-batches, and the action on it."""
    model.zero_grad()
    total = sum(int((y >= 0).sum()) for _, y in batches)
    step = Step(clock or Clock(), dict(model.named_parameters()), Signals(), 8, 8)
    for x, y in batches:
        sites.activate(ExampleIndex(len(x)), {}, torch.float64, torch.device("cpu"))
        counts = (y >= 0).flatten(1).sum(1)
        logits = model(x)
        task = F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100)
        (task * (counts.sum() / total)).backward()
        squares = {}
        for site in sites.rewrite.norms:
            gradient = sites.probes()[site.module].grad
            for column, name in enumerate(site.parameters):
                if name is not None:
                    squares[name] = gradient[:, column]
        step.contributions.append(Contribution(counts.double() / total, squares))
        step.samples += len(x)
        step.tokens += int((y >= 0).sum())
    action.run(step)
    sites.deactivate()
    return step


NORMS = ("ln1", "ln2", "lnf")


def tokens() -> tuple[Tensor, Tensor]:
    given = CASES["tiny_transformer_ln"]["inputs"]
    return torch.tensor(given["ids"]), torch.tensor(given["targets"])


@pytest.mark.parametrize("case", ["layernorm_3d", "rmsnorm_2d"])
def test_a_sites_norms_are_the_published_ones(case: str) -> None:
    given, expected = CASES[case]["inputs"], CASES[case]["outputs"]
    width = given["weight"]["shape"]
    kind = nn.LayerNorm if case.startswith("layer") else nn.RMSNorm
    model = nn.Sequential(kind(width, eps=given["eps"])).double()
    for name, parameter in model[0].named_parameters():
        parameter.data = lcg(**given[name])
    action, sites = measure(model, ["0"])
    sites.activate(ExampleIndex(given["x"]["shape"][0]), {}, torch.float64, torch.device("cpu"))
    model(lcg(**given["x"])).backward(lcg(**given["dy"]))
    probe = sites.probes()["0"].grad
    for column, name in enumerate(n for n, _ in model[0].named_parameters()):
        torch.testing.assert_close(
            probe[:, column].tolist(), expected[f"pe_{name}"], rtol=1e-9, atol=0
        )
        assert float(probe[:, column].sum()) == pytest.approx(expected[f"S1_{name}"], rel=1e-9)
    assert list(action.measured) == ["0"]


def test_the_norms_of_a_transformer_give_the_published_noise_scale() -> None:
    model, expected = Tiny(nn.LayerNorm), CASES["tiny_transformer_ln"]["outputs"]
    action, sites = measure(model, NORMS)
    step = run_step(action, sites, model, [tokens()])
    norms = expected["norm_only"]
    assert step.signals["gns"] == pytest.approx(norms["gns"], rel=1e-9)
    assert step.signals["gns.signal"] == pytest.approx(norms["gtg"], rel=1e-9)
    assert step.signals["gns.noise"] == pytest.approx(norms["trsigma"], rel=1e-9)
    assert step.metrics["gns"] == step.signals["gns"]
    for module in NORMS:
        rows = [expected["per_param"][f"{module}.{p}"] for p in ("weight", "bias")]
        signal, noise = (sum(row[key] for row in rows) for key in ("gtg", "trsigma"))
        found = step.series["gns"][module]
        assert found == pytest.approx(noise / signal, rel=1e-8) if signal > 0 else math.isnan(found)


def test_rms_norms_give_the_published_noise_scale() -> None:
    model = Tiny(nn.RMSNorm)
    action, sites = measure(model, NORMS)
    step = run_step(action, sites, model, [tokens()])
    assert step.signals["gns"] == pytest.approx(3.8244960774771393, rel=1e-9)


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 2, 3), (1,) * 6])
def test_micro_batches_and_padding_equal_brute_force(sizes: tuple[int, ...]) -> None:
    model = Tiny(nn.LayerNorm)
    x, y = tokens()
    for row, length in enumerate((6, 2, 5, 1, 4, 6)):
        y[row, length:] = -100
    counts = (y >= 0).sum(1)
    names = [f"{m}.{p}" for m in NORMS for p in ("weight", "bias")]
    expected, _ = Gns.reference(
        lambda b: F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b]),
        (counts / counts.sum()).double().tolist(),
        [model.get_parameter(name) for name in names],
    )
    action, sites = measure(model, NORMS)
    step = run_step(action, sites, model, list(zip(x.split(sizes), y.split(sizes), strict=True)))
    found = (step.signals["gns.signal"], step.signals["gns.noise"])
    # Weights are exact in float64 and torch's counts are float32: six digits.
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_half_life_holds_while_the_batch_changes() -> None:
    model = Tiny(nn.LayerNorm)
    x, y = tokens()
    rule = Gns(smooth=Duration(3, "steps"))
    action, sites = measure(model, NORMS, rule)
    assert (action.settings.half_life, action.settings.unit) == (24.0, "samples")
    clock, expected = Clock(), Averages()
    for rows in ([0, 1, 2, 3, 4, 5], [0, 1], [2, 3, 4]):
        fresh = Tiny(nn.LayerNorm)
        alone, bound = measure(fresh, NORMS, rule)
        one = run_step(alone, bound, fresh, [(x[rows], y[rows])])
        run_step(action, sites, model, [(x[rows], y[rows])], clock)
        clock.advance(len(rows), 6 * len(rows), 0.0)
        expected.add(alone.total.estimate, 0.5 ** (len(rows) / 24))
        assert one.signals["gns.signal"] == alone.total.estimate.signal
    assert action.total.estimate == pytest.approx(expected.estimate, rel=1e-12)


@pytest.mark.parametrize(
    ("smooth", "expected"),
    [
        (Duration(50, "samples"), (50, "samples")),
        (Duration(7000, "tokens"), (7000, "tokens")),
        (Duration(2, "epochs"), (1600.0, "samples")),
        (Duration(0.1, "run"), (80.0, "samples")),
    ],
)
def test_smoothing_is_kept_in_samples_or_tokens(smooth: Duration, expected: object) -> None:
    action, _ = measure(nn.Sequential(nn.LayerNorm(4)), ["0"], Gns(smooth=smooth))
    assert (action.settings.half_life, action.settings.unit) == expected


def test_one_example_is_undetermined_and_leaves_no_trace() -> None:
    model = Tiny(nn.LayerNorm)
    x, y = tokens()
    action, sites = measure(model, NORMS)
    step = run_step(action, sites, model, [(x[:1], y[:1])])
    assert math.isnan(step.signals["gns"])
    assert math.isnan(step.signals["gns.signal"])
    assert action.summary() == (
        "gns: undetermined, a noise scale needs two samples in a step; every step had one"
    )
    before = run_step(action, sites, model, [(x, y)]).signals["gns"]
    after = run_step(action, sites, model, [(x[:1], y[:1])]).signals["gns"]
    assert before == after > 0


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    model = Tiny(nn.LayerNorm)
    action, sites = measure(model, NORMS)
    run_step(action, sites, model, [tokens()])
    before = action.total.estimate
    step = Step(Clock(), dict(model.named_parameters()), Signals(), 6, 6)
    model.ln1.weight.grad = torch.full((8,), math.inf, dtype=torch.float64)
    squares = {name: torch.ones(2) for names in action.measured.values() for name in names}
    step.contributions.append(Contribution(torch.tensor([0.5, 0.5]), squares))
    action.run(step)
    assert action.total.estimate == before
    assert action.total.steps == 2
    # Nothing is known of that step, whatever was known before it.
    told = {name: value for name, value in step.signals.items() if name.startswith("gns")}
    assert "gns.high" in told
    assert all(map(math.isnan, told.values()))
    assert all(math.isnan(v) for figures in step.series.values() for v in figures.values())
    line = action.summary()
    assert line is not None
    assert (
        "gradients were not finite in 1 of 2 steps, also in the last one: these numbers are from the steps before"
        in line
    )
    again = run_step(action, sites, model, [tokens()])
    assert again.signals["gns"] > 0
    line = action.summary()
    assert line is not None
    assert line.endswith("; gradients were not finite in 1 of 3 steps")


def test_a_frozen_weight_is_left_out_of_both_sums() -> None:
    model, only = Tiny(nn.LayerNorm), Tiny(nn.LayerNorm)
    model.ln2.weight.requires_grad_(False)
    action, sites = measure(model, NORMS)
    assert action.measured["ln2"] == ("ln2.bias",)
    step = run_step(action, sites, model, [tokens()])
    names = [n for names in action.measured.values() for n in names]
    expected, _ = Gns.reference(
        lambda b: F.cross_entropy(only(tokens()[0][b : b + 1]).flatten(0, 1), tokens()[1][b]),
        [1 / 6] * 6,
        [only.get_parameter(name) for name in names],
    )
    assert step.signals["gns"] == pytest.approx(expected.noise_scale, rel=1e-9)


def test_it_is_measured_before_clipping() -> None:
    from trainc.runtime.step.gradients import Clip
    from trainc.runtime.step.optimizer import ParamSlot

    model = Tiny(nn.LayerNorm)
    action, sites = measure(model, NORMS)
    slots = [ParamSlot(name, p, 0.0) for name, p in model.named_parameters()]
    machine = StepMachine(
        [Clip("clip", 1e-3, slots, "gradient_norm"), action],
        Clock(),
        dict(model.named_parameters()),
    )
    step = machine.begin()
    filled = run_step(
        NoiseScaleAction("other", action.measured, NoiseScaleSettings(1, "steps")),
        sites,
        model,
        [tokens()],
    )
    step.contributions.extend(filled.contributions)
    step.samples = filled.samples
    machine.finish()
    expected = CASES["tiny_transformer_ln"]["outputs"]["norm_only"]["gns"]
    assert step.signals["gns"] == pytest.approx(expected, rel=1e-9)
    assert step.metrics["gradient_norm"] > 1e-3


def test_a_resumed_measurement_is_the_uninterrupted_one() -> None:
    model = Tiny(nn.LayerNorm)
    x, y = tokens()
    batches = [(x, y), (x[:3], y[:3]), (x[1:], y[1:]), (x[2:4], y[2:4])]
    whole, sites = measure(model, NORMS)
    clock, signals = Clock(), []
    state: dict[str, Any] = {}
    for i, batch in enumerate(batches):
        signals.append(run_step(whole, sites, model, [batch], clock).signals)
        clock.advance(len(batch[0]), 6, 0.0)
        if i == 1:
            state = {"action": whole.state_dict(), "clock": clock.state_dict()}
    resumed, _ = measure(Tiny(nn.LayerNorm), NORMS)
    resumed.load_state_dict(state["action"])
    clock.load_state_dict(state["clock"])
    for i, batch in enumerate(batches[2:], 2):
        assert run_step(resumed, sites, model, [batch], clock).signals == signals[i]
        clock.advance(len(batch[0]), 6, 0.0)
    other, _ = measure(nn.Sequential(nn.LayerNorm(4)), ["0"])
    with pytest.raises(
        ValueError, match="has measurements of another clause: the sum over layers, 1 layer restart"
    ):
        other.load_state_dict(state["action"])


def test_the_summary_says_what_was_found() -> None:
    model = Tiny(nn.LayerNorm)
    action, sites = measure(model, NORMS)
    for _ in range(2):
        run_step(action, sites, model, [tokens()])
    line = action.summary()
    assert line is not None
    assert line.startswith("gns: noise scale 7.692 samples (90% ")
    action.total.load([1.0, 1.0, -0.5, 2.0, 0.25, 4.0, -1.0, *[0.0] * 5, 1.0, 0.0, 0.0])
    line = action.summary()
    assert line is not None
    assert line.startswith("gns: undetermined, |G|^2 is not above zero after 1 step: ")
    assert line.endswith("|G|^2 -0.5, tr(Sigma) 2 over 3 layers")


class Decoder(nn.Module):
    """BERT's head: its bias is the decoder's, whose weight is the embedding's."""

    def __init__(self, words: nn.Embedding, reads: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(11, dtype=torch.float64))
        self.decoder = nn.Linear(8, 11).double()
        self.decoder.weight, self.decoder.bias = words.weight, self.bias
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) + self.bias if self.reads else self.decoder(x)  # type: ignore[no-any-return]


class Bert(Tiny):
    def __init__(self, reads: bool = False) -> None:
        super().__init__(nn.LayerNorm)
        self.head = Decoder(self.wte, reads)  # type: ignore[assignment]


@pytest.mark.parametrize("on", ["all", "type(Linear, Embedding)"])
def test_a_bias_that_a_head_names_too_is_measured_once(on: str) -> None:
    model, (x, y) = Bert(), tokens()
    names = [n for n, _ in model.named_parameters() if on == "all" or not n.startswith("ln")]
    expected, _ = Gns.reference(
        lambda b: F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b]),
        [1 / 6] * 6,
        [model.get_parameter(name) for name in names],
    )
    run = "loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps }"
    program = trainc.compile(f"{run} noise_scale gns on {on}", model)
    program.step((x, y))
    assert program.signals["gns.signal"] == pytest.approx(expected.signal, rel=1e-6)
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-6)


def test_a_tied_head_alone_is_measured_by_micro_batches() -> None:
    model, (x, y) = Bert(), tokens()
    weights = [model.wte.weight, model.head.bias]
    shares = []
    for rows in torch.arange(6).split(2):
        loss = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten()) / 3
        shares.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    expected = noise_scale_from_contributions(
        sum(float(c.square().sum()) for c in shares),
        float(torch.stack(shares).sum(0).square().sum()),
        1 / 3,
        1 / 6,
    )
    run = "loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps }"
    clause = 'noise_scale gns on "head.decoder" { method = micro_batch }'
    program = trainc.compile(f"{run} {clause}", model)
    program.step(list(zip(x.split(2), y.split(2), strict=True)))
    assert program.signals["gns.noise"] == pytest.approx(expected.noise, rel=1e-6)


def test_a_head_that_reads_the_bias_it_names_is_found_out() -> None:
    run = "loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps }"
    program = trainc.compile(f"{run} noise_scale gns on all", Bert(reads=True))
    with pytest.raises(SiteError, match=r"`head.decoder.bias` is also used outside `head.decoder`"):
        program.step(tokens())


class LlamaLike(nn.Module):
    """Rounds before the weight, as transformers' LlamaRMSNorm does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class LateRMSNorm(LlamaLike):
    """Rounds once, after the weight."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide).to(x.dtype)


class GemmaLikeRMSNorm(LlamaLike):
    """Scales by 1 + weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.variance_epsilon)


class WrongEpsRMSNorm(LlamaLike):
    """Adds epsilon outside the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class ImageLayerNorm(nn.LayerNorm):
    """Normalizes the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NamedLayerNorm(nn.LayerNorm):
    """Adds nothing to the arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("module", "layer_type", "casting"),
    [
        (nn.LayerNorm(6), "layer", "none"),
        (nn.LayerNorm(6, bias=False), "layer", "none"),
        (NamedLayerNorm(6), "layer", "none"),
        (nn.RMSNorm(6), "rms", "none"),
        (LlamaLike(6), "rms", "llama"),
        (LateRMSNorm(6), "rms", "none"),
        (GemmaLikeRMSNorm(6), "rms", "gemma"),
    ],
)
def test_the_type_of_a_norm_is_found(
    module: nn.Module, layer_type: str, casting: str, device: str
) -> None:
    before = {name: p.clone() for name, p in module.named_parameters()}
    site = norm_site("a.b", module if device == "cpu" else module.to_empty(device="meta"))
    assert (site.layer_type, site.casting) == (layer_type, casting)
    assert site.weight == "a.b.weight"
    assert site.bias == ("a.b.bias" if "bias" in before else None)
    if device == "cpu":
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("module", [WrongEpsRMSNorm(6), ImageLayerNorm(6), nn.Linear(6, 6)])
def test_what_computes_something_else_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"`x`.*does not compute what LayerNorm or RMSNorm does"):
        norm_site("x", module)


@pytest.mark.models
def test_the_norms_of_llama_and_gemma_are_taken() -> None:
    models = "transformers.models"
    gemma = import_library(f"{models}.gemma.modeling_gemma").GemmaRMSNorm(16)
    llama = import_library(f"{models}.llama.modeling_llama").LlamaRMSNorm(16)
    assert norm_site("n", llama).casting == "llama"
    assert norm_site("n", gemma).casting == "gemma"


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = Raw()
        self.fc = nn.Linear(4, 4)
        self.ln = nn.LayerNorm(4)
        self.bare = nn.LayerNorm(4, elementwise_affine=False)
        self.bn = nn.BatchNorm1d(4)
        self.gn = nn.GroupNorm(2, 4)
        self.frozen = nn.LayerNorm(4).requires_grad_(False)
        self.twin = nn.RMSNorm(4)
        self.other = nn.RMSNorm(4)
        self.other.weight = self.twin.weight


def problems(*names: str) -> list[Problem]:
    inventory = build_inventory(Mixed())
    modules = tuple(inventory.module[name] for name in names)
    return list(Gns().validate_targets(Targets(inventory, modules, ())))


@pytest.mark.parametrize(
    ("name", "rule", "words"),
    [
        ("raw", "wrong-target-kind", "not a supported layer"),
        ("bn", "norm-mixes-examples", "over the batch"),
        ("bare", "nothing-to-measure", "elementwise_affine=False"),
        ("frozen", "selector-matches-frozen", "only frozen"),
        ("other", "wrong-target-kind", "shares its weight"),
    ],
)
def test_what_cannot_be_measured_is_an_error(name: str, rule: str, words: str) -> None:
    (problem,) = problems("ln", name)
    assert (problem.rule, problem.severity) == (rule, "error")
    assert f"`{name}`" in problem.message
    assert words in problem.message


def test_batch_norm_elsewhere_is_an_error() -> None:
    (problem,) = problems("ln")
    assert (problem.rule, problem.severity) == ("norm-mixes-examples", "error")


@pytest.mark.parametrize("smooth", [Duration(0, "steps"), Duration(5, "seconds")])
def test_smoothing_is_a_positive_stretch_of_training(smooth: Duration) -> None:
    with pytest.raises(ValueError, match="expected a duration such as"):
        Gns(smooth=smooth)


PAIRED = """loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps, seed = 4 }
noise_scale gns on type(LayerNorm)
regularize pace on type(Linear) { sigma = 0.4, weight = 0.7 }"""


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_the_two_views_of_an_example_are_one_contribution(executor: Any) -> None:
    x, y = tokens()
    whole = trainc.compile(PAIRED, Tiny(nn.LayerNorm), executor=executor)
    whole.step((x, y))
    single = trainc.compile(PAIRED, Tiny(nn.LayerNorm), executor=executor)
    single.step([(x[b : b + 1], y[b : b + 1]) for b in range(len(x))])
    for name in ("gns.signal", "gns.noise"):
        assert whole.signals[name] == pytest.approx(single.signals[name], rel=1e-9)
    model = Tiny(nn.LayerNorm)
    program = trainc.compile(PAIRED, model, executor="module")
    parameters = [model.get_parameter(f"{m}.{p}") for m in NORMS for p in ("weight", "bias")]
    shares = []
    for b in range(len(x)):
        loss = program.loss((x[b : b + 1], y[b : b + 1]), 1 / len(x))
        gradients = torch.autograd.grad(loss, parameters)
        shares.append(torch.cat([gradient.flatten() for gradient in gradients]))
    s1 = math.fsum(float(share.square().sum()) for share in shares)
    s_big = float(torch.stack(shares).sum(0).square().sum())
    signal, noise = noise_scale_from_contributions(s1, s_big, 1 / len(x))
    assert whole.signals["gns.signal"] == pytest.approx(signal, rel=1e-8)
    assert whole.signals["gns.noise"] == pytest.approx(noise, rel=1e-8)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the estimate of one step, by the graph and by one backward pass per example."""
    model = Tiny(nn.LayerNorm)
    x, y = tokens()
    parameters = [model.get_parameter(f"{m}.{p}") for m in NORMS for p in ("weight", "bias")]

    def loss(b: int) -> Tensor:
        return F.cross_entropy(model(x[b : b + 1]).flatten(0, 1), y[b])

    (signal, noise), _ = Gns.reference(loss, [1 / len(x)] * len(x), parameters)
    spec = "loss cross_entropy optimizer sgd { lr = 0 } noise_scale gns on type(LayerNorm)"
    program = trainc.compile(spec, model, executor="graph")
    program.step((x, y))
    got = (program.signals["gns.signal"], program.signals["gns.noise"])
    pairs = [
        (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        for a, b in zip(got, (signal, noise), strict=True)
    ]
    return (
        {"signal": pairs[0][0], "noise": pairs[1][0]},
        {"signal": pairs[0][1], "noise": pairs[1][1]},
    )
