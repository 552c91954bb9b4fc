"""Every `lr` construct with every other: factors multiply; two of one kind, or two rates, are an error at both."""

import itertools
from functools import cache

import pytest

import trainc
from tests.conformance import tiny_gpt, tokens
from tests.test_constructs import FOUND, OWN, setup_of
from trainc.runtime.step.optimizer import OptimizerStep

BASE = "loss cross_entropy run { length = 400 steps } optimizer adamw { lr = 1e-3, weight_decay = 0.1 }"
POLICIES = [key for key in OWN if key[0] == "lr"]


def clause(key: tuple[str, str]) -> str:
    return setup_of(FOUND[key]).usage or FOUND[key].usage


@cache
def factors(*keys: tuple[str, str]) -> dict[str, float]:
    """Return the factor on the rate of each parameter in the second step."""
    program = trainc.compile(" ".join([BASE, *map(clause, keys)]), tiny_gpt())
    program.step(tokens(0))
    (optimizer,) = [a for a in program._method.actions if isinstance(a, OptimizerStep)]
    return {slot.name: slot.factor(program.clock) for slot in optimizer.slots}


@pytest.mark.parametrize("pair", [*itertools.combinations(POLICIES, 2)], ids=str)
def test_factors_of_two_policies_multiply(pair: tuple[tuple[str, str], tuple[str, str]]) -> None:
    one, other = (factors(key) for key in pair)
    for name, factor in factors(*pair).items():
        assert factor == pytest.approx(one[name] * other[name], rel=1e-12), name


@pytest.mark.parametrize("key", POLICIES, ids=" ".join)
def test_two_clauses_of_one_policy_are_an_error_at_both(key: tuple[str, str]) -> None:
    again = clause(key).replace(" ".join(key), f"{' '.join(key)} as again", 1)
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"{BASE} {clause(key)} {again}", tiny_gpt())
    found = [one for one in error.value.diagnostics if one.rule == "claimed-twice"]
    assert found
    assert len(found[0].labels) == 2


@pytest.mark.parametrize(
    "second",
    [
        "optimizer sgd on role(head) { lr = 0.1 }",
        "optimizer muon on role(head) & ndim(2) { lr = 0.1 }",
    ],
)
def test_two_rates_of_one_parameter_are_an_error_at_both(second: str) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"{BASE} {second}", tiny_gpt())
    (problem,) = error.value.diagnostics
    assert problem.rule == "claimed-twice"
    assert len(problem.labels) == 2


def test_slices_of_depth_have_rates_of_their_own() -> None:
    """Rates by layer group, low at the input: numbers for ranges of depth, and a geometric slice to the head."""
    listed = "[0.01 on depth(0..0.3), 0.1 on depth(0.31..0.7), 1 on depth(0.71..1)]"
    rows = trainc.plan(f"{BASE} lr by_type {{ factors = {listed} }}", tiny_gpt()).parameters
    found = {(row["depth"], *row["lr_values"]) for row in rows}
    assert {value for _, value in found} == {0.01, 0.1, 1.0}
    for depth, value in found:
        assert value == (0.01 if depth <= 0.3 else 0.1 if depth <= 0.7 else 1.0)
    rows = trainc.plan(f"{BASE} lr layer_decay {{ decay = 0.1 }}", tiny_gpt()).parameters
    for row in rows:
        assert row["lr_values"] == [pytest.approx(1e-3 ** (1 - row["level"] / 3))]
