"""A line that cannot act in its run is an error, or a warning where the end of the run acts in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainc
from trainc.compiler.catalog import check
from trainc.compiler.driver.train import train
from trainc.dsl.text.diagnostic import Diagnostic

HEAD = (
    'model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 8 }'
    ' data "examples.data:stdlib" { batch = %s, context = 8 } loss cross_entropy'
    " run { length = 50 steps%s } optimizer adamw { lr = 1e-3 } "
)


def spec(rest: str, run: str = "", batch: str = "4 samples") -> str:
    return HEAD % (batch, run) + rest


def found(text: str, at_check: bool) -> list[Diagnostic]:
    """Return what is said of a spec by `trainc check`, or where that says nothing by `trainc plan`."""
    checked = check(text)
    said = [*checked.diagnostics]
    if at_check or checked.spec is None or said:
        return said
    try:
        return [*trainc.plan(checked.spec).warnings]
    except trainc.SpecError as error:
        return [*error.diagnostics]


def only(text: str, at_check: bool = False) -> tuple[str, str]:
    """Return severity and place of the only diagnostic, which is that a line never acts."""
    said = found(text, at_check)
    assert [d.rule for d in said] == ["never-acts"], said
    assert said[0].span is not None
    return said[0].severity, said[0].span.text


L2 = "regularize l2_sp on ndim(2)"


@pytest.mark.parametrize(
    ("rest", "place"),
    [
        (f"{L2} from 50 steps {{ weight = 0.1 }}", "50 steps"),
        (f"{L2} from 100% {{ weight = 0.1 }}", "100%"),
        (f"{L2} from 30 steps until 30 steps {{ weight = 0.1 }}", "30 steps"),
        (f"{L2} from 50% until 10 steps {{ weight = 0.1 }}", "10 steps"),
        (f"{L2} until 0 steps {{ weight = 0.1 }}", "0 steps"),
        (f"{L2} every 51 steps {{ weight = 0.1 }}", "51 steps"),
        (f"{L2} from 40 steps every 11 steps {{ weight = 0.1 }}", "11 steps"),
        (f"{L2} until 10 steps every 11 steps {{ weight = 0.1 }}", "11 steps"),
        ("lr layer_decay on all from 60 steps { decay = 0.5 }", "60 steps"),
        ("noise_scale gns { calibrate = 60 steps }", "60 steps"),
        ("noise_scale gns from 45 steps { calibrate = 6 steps }", "6 steps"),
        ("when loss > 2 for 50 steps { stop }", "50 steps"),
        ("when progress > 50 { stop }", "progress > 50"),
        ("when steps >= 50 { stop }", "steps >= 50"),
        ("when steps > 120% { stop }", "steps > 120%"),
        ("when not steps < 1000 { stop }", "not steps < 1000"),
        ("when loss < 2 and progress > 1.5 { stop }", "loss < 2 and progress > 1.5"),
        ("when 2 * steps > 100 steps { stop }", "2 * steps > 100 steps"),
        ("when loss > 3 and loss < 2 { stop }", "loss > 3 and loss < 2"),
        (
            "when 3 <= loss and steps > 4 and loss < 3 { stop }",
            "3 <= loss and steps > 4 and loss < 3",
        ),
        ("when gradient_norm < 0 { stop }", "gradient_norm < 0"),
    ],
)
def test_check_finds_what_the_length_of_the_run_tells(rest: str, place: str) -> None:
    assert only(spec(rest), at_check=True) == ("error", place)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (spec(f"{L2} from 200 samples {{ weight = 0.1 }}"), "200 samples"),
        (spec("observe norm_growth on ndim(2) from 2 epochs"), "2 epochs"),
        (spec(f"{L2} from 10 steps until 40 samples {{ weight = 0.1 }}"), "40 samples"),
        (spec("noise_scale gns { calibrate = 300 samples }"), "300 samples"),
        (spec("when samples > 300 { stop }"), "samples > 300"),
        (spec("when batch > 8 { stop }"), "batch > 8"),
        (spec("mask sift on ndim(2) - type(Embedding) { density = 1%, batches = 50 }"), "50"),
        (
            spec(
                "mask sift on ndim(2) - type(Embedding) from 45 steps { density = 1%, batches = 6 }"
            ),
            "6",
        ),
        (
            spec("", batch="ramp(4 samples, to = 8 samples, over = 10 steps, from = 80 steps)"),
            "ramp(4 samples, to = 8 samples, over = 10 steps, from = 80 steps)",
        ),
        (spec("", batch="400000000 samples"), "400000000 samples"),
    ],
)
def test_the_plan_finds_what_data_and_batch_tell(text: str, place: str) -> None:
    assert only(text) == ("error", place)


def test_what_the_end_of_the_run_does_anyway_is_a_warning() -> None:
    for field in ("eval", "checkpoint"):
        assert only(spec("", f", {field} = 60 steps")) == ("warning", "60 steps")
        assert only(spec("", f", {field} = 300 samples")) == ("warning", "300 samples")


def test_a_measured_number_is_hardly_ever_equal_to_another() -> None:
    assert only(spec("when loss == 2 { stop }")) == ("warning", "loss == 2")


def test_a_warm_up_that_the_run_ends_before_is_a_warning() -> None:
    text = spec("").replace("lr = 1e-3", "lr = 1e-3 * warmup(60 steps)")
    assert only(text, at_check=True) == ("warning", "1e-3 * warmup(60 steps)")
    assert found(text.replace("60 steps", "50 steps"), at_check=False) == []


@pytest.mark.parametrize(
    "rest",
    [
        f"{L2} from 49 steps {{ weight = 0.1 }}",
        f"{L2} from 20% until 50% every 15 steps {{ weight = 0.1 }}",
        f"{L2} until 500 steps {{ weight = 0.1 }}",
        "when progress > 50% { stop }",
        "when steps >= 49 { stop }",
        "when epochs < 1 { stop }",
        "when batch == 4 { stop }",
        "when loss >= 3 and loss <= 3 { stop }",
        "when loss > 2 and loss < 3 { stop }",
        "when loss > 3 or loss < 2 { stop }",
        "when loss is nan { stop }",
        "when abs(loss - 2) < 0.01 { stop }",
        "when steps > 1 epochs { stop }",
    ],
)
def test_what_can_act_is_left_alone(rest: str) -> None:
    if "1 epochs" in rest:
        assert only(spec(rest))[0] == "error"
    else:
        assert found(spec(rest), at_check=False) == []


def test_data_that_does_not_describe_itself_is_counted_when_it_is_built(tmp_path: Path) -> None:
    text = f'model "{__name__}:net" data "{__name__}:few" {{ batch = 8 samples }} loss mse run {{ length = 2 steps }}'
    with pytest.raises(trainc.SpecError, match="has 5"):
        train(text + " optimizer sgd { lr = 0.1 }", tmp_path / "run", quiet=True)


def net() -> object:
    from torch import nn

    return nn.Linear(2, 1)


def few() -> object:
    from types import SimpleNamespace

    class Five(list[int]):
        def batch(self, indices: object) -> None:
            """Give no samples: there are too few to begin."""

    return SimpleNamespace(train=Five(range(5)), evaluation=Five(range(5)), tokens_per_sample=1)


def test_a_run_that_set_shortens_is_a_trial() -> None:
    text = (
        "let span = 100 steps\n"
        'model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 8 }'
        ' data "examples.data:stdlib" { batch = 4 samples, context = 8 } loss cross_entropy'
        " run { length = span } optimizer adamw { lr = 1e-3 }\n"
        "regularize l2_sp on ndim(2) from 50 steps every 20 steps { weight = 0.1 }\n"
        "mask sift on ndim(2) - type(Embedding) { density = 1%, batches = 20 }\n"
        "when steps > 60 for 30 steps { stop }"
    )
    assert check(text).diagnostics == ()
    trial = check(text, ["span=2 steps"])
    assert trial.spec is not None
    assert {d.severity for d in trial.diagnostics} == {"warning"}
    planned = trainc.plan(trial.spec).warnings
    assert [d.rule for d in planned] == ["never-acts"] * 3
    (found,) = check(text + "\nwhen progress > 2 { stop }", ["span=2 steps"]).errors
    assert "progress" in found.message
