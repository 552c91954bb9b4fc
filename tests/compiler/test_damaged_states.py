"""A state of which one entry was changed is refused by name and changes nothing, or training goes on finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compiler.test_resumed_summaries import PLAIN, SPECS
from trainc.compiler.driver.adaptation import started_model
from trainc.compiler.driver.compile import compile_with_data, resolve_spec
from trainc.compiler.program.program import Program
from trainc.runtime.data.order import Split
from trainc.runtime.data.stream import with_access
from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.storage.form import StateProblem
from trainc.runtime.torch_optimizer.nested import same

OTHERS = (
    PLAIN
    + """
optimizer torch("torch.optim:Adafactor") as vectors on ndim(1) { lr = 1e-2 }
optimizer sgd on ndim(2) { lr = 1e-2, momentum = 0.9 }
regularize ema { decay = 0.9 }
mask sift on "blocks.*.mlp.**" & ndim(2) { density = 20%, batches = 8 }
"""
)
STATES = {**SPECS, "other optimizers": OTHERS}
REPLACED: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 1 << 70, 0.5, -2.5, math.nan, math.inf, "", "x", [], [1, "x"], (), {}, {"a": 1},
    {"(dtype)": "load"}, {"(items)": [1]}, torch.zeros(3), torch.tensor(-1), torch.tensor(math.nan),
)  # fmt: skip
SHAPED = ("cut", "longer", "axis", "integer", "double", "half", "nan", "infinite")


@dataclass
class Made:
    """A program after some steps of its spec's data, its state there, and that of one step later."""

    program: Program
    samples: Split
    state: dict[str, Any]
    later: dict[str, Any]

    def __post_init__(self) -> None:
        self.paths = [path for path, _ in places(self.state) if path]

    def step(self) -> float:
        return step(self.program, self.samples)


def step(program: Program, samples: Split) -> float:
    """Run a step on samples that follow from its number."""
    program.begin()
    draw = torch.Generator().manual_seed(program.clock.steps)
    taken = torch.randint(0, len(samples), (program.batch_size or 4,), generator=draw)
    torch.manual_seed(program.clock.steps)
    return program.step(samples.batch(taken.tolist()))["loss"]


def compiled(spec: str) -> tuple[Program, Split]:
    """Return the program of a spec on its own model, and the samples that the spec trains on."""
    checked, _ = resolve_spec(spec)
    program, data = compile_with_data(checked, started_model(checked), executor="module")
    return program, with_access(data.train)


@cache
def made(name: str) -> Made:
    program, samples = compiled(STATES[name])
    for _ in range(5):
        step(program, samples)
    state = copy.deepcopy(program.state_dict())
    step(program, samples)
    return Made(program, samples, state, copy.deepcopy(program.state_dict()))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every part of a tree with its path."""
    yield path, value
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, inner in inside:
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    """Return a tree in which one part is another; `...` removes it. What does not change is shared."""
    if not path:
        return reshaped(value, to) if isinstance(to, str) and isinstance(value, Tensor) else to
    key, rest = path[0], path[1:]
    parts = dict(value) if isinstance(value, dict) else list(value)
    if not rest and to is ...:
        del parts[key]
    else:
        parts[key] = changed(parts[key], rest, to)
    return type(value)(parts) if isinstance(value, tuple) else parts


def reshaped(value: Tensor, how: str) -> Any:
    """Return a tensor of another shape or dtype, or with an entry that is not finite; other text stays text."""
    match how:
        case "cut":
            return value[:-1] if value.dim() else value.reshape(1, 1)
        case "longer":
            return torch.cat([value.reshape(-1), value.reshape(-1)])
        case "axis":
            return value.unsqueeze(0)
        case "integer":
            return value.to(torch.int16)
        case "double":
            return value.to(torch.complex64)
        case "half":
            return value.to(torch.float16)
        case "nan" | "infinite":
            wide = value.clone() if value.is_floating_point() else value.double()
            wide.view(-1)[:1] = math.nan if how == "nan" else -math.inf
            return wide
    return how


def refusal(load: Callable[[dict[str, Any]], object], damaged: dict[str, Any]) -> str | None:
    """Return what a load says of a state that it refuses; None where it takes it."""
    try:
        load(damaged)
    except ValueError as error:
        return str(error)
    return None


def assert_named_or_finite(one: Made, damaged: dict[str, Any], path: tuple[Any, ...]) -> None:
    program = one.program
    program.load_state_dict(one.state)
    before, drawn = copy.deepcopy(program.state_dict()), torch.get_rng_state()
    said = refusal(program.load_state_dict, damaged)
    if said is not None:
        assert any(str(key) in said for key in path) or "made by another" in said
        assert torch.equal(drawn, torch.get_rng_state())
        assert same(program.state_dict(), before), f"changed by a refused load: {path}"
        one.step()
        assert same(program.state_dict(), one.later), (
            f"trains otherwise after a refused load: {path}"
        )
    else:
        assert math.isfinite(one.step())
        assert math.isfinite(one.step())


def assert_accepts(one: Made, damaged: dict[str, Any], path: tuple[Any, ...]) -> None:
    """Load what fits of a damaged state: nothing changes where that is refused, and else a step is finite or named."""
    program = one.program
    program.load_state_dict(one.state)
    before = copy.deepcopy(program.state_dict())
    if refusal(program.load_compatible, damaged) is not None:
        assert same(program.state_dict(), before), f"changed by a refused load: {path}"
    else:
        assert math.isfinite(one.step())


@pytest.mark.parametrize("name", STATES)
def test_a_state_in_order_loads(name: str) -> None:
    one = made(name)
    one.program.load_state_dict(one.state)
    one.step()
    assert same(one.program.state_dict(), one.later)


@pytest.mark.parametrize("name", STATES)
@settings(max_examples=25)
@given(data=st.data())
def test_one_changed_entry_is_named_or_training_is_finite(name: str, data: st.DataObject) -> None:
    one = made(name)
    path = data.draw(st.sampled_from(one.paths))
    to = data.draw(st.sampled_from((*REPLACED, *SHAPED, ...)))
    assert_named_or_finite(one, changed(one.state, path, to), path)


@pytest.mark.parametrize("name", STATES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_damaged_state_is_accepted_in_part_or_refused(name: str, data: st.DataObject) -> None:
    one = made(name)
    path = data.draw(st.sampled_from(one.paths))
    to = data.draw(st.sampled_from((*REPLACED, *SHAPED, ...)))
    assert_accepts(one, changed(one.state, path, to), path)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        ("clock/steps", -1, "`clock/steps` is -1: expected an integer, 0 or more"),
        ("clock", 3, "`clock` is 3: expected a dict"),
        (
            "model/head.weight",
            torch.zeros(2),
            "`model/head.weight` is a tensor float32[2]: expected",
        ),
        (
            "actions/ema/updates",
            "4",
            "`actions/ema/updates` is '4': expected an integer, 1 or more",
        ),
        ("evaluation/head.weight", None, "`evaluation/head.weight` is None: expected a tensor"),
        ("execution/generators", [1], "`execution/generators` is 1 of them: expected"),
        ("history/skipped/unsound", 0.5, "`history/skipped/unsound` is 0.5: expected an integer"),
    ],
)
def test_an_error_has_the_path_and_what_was_expected(path: str, to: Any, said: str) -> None:
    one = made("one optimizer")
    damaged = changed(one.state, tuple(path.split("/")), to)
    with pytest.raises(StateProblem) as caught:
        one.program.load_state_dict(damaged)
    assert said in str(caught.value)


def test_an_open_step_survives_a_refused_load() -> None:
    one = made("one optimizer")
    one.program.load_state_dict(one.state)
    opened = one.program.begin()
    with pytest.raises(StateProblem):
        one.program.load_state_dict(changed(one.state, ("clock", "steps"), -1))
    assert one.program.begin() is opened
    one.step()
    assert same(one.program.state_dict(), one.later)


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("to", ["cut", "longer", torch.zeros(3), ...])
def test_a_vector_of_another_length_restarts_its_parameter_where_that_is_accepted(
    entry: str, to: Any
) -> None:
    one = made("a followed signal")
    damaged = changed(one.state, ("actions", "adamw", f"ln_f.bias/{entry}"), to)
    one.program.load_state_dict(one.state)
    said = one.program.load_compatible(damaged)
    assert said == ["adamw: begins without state of `ln_f.bias`"]
    kept = one.program.state_dict()["actions"]["adamw"]
    assert not [key for key in kept if key.startswith("ln_f.bias/exp")]
    assert same(kept["ln_f.weight/exp_avg"], one.state["actions"]["adamw"]["ln_f.weight/exp_avg"])
    assert math.isfinite(one.step())


def test_an_option_that_asks_for_more_restarts_its_parameters() -> None:
    """AdamW with `amsgrad` reads an entry that a state without it does not have."""
    clause = 'optimizer torch("torch.optim:AdamW") { lr = 1e-2, amsgrad = %s }'
    (before, samples), (after, _), (again, _) = (
        compiled(PLAIN + clause % on) for on in ("false", "true", "false")
    )
    step(before, samples)
    said = after.load_compatible(before.state_dict())
    assert any("begins without state of" in line for line in said)
    assert math.isfinite(step(after, samples))
    again.load_compatible(after.state_dict())
    step(again, samples)
    again.load_state_dict(again.state_dict())


@pytest.mark.parametrize(
    "sums",
    [
        [-math.inf] + [0.0] * 14,
        [2.0, 0.5] + [0.0] * 13,
        [0.5, 0.0] + [0.0] * 13,
        [0.5, 0.25, math.nan] + [0.0] * 12,
        [0.0] * 14 + [-1.0],
        [0.0] * 14 + [0.5],
        [0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, math.inf] + [0.0] * 7,
    ],
)
def test_averages_that_no_estimates_lead_to_are_refused(sums: list[float]) -> None:
    with pytest.raises(ValueError, match="the state is damaged"):
        Averages().load(sums)
