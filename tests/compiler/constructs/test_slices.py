"""Factors on slices of a weight, `unit = part`: queries, keys, values, or heads, of one parameter have a rate each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.functional import balance, hill_alpha
from trainc.runtime.factors.action import BalanceFactors

WIDTH, HEADS = 24, 2
SPEC = """train 1
loss cross_entropy
run { length = 100 steps }
optimizer %s
lr temp_balance on "blocks.**" & ndim(2) every 3 steps {
    metric = alpha, shrink = false, min_eigenvalues = %d, unit = part, %s
}
"""
ADAMW = "adamw { lr = 1e-2, weight_decay = 0.1 }"
BATCH = (torch.arange(32).view(4, 8) % 11, (torch.arange(32).view(4, 8) + 1) % 11)


def model() -> nn.Module:
    torch.manual_seed(0)
    made = gpt(layers=1, width=WIDTH, heads=HEADS, context=8, vocabulary=11).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith("blocks") and parameter.dim() == 2:
                parameter.mul_(torch.logspace(-1, 0, len(parameter)).double()[:, None])
    return made


def program(fields: str, least: int = 10, optimizer: str = ADAMW, more: str = "") -> trainc.Program:
    return trainc.compile(SPEC % (optimizer, least, fields) + more, model())


def weights(made: trainc.Program) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in made.module.named_parameters()}


def cuts(name: str, weight: Tensor, by_head: bool) -> list[Tensor]:
    """Return the parts of a weight as views, by hand."""
    each = WIDTH // HEADS
    if "qkv" in name:
        return list(weight.split(each if by_head else WIDTH))
    return list(weight.split(each, 1)) if by_head and "attn.proj" in name else [weight]


def expected(before: dict[str, Tensor], by_head: bool) -> dict[str, Tensor]:
    """Return the factor of each entry of the weights, by definition, on parts cut by hand."""
    names = [n for n in before if n.startswith("blocks") and before[n].dim() == 2]
    alphas = [hill_alpha(part) for n in names for part in cuts(n, before[n], by_head)]
    factors = iter(balance(alphas))
    found = {}
    for name in names:
        found[name] = torch.ones_like(before[name])
        for part in cuts(name, found[name], by_head):
            part.fill_(next(factors))
    return found


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "optimizer", [ADAMW, "sgd { lr = 0.5, momentum = 0.9, weight_decay = 0.1 }"]
)
def test_each_part_moves_by_its_own_rate(by_head: bool, optimizer: str) -> None:
    made = program("split = heads" if by_head else "split = parts", optimizer=optimizer)
    plain = trainc.compile(f"train 1 loss cross_entropy optimizer {optimizer}", model())
    before = weights(made)
    factor = expected(before, by_head)
    made.step(BATCH)
    plain.step(BATCH)
    moved = weights(plain)
    for name, weight in weights(made).items():
        change = factor.get(name, torch.ones(()).double()) * (moved[name] - before[name])
        torch.testing.assert_close(weight, before[name] + change, rtol=0, atol=1e-14)
    assert len({round(float(f), 9) for one in factor.values() for f in one.unique()}) > 4


def test_factors_hold_between_measurements_ramp_and_resume_bit_for_bit() -> None:
    fields = "range = 0.5..2, ramp = 4 steps, hysteresis = 0.01"
    whole, parts = program(fields), program(fields)
    for _ in range(4):
        whole.step(BATCH)
    parts.load_state_dict(whole.state_dict())
    for _ in range(4):
        whole.step(BATCH)
        parts.step(BATCH)
        assert whole.report().series == parts.report().series
    assert all(torch.equal(a, weights(parts)[n]) for n, a in weights(whole).items())
    (action,) = (a for a in whole.execution.method.actions if isinstance(a, BalanceFactors))
    assert action.measurements == 3
    assert set(action.lr_factors) >= {f"blocks.0.attn.qkv[{part}]" for part in "qkv"}


class Grouped(nn.Module):
    """A projection to queries of 4 heads, and keys and values of one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 1
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * (WIDTH // 4))
        self.proj = nn.Linear(WIDTH + 2 * (WIDTH // 4), WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(self.qkv(x))
        return y


def test_a_part_that_is_too_small_keeps_the_rate_and_a_bias_has_the_mean() -> None:
    fields = "metric = alpha, shrink = false, range = 1..3, unit = part, min_eigenvalues = 10"
    head = "train 1 loss mse optimizer sgd { lr = 0.1 } "
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, WIDTH).double()
    moved: list[dict[str, Tensor]] = []
    for clause in (f"lr temp_balance on all {{ {fields} }}", ""):
        torch.manual_seed(1)
        one = trainc.compile(head + clause, Grouped().double())
        before = weights(one)
        one.step((x, y))
        moved.append({n: w - before[n] for n, w in weights(one).items()})
    scaled, plain = moved
    alphas = [hill_alpha(before["qkv.weight"][:WIDTH]), hill_alpha(before["proj.weight"])]
    q, out = balance(alphas, range=(1, 3))
    factors = torch.ones(len(before["qkv.bias"])).double()
    factors[:WIDTH] = q
    want = {
        "qkv.weight": factors[:, None],
        "qkv.bias": torch.tensor((q + 2) / 3, dtype=torch.float64),
        "proj.weight": torch.tensor(out, dtype=torch.float64),
        "proj.bias": torch.tensor(out, dtype=torch.float64),
    }
    for name, factor in want.items():
        torch.testing.assert_close(scaled[name], factor * plain[name], rtol=0, atol=1e-14)


def test_it_is_a_part_of_the_rate_under_a_trust_ratio_and_of_the_entries_under_a_mask() -> None:
    """The ratio is of the whole update, whatever its slices are multiplied by, and wherever the clause stands."""
    ratio = "lr trust_ratio on ndim(2)\n"
    one, factor = program("split = parts", more=ratio), expected(weights(program("")), False)
    plain = trainc.compile(f"train 1 loss cross_entropy optimizer {ADAMW} {ratio}", model())
    before = weights(one)
    one.step(BATCH)
    plain.step(BATCH)
    name = "blocks.0.attn.qkv.weight"
    change = weights(plain)[name] - before[name]
    torch.testing.assert_close(
        weights(one)[name], before[name] + factor[name] * change, rtol=0, atol=1e-14
    )
    mask = "mask sift on ndim(2) { density = 30% }\n"
    sparse = program("split = parts", more=mask)
    alone = trainc.compile(f"train 1 loss cross_entropy optimizer {ADAMW} {mask}", model())
    for made in (sparse, alone):
        for _ in range(3):
            made.step(BATCH)
    change, scaled = (weights(m)[name] - before[name] for m in (alone, sparse))
    assert torch.equal(change != 0, scaled != 0)
    assert 0 < int((change != 0).sum()) < change.numel()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("lr temp_balance on ndim(2) { unit = part, split = whole }", "has one part"),
        ("lr alpha_decay on ndim(2) { unit = part }", "one decay"),
    ],
)
def test_what_has_no_slices_is_refused(head: str, said: str) -> None:
    (found,) = trainc.check(f"train 1 loss cross_entropy optimizer {ADAMW} {head}").diagnostics
    assert said in str(found)
    assert "unit = module" in str(found)


def test_a_weight_of_several_parameters_is_refused_at_the_field() -> None:
    made: Any = nn.MultiheadAttention(24, 2)
    torch.nn.utils.parametrizations.weight_norm(made, "in_proj_weight")
    clause = "lr temp_balance on ndim(2) { unit = part, min_eigenvalues = 4 }"
    spec = f"train 1 loss cross_entropy optimizer {ADAMW} {clause}"
    with pytest.raises(trainc.SpecError, match="is computed of 2 parameters") as raised:
        trainc.compile(spec, made)
    assert "unit = part" in str(raised.value)
