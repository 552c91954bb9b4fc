"""`adapt apt`: by definition, the published numbers, and both starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.constructs.adapt.apt import approximated_prompts
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.1 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS.roll(-1, 1))
REFERENCE = json.loads(
    (Path(__file__).parents[2] / "reference/more_methods.json").read_text(encoding="utf-8")
)["apt"]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24).double()


def trained(setting: str, steps: int = 4) -> Program:
    clause = f'adapt apt on "blocks.*.attn" {{ tokens = 5, rank = 2{setting} }}'
    program = trainc.compile(BASE + clause, language_model())
    for _ in range(steps):
        program.step(BATCH)
    return program


SETTINGS = {"identity": "", "published": ", init = published", "METER": ", init = published, scale = one"}  # fmt: skip


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the outputs of adapted attentions, after training, with loops over tokens and prompts."""
    compiled, reference = {}, {}
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(1, 3, 16)
    for name, setting in SETTINGS.items():
        one = adapters_of(trained(setting).module)[1]
        rule: Any = one.adapter.rule
        parts = {n: p.detach() for n, p in one.adapter.named_parameters()}
        assert all(p.any() for p in parts.values())
        with torch.no_grad():
            compiled[name] = one.layer(x)[0]
            one.remove()
            reference[name] = rule.reference(one.layer(x)[0], x[0], parts)
    return compiled, reference


def grid(shape: tuple[int, ...], scale: float, phase: float) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((1.7 * i + 0.3 + phase).sin() * scale).view(shape)


def test_values_and_gradients_are_the_published_ones() -> None:
    prompts, a, b = grid((5, 6), 0.5, 1), grid((2, 6), 1, 2), grid((6, 2), 0.3, 3)
    s = torch.tensor(0.1, dtype=torch.float64)
    leaves = [one.requires_grad_() for one in (prompts, a, b, s)]
    x, inputs = grid((1, 3, 6), 1, 4), grid((1, 3, 6), 1, 5)
    y = approximated_prompts(x, inputs, *leaves)
    dt, da, db, ds = torch.autograd.grad(y, leaves, grid((1, 3, 6), 1, 6))
    keys = prompts + prompts @ a.T @ b.T
    got = {
        "w": (inputs @ keys.T).relu().amax(-1)[0],
        "y0": y[0, 0],
        "dscale": ds,
        "dT0": dt[0],
        "dA_norm": da.norm(),
        "dB_norm": db.norm(),
    }
    assert got.keys() == REFERENCE.keys()
    for name, value in got.items():
        want = torch.tensor(REFERENCE[name], dtype=torch.float64)
        torch.testing.assert_close(value, want, rtol=2e-6, atol=1e-6, msg=name)


def test_one_start_is_the_model_and_the_published_one_is_not() -> None:
    want = language_model()(IDS)
    assert torch.equal(trained("", steps=0).module(IDS), want)
    published = trained(", init = published", steps=0).module
    assert not torch.equal(published(IDS), want)
    adapter = adapters_of(published)[0].adapter
    assert not adapter.get_parameter("b").any()
    assert "gate" not in dict(adapter.named_parameters())
    assert float(adapter.get_parameter("prompts").detach().std()) == pytest.approx(0.02, rel=0.3)


def test_it_has_as_many_parameters_as_meter() -> None:
    """24 sites of METER have 3,833,880, those of one block the 24th."""
    text = 'adapt apt on "blocks.*.attn" { tokens = 200, rank = 4, init = published }'
    module = gpt(layers=1, width=768, heads=2, context=4, vocabulary=8)
    program = trainc.compile(BASE + text, module)
    count = sum(p.numel() for p in program.module.parameters() if p.requires_grad)
    assert 24 * count == 3_833_880


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, prompts = torch.ones(3, 6), torch.ones(5, 6)
    with pytest.raises(ValueError, match=r"`a` \(h, C\) and `b` \(C, h\), found .*\(2, 5\)"):
        approximated_prompts(x, x, prompts, torch.ones(2, 5), torch.ones(6, 2))
    with pytest.raises(ValueError, match="r of 1 or more"):
        approximated_prompts(x, x, prompts[:0], torch.ones(2, 6), torch.ones(6, 2))
