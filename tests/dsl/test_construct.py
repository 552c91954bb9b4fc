"""What the base class of constructs takes from a class and refuses."""

from typing import Any, ClassVar

import pytest

from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.text.vocabulary import SELECTED
from trainc.dsl.values import value_json as v


def test_a_construct_knows_its_name_from_its_file() -> None:
    from trainc.compiler.constructs.loss.mse import MeanSquaredError

    assert (MeanSquaredError.kind, MeanSquaredError.name) == ("loss", "mse")
    assert issubclass(MeanSquaredError, Construct)


def test_a_field_that_pydantic_would_read_by_its_own_rules_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`over` .* is annotated with the class `Duration`"):
        type(
            "Wrong",
            (Construct,),
            {"__module__": __name__, "__annotations__": {"over": v.Duration | None}},
        )


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (("warm", "act"), r"`warm` is not a phase of a step: write one of batch, rates"),
        (("rates", "act", ("clocks",)), r"`clocks` is not a resource of a step"),
        (("rates", "act", (), ("rates",)), r"`rates` is not a resource of a step"),
    ],
)
def test_an_effect_outside_the_vocabulary_is_an_error(
    effect: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Effect(*effect)


def test_a_signal_that_is_written_is_declared() -> None:
    with pytest.raises(ValueError, match=r"`Wrong` writes `signal:alpha`: declare it in `signals`"):

        class Wrong(Construct):
            effects: ClassVar = (Effect("observe", "measure", (), ("signal:alpha",)),)


def test_what_a_construct_selects_is_one_of_three() -> None:
    assert SELECTED == ("none", "modules", "parameters")
    with pytest.raises(ValueError, match="`targets` of `Wrong` is `layers`: write one of none"):
        type("Wrong", (Construct,), {"__module__": __name__, "targets": "layers"})
