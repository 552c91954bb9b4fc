"""A step that is not sound changes nothing: its loss or its gradient is not finite, in every way to run a step."""

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.gradient_methods import Change, Method, spec
from trainc.compiler.program.program import Program
from trainc.runtime.run.interface import NonFiniteGradient, NonFiniteLoss, UnsoundStep
from trainc.runtime.step.action import StopRun
from trainc.runtime.step.gradients import ParameterGradient
from trainc.runtime.step.record import Step

ADAM = "loss cross_entropy optimizer adamw { lr = 1e-2 } "


def run(on_nan: str = "skip", more: str = "") -> str:
    return f"run {{ length = 100 steps, on_nan = {on_nan}{more} }} "


class Rooted(nn.Module):
    """Its gradient is NaN at a first feature of 0, where its output is finite: the derivative of a root times 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.inner(x))
        product = x[:, :1] * hidden[:, :1]
        root = torch.where(product == 0, 0.0 * product, product.clamp(min=0).sqrt())
        found: Tensor = self.outer(torch.tanh(hidden)) + root
        return found


def batch(seed: int = 0, bad: str = "") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(8, 4, generator=g) + 0.1, torch.randint(3, (8,), generator=g)
    if bad == "gradient":
        x[2, 0] = 0.0
    if bad == "loss":
        x[2, 1] = math.nan
    if bad == "targets":
        y[:] = -100
    return x, y


def everything(program: Program) -> dict[str, Any]:
    """Return copies of weights, buffers and optimizer state."""
    state = program.state_dict()
    return copy.deepcopy({"model": state["model"], "optimizer": state["actions"].get("adamw", {})})


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for part in ("model", "optimizer"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, two[part][name]), name


def by_step(program: Program, one: tuple[Tensor, Tensor]) -> dict[str, float]:
    return program.step(one)


def in_parts(program: Program, one: tuple[Tensor, Tensor]) -> dict[str, float]:
    x, y = one
    return program.step([(x[:5], y[:5]), (x[5:], y[5:])])


def by_hand(program: Program, one: tuple[Tensor, Tensor]) -> dict[str, float]:
    program.loss(one).backward()
    return program.update()


@pytest.mark.parametrize("ways", [by_step, in_parts, by_hand])
@pytest.mark.parametrize("bad", ["gradient", "loss", "targets"])
@pytest.mark.parametrize(
    "extra",
    [
        "",
        "noise_scale gns on type(Linear) { method = micro_batch } ",
        "regularize l2_sp on all { weight = 0.1 } ",
    ],
)
def test_a_step_that_is_not_sound_changes_nothing(ways: Any, bad: str, extra: str) -> None:
    """Weights, optimizer state and running statistics; under `stop` it raises, under `skip` it is counted."""
    if ways is by_hand and "micro_batch" in extra:
        extra = ""
    skipping = trainc.compile(run() + ADAM + extra, Rooted())
    stopping = trainc.compile(run("stop") + ADAM + extra, Rooted())
    for program in (skipping, stopping):
        ways(program, batch(0))
    before = everything(skipping)
    metrics = ways(skipping, batch(1, bad))
    assert metrics["skipped"] == 1.0
    assert math.isfinite(metrics["loss"]) == (bad == "gradient")
    assert skipping.clock.steps == 2
    assert_same(before, everything(skipping))
    error = NonFiniteGradient if bad == "gradient" else NonFiniteLoss
    said = {"targets": "no target of the step counts", "gradient": "although the loss is"}
    with pytest.raises(error, match=said.get(bad, "the loss is nan")):
        ways(stopping, batch(1, bad))
    assert stopping.clock.steps == 1
    assert_same(before, everything(stopping))
    ways(skipping, batch(2))
    ways(stopping, batch(2))
    assert_same(everything(skipping), everything(stopping))


@pytest.mark.parametrize("extra", ["", "noise_scale gns on type(Linear) "])
@pytest.mark.parametrize("ignored_first", [True, False])
def test_a_loop_of_ones_own_may_run_a_micro_batch_without_targets(
    extra: str, ignored_first: bool
) -> None:
    """With `loss_weight` 0 it has no part in the step, as in `program.step`."""
    x, y = batch()
    parts = [((x, y), 1.0), ((x, torch.full_like(y, -100)), 0.0)][:: -1 if ignored_first else 1]
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    by_hand, at_once = (trainc.compile(run() + ADAM + extra, model) for model in models)
    for part, weight in parts:
        loss = by_hand.loss(part, loss_weight=weight, example_fraction=0.5)
        assert loss.isfinite()
        loss.backward()
    found, wanted = by_hand.update(), at_once.step([part for part, _ in parts])
    assert "skipped" not in found
    assert found["loss"] == wanted["loss"]
    assert_same(everything(by_hand), everything(at_once))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_it_is_found_by_both_executors(executor: Any) -> None:
    text = run() + ADAM + "noise_scale gns on type(Linear)"
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    program = trainc.compile(text, model, executor=executor)
    program.step(batch(0))
    before = everything(program)
    assert program.step(batch(1, "loss"))["skipped"] == 1.0
    assert_same(before, everything(program))


class SpoilingChange(Change):
    """Makes one entry of each gradient infinite from the second step on."""

    def change_one(self, one: ParameterGradient, step: Step) -> None:
        if step.clock.steps:
            one.gradient.view(-1)[0] = math.inf


class Spoil(Method):
    name: ClassVar = "spoil"
    make: ClassVar = SpoilingChange


@pytest.mark.parametrize("clip", ["", ", clip = 0.1"])
def test_a_gradient_that_a_clause_makes_infinite_is_none(clip: str) -> None:
    program = trainc.compile(spec(run(more=clip) + ADAM, Spoil()), Rooted())
    assert "skipped" not in program.step(batch())
    before = everything(program)
    metrics = program.step(batch(1))
    assert (metrics["skipped"], metrics["gradient_norm"]) == (1.0, math.inf)
    assert_same(before, everything(program))


def test_the_error_names_the_parameter() -> None:
    program = trainc.compile(run("stop") + ADAM, Rooted())
    with pytest.raises(NonFiniteGradient, match=r"first in `inner\.weight`, at step 0"):
        program.step(batch(1, "gradient"))


def test_a_limit_in_a_row_ends_the_run_and_is_resumed() -> None:
    program = trainc.compile(run() + ADAM, Rooted())
    program.step(batch(0, "loss"))
    program.step(batch(1))
    for seed in range(10):
        program.step(batch(seed, "loss"))
    assert program.skipped_steps == 11
    state = copy.deepcopy(program.state_dict())
    with pytest.raises(UnsoundStep, match="the 10 steps before it were skipped"):
        program.step(batch(1, "gradient"))
    resumed = trainc.compile(run() + ADAM, Rooted())
    resumed.load_state_dict(state)
    with pytest.raises(UnsoundStep):
        resumed.step(batch(1, "loss"))
    assert any("skipped 11 of 12 steps" in line for line in resumed.summary())
    short = trainc.compile(run(more=", skip_limit = 1") + ADAM, Rooted())
    short.step(batch(0, "loss"))
    with pytest.raises(UnsoundStep):
        short.step(batch(0, "loss"))


@pytest.mark.parametrize(
    ("condition", "bad"),
    [
        ("loss is nan for 3 steps", "loss"),
        ("not (loss is finite) for 3 steps", "loss"),
        ("gradient_norm is nan for 3 steps", "gradient"),
        ("gradient_norm is nan for 3 steps", "loss"),
    ],
)
def test_rules_see_what_happened(condition: str, bad: str) -> None:
    program = trainc.compile(f"{run()}{ADAM}when {condition} {{ stop }}", Rooted())
    program.step(batch(0))
    for seed in range(4):
        program.step(batch(seed, bad))
    with pytest.raises(StopRun, match="stopped the run"):
        program.step(batch(5))


def test_with_continue_the_step_is_that_of_plain_torch() -> None:
    ours, theirs = Rooted(), Rooted()
    program = trainc.compile(run("continue") + ADAM, ours)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for one in (batch(0), batch(1, "gradient"), batch(2)):
        program.step(one)
        nn.functional.cross_entropy(theirs(one[0]), one[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    assert "is not finite" in (program.unsound_state() or "")


def test_a_scale_that_overflows_is_no_fault_of_the_step() -> None:
    """The running statistics are then those of plain torch; at a scale of 1 the gradient itself is not finite."""
    program = trainc.compile(run("stop") + ADAM, Rooted())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = everything(program)["model"]
    x, y = batch()
    assert program.step((1e4 * x, y), scaler)["skipped"] == 1.0
    scaler.update()
    assert program.skipped_steps == 1
    after = everything(program)["model"]
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert torch.equal(before["inner.weight"], after["inner.weight"])
    with pytest.raises(NonFiniteGradient):
        program.step(batch(1, "gradient"), torch.amp.GradScaler("cpu", init_scale=1.0))


def test_unsound_weights_and_states_are_named_and_not_saved(tmp_path: Any) -> None:
    program = trainc.compile(run() + ADAM, Rooted())
    program.step(batch())
    program.module.register_buffer("mask", torch.full((2,), -math.inf))
    assert program.unsound_state() is None
    program.save(tmp_path / "sound")
    state = program.state_dict()["actions"]["adamw"]["outer.bias/exp_avg_sq"]
    state[0] = math.inf
    assert program.unsound_state() == (
        "`outer.bias/exp_avg_sq` in the state of `adamw` is not finite"
    )
    with torch.no_grad():
        program.module.get_parameter("inner.weight")[0, 0] = math.nan
    assert program.unsound_state() == "`inner.weight` is not finite"
    with pytest.raises(ValueError, match=r"`inner\.weight` is not finite, so nothing was saved"):
        program.save(tmp_path / "unsound")
    assert not (tmp_path / "unsound").exists()


class Cliff(nn.Module):
    """Finite where it starts; NaN where weights are large, as an update with a large rate makes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        far = self.layer.weight.detach().abs().max() > 10
        return found * (math.nan if far else 1.0)


def test_an_optimizer_that_asks_again_and_meets_a_nan_leaves_the_weights() -> None:
    text = 'loss cross_entropy optimizer torch("torch.optim:LBFGS") { lr = 1e6 } '
    model = Cliff()
    program = trainc.compile(run() + text, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert program.step(batch())["skipped"] == 1.0
    assert program.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(NonFiniteGradient, match=r"`layer\.weight` is not finite after \d+ evaluat"):
        trainc.compile(run("stop") + text, Cliff()).step(batch())


def test_running_statistics_are_those_of_before_where_a_graph_runs_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    program = trainc.compile(
        run() + ADAM + 'normalize ghost_batch on "1" { size = 2 }',
        model,
        executor="graph",
    )
    program.step(batch())
    before = everything(program)
    assert program.step(batch(1, "loss"))["skipped"] == 1.0
    assert_same(before, everything(program))
    program.step(batch(2))
    assert not torch.equal(before["model"]["1.running_mean"], model.get_buffer("1.running_mean"))


class Codebook(nn.Module):
    """Has a buffer that it changes through `data`, as codebooks do, and a large one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("constant", torch.full((50, 50), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        self.get_buffer("mean").data.lerp_(found.detach().mean(0), 0.5)
        return found


@pytest.mark.parametrize("bad_steps", [(0, 3), (2, 3)])
def test_buffers_that_change_in_hidden_ways_are_restored_and_constant_ones_not_kept(
    bad_steps: tuple[int, ...],
) -> None:
    model = Codebook()
    program = trainc.compile(run() + ADAM, model)
    for t in range(5):
        before = model.get_buffer("mean").clone()
        program.step(batch(t, "loss" if t in bad_steps else ""))
        assert torch.equal(model.get_buffer("mean"), before) == (t in bad_steps)
    kept = [one for one in program._runner._buffers._kept if one is not None]
    assert [tuple(one.shape) for one in kept] == [(3,)]
