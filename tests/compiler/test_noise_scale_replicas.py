"""The noise scale under DistributedDataParallel and FSDP2 against one backward pass per example, without replicas.

Four processes run everything once, in pairs or all together (`replica_processes.py`); each test reads its part.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from tests.compiler import replica_processes
from tests.compiler.replica_processes import (
    ADAM,
    FOURS,
    GHOST,
    JACKKNIFE,
    LIMIT,
    NORMS,
    PAIRS,
    PROCESSES,
    RULE,
    SPEC,
    Batch,
    batch,
    net,
    signals,
    unequal,
)
from tests.processes import run_processes

pytestmark = pytest.mark.slow
FIGURES = ("gns.signal", "gns.noise")
TRAINED = {
    "ddp trains": RULE,
    "fsdp trains": RULE,
    "fsdp late trains": RULE,
    "ddp jackknife": JACKKNIFE,
    "fsdp jackknife": JACKKNIFE,
    "ddp ghost": GHOST,
    "fsdp adam": ADAM,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of four processes found, by case."""
    folder = tmp_path_factory.mktemp("replicas")
    file = str(replica_processes.__file__)
    return run_processes(file, PROCESSES, folder, timeout=LIMIT + 60, weights_only=False)


def of_pair(found: list[dict[str, Any]], name: str) -> list[Any]:
    """Return the results of the processes that ran a case."""
    results = [one[name] for one in found if name in one]
    assert len(results) == (PROCESSES if name.startswith("four") else 2)
    return results


class Contribution(NamedTuple):
    """What an example or a group contributes to the averaged gradient, with the weights of its examples."""

    weights: list[float]
    gradients: dict[str, Tensor]


def joined(one: Contribution, other: Contribution) -> Contribution:
    both = {name: gradient + other.gradients[name] for name, gradient in one.gradients.items()}
    return Contribution(one.weights + other.weights, both)


def targets(micros: list[Batch]) -> int:
    return sum(int((y >= 0).sum()) for _, y in micros)


def examples(micros: list[Batch], total: int) -> list[list[Contribution]]:
    """Return one replica's examples by micro-batch; the loss is a mean over the `total` of targets."""
    model = net()
    made = []
    for x, y in micros:
        contributions = []
        for b in range(len(y)):
            loss = F.cross_entropy(model(x[b]), y[b], reduction="sum") / total
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
            contributions.append(Contribution([float((y[b] >= 0).sum()) / total], named))
        made.append(contributions)
    return made


def estimate(
    contributions: list[Contribution], names: Callable[[str], bool] = lambda _: True
) -> dict[str, float]:
    """Solve E s1 = q |G|^2 + q_examples tr(Sigma) and E s_big = |G|^2 + q_examples tr(Sigma)."""
    rows = torch.stack(
        [
            torch.cat([g.flatten() for n, g in s.gradients.items() if names(n)])
            for s in contributions
        ]
    )
    s1, s_big = float(rows.square().sum()), float(rows.sum(0).square().sum())
    q = sum(sum(contribution.weights) ** 2 for contribution in contributions)
    singles = sum(weight**2 for contribution in contributions for weight in contribution.weights)
    signal = (s_big - s1) / (1 - q)
    return {"gns.signal": signal, "gns.noise": (s1 - q * signal) / singles}


def by_definition(method: str, no_sync: bool, replicas: int) -> dict[str, float]:
    """Return the figures of `unequal` batches, one backward pass per example."""
    parts = [unequal(rank, no_sync) for rank in range(replicas)]
    each = [examples(own, sum(map(targets, parts))) for own in parts]
    micros = [micro for own in each for micro in own]
    groups = {
        "all": [[contribution] for micro in micros for contribution in micro],
        "micro": micros,
        "replica": [[contribution for micro in own for contribution in micro] for own in each],
    }[method]
    return estimate([functools.reduce(joined, group) for group in groups])


MEASURED = [
    name
    for name in (*PAIRS, *(f"four {name}" for name in FOURS), "four square all")
    if name.endswith((" all", " micro", " replica")) and "refused" not in name
]


@pytest.mark.parametrize("name", MEASURED)
def test_estimates_are_those_of_single_examples(found: list[dict[str, Any]], name: str) -> None:
    results = of_pair(found, name)
    wrapper, *_, method = name.removeprefix("four ").split()
    no_sync = wrapper == "ddp" and "synchronised" not in name
    expected = by_definition(method, no_sync, len(results))
    for one in results:
        for figure in FIGURES:
            assert one[figure] == pytest.approx(expected[figure], rel=1e-9)
        assert repr(one) == repr(results[0])  # the same bits, NaN included
        assert one["batch"] == 3.5 * len(results)


@pytest.mark.parametrize("name", ["ddp all", "fsdp all", "four ddp all"])
def test_losses_are_means_and_samples_are_sums_over_all_replicas(
    found: list[dict[str, Any]], name: str
) -> None:
    results = of_pair(found, name)
    both = [batch(rank, 3 + rank % 2, equal=False) for rank in range(len(results))]
    x, y = torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])
    loss = F.cross_entropy(net()(x).flatten(0, 1), y.flatten()).item()
    for one in results:
        assert one["loss"] == pytest.approx(loss, rel=1e-12)
        assert one["samples"] == 3.5 * len(results)


def of_both(rows: int, step: int = 0) -> Batch:
    """Return the batches of two replicas as one."""
    both = [batch(rank, rows, step=step) for rank in range(2)]
    return torch.cat([x for x, _ in both]), torch.cat([y for _, y in both])


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_one_process_on_the_joined_batch(
    found: list[dict[str, Any]], name: str
) -> None:
    optimizer, lr = ("adamw", "0.01") if name.endswith("adam") else ("sgd", "0.1")
    model = net()
    text = SPEC.format(optimizer=optimizer, lr=lr, run="") + TRAINED[name]
    program = trainc.compile(text, model, executor="module")
    (figures_0, weights_0), (figures_1, weights_1) = of_pair(found, name)
    assert repr(figures_0) == repr(figures_1)
    for step in range(3):
        program.step(of_both(4, step))
        expected = signals(program)
        assert figures_0[step] == pytest.approx(expected, rel=1e-8, abs=1e-13, nan_ok=True)
    for weight, value in model.state_dict().items():
        torch.testing.assert_close(weights_0[weight], value, rtol=1e-9, atol=1e-12)
        assert torch.equal(weights_0[weight], weights_1[weight])


def test_autocast_with_a_scaled_loss(found: list[dict[str, Any]]) -> None:
    program = trainc.compile(SPEC.format(optimizer="sgd", lr=0, run="") + NORMS, net(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = program.loss(of_both(3))
    loss.backward()
    program.update()
    expected = program.signals
    for one in of_pair(found, "autocast"):
        for figure in FIGURES:  # sixteen bits in some of what both compute in different batches
            assert one[figure] == pytest.approx(expected[figure], abs=1e-2 * expected["gns.noise"])


def test_a_calibration_takes_the_examples_of_all_replicas_as_one_set(
    found: list[dict[str, Any]],
) -> None:
    contributions = []
    for rank in range(2):
        x, y = batch(rank, equal=False)
        contributions += examples([(x[:2], y[:2])], 2 * targets([(x[:2], y[:2])]))[0]
    total, norms = estimate(contributions), estimate(contributions, lambda name: ".norm." in name)
    results = of_pair(found, "calibrates")
    assert repr(results[0]) == repr(results[1])
    assert results[0][0] == pytest.approx(tuple(total.values()), rel=1e-9)
    assert results[0][1] == pytest.approx(tuple(norms.values()), rel=1e-9)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_loss_that_is_nan_on_one_rank_is_skipped_on_all(
    found: list[dict[str, Any]], wrapper: str
) -> None:
    assert of_pair(found, f"{wrapper} nan") == [(1.0, True)] * 2


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_an_infinite_gradient_on_one_rank_gives_no_estimate_on_all(
    found: list[dict[str, Any]], wrapper: str
) -> None:
    for figures, summary in of_pair(found, f"{wrapper} infinite"):
        assert all(math.isnan(figures[figure]) for figure in FIGURES)
        assert any("gns: undetermined" in line and "not finite" in line for line in summary)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("replica", r"micro-batch 1 of 2 was averaged over replicas.*no_sync"),
        ("other", r"do not measure the same: .* rank 1 sends"),
        ("fsdp micro", r"`words.weight` is sharded .*measure gradients of examples"),
        ("fsdp replica", r"`words.weight` is sharded .*measure gradients of examples"),
        ("fsdp calibrate", r"`words.weight` is sharded .*without calibration"),
    ],
)
def test_what_cannot_be_measured_is_an_error_on_every_rank(
    found: list[dict[str, Any]], name: str, words: str
) -> None:
    for results in of_pair(found, f"refused {name}"):
        assert isinstance(results, str)
        assert re.search(words, results)
