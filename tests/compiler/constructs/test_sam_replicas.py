"""SAM under DistributedDataParallel: two processes give what a loop by hand gives on both halves of the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
SPEC = """
loss cross_entropy
optimizer sgd { lr = 0.3, momentum = 0.9, clip = 0.4 }
perturb sam { rho = 0.5FIELDS }
"""
RANKS, STEPS = 2, 4
CASES = {
    "accumulates": ("", True),
    "adaptive": (", adaptive = true, eta = 0.1", True),
    "unused": ("", False),
}


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
    found: dict[str, Any] = {}
    for name, (fields, whole) in CASES.items():
        model = net()
        program = trainc.compile(SPEC.replace("FIELDS", fields), model)
        program.forward = DistributedDataParallel(model, find_unused_parameters=not whole)
        losses = [program.step(batches(rank, i, whole))["loss"] for i in range(STEPS)]
        found[name] = {"losses": losses, "weights": model.state_dict()}
    found["inputs"] = input_gradients(rank)
    found |= {f"sharded {when}": sharded(when) for when in ("first", "late")}
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


def input_gradients(rank: int) -> list[Tensor]:
    model, base = net(), trainc.check("loss cross_entropy optimizer sgd { lr = 0.3 }").spec
    assert base is not None
    program = trainc.compile(Spec((*base.clauses, Clause(Look()))), model)
    program.forward = DistributedDataParallel(model)
    program.step(batches(rank, 0, True))
    (action,) = program._machine.around
    assert isinstance(action, Looking)
    return action.found


def sharded(when: str) -> str:
    """Return the error for a model that is sharded before it is compiled, or after."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    try:
        if when == "first":
            fully_shard(model)
        program = trainc.compile(SPEC.replace("FIELDS", ""), model)
        fully_shard(model)
        program.step(batches(0, 0, True))
    except (trainc.SpecError, SiteError) as error:
        return str(error)
    return "no error"


def backward(model: nn.Module, step: int, whole: bool) -> float:
    """Accumulate the gradient of the mean loss over the examples of all replicas."""
    total = 0.0
    of_all = [one for rank in range(RANKS) for one in batches(rank, step, whole)]
    count = sum(len(y) for _, y in of_all)
    for x, y in of_all:
        loss = cross_entropy(model(x), y) * (len(y) / count)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def perturb(named: dict[str, Tensor], fields: str) -> None:
    scale = {n: p.abs() + 0.1 if fields else torch.ones_like(p) for n, p in named.items()}
    scaled = {n: scale[n] * p.grad for n, p in named.items() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in scaled.values()]).norm()
    for name, gradient in scaled.items():
        named[name].add_(0.5 * scale[name] * gradient / (norm + 1e-12))


def by_hand(fields: str, whole: bool) -> tuple[list[float], nn.Module]:
    model, losses = net(), []
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(STEPS):
        weights = {name: p.detach().clone() for name, p in named.items()}
        backward(model, step, whole)
        perturb(dict(named), fields)
        optimizer.zero_grad()
        losses.append(backward(model, step, whole))
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(weights[name])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("replicas")
    return run_processes(__file__, RANKS, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_are_the_loop_written_by_hand(case: str, found: list[dict[str, Any]]) -> None:
    losses, model = by_hand(*CASES[case])
    one, two = (replica[case] for replica in found)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one["weights"][name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(one["weights"][name], two["weights"][name]), name
    assert one["losses"] == two["losses"] == pytest.approx(losses, rel=1e-12)


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


def test_sharded_parameters_are_refused_at_the_clause_or_at_the_first_step(
    found: list[dict[str, Any]],
) -> None:
    for replica in found:
        assert (
            "`perturb sam` cannot be compiled: it needs gradients before"
            in replica["sharded first"]
        )
        assert "which is sharded over processes (FSDP2)" in replica["sharded first"]
        assert "the gradients that `sam` needs before the step's passes" in replica["sharded late"]


if __name__ == "__main__":
    run_rank(replica)
