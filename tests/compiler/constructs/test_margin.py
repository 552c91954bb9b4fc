"""Margins: brute force over classes, distances of linear models, and what runs and replicas report."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.observe.margin import Margin
from trainc.compiler.method.loss import LossMismatch
from trainc.runtime.step.action import ClauseFailed

BASE = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 20 steps } observe margin "


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batch(examples: int = 12) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    y = torch.randint(5, (examples, 3), generator=made)
    y[0, 1:], y[4, 0] = -100, -100
    return torch.randn(examples, 3, 4, generator=made, dtype=torch.float64), y


def by_hand(model: nn.Module, x: Tensor, y: Tensor, q: float | None = None) -> list[float]:
    """Return the margin of every target that counts, class by class."""
    weight, found = model[-1].weight.detach(), []  # type: ignore[index]
    for z, target in zip(model(x).detach()[y != -100], y[y != -100], strict=True):
        gaps = []
        for j in range(len(z)):
            if j != target:
                length = 1.0 if q is None else float((weight[target] - weight[j]).norm(q))
                gaps.append(float(z[target] - z[j]) / length)
        found.append(min(gaps))
    return found


@pytest.mark.parametrize(
    ("fields", "q"),
    [("", None), (', layer = "2"', 2.0), (', layer = "2", norm = linf', 1.0)],
)
@pytest.mark.parametrize("sizes", [(12,), (5, 7)])
def test_it_is_the_margin_class_by_class(
    fields: str, q: float | None, sizes: tuple[int, ...]
) -> None:
    model = net()
    program = trainc.compile(f"{BASE} {{ of = training{fields} }}", model)
    wanted = by_hand(model, *batch(), q)
    found = program.step(divided(batch(), sizes))
    assert found["margin.min"] == pytest.approx(min(wanted), rel=1e-12)
    assert found["margin.mean"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


def test_evaluations_are_the_default() -> None:
    model = net()
    program = trainc.compile(BASE, model)
    program.evaluate(batch())
    found, wanted = program.evaluation_metrics(), by_hand(model, *batch())
    assert found["margin.min"] == pytest.approx(min(wanted), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("layer = type(Linear)", "selects 2 modules: select one Linear layer"),
        ('layer = "1"', "`1`, which is no linear layer"),
    ],
)
def test_a_layer_must_be_one_linear_layer(fields: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=said):
        trainc.plan(f"{BASE} {{ {fields} }}", net())


class Tied(nn.Module):
    """Tokens whose head is their embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())  # type: ignore[no-any-return]


def test_the_weight_of_a_layer_may_be_called_by_another_name() -> None:
    model, ids = Tied(), torch.arange(10).view(2, 5) % 5
    program = trainc.compile(f'{BASE} {{ layer = "head" }}', model)
    program.evaluate(ids, (ids + 1) % 5)
    found = program.evaluation_metrics()["margin.mean"]
    wanted = Margin(layer='"head"').reference(  # type: ignore[arg-type] # as text
        model(ids).flatten(0, 1), (ids + 1).flatten() % 5, model.embed.weight
    )
    assert found == pytest.approx(float(wanted.detach().mean()), rel=1e-12)


def test_a_weight_that_is_computed_or_adapted_gives_no_distances() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model[2])  # type: ignore[index]
    with pytest.raises(trainc.SpecError, match="the weight of `2` is computed, and distances are"):
        trainc.compile(f'{BASE} {{ layer = "2" }}', model)
    adapted = f'{BASE} {{ layer = "2" }} adapt lora on "2" {{ rank = 1, alpha = 1 }}'
    with pytest.raises(trainc.SpecError, match="the weight of `2` is changed by an adapter"):
        trainc.compile(adapted, net())


def test_examples_that_another_clause_mixes_have_no_margin() -> None:
    mixes = " regularize mixup { alpha = 0.2 }"
    with pytest.raises(trainc.SpecError) as failed:
        trainc.plan(f"{BASE} {{ of = training }}{mixes}", net())
    (found,) = failed.value.diagnostics
    assert found.rule == "conflicting-effects"
    assert [label.span.text.split()[1] for label in found.labels] == ["margin", "mixup"]
    trainc.plan(f"{BASE}{mixes}", net())  # evaluations mix nothing


def test_classes_of_equal_weights_are_at_no_distance_where_their_logits_are_equal() -> None:
    """A head begins with zeros where a model is fine-tuned, and an infinite distance is that to no class."""
    model = net()
    with torch.no_grad():
        model[2].weight.zero_(), model[2].bias.zero_()  # type: ignore[index]
    found = trainc.compile(f'{BASE} {{ of = training, layer = "2" }}', model).step(batch())
    assert found["margin.min"] == found["margin.mean"] == 0
    logits, weight = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0], [1.0], [3.0]])
    margins = [Margin().reference(logits, torch.tensor([y]), weight) for y in range(3)]
    assert torch.cat(margins).tolist() == [-0.5, -0.5, 0.5]
    wrong = Margin().reference(torch.tensor([[0.0, 2.0]]), torch.tensor([0]), torch.ones(2, 1))
    assert wrong.tolist() == [-math.inf]


def test_a_layer_must_give_the_logits() -> None:
    program = trainc.compile(f'{BASE} {{ of = training, layer = "0" }}', net())
    with pytest.raises(ValueError, match="let `layer` be the layer that gives the logits"):
        program.step(batch())


def test_one_class_has_no_margin() -> None:
    program = trainc.compile(BASE, nn.Sequential(nn.Linear(4, 1)).double())
    x, y = batch()
    with pytest.raises(ClauseFailed, match="of one class, and a margin is between two") as caught:
        program.evaluate((x, y.clamp(max=0)))
    assert caught.value.clause == "margin"


def test_targets_that_are_no_class_are_named_in_evaluations_and_in_a_loop_of_ones_own() -> None:
    x, y = batch()
    y[2, 1] = 7
    with pytest.raises(LossMismatch, match="a target is the class 7, and the model's output has 5"):
        trainc.compile(BASE, net()).evaluate((x, y))
    own = "optimizer sgd { lr = 0.1 } observe margin { of = training }"
    y[2, 1] = -1  # what the loop leaves out, and the spec does not know of
    for loss, known in (("", False), ("loss cross_entropy { ignore_index = -1 }", True)):
        model = net()
        program = trainc.compile(loss + own, model)
        y[y == -100] = -1 if known else -100
        with program.micro_batch(len(x)):
            logits = model(x)
            mean = nn.functional.cross_entropy(logits.mT, y.clamp(min=-1), ignore_index=-1)
        if known:
            program.backward(mean, logits=logits, targets=y)
            assert "margin.mean" in program.update()
            continue
        with pytest.raises(ClauseFailed, match=r"`margin` reads the class -1 .*`ignore_index`"):
            program.backward(mean, logits=logits, targets=y)


@pytest.mark.parametrize(
    "loss", ["loss cross_entropy", "loss cross_entropy { ignore_index = -1 }", ""]
)
def test_evaluations_of_ones_own_code_are_read_as_those_of_the_program(loss: str) -> None:
    spec = "optimizer sgd { lr = 0.1 } observe margin observe calibration { temperature = true }"
    model, program = net(), trainc.compile(BASE, net())
    assert program.evaluation_readers
    program = trainc.compile(f"{loss} {spec}", model)
    other = trainc.compile(f"loss cross_entropy {spec}", net())
    for _ in range(2):  # each evaluation begins anew
        for part in (slice(0, 5), slice(5, 12)):
            x, y = (one[part] for one in batch())
            other.evaluate((x, y))
            logits = model(x)
            program.read_evaluation(logits, y.masked_fill(y == -100, -1) if "-1" in loss else y)
            assert logits.requires_grad
        found, want = program.evaluation_metrics(), other.evaluation_metrics()
        assert found == want
        assert found["margin.mean"] == program.signals["margin.mean"]
    with pytest.raises(ValueError, match=r"needs one target for each|the targets need the shape"):
        program.read_evaluation(model(batch()[0]), batch()[1][:, 0])
    trainc.compile("optimizer sgd { lr = 0.1 }", net()).read_evaluation(logits, y)


def test_a_batch_without_examples_is_no_evaluation() -> None:
    x, y = batch()
    for clause in ("", "{ of = training }"):
        with pytest.raises(ValueError, match="to evaluate on has no examples"):
            trainc.compile(BASE + clause, net()).evaluate((x[:0], y[:0]))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = net()
    program = trainc.compile(f'{BASE} {{ of = training, layer = "2" }}', model)
    x, y = batch()
    logits, weight = model(x).detach()[y != -100], model[2].weight.detach()  # type: ignore[index]
    margins = Margin(norm="l2").reference(logits, y[y != -100], weight)
    found = program.step((x, y))
    return (
        {n: torch.tensor(found[f"margin.{n}"], dtype=torch.float64) for n in ("min", "mean")},
        {"min": margins.min(), "mean": margins.mean()},
    )


def test_adversarial_training_reaches_the_largest_margin_sooner() -> None:
    """The largest margin of these points is |(0.5, 1)| = 1.118, by the direction of the nearest pair."""
    x = torch.tensor([[0.5, 1.0], [3.0, -0.2], [-0.5, -1.0], [-3.0, 0.2]], dtype=torch.float64)
    y, best = torch.tensor([0, 0, 1, 1]), math.sqrt(1.25)
    found = []
    for clause in ("", "perturb adversarial { norm = l2, radius = 0.8 }"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
        spec = f'{BASE.replace("20 steps", "900 steps")} {{ of = training, layer = "0" }} {clause}'
        program = trainc.compile(spec, model, executor="module")
        margins = [program.step((x, y))["margin.min"] for _ in range(400)]
        program = trainc.compile(f'{BASE} {{ of = training, layer = "0" }}', model)
        found.append(program.step((x, y))["margin.min"])
        assert max(margins) <= best + 1e-9
    clean, adversarial = found
    assert clean < adversarial <= best + 1e-9
