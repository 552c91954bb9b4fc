"""`adapt lora_mul`: by hand, against numbers of the official code of PACE, and merged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import trainc
from tests.compiler.constructs.test_lora import BASE, gpt2, language_model, logits, trained
from tests.conformance import Setup, tiny_gpt

PACE = json.loads((Path(__file__).parents[2] / "reference/regularizers.json").read_text())["pace"]
LAYER = "blocks.1.attn.qkv"


def tensor(row: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, row["dtype"])
    return torch.tensor(row["data"], dtype=dtype).view(row["shape"])


def biased(model: nn.Module) -> nn.Module:
    """Return a model whose biases are not zero, as those of a trained one: d is a factor on them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.arange(len(parameter)).add(1).sin() * 0.1)
    return model


def conformance() -> Setup:
    """Train on such a model."""
    return Setup(model=lambda: biased(tiny_gpt()))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the output of an adapted layer, after training, with loops over the entries of its weights."""
    program = trained('adapt lora_mul on "**.qkv" { rank = 3 }', biased(language_model()))
    layer: Any = program.module.get_submodule(LAYER)
    given = dict(layer.lora_mul.named_parameters())
    assert len(given) == 5
    assert all(value.any() for value in given.values())
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)
    with torch.no_grad():
        want = layer.lora_mul.rule.reference(x, layer.weight, layer.bias, given)
        return {"output": layer(x)}, {"output": want}


class Blocks(nn.Module):
    """The model of the reference file, before it is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        found: Tensor = self.head(x.mean(1))
        return found


OURS = {
    "delta_W_down": "lora_mul.weight_down",
    "delta_W_up": "lora_mul.weight_up",
    "delta_b": "lora_mul.bias",
    "delta_prompt_down": "lora_mul.prompt_down",
    "delta_prompt_up": "lora_mul.prompt_up",
}


def own_name(theirs: str) -> str:
    path, _, leaf = theirs.replace(".fc.adapter", "").replace("adapter.", "").rpartition(".")
    return f"{path}.{OURS.get(leaf, leaf)}".replace(".base_module", "")


def test_noise_on_its_output_gives_the_published_step() -> None:
    row = PACE["full_step"]
    text = "loss cross_entropy optimizer sgd { lr = 0.1 }"
    clause = ' adapt lora_mul on "blocks.*" { rank = 2, train = "head" }'
    model = trainc.compile(text + clause, Blocks()).module
    with torch.no_grad():
        for theirs, value in row["params"].items():
            model.get_parameter(own_name(theirs)).copy_(tensor(value))
    draws = zip(row["noise_draws_in_call_order"], row["sigma_per_block"], strict=True)
    sites = ("blocks.0.lora_mul", "blocks.1.lora_mul", "head")
    for name, (draw, sigma) in zip(sites, draws, strict=True):
        z = 1 + sigma * tensor(draw)
        model.get_submodule(name).register_forward_hook(lambda _, args, out, z=z: out * z)
    x, y = tensor(row["X"]), tensor(row["Y"])
    one, two = model(torch.cat([x, x])).chunk(2)
    loss = functional.cross_entropy(one, y) + row["lambda"] * (one - two).square().sum(1).mean()
    assert float(loss.detach()) == pytest.approx(row["total_loss"], rel=1e-6)
    loss.backward()
    for theirs, gradient in row["grads"].items():
        found = model.get_parameter(own_name(theirs)).grad
        torch.testing.assert_close(found, tensor(gradient), rtol=1e-4, atol=1e-7)


def test_lora_with_a_bias_of_its_own_is_the_published_lora_add() -> None:
    row = PACE["adapter_LoRAadd"]
    model = nn.Sequential(nn.Linear(4, 3))
    clause = 'adapt lora on "0" { rank = 2, alpha = 2, init = xavier, bias = update }'
    program = trainc.compile("loss mse optimizer sgd { lr = 0.1 } " + clause, model)
    names = ("0.lora.b.weight", "0.lora.a.weight", "0.lora.b.bias", "0.weight", "0.bias")
    with torch.no_grad():
        for name, value in zip(names, row["params"].values(), strict=True):
            model.get_parameter(name).copy_(tensor(value))
        x = tensor(row["x"])
        added = model.get_submodule("0.lora")(x)
        torch.testing.assert_close(added, tensor(row["forward_adapter"]))
        merged = tensor(row["forward_merge"])
        torch.testing.assert_close(model(x), merged)
        torch.testing.assert_close(program.merge()(x), merged)


@pytest.mark.parametrize("terms", ["weight", "prompt", "weight, prompt"])
@pytest.mark.parametrize("make", [language_model, gpt2])
def test_it_starts_as_the_model_and_merges(make: Any, terms: str) -> None:
    model = make()
    start = logits(model).detach()
    names = '"**.qkv" | "**.fc"' if make is language_model else "type(Conv1D)"
    clause = f"adapt lora_mul on {names} {{ rank = 2, terms = [{terms}] }}"
    program = trainc.compile(BASE + clause, model)
    assert torch.equal(logits(model), start)
    ids = torch.arange(24).view(3, 8)
    for _ in range(2):
        program.step((ids, ids.roll(-1, 1)))
    before = logits(model).detach()
    assert not torch.allclose(before, start)
    torch.testing.assert_close(logits(program.merge()), before, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(make().state_dict())


def test_a_prompt_needs_a_bias_to_be_merged_into() -> None:
    text = "loss mse optimizer sgd { lr = 0.1 } adapt lora_mul on type(Linear) "
    x = torch.ones(3, 4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    program = trainc.compile(text + "{ rank = 2 }", model)
    program.step((x, x))
    before = model(x).detach()
    with pytest.raises(ValueError, match=r"`0\.lora_mul` cannot be merged: its prompt adds"):
        program.merge()
    assert torch.equal(model(x), before)
    other = nn.Sequential(nn.Linear(4, 4, bias=False))
    program = trainc.compile(text + "{ rank = 2, terms = [weight] }", other)
    program.step((x, x))
    before = other(x).detach()
    torch.testing.assert_close(program.merge()(x), before)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ("on type(Embedding) { rank = 2 }", "it is no nn.Linear and no Conv1D"),
        ('on "head" { terms = [] }', "expected `weight`, `prompt` or both"),
        ('on "head" { terms = [prompt, prompt] }', "a term is named twice"),
        ('on "head" { rank = -1 }', "rank"),
    ],
)
def test_bad_input_is_an_error_at_its_place(clause: str, message: str) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(BASE + f"adapt lora_mul {clause}", language_model())
    (first, *_) = raised.value.diagnostics
    assert message in str(first)
    assert ":2:" in str(first.labels[0].span)
