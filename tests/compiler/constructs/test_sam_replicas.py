"""SAM and its family in two processes, replicas or shards: what a loop by hand gives on both halves of the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.compiler.perturbed_loops import CLAUSES, Loop
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.processes.sharded import full
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
SPEC = """
loss cross_entropy
optimizer sgd { lr = 0.3, momentum = 0.9, clip = 0.4 }
"""
RANKS, STEPS = 2, 4
CASES = {
    f"{method}, {wrapper}": (method, wrapper) for method in CLAUSES for wrapper in ("ddp", "fsdp2")
}
CASES["sam, unused"] = ("sam", "unused")
"""The method, and how processes train together; `unused`: one of them leaves out a layer."""


class Net(nn.Module):
    """Three layers, of which one is used only for more than two examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
        self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if len(x) > 2:
            x = x + self.more(x)
        return self.head(x)  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batches(rank: int, step: int, whole: bool) -> list[Batch]:
    """Return a replica's micro-batches of a step: unequal in size, and, where `whole`, in number."""
    sizes = ([[3, 4, 3], [7, 3]] if whole else [[2], [5]])[rank]
    g = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(sum(sizes), 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, 4, (len(x),), generator=g)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def replica(rank: int) -> Any:
    """Run every case; a process of its own."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for name, (method, wrapper) in CASES.items():
        model, whole = net(), wrapper != "unused"
        program = trainc.compile(SPEC + CLAUSES[method], model)
        if wrapper == "fsdp2":
            fully_shard(model.body)
            fully_shard(model)
        else:
            program.forward = DistributedDataParallel(model, find_unused_parameters=not whole)
        losses = [program.step(batches(rank, i, whole))["loss"] for i in range(STEPS)]
        weights = {n: full(p).detach().clone() for n, p in model.state_dict().items()}
        found[name] = {"losses": losses, "weights": weights}
    found["inputs"] = input_gradients(rank)
    found["local"] = local(rank)
    found["sharded"] = sharded()
    return found


class Look(Construct):
    """Keeps the gradients of the inputs."""

    kind: ClassVar = "perturb"
    name: ClassVar = "look"
    cite: ClassVar = "-"
    effects: ClassVar = (Effect("perturb", "look at the inputs", ("inputs",)),)

    def lower(self, to: Lowering) -> None:
        to.around(Looking(to.label))


class Looking(Around):
    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[Tensor] = []

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        self.found = gradients(of="inputs")
        yield


LOCAL = "perturb extrapolate { direction = past_gradient, rate = 0.5 }"


def local(rank: int) -> Any:
    """Return the weights of a method in which each replica moves by its own gradient, and its error on shards."""
    from torch.distributed.fsdp import fully_shard

    model, other = net(), net()
    program = trainc.compile(SPEC + LOCAL, model)
    program.forward = DistributedDataParallel(model)
    for i in range(STEPS):
        program.step(batches(rank, i, True))
    assert "extrapolate" not in program._machine.state_dict()["actions"]
    late = trainc.compile(SPEC + LOCAL, other)
    fully_shard(other)
    try:
        late.step(batches(rank, 0, True))
        said = "no error"
    except ValueError as error:
        said = str(error)
    return model.state_dict(), said


def looking() -> Spec:
    base = trainc.check("loss cross_entropy optimizer sgd { lr = 0.3 }").spec
    assert base is not None
    return Spec((*base.clauses, Clause(Look())))


def input_gradients(rank: int) -> list[Tensor]:
    model = net()
    program = trainc.compile(looking(), model)
    program.forward = DistributedDataParallel(model)
    program.step(batches(rank, 0, True))
    (action,) = program._machine.around
    assert isinstance(action, Looking)
    return action.found


def sharded() -> list[str]:
    """Return the errors of an action that takes no shards, on a model sharded before it is compiled, and after."""
    from torch.distributed.fsdp import fully_shard

    said, first, late = list[str](), net(), net()
    fully_shard(first)
    try:
        trainc.compile(looking(), first)
    except trainc.SpecError as error:
        said.append(str(error))
    program = trainc.compile(looking(), late)
    fully_shard(late)
    try:
        program.step(batches(0, 0, True))
    except SiteError as error:
        said.append(str(error))
    return said


def by_hand(method: str, whole: bool) -> tuple[list[float], nn.Module]:
    """Return losses and model of the loop on the examples of all replicas."""
    model, losses = net(), []
    loop = Loop(method, model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), 0.4)
    for step in range(STEPS):
        of_all = [one for rank in range(RANKS) for one in batches(rank, step, whole)]
        count = sum(len(y) for _, y in of_all)

        def passes(of_all: list[Batch] = of_all, count: int = count) -> float:
            total = 0.0
            for x, y in of_all:
                loss = cross_entropy(model(x), y) * (len(y) / count)
                loss.backward()
                total += loss.item()
            return total

        losses.append(loop.step(passes))
    return losses, model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("replicas")
    return run_processes(__file__, RANKS, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_are_the_loop_written_by_hand(case: str, found: list[dict[str, Any]]) -> None:
    method, wrapper = CASES[case]
    losses, model = by_hand(method, wrapper != "unused")
    one, two = (replica[case] for replica in found)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one["weights"][name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(one["weights"][name], two["weights"][name]), name
    assert one["losses"] == two["losses"] == pytest.approx(losses, rel=1e-12)


def test_each_replica_extrapolates_by_its_own_gradient(found: list[dict[str, Any]]) -> None:
    model = net()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    past: list[dict[str, Tensor]] = [{}, {}]
    for step in range(STEPS):
        start = {n: p.detach().clone() for n, p in named.items()}
        count = sum(len(y) for rank in range(RANKS) for _, y in batches(rank, step, True))
        for rank in range(RANKS):
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(start[n] - 0.5 * past[rank].get(n, torch.zeros_like(p)))
            own = batches(rank, step, True)
            losses = [cross_entropy(model(x), y) * (RANKS * len(y) / count) for x, y in own]
            found_ = torch.autograd.grad(torch.stack(losses).sum(), [*named.values()])
            past[rank] = dict(zip(named, found_, strict=True))
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(start[n])
                p.grad = (past[0][n] + past[1][n]) / RANKS
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        optimizer.step()
    for weights, error in (one["local"] for one in found):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert "FSDP2" in error


def test_gradients_of_inputs_are_of_the_mean_over_replicas(found: list[dict[str, Any]]) -> None:
    model = net()
    for rank, replica in enumerate(found):
        micro_batches = batches(rank, 0, True)
        count = sum(len(y) for _, y in micro_batches)
        for (x, y), gradient in zip(micro_batches, replica["inputs"], strict=True):
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(model(leaf), y) * (len(y) / count / RANKS)
            (wanted,) = torch.autograd.grad(loss, leaf)
            torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)


def test_an_action_that_takes_no_shards_is_refused_at_the_clause_or_at_the_first_step(
    found: list[dict[str, Any]],
) -> None:
    for replica in found:
        first, late = replica["sharded"]
        assert "`perturb look` cannot be compiled: it needs gradients before" in first
        assert "which is sharded over processes (FSDP2)" in first
        assert "the gradients that `look` needs before the step's passes" in late


if __name__ == "__main__":
    run_rank(replica)
