"""`adapt dora`: by hand, against peft, and merged again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import trainc
from tests.compiler.constructs.test_lora import (
    BASE,
    CASES,
    language_model,
    logits,
    trained,
    with_peft,
)
from trainc.compiler.program.program import Program

LAYER = "blocks.1.attn.qkv"


def adapter_of(program: Program, layer: str = LAYER) -> Any:
    return program.module.get_submodule(f"{layer}.dora")


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the outputs of an adapted layer, after training, with loops over the entries of W, A, B and m."""
    compiled, reference = {}, {}
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)
    for scale in ("standard", "rslora"):
        clause = f'adapt dora on "**.qkv" {{ rank = 3, alpha = 6, scale = {scale} }}'
        program = trained(clause, language_model())
        layer: Any = program.module.get_submodule(LAYER)
        one = adapter_of(program)
        assert one.b.weight.any()
        with torch.no_grad():
            compiled[scale] = layer(x)
            given = (layer.weight, layer.bias, one.a.weight, one.b.weight, one.magnitude)
            reference[scale] = one.rule.reference(x, *given)
    return compiled, reference


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_step_has_the_gradients_of_a_constant_length(executor: Any) -> None:
    program = trained(
        'adapt dora on "**.qkv" { rank = 3, alpha = 6 }', language_model(), 1, executor
    )
    before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    by_hand = language_model()
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = dict(by_hand.named_parameters())
    for layer in ("blocks.0.attn.qkv", LAYER):
        names = [f"{layer}.dora.{name}" for name in ("a.weight", "b.weight", "magnitude")]
        a, b, m = (before[name].clone().requires_grad_() for name in names)
        leaves |= dict(zip(names, (a, b, m), strict=True))
        v = weights[f"{layer}.weight"].detach() + 2 * b @ a
        weights[f"{layer}.weight"] = (m / v.norm(dim=1).detach())[:, None] * v
    ids = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
    out = torch.func.functional_call(by_hand, weights, (ids,))
    loss = functional.cross_entropy(out.flatten(0, 1), ids.roll(-1, 1).flatten())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert program.step((ids, ids.roll(-1, 1)))["loss"] == pytest.approx(
        float(loss.detach()), rel=1e-12
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        got = program.module.get_parameter(name).detach()
        torch.testing.assert_close(got, leaf.detach() - 0.1 * gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_starts_as_the_model(dtype: torch.dtype) -> None:
    model = language_model().to(dtype)
    want = logits(model).detach()
    program = trainc.compile(BASE + 'adapt dora on "**.qkv" | "embed.token" { alpha = 16 }', model)
    assert torch.equal(logits(program.module), want)


def test_a_row_of_zeros_trains_once_its_update_does() -> None:
    model = language_model()
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.weight")[0] = 0
    program = trained('adapt dora on "**.qkv" { rank = 2, alpha = 4 }', model, 4)
    assert all(p.isfinite().all() for p in program.module.parameters())
    before = logits(program.module).detach()
    torch.testing.assert_close(logits(program.merge()), before, rtol=1e-12, atol=1e-12)


DORA = {name: CASES[name] for name in ("biases", "mixed", "scaled", "conv1d")}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("make", "clause"), DORA.values(), ids=DORA)
def test_peft_computes_the_same_and_merging_does(
    make: Callable[[], nn.Module], clause: str, tmp_path: Path
) -> None:
    program = trained(f"adapt dora {clause}", make(), 2)
    mine = program.module
    program.save_adapters(tmp_path / "mine")
    theirs = with_peft(make(), tmp_path / "mine")

    def compare() -> None:
        for model in (mine, theirs):
            model.zero_grad()
            logits(model).square().sum().backward()
        torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-12, atol=1e-12)
        got = {n: p.grad for n, p in mine.named_parameters() if p.requires_grad}
        want = [p.grad for p in theirs.parameters() if p.requires_grad]
        key = lambda g: float(g.double().abs().sum())  # noqa: E731  (peft has another order)
        for a, b in zip(sorted(map(key, got.values())), sorted(map(key, want)), strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12)

    compare()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.arange(parameter.numel()).view_as(parameter).sin() * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    program.load_adapters(tmp_path / "theirs")
    compare()
    before = logits(mine).detach()
    base = make()
    assert not torch.allclose(before, logits(base))
    merged = program.merge()
    torch.testing.assert_close(logits(merged), before, rtol=1e-11, atol=1e-11)
    assert list(merged.state_dict()) == list(base.state_dict())


def test_dropout_is_on_the_whole_change_as_in_peft(tmp_path: Path) -> None:
    clause = 'adapt dora on "**.qkv" { rank = 2, alpha = 4, dropout = 0.5 }'
    program = trained(clause, language_model())
    program.save_adapters(tmp_path)
    theirs = with_peft(language_model(), tmp_path).train()
    for model in (program.module.train(), theirs):
        torch.manual_seed(5)
        model.zero_grad()
        logits(model).square().sum().backward()
    torch.manual_seed(5)
    mine = logits(program.module)
    torch.manual_seed(5)
    torch.testing.assert_close(mine, logits(theirs), rtol=1e-12, atol=1e-12)
    torch.manual_seed(6)
    assert not torch.allclose(mine, logits(theirs), rtol=1e-3)
