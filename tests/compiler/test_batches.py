"""Changes of batches: every pass of a step sees the same changed batch, whatever runs it, and so does a resumed run."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import trainc
from tests.compiler.gradient_methods import TIMES, Batch, batch, net, spec
from tests.conformance import divided
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.record import Step
from trainc.runtime.storage.random_streams import derive_seed

SEED = 5
SGD = f"loss cross_entropy optimizer sgd {{ lr = 0.3, momentum = 0.9 }} run {{ length = 99 steps, seed = {SEED} }} "
MSE = SGD.replace("cross_entropy", "mse")


class Method(Construct):
    """Base of the constructs below."""

    kind: ClassVar = "perturb"
    cite: ClassVar = "-"
    effects: ClassVar = (Effect("perturb", "change batches", ("inputs",), ("inputs",)),)
    made: ClassVar[Any]
    """A function of a batch and a stream of random numbers, that returns a batch."""

    def lower(self, to: Lowering) -> None:
        to.batch(Change(to.label, type(self).made))


class Change(BatchTransform):
    def __init__(self, name: str, made: Callable[[Batch, torch.Generator], Batch]) -> None:
        self.name, self.made = name, made

    def change(
        self, batch: Batch, step: Step, draw: torch.Generator, sample_ids: Tensor | None
    ) -> Batch:
        return self.made(batch, draw)


def noisy(batch: Batch, draw: torch.Generator) -> Batch:
    """Add noise, in place: what a transform is given are copies."""
    batch[0].add_(0.5 * torch.randn(batch[0].shape, generator=draw, dtype=batch[0].dtype))
    return batch


def mixed(batch: Batch, draw: torch.Generator) -> Batch:
    """Zhang et al. 2018, of targets that are numbers."""
    (x, y), part = batch, torch.rand((), generator=draw, dtype=torch.float64)
    order = torch.randperm(len(x), generator=draw)
    return part * x + (1 - part) * x[order], part * y + (1 - part) * y[order]


def forgetful(batch: Batch, draw: torch.Generator) -> Batch:
    """Let some targets not count."""
    x, y = batch
    y[torch.rand(y.shape, generator=draw) < 0.4] = -100
    return x, y


class Noisy(Method):
    name: ClassVar = "noisy"
    made: ClassVar = staticmethod(noisy)


class Mixed(Method):
    name: ClassVar = "mixed"
    made: ClassVar = staticmethod(mixed)


class Forgetful(Method):
    name: ClassVar = "forgetful"
    made: ClassVar = staticmethod(forgetful)


def stream(label: str, step: int, first: int = 0, rank: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(SEED, "batch", label, rank, step, first))


def numbers(seed: int) -> Batch:
    x, _ = batch(seed)
    return x, x[:, :4].sin()


def micro_batches(
    given: Batch, sizes: Sequence[int], step: int, method: type[Method]
) -> list[Batch]:
    found, first = [], 0
    for x, y in divided(given, sizes):
        draw = stream(method.name, step, first)
        found.append(method.made((x.clone(), y.clone()), draw))
        first += len(y)
    return found


def by_hand(
    method: type[Method],
    steps: int,
    sizes: Sequence[int],
    data: Callable[[int], Batch] = batch,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    is_open: Callable[[int], bool] = lambda _: True,
) -> nn.Module:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for t in range(steps):
        parts = micro_batches(data(t), sizes, t, method) if is_open(t) else divided(data(t), sizes)
        counts = [int((y != -100).sum()) for _, y in parts]
        for (x, y), count in zip(parts, counts, strict=True):
            if count:
                (loss(model(x), y) * (count / sum(counts))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_near(one: nn.Module, two: nn.Module) -> None:
    wanted = two.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


BOTH = pytest.mark.parametrize("executor", ["graph", "module"])
SIZES = pytest.mark.parametrize("sizes", [(7,), (3, 4)])


@BOTH
@SIZES
def test_inputs_with_noise_are_the_loop_written_by_hand(
    executor: Any, sizes: Sequence[int]
) -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Noisy()), ours, executor=executor)
    for t in range(4):
        given = batch(t)
        kept = given[0].clone()
        program.step(divided(given, sizes))
        assert torch.equal(given[0], kept), "the user's tensors are the user's"
    assert_near(ours, by_hand(Noisy, 4, sizes))


@BOTH
@SIZES
def test_mixed_inputs_and_numbers_are_the_loop_written_by_hand(
    executor: Any, sizes: Sequence[int]
) -> None:
    ours = net()
    program = trainc.compile(spec(MSE, Mixed()), ours, executor=executor)
    for t in range(4):
        program.step(divided(numbers(t), sizes))
    assert_near(ours, by_hand(Mixed, 4, sizes, numbers, mse_loss))


@BOTH
def test_loss_weights_are_those_of_the_changed_targets(executor: Any) -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Forgetful()), ours, executor=executor)
    for t in range(6):
        program.step(divided(batch(t), (3, 4)))
    assert_near(ours, by_hand(Forgetful, 6, (3, 4)))
    assert program.clock.samples == 42


@pytest.mark.parametrize("as_graph", [True, False])
def test_a_loop_of_ones_own_has_the_same_numbers(as_graph: bool) -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Noisy()), ours)
    for t in range(3):
        for x, y in divided(batch(t), (3, 4)):
            if as_graph:
                program.graph((x, y), len(y) / 7)
            else:
                program.loss((x, y), loss_weight=len(y) / 7).backward()
        program.update()
    assert_near(ours, by_hand(Noisy, 3, (3, 4)))


def test_a_loss_weight_that_no_longer_fits_is_refused() -> None:
    program = trainc.compile(spec(SGD, Forgetful()), net())
    with pytest.raises(ValueError, match=r"`forgetful` changed how many targets .* `program\.step"):
        program.loss(batch(0), loss_weight=0.5)
    program.loss(batch(0))


@pytest.mark.parametrize(("times", "is_open"), TIMES)
def test_it_obeys_the_times_of_its_clause(times: Any, is_open: Callable[[int], bool]) -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Clause(Noisy(), **times)), ours)
    for t in range(6):
        program.step(divided(batch(t), (3, 4)))
    assert_near(ours, by_hand(Noisy, 6, (3, 4), is_open=is_open))


def test_a_closed_clause_gives_the_model_the_tensors_of_the_user() -> None:
    seen: list[int] = []

    class Watching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.data_ptr())
            return super().forward(x)

    late = Clause(Noisy(), start=Duration(9, "steps"))
    x, y = batch(0)
    trainc.compile(spec(SGD, late), Watching(6, 4).double()).step((x, y))
    assert seen == [x.data_ptr()]


def test_evaluation_sees_the_batch_as_it_is() -> None:
    program = trainc.compile(spec(SGD, Noisy()), net())
    x, y = batch(0)
    wanted = cross_entropy(program.module(x), y).item()
    assert program.evaluate(x, y)[0] / 7 == pytest.approx(wanted, rel=1e-12)


def test_dropout_draws_as_without_it() -> None:
    """The clause has random numbers of its own, and leaves those of the model alone."""
    program = trainc.compile(spec(SGD, Noisy()), net())
    torch.manual_seed(3)
    program.step(batch(0))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_a_resumed_program_is_bit_equal() -> None:
    straight, later = (trainc.compile(spec(SGD, Noisy()), net()) for _ in range(2))
    for t in range(3):
        straight.step(divided(batch(t), (3, 4)))
    later.load_state_dict(copy.deepcopy(straight.state_dict()))
    for t in range(3, 6):
        parts = divided(batch(t), (3, 4))
        assert straight.step(parts) == later.step(parts)
    for one, two in zip(straight.module.parameters(), later.module.parameters(), strict=True):
        assert torch.equal(one, two)


@BOTH
@SIZES
def test_both_passes_of_sam_see_the_same_batch(executor: Any, sizes: Sequence[int]) -> None:
    ours, theirs = net(), net()
    text = SGD + "perturb sam { rho = 0.5 } "
    program = trainc.compile(spec(text, Noisy()), ours, executor=executor)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    for t in range(3):
        program.step(divided(batch(t), sizes))
        parts = micro_batches(batch(t), sizes, t, Noisy)
        sam_step(theirs, parts, optimizer)
    assert_near(ours, theirs)


def sam_step(model: nn.Module, parts: Sequence[Batch], optimizer: torch.optim.Optimizer) -> None:
    weights = [p.detach().clone() for p in model.parameters()]
    for second in (False, True):
        for x, y in parts:
            (cross_entropy(model(x), y) * (len(y) / 7)).backward()
        with torch.no_grad():
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for p, g, w in zip(model.parameters(), gradients, weights, strict=True):
                p.copy_(w if second else w + 0.5 * g / (norm + 1e-12))
        if second:
            optimizer.step()
        optimizer.zero_grad()


def test_two_changes_act_in_the_order_of_the_spec() -> None:
    ours, theirs = net(), net()
    program = trainc.compile(spec(MSE, Mixed(), Noisy()), ours)
    x, y = numbers(0)
    program.step((x, y))
    x, y = noisy(mixed((x, y), stream("mixed", 0)), stream("noisy", 0))
    mse_loss(theirs(x), y).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            assert p.grad is not None
            p.sub_(0.3 * p.grad)
    assert_near(ours, theirs)


# other forms


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 6).double(), nn.Linear(6, 9).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))  # type: ignore[no-any-return]


class Shorter(Method):
    """Fewer tokens of each example: another shape."""

    name: ClassVar = "shorter"
    made: ClassVar = staticmethod(lambda batch, draw: (batch[0][:, :3], batch[1][:, :3]))


def test_another_length_is_another_graph() -> None:
    ids = torch.arange(20).view(4, 5) % 9
    clause = Clause(Shorter(), every=Duration(2, "steps"))
    text = SGD + "noise_scale gns on all { smooth = 1 steps } "
    pair = [trainc.compile(spec(text, clause), Words(), executor=e) for e in ("graph", "module")]
    for _ in range(4):
        one, two = (program.step((ids, ids)) for program in pair)
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    assert pair[0].clock.tokens == 2 * 12 + 2 * 20


class Soft(Method):
    name: ClassVar = "soft"
    made: ClassVar = staticmethod(
        lambda batch, draw: (batch[0], torch.nn.functional.one_hot(batch[1], 4).double())
    )


class Fewer(Method):
    name: ClassVar = "fewer"
    made: ClassVar = staticmethod(lambda batch, draw: (batch[0][:3], batch[1][:3]))


class Nothing(Method):
    name: ClassVar = "nothing"
    made: ClassVar = staticmethod(lambda batch, draw: None)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Soft, r"soft: the targets became float64\[7, 4\], and the loss takes int64\[7\].* says `mixes_classes"),
        (Fewer, "fewer: 7 examples became 3: a change of a batch must keep their number"),
        (Nothing, "nothing: a batch is NoneType: expected a pair"),
    ],
)  # fmt: skip
def test_another_form_is_refused_and_the_step_can_be_run_again(
    method: type[Method], message: str
) -> None:
    first = Clause(method(), stop=Duration(1, "steps"))
    program = trainc.compile(spec(SGD, first), net())
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            program.step(batch(0))
        with pytest.raises(ValueError, match=message):
            program.loss(batch(0))
    assert program.clock.steps == 0


# replicas


def process(rank: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    program = trainc.compile(spec(SGD, Noisy()), model)
    program.forward = DistributedDataParallel(model)
    for t in range(3):
        program.step(divided(batch(t), (3, 4)))
    return model.state_dict()


def test_each_replica_draws_its_own_numbers(tmp_path: Path) -> None:
    """Both replicas have the same data: only the noise can tell them apart."""
    from tests.processes import run_processes

    one, two = run_processes(__file__, 2, tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for t in range(3):
        for rank in range(2):
            first = 0
            for x, y in divided(batch(t), (3, 4)):
                x, y = noisy((x.clone(), y), stream("noisy", t, first, rank))
                first += len(y)
                (cross_entropy(model(x), y) * (len(y) / 14)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(one[name], two[name]), name


if __name__ == "__main__":
    from tests.processes import run_rank

    run_rank(process)
