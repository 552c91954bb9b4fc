"""The influence of training examples: reference values, by definition, projections, and what a run must have."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from tests.influenced import (
    REFERENCE,
    by_definition,
    reference_data,
    reference_model,
    reference_run,
    run,
    spec,
)
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.selection import examples_of, parameters_of, training_samples
from trainc.compiler.influence.tracin import Influence, Sketch, TracIn
from trainc.runtime.storage.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint


def influence(
    folder: Path,
    on: str | None = "0..3",
    layers: str | None = None,
    last: bool = False,
    projected: int | None = None,
) -> tuple[Influence, RecordedRun, list[str]]:
    found = RecordedRun.read(folder)
    names, inventory = parameters_of(found, layers, last)
    others = None if on is None else examples_of(on, found.data)
    train = training_samples(None, found.data)
    measure = TracIn(found, names, inventory, projected)
    return measure.measure(train, others and (others.split, others.ids)), found, [*names]


@pytest.mark.parametrize("last", [False, True])
def test_the_reference_values(tmp_path: Path, last: bool) -> None:
    """Those of captum's TracInCP, the gradient of the last layer's bias included, which its fast class drops."""
    found, _, names = influence(reference_run(tmp_path), "0", last=last)
    assert names == ["weight", "bias"]
    assert found.scores.tolist() == [pytest.approx(REFERENCE["captum_TracInCP"][0], abs=1e-12)]
    assert found.own.tolist() == pytest.approx(REFERENCE["captum_self_influence"], abs=1e-12)
    assert found.rates == [(0.1, 0.1), (0.05, 0.05)]
    without, _, _ = influence(tmp_path / "run", "0", layers="weight")
    fast = REFERENCE["captum_TracInCPFast_last_layer"][0]
    assert without.scores[0].tolist() == pytest.approx(fast, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Since `loss_fn` has no")
def test_captum_reads_our_checkpoints_and_finds_the_same(tmp_path: Path) -> None:
    tracin = pytest.importorskip("captum.influence")
    folder = reference_run(tmp_path)
    data = reference_data()
    pairs = torch.utils.data.TensorDataset(data.train.inputs, data.train.targets)
    checkpoints = [str(path) for path in sorted((folder / "checkpoints").iterdir())]
    theirs = tracin.TracInCP(
        reference_model(),
        pairs,
        checkpoints,
        checkpoints_load_func=trainc.checkpoint_loader,
        loss_fn=lambda out, y: ((out - y) ** 2).sum(1),
        batch_size=2,
        sample_wise_grads_per_batch=False,
    )
    test = data.evaluation
    assert test is not None
    found, _, _ = influence(folder, "0")
    scores: Tensor = theirs.influence((test.inputs, test.targets))
    torch.testing.assert_close(found.scores, scores.double(), rtol=1e-6, atol=1e-9)


SGD_OF_TWO = "sgd { lr = [0.1 on ndim(1), 0.02 on all - ndim(1)] }"
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "head": {"last": True},
    "two linear layers": {"layers": "type(Linear)"},
    "convolution": {"layers": "conv.*"},
}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_sum_of_rates_times_products(tmp_path: Path, case: str, positions: bool) -> None:
    """Also with a rate for each parameter, with many positions, and with examples of which no target counts."""
    folder = run(tmp_path, spec(positions, SGD_OF_TWO))
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    found, recorded, names = influence(folder, **CASES[case])
    scores, own = by_definition(recorded, names, list(range(9)), list(range(4)))
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.own, own, rtol=1e-9, atol=1e-12)
    assert found.together == (case in ("head", "two linear layers"))
    assert found.steps == [2, 4, 6]
    assert math.isnan(found.losses[1]) == positions
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_losses_are_those_at_the_last_checkpoint_in_eval_mode(tmp_path: Path) -> None:
    found, recorded, _ = influence(run(tmp_path, spec()))
    buffers = {n: b.clone() for n, b in recorded.program.module.named_buffers()}
    module = recorded.program.module.eval()
    x, y = recorded.data.train.batch(range(9))  # type: ignore[union-attr]
    with torch.no_grad():
        losses = F.cross_entropy(module(x), y, reduction="none")
    torch.testing.assert_close(found.train_losses, losses)
    saved = load_checkpoint(max(recorded.checkpoints.values()))["program"]["model"]
    assert all(torch.equal(buffers[name], saved[name]) for name in buffers)


def test_examples_that_depend_on_each_other_pass_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import influenced

    plain = influenced.Net.forward

    def mixed(self: Any, x: Tensor) -> Tensor:
        return plain(self, x - x.mean(0, keepdim=True) + 0.1)

    folder = run(tmp_path, spec())
    monkeypatch.setattr(influenced.Net, "forward", mixed)
    found, recorded, names = influence(folder, last=True)
    assert not found.together
    scores, _ = by_definition(recorded, names, list(range(9)), list(range(4)))
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)


def test_adapters_are_measured_where_they_alone_train(tmp_path: Path) -> None:
    text = spec(more='adapt lora on "body" { rank = 2, alpha = 4 }', optimizer="sgd { lr = 0.1 }")
    found, recorded, names = influence(run(tmp_path, text))
    assert names
    assert all("lora" in name for name in names)
    scores, _ = by_definition(recorded, names, list(range(9)), list(range(4)))
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"the last layer \(.*was not trained in this run"):
        parameters_of(recorded, None, True)


def test_sketches_have_the_products_as_their_means() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"a": 30, "b": 7}
    rows = [
        {name: torch.randn(1, n, generator=draw).double() for name, n in sizes.items()}
        for _ in range(2)
    ]
    exact = sum(float((rows[0][n] * rows[1][n]).sum()) for n in sizes)
    d, count = 16, 2000
    found = []
    for seed in range(count):
        sketch = Sketch(d, sizes, seed)
        ones = dict.fromkeys(sizes, 1.0)
        found.append(float((sketch(rows[0], ones)[""] * sketch(rows[1], ones)[""]).sum()))
    norms = math.prod(sum(float(r[n].square().sum()) for n in sizes) for r in rows)
    spread = torch.tensor(found).double()
    assert abs(float(spread.mean()) - exact) < 4 * float(spread.std()) / math.sqrt(count)
    assert float(spread.std()) == pytest.approx(math.sqrt((norms + exact**2) / d), rel=0.15)


def test_a_projection_is_close_and_repeats(tmp_path: Path) -> None:
    folder = run(tmp_path, spec())
    exact, _, _ = influence(folder)
    first, _, _ = influence(folder, projected=4000)
    again, _, _ = influence(folder, projected=4000)
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, exact.scores)
    apart = (first.scores - exact.scores).square().mean().sqrt()
    assert float(apart) < 0.1 * float(exact.scores.square().mean().sqrt())
    torch.testing.assert_close(first.own, exact.own)


def test_a_checkpoint_from_before_the_first_step_is_left_out(tmp_path: Path) -> None:
    folder = reference_run(tmp_path)
    first = load_checkpoint(folder / "checkpoints/step-00000001")
    first["program"]["rates"]["in_force"] = {}
    save_checkpoint(folder / "checkpoints", 0, first)
    found, _, _ = influence(folder, "0")
    assert found.skipped == [0]
    assert found.scores[0].tolist() == pytest.approx(REFERENCE["manual_tracincp"][0], abs=1e-12)


# the loader


def test_the_loader_gives_weights_and_the_rate(tmp_path: Path) -> None:
    folder = reference_run(tmp_path)
    model = reference_model()
    assert trainc.checkpoint_loader(model, folder / "checkpoints/step-00000002") == 0.05
    assert model.get_parameter("weight").tolist() == REFERENCE["checkpoints"][1]["w"]


def test_the_loader_says_what_one_rate_does_not_stand_for(tmp_path: Path) -> None:
    folder = run(tmp_path, spec(optimizer=SGD_OF_TWO))
    path = folder / "checkpoints/step-00000006"
    with pytest.raises(ValueError, match=r"had 2 learning rates, 0\.02 to 0\.1, and this loader"):
        trainc.checkpoint_loader(RecordedRun.read(folder).program.module, path)
    (path / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        trainc.checkpoint_loader(reference_model(), path)


def test_parameters_that_a_rule_has_frozen_have_no_rate(tmp_path: Path) -> None:
    rule = 'when step >= 3 { freeze "head.*" }'
    recorded = RecordedRun.read(run(tmp_path, spec(more=rule)))
    rates = {step: recorded.load(step) for step in recorded.checkpoints}
    assert [found["head.weight"] for found in rates.values()] == [0.1, 0, 0]
    assert [found["body.weight"] for found in rates.values()] == [0.1, 0.1, 0.1]
    names, inventory = parameters_of(recorded, "head", False)
    assert TracIn(recorded, names, inventory).measure([0, 1]).steps == [2]
