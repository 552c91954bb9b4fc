"""`when` rules against loops by hand in float64 that decide alike: fields that they set, and errors in rules."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError

STEPS = 12
HEAD = "loss cross_entropy\nrun { length = 12 steps, seed = 1 }\n"
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def batches(count: int = STEPS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(8)
    for _ in range(count):
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 3, (8,), generator=generator)


def by_program(spec: str) -> tuple[Program, list[float]]:
    program = trainc.compile(HEAD + spec, net())
    return program, [program.step(batch)["loss"] for batch in batches()]


def by_hand(
    decide: Callable[[int, list[float], torch.optim.Optimizer], None],
    penalty: Callable[[int, nn.Module], Tensor] | None = None,
) -> tuple[nn.Module, list[float]]:
    """Train with AdamW at 0.01; `decide` is called before each step with the losses so far."""
    model, losses = net(), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step, (x, y) in enumerate(batches()):
        decide(step, losses, optimizer)
        loss = cross_entropy(model(x), y)
        losses.append(loss.item())
        if penalty is not None:
            loss = loss + penalty(step, model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, losses


def same(program: Program, model: nn.Module) -> None:
    for (name, found), expected in zip(
        program.module.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, msg=name)


def test_a_rule_halves_a_rate_where_the_loss_says_so() -> None:
    def decide(step: int, losses: list[float], optimizer: torch.optim.Optimizer) -> None:
        if losses and losses[-1] < 1.1:
            optimizer.param_groups[0]["lr"] = max(optimizer.param_groups[0]["lr"] / 2, 1e-3)

    program, losses = by_program(
        "optimizer adamw { lr = 0.01 }\nwhen loss < 1.1 { adamw.lr = max(adamw.lr / 2, 1e-3) }"
    )
    model, expected = by_hand(decide)
    assert losses == pytest.approx(expected, rel=1e-12)
    same(program, model)
    fired = [step + 1 for step, loss in enumerate(losses[:-1]) if loss < 1.1]
    assert 3 < len(fired) < STEPS
    lines = "\n".join(program.summary())
    assert (
        "fired 4 times" in lines
    )  # 0.01 -> 0.005 -> 0.0025 -> 0.00125 -> 0.001; further ones change nothing
    assert "set by rules at the end: adamw.lr = 0.001" in lines


def test_a_number_of_a_rule_holds_in_place_of_the_schedule() -> None:
    spec = "optimizer sgd { lr = 0.1 * cosine() }\nwhen steps >= 4 cooldown 6 steps { sgd.lr = sgd.lr / 2 }"
    program = trainc.compile(HEAD + spec, net())
    schedule = trainc.compile(HEAD + spec.splitlines()[0], net())
    rates, plain = (
        [one.step(batch)["lr_max"] for batch in batches()] for one in (program, schedule)
    )
    assert rates[:4] == plain[:4]
    assert rates[4:10] == [plain[4] / 2] * 6
    assert rates[10:] == [plain[4] / 4] * 2


def test_a_weight_that_begins_at_zero_is_no_idle_clause_where_a_rule_sets_it() -> None:
    program, losses = by_program(
        "optimizer adamw { lr = 0.01 }\nregularize l2_sp as pull on ndim(2) { weight = 0, to = zero }\n"
        "when steps >= 5 { pull.weight = 0.3 }\nwhen steps >= 9 { pull.weight = 0 }"
    )

    def penalty(step: int, model: nn.Module) -> Tensor:
        weight = 0.3 if 5 <= step < 9 else 0.0
        return weight / 2 * sum(p.square().sum() for p in model.parameters() if p.ndim == 2)  # type: ignore[return-value]

    model, expected = by_hand(lambda *_: None, penalty)
    assert losses == pytest.approx(expected, rel=1e-12)
    same(program, model)


def test_of_two_rules_that_set_a_field_in_one_step_the_later_one_counts() -> None:
    program, _ = by_program(
        "optimizer sgd { lr = 0.1 }\nwhen steps >= 2 { sgd.lr = 0.2 }\nwhen steps >= 2 { sgd.lr = sgd.lr + 0.1 }"
    )
    # Each reads what the one before it has set in the same step.
    assert program.module is not None
    (rate,) = {group["lr"] for group in optimizer_of(program).param_groups}
    assert rate == pytest.approx(0.3)


def optimizer_of(program: Program) -> torch.optim.Optimizer:
    found: Any = next(a for a in program._machine.actions if hasattr(a, "in_groups"))
    optimizer: torch.optim.Optimizer = found.torch
    return optimizer


@pytest.mark.parametrize("left", [2, 5, 8])
def test_what_rules_set_goes_on_bit_for_bit(left: int) -> None:
    spec = (
        "optimizer adamw { lr = 0.01 * cosine() }\nregularize l2_sp as pull on ndim(2) { weight = 0 }\n"
        "when steps >= 3 cooldown 4 steps { adamw.lr = adamw.lr / 2, pull.weight = loss }"
    )
    whole, losses = by_program(spec)
    first = trainc.compile(HEAD + spec, net())
    data = list(batches())
    parts = [first.step(batch)["loss"] for batch in data[:left]]
    second = trainc.compile(HEAD + spec, net())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    parts += [second.step(batch)["loss"] for batch in data[left:]]
    assert parts == losses
    for a, b in zip(second.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.summary()[-3:] == whole.summary()[-3:]


def test_a_discarded_step_takes_back_what_rules_set() -> None:
    spec = "optimizer sgd { lr = 0.1 }\nwhen steps >= 1 { sgd.lr = sgd.lr / 2 }"
    program = trainc.compile(HEAD + spec, net())
    first, second = list(batches(2))
    program.step(first)
    for _ in range(3):
        program.begin()
        program.discard_step()
    assert program.step(second)["lr_max"] == 0.05


def test_a_saved_program_keeps_its_rules(tmp_path: Path) -> None:
    spec = "optimizer sgd { lr = 0.1 }\nwhen steps >= 1 { sgd.lr = 0.01 }"
    saved = trainc.compile(HEAD + spec, net()).save(tmp_path / "saved")
    loaded = trainc.load(saved, net())
    assert [loaded.step(batch)["lr_max"] for batch in batches(3)] == [0.1, 0.01, 0.01]


def test_a_rule_that_gives_no_number_changes_nothing_and_says_so() -> None:
    program = trainc.compile(
        HEAD + "optimizer sgd { lr = 0.1 }\nwhen steps >= 1 { sgd.lr = log(0 - loss) }", net()
    )
    first, second = batches(2)
    program.step(first)
    assert program.step(second)["lr_max"] == 0.1
    assert "sgd.lr stays as it is, because its value is nan" in program.report().notes[0]


def test_a_number_that_a_field_cannot_have_is_an_error_of_the_step() -> None:
    program = trainc.compile(
        HEAD + "optimizer sgd { lr = 0.1 }\nwhen steps >= 1 { sgd.lr = 0 - loss }", net()
    )
    first, second = batches(2)
    program.step(first)
    with pytest.raises(
        Exception, match=r"sets `lr` of `optimizer sgd` to -.* in step 1: expected 0 or more"
    ):
        program.step(second)


BASE = """loss cross_entropy
run { length = 12 steps }
optimizer adamw { lr = 0.01 }
regularize pace on type(Linear) { sigma = 0.3 * (1 - depth), weight = 0.1 }
noise_scale gns on "0" { smooth = 4 steps }
"""


@pytest.mark.parametrize(
    ("rule", "kind", "place", "message"),
    [
        ("pace.wieght = 0", "unknown-target", "pace.wieght", "has no field `wieght`.*did you mean `weight`"),
        ("pase.weight = 0", "unknown-target", "pase.weight", "no clause is called `pase`.*did you mean `pace`"),
        ("adamw.betas = 0", "unknown-target", "adamw.betas", "cannot set `betas` of `optimizer adamw`"),
        ("gns.smooth = 3", "unknown-target", "gns.smooth", "no field of `noise_scale gns` is a schedule"),
        ("lr = 0.1", "unknown-target", "lr", "name clause and field: `adamw.lr`"),
        ("adamw.lr = depth", "bad-value", "adamw.lr = depth", "the place of a layer"),
        ("adamw.lr = batch", "bad-value", "adamw.lr = batch", "`batch` counts samples: divide it by `1 samples`"),
        ("adamw.lr = pace.sigma", "bad-value", "", "`pace.sigma` has a number for each layer"),
        ("adamw.lr = adamw.betas", "unknown-signal", "adamw.betas", "measures nothing"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rule_is_told_at_its_place(
    rule: str, kind: str, place: str, message: str
) -> None:
    with pytest.raises(SpecError) as raised:
        trainc.compile(f"{BASE}when loss > 2 {{ {rule} }}", net())
    (found,) = raised.value.diagnostics
    told = " ".join([found.message, *found.notes, found.help or ""])
    assert found.rule == kind
    assert re.search(message, told), told
    assert found.span is not None
    assert found.span.text == place or not place


def test_a_field_of_another_clause_is_read_by_rules_alone() -> None:
    with pytest.raises(SpecError, match="which only `when` rules read"):
        trainc.compile(
            HEAD + "optimizer sgd { lr = 0.1 }\nregularize l2_sp on all { weight = sgd.lr }", net()
        )


def test_a_clause_that_is_not_in_the_program_has_no_fields_to_set() -> None:
    with pytest.raises(SpecError, match="`regularize l2_sp` is not in the program"):
        trainc.compile(
            HEAD
            + 'optimizer sgd { lr = 0.1 }\nregularize l2_sp on "none.*" optional { weight = 1 }\n'
            "when loss > 2 { l2_sp.weight = 0 }",
            net(),
        )
