"""The policies of the batch: what their signatures take is what the data construct reads."""

from trainc.compiler.constructs.data._batch_policy import POLICIES, parse_batch_policy
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import FUNCTIONS


def test_every_policy_of_the_batch_is_one_that_the_compiler_reads() -> None:
    for name, function in POLICIES.items():
        given: dict[str, v.Expr] = {
            "samples": v.Quantity(v.Duration(8, "samples")),
            "duration": v.Quantity(v.Duration(100, "tokens")),
            "amount": v.Name("gns"),
            "plain": v.Number(0.5),
            "switch": v.Name("true"),
        }
        kwargs = {key: given[str(kind)] for key, kind in function.arguments.items()}
        end = "to" if name == "ramp" else "max"
        kwargs[end] = v.Quantity(v.Duration(16, "samples"))
        assert parse_batch_policy(v.called(name, **kwargs), None).name == name
        assert not set(function.arguments) - set(kwargs)
    assert not FUNCTIONS.keys() & POLICIES.keys()
