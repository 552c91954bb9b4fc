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


# What rules remember


def halved_by_torch(patience: int, losses: list[float]) -> list[float]:
    """Return the rates that torch's own ReduceLROnPlateau gives after each of these evaluations."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=0.0
    )
    rates = []
    for loss in losses:
        plateau.step(loss)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def test_reduce_on_plateau_is_that_of_torch() -> None:
    found = [1.0, 0.9, 0.95, 0.92, 0.91, 0.8, 0.85, 0.86, 0.87, 0.88, 0.89, 0.84]
    program = trainc.compile(
        HEAD + "optimizer sgd { lr = 0.1 }\n"
        "when since_best(eval_loss) > 2 steps cooldown 3 steps { sgd.lr = sgd.lr / 2 }",
        net(),
    )
    rates = []
    for batch, value in zip(batches(), found, strict=True):
        program.measured({"eval_loss": value})
        rates.append(program.step(batch)["lr_max"])
    assert rates == halved_by_torch(2, found)
    assert len(set(rates)) == 4


def rates(spec: str, out: Callable[[int, Program], Program] = lambda step, one: one) -> list[float]:
    program = trainc.compile(HEAD + spec, net())
    found = []
    for step, batch in enumerate(batches()):
        program = out(step, program)
        found.append(program.step(batch)["lr_max"])
    return found


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_mean_is_over_the_steps_of_its_window_once_it_is_full(window: int) -> None:
    _, losses = by_program("optimizer sgd { lr = 0.1 }")
    spec = (
        "optimizer sgd { lr = 0.1 }\nregularize l2_sp as pull on ndim(2) { weight = 0, to = zero }\n"
        f"when loss < mean(loss, {window} steps) {{ pull.weight = 1e-9 * (steps / 1 steps) }}"
    )
    program = trainc.compile(HEAD + spec, net())
    acted = []
    for step, batch in enumerate(batches()):
        program.step(batch)
        acted += [step] if program.report().notes else []
    expected = [
        step
        for step in range(window, STEPS)
        if losses[step - 1] < sum(losses[step - window : step]) / window
    ]
    assert acted == expected
    assert expected or window == 1


def reloaded(spec: str, left: int) -> Callable[[int, Program], Program]:
    """Return what puts another program with the state of the one so far in its place, at a step."""

    def at(step: int, program: Program) -> Program:
        if step != left:
            return program
        other = trainc.compile(HEAD + spec, net())
        other.load_state_dict(copy.deepcopy(program.state_dict()))
        return other

    return at


@pytest.mark.parametrize("left", [1, 4, 6, 9])
def test_what_rules_remember_goes_on_bit_for_bit(left: int) -> None:
    spec = (
        "optimizer sgd { lr = 0.1 }\n"
        "when since_best(loss) >= 2 steps cooldown 2 steps { sgd.lr = 0.9 * sgd.lr }\n"
        "when mean(-loss, 40 samples) > best(mean(-loss, 16 samples)) { sgd.lr = sgd.lr + 1e-4 * mean(loss, 25%) }"
    )
    whole = rates(spec)
    assert len(set(whole)) > 4
    assert rates(spec, reloaded(spec, left)) == whole


def test_a_discarded_step_is_remembered_once() -> None:
    spec = "optimizer sgd { lr = 0.1 }\nwhen steps >= 3 { sgd.lr = 0.1 * mean(loss, 3 steps) }"

    def again(step: int, program: Program) -> Program:
        for _ in range(step % 3):
            program.begin()
            program.discard_step()
        return program

    assert rates(spec, again) == rates(spec)


def test_evaluations_are_told_between_steps_and_by_their_names() -> None:
    program = trainc.compile(HEAD + "optimizer sgd { lr = 0.1 }", net())
    with pytest.raises(ValueError, match="such as `eval_loss`, and got `loss`"):
        program.measured({"loss": 1.0})
    program.begin()
    with pytest.raises(RuntimeError, match="call it after `update`"):
        program.measured({"eval_loss": 1.0})


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
        ("adamw.lr = pace.sigma", "bad-value", "", "`pace.sigma` has a number for each.*write a number"),
        ("adamw.lr = mean(loss, 12 steps)", "never-acts", "adamw.lr = mean(loss, 12 steps)", "write a shorter window"),
        ("adamw.lr = mean(loss)", "bad-value", "mean(loss)", "`mean` needs `over`"),
        ("adamw.lr = eval_accurracy", "unknown-name", "eval_accurracy", "did you mean `eval_accuracy`"),
        ("adamw.lr = since_best(loss)", "bad-value", "adamw.lr = since_best(loss)", "counts steps: divide it by"),
        ("adamw.lr = 1e-3 * (2 - 3)", "bad-value", "adamw.lr = 1e-3 * (2 - 3)", "to -0.001: expected 0 or more"),
        ("adamw.lr = 1 / 0", "bad-value", "adamw.lr = 1 / 0", "to inf: write a finite number"),
        ("adamw.lr = adamw.betas", "unknown-signal", "adamw.betas", "measures nothing"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rule_is_told_at_its_place(
    rule: str, kind: str, place: str, message: str
) -> None:
    with pytest.raises(SpecError) as raised:
        trainc.compile(f"{BASE}when loss > 2 {{ {rule} }}", net())
    (found,) = raised.value.diagnostics
    told = " ".join(
        [found.message, *(x.text for x in found.labels), *found.notes, found.help or ""]
    )
    assert found.rule == kind
    assert re.search(message, told), told
    assert found.span is not None
    assert found.span.text == place or not place


def test_a_part_of_the_run_needs_a_run() -> None:
    with pytest.raises(SpecError) as raised:
        trainc.compile("optimizer sgd { lr = 0.1 }\nwhen loss > 2 cooldown 50% { stop }", net())
    (found,) = raised.value.diagnostics
    assert "the run has no length" in found.message
    assert found.span is not None
    assert found.span.text == "50%"


def test_a_field_of_another_clause_is_read_by_rules_alone() -> None:
    with pytest.raises(SpecError, match="which only `when` rules read"):
        trainc.compile(
            HEAD + "optimizer sgd { lr = 0.1 }\nregularize l2_sp on all { weight = sgd.lr }", net()
        )


def test_a_run_that_never_evaluates_has_no_evaluations_for_rules() -> None:
    text = BASE + 'data "m:f" { batch = 8 samples }\nwhen eval_loss > 3 { stop }'
    (found,) = trainc.check(text).errors
    assert found.rule == "unknown-signal"
    assert found.help == "write `eval = 200 steps` in `run`, or let another rule `evaluate`"
    assert not trainc.check(text.replace("12 steps }", "12 steps, eval = 3 steps }")).errors


def test_what_was_before_is_known_to_rules_alone() -> None:
    with pytest.raises(SpecError, match="only `when` rules call `best`"):
        trainc.compile(HEAD + "optimizer sgd { lr = best(loss) }", net())


def test_a_clause_that_is_not_in_the_program_has_no_fields_to_set() -> None:
    with pytest.raises(SpecError, match="`regularize l2_sp` is not in the program"):
        trainc.compile(
            HEAD
            + 'optimizer sgd { lr = 0.1 }\nregularize l2_sp on "none.*" optional { weight = 1 }\n'
            "when loss > 2 { l2_sp.weight = 0 }",
            net(),
        )


# Clauses that rules open and close, parameters that they freeze


def test_a_rule_closes_and_opens_a_clause() -> None:
    program, losses = by_program(
        "optimizer adamw { lr = 0.01 }\nregularize l2_sp as pull on ndim(2) { weight = 0.3, to = zero }\n"
        "when steps >= 3 and steps < 7 { close pull }\nwhen steps >= 7 cooldown 100% { open pull }"
    )

    def penalty(step: int, model: nn.Module) -> Tensor:
        weight = 0.0 if 3 <= step < 7 else 0.3
        return weight / 2 * sum(p.square().sum() for p in model.parameters() if p.ndim == 2)  # type: ignore[return-value]

    model, expected = by_hand(lambda *_: None, penalty)
    assert losses == pytest.approx(expected, rel=1e-12)
    same(program, model)
    assert "opened by rules at the end: pull" in program.summary()


def test_a_clause_that_a_rule_opens_may_wait_for_it_beyond_the_end() -> None:
    program, _ = by_program(
        "optimizer sgd { lr = 0.1 }\nregularize l2_sp on all from 100% { weight = 1, to = zero }\n"
        "when loss < 1.15 { open l2_sp }"
    )
    assert program.report().notes == ()
    assert program.signals["loss"] > 0
    lines = "\n".join(program.summary())
    assert "when loss < 1.15: fired once" in lines


FREEZES = (
    "optimizer adamw { lr = 0.01, weight_decay = 0.1, clip = 0.2 }\nregularize ema { decay = 0.5 }\n"
    'when steps < 1 { freeze all - "4.*" }\nwhen steps >= 4 { unfreeze "2.*" }\nwhen steps >= 8 { unfreeze all }'
)


def frozen_by_hand(step: int, optimizer: torch.optim.Optimizer) -> None:
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        parameter.requires_grad_(i >= 4 or step >= 8 or (i >= 2 and step >= 4))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_gradual_unfreezing_is_that_of_a_loop_with_requires_grad(executor: Any) -> None:
    program = trainc.compile(HEAD + FREEZES, net(), executor=executor)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step, (x, y) in enumerate(batches()):
        frozen_by_hand(step, optimizer)
        metrics = program.step((x, y))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.2)
        optimizer.step()
        assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-9)
    for found, expected in zip(program.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert "fired once, at step 4" in "\n".join(program.summary())


@pytest.mark.parametrize("left", [1, 5, 9])
def test_what_is_frozen_and_closed_goes_on_bit_for_bit(left: int) -> None:
    spec = (
        FREEZES + "\nregularize l2_sp as pull on ndim(2) { weight = 0.3, to = zero }\n"
        "when loss < 1.1 { close pull }\nwhen loss > 1.2 { open pull }"
    )
    found = []
    for at in (99, left):
        switch, program = reloaded(spec, at), trainc.compile(HEAD + spec, net())
        for step, batch in enumerate(batches()):
            program = switch(step, program)
            program.step(batch)
        found.append((program.module.state_dict(), program.summary()[-8:]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])


@pytest.mark.parametrize(
    ("actions", "kind", "message"),
    [
        ("freeze type(Conv3d)", "selector-matches-nothing", "the selector of `freeze` matches nothing"),
        ("freeze type(Tanh)", "selector-matches-nothing", r"`type\(Tanh\)` matches have no parameters of their own"),
        ("unfreeze all", "no-effect", "no rule freezes what `unfreeze all` selects"),
        ("freeze ndim(2) expect 7", "selector-count", "matches 3 parameters, not 7"),
        ("freeze", "unknown-action", "`freeze` needs a selector"),
        ("close pase", "unknown-target", "no clause is called `pase`.*did you mean `pace`"),
        ('close "pace"', "unknown-action", "write `close pace`"),
        ("close adamw", "unknown-target", "an optimizer trains in every step: no rule can open or close `adamw`"),
        ("close cross_entropy", "unknown-target", "the loss holds for the whole run"),
        ("save, rollback", "no-effect", "`save` never acts: it acts after the step, and `rollback` goes back before"),
        ("stop, rollback", "no-effect", "`rollback` never acts: `stop` of the same rule comes first"),
        ("batch = -8 samples", "bad-value", "it sets `batch` to -8 samples: write one or more"),
        ("warn", "unknown-action", "`warn` needs a text"),
        ("stop gns", "unknown-action", "`stop` takes nothing"),
        ("halt", "unknown-action", "there is no action `halt`"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_action_is_told_at_its_place(actions: str, kind: str, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        trainc.compile(f"{BASE}when loss > 2 {{ {actions} }}", net())
    (found,) = raised.value.diagnostics
    told = " ".join(
        [found.message, *(x.text for x in found.labels), *found.notes, found.help or ""]
    )
    assert found.rule == kind, told
    assert re.search(message, told), told
    assert found.span is not None
    assert found.span.text in actions


@pytest.mark.parametrize("rule", ["loss > 2 { sgd.lr = 0.1 }", "steps > 2 { sgd.lr = 0.1 * loss }"])
def test_replicas_that_train_on_their_own_must_decide_alike(rule: str) -> None:
    spec = f"{HEAD}optimizer sgd {{ lr = 0.1 }}\ndistribute local every 4 steps\nwhen {rule}"
    with pytest.raises(SpecError, match="with `local` each replica has a `loss` of its own"):
        trainc.compile(spec, net())
    trainc.compile(spec.replace("loss >", "steps >").replace("* loss", "* progress"), net())


def first_weight(model: nn.Module) -> Tensor:
    return model.get_parameter("0.weight")


def test_an_optimizer_of_the_users_own_and_masks_see_no_frozen_parameter() -> None:
    rules = 'when steps < 3 { freeze "0.*" }\nwhen steps >= 3 { unfreeze "0.*" }'
    own, masked = net(), net()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    sgd = "optimizer sgd { lr = 0.1, momentum = 0.9 }\nmask magnitude on ndim(2) { density = 50% }"
    programs = [
        trainc.compile(f"loss cross_entropy\n{rules}", own),
        trainc.compile(f"{HEAD}{sgd}\n{rules}", masked),
    ]
    first = first_weight(own).detach().clone()
    for step, batch in enumerate(batches(5)):
        programs[0].step(batch)
        optimizer.step()
        optimizer.zero_grad()
        programs[1].step(batch)
        kept = first_weight(masked) != 0
        assert torch.equal(first_weight(own), first) == (step < 3)
        assert torch.equal(first_weight(masked), first * kept) == (step < 3)


CHANGED = "optimizer sgd { lr = 0.1 }\nregularize l2_sp as pull on all { weight = 0.1 }\n"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("sgd.lr = 0.05", "sgd.lr = sgd.lr / 2", "rule 1: .* has not fired yet, because the rule is another one"),
        ('freeze "0.*"', 'freeze "2.*"', "no rule freezes these any more, and they train: 0.bias and 1 more"),
        ("close pull", "close more", "no rule switches these any more, and they act by their times: pull"),
    ],
)  # fmt: skip
def test_a_state_under_changed_rules_says_what_it_lets_go(
    before: str, after: str, said: str
) -> None:
    """What rules of the new spec decide on holds on; the rules themselves begin anew."""
    base = HEAD + CHANGED + "regularize l2_sp as more on all { weight = 0.1 }\n"
    first, second = (
        trainc.compile(f"{base}when steps >= 2 cooldown 100% {{ {action} }}", net())
        for action in (before, after)
    )
    data = list(batches())
    for batch in data[:4]:
        first.step(batch)
    state = copy.deepcopy(first.state_dict())
    assert not [one.text for one in second.differences(state) if "learning rate" in one.text]
    lines = second.load_compatible(state)
    assert [line for line in lines if re.search(said, line)], lines
    rate = second.step(data[4])["lr_max"]
    assert rate == (0.025 if "sgd.lr" in before else 0.1)


def test_a_rate_that_no_rule_holds_any_more_is_a_difference() -> None:
    first = trainc.compile(f"{HEAD}{CHANGED}when steps >= 2 {{ sgd.lr = 0.05 }}", net())
    for batch in batches(4):
        first.step(batch)
    second = trainc.compile(HEAD + CHANGED, net())
    told = [one.text for one in second.differences(first.state_dict())]
    assert "the next step of `sgd` had learning rate 0.05 and has 0.1, before factors" in told
