"""PAC-tuning: the bound's KL, gradients of the sizes, two stages, and what it needs to know."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import trainc
from tests.compiler.test_weight_hooks import key_of
from tests.conformance import Setup
from trainc.compiler.constructs.perturb.pac_noise import LEAST, PacNoise, pac_kl
from trainc.compiler.program.program import Program
from trainc.kernels.noise.random_entries import random_entries

SPEC = (
    'loss mse optimizer sgd on all - "**.pac_noise.*" { lr = 0.3 } run { length = 9 steps }'
    ' optimizer sgd as levels on "**.pac_noise.*" { lr = 0.1 } '
)
FIELDS = "gamma = 5, samples = 20, start = mean"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def compiled(fields: str, clause: str = "") -> Program:
    return trainc.compile(f'{SPEC} perturb pac_noise on "0" {{ {fields} }} {clause}', model())


def wanted(program: Program, start: nn.Module) -> Tensor:
    """Return the loss of the step that is about to run, by definition."""
    x, y = data()
    named: dict[str, Any] = dict(program.module.named_parameters())
    sites = [site.weight for site in program.execution.rewrite.hooks if site.weight]
    changed, kl = {}, torch.zeros((), dtype=torch.float64)
    for site in sites:
        own, weight = site.attribute, named[site.name]
        p, b = (named[f"0.pac_noise.log_{of}_{own}"] for of in ("sigma", "prior"))
        noise = random_entries(weight, key_of(program), site.index, "normal")
        changed[own] = PacNoise.reference(weight, noise, p)
        posterior = Normal(weight.detach(), p.exp().expand(weight.shape))
        prior = Normal(start.get_parameter(site.name).detach(), b.exp())
        kl = kl + kl_divergence(posterior, prior).sum()
    loss = torch.nn.functional.mse_loss(x @ changed["weight"].T + changed["bias"], y)
    return loss + kl / (5 * 20)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for levels in ("per_tensor", "per_parameter"):
        program = compiled(f"{FIELDS}, levels = {levels}")
        for _ in range(2):
            program.step(data())
        named = dict(program.module.named_parameters())
        losses = program.loss(data()), wanted(program, model())
        for loss, found in zip(losses, results, strict=True):
            gradients = torch.autograd.grad(loss, list(named.values()))
            found[levels] = loss.detach()
            found |= {f"{levels} {n}": g for n, g in zip(named, gradients, strict=True)}
    return results


def conformance() -> Setup:
    rest = Setup().rest.replace("adamw", 'adamw on all - "**.pac_noise.*"')
    return Setup(rest=rest + ' optimizer sgd as levels on "**.pac_noise.*" { lr = 0.01 }')


def test_sizes_start_from_the_weights() -> None:
    for start, power in (("mean", 1), ("square", 2)):
        program = compiled(f"samples = 20, start = {start}")
        mean = float(model().get_parameter("0.weight").detach().abs().mean())
        for of in ("sigma", "prior"):
            found = program.module.get_parameter(f"0.pac_noise.log_{of}_weight")
            assert float(found.detach().exp()) == pytest.approx(mean**power)
        assert all(p.dim() for p in program.module.parameters())  # `fully_shard` takes no other
    zeros = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(zeros.get_parameter("0.bias"))
    made = trainc.compile(f'{SPEC} perturb pac_noise on "0" {{ samples = 9 }}', zeros).module
    size = made.get_parameter("0.pac_noise.log_sigma_bias").detach().exp()
    assert float(size) == pytest.approx(LEAST**2)


def test_in_the_second_stage_the_sizes_stay_and_the_noise_goes_on() -> None:
    program = compiled(f"{FIELDS}, learn = 2 steps")
    sizes = [p for n, p in program.module.named_parameters() if "pac_noise" in n]
    seen, losses = [], []
    for _ in range(5):
        metrics = program.step(data())
        losses.append(metrics)
        seen.append(torch.stack([p.detach().clone() for p in sizes]))
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(seen[1], later) for later in seen[2:])
    assert losses[1]["pac_noise"] > 0
    assert [metrics["pac_noise"] for metrics in losses[2:]] == [0.0] * 3
    own = program.module.get_parameter("0.weight").detach().clone()
    with torch.no_grad():
        plain = float(torch.nn.functional.mse_loss(program.module(data()[0]), data()[1]))
    assert program.step(data())["loss"] != pytest.approx(plain, rel=1e-9)
    assert not torch.equal(own, program.module.get_parameter("0.weight"))


def test_the_divergence_is_zero_at_the_prior_and_refuses_what_does_not_fit() -> None:
    w, zero = torch.randn(3, 2), torch.zeros(())
    assert float(pac_kl([w], [w], [zero], [zero])) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="one length"):
        pac_kl([w], [w], [zero], [])
    with pytest.raises(ValueError, match=r"a weight of shape \[3, 2\] needs"):
        pac_kl([w], [w], [torch.zeros(2)], [zero])


@pytest.mark.parametrize(
    ("on", "fields", "message"),
    [
        ('"0"', "gamma = 5", "write `samples = 1000`"),
        ("type(Sequential)", FIELDS, "has no floating-point parameters of its own"),
    ],
)
def test_what_cannot_be_meant_is_refused(on: str, fields: str, message: str) -> None:
    with pytest.raises(trainc.SpecError, match=message):
        trainc.compile(f"{SPEC} perturb pac_noise on {on} {{ {fields} }}", model())
