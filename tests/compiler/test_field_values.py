"""Selectors and numbers in fields are held to what `on` is held to, at check, at plan, or in the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.catalog import check
from trainc.compiler.constructs.optimizer.adamw import AdamW
from trainc.dsl.text.diagnostic import Diagnostic


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        out: torch.Tensor = self.head(x)
        return out


def problems(text: str) -> list[Diagnostic]:
    """Return what is wrong with a spec for the small network: at check, or else at plan."""
    text = f"loss cross_entropy run {{ length = 10 steps }} {text}"
    checked = check(text)
    if checked.spec is None:
        return [*checked.errors]
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(checked.spec, Net())
    return [*caught.value.diagnostics]


@pytest.mark.parametrize(
    ("fields", "rule", "at"),
    [
        ('weight_decay = 0.1 on "blokcs.**"', "selector-matches-nothing", '"blokcs.**"'),
        ('freeze = "nothing.**"', "selector-matches-nothing", '"nothing.**"'),
        ("weight_decay = 0.1 on ndim(2) expect 99", "selector-count", "ndim(2) expect 99"),
        ("freeze = ndim(1) expect 2", "selector-count", "ndim(1) expect 2"),
        ("weight_decay = 0.1 on ndim(2) | type(Linaer)", "unknown-class", "Linaer"),
        ('weight_decay = [0.1 on "blocks.*", 0.2 on ndim(2)]', "claimed-twice", "0.2 on ndim(2)"),
        ("weight_decay = [0.1, 0.2 on ndim(2)]", "claimed-twice", "0.2 on ndim(2)"),
        ("freeze = all", "bad-value", "all"),
        ("lr = [1e-3 on ndim(2), 2e-3 on ndim(1) | ndim(2)]", "claimed-twice", "ndim(1) | ndim(2)"),
        ('lr = 1e-3 on "nothing.*"', "selector-matches-nothing", '"nothing.*"'),
        ('lr = cosine() on "head.*"', "bad-value", 'cosine() on "head.*"'),
        ("betas = [0.9, 0.99] on ndim(2)", "bad-value", "[0.9, 0.99] on ndim(2)"),
        (
            'weight_decay = 0.1 on "head.*", freeze = "head.*"',
            "bad-value",
            '0.1 on "head.*"',
        ),
    ],
)
def test_a_selector_in_a_field_is_checked(fields: str, rule: str, at: str) -> None:
    rate = "" if fields.startswith("lr") else "lr = 1e-3, "
    (found,) = problems(f"optimizer adamw {{ {rate}{fields} }}")
    assert found.rule == rule
    assert found.span is not None
    assert found.span.text == at


def test_a_number_for_what_the_clause_does_not_act_on_is_an_error() -> None:
    found = problems(
        'optimizer adamw on "blocks.**" { lr = 1e-3, weight_decay = 0.1 on "head.**" }'
        ' optimizer sgd on "head.**" { lr = 0.1 }'
    )
    assert [d.rule for d in found] == ["selector-matches-nothing"]
    assert "acts on" in found[0].message


def test_entries_for_different_parameters_are_right() -> None:
    trainc.plan(
        'loss mse optimizer adamw { lr = 1e-3, weight_decay = [0.1 on "blocks.**" & ndim(2), 0.2 on "head.weight"] }',
        Net(),
    )


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ("lr = -1e-3", "-1e-3"),
        ("lr = 1e-3 * -1", "1e-3 * -1"),
        ("lr = -1e-3 * (warmup(5%) then cosine())", "-1e-3 * (warmup(5%) then cosine())"),
        ("lr = 1e-3 / 0", "1e-3 / 0"),
        ("lr = min(1, -2) * progress", "min(1, -2) * progress"),
        ("lr = 1e-3, weight_decay = -0.1", "-0.1"),
        ("lr = 1e-3, weight_decay = [0.1 on ndim(2), -0.1 on ndim(1)]", "-0.1"),
        ("lr = 1e-3, betas = [0.9, -0.5]", "-0.5"),
        ("lr = 1e-3, betas = [0.9, 1]", "1"),
        ("lr = 1e-3, betas = [0.9 on ndim(2), 0.5 on ndim(1)]", "0.9"),
        ("lr = 1e-3, betas = [0.9]", "[0.9]"),
        ("lr = 1e-3 * linear(to = -10%)", "1e-3 * linear(to = -10%)"),
    ],
)
def test_a_number_that_is_negative_or_not_finite_is_an_error_before_the_run(
    fields: str, at: str
) -> None:
    (found,) = problems(f"optimizer adamw {{ {fields} }}")
    assert found.rule == "bad-value"
    assert found.span is not None
    assert found.span.text == at


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_python_is_held_to_the_same(value: float) -> None:
    with pytest.raises(ValueError, match=r"expected|too large"):
        AdamW.model_validate({"lr": value})
    with pytest.raises(ValueError, match=r"greater than 0|finite"):
        AdamW.model_validate({"lr": 1e-3, "eps": value})


@pytest.mark.parametrize(
    "clause",
    [
        "regularize l2_sp on {} {{ weight = 0.1 }}",
        "lr layer_decay on {} {{ decay = 0.5 }}",
        "mask magnitude on {} & ndim(2) {{ density = 50% }}",
        "mask sift on {} & ndim(2) {{ density = 50% }}",
        "perturb sam on {} {{ rho = 0.1 }}",
    ],
)
def test_a_clause_on_what_a_field_freezes_has_no_effect(clause: str) -> None:
    optimizer = 'optimizer adamw { lr = 1e-3, freeze = "blocks.**" } '
    (found,) = problems(optimizer + clause.format('"blocks.**"'))
    assert found.rule == "selector-matches-frozen"
    assert found.span is not None
    assert found.span.text.startswith('"blocks.**"')


BATCH = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("lr", "words"),
    [("1e-3 * (1 - batch)", "expected 0 or more"), ("1e-3 * loss", "not measured yet")],
)
def test_a_number_that_depends_on_what_is_measured_is_an_error_of_its_step(
    lr: str, words: str
) -> None:
    text = f"loss cross_entropy optimizer adamw {{ lr = {lr} }} run {{ length = 9 steps }}"
    program = trainc.compile(text, Net())
    before = [p.detach().clone() for p in program.module.parameters()]
    with pytest.raises(Exception, match=words) as caught:
        program.step(BATCH)
    assert "lr = " in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, program.module.parameters(), strict=True))
