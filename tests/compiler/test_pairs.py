"""Two constructs in one spec train together, or are refused with a reason. All pairs: `benchmarks/composition.py`."""

import pytest

from benchmarks.zoo import pairs


@pytest.mark.parametrize(
    ("one", "two", "graph"),
    [pytest.param(*given, id=f"{given[0]} x {given[1]}") for given in pairs.sample()],
)
def test_two_constructs_train_together_or_are_refused(one: str, two: str, graph: bool) -> None:
    found = pairs.examine_pair(one, two, graph=graph)
    assert found.outcome.status in ("works", "refused"), found.outcome.detail
    assert found.outcome.status == "works" or found.outcome.detail


def test_every_construct_trains_alone_on_some_model_of_the_pairs() -> None:
    assert {name: pairs.why_not(name) for name in pairs.constructs() if pairs.why_not(name)} == {}
