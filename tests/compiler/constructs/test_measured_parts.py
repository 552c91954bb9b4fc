"""What `lr temp_balance` measures: parts of fused weights, experts, adapters, windows, and other figures than alpha."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.constructs.test_temp_balance import Bench, published
from tests.compiler.test_spectral_units import Experts
from trainc.compiler.constructs.lr.temp_balance import TempBalance
from trainc.dsl.text.render import render_text
from trainc.functional import balance, farms_alpha, hill_alpha


def kinds() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(70, 60), nn.Conv2d(20, 12, 3), nn.Linear(64, 90))


@pytest.mark.parametrize(
    "fields",
    [
        *({"metric": name} for name in ("log_alpha", "stable_rank", "spectral_norm", "entropy")),
        {"window": 30},
        {"window": 40, "window_aspect": 0.5, "window_step": 10, "fit": "dks"},
    ],
    ids=str,
)
def test_factors_of_other_figures_are_the_definition(fields: dict[str, Any]) -> None:
    net, construct = kinds(), TempBalance(**fields)
    step = Bench(net, construct).step()
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in "012"}
    expected = construct.reference(weights)
    assert step.series["tb.lr_factor"] == pytest.approx(expected, rel=1e-3)
    assert sorted(expected.values())[::2] == [pytest.approx(0.5), pytest.approx(1.5)]


def test_windows_are_those_of_the_function() -> None:
    net = kinds()
    step = Bench(net, TempBalance(window=30, window_ops=4)).step()
    for name, alpha in step.series["tb.alpha"].items():
        weight = net.get_submodule(name).get_parameter("weight")
        assert alpha == pytest.approx(farms_alpha(weight, 30, ops=4), rel=1e-6)


def test_a_fused_projection_has_the_factor_of_the_mean_over_its_parts() -> None:
    torch.manual_seed(0)
    net: Any = nn.TransformerEncoderLayer(64, 2, 96)
    with torch.no_grad():
        net.self_attn.in_proj_weight[:64].mul_(torch.logspace(-2, 0, 64)[:, None])
    bench = Bench(net, TempBalance(metric="alpha", shrink=False))
    step = bench.step()
    found, factors = step.series["tb.alpha"], step.series["tb.lr_factor"]
    parts = dict(zip("qkv", net.self_attn.in_proj_weight.chunk(3), strict=True))
    for name, part in parts.items():
        assert found[f"self_attn[{name}]"] == pytest.approx(hill_alpha(part), rel=1e-5)
    others = ("self_attn.out_proj", "linear1", "linear2")
    fused = sum(map(hill_alpha, parts.values())) / 3
    layers = [hill_alpha(net.get_submodule(name).weight) for name in others]
    want = balance([fused, *layers])
    assert [factors[n] for n in ("self_attn", *others)] == pytest.approx(want, rel=1e-4)
    assert bench.factors()["self_attn.in_proj_bias"] == factors["self_attn"]
    whole = Bench(net, published()).step().series["tb.alpha"]
    assert whole["self_attn"] == pytest.approx(hill_alpha(net.self_attn.in_proj_weight), rel=1e-5)


def test_heads_are_measured_apart() -> None:
    torch.manual_seed(0)
    net: Any = nn.MultiheadAttention(64, 4)
    construct = TempBalance(metric="alpha", shrink=False, split="heads", min_eigenvalues=16)
    bench = Bench(net, construct)
    step = bench.step()
    found = step.series["tb.alpha"]
    for i, head in enumerate(net.in_proj_weight.split(16)):
        name = f"in_proj_weight[{'qkv'[i // 4]} head {i % 4}]"
        assert found[name] == pytest.approx(hill_alpha(head), rel=1e-5)
    for i, head in enumerate(net.out_proj.weight.split(16, 1)):
        assert found[f"out_proj[head {i}]"] == pytest.approx(hill_alpha(head), rel=1e-5)
    means = [sum(a for n, a in found.items() if n.startswith(p)) for p in ("in", "out")]
    want = construct.factors({"in": means[0] / 12, "out": means[1] / 4})
    assert list(step.series["tb.lr_factor"].values()) == pytest.approx([*want.values()])


def test_experts_are_measured_each_and_small_parts_not_at_all() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"experts": Experts(turned=False), "fc": nn.Linear(8, 8)})
    bench = Bench(net, TempBalance(metric="alpha", shrink=False, min_eigenvalues=5))
    found = bench.step().series["tb.alpha"]
    down = net.get_submodule("experts").get_parameter("down_proj")
    for i, expert in enumerate(down):
        assert found[f"experts.down_proj[expert {i}]"] == pytest.approx(
            hill_alpha(expert), rel=1e-5
        )
    assert len(found) == 3 + 6 + 1
    few = Bench(net, TempBalance(min_eigenvalues=6))
    assert [group.name for group in few.action.few] == ["experts.gate_up_proj", "experts.down_proj"]


LORA = """
train 1
loss mse
adapt lora on "0" | "1" { rank = 2, alpha = 4 }
optimizer sgd on "**.lora.**" { lr = 1 }
lr temp_balance on "**.lora.**" { metric = alpha, shrink = false, min_eigenvalues = 10 }
"""


def test_a_and_b_of_an_adapter_have_the_factor_of_the_weight_that_they_change() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    program = trainc.compile(LORA, model)
    for layer in model[:2]:
        nn.init.normal_(layer.lora.b.weight)
    used = [m.weight + 2 * m.lora.b.weight @ m.lora.a.weight for m in model[:2]]
    want = balance([hill_alpha(weight) for weight in used])
    program.loss((torch.randn(4, 16), torch.randn(4, 3))).backward()
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters() if "lora" in n}
    program.update()
    for name, (start, gradient) in before.items():
        moved = start - want[int(name[0])] * gradient
        torch.testing.assert_close(model.get_parameter(name), moved, rtol=1e-4, atol=1e-5)
    (row, _) = program.plan.measured
    assert (row["weight"], row["sizes"]) == ("0.weight", ["16x16"])
    assert "update of its adapter" in row["reason"]


def test_the_plan_lists_parts_and_why() -> None:
    spec = """
    train 1
    model "examples.models:gpt" { layers = 1, width = 64, heads = 2, context = 8 }
    loss cross_entropy
    optimizer adamw { lr = 1e-3 }
    lr temp_balance on "blocks.**" & matrices%s
    """
    apart = trainc.plan(spec % " { unit = part }").measured
    assert apart[0]["reason"] == "queries, keys and values apart; a factor each"
    rows = {row["weight"]: row for row in trainc.plan(spec % "").measured}
    fused = rows["blocks.0.attn.qkv.weight"]
    assert (fused["parts"], fused["sizes"]) == (["q", "k", "v"], ["64x64"] * 3)
    assert fused["reason"] == "queries, keys and values apart; the factor of their mean"
    assert rows["blocks.0.mlp.fc.weight"]["reason"] == "one matrix"


def test_a_weight_that_is_not_finite_is_an_error_that_names_it() -> None:
    net = kinds()
    with torch.no_grad():
        net.get_parameter("1.weight")[0, 0, 0, 0] = math.nan
    for construct in (TempBalance(), TempBalance(window=20)):
        with pytest.raises(ValueError, match=r"`1\.weight` has entries that are not finite"):
            Bench(net, construct).step()


def test_a_mask_that_leaves_too_little_takes_a_weight_out() -> None:
    net = kinds()
    with torch.no_grad():
        weight: Tensor = net.get_parameter("0.weight")
        weight[5:].zero_()
    bench = Bench(net, TempBalance(min_eigenvalues=10))
    step = bench.step()
    assert set(step.series["tb.alpha"]) == {"1", "2"}
    assert "`0.weight`" in step.notes[0]
    assert bench.factors()["0.weight"] == 1.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("metric = entropy, fit = dks", "`fit` is of the tail"),
        ("metric = stable_rank, shrink = true", "remove `shrink = true`, or `metric"),
        ("window = 100, shrink = true", "remove `shrink = true`, or `window = 100`"),
        ("window = 100, metric = calibrated", "remove `metric = calibrated`"),
        ("window_ops = 4", "add `window = 100`"),
        ("window = 9, window_ops = 4, window_step = 2", "remove one"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: str, said: str) -> None:
    spec = trainc.check(f"loss mse\noptimizer sgd {{ lr = 0.1 }}\nlr temp_balance {{ {fields} }}")
    assert said in render_text(spec.errors)
