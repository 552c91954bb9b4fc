"""Wrappers around a model, and in it: what they exchange is found, and names are those of the model without them."""

from __future__ import annotations

import faulthandler
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.runtime.processes.sharded import full

SPEC = """
loss cross_entropy
optimizer sgd { lr = 0.3 }
run { length = 20 steps, seed = 1 }
noise_scale gns on "*.norm" { smooth = 1 steps }
observe norm_growth on "body.**" every 1 steps
when loss < 3.2 cooldown 2 steps { batch = 2 * batch }
"""
STEPS = 4
ROWS = (2, 4)


class Part(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = Part(5, 6), Part(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.top(self.body(x))  # type: ignore[no-any-return]


class Larger(nn.Module):
    """Somebody's module around the model, which returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.model(x), y)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(sum(ROWS), 5, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (sum(ROWS),), generator=g)
    if rank is None:
        return x, y
    return x.split(ROWS)[rank], y.split(ROWS)[rank]


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def wrap(module: nn.Module, **options: Any) -> Any:
    return DistributedDataParallel(module, **options)


# Programs of which each step is `program.step`.


def around(model: Net) -> Any:
    return trainc.compile(SPEC, wrap(model))


def around_compiled(model: Net) -> Any:
    return trainc.compile(SPEC, wrap(compiled(model)))


def compiled_around(model: Net) -> Any:
    return trainc.compile(SPEC, compiled(wrap(model)))


def inside(model: Net) -> Any:
    model.body, model.top = wrap(model.body), compiled(wrap(model.top))
    return trainc.compile(SPEC, model)


def inside_later(model: Net) -> Any:
    program = trainc.compile(SPEC, model)
    model.body, model.top = wrap(model.body), wrap(compiled(model.top))
    return program


def static_graph(model: Net) -> Any:
    return trainc.compile(SPEC, wrap(model, static_graph=True))


def comm_hook(model: Net) -> Any:
    wrapper = wrap(model)
    wrapper.register_comm_hook(None, default_hooks.allreduce_hook)
    return trainc.compile(SPEC, wrapper)


STEPPED: dict[str, Callable[[Net], Any]] = {
    f.__name__: f
    for f in (
        around,
        around_compiled,
        compiled_around,
        inside,
        inside_later,
        static_graph,
        comm_hook,
    )
}


def stepped(make: Callable[[Net], Any], rank: int) -> Any:
    """Return metrics and weights of steps whose rank 0 has one micro-batch, and rank 1 two."""
    model = net()
    program, metrics = make(model), []
    for step in range(STEPS):
        x, y = batch(step, rank)
        cut = [2, 2] if rank else [len(x)]
        metrics.append(program.step(list(zip(x.split(cut), y.split(cut), strict=True))))
    return metrics, program.state_dict()["model"], program.plan.clauses, program.summary()


def by_a_larger(rank: int) -> Any:
    """The user's loop calls a wrapper of a module that holds the model."""
    model = net()
    wrapper = wrap(Larger(model))
    program, metrics = trainc.compile(SPEC, model), []
    for step in range(STEPS):
        x, y = batch(step, rank)
        with program.micro_batch(len(x)):
            loss = wrapper(x, y)
        program.backward(loss)
        metrics.append(program.update())
    return metrics, program.state_dict()["model"], program.plan.clauses


def hooks(rank: int) -> Any:
    """Return what a hook of the user's sees inside of the backward pass: there it is not exchanged yet."""
    model, seen = net(), []
    program = trainc.compile(SPEC, wrap(model))
    weight = model.top.fc.weight
    weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.detach().clone()))
    program.step(batch(0, rank))
    return seen


def scaled(rank: int) -> Any:
    """Shards of which one gradient overflows in step 1; return scales, skipped steps and weights."""
    from torch.distributed.fsdp import fully_shard

    model: Any = net().float()
    fully_shard(model.body)
    fully_shard(model)
    program = trainc.compile(
        "loss cross_entropy optimizer sgd { lr = 0.3 } run { length = 9 steps, on_nan = skip }",
        model,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    found = []
    for step in range(STEPS):
        x, y = batch(step, rank)
        x = x.float() * (1e38 if step == 1 and rank else 1)
        metrics = program.step((x, y), scaler)
        scaler.update()
        found.append((scaler.get_scale(), metrics.get("skipped", 0.0)))
    return found, {name: full(one).detach().clone() for name, one in model.state_dict().items()}


# What is refused.


def only_a_part(rank: int) -> None:
    model: Any = net()
    model.body = wrap(model.body)
    trainc.compile(SPEC, model).step(batch(0, rank))


def larger_is_left_out(rank: int) -> None:
    model = net()
    kept = wrap(Larger(model))
    trainc.compile(SPEC, model).step(batch(0, rank))
    del kept


def the_model_itself(rank: int) -> None:
    model, (x, y) = net(), batch(0, rank)
    program = trainc.compile(SPEC, wrap(model))
    with program.micro_batch(len(x)):
        loss = cross_entropy(model(x), y)
    program.backward(loss)
    program.update()


def never_synchronised(rank: int) -> None:
    program, (x, y) = trainc.compile(SPEC, wrap(net())), batch(0, rank)
    with program.forward.no_sync():
        program.loss((x, y)).backward()
    program.update()


def an_unsharded_part(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = net()
    fully_shard(model.body)
    trainc.compile(SPEC, model).step(batch(0, rank))


def joined(rank: int) -> None:
    wrapper = wrap(net())
    program = trainc.compile(SPEC, wrapper)
    with wrapper.join():
        program.step(batch(0, rank))


def tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    trainc.compile("loss cross_entropy optimizer sgd { lr = 0.3 }", model).step(batch(0, rank))


REFUSED: dict[str, tuple[Callable[[int], None], str]] = {
    "only a part": (only_a_part, "not exchanged.*`top.fc"),
    "larger": (larger_is_left_out, "not exchanged.*Run the model by its wrapper"),
    "the model itself": (the_model_itself, "not exchanged"),
    "no_sync": (never_synchronised, r"not exchanged.*no_sync"),
    "an unsharded part": (an_unsharded_part, "not exchanged.*`top.fc.*shard"),
    "join": (joined, r"inside of `join\(\)`.*all ignored"),
    "tensor parallel": (tensor_parallel, "Tensor parallel"),
}


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(100, exit=True)
    found: dict[str, Any] = {name: stepped(make, rank) for name, make in STEPPED.items()}
    found["by_a_larger"] = by_a_larger(rank)
    found["hooks"], found["scaled"] = hooks(rank), scaled(rank)
    for name, (run, _) in REFUSED.items():
        try:
            run(rank)
        except (SiteError, ValueError) as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = Path(tmp_path_factory.mktemp("wrapped"))
    return run_processes(__file__, 2, folder, weights_only=False)


@pytest.fixture(scope="module")
def alone() -> Any:
    program = trainc.compile(SPEC, net(), executor="module")
    metrics = [program.step(batch(step)) for step in range(STEPS)]
    assert any("fired once" in line for line in program.summary())
    return metrics, program.state_dict()["model"], program.plan.clauses, program.summary()


@pytest.mark.parametrize("name", [*STEPPED, "by_a_larger"])
def test_what_is_wrapped_trains_as_one_process(name: str, found: list[Any], alone: Any) -> None:
    for metrics, weights, clauses, *summary in (one[name] for one in found):
        rules = [line for lines in summary for line in lines if "loss <" in line]
        assert rules == [line for line in alone[3] if "loss <" in line] or not summary
        assert clauses == alone[2]
        assert weights.keys() == alone[1].keys()
        for got, expected in zip(metrics, alone[0], strict=True):
            assert got == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
        for weight, value in alone[1].items():
            torch.testing.assert_close(weights[weight], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exchanged_is_an_error_on_every_rank(name: str, found: list[Any]) -> None:
    for one in found:
        assert name in one, "nothing was raised"
        assert re.search(REFUSED[name][1], one[name]), one[name]


def test_hooks_in_the_backward_pass_see_a_part_of_the_exchanged_gradient(found: list[Any]) -> None:
    """DistributedDataParallel exchanges later; the mean of what the ranks see is the gradient of all targets."""
    model = net()
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    (one,), (two,) = (each["hooks"] for each in found)
    torch.testing.assert_close((one + two) / 2, model.top.fc.weight.grad)


def test_a_grad_scaler_decides_alike_over_shards(found: list[Any]) -> None:
    model = net().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in (0, 2, 3):
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x.float()), y).backward()
        optimizer.step()
    for scales, weights in (one["scaled"] for one in found):
        assert scales == [(8.0, 0.0), (4.0, 1.0), (4.0, 0.0), (8.0, 0.0)]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value)


def test_names_pass_through_wrappers_in_one_process(tmp_path: Path) -> None:
    model: Any = net()
    model.body = compiled(model.body)
    program = trainc.compile(SPEC, compiled(model), executor="module")
    program.step(batch(0))
    plain = trainc.compile(SPEC, net(), executor="module")
    plain.step(batch(0))
    assert program.state_dict()["model"].keys() == plain.state_dict()["model"].keys()
    assert program.report().series.keys() == plain.report().series.keys()
    for name, one in program.report().series.items():
        assert one == pytest.approx(plain.report().series[name], nan_ok=True)
    later = trainc.compile(SPEC, net(), executor="module")
    later.load_state_dict(program.state_dict())
    program.load_state_dict(plain.state_dict())
    again = trainc.load(program.save(tmp_path / "saved"), net())
    for name, value in again.module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()["model"][name])
    assert "body._orig_mod.fc.weight" in model.state_dict()  # the user's own keys stay


if __name__ == "__main__":
    run_rank(process)
