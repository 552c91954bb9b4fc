"""SAM and ASAM against loops written by hand: accumulation, clipping, both executors, other clauses, ways out."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import trainc
from examples.models import gpt
from tests.conformance import divided
from trainc.compiler.constructs.perturb.sam import Sam
from trainc.compiler.program.program import Program
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.run.interface import NonFiniteLoss

Batch = tuple[Tensor, Tensor]
Perturb = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
REFERENCE = Path(__file__).parents[2] / "reference"
BASE = "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9 } "
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
EXECUTORS = pytest.mark.parametrize("executor", ["module", "graph"])


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


def data(seed: int, examples: int = 7, dtype: torch.dtype = torch.float64) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 4, (examples,), generator=g)


# SAM as anybody writes it.


def sam(rho: float) -> Perturb:
    def moves(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        return {name: rho * g / (norm + 1e-12) for name, g in gradients.items()}

    return moves


def asam(rho: float, eta: float) -> Perturb:
    def moves(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        t = {name: w.abs() + eta for name, w in weights.items()}
        norm = torch.cat([(t[name] * g).flatten() for name, g in gradients.items()]).norm()
        return {name: rho * t[name] ** 2 * g / (norm + 1e-12) for name, g in gradients.items()}

    return moves


def backward(model: nn.Module, micro_batches: Sequence[Batch]) -> float:
    """Accumulate the gradient of the mean loss of all examples; return the loss."""
    count, total = sum(len(y) for _, y in micro_batches), 0.0
    for x, y in micro_batches:
        loss = cross_entropy(model(x), y) * (len(y) / count)
        loss.backward()
        total += loss.item()
    return total


def two_passes(
    model: nn.Module, micro_batches: Sequence[Batch], perturb: Perturb, only: Sequence[str] = ()
) -> float:
    """Leave the gradient at w + e in `.grad`, and return the loss there."""
    named = {n: p for n, p in model.named_parameters() if not only or n in only}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    backward(model, micro_batches)
    gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    saved = {n: p.detach().clone() for n, p in named.items()}
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, move in perturb(saved, gradients).items():
            named[name].add_(move)
    loss = backward(model, micro_batches)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(saved[name])
    return loss


def hand(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    perturb: Perturb | None,
    clip: float | None = None,
    every: int = 1,
) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), []
    for i, micro_batches in enumerate(steps):
        if perturb is None or i % every:
            losses.append(backward(model, micro_batches))
        else:
            losses.append(two_passes(model, micro_batches, perturb))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_close(ours: nn.Module, theirs: nn.Module, **tolerance: Any) -> None:
    wanted = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, wanted[name], **(tolerance or EXACT), msg=name)


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_unmoved(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@contextmanager
def before_pass(model: nn.Module, act: Callable[[int], None]) -> Iterator[list[int]]:
    """Call `act(n)` before the n-th pass of a model; yield a list that holds n."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        act(calls[0])

    handle = model.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


# The definition.

METHODS = [
    pytest.param("rho = 0.05", sam(0.05), id="sam"),
    pytest.param("rho = 0.5, adaptive = true", asam(0.5, 0.01), id="asam"),
    pytest.param("rho = 0.5, adaptive = true, eta = 0", asam(0.5, 0.0), id="asam without eta"),
]


@EXECUTORS
@pytest.mark.parametrize(("fields", "perturb"), METHODS)
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1)])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_it_is_the_loop_written_by_hand(
    executor: Any, fields: str, perturb: Perturb, sizes: Sequence[int], clip: float | None
) -> None:
    if 1 in sizes:
        sizes = (2, 3, 2)  # BatchNorm takes no statistics of one example
    steps = [divided(data(i), sizes) for i in range(4)]
    theirs, ours = net(), net()
    want = hand(theirs, steps, perturb, clip)
    base = BASE if clip is None else BASE.replace("0.9 }", f"0.9, clip = {clip} }}")
    program = trainc.compile(f"{base} perturb sam {{ {fields} }}", ours, executor=executor)
    got = [program.step(micro_batches) for micro_batches in steps]
    assert [metrics["loss"] for metrics in got] == pytest.approx(want, rel=1e-12)
    assert_close(ours, theirs)
    assert all(p.grad is None for p in ours.parameters())


def test_the_weights_after_two_steps_are_the_published_ones() -> None:
    row = json.loads((REFERENCE / "regularizers.json").read_text())["relatives"]["sam"]
    case = json.loads((REFERENCE / "masks.json").read_text())["sift"]["mask_from_batch0"]
    shapes = {"fc1": (6, 5), "fc2": (5, 4), "fc3": (4, 3)}
    model = nn.Sequential()
    for k, (name, (wide, narrow)) in enumerate(shapes.items()):
        layer = nn.Linear(wide, narrow, bias=False)
        entry = torch.arange(wide * narrow, dtype=torch.float64)
        start = (torch.sin(1.7 * entry + 0.3 + 0.7 * k) * 0.6).float().view(narrow, wide)
        layer.weight = nn.Parameter(start)
        model.add_module(name, layer)
        if k < 2:
            model.add_module(f"tanh{k}", nn.Tanh())
    spec = f"loss cross_entropy optimizer sgd {{ lr = {row['lr']}, momentum = {row['momentum']} }}"
    program = trainc.compile(f"{spec} perturb sam {{ rho = {row['rho']} }}", model)
    for i, wanted in enumerate(row["W_after_steps"]):
        x, y = case["X"][i], case["Y"][i]
        inputs = torch.tensor(x["data"]).view(*x["shape"])
        program.step((inputs, torch.tensor(y["data"])))
        for name, stored in wanted.items():
            value = torch.tensor(stored["data"]).view(*stored["shape"])
            torch.testing.assert_close(
                model.get_parameter(name).detach(), value, rtol=1e-6, atol=2e-8
            )


def test_graph_and_modules_agree_bit_for_bit() -> None:
    models = [net(torch.float32), net(torch.float32)]
    spec = BASE + "perturb sam { rho = 0.1 }"
    programs = [
        trainc.compile(spec, models[0], executor="graph"),
        trainc.compile(spec, models[1], executor="module"),
    ]
    for i in range(3):
        batch = divided(data(i, dtype=torch.float32), (3, 4))
        one, two = (program.step(batch) for program in programs)
        assert one == two
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_a_step_of_length_zero_is_no_step() -> None:
    plain, none, scheduled = net(), net(), net()
    specs = ["", "perturb sam { rho = 0 }", "perturb sam { rho = 0 * steps }"]
    for spec, model in zip(specs, (plain, none, scheduled), strict=True):
        program = trainc.compile(BASE + spec, model)
        with before_pass(model, lambda n: None) as calls:
            for i in range(3):
                program.step(data(i))
        assert calls == [3]
    for model in (none, scheduled):
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


@EXECUTORS
def test_only_selected_parameters_move_and_count_in_the_norm(executor: Any) -> None:
    theirs, ours = net(), net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    only = ("0.weight", "3.weight")
    spec = BASE + "perturb sam on ndim(2) { rho = 0.5 }"
    program = trainc.compile(spec, ours, executor=executor)
    for i in range(3):
        two_passes(theirs, [data(i)], sam(0.5), only)
        optimizer.step()
        optimizer.zero_grad()
        program.step(data(i))
    assert_close(ours, theirs)


def test_two_optimizers_share_one_norm() -> None:
    theirs, ours = net(), net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3)
    spec = """loss cross_entropy
    optimizer sgd as heads on "3.**" { lr = 0.3 }
    optimizer sgd as rest on all - "3.**" { lr = 0.3 }
    perturb sam { rho = 0.5 }"""
    program = trainc.compile(spec, ours)
    for i in range(3):
        two_passes(theirs, [data(i)], sam(0.5))
        optimizer.step()
        optimizer.zero_grad()
        program.step(data(i))
    assert_close(ours, theirs)


# Time.


def test_between_its_steps_it_runs_one_pass_and_changes_nothing() -> None:
    steps = [[data(i)] for i in range(7)]
    theirs, ours = net(), net()
    hand(theirs, steps, sam(0.2), every=3)
    program = trainc.compile(BASE + "perturb sam every 3 steps { rho = 0.2 }", ours)
    passes = []
    for micro_batches in steps:
        with before_pass(ours, lambda n: None) as calls:
            program.step(micro_batches)
        passes += calls
    assert passes == [2, 1, 1, 2, 1, 1, 2]
    assert_close(ours, theirs)


def test_from_and_until_are_obeyed_and_rho_follows_the_clock() -> None:
    ours = net()
    spec = BASE + "perturb sam from 1 steps until 3 steps { rho = 0.1 * steps }"
    program, theirs = trainc.compile(spec, ours), net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    for i, rho in enumerate((None, 0.1, 0.2, None)):
        if rho is None:
            backward(theirs, [data(i)])
        else:
            two_passes(theirs, [data(i)], sam(rho))
        optimizer.step()
        optimizer.zero_grad()
        program.step(data(i))
    assert_close(ours, theirs)
    assert "moved the weights for the passes of 2 steps" in program.summary()[-1]


# What the first pass leaves.


def test_the_first_pass_leaves_no_gradient_and_no_statistics() -> None:
    model = net()
    program = trainc.compile(BASE + "perturb sam { rho = 0.1 }", model, executor="module")
    start, mean = kept(model), model[1].running_mean.clone()  # type: ignore[index]
    seen = []

    def look(call: int) -> None:
        if call == 3:
            seen.append(all(p.grad is None for p in model.parameters()))
            seen.append(torch.equal(model[1].running_mean, mean))  # type: ignore[index]
            seen.append(not torch.equal(model[0].weight, start["0.weight"]))  # type: ignore[index]

    with before_pass(model, look):
        program.step(divided(data(0), (3, 4)))
    assert seen == [True, True, True]
    assert int(model[1].num_batches_tracked) == 2  # type: ignore[index]


class OwnDropout(nn.Module):
    """Drops features by random numbers of generators of its own: one by itself, others in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4).double()
        made = [torch.Generator().manual_seed(seed) for seed in range(3)]
        self.generator, self.listed, self.named = made[0], [made[1]], {"third": made[2]}

    def forward(self, x: Tensor) -> Tensor:
        for generator in (self.generator, *self.listed, *self.named.values()):
            x = x * (torch.rand(x.shape, generator=generator) > 0.3)
        out: Tensor = self.layer(x)
        return out


def test_both_passes_draw_the_same_from_the_models_own_generators() -> None:
    theirs, ours = OwnDropout(), OwnDropout()
    program = trainc.compile(BASE + "perturb sam { rho = 0.3 }", ours)
    seen: list[Tensor] = []
    ours.layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for i in range(3):
        program.step(data(i))
        assert torch.equal(*seen)
        theirs(data(i)[0])  # one pass of the step moves the generators
        states = [g.get_state() for g in (theirs.generator, *theirs.listed, theirs.named["third"])]
        own = [g.get_state() for g in (ours.generator, *ours.listed, ours.named["third"])]
        assert all(map(torch.equal, states, own))
        seen.clear()


def test_both_passes_have_the_same_dropout() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 4)]
        return nn.Sequential(*layers).double()

    theirs, ours = made(), made()
    program = trainc.compile(BASE + "perturb sam { rho = 0.3 }", ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    for i in range(3):
        gradients: list[dict[str, Tensor]] = []
        weights = kept(theirs)
        for _ in range(2):
            torch.manual_seed(i)
            backward(theirs, [data(i)])
            gradients.append({n: p.grad.clone() for n, p in theirs.named_parameters()})  # type: ignore[union-attr]
            theirs.zero_grad()
            with torch.no_grad():
                for name, move in sam(0.3)(weights, gradients[0]).items():
                    theirs.get_parameter(name).add_(move)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.copy_(weights[name])
                p.grad = gradients[1][name]
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(i)
        program.step(data(i))
        drawn = torch.rand(1)
        torch.manual_seed(i)
        backward(theirs, [data(i)])
        theirs.zero_grad()
        assert torch.equal(drawn, torch.rand(1)), "a step draws what it draws without the clause"
    assert_close(ours, theirs)


def small_gpt() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=31).double()


def words(seed: int) -> Batch:
    ids = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def step_by_loss(program: Program, batch: Batch, rho: float) -> dict[str, float]:
    """Take one step of SAM with a program without it, by `loss`, `backward` and `update`.

    Weights are moved through `data`, since a step in which others change weights is an error.
    """
    model, machine = program.module, program._machine
    program.begin()  # a mask is chosen before the first pass
    clock, weights = copy.deepcopy(machine.clock), kept(model)
    gradients = {}
    for name, gradient in program.execution.trial(batch, "module")[1].items():
        assert gradient is not None
        gradients[name] = gradient
    for name, entries in program._method.masks.items():
        gradients[name] = entries.trained(gradients[name])
    with torch.no_grad():
        for name, move in sam(rho)(weights, gradients).items():
            model.get_parameter(name).data.add_(move)
    program.loss(batch).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.data.copy_(weights[name])
    assert machine.clock == clock
    return program.update()


CLAUSES = {
    "noise": "regularize pace on type(Linear) & blocks { sigma = 0.5, weight = 0.3 }",
    "statistics": "noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 2 steps }",
    "mask": "mask sift on ndim(2) - type(Embedding) { density = 20% }",
    "zeros": "mask magnitude on ndim(2) every 2 steps { density = linear(from = 80%, to = 20%, over = 3 steps) }",
    "penalty": "regularize l2_sp on ndim(2) { weight = 0.1 }",
}
CLAUSES["noise"] = CLAUSES["noise"].replace(
    "type(Linear) & blocks", '"blocks.*.mlp.**" & type(Linear)'
)


@EXECUTORS
@pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)
def test_other_clauses_see_the_second_gradient_alone(executor: Any, clause: str) -> None:
    theirs, ours = small_gpt(), small_gpt()
    plain = trainc.compile(BASE + clause, theirs, executor="module")
    sam = "perturb sam { rho = 0.3, with_views = true }"
    program = trainc.compile(f"{BASE}{clause} {sam}", ours, executor=executor)
    for i in range(4):
        want, got = step_by_loss(plain, words(i), 0.3), program.step(words(i))
        for name, value in want.items():
            if name in got:  # terms over parameters are one number in a graph
                assert got[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name
    assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert program._runner.last is not None
    assert len(program._runner.last.contributions) == (1 if "noise_scale" in clause else 0)


def test_entries_that_a_mask_does_not_train_do_not_move() -> None:
    model = small_gpt()
    spec = f"{BASE}{CLAUSES['mask']} perturb sam {{ rho = 3 }}"
    program = trainc.compile(spec, model, executor="module")
    program.step(words(0))
    program.step(words(1))
    ((name, entries), *_) = program._method.masks.items()
    assert isinstance(entries, SelectedEntries)
    assert entries.index is not None
    start, moved = kept(model)[name].flatten(), []

    def look(call: int) -> None:
        changed = (model.get_parameter(name).detach().flatten() != start).nonzero()[:, 0]
        moved.append(changed.tolist())

    with before_pass(model, look):
        program.step(words(2))
    first, second = moved
    assert first == []
    assert second
    assert set(second) <= set(entries.index.tolist())


# Ways out.


class Interrupted:
    """Raises an exception in the forward or the backward pass of the n-th run of a model."""

    def __init__(self, model: nn.Module, where: str, call: int, error: BaseException) -> None:
        self.calls, self.call, self.where, self.error = 0, call, where, error
        self.handle = model.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.calls += 1
        if self.calls == self.call:
            if self.where == "forward":
                raise self.error
            out.register_hook(self.fail)

    def fail(self, gradient: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=repr)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_error_or_an_interrupt_leaves_the_weights(
    call: int, where: str, error: BaseException
) -> None:
    model = net()
    program = trainc.compile(BASE + "perturb sam { rho = 1 }", model, executor="module")
    before, buffers = kept(model), [b.clone() for b in model.buffers()]
    broken = Interrupted(model, where, call, error)
    with pytest.raises(type(error)):
        program.step(divided(data(0), (3, 4)))
    broken.handle.remove()
    assert_unmoved(model, before)
    if call <= 2:
        assert all(map(torch.equal, model.buffers(), buffers))
    program.load_state_dict(
        copy.deepcopy(trainc.compile(BASE + "perturb sam { rho = 1 }", net()).state_dict())
    )
    model.zero_grad()
    theirs = net()
    hand(theirs, [[data(1)]], sam(1.0))
    program.step(data(1))
    assert_close(model, theirs)


@EXECUTORS
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_second_loss_that_is_not_finite_leaves_the_weights(executor: Any, on_nan: str) -> None:
    class Cliff(nn.Module):
        """Its output is NaN but at the weights where it starts."""

        start: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.register_buffer("start", self.fc.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            near = (self.fc.weight - self.start).abs().sum() < 0.1
            return torch.where(near, self.fc(x), torch.nan)

    torch.manual_seed(0)
    model = Cliff().double()
    model.start.copy_(model.fc.weight.detach())
    before = kept(model)
    spec = f"{BASE} run {{ length = 9 steps, on_nan = {on_nan} }} perturb sam {{ rho = 5 }}"
    program = trainc.compile(spec, model, executor=executor)
    if on_nan == "stop":
        with pytest.raises(NonFiniteLoss):
            program.step(data(0))
    else:
        assert program.step(data(0))["skipped"] == 1.0
    assert_unmoved(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_first_gradient_that_is_not_finite_moves_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).double()
    before = kept(model)
    spec = BASE + "run { length = 9 steps, on_nan = skip } perturb sam { rho = 1 }"
    program = trainc.compile(spec, model)
    x, y = data(0)
    seen = []
    with before_pass(model, lambda n: seen.append(kept(model))):
        assert program.step((x * math.inf, y))["skipped"] == 1.0
    assert len(seen) == 2
    assert torch.equal(seen[1]["0.weight"], before["0.weight"])
    assert_unmoved(model, before)
    assert program.report().notes == ("sam: the gradient is not finite, so no weight moved",)
    program.step(data(1))
    assert program.summary()[-1].endswith("not in 1 in which the gradient was not finite")


@pytest.mark.parametrize("call", ["state_dict", "save"])
def test_nothing_is_saved_inside_a_step(call: str, tmp_path: Path) -> None:
    model = net()
    program = trainc.compile(BASE + "perturb sam { rho = 1 }", model, executor="module")

    def save(passes: int = 2) -> None:
        if passes == 2:
            program.state_dict() if call == "state_dict" else program.save(tmp_path / "saved")

    with (
        before_pass(model, save),
        pytest.raises(RuntimeError, match=f"`{call}` was called inside a step, while `sam` holds"),
    ):
        program.step(data(0))
    assert not (tmp_path / "saved").exists()
    assert_unmoved(model, kept(net()))
    save()


# Loss scaling and autocast.


def test_a_grad_scaler_changes_nothing() -> None:
    steps = [divided(data(i), (3, 4)) for i in range(3)]
    theirs, ours = net(), net()
    hand(theirs, steps, sam(0.2), clip=0.3)
    spec = BASE.replace("0.9 }", "0.9, clip = 0.3 }") + "perturb sam { rho = 0.2 }"
    program = trainc.compile(spec, ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for micro_batches in steps:
        program.step(micro_batches, scaler)
        scaler.update()
    assert_close(ours, theirs)


def test_an_overflow_skips_the_step_and_leaves_the_weights() -> None:
    model = net(torch.float32)
    program = trainc.compile(BASE + "perturb sam { rho = 0.2 }", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 * 1.5)
    before, batch = kept(model), data(0, dtype=torch.float32)
    x = batch[0] * 1e3
    assert program.step((x, batch[1]), scaler)["skipped"] == 1.0
    assert_unmoved(model, before)
    scale = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() == scale / 2


def test_a_grad_scaler_and_a_forced_graph_is_an_error() -> None:
    program = trainc.compile(BASE + "perturb sam { rho = 0.2 }", net(), executor="graph")
    with pytest.raises(
        ValueError, match=r'GradScaler cannot scale: compile with `executor="module"`'
    ):
        program.step(data(0), torch.amp.GradScaler("cpu"))
    program.step(data(0), torch.amp.GradScaler("cpu", enabled=False))


def test_autocast_does_not_hold_on_to_weights_that_moved() -> None:
    theirs, ours = net(torch.float32), net(torch.float32)
    program = trainc.compile(BASE + "perturb sam { rho = 1 }", ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    batch = data(0, dtype=torch.float32)
    weights = kept(theirs)
    gradients: list[dict[str, Tensor]] = []
    for move in (False, True):
        buffers = [b.clone() for b in theirs.buffers()]
        if move:
            for name, e in sam(1.0)(weights, gradients[0]).items():
                theirs.get_parameter(name).data.add_(e)
        with torch.autocast("cpu", torch.bfloat16):
            backward(theirs, [batch])
        gradients.append({n: p.grad.clone() for n, p in theirs.named_parameters()})  # type: ignore[union-attr]
        theirs.zero_grad()
        if not move:
            for buffer, value in zip(theirs.buffers(), buffers, strict=True):
                buffer.copy_(value)
    for name, p in theirs.named_parameters():
        p.data.copy_(weights[name])
        p.grad = gradients[1][name]
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        program.step(batch)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# Parameters inside functions of their own.


class Checkpointed(nn.Module):
    """A model whose first layers run in a checkpoint."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8).double(), net()[3]  # type: ignore[index]
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.run(self.first, x)))  # type: ignore[no-any-return]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


def in_torch_checkpoint(layer: nn.Module, x: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_()
    return checkpoint(layer, inputs, use_reentrant=True)  # type: ignore[no-any-return]


class OwnCheckpoint(torch.autograd.Function):
    """Runs a layer again in the backward pass, which adds to the gradients of its parameters by itself."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            ctx.layer(x.detach()).backward(gradient)
        return None, torch.zeros_like(x)


def in_own_checkpoint(layer: nn.Module, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(layer, x.clone().requires_grad_())  # type: ignore[no-any-return, no-untyped-call]


def test_parameters_in_a_reentrant_checkpoint_move_too() -> None:
    plain, ours = Checkpointed(plainly), Checkpointed(in_torch_checkpoint)
    hand(plain, [[data(0)], [data(1)]], sam(0.5))
    program = trainc.compile(BASE + "perturb sam { rho = 0.5 }", ours)
    for i in range(2):
        program.step(data(i))
        assert program.report().notes == ()
    assert_close(ours, plain)


def test_parameters_that_cannot_be_seen_are_named_once() -> None:
    program = trainc.compile(BASE + "perturb sam { rho = 0.5 }", Checkpointed(in_own_checkpoint))
    program.step(data(0))
    (note,) = program.report().notes
    assert note.startswith(
        "`first.weight` has a gradient in this step, but had none when `sam` asked"
    )
    program.step(data(1))
    assert program.report().notes == ()


# Refused.


def test_a_micro_batch_alone_is_refused() -> None:
    program = trainc.compile(BASE + "perturb sam as flat every 5 steps { rho = 0.2 }", net())
    said = r"`flat` acts before the first of a step's micro-batches.* call `program.step\(batch\)`"
    with pytest.raises(ValueError, match=said):
        program.loss(data(0))
    graph = trainc.compile(BASE + "perturb sam { rho = 0.2 }", net(), executor="graph")
    graph.step(data(0))
    with pytest.raises(ValueError, match="`sam` acts before the first of a step's micro-batches"):
        graph.graph(data(0))


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ("perturb sam { rho = -0.1 }", "expected 0 or more"),
        ("perturb sam { rho = 0.1, eta = 0.1 }", "`eta` is part of ASAM: add `adaptive = true`"),
        ("perturb sam { rho = 0.1, adaptive = true, eta = -1 }", "expected 0 or more"),
        ("perturb sam { }", "rho"),
    ],
)
def test_wrong_fields_are_errors_at_their_place(clause: str, said: str) -> None:
    found = trainc.check(BASE + clause)
    assert found.spec is None
    (diagnostic,) = found.diagnostics
    assert said in diagnostic.labels[0].text + diagnostic.message
    assert diagnostic.labels[0].span.start >= len(BASE)


def test_a_rho_that_becomes_negative_is_an_error() -> None:
    model = net()
    program = trainc.compile(BASE + "perturb sam { rho = 0.1 - 0.1 * steps }", model)
    program.step(data(0))
    program.step(data(1))
    before = kept(model)
    with pytest.raises(ValueError, match=r"`perturb sam` is -0.1 in step 2: expected 0 or more"):
        program.step(data(2))
    assert_unmoved(model, before)


def test_a_rho_that_is_not_measured_yet_says_so() -> None:
    program = trainc.compile(BASE + "perturb sam { rho = 0.1 * loss }", net())
    with pytest.raises(ValueError, match="is nan in step 0: a signal in it is not measured yet"):
        program.step(data(0))


def test_a_run_in_which_no_weight_moved_says_so() -> None:
    program = trainc.compile(BASE + "perturb sam from 5 steps { rho = 0.1 }", net())
    program.step(data(0))
    assert program.summary()[-1] == "sam: no weight moved"


def test_frozen_and_16_bit_selections_are_reported() -> None:
    model = net()
    for p in model[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    with pytest.raises(trainc.SpecError, match="all 2 selected parameters are frozen"):
        trainc.compile(BASE + 'perturb sam on "0.**" { rho = 0.1 }', model)
    plan = trainc.plan(BASE + "perturb sam { rho = 0.1 }", net(torch.bfloat16))
    assert [w.rule for w in plan.warnings] == ["no-effect"]
    assert "round most of so small a step away" in plan.warnings[0].message


def test_the_plan_shows_both_halves_and_the_copy() -> None:
    plan = trainc.plan(BASE + "perturb sam every 2 steps { rho = 0.1 }", net())
    rows = [(row["name"], row["every"]) for row in plan.steps if row["clause"] == "sam"]
    assert rows == [("perturb", "every 2 steps"), ("undo", "every 2 steps")]
    size = sum(p.numel() * 8 for p in net().parameters())
    assert {"what": "sam", "bytes": size} in plan.memory


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after a step of SGD at rate 1, by the program and with e as `reference` gives it."""
    theirs, ours = net(), net()
    spec = "loss cross_entropy optimizer sgd { lr = 1 } perturb sam { rho = 0.7, adaptive = true }"
    trainc.compile(spec, ours).step(data(0))
    rule = Sam(rho=0.7, adaptive=True)  # type: ignore[arg-type]
    two_passes(theirs, [data(0)], lambda w, g: rule.reference(w, g, 0.7))
    wanted = {n: p.detach() - p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return kept(ours), wanted


# What a model may do in a forward pass besides computing.


class WritesItsInputs(nn.Module):
    """Doubles its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.mul_(2))


class CopiesItsInputs(WritesItsInputs):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x * 2)


@EXECUTORS
def test_both_passes_get_the_inputs_as_they_came(executor: Any) -> None:
    theirs, ours = CopiesItsInputs(), WritesItsInputs()
    hand(theirs, [divided(data(i), (3, 4)) for i in range(3)], sam(0.3))
    program = trainc.compile(BASE + "perturb sam { rho = 0.3 }", ours, executor=executor)
    for i in range(3):
        program.step(divided(data(i), (3, 4)))
    assert_close(ours, theirs)


class ReplacesItsBuffers(nn.Module):
    """Puts new tensors in the place of its buffers: of another shape, where none was, under a new name."""

    seen: Tensor | None
    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4).double()
        self.register_buffer("seen", None)
        self.register_buffer("means", torch.zeros(0, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        total = x.sum(0)
        self.seen = total if self.seen is None else self.seen + total
        self.means = torch.cat([self.means, x.mean(0, keepdim=True)])
        if not hasattr(self, "first"):
            self.register_buffer("first", total)
        return self.layer(x)


def test_buffers_that_are_replaced_hold_the_second_pass_alone() -> None:
    model = ReplacesItsBuffers()
    program = trainc.compile(BASE + "perturb sam { rho = 0.3 }", model)
    batches = [data(i) for i in range(3)]
    for batch in batches:
        program.step(batch)
    torch.testing.assert_close(model.seen, sum(x.sum(0) for x, _ in batches))
    torch.testing.assert_close(model.means, torch.stack([x.mean(0) for x, _ in batches]))
    assert torch.equal(model.first, batches[0][0].sum(0))  # type: ignore[arg-type]
