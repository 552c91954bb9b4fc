"""`adapt parallel`: by definition, where it starts, its drop path, and what it cannot be beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.1 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS.roll(-1, 1))
REFERENCE = json.loads(
    (Path(__file__).parents[2] / "reference/more_methods.json").read_text(encoding="utf-8")
)["forecast_peft"]


EXECUTORS: tuple[Any, ...] = ("graph", "module")
MLPS = 'on "**.mlp"'
NOISE = 'regularize pace on "blocks.0.mlp" | "blocks.1.mlp.fc" { sigma = 0.3, weight = 0.1 }'


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24).double()


def trained(clause: str, executor: Any = "auto", steps: int = 3) -> Program:
    program = trainc.compile(BASE + clause, language_model(), executor=executor)
    for _ in range(steps):
        program.step(BATCH)
    return program


SETTINGS = {
    "mlp": ("blocks.1.mlp", "rank = 3, scale = 0.5"),
    "block": ("blocks.1", "rank = 2, act = relu, norm = layer, init = xavier"),
    "linear": ("blocks.1.mlp.fc", "rank = 2, act = silu"),
}


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the outputs of adapted modules, after training, with loops over rank and channels."""
    compiled, reference = {}, {}
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(1, 3, 16)
    for name, (path, setting) in SETTINGS.items():
        module = trained(f'adapt parallel on "{path}" {{ {setting} }}').module.eval()
        (one,) = adapters_of(module)
        rule: Any = one.adapter.rule
        parts = {n: p.detach() for n, p in one.adapter.named_parameters()}
        assert all(p.any() for p in parts.values())
        with torch.no_grad():
            compiled[name] = one.layer(x)[0]
            one.remove()
            reference[name] = rule.reference(x[0], one.layer(x)[0], parts)
    return compiled, reference


def test_it_starts_as_the_model_or_as_published() -> None:
    want = language_model()(IDS)
    start = trained('adapt parallel on "**.attn" | "**.mlp"', steps=0).module
    assert torch.equal(start(IDS), want)
    published = trained('adapt parallel on "**.mlp" { init = xavier, rank = 4 }', steps=0).module
    assert not torch.equal(published(IDS), want)
    (one, _) = adapters_of(published)
    up = one.adapter.get_parameter("up.weight").detach()
    assert 0.5 < float(up.abs().max()) / (6 / (16 + 4)) ** 0.5 <= 1


def test_a_block_of_forecast_peft_has_as_many_parameters_as_the_published_one() -> None:
    text = 'adapt parallel on "**.attn" | "**.mlp" { rank = 64 }'
    module = gpt(layers=1, width=128, heads=8, context=8, vocabulary=24)
    program = trainc.compile(BASE + text, module)
    count = sum(p.numel() for p in program.module.parameters() if p.requires_grad)
    assert count == REFERENCE["adapter_params_block"]


DROPPED = 'adapt parallel on "blocks.0.mlp" { rank = 2, init = xavier, drop_path = 0.5 }'


def test_drop_path_leaves_examples_out_in_training() -> None:
    module = trained(DROPPED, steps=0).module
    layer: Any = module.get_submodule("blocks.0.mlp")
    x = torch.ones(64, 2, 16, dtype=torch.float64)
    module.eval()
    with torch.no_grad():
        own, whole = layer.proj(nn.functional.gelu(layer.fc(x))), layer(x)
        factors = (module.train().get_submodule("blocks.0.mlp")(x) - own) / (whole - own)
    each = factors[:, 0, 0]
    torch.testing.assert_close(factors, each[:, None, None].expand_as(factors))
    assert {round(float(one), 6) for one in each} == {0.0, 2.0}


def test_drop_path_by_graph_is_that_of_the_modules() -> None:
    losses = []
    for executor in ("graph", "module"):
        torch.manual_seed(3)
        losses.append(trained(DROPPED, executor, steps=0).step(BATCH)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("name", ["parallel { rank = 2, init = xavier }", "apt { tokens = 2 }"])
def test_noise_of_an_adapted_module_is_on_what_its_adapter_adds(name: str) -> None:
    """And on the layers inside it, where these are selected, on their own outputs."""
    site = {"blocks.0.mlp": f"blocks.0.mlp.{name.split()[0]}", "blocks.1.mlp.fc": "blocks.1.mlp.fc"}
    clause = f"adapt {name.replace(' {', chr(32) + MLPS + ' {', 1)} " + NOISE
    programs = [trainc.compile(BASE + clause, language_model(), executor=e) for e in EXECUTORS]
    for _ in range(3):
        one, two = (program.step(BATCH) for program in programs)
        assert one == pytest.approx(two, rel=1e-10)
    assert one["consistency"] > 0
    hooked = {h.module for h in programs[0].execution.method.rewrite.hooks}
    assert hooked == set(site.values())


class Mixer(nn.Module):
    """Takes eight channels, of which its first layer says nothing, and gives four."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.fewer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fewer(x) * self.gate(x[..., :3])
        return y


class Encoder(nn.Module):
    """torch's own attention, which returns a pair, and others around it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.end = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0] + self.mix(x.mT).mT
        found: Tensor = self.end(self.layers(y))
        return found


X = torch.linspace(-1, 1, 96).view(2, 6, 8)
PAIR = "loss mse optimizer sgd { lr = 0.1 }\n"


def test_of_a_tuple_the_first_tensor_is_changed() -> None:
    torch.manual_seed(0)
    text = PAIR + 'adapt parallel on "attention" { rank = 2, init = xavier }'
    program = trainc.compile(text, Encoder())
    layer: Any = program.module.get_submodule("attention")
    y, weights = layer(X, X, X)
    dy = layer.parallel(X)
    (one,) = adapters_of(program.module)
    one.remove()
    own, same = layer(X, X, X)
    torch.testing.assert_close(y, own + dy)
    assert torch.equal(weights, same)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "mix"', "`mix` (Conv1d) has no linear layer"),
        ('on "attention.out_proj"', "is never called"),
        ('on "layers.0" { width = 9 }', "`layers.0` takes 8 channels, not 9"),
        ('on "layers.0" every 2 steps', "remove `every 2 steps`"),
    ],
)
def test_what_it_cannot_be_beside_is_refused_where_it_is_written(clause: str, message: str) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(PAIR + "adapt parallel " + clause, Encoder())
    assert message in str(raised.value)
    assert all(d.labels for d in raised.value.diagnostics)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "end" { width = 8 }', "`end` gives (2, 6, 4), but its adapter computes (2, 6, 8)"),
        ('on "end"', "first input of `end` is (2, 6, 8), but its adapter takes 3 channels"),
    ],
)
def test_what_only_a_pass_shows_is_refused_there(clause: str, message: str) -> None:
    program = trainc.compile(PAIR + "adapt parallel " + clause, Encoder())
    with pytest.raises(SiteError) as raised:
        program.step((X, torch.zeros(2, 6, 4)))
    assert message in str(raised.value)
    assert raised.value.clause == "parallel"
