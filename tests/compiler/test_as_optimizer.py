"""A program as a torch optimizer: a loop that knows nothing of programs trains as one that does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError

GNS = "noise_scale gns on all { smooth = 1 steps }"
ADAMW = "optimizer adamw { lr = 1e-2 * linear(to = 10%), weight_decay = 0.1 on matrices }"
SPEC = f"loss cross_entropy run {{ length = 8 steps, clip = 0.5 }} {ADAMW}"


class Classifier(nn.Module):
    """Returns logits, and the loss where it is given targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.norm(self.body(x))))
        if y is None:
            return logits
        return {"loss": cross_entropy(logits, y), "logits": logits}


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(20 + step)
    return torch.randn(6, 5).double(), torch.randint(0, 3, (6,))


def loop(
    optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, parts: int = 1
) -> list[dict[str, float]]:
    """Train as a framework does that knows an optimizer only; it divides the losses of micro-batches."""
    found = []
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        for one, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (model(one, labels)["loss"] / parts).backward()
        optimizer.step()
        found.append(getattr(optimizer, "metrics", {}))
    return found


def equal(one: nn.Module, other: nn.Module, *, rtol: float = 1e-12) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clauses", ["", GNS, "regularize l2_sp on all { weight = 0.3 }"])
def test_a_loop_that_knows_an_optimizer_only_gives_the_programs_numbers(
    clauses: str, parts: int
) -> None:
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(f"{SPEC} {clauses}", model).as_optimizer(accumulation=parts)
    assert isinstance(optimizer, torch.optim.Optimizer)
    program = trainc.compile(f"{SPEC} {clauses}", other, executor="module")
    found = loop(optimizer, model, range(4), parts)
    for i, metrics in enumerate(found):
        x, y = batch(i)
        expected = program.step([*zip(x.chunk(parts), y.chunk(parts), strict=True)])
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-13, nan_ok=True), name
    equal(model, other)


def test_an_empty_spec_is_bit_equal_to_torchs_optimizer() -> None:
    model, other = Classifier(), Classifier()
    spec = "loss cross_entropy optimizer adamw { lr = 1e-2, weight_decay = 0 }"
    loop(trainc.compile(spec, model).as_optimizer(3), model, range(4), 3)
    torch_own = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    loop(torch_own, other, range(4), 3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("parts", [1, 2])
def test_statistics_are_those_of_one_backward_pass_an_example(parts: int) -> None:
    """B|G|^2 - mean of |g_i|^2, and the reverse, from one backward pass an example: McCandlish et al., appendix A.1."""
    model = Classifier()
    x, y = batch(0)
    squares = []
    for rows in [slice(i, i + 1) for i in range(6)] + [slice(None)]:
        one = Classifier()
        cross_entropy(one(x[rows]), y[rows]).backward()
        squares.append(
            sum(float(p.grad.square().sum()) for p in one.parameters() if p.grad is not None)
        )
    own, big = sum(squares[:6]) / 6, squares[6]
    spec = f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} {GNS}"
    optimizer = trainc.compile(spec, model).as_optimizer(parts)
    (found,) = loop(optimizer, model, range(1), parts)
    assert found["gns.signal"] == pytest.approx((6 * big - own) / 5, rel=1e-10)
    assert found["gns.noise"] == pytest.approx((own - big) / (1 - 1 / 6), rel=1e-10)


def test_a_loss_of_the_users_own_is_told_to_it() -> None:
    """Clauses that read the pass get it there, and the terms are in what is returned."""
    clause = "regularize distill { weight = 0.5, temperature = 2 }"
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(f"{SPEC} {clause}", model).as_optimizer()
    program = trainc.compile(f"{SPEC} {clause}", other, executor="module")
    for i in range(3):
        x, y = batch(i)
        logits = model(x)
        loss = optimizer.loss(cross_entropy(logits, y), logits=logits, targets=y, inputs=x)
        loss.backward()
        optimizer.step()
        assert optimizer.metrics == pytest.approx(program.step((x, y)), rel=1e-9, nan_ok=True)
    equal(model, other)


@pytest.mark.parametrize("form", ["tuple", "object", "tensor"])
def test_a_loss_is_found_in_outputs_of_any_form(form: str) -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Other(Classifier):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            found = super().forward(x, y)
            pair = found["logits"], found["loss"]
            return {"tuple": pair, "object": Output(pair[1]), "tensor": pair[1]}[form]

    model, other = Other(), Classifier()
    spec = f"{SPEC} regularize l2_sp on all {{ weight = 0.3 }}"
    optimizer = trainc.compile(spec, model).as_optimizer()
    for i in range(3):
        out = model(*batch(i))
        loss: Any = out
        if form != "tensor":
            loss = out[1] if form == "tuple" else out.loss
        loss.backward()
        optimizer.step()
    loop(trainc.compile(spec, other).as_optimizer(), other, range(3))
    equal(model, other)


def test_a_validation_in_the_middle_of_a_step_is_no_micro_batch() -> None:
    model, other = Classifier(), Classifier()
    spec = f"{SPEC} {GNS}"
    optimizer = trainc.compile(spec, model).as_optimizer(2)
    x, y = batch(0)
    for i in range(2):
        loss = model(x[3 * i : 3 * i + 3], y[3 * i : 3 * i + 3])["loss"] / 2
        with torch.no_grad():
            model(x, y)
        loss.backward()
        model.eval()
        model(x, y)
        optimizer.program.evaluate(x, y)
        model.train()
    optimizer.step()
    expected = loop(trainc.compile(spec, other).as_optimizer(2), other, range(1), 2)
    assert str([optimizer.metrics]) == str(expected)
    equal(model, other, rtol=0)
    assert optimizer.program.clock.samples == 6


# groups


def test_groups_show_the_rates_in_force() -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    rates = [{group["lr"] for group in optimizer.param_groups}]
    for i in range(4):
        loop(optimizer, model, range(i, i + 1))
        rates.append({group["lr"] for group in optimizer.param_groups})
        assert rates[-1] == {optimizer.metrics["lr_max"]}
    assert rates[0] == rates[1] == {1e-2}
    assert len({min(rate) for rate in rates}) == 4
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert "lr" in repr(optimizer)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [("lr", 0.5, "lr"), ("weight_decay", 0.5, "weight_decay"), ("params", [], "on")],
)
def test_what_the_spec_says_is_not_written_from_outside(key: str, value: Any, field: str) -> None:
    optimizer = trainc.compile(SPEC, Classifier()).as_optimizer()
    group = optimizer.param_groups[0]
    with pytest.raises(ValueError, match=rf"`{key}` of `adamw` was .* field `{field}`"):
        group[key] = value
    with pytest.raises(ValueError, match="write them in its `on`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    group["name"] = "mine"
    assert group["name"] == "mine"


def test_schedulers_of_torch_may_leave_the_rate_and_not_change_it() -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for i in range(3):
        loop(optimizer, model, range(i, i + 1))
        constant.step()
        assert constant.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    assert optimizer.metrics["lr_max"] < 1e-2
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with pytest.raises(ValueError, match=r"by `StepLR`, but the spec .* use no other scheduler"):
        halving.step()


# state


def test_resuming_is_bit_equal(tmp_path: Path) -> None:
    spec = f"{SPEC} {GNS} regularize ema {{ decay = 0.9 }}"
    whole, first, second = Classifier(), Classifier(), Classifier()
    expected = loop(trainc.compile(spec, whole).as_optimizer(2), whole, range(6), 2)
    before = trainc.compile(spec, first).as_optimizer(2)
    loop(before, first, range(3), 2)
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, tmp_path / "it")
    held = torch.load(tmp_path / "it", weights_only=True)
    assert "model" not in held["optimizer"]["state"]
    after = trainc.compile(spec, second).as_optimizer(2)
    second.load_state_dict(held["model"])
    after.load_state_dict(held["optimizer"])
    found = loop(after, second, range(3, 6), 2)
    assert str(found) == str(expected[3:])
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    with pytest.raises(ValueError, match="this is the state of another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


# other ways to step


def test_a_closure_runs_the_passes() -> None:
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()

    def closure() -> Tensor:
        loss: Tensor = model(*batch(0))["loss"]
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == pytest.approx(optimizer.metrics["loss"], rel=1e-12)
    loop(trainc.compile(SPEC, other).as_optimizer(), other, range(1))
    equal(model, other, rtol=0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_steps_it(unscaled: bool, parts: int) -> None:
    """Its scale is a power of 2, so that nothing is rounded."""
    spec = f"{SPEC} {GNS}"
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(spec, model).as_optimizer(parts)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    expected = loop(trainc.compile(spec, other).as_optimizer(parts), other, range(3), parts)
    for i in range(3):
        x, y = batch(i)
        for one, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            scaler.scale(model(one, labels)["loss"] / parts).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.metrics == pytest.approx(expected[i], rel=1e-9, nan_ok=True)
    equal(model, other)


class Overflowing(torch.autograd.Function):
    """The identity, with a gradient that overflows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * math.inf


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(unscaled: bool) -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    handle = model.norm.register_forward_hook(lambda *a: Overflowing.apply(a[2]))  # type: ignore[no-untyped-call]
    scaler.scale(model(*batch(0))["loss"]).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics["skipped"] == 1
    assert scaler.get_scale() == 2.0**9
    for mine, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(mine, old)
    handle.remove()
    scaler.scale(model(*batch(1))["loss"]).backward()
    scaler.step(optimizer)
    assert "skipped" not in optimizer.metrics
    assert optimizer.program.clock.steps == 2


# in several processes


def replica(rank: int) -> dict[str, Any]:
    """Train on one half of each batch, by a wrapper that averages gradients."""
    model = Classifier()
    program = trainc.compile(f"{SPEC} {GNS}", model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    program.forward = wrapped
    optimizer = program.as_optimizer()
    for i in range(3):
        x, y = (half.chunk(2)[rank] for half in batch(i))
        wrapped(x, y)["loss"].backward()
        optimizer.step()
    return {"model": model.state_dict(), "metrics": optimizer.metrics}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    model = Classifier()
    optimizer = trainc.compile(f"{SPEC} {GNS}", model).as_optimizer()
    expected = loop(optimizer, model, range(3))[-1]
    for found in run_processes(__file__, 2, tmp_path):
        torch.testing.assert_close(found["model"], model.state_dict(), rtol=1e-12, atol=1e-14)
        assert found["metrics"] == pytest.approx(expected, rel=1e-9, nan_ok=True)


# what is refused


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('regularize pace on "body" { sigma = 0.4, weight = 0.1 }', "`pace` passes every example 2"),
        ("perturb sam { rho = 0.1 }", "`sam` acts before the first of a step's micro-batches"),
        ("regularize r_drop { weight = 0.1 }", "`r_drop` passes every example 2 times"),
    ],
)  # fmt: skip
def test_what_needs_several_passes_is_refused_by_name(clause: str, message: str) -> None:
    program = trainc.compile(f"{SPEC} {clause}", Classifier())
    with pytest.raises((SiteError, ValueError), match=message) as found:
        program.as_optimizer()
    assert "program.step(batch)" in str(found.value)


def test_losses_that_are_not_divided_are_an_error() -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer(2)
    for i in range(2):
        model(*batch(i))["loss"].backward()
    with pytest.raises(ValueError, match=r"multiplied by 2 in all .* in the step, here 2"):
        optimizer.step()
    optimizer.program.discard_step()
    loop(optimizer, model, range(2), 2)
    assert optimizer.program.clock.steps == 2


def test_gradients_that_a_framework_clips_do_not_fit_what_was_measured() -> None:
    model = Classifier()
    optimizer = trainc.compile(
        f"loss cross_entropy {ADAMW} run {{ length = 8 steps }} {GNS}", model
    ).as_optimizer()
    model(*batch(0))["loss"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(ValueError, match="was changed after the backward passes"):
        optimizer.step()


def test_a_pass_without_a_known_loss_is_an_error() -> None:
    model = Classifier()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    calls: list[Callable[[], Any]] = [optimizer.step, lambda: model(x)]
    for again in calls:
        with pytest.raises(RuntimeError, match=r"Write `loss = optimizer.loss\(loss\)`"):
            again()
    optimizer.program.discard_step()
    with pytest.raises(RuntimeError, match=r"`optimizer.loss` takes the loss of a forward pass"):
        optimizer.loss(cross_entropy(nn.Linear(5, 3).double()(x), y))


def test_a_step_without_passes_is_an_error() -> None:
    model = Classifier().eval()
    optimizer = trainc.compile(SPEC, model).as_optimizer()
    model(*batch(0))["loss"].backward()
    with pytest.raises(RuntimeError, match=r"call `model.train\(\)`"):
        optimizer.step()


def test_a_program_that_a_framework_steps_has_no_steps_of_its_own() -> None:
    program = trainc.compile(SPEC, Classifier())
    program.as_optimizer()
    calls: list[Callable[[Any], Any]] = [program.step, program.loss]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"after `program.as_optimizer\(\)`"):
            call(batch(0))


def test_the_number_of_examples_is_read_or_said() -> None:
    class Broadcasting(Classifier):
        def forward(self, x: Tensor, y: Tensor | None = None, scale: Any = None) -> Any:
            return super().forward(x * scale, y)

    one = torch.ones(1, 5).double()
    model = Broadcasting()
    trainc.compile(SPEC, model).as_optimizer()
    with pytest.raises(ValueError, match=r"how many examples there are: 1, 6. Say it"):
        model(*batch(0), scale=one)
    model = Broadcasting()
    program = trainc.compile(SPEC, model)
    optimizer = program.as_optimizer(examples=lambda args, kwargs: len(args[0]))
    model(*batch(0), scale=one)["loss"].backward()
    optimizer.step()
    assert program.clock.samples == 6


@pytest.mark.parametrize("how", [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_ends_with_an_error_has_no_part(how: type[BaseException]) -> None:
    class Failing(Classifier):
        fails = True

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            found = super().forward(x, y)
            if self.fails:
                raise how
            return found

    model, other = Failing(), Classifier()
    optimizer = trainc.compile(f"{SPEC} {GNS}", model).as_optimizer()
    with pytest.raises(how):
        model(*batch(0))
    model.fails = False
    if how is KeyboardInterrupt:
        optimizer.program.discard_step()
    loop(optimizer, model, range(1))
    loop(trainc.compile(f"{SPEC} {GNS}", other).as_optimizer(), other, range(1))
    equal(model, other, rtol=0)


def test_a_spec_without_an_optimizer_is_none() -> None:
    program = trainc.compile(GNS, Classifier())
    with pytest.raises(ValueError, match="the spec has no optimizer, so the program cannot be one"):
        program.as_optimizer()


@pytest.mark.parametrize("accumulation", [0, -1, 1.0, None])
def test_accumulation_is_a_number_from_1(accumulation: Any) -> None:
    program = trainc.compile(SPEC, Classifier())
    with pytest.raises(ValueError, match="expected a number from 1"):
        program.as_optimizer(accumulation)


@pytest.mark.parametrize("clauses", ["", GNS])
def test_a_framework_may_ask_for_a_clip_at_the_update(clauses: str) -> None:
    """What is measured is of the gradients before it, as with the spec's own clip."""
    spec = f"run {{ length = 8 steps }} {ADAMW} {clauses}"
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(spec, model).as_optimizer()
    clipped = spec.replace("8 steps", "8 steps, clip = 0.1")
    program = trainc.compile(f"loss cross_entropy {clipped}", other, executor="module")
    for i in range(3):
        x, y = batch(i)
        model(x, y)["loss"].backward()
        optimizer.clip(0.1, "clip_it")
        optimizer.step()
        expected = program.step((x, y))
        assert optimizer.metrics == pytest.approx(expected, rel=1e-9, nan_ok=True)
    equal(model, other)
    model(*batch(3))["loss"].backward()
    optimizer.step()  # not asked for in this step
    assert "clip_it: clipped 3 of 3 steps to norm 0.1" in "\n".join(optimizer.program.summary())
    another = trainc.compile(f"{SPEC} {clauses}", Classifier()).as_optimizer()
    with pytest.raises(
        ValueError, match=r"`clip_it` clips to 1, and the spec's `run clip` to 0\.5"
    ):
        another.clip(1.0, "clip_it")
    another.clip(0.5, "clip_it")  # the same


def test_a_short_step_is_updated_by_less_and_measured_as_the_mean_of_its_micro_batches() -> None:
    """Of 3 micro-batches that a framework divides by, 2 come: the gradient is 2/3 of that of their mean."""
    spec = f"optimizer sgd {{ lr = 0.1, clip = 0.05 }} {GNS}"
    model, other, plain = Classifier(), Classifier(), Classifier()
    optimizer = trainc.compile(spec, model).as_optimizer(accumulation=3)
    optimizer.allow_short_steps()
    program = trainc.compile(f"loss cross_entropy {spec}", other, executor="module")
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step, parts in enumerate((3, 2, 3)):
        x, y = batch(step)
        pairs = [*zip(x.chunk(parts), y.chunk(parts), strict=True)]
        other.load_state_dict(model.state_dict())
        expected = program.step(pairs)
        for one, labels in pairs:
            for module in (model, plain):
                (module(one, labels)["loss"] / 3).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        sgd.step()
        sgd.zero_grad()
        equal(model, plain)
        for name in ("loss", "gradient_norm", "gns.signal", "gns.noise", "batch"):
            assert optimizer.metrics[name] == pytest.approx(expected[name], rel=1e-9), name
    model(*batch(9))["loss"].backward()
    with pytest.raises(ValueError, match=r"multiplied by 1 in all .* not by 0\.3333"):
        optimizer.step()


@pytest.mark.parametrize("clauses", ["", GNS, "regularize l2_sp on all { weight = 0.3 }"])
def test_a_model_that_torch_compiles_is_watched(clauses: str) -> None:
    spec = f"run {{ length = 8 steps }} {ADAMW} {clauses}"
    model, other = Classifier(), Classifier()
    optimizer = trainc.compile(spec, model).as_optimizer()
    program = trainc.compile(f"loss cross_entropy {spec}", other, executor="module")
    compiled = torch.compile(model, backend="eager")
    for i in range(3):
        x, y = batch(i)
        compiled(x, y)["loss"].backward()
        optimizer.step()
        assert optimizer.metrics == pytest.approx(program.step((x, y)), rel=1e-9, nan_ok=True)
    equal(model, other)


def test_a_model_compiled_in_place_is_refused_where_its_layers_are_measured() -> None:
    model = Classifier()
    trainc.compile(f"{ADAMW.replace('linear(to = 10%)', '1')} {GNS}", model).as_optimizer()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"call what `torch.compile\(model\)` returns"):
        model(*batch(0))


if __name__ == "__main__":
    run_rank(replica)
