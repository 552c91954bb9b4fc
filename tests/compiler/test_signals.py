"""Signals that expressions use: those that are never measured, unlike counts, batches with nothing to compare."""

from pathlib import Path

import pytest
from torch import nn

import trainc
from trainc.compiler.driver.train import train
from trainc.dsl.text.diagnostic import Diagnostic

HEAD = """
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
loss cross_entropy
run { length = 12 steps, seed = 3 }
optimizer adamw { lr = 2e-3 }
"""
DOCUMENTS = "example = document, separator = 10"


def spec(measure: str, batch: str = "8 samples", micro: str = "4 samples", rule: str = "") -> str:
    data = f"batch = {batch}, micro = {micro}, context = 16, limit_bytes = 30_000"
    clause = f"noise_scale gns on type(LayerNorm) {{ {measure} }}"
    return f'{HEAD}data "examples.data:stdlib" {{ {data} }}\n{clause}\n{rule}'


def refused(text: str) -> Diagnostic:
    """Return the one error of a spec."""
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(text)
    (found,) = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert found.span is not None
    return found


def follow(signal: str) -> str:
    return f"follow({signal}, min = 4 samples, max = 8 samples)"


@pytest.mark.parametrize("name", ["gns.total", "gns.total_low", "gns.total_high", "gns.slope"])
def test_what_only_calibrations_find_is_not_read_without_them(name: str) -> None:
    by_rule = refused(spec("", rule=f'when {name} > 3 {{ warn "x" }}'))
    by_policy = refused(spec("", follow(f"{name} * 1 samples" if "slope" in name else name)))
    for found in (by_rule, by_policy):
        assert found.rule == "unknown-signal"
        assert found.message == f"`{name}` is never measured, so this expression has no effect"
        assert found.help == "add `calibrate = 500 steps` or similar to the clause"
    assert "has no `calibrate`" in by_rule.notes[0]
    trainc.plan(spec("calibrate = 4 steps", rule=f'when {name} > 3 {{ warn "x" }}'))


@pytest.mark.parametrize("where", ["policy", "rule", "assigned", "schedule"])
def test_a_dropped_clause_is_not_read(where: str) -> None:
    batch = follow("gns") if where == "policy" else "8 samples"
    rules = {
        "rule": "when gns > 2 { save }",
        "assigned": "when step > 3 { batch = min(gns, 8 samples) }",
    }
    text = spec("", batch, rule=rules.get(where, ""))
    if where == "schedule":
        text = text.replace("lr = 2e-3", "lr = 2e-3 * min(1, gns / 8 samples)")
    trainc.plan(text)
    found = refused(text.replace("type(LayerNorm) {", "type(RMSNorm) optional {"))
    assert found.message == "`gns` is never measured, so this expression has no effect"
    assert "its selector matches nothing" in found.notes[0]


@pytest.mark.parametrize("signal", ["loss", "gns.noise", "gns.error", "gns.signal", "sqrt(gns)"])
@pytest.mark.parametrize("policy", ["follow", "signal_noise"])
def test_a_policy_follows_what_counts_samples(signal: str, policy: str) -> None:
    batch = f"{policy}({signal}, min = 4 samples, max = 8 samples)"
    found = refused(spec("", batch))
    assert f"`{signal}` does not count samples, but a batch is a number of samples" in found.message
    assert "use `gns`, `gns.low`, `gns.high`, or" in found.message
    trainc.plan(spec("", batch.replace(signal, f"{signal} * 1 samples")))


def test_a_noise_scale_under_another_name_counts_samples_too() -> None:
    text = spec("", follow("noise.low")).replace("noise_scale gns", "noise_scale gns as noise")
    trainc.plan(text)


@pytest.mark.parametrize(
    ("batch", "rule"),
    [
        (follow("gns"), ""),
        (follow("0.5 * gns.low"), ""),
        ("8 samples", "when gns > 2 * batch { save }"),
        ("8 samples", "when gns.low > 16 samples { save }"),
        ("8 samples", "when step > 3 { batch = gns }"),
    ],
)
def test_documents_are_no_samples(batch: str, rule: str) -> None:
    trainc.plan(spec("", batch, rule=rule))
    found = refused(spec(DOCUMENTS, batch, rule=rule))
    assert "counts documents, but" in found.message
    assert found.message.endswith("counts samples")
    assert "their number varies" in found.notes[0]


def test_documents_compare_with_numbers_and_themselves() -> None:
    trainc.plan(spec(DOCUMENTS, rule="when gns > 20 and gns.low > gns / 2 { save }"))


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (DOCUMENTS, "`calibrate` needs `example = row`"),
        ("geometry = sign", "needs `geometry = euclidean`"),
        ("geometry = adam", "needs `geometry = euclidean`"),
        ("method = ghost, group = 2", "measures single examples"),
    ],
)
def test_calibration_is_refused_where_it_measures_something_else(measure: str, words: str) -> None:
    trainc.plan(spec(measure))
    found = refused(spec(f"{measure}, calibrate = 5 steps"))
    assert found.rule == "bad-value"
    assert words in found.labels[0].text
    assert found.span is not None
    assert found.span.text == "5 steps"


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("all { method = micro_batch,", "BatchNorm (`body.1`) in train mode does not support"),
        ("type(GroupNorm) {", "`body.1` normalizes over the batch"),
    ],
)
def test_calibration_is_refused_where_the_model_mixes_examples(on: str, words: str) -> None:
    text = f"loss cross_entropy optimizer sgd {{ lr = 1 }} noise_scale gns on {on} calibrate = 5 steps }}"
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(text, Mixing())
    (found,) = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert found.rule == "norm-mixes-examples"
    assert words in found.message


def test_calibration_needs_two_examples_in_a_micro_batch() -> None:
    found = refused(spec("calibrate = 5 steps", "4 samples", "1 samples"))
    assert found.rule == "nothing-to-measure"
    assert "`micro = 2 samples`" in (found.help or "")


def test_more_examples_than_a_micro_batch_has_are_warned_of() -> None:
    (warning,) = trainc.plan(spec("calibrate = 5 steps, calibrate_examples = 100")).warnings
    assert warning.rule == "no-effect"
    assert "100` is more than the 4 samples" in warning.message
    # The default is what a micro-batch has, up to 16.
    assert not trainc.plan(spec("calibrate = 5 steps")).warnings
    assert not trainc.plan(spec("calibrate = 5 steps, calibrate_examples = 4")).warnings


def test_one_micro_batch_a_step_leaves_micro_batches_nothing_to_compare() -> None:
    found = refused(spec("method = micro_batch", "8 samples", "8 samples"))
    assert "a step has only one: 8 samples" in found.message
    assert "`micro = 4 samples`" in (found.help or "")
    trainc.plan(spec("method = micro_batch"))
    growing = "ramp(4 samples, to = 8 samples, over = 50%)"
    trainc.plan(spec("method = micro_batch", growing))


def test_a_run_of_one_process_refuses_replicas(tmp_path: Path) -> None:
    source = tmp_path / "spec.train"
    source.write_text(spec("method = replica"))
    with pytest.raises(trainc.SpecError, match="this process trains alone"):
        train(source, tmp_path / "run", quiet=True)


def test_a_rule_is_told_from_another_by_how_long_it_waits(tmp_path: Path) -> None:
    rules = (
        'when step > 1 for 2 steps { warn "a" } when step > 1 for 3 steps cooldown 4 steps { save }'
    )
    program = trainc.compile(spec("", rule=rules))
    told = [line for line in program.summary() if line.startswith("when")]
    assert told == [
        "when step > 1 for 2 steps: never fired",
        "when step > 1 for 3 steps cooldown 4 steps: never fired",
    ]
