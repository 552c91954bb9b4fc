"""Two constructs in one spec train together, or are refused with a reason. All pairs: `benchmarks/composition.py`."""

import pytest

from benchmarks.zoo import pairs


@pytest.mark.parametrize("pair", list(pairs.sample()), ids=" x ".join)
def test_two_constructs_train_together_or_are_refused(pair: tuple[str, str]) -> None:
    found = pairs.examine_pair(*pair, graph=False)
    assert found.outcome.status in ("works", "refused"), found.outcome.detail
    assert found.outcome.status == "works" or found.outcome.detail


def test_every_construct_trains_alone_on_some_model_of_the_pairs() -> None:
    assert {name: pairs.why_not(name) for name in pairs.constructs() if pairs.why_not(name)} == {}
