"""The zoo: every construct on some architectures, and every architecture with two constructs.

The whole product is `benchmarks/model_zoo.py`. Nothing here names a construct.
"""

from typing import Any

import pytest

from benchmarks.zoo.all_architectures import ARCHITECTURES
from benchmarks.zoo.architecture import Architecture
from benchmarks.zoo.cases import TOGETHER, constructs, run_cases
from benchmarks.zoo.examine import Outcome, examine, examine_without_effect
from benchmarks.zoo.replicas import examine_replicas
from tests.compiler.image_models import import_library

SOME = ("mlp", "tied_fused_qkv", "text_own_loss")
"""One with BatchNorm and dropout, one with attention, other norms and a tied head, and one that computes its loss."""
ELSE = ("text_of_answers", "encoder", "curve")
"""One with two answers an example, one whose targets are numbers, and one from a number to a number, for what trains on
none of these."""
METHODS = list(constructs())


def outcomes(architecture: Architecture, construct: str) -> list[tuple[str, Outcome]]:
    """Return what cases did, by their clauses."""
    return [(case.clause, outcome) for case, outcome in run_cases(architecture, construct)]


def wrong(found: list[tuple[str, Outcome]]) -> list[tuple[str, Outcome]]:
    return [one for one in found if one[1].status == "wrong"]


@pytest.mark.parametrize("construct", METHODS)
def test_every_construct_trains_or_is_refused_by_name_on_some_architectures(construct: str) -> None:
    found = [one for name in SOME for one in outcomes(ARCHITECTURES[name], construct)]
    for name in ELSE:
        if not any(outcome.status == "works" for _, outcome in found):
            found += outcomes(ARCHITECTURES[name], construct)
    assert not wrong(found)
    assert any(outcome.status == "works" for _, outcome in found)


def pairs() -> list[Any]:
    """Return every architecture with two constructs, other ones in turn."""
    methods = [name for name in METHODS if name != TOGETHER]
    found = []
    for number, architecture in enumerate(ARCHITECTURES.values()):
        marks = [] if architecture.library == "torch" else [pytest.mark.models]
        for at in (2 * number, 2 * number + 1):
            method = methods[at % len(methods)]
            name = f"{architecture.name}-{method}"
            found.append(pytest.param(architecture, method, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("architecture", "construct"), pairs())
def test_every_architecture_takes_two_constructs(
    architecture: Architecture, construct: str
) -> None:
    if architecture.library != "torch":
        import_library(architecture.library)
    assert not wrong(outcomes(architecture, construct))


def test_two_replicas_of_each_architecture_of_torch_are_one_process() -> None:
    names = [name for name, one in ARCHITECTURES.items() if one.library == "torch"]
    found = examine_replicas(names)
    assert {name: one.detail for name, one in found.items() if one.status != "works"} == {}
    assert len(found) > 10


def test_a_crash_and_a_refusal_without_a_place_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    clause = "regularize l2_sp on trainable { weight = 0.01 }"
    assert examine(ARCHITECTURES["mlp"], clause).status == "works"

    def broken(*_: object) -> None:
        raise KeyError("0.weight")

    monkeypatch.setattr(
        "trainc.compiler.constructs.regularize.weights.l2_sp.L2Sp.reference", broken
    )
    found = examine(ARCHITECTURES["mlp"], clause)
    assert found.status == "wrong"
    assert found.detail.startswith("KeyError: '0.weight' (")
    nowhere = examine(ARCHITECTURES["mlp"], "optimizer sgd { lr = 0.1 } share nothing")
    assert nowhere.status == "refused"
    assert nowhere.detail.startswith("unknown-kind at `share`: ")


def test_a_clause_that_is_not_off_is_not_the_plain_loop() -> None:
    mlp = ARCHITECTURES["mlp"]
    assert examine_without_effect(mlp, "lr layer_decay { decay = 1 }").status == "works"
    found = examine_without_effect(mlp, "lr layer_decay { decay = 0.9 }")
    assert found.status == "wrong"
    assert "not the plain loop" in found.detail
