"""Epochs of data that does not say how many samples it has: an error with its place, before anything runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

import trainc
from trainc.dsl.text.diagnostic import Diagnostic

SILENT = f'data "{__name__}:silent" {{ batch = 8 samples }}'
TELLING = f'data "{__name__}:telling" {{ batch = 8 samples }}'
ADAM = "optimizer adamw { lr = 1e-3 }"
CASES = [
    ("run { length = 2 epochs }", ADAM, "2 epochs"),
    ("run { length = 20 steps, checkpoint = 1 epochs }", ADAM, "1 epochs"),
    ("run { length = 20 steps, eval = 0.5 epochs }", ADAM, "0.5 epochs"),
    ("run { length = 20 steps }", f"{ADAM} regularize l2_sp on all from 1 epochs {{ weight = 0.1 }}", "1 epochs"),
    ("run { length = 20 steps }", f"{ADAM} regularize l2_sp on all every 1 epochs {{ weight = 0.1 }}", "1 epochs"),
    ("run { length = 20 steps }", f"{ADAM} regularize l2_sp on all until 1 epochs {{ weight = 0.1 }}", "1 epochs"),
    ("run { length = 20 steps }", f"{ADAM} noise_scale gns {{ smooth = 1 epochs }}", "1 epochs"),
    (
        "run { length = 20 steps }",
        "optimizer adamw { lr = 1e-3 * (warmup(1 epochs) then constant()) }",
        "1e-3 * (warmup(1 epochs) then constant())",
    ),
    ("run { length = 20 steps }", "optimizer adamw { lr = 1e-3 / (1 + epochs) }", "1e-3 / (1 + epochs)"),
    ("run { length = 20 steps }", f"{ADAM} when epochs > 1 {{ stop }}", "epochs > 1"),
    ("run { length = 20 steps }", f"{ADAM} when steps > 1 epochs {{ stop }}", "steps > 1 epochs"),
    ("run { length = 20 steps }", f'{ADAM} when loss < 1 for 1 epochs {{ warn "low" }}', "1 epochs"),
    ("run { length = 20 steps }", f'{ADAM} when loss < 1 cooldown 1 epochs {{ warn "low" }}', "1 epochs"),
]  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def silent() -> object:
    return SimpleNamespace(train=range(40), evaluation=None, tokens_per_sample=1)


def telling() -> object:
    return silent()


telling.describe = lambda: {"samples": 40, "tokens_per_sample": 1}  # type: ignore[attr-defined]


def errors(text: str) -> list[Diagnostic]:
    try:
        trainc.plan(text, net())
    except trainc.SpecError as error:
        return [*error.diagnostics]
    return []


def written(one: Diagnostic) -> str:
    """What the first label of a diagnostic is under."""
    span = one.labels[0].span
    return span.source.text[span.start : span.end]


@pytest.mark.parametrize(("run", "rest", "place"), CASES)
def test_epochs_that_nothing_counts_are_an_error_at_their_place(
    run: str, rest: str, place: str
) -> None:
    (found,) = errors(f"{SILENT} loss cross_entropy {run} {rest}")
    assert found.rule == "wrong-unit"
    assert written(found) == place
    assert "how many samples an epoch has is not known" in found.message
    assert found.help is not None
    assert f"give `{__name__}:silent` a `describe`" in found.help


@pytest.mark.parametrize(("run", "rest", "place"), CASES)
def test_data_that_describes_itself_counts_them(run: str, rest: str, place: str) -> None:
    found = errors(f"{TELLING} loss cross_entropy {run} {rest}")
    assert [one for one in found if one.rule == "wrong-unit"] == []


def test_without_data_only_what_a_step_counts_is_an_error() -> None:
    runs = "run { length = 2 epochs, eval = 1 epochs, checkpoint = 1 epochs }"
    assert errors(f"loss cross_entropy {runs} optimizer sgd {{ lr = 0.1, clip = 1.0 }}") == []
    (found,) = errors(
        "loss cross_entropy run { length = 20 steps } optimizer sgd { lr = 0.1 }"
        " regularize l2_sp on all every 1 epochs { weight = 0.1 }"
    )
    assert found.help is not None
    assert "`data` clause" in found.help


@pytest.mark.parametrize("name", ["block", "depth", "blocks"])
def test_the_place_of_a_layer_in_a_number_of_the_whole_model_is_an_error(name: str) -> None:
    (found,) = errors(
        f"loss cross_entropy run {{ length = 20 steps }} {ADAM} regularize r_drop {{ weight = 0.1 * {name} }}"
    )
    assert f"`{name}`" in found.message
    assert name in written(found)
    assert "one number for the whole model" in found.message
