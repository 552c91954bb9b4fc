"""Changes of gradients with replicas: they see the mean over two processes; of shards they see single entries only."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from examples.models import gpt
from tests.compiler.gradient_methods import (
    Batch,
    Lars,
    Method,
    Signs,
    batch,
    changes,
    lars,
    net,
    spec,
)
from tests.conformance import divided
from tests.processes import run_processes, run_rank
from trainc.compiler.constructs.lr._cost import read
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.structure.weights import find_units, read_units
from trainc.functional import hill_alpha
from trainc.kernels.parameter.spectrum import WHOLE, Gram, spectra_of
from trainc.runtime.factors.action import BalanceFactors
from trainc.runtime.processes.sharded import full

RANKS, STEPS, SIZES = 2, 4, ((3, 4), (2, 3, 2))
SGD = "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9, clip = 0.02 } "
GNS = "noise_scale gns on type(LayerNorm) { smooth = 1 steps, method = replica } "
BALANCE = "lr temp_balance on ndim(2) every 1 steps { min_eigenvalues = 3, metric = alpha } "
SLICES = BALANCE.replace("ndim", '"blocks.**" & ndim').replace(
    "metric", "unit = part, shrink = false, metric"
)
PLAIN = "loss cross_entropy optimizer sgd { lr = 0.3 } "


def micro_batches(rank: int, step: int) -> list[Batch]:
    return divided(batch(10 * step + rank), SIZES[rank])


def trained(text: str, *methods: Method) -> Any:
    model = net()
    program = trainc.compile(spec(text, *methods), model)
    program.forward = DistributedDataParallel(model)
    metrics = [program.step(micro_batches(dist.get_rank(), step)) for step in range(STEPS)]
    return {"metrics": metrics, "weights": model.state_dict()}


def sharded(method: Method, when: str) -> Any:
    """Return the weights, or the error, of a model that is sharded before it is compiled, or after."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    try:
        if when == "first":
            fully_shard(model)
        program = trainc.compile(spec(PLAIN, method), model)
        if when == "late":
            fully_shard(model)
        for step in range(STEPS):
            program.step(batch(10 * step + dist.get_rank()))
        (change,) = changes(program)
        entries = sum(g.numel() for _, g in change.seen[0].values())
    except (trainc.SpecError, ValueError) as error:
        return str(error)
    return {n: p.full_tensor() for n, p in model.named_parameters()}, entries  # type: ignore[attr-defined]


def measured(shards: bool, fields: str = "") -> Any:
    """Return how many weights a policy measured here in each step, its last figures, and these by definition."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    if shards:
        fully_shard(model)
    balance = BALANCE.replace("metric", f"{fields}metric")
    program = trainc.compile(spec(PLAIN + balance), model)
    if not shards:
        program.forward = DistributedDataParallel(model)
    (action,) = (a for a in program.execution.method.actions if isinstance(a, BalanceFactors))
    policy: Any = Counted(action.policy)
    action.policy = policy
    expected = {}
    for step in range(STEPS):
        weights = {n: full(p).detach().clone() for n, p in model.named_parameters()}
        expected = {n: hill_alpha(weights[part.weight]) for n, part in action.parts.items()}
        program.step(batch(10 * step + dist.get_rank()))
    return policy.counts, action.alphas, expected


def sliced(shards: bool) -> dict[str, Tensor]:
    """Return the weights after steps in which the parts of a fused projection have a rate each."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: nn.Module = gpt(layers=1, width=12, heads=2, context=4, vocabulary=7).double()
    if shards:
        fully_shard(model)
    program = trainc.compile(PLAIN + SLICES, model)
    if not shards:
        program.forward = DistributedDataParallel(model)
    for step in range(2):
        ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(step))
        program.step((ids[:, :-1], ids[:, 1:]))
    return {n: full(p).detach().clone() for n, p in model.named_parameters()}


def summed() -> tuple[list[str], list[Any], list[Any]]:
    """Return which units of a sharded model were summed up, their spectra, and those of the whole weights."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: nn.Module = gpt(layers=1, width=9, heads=3, context=4, vocabulary=7)
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.qkv.weight")[7:11] = (
            0  # of q and k, on the first process
        )
        model.get_parameter("blocks.0.mlp.fc.weight")[:, 4] = 0
    units = find_units(build_inventory(model).weights, "part")
    units = [unit for unit in units if unit.name.startswith("blocks")]
    expected = read_units(model, units)
    fully_shard(model)
    found = read(model, units, takes_grams=True)
    grams = [name for name, one in found.items() if isinstance(one, Gram)]
    whole = [expected[name].double() for name in grams]
    pairs = (spectra_of([found[name] for name in grams], WHOLE), spectra_of(whole, WHOLE))
    ours, exact = ([(o.values, o.rows, o.columns, o.count) for o in one] for one in pairs)
    return grams, ours, exact


class Counted:
    """A policy that keeps how many weights it was given at a time."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.counts = policy, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def measure(self, matrices: Any) -> Any:
        self.counts.append(len(matrices))
        return self.policy.measure(matrices)


CASES: dict[str, Callable[[], Any]] = {
    "changed": lambda: trained(SGD, Lars()),
    "measured": lambda: trained(SGD + GNS, Lars()),
    "only measured": lambda: trained(SGD + GNS),
    "whole first": lambda: sharded(Lars(), "first"),
    "whole late": lambda: sharded(Lars(), "late"),
    "spectra of copies": lambda: measured(shards=False),
    "spectra of shards": lambda: measured(shards=True),
    "copies beside": lambda: measured(shards=False, fields="beside = true, "),
    "shards beside": lambda: measured(shards=True, fields="beside = true, "),
    "sums of shards": summed,
    "slices of copies": lambda: sliced(shards=False),
    "slices of shards": lambda: sliced(shards=True),
    "elementwise": lambda: sharded(Signs(), "first"),
}


def process(rank: int) -> Any:
    return {name: run() for name, run in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(__file__, RANKS, tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize(
    "case", ["spectra of copies", "spectra of shards", "copies beside", "shards beside"]
)
def test_processes_measure_the_spectra_of_one_model_together(
    case: str, found: list[dict[str, Any]]
) -> None:
    for counts, alphas, expected in (one[case] for one in found):
        assert counts == [1] * STEPS  # of two weights each process measures one
        assert alphas == pytest.approx(expected, rel=1e-12)
    assert found[0][case][1] == found[1][case][1]


def test_grams_of_shards_are_summed_in_place_of_gathering_the_weight(
    found: list[dict[str, Any]],
) -> None:
    tall = [*(f"attn.qkv.weight[{part}]" for part in "qkv"), "attn.proj.weight", "mlp.fc.weight"]
    for names, spectra, expected in (replica["sums of shards"] for replica in found):
        assert names == [f"blocks.0.{name}" for name in tall]  # and not `mlp.proj`, which is wide
        for (values, *sides), (exact, *others) in zip(spectra, expected, strict=True):
            torch.testing.assert_close(values, exact, rtol=1e-9, atol=1e-15)
            assert sides == others
        assert [rows for _, rows, _, _ in spectra[:3]] == [7, 7, 9]
        assert spectra[-1][2] == 8


def test_slices_of_shards_have_the_rates_of_those_of_whole_weights(
    found: list[dict[str, Any]],
) -> None:
    torch.manual_seed(0)
    start = gpt(layers=1, width=12, heads=2, context=4, vocabulary=7).double().state_dict()
    for replica in found:
        for name, weight in replica["slices of copies"].items():
            assert not torch.equal(weight, start[name])
            shards = replica["slices of shards"][name]
            torch.testing.assert_close(shards, weight, rtol=1e-12, atol=1e-12, msg=name)


def backward(model: nn.Module, step: int, replicas: Sequence[int] = range(RANKS)) -> None:
    for rank in replicas:
        for x, y in micro_batches(rank, step):
            (cross_entropy(model(x), y) * (len(y) / 7 / RANKS)).backward()


def test_it_sees_the_mean_over_replicas(found: list[dict[str, Any]]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for step in range(STEPS):
        backward(model, step)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                lars(p, p.grad, 0.0)
        nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad()
    one, two = (replica["changed"]["weights"] for replica in found)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(one[name], two[name]), name


def test_the_noise_scale_of_replicas_does_not_see_it(found: list[dict[str, Any]]) -> None:
    for replica in found:
        ours, theirs = (replica[name]["metrics"][0] for name in ("measured", "only measured"))
        names = [name for name in theirs if name.startswith("gns")]
        assert len(names) > 2
        assert {n: str(ours[n]) for n in names} == {n: str(theirs[n]) for n in names}
        changed = replica["changed"]["weights"]
        for name, value in replica["measured"]["weights"].items():
            torch.testing.assert_close(value, changed[name], rtol=1e-12, atol=1e-12)


def test_a_shard_is_refused_at_the_clause_or_in_the_first_step(found: list[dict[str, Any]]) -> None:
    for replica in found:
        assert "`lr lars` cannot be compiled: `0.weight` is sharded" in replica["whole first"]
        assert replica["whole late"].startswith("lars: `0.weight` is sharded over processes")


def test_entries_of_shards_can_be_changed_one_by_one(found: list[dict[str, Any]]) -> None:
    model = net()
    for step in range(STEPS):
        for rank in range(RANKS):
            x, y = batch(10 * step + rank)
            (cross_entropy(model(x), y) / RANKS).backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.sub_(0.3 * p.grad.sign())
        model.zero_grad()
    entries = 0
    for weights, seen in (replica["elementwise"] for replica in found):
        entries += seen
        for name, value in model.named_parameters():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-12, atol=1e-12)
    assert entries == sum(p.numel() for p in model.parameters()), "no process has all"


if __name__ == "__main__":
    run_rank(process)
