"""Optimizers that ask for loss and gradients several times in a step: `optimizer torch` on classes with a closure."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.compiler.gradient_methods import Batch, Signs, batch, net, spec
from tests.compiler.test_batches import Noisy
from tests.conformance import divided
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint, save_checkpoint

FIELDS = 'lr = 0.4, max_iter = 4, history_size = 5, line_search_fn = "strong_wolfe"'
LBFGS = f'optimizer torch("torch.optim:LBFGS") as lbfgs {{ {FIELDS} }} '
TEXT = "loss cross_entropy " + LBFGS


class Asking(torch.optim.SGD):
    """Asks four times at the weights of the step and once elsewhere; keeps all answers, then takes the first."""

    answers: list[tuple[float, list[Tensor]]]

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.answers = []
        parameters = [p for group in self.param_groups for p in group["params"]]
        for place in range(5):
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.1 * (place == 4))
            loss = float(closure())
            self.answers.append((loss, [p.grad.clone() for p in parameters]))
        with torch.no_grad():
            for p, gradient in zip(parameters, self.answers[0][1], strict=True):
                p.sub_(0.1)
                p.grad.copy_(gradient)
        super().step()


ASKING = 'loss cross_entropy optimizer torch("tests.compiler.test_closures:Asking") as asking { lr = 0.3 } '


class Ahead(torch.optim.SGD):
    """Moves the weights along its momentum before it asks for the first time, and back afterwards."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.data.sub_(0.5 * self.state[p].get("momentum_buffer", torch.ones_like(p)))
        with torch.enable_grad():
            closure()
        for p, weight in zip(parameters, before, strict=True):
            p.data.copy_(weight)
        super().step()


def test_the_first_answer_is_at_the_weights_of_now_too() -> None:
    ours, theirs = net(), net()
    text = TEXT.partition("optimizer")[0]
    text += 'optimizer torch("tests.compiler.test_closures:Ahead") { lr = 0.1, momentum = 0.9 }'
    program = trainc.compile(text, ours)
    optimizer = Ahead(theirs.parameters(), lr=0.1, momentum=0.9)
    for t in range(4):

        def closure(t: int = t) -> Tensor:
            x, y = batch(t)
            optimizer.zero_grad()
            loss = cross_entropy(theirs(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        program.step(batch(t))
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-12, atol=1e-12)


class Noise(nn.Module):
    """A model whose passes draw numbers and keep statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


NOISE = "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5 } "
PULL = "regularize l2_sp on ndim(2) { weight = 0.1 } "


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize("clauses", ["", PULL, NOISE + PULL])
def test_every_call_has_the_loss_of_the_step_at_the_weights_of_now(
    executor: Any, sizes: Sequence[int], clauses: str
) -> None:
    """Calls at the same weights agree: dropout, noise, all terms and the changed batch are those of the first."""
    model = Noise().double()
    model.body[1].train(NOISE not in clauses)
    program = trainc.compile(spec(ASKING + clauses, Noisy()), model, executor=executor)
    for t in range(3):
        metrics = program.step(divided(batch(t), sizes))
        assert metrics["asking.evaluations"] == 5
        (first, gradients), *others = optimizer(program).answers
        for loss, found in others[:3]:
            assert loss == pytest.approx(first, rel=1e-12)
            for one, two in zip(found, gradients, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
        assert others[3][0] != pytest.approx(first, rel=1e-3)
        if not clauses:
            assert metrics["loss"] == pytest.approx(first, rel=1e-12)


def optimizer(program: Any) -> Any:
    return next(a.torch for a in program._machine.actions if a.name == "asking")


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_statistics_and_random_numbers_are_those_of_one_pass(executor: Any) -> None:
    plain = "loss cross_entropy optimizer sgd { lr = 0.3 } "
    asked, once = (
        trainc.compile(text, Noise().double(), executor=executor) for text in (ASKING, plain)
    )
    for t in range(3):
        drawn = []
        for program in (asked, once):
            torch.manual_seed(t)
            program.step(divided(batch(t), (3, 4)))
            drawn.append(torch.rand(3))
        assert torch.equal(*drawn)
        wanted = once.module.state_dict()
        for name, value in asked.module.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


def test_what_is_measured_is_measured_once() -> None:
    gns = "noise_scale gns on type(LayerNorm) { smooth = 1 steps } "
    plain = "loss cross_entropy optimizer sgd { lr = 0.3 } "
    one, two = (trainc.compile(text + gns, net()).step(batch(0)) for text in (ASKING, plain))
    names = [name for name in two if name.startswith("gns")]
    assert len(names) > 2
    for name in names:
        assert one[name] == pytest.approx(two[name], rel=1e-10, nan_ok=True)


def test_a_resumed_program_is_bit_equal(tmp_path: Path) -> None:
    """Also from a checkpoint on disk: LBFGS keeps lists of vectors over all parameters."""
    straight, later, again = (trainc.compile(TEXT, net()) for _ in range(3))
    for t in range(4):
        straight.step(batch(t))
    state = straight.state_dict()
    assert state["actions"]["lbfgs"]["0.weight/old_dirs"]
    save_checkpoint(tmp_path, 4, state)
    path = find_latest(tmp_path).path
    assert path is not None
    later.load_state_dict(copy.deepcopy(state))
    again.load_state_dict(load_checkpoint(path))
    for t in range(4, 7):
        wanted = straight.step(batch(t))
        assert later.step(batch(t)) == wanted
        assert again.step(batch(t)) == wanted
    for name, value in straight.module.named_parameters():
        assert torch.equal(later.module.get_parameter(name), value)
        assert torch.equal(again.module.get_parameter(name), value)


class Fragile(nn.Module):
    """Fails in a chosen pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.passes = net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes -= 1
        if self.passes == 0:
            raise RuntimeError("out of memory")
        return self.body(x)  # type: ignore[no-any-return]


def test_an_error_in_a_later_call_leaves_the_weights_and_clears_the_memory() -> None:
    model = Fragile()
    program = trainc.compile(TEXT, model)
    program.step(batch(0))
    weights = copy.deepcopy(model.state_dict())
    model.passes = 3
    with pytest.raises(RuntimeError, match="out of memory"):
        program.step(batch(1))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    fresh = trainc.compile(TEXT, copy.deepcopy(model))
    assert program.step(batch(2))["loss"] == fresh.step(batch(2))["loss"]
    for one, two in zip(model.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_loss_that_is_not_finite_is_skipped_without_a_call() -> None:
    program = trainc.compile(TEXT + "run { length = 9 steps, on_nan = skip } ", net())
    x, y = batch(0)
    metrics = program.step((x * math.nan, y))
    assert "skipped" in metrics
    assert "lbfgs.evaluations" not in metrics


def test_lbfgs_trains() -> None:
    """A convex problem: the loss after a few steps is that of the solution by lstsq."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    model = nn.Linear(5, 2, bias=False).double()
    program = trainc.compile("loss mse " + LBFGS, model)
    for _ in range(25):
        program.step((x, y))
    solution = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(model.weight.detach(), solution, rtol=1e-3, atol=1e-4)


# refused


def test_a_loop_of_ones_own_is_refused_with_what_to_write() -> None:
    program = trainc.compile(TEXT, net())
    for call in (program.loss, program.graph):
        with pytest.raises(ValueError, match=r"`lbfgs` asks for the loss .* call `program\.step\("):
            call(batch(0))
    program.step(batch(0))


def test_a_grad_scaler_is_refused() -> None:
    program = trainc.compile(TEXT, net())
    with pytest.raises(ValueError, match=r"`lbfgs` asks .* a GradScaler can skip a step only as"):
        program.step(batch(0), torch.amp.GradScaler("cpu"))
    program.step(batch(0), torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ("perturb sam { rho = 0.1 }", "but `perturb sam` changes weights or inputs for the first"),
        ("mask magnitude on ndim(2) { density = 50% }", "`mask magnitude` chooses which entries"),
        ("mask sift on ndim(2) { density = 10% }", "`mask sift` chooses which entries"),
        ("lr trust_ratio on ndim(2)", "`lr trust_ratio` changes its update"),
    ],
)
def test_what_acts_once_in_a_step_is_refused_at_plan(clause: str, message: str) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"{TEXT}\n{clause}", net())
    (problem,) = error.value.diagnostics
    assert message in problem.message
    assert problem.rule == "conflicting-effects"
    assert "<text>:2:1" in str(error.value)
    assert len(problem.labels) == 2


def test_changes_of_gradients_and_second_optimizers_are_refused() -> None:
    with pytest.raises(trainc.SpecError, match="`lr signs` changes the gradients of the first"):
        trainc.plan(spec(TEXT, Signs()), net())
    two = f"{TEXT.replace('as lbfgs', 'on ndim(2) as lbfgs')} optimizer sgd on ndim(1) {{ lr = 1 }}"
    with pytest.raises(trainc.SpecError, match="`optimizer sgd` is a second optimizer"):
        trainc.plan(two, net())


class ByName(torch.optim.SGD):
    def step(self, *, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        raise AssertionError("called")


class TwoArguments(torch.optim.SGD):
    def step(self, closure: Callable[[], Tensor], radius: float) -> None:  # type: ignore[override]
        raise AssertionError("called")


@pytest.mark.parametrize(
    ("name", "reason"), [("ByName", "positional arguments"), ("TwoArguments", "'radius'")]
)
def test_a_step_that_does_not_take_a_closure_alone_is_an_error_at_plan(
    name: str, reason: str
) -> None:
    text = ASKING.replace("Asking", name)
    with pytest.raises(
        trainc.SpecError, match=f"cannot be called with a closure alone: .*{reason}"
    ):
        trainc.plan(text, net())


def test_rates_that_differ_are_an_error_of_the_class_at_the_clause() -> None:
    with pytest.raises(trainc.SpecError, match="LBFGS doesn't support per-parameter options"):
        trainc.compile(TEXT + "lr layer_decay { decay = 0.5 }", net())


# replicas

SIZES = ((3, 4), (2, 3, 2))


def micro_batches(rank: int, step: int) -> list[Batch]:
    return divided(batch(10 * step + rank), SIZES[rank])


def sharded(when: str) -> str:
    from torch.distributed.fsdp import fully_shard

    model = net()
    try:
        if when == "first":
            fully_shard(model)
        program = trainc.compile(TEXT, model)
        fully_shard(model)
        program.step(micro_batches(0, 0))
    except (trainc.SpecError, SiteError) as error:
        return str(error)
    return "no error"


def process(rank: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    program = trainc.compile(TEXT, model)
    program.forward = DistributedDataParallel(model)
    metrics = [program.step(micro_batches(rank, t)) for t in range(4)]
    found = {"metrics": metrics, "weights": model.state_dict()}
    found |= {when: sharded(when) for when in ("first", "late")}
    return found


def test_two_replicas_are_the_loop_written_by_hand(tmp_path: Path) -> None:
    one, two = run_processes(__file__, 2, tmp_path)
    model = net()
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.4, max_iter=4, history_size=5, line_search_fn="strong_wolfe"
    )
    for t in range(4):

        def closure(t: int = t) -> float:
            optimizer.zero_grad()
            total = 0.0
            for rank in range(2):
                for x, y in micro_batches(rank, t):
                    loss = cross_entropy(model(x), y) * (len(y) / 14)
                    loss.backward()
                    total += loss.item()
            return total

        optimizer.step(closure)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one["weights"][name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(one["weights"][name], two["weights"][name]), name
    assert one["metrics"] == two["metrics"]
    for replica in (one, two):
        assert "cannot be compiled: it needs gradients after the step's" in replica["first"]
        assert "the gradients that `lbfgs` asks for are not averaged there" in replica["late"]


if __name__ == "__main__":
    run_rank(process)
