"""What a program allocates beyond weights, gradients and optimizer state is what its clauses declare, and no more.

Counted by torch's own allocator at a small size, in bytes for each weight, so that a copy of all weights is 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

import trainc
from examples.models import gpt
from tests.allocations import Allocated, allocated, check_of_tensors
from trainc.compiler.catalog import catalog
from trainc.compiler.plan.needs import needs_of

BASE = """train 1
data "examples.data:stdlib" { batch = 2 samples, micro = 1 samples }
loss cross_entropy
run { length = 500 steps }
"""
ADAMW = "optimizer adamw { lr = 1e-3, weight_decay = 0.1 } "
GNS = "noise_scale gns on type(LayerNorm) "
TEMP_BALANCE = 'lr temp_balance on "blocks.**" & ndim(2) every 1 steps { range = 0.5..1.5 } '
# Some are of few parameters.
# BatchNorm alone has ghost batches, some are of images or numbers, and the others say what is trained and on what.
LEFT_OUT = {
    ("normalize", "ghost_batch"),
    ("observe", "frequency"),
    ("optimizer", "scipy"),
    ("optimizer", "swarm"),
    ("perturb", "adversarial"),
    ("perturb", "targets"),
    ("regularize", "cutmix"),
    ("regularize", "mixup"),
}
WHOLE = ("model", "data", "run", "loss")
METHODS = [key for key in catalog() if key[0] not in WHOLE and key not in LEFT_OUT]


def run(clauses: str, steps: int = 2) -> tuple[int, trainc.Program, Sequence[Allocated]]:
    """Return the number of weights, and what compiling and each step of one program allocated."""
    torch.manual_seed(0)
    model = gpt(layers=2, width=192, heads=4, context=16, vocabulary=256)
    weights = sum(p.numel() for p in model.parameters())
    made: list[trainc.Program] = []
    found = [allocated(lambda: made.append(trainc.compile(BASE + clauses, model)))]
    ids = torch.randint(0, 256, (2, 8))
    samples = torch.arange(2) if made[0].reads_sample_ids else None

    def step() -> None:
        made[0].step((ids, ids.roll(-1, 1)), sample_ids=samples)

    found += [allocated(step) for _ in range(steps)]
    return weights, made[0], found


def test_the_count_is_that_of_the_allocator() -> None:
    found = check_of_tensors()
    assert found.kept == pytest.approx(4 * 2**20, abs=2**10)
    assert found.peak == pytest.approx(12 * 2**20, abs=2**10)


@pytest.fixture(scope="module")
def plain() -> Allocated:
    """What the first step allocates without a clause."""
    return run(ADAMW, steps=1)[2][1]


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=str)
def test_what_stays_is_what_the_plan_declares(kind: str, name: str, plain: Allocated) -> None:
    usage = re.sub(r" from \d+%", "", str(catalog()[kind, name].usage))
    usage = re.sub(r"\d+ steps", "1 steps", usage)
    weights, program, (made, step, later) = run(usage if kind == "optimizer" else ADAMW + usage)
    held, declared = made.kept + step.kept + later.kept, needs_of(program.plan).memory
    adapters = declared[0].bytes - 4 * weights
    kept = sum(one.bytes for one in declared[2:] if one.what != "probes") + adapters
    assert held < kept + 0.15 * weights
    # Some is there during a step only, such as copies of the weights that it moves.
    passing = max(one.peak - one.kept for one in (step, later)) - 4 * weights
    assert kept < held + max(passing, 0) + 0.15 * weights
    # Gradients, and at most one more number for each weight at a time, such as the gradients of one micro-batch.
    assert step.peak < max(plain.peak, kept + 9.5 * weights) + 0.5 * weights


def test_a_step_has_no_more_than_gradients_beside_what_stays() -> None:
    weights, _, (_, _, plain) = run(ADAMW)
    assert plain.peak < 5.5 * weights
    # A graph has the gradients of one micro-batch beside their sum.
    weights, _, (_, first, later) = run(ADAMW + GNS + TEMP_BALANCE)
    assert first.peak < 13.5 * weights  # with the state of the optimizer, which it makes
    assert later.peak < 9 * weights


@pytest.mark.parametrize(
    ("clauses", "most"),
    [
        ("regularize l2_sp on all { weight = 0.01 }", 10),
        ("perturb sam { rho = 0.05 }", 9.3),
        (TEMP_BALANCE, 5.5),
        ("regularize ema { decay = 0.9 }", 5.5),
    ],
)
def test_a_step_with_a_clause_makes_no_second_copy_of_the_weights(
    clauses: str, most: float
) -> None:
    weights, _, (*_, later) = run(ADAMW + clauses)
    assert later.peak < most * weights
