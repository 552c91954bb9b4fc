"""Ghost batch norm: sequential batch norms, statistics included, on either executor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.conformance import Setup, divided
from tests.processes import run_processes, run_rank
from trainc.compiler.bind.bound_clause import Sizes, Targets
from trainc.compiler.constructs.normalize.ghost_batch import GhostBatch
from trainc.compiler.errors import GraphRefused, SiteError
from trainc.compiler.model.inventory import build_inventory
from trainc.runtime.data.batch import Batch

BASE = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 40 steps }\n"
CLASSES = 3


class Net(nn.Module):
    """Two BatchNorm layers of one kind, with a pointwise layer between them."""

    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__()
        kinds: list[Any] = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
        self.first = kinds[dimensions](4, **options)
        self.mix = nn.Linear(4, 4)
        self.second = kinds[dimensions](4, momentum=0.3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.first(x).movedim(1, -1)).movedim(-1, 1))
        out: Tensor = self.head(
            self.second(x).flatten(2).mean(2) if x.dim() > 2 else self.second(x)
        )
        return out


def net(dimensions: int = 2, **options: Any) -> Net:
    torch.manual_seed(0)
    made = Net(dimensions, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def batch(seed: int, examples: int = 6, dimensions: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, *[3] * dimensions, generator=g, dtype=torch.float64)
    return 2 * x + 1, torch.randint(0, CLASSES, (examples,), generator=g)


class ByHand(nn.Module):
    """A BatchNorm in its place that calls it once per ghost batch of each view, in order."""

    def __init__(self, layer: nn.Module, rule: GhostBatch, views: int = 1) -> None:
        super().__init__()
        self.layer, self.rule, self.views = layer, rule, views

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            result: Tensor = self.layer(x)
            return result
        return torch.cat([self.rule.reference(self.layer, view) for view in x.chunk(self.views)])


def by_hand(model: Net, sizes: dict[str, int], views: int = 1, **fields: Any) -> Net:
    """Return a copy of a model with ghost batches in these layers."""
    made = copy.deepcopy(model)
    for name, size in sizes.items():
        rule = GhostBatch(size=size, **fields)
        setattr(made, name, ByHand(getattr(made, name), rule, views))
    return made


def train_by_hand(made: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Train with plain SGD, and return parameters and buffers by their names in the plain model."""
    for x, y in batches:
        found = torch.autograd.grad(cross_entropy(made(x), y), list(made.parameters()))
        with torch.no_grad():
            for p, gradient in zip(made.parameters(), found, strict=True):
                p.sub_(0.1 * gradient)
    return {n.replace(".layer.", "."): v for n, v in made.state_dict().items()}


def assert_same_state(module: nn.Module, want: dict[str, Tensor]) -> None:
    got = module.state_dict()
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_it_is_sequential_batch_norms_statistics_included(dimensions: int, executor: Any) -> None:
    model = net(dimensions)
    batches = [batch(seed, 6, dimensions) for seed in range(3)]
    want = train_by_hand(by_hand(model, {"first": 2, "second": 2}), batches)
    spec = BASE + "normalize ghost_batch { size = 2 }"
    program = trainc.compile(spec, model, executor=executor)
    for one in batches:
        program.step(one)
    assert_same_state(model, want)
    assert int(model.first.num_batches_tracked) == 9


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_sizes_differ_by_clause_and_other_layers_stay_as_they_are(executor: Any) -> None:
    one = 'normalize ghost_batch as a on "first" { size = 2 }\n'
    two = one + 'normalize ghost_batch as b on "second" { size = 3 }\n'
    for clauses, sizes in ((one, {"first": 2}), (two, {"first": 2, "second": 3})):
        model = net()
        batches = [batch(seed) for seed in range(2)]
        want = train_by_hand(by_hand(model, sizes), batches)
        program = trainc.compile(BASE + clauses, model, executor=executor)
        for one_batch in batches:
            program.step(one_batch)
        assert_same_state(model, want)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("examples", [5, 7])
@pytest.mark.parametrize("remainder", ["merge_last", "smaller", "even"])
def test_what_is_left_over_is_divided_as_the_rule_says(
    examples: int, remainder: str, executor: Any
) -> None:
    model = net()
    hand = by_hand(model, {"first": 3, "second": 3}, remainder=remainder)
    want = train_by_hand(hand, [batch(0, examples)])
    spec = BASE + f"normalize ghost_batch {{ size = 3, remainder = {remainder} }}"
    trainc.compile(spec, model, executor=executor).step(batch(0, examples))
    assert_same_state(model, want)


def test_sizes_of_ghost_batches() -> None:
    sizes = {
        rule: GhostBatch(size=4, remainder=rule).sizes(9)
        for rule in ("merge_last", "smaller", "even")
    }
    assert sizes == {"merge_last": [4, 5], "smaller": [4, 4, 1], "even": [3, 3, 3]}


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_running_statistics_of_the_mean_ghost(executor: Any) -> None:
    model = net()
    first = copy.deepcopy(model.first)
    x, y = batch(0)
    spec = BASE + 'normalize ghost_batch on "first" { size = 2, running = mean }'
    trainc.compile(spec, model, executor=executor).step((x, y))
    ghosts = x.split(2)
    mean = torch.stack([g.mean((0, 2, 3)) for g in ghosts]).mean(0)
    var = torch.stack([g.var((0, 2, 3), correction=0) for g in ghosts]).mean(0)
    torch.testing.assert_close(model.first.running_mean, 0.9 * first.running_mean + 0.1 * mean)
    torch.testing.assert_close(model.first.running_var, 0.9 * first.running_var + 0.1 * var)
    assert int(model.first.num_batches_tracked) == 1


def test_one_example_left_over_has_no_variance() -> None:
    spec = BASE + "normalize ghost_batch { size = 4, remainder = smaller }"
    program = trainc.compile(spec, net(0), executor="module")
    with pytest.raises(SiteError, match="the last group has one, which has no variance: write"):
        program.step(batch(0, 9, 0))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_layers_with_other_settings(options: dict[str, Any], executor: Any) -> None:
    model = net(2, **options)
    want = train_by_hand(by_hand(model, {"first": 2, "second": 2}), [batch(0), batch(1)])
    program = trainc.compile(BASE + "normalize ghost_batch { size = 2 }", model, executor=executor)
    program.step(batch(0))
    program.step(batch(1))
    assert_same_state(model, want)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("size", [6, 100])
def test_a_batch_that_is_one_ghost_batch_is_plain_bit_for_bit(size: int, executor: Any) -> None:
    model, plain = net(), net()
    with_it = trainc.compile(
        BASE + f"normalize ghost_batch {{ size = {size} }}", model, executor=executor
    )
    without = trainc.compile(BASE, plain, executor=executor)
    for seed in range(3):
        assert with_it.step(batch(seed)) == without.step(batch(seed))
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_evaluation_has_no_ghost_batches() -> None:
    model = net()
    program = trainc.compile(BASE + "normalize ghost_batch { size = 2 }", model)
    program.step(batch(0))
    other = net()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(batch(1)[0]), other.eval()(batch(1)[0]))
    alone = torch.cat([model(batch(1)[0][i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(batch(1)[0]), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_multiples_of_the_size_are_the_same_in_any_division(executor: Any) -> None:
    models = [net(), net()]
    x, y = batch(0, 8)
    whole, parts = (
        trainc.compile(BASE + "normalize ghost_batch { size = 2 }", m, executor=executor)
        for m in models
    )
    whole.step((x, y))
    parts.step([(x[:2], y[:2]), (x[2:6], y[2:6]), (x[6:], y[6:])])
    assert_same_state(models[1], models[0].state_dict())


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize(("examples", "size"), [(6, 3), (7, 3), (3, 4)])
def test_each_view_has_ghost_batches_of_its_own(examples: int, size: int, executor: Any) -> None:
    """Noise on a layer before BatchNorm, so that the two views differ; the same noise by hand."""
    pace = 'regularize pace on "mix" { sigma = 0.5, weight = 0.3 }\n'
    ghost = f"normalize ghost_batch {{ size = {size}, remainder = merge_last }}\n"
    model, reference = net(), net()
    program = trainc.compile(BASE + pace + ghost, model, executor=executor)
    before = copy.deepcopy(reference.state_dict())
    said = program.step(batch(0, examples))
    # The same program with the ghost batches of each view by hand, as modules of the user.
    hand = by_hand(reference, {"first": size, "second": size}, views=2, remainder="merge_last")
    assert all(torch.equal(v, before[n]) for n, v in reference.state_dict().items())
    other = trainc.compile(BASE + pace, hand.eval(), executor="module")
    hand.train()  # in train mode a BatchNorm is refused, whatever is around it
    assert other.step(batch(0, examples))["loss"] == pytest.approx(said["loss"], rel=1e-12)
    want = {n.replace(".layer.", "."): v for n, v in hand.state_dict().items()}
    assert_same_state(model, want)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_outside_its_times_the_layers_are_as_they_are(executor: Any) -> None:
    spec = BASE + "normalize ghost_batch from 1 steps until 4 steps every 2 steps { size = 2 }"
    model = net()
    program = trainc.compile(spec, model, executor=executor)
    tracked = []
    for seed in range(6):
        program.step(batch(seed))
        tracked.append(int(model.first.num_batches_tracked))
    assert tracked == [1, 4, 5, 8, 9, 10]


def test_a_micro_batch_that_does_not_divide_is_an_error_where_it_is_met() -> None:
    program = trainc.compile(BASE + "normalize ghost_batch { size = 4 }", net(), executor="module")
    with pytest.raises(
        SiteError, match="gets 6 examples, which cannot be divided into groups of 4"
    ):
        program.step(batch(0))
    program.step(batch(0, 8))
    with pytest.raises(GraphRefused, match="cannot be divided into groups of 4"):
        trainc.compile(BASE + "normalize ghost_batch { size = 4 }", net(), executor="graph").step(
            batch(0)
        )


@pytest.mark.parametrize(
    ("micro", "fields", "found"),
    [
        (8, {"size": 4}, []),
        (10, {"size": 4}, [("bad-value", "error")]),
        (10, {"size": 4, "remainder": "merge_last"}, []),
        (10, {"size": 4, "remainder": "even"}, []),
        (4, {"size": 4}, [("no-effect", "warning")]),
        (3, {"size": 4}, [("no-effect", "warning")]),
    ],
)
def test_the_plan_compares_the_size_with_micro_batches(
    micro: int, fields: dict[str, Any], found: list[tuple[str, str]]
) -> None:
    inventory = build_inventory(net())
    bound = Targets(inventory, (inventory.module["first"],), (), Sizes(micro, 4 * micro, False))
    problems = list(GhostBatch(**fields).validate_targets(bound))
    assert [(p.rule, p.severity) for p in problems] == found
    assert all(p.field == "size" for p in problems)


def test_layers_without_ghost_batches_are_errors() -> None:
    with pytest.raises(trainc.SpecError, match="`head` is a Linear; only BatchNorm layers"):
        trainc.plan(BASE + 'normalize ghost_batch on "head" { size = 2 }', net())
    shared = nn.Sequential(nn.SyncBatchNorm(4), nn.Linear(4, 3))
    with pytest.raises(
        trainc.SpecError, match="`0` is a SyncBatchNorm, which normalizes the examples of all"
    ):
        trainc.plan(BASE + "normalize ghost_batch { size = 2 }", shared)
    cumulative = net(2, momentum=None)
    with pytest.raises(trainc.SpecError, match="`first` averages its statistics over all batches"):
        trainc.plan(BASE + "normalize ghost_batch { size = 2 }", cumulative)


def test_two_clauses_on_one_layer_are_an_error() -> None:
    clauses = (
        "normalize ghost_batch as a { size = 2 }\n"
        'normalize ghost_batch as b on "first" { size = 3 }\n'
    )
    with pytest.raises(trainc.SpecError, match="`a` also replaces how `first` computes its result"):
        trainc.plan(BASE + clauses, net())


GROUPED = 'noise_scale gns on "first" | "second" | "head" { method = ghost, group = %d }\n'


def test_layers_that_a_noise_scale_groups_alike_are_grouped_once() -> None:
    models = [net(), net()]
    both = trainc.compile(BASE + "normalize ghost_batch { size = 2 }\n" + GROUPED % 2, models[0])
    one = trainc.compile(BASE + GROUPED % 2, models[1])
    for seed in range(3):
        assert both.step(batch(seed)) == one.step(batch(seed))
        found = {n: v for n, v in both.signals.items() if n in ("gns.signal", "gns.noise")}
        assert found == {n: one.signals[n] for n in found}
        assert len(found) == 2
    assert_same_state(models[0], models[1].state_dict())


def test_ghost_gradients_are_the_small_batches_of_a_noise_scale() -> None:
    """B_small is the ghost size: by hand, one backward pass per ghost batch of a step in two micro-batches."""
    model = net()
    hand, parts = copy.deepcopy(model), []
    x, y = batch(0, 12)
    for rows in torch.arange(12).split(3):
        loss = cross_entropy(hand(x[rows]), y[rows]) / 4
        parts.append(torch.autograd.grad(loss, list(hand.parameters())))
    flat = torch.stack([torch.cat([g.flatten() for g in part]) for part in parts])
    small, whole = 4 * float(flat.square().sum()), float(flat.sum(0).square().sum())
    noise = (small - whole) / (1 / 3 - 1 / 12)
    signal = (12 * whole - 3 * small) / (12 - 3)
    text = (
        "normalize ghost_batch { size = 3 }\nnoise_scale gns on all { method = ghost, group = 3 }\n"
    )
    program = trainc.compile(BASE + text, model)
    program.step([(x[:6], y[:6]), (x[6:], y[6:])])
    assert program.signals["gns.noise"] == pytest.approx(noise, rel=1e-9)
    assert program.signals["gns.signal"] == pytest.approx(signal, rel=1e-9)


def test_a_noise_scale_of_examples_says_that_groups_can_be_compared() -> None:
    text = BASE + "normalize ghost_batch { size = 3 }\nnoise_scale gns on %s { smooth = 1 steps }\n"
    for selected in ('"first"', '"head"'):
        with pytest.raises(trainc.SpecError, match="`method = ghost, group = 8`") as error:
            trainc.plan(text % selected, net())
        assert "norm-mixes-examples" in str(error.value)


def test_other_groups_of_a_noise_scale_are_a_conflict() -> None:
    message = "also replaces how `first` computes its result: give both groups of one size, 2 or 3"
    with pytest.raises(trainc.SpecError, match=message):
        trainc.plan(BASE + "normalize ghost_batch { size = 2 }\n" + GROUPED % 3, net())


def test_the_plan_names_the_operator_and_that_the_division_matters() -> None:
    rows = trainc.plan(BASE + "normalize ghost_batch { size = 2 }", net()).to_json()["sites"]
    assert [(r["site"], r["operator"]) for r in rows] == [
        ("first", "ghost_batch_norm"),
        ("second", "ghost_batch_norm"),
    ]


def conformance() -> Setup:
    """Return a small network with BatchNorm, whose ghost batches take what is left over."""

    def images(seed: int) -> Batch:
        x, y = batch(seed)
        return x.float(), y

    usage = "normalize ghost_batch { size = 2, remainder = merge_last }"
    return Setup(lambda: net().float(), images, usage=usage)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and by sequential batch norms."""
    model = net()
    batches = [batch(seed) for seed in range(3)]
    reference = train_by_hand(by_hand(model, {"first": 2, "second": 2}), batches)
    program = trainc.compile(BASE + "normalize ghost_batch { size = 2 }", model, executor="graph")
    for one in batches:
        program.step(one)
    compiled = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    return compiled, {n: reference[n] for n in compiled}


# replicas

RANKS = 2
PARTS = ((6,), (4, 2), (2, 4), (6,))
"""The micro-batches of each step."""
GHOSTS = {"first": 2, "second": 2}


def own_batches(rank: int, step: int) -> list[Batch]:
    return divided(batch(10 * step + rank), PARTS[step])


def replica(rank: int) -> dict[str, Any]:
    """Train as one of several replicas, with and without the buffers of rank 0."""
    found = {}
    for name, broadcast in (("rank 0", True), ("own", False)):
        model = net()
        program = trainc.compile(BASE + "normalize ghost_batch { size = 2 }", model)
        program.forward = DistributedDataParallel(model, broadcast_buffers=broadcast)
        steps = range(len(PARTS))
        losses = [program.step(own_batches(rank, step))["loss"] for step in steps]
        found[name] = {"losses": losses, "state": model.state_dict()}
    return found


def replicas_by_hand(*, broadcast: bool) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Return the state of each replica, and the mean loss of each step: one BatchNorm call per ghost batch."""
    made, losses = [by_hand(net(), GHOSTS) for _ in range(RANKS)], []
    for step in range(len(PARTS)):
        if broadcast:
            for one in made[1:]:
                for buffer, first in zip(one.buffers(), made[0].buffers(), strict=True):
                    buffer.copy_(first)
        found, total = [], 0.0
        for rank, one in enumerate(made):
            parts = own_batches(rank, step)
            examples = sum(len(y) for _, y in parts)
            loss = torch.stack([cross_entropy(one(x), y) * len(y) / examples for x, y in parts])
            found.append(torch.autograd.grad(loss.sum(), list(one.parameters())))
            total += float(loss.detach().sum())
        losses.append(total / RANKS)
        mean = [torch.stack(gradients).mean(0) for gradients in zip(*found, strict=True)]
        with torch.no_grad():
            for one in made:
                for p, gradient in zip(one.parameters(), mean, strict=True):
                    p.sub_(0.1 * gradient)
    states = [one.state_dict().items() for one in made]
    return [{n.replace(".layer.", "."): v for n, v in state} for state in states], losses


def test_replicas_have_ghost_batches_of_their_own_and_the_statistics_that_torch_gives_them(
    tmp_path: Path,
) -> None:
    """Their gradients are averaged; statistics are rank 0's before each step, or each replica's own."""
    ranks = run_processes(__file__, RANKS, tmp_path)
    for name, broadcast in (("rank 0", True), ("own", False)):
        states, losses = replicas_by_hand(broadcast=broadcast)
        for one, want in zip(ranks, states, strict=True):
            assert one[name]["losses"] == pytest.approx(losses, rel=1e-12)
            got = one[name]["state"]
            assert got.keys() == want.keys()
            for key, value in got.items():
                torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-12, msg=key)
        parameters = dict(net().named_parameters())
        for key, value in ranks[0][name]["state"].items():
            same = torch.equal(value, ranks[1][name]["state"][key])
            assert same == (key in parameters or key.endswith("num_batches_tracked")), key


if __name__ == "__main__":
    run_rank(replica)
