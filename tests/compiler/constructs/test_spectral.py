"""Rates by the spectral condition: the factor of each shape, and what updates then measure."""

import math

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import tiny_gpt, tokens
from trainc.compiler.constructs.lr.spectral import Spectral

NAMES = {
    "blocks.0.mlp.fc.weight": (64, 16),
    "blocks.0.mlp.proj.weight": (16, 64),
    "head.weight": (24, 16),
}


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the moves of one step of SGD by the compiled clause, and those without it times the factors."""
    found: list[dict[str, Tensor]] = []
    for clause in ("", "lr spectral { base_width = 32 }"):
        net = tiny_gpt().double()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} {clause}", net).step(
            tokens(0)
        )
        found.append({name: p.detach() - before[name] for name, p in net.named_parameters()})
    rule = Spectral(base_width=32)
    expected = {
        name: rule.reference(*shape, "gradient") * found[0][name] for name, shape in NAMES.items()
    }
    return {name: found[1][name] for name in NAMES}, expected


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ("adamw { lr = 1 }", lambda out, into: 32 / into),
        ("sgd { lr = 1 }", lambda out, into: out / into),
        (
            "muon on ndim(2) - role(embedding) { lr = 1, others = sgd { lr = 1 } }",
            lambda out, into: math.sqrt(out / into / max(1, out / into)),
        ),
        (
            "muon on ndim(2) - role(embedding) { lr = 1, adjust_lr_fn = match_rms_adamw, others = sgd { lr = 1 } }",
            lambda out, into: math.sqrt(out / into * 32 / max(out, into)),
        ),
    ],
)
def test_the_factor_follows_the_shape_and_the_optimizer(optimizer: str, factor: object) -> None:
    spec = f"loss cross_entropy optimizer {optimizer} lr spectral {{ base_width = 32 }}"
    rows = {row["name"]: row["lr_values"] for row in trainc.plan(spec, tiny_gpt()).parameters}
    for name, shape in NAMES.items():
        assert [float(v) for v in rows[name]] == [pytest.approx(factor(*shape))]  # type: ignore[operator]
    assert rows["embed.token.weight"] == rows["ln_f.bias"] == []


def test_updates_of_muon_have_the_norm_of_the_shape() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 4, bias=False)).double()
    before = [p.detach().clone() for p in net.parameters()]
    spec = (
        "loss mse optimizer muon on all { lr = 0.1, ns_steps = 9 } lr spectral { base_width = 8 }"
    )
    trainc.compile(spec, net).step((torch.randn(64, 8).double(), torch.randn(64, 4).double()))
    for p, start in zip(net.parameters(), before, strict=True):
        norm = float(torch.linalg.matrix_norm(p.detach() - start, 2))
        assert norm == pytest.approx(0.1 * math.sqrt(p.size(0) / p.size(1)), rel=0.3)


def test_kernel_positions_count_as_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    spec = "loss mse optimizer adamw { lr = 1 } lr spectral { base_width = 18 }"
    rows = {row["name"]: row["lr_values"] for row in trainc.plan(spec, net).parameters}
    assert [float(v) for v in rows["0.weight"]] == [pytest.approx(1.0)]


@pytest.mark.parametrize("on", ["role(embedding)", "ndim(1)"])
def test_what_has_no_fan_in_is_refused(on: str) -> None:
    spec = (
        f"loss cross_entropy optimizer adamw {{ lr = 1 }} lr spectral on {on} {{ base_width = 8 }}"
    )
    with pytest.raises(trainc.SpecError, match="no fan-in"):
        trainc.plan(spec, tiny_gpt())
