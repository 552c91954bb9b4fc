"""Weight noise: its definition for every scale, the ramp, masks, adapters, and weights in 16 bits."""

import math

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.test_weight_hooks import key_of
from trainc.compiler.constructs.perturb.noise import Noise
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.program.program import Program
from trainc.kernels.noise.random_entries import random_entries

SPEC = "loss mse optimizer sgd { lr = 0.1 } run { length = 8 steps } "


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=dtype), torch.randn(5, 3, dtype=dtype)


def drawn(program: Program, name: str) -> Tensor:
    sites = (s.weight for s in program.execution.rewrite.hooks)
    (index,) = [site.index for site in sites if site is not None and site.name == name]
    return random_entries(program.module.get_parameter(name), key_of(program), index, "normal")


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for scale in ("absolute", "rms", "row_norm"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        clause = f"perturb noise on all {{ sigma = 0.2, scale = {scale} }}"
        program, rule = (
            trainc.compile(SPEC + clause, model),
            Noise.model_validate({"sigma": 0.2, "scale": scale}),
        )
        x, y = data()
        weight, bias = (
            rule.reference(p, drawn(program, n), 0.2) for n, p in model.named_parameters()
        )
        wanted = torch.nn.functional.mse_loss(x @ weight.T + bias, y)
        for loss, found in zip((program.loss((x, y)), wanted), results, strict=True):
            named = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(named.values()))
            found[scale] = loss.detach()
            found |= {f"{scale} {n}": g for n, g in zip(named, gradients, strict=True)}
    return results


@pytest.mark.parametrize(
    "adapter", ["lora { alpha = 4, rank = 2", "dora { alpha = 4, rank = 2", "lora_mul { rank = 2"]
)
def test_the_ramp_is_that_of_flat_lora_and_the_weights_are_merged(adapter: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    adapt = adapter.replace(" {", ' on "0" {') + (
        ", terms = [weight] }" if "mul" in adapter else " }"
    )
    text = (
        f"loss mse optimizer sgd {{ lr = 0.5 }} run {{ length = 8 steps }} adapt {adapt}"
        ' perturb noise on "0.weight" { sigma = 0.05, scale = row_norm, ramp = cosine }'
    )
    program = trainc.compile(text, model)
    x, y = data()
    base = model.get_parameter("0.weight").detach().clone()
    for step in range(5):
        one = adapters_of(model)[0]
        with torch.no_grad():
            merged = one.adapter.used_weight(one.layer, base)
        sigma = 0.05 * (1 - math.cos(math.pi * step / 8)) / 2 * merged.norm(dim=1) / 4**0.5
        changed = merged + sigma[:, None] * drawn(program, "0.weight")
        want = float(torch.nn.functional.mse_loss(x @ changed.T, y))
        assert program.step((x, y))["loss"] == pytest.approx(want, rel=1e-9)
    assert torch.equal(model.get_parameter("0.weight"), base)


@pytest.mark.parametrize("mask", ["sift", "magnitude"])
def test_entries_that_do_not_train_have_no_noise(mask: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    clauses = f"mask {mask} on all {{ density = 50% }} perturb noise on all {{ sigma = 0.3 }}"
    program = trainc.compile(SPEC + clauses, model)
    x, y = data()
    program.step((x, y))
    trains = program.execution.method.masks["weight"].trained_entries()
    assert 0 < int(trains.sum()) < trains.numel()
    changed = model.weight.detach() + 0.3 * drawn(program, "weight") * trains
    want = float(torch.nn.functional.mse_loss(x @ changed.T, y))
    assert program.step((x, y))["loss"] == pytest.approx(want, rel=1e-9)


def test_weights_in_16_bits_keep_their_bits() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).bfloat16()
    program = trainc.compile(
        "loss mse optimizer sgd { lr = 0 } perturb noise on all { sigma = 0.1, scale = rms }", model
    )
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    losses = [program.step((x, x))["loss"] for _ in range(3)]
    assert len(set(losses)) > 1
    assert all(map(torch.equal, before, model.parameters()))


def test_rows_are_those_of_outputs_in_layers_with_another_order() -> None:
    from trainc.compiler.constructs.perturb.noise import Noisy

    weight = torch.randn(4, 6, 3)
    size = Noisy("row_norm", transposed=True).size(weight)
    torch.testing.assert_close(
        size.flatten(), weight.transpose(0, 1).flatten(1).norm(dim=1) / 12**0.5
    )
