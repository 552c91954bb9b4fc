"""Changes of gradients: after accumulation and unscaling, before clipping, obeyed by masks, unseen by statistics."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

import trainc
from tests.compiler.gradient_methods import (
    TIMES,
    TRUST,
    Change,
    Lars,
    Method,
    Project,
    Signs,
    batch,
    changes,
    lars,
    net,
    spec,
)
from tests.conformance import divided
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration, Glob, Ndim
from trainc.runtime.step.gradients import ParameterGradient
from trainc.runtime.step.record import Step

DECAY, LIMIT = 0.05, 0.02
SGD = f"loss cross_entropy optimizer sgd {{ lr = 0.3, momentum = 0.9, weight_decay = {DECAY}, clip = {LIMIT} }} "


def by_hand(
    steps: int,
    sizes: Sequence[int] = (7,),
    is_open: Callable[[int], bool] = lambda _: True,
    limit: float = LIMIT,
) -> nn.Module:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=DECAY)
    for t in range(steps):
        for x, y in divided(batch(t), sizes):
            (cross_entropy(model(x), y) * (len(y) / 7)).backward()
        with torch.no_grad():
            for p in model.parameters():
                if is_open(t) and p.grad is not None:
                    lars(p, p.grad, DECAY)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_near(one: nn.Module, two: nn.Module) -> None:
    wanted = two.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize(
    ("executor", "scale"), [("module", False), ("module", True), ("graph", False)]
)
def test_lars_is_the_loop_written_by_hand(executor: Any, sizes: Sequence[int], scale: bool) -> None:
    """Gradients are accumulated and unscaled before, and clipped after: the limit is below most norms."""
    ours = net()
    program = trainc.compile(spec(SGD, Lars()), ours, executor=executor)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale else None
    norms = []
    for t in range(5):
        norms.append(program.step(divided(batch(t), sizes), scaler)["gradient_norm"])
        if scaler is not None:
            scaler.update()
    assert_near(ours, by_hand(5, sizes))
    assert max(norms) > LIMIT, "nothing was clipped"


def test_a_loop_of_ones_own_has_it_too() -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Lars()), ours)
    for t in range(4):
        for x, y in divided(batch(t), (3, 4)):
            program.loss((x, y), loss_weight=len(y) / 7).backward()
        program.update()
    assert_near(ours, by_hand(4, (3, 4)))


@pytest.mark.parametrize(("times", "is_open"), TIMES)
def test_it_obeys_the_times_of_its_clause(times: Any, is_open: Callable[[int], bool]) -> None:
    ours = net()
    program = trainc.compile(spec(SGD, Clause(Lars(), **times)), ours)
    for t in range(6):
        program.step(batch(t))
    assert_near(ours, by_hand(6, is_open=is_open))
    assert len(changes(program)[0].seen) == sum(map(is_open, range(6)))


def test_a_closed_clause_is_bit_identical_to_none() -> None:
    with_it, without = net(), net()
    late = trainc.compile(spec(SGD, Clause(Lars(), start=Duration(9, "steps"))), with_it)
    plain = trainc.compile(spec(SGD), without)
    for t in range(3):
        assert late.step(batch(t)) == plain.step(batch(t))
    for one, two in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, two)


def test_only_what_is_selected_is_changed() -> None:
    program = trainc.compile(spec(SGD, Clause(Lars(), on=Ndim(2))), net())
    program.step(batch(0))
    assert changes(program)[0].seen[0].keys() == {"0.weight", "3.weight"}


def test_two_changes_act_in_the_order_of_the_spec() -> None:
    """The projection sees signs; after it they are none."""
    program = trainc.compile(spec(SGD, Signs(), Project()), net())
    for t in range(2):
        program.step(batch(t))
    signs, project = changes(program)
    assert {abs(float(e)) for _, g in project.seen[1].values() for e in g.flatten()} == {1.0}
    assert not any(torch.equal(g, g.sign()) for _, g in signs.seen[1].values())


def test_state_is_saved_and_a_resumed_program_is_bit_equal() -> None:
    straight = trainc.compile(spec(SGD, Project()), net())
    for t in range(3):
        straight.step(batch(t))
    saved = copy.deepcopy(straight.state_dict())
    later = trainc.compile(spec(SGD, Project()), nn.Sequential(*net().children()))
    later.load_state_dict(saved)
    for t in range(3, 6):
        assert straight.step(batch(t)) == later.step(batch(t))
    for one, two in zip(straight.module.parameters(), later.module.parameters(), strict=True):
        assert torch.equal(one, two)


class Shared(nn.Module):
    """Two parameters with one gradient, and gradients that are one number for all entries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Parameter(torch.randn(6, 4)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.one + self.two) + self.bias.mean()


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_gradients_in_one_memory_are_each_changed_once(executor: Any) -> None:
    ours, theirs = Shared().double(), Shared().double()
    program = trainc.compile(
        spec("loss cross_entropy optimizer sgd { lr = 1 }", Lars()), ours, executor=executor
    )
    program.step(batch(0))
    x, y = batch(0)
    cross_entropy(theirs(x), y).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            assert p.grad is not None
            lars(p, p.grad, 0.0)
            p.sub_(p.grad)
    assert_near(ours, theirs)


# masks


def test_entries_that_are_zero_stay_so_and_have_no_gradient() -> None:
    text = SGD + "mask magnitude on ndim(2) { density = 50% } "
    program = trainc.compile(spec(text, Lars(), Signs()), net())
    for t in range(3):
        program.step(batch(t))
    for name in ("0.weight", "3.weight"):
        zero = program.module.get_parameter(name) == 0
        assert int(zero.sum()) == zero.numel() // 2
        for change in changes(program):
            assert all((seen[name][1][zero] == 0).all() for seen in change.seen), name


def test_selected_entries_are_what_is_changed() -> None:
    """The step of LARS without decay is as long as lr trust |w|, w being the entries that train."""
    text = "loss cross_entropy optimizer sgd { lr = 0.3 } mask sift on ndim(2) { density = 25% } "
    program = trainc.compile(spec(text, Clause(Lars(), on=Ndim(2))), net())
    for t in range(3):
        program.step(batch(t))
    before = copy.deepcopy(program.module)
    program.step(batch(3))
    (change,) = changes(program)
    for name in ("0.weight", "3.weight"):
        weight, gradient = change.seen[-1][name]
        assert weight.shape == gradient.shape == (weight.numel(),)
        moved = program.module.get_parameter(name) - before.get_parameter(name)
        assert int(moved.count_nonzero()) == weight.numel() < moved.numel() // 2
        torch.testing.assert_close(moved.norm(), 0.3 * TRUST * weight.norm())


# statistics


GNS = "noise_scale gns on type(LayerNorm) { smooth = 1 steps, METHOD } "


@pytest.mark.parametrize("method", ["method = per_example", "method = micro_batch"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_what_is_measured_are_the_gradients_before_the_change(method: str, executor: Any) -> None:
    """In the first step, at the same weights, all measured numbers are those without the change, bit for bit."""
    text = SGD + GNS.replace("METHOD", method)
    kwargs = {"executor": executor}
    with_it = trainc.compile(spec(text, Lars()), net(), **kwargs)
    plain = trainc.compile(spec(text), net(), **kwargs)
    ours, theirs = (p.step(divided(batch(0, 8), (4, 4))) for p in (with_it, plain))
    measured = [name for name in theirs if name.startswith("gns")]
    assert len(measured) > 2
    assert [ours[name] for name in measured] == [theirs[name] for name in measured]
    assert ours["gradient_norm"] != theirs["gradient_norm"]


# refused


def words(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)).double()


SPARSE = "loss cross_entropy optimizer sgd { lr = 0.3 } "


def test_a_sparse_embedding_is_refused_at_the_clause() -> None:
    with pytest.raises(trainc.SpecError, match=r"the gradient of `0\.weight` is sparse") as error:
        trainc.compile(spec(SPARSE, Lars()), words(sparse=True))
    assert "build its layer with `sparse=False`, or exclude the parameter" in str(error.value)
    trainc.compile(spec(SPARSE, Clause(Lars(), on=Glob("1.*"))), words(sparse=True))
    trainc.compile(spec(SPARSE, Lars()), words(sparse=False))


def test_a_gradient_that_turns_out_sparse_is_refused_by_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 3, dtype=torch.float64))

        def forward(self, ids: Tensor) -> Tensor:
            return embedding(ids, self.table, sparse=True)

    program = trainc.compile(spec(SPARSE, Lars()), Words())
    before = program.module.get_parameter("table").clone()
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="lars: the gradient of `table` is sparse"):
        program.step((ids, ids))
    assert torch.equal(program.module.get_parameter("table"), before)


def test_a_change_of_what_no_optimizer_trains_is_an_error_at_its_clause() -> None:
    model, text = net(), 'loss cross_entropy optimizer sgd { lr = 0.3, freeze = "0.*" }'
    with pytest.raises(
        trainc.SpecError, match="`lr lars` has no effect, because no optim"
    ) as error:
        trainc.plan(spec(text, Clause(Lars(), on=Glob("0.*"))), model)
    (problem,) = error.value.diagnostics
    assert problem.rule == "selector-matches-frozen"
    trainc.plan(spec(text, Lars()), model)


def test_a_step_that_is_skipped_changes_nothing() -> None:
    program = trainc.compile(
        spec(SGD + "run { length = 9 steps, on_nan = skip } ", Project()), net()
    )
    x, y = batch(0)
    assert "skipped" in program.step((x * math.nan, y))
    assert not changes(program)[0].seen


def rebound(one: ParameterGradient) -> None:
    one.gradient = one.gradient * 0


def rated(one: ParameterGradient) -> None:
    one.lr = 0.0


def zeroed(one: ParameterGradient) -> None:
    one.weight.zero_()


def shortened(one: ParameterGradient) -> None:
    one.gradient.resize_(1)


def multiplied(one: ParameterGradient) -> None:
    one.gradient *= 0.5


def recast(one: ParameterGradient) -> None:
    one.gradient.data = one.gradient.float()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda one: one.gradient * 0, "`change` returned list, which nothing reads"),
        (rebound, r"another tensor in place of the gradient of `0\.weight`"),
        (shortened, r"`0\.weight` became float64\[1\] on cpu"),
        (recast, r"`0\.weight` became float32\[8, 6\] on cpu from float64\[8, 6\]"),
        (zeroed, r"wrote to the weight, .* of `0\.weight`"),
        (rated, r"wrote to the weight, `lr` or `weight_decay` of `0\.weight`"),
    ],
)
def test_what_is_no_change_in_place_is_an_error_and_not_lost(
    write: Callable[[ParameterGradient], Any], message: str
) -> None:
    class OtherChange(Change):
        def change(self, gradients: Sequence[ParameterGradient], step: Step) -> Any:
            returned = [write(one) for one in gradients]
            return returned if returned[0] is not None else None

    class Other(Method):
        name: ClassVar = "other"
        make: ClassVar = OtherChange

    program = trainc.compile(spec(SGD, Other()), net())
    with pytest.raises(ValueError, match="other: .*" + message):
        program.step(batch(0))


def test_an_operator_in_place_is_a_change_in_place() -> None:
    class HalfChange(Change):
        def change_one(self, one: ParameterGradient, step: Step) -> None:
            multiplied(one)

    class Half(Method):
        name: ClassVar = "half"
        make: ClassVar = HalfChange

    text = "loss cross_entropy optimizer sgd { lr = 0.3 } "
    ours, other = net(), net()
    trainc.compile(spec(text, Half()), ours).step(batch(0))
    trainc.compile(text.replace("0.3", "0.15"), other).step(batch(0))
    assert_near(ours, other)
