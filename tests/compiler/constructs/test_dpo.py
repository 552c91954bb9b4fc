"""Direct preference optimisation against its definition, with its reference through divisions, resumes, evaluations."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from examples.models import gpt
from tests.conformance import Setup, divided
from trainc import functional
from trainc.compiler.constructs.loss.dpo import Dpo, DpoLoss
from trainc.compiler.driver.verify import compare
from trainc.compiler.method.loss import LossMismatch
from trainc.runtime.data.batch import Batch

SPEC = "loss dpo { beta = 0.5 } optimizer sgd { lr = 2 }"


class Answers(nn.Module):
    """A language model that reads both answers of an example."""

    def __init__(self, flat: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.flat = gpt(1, 8, 2, 5, 11, dropout=dropout), flat

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids.flatten(0, 1))
        return logits if self.flat else logits.unflatten(0, (-1, 2))


def pairs(seed: int) -> Batch:
    """Return six pairs of answers of unequal lengths; one has an empty answer, and does not count."""
    ids = torch.randint(11, (6, 2, 6), generator=torch.Generator().manual_seed(seed))
    targets = ids[..., 1:].clone()
    for row in range(6):
        targets[row, 0, : row % 4], targets[row, 1, 5 - row % 3 :] = -100, -100
    targets[3, 1] = -100
    return ids[..., :-1], targets


def conformance() -> Setup:
    """Return a language model and pairs of answers."""
    return Setup(model=Answers, batch=pairs)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient by the loss, which is given the reference's log ratios, and by definition."""
    made = torch.Generator().manual_seed(0)
    model, frozen = (torch.randn(6, 2, 5, 11, generator=made).double() for _ in range(2))
    targets = pairs(1)[1]
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for smoothing in (0.0, 0.2):
        rule = Dpo(beta=0.7, label_smoothing=smoothing)
        loss = rule.make_loss()
        for found, lowered in zip(results, (True, False), strict=True):
            x = model.clone().requires_grad_()
            prepared = loss._log_ratios(frozen, targets)
            given = (x, (targets, prepared)) if lowered else ((x, frozen), targets)
            compute: Any = loss if lowered else rule.reference
            value = compute(*given)
            value.backward()
            assert x.grad is not None
            found |= {f"loss, {smoothing}": value.detach(), f"gradient, {smoothing}": x.grad}
    return results


def by_hand(model: nn.Module, start: nn.Module, batch: Batch, beta: float) -> float:
    """Return the loss of a batch in plain numbers."""
    found = []
    with torch.no_grad():
        ours, before = (one(batch[0]).view(-1, 2, 5, 11).log_softmax(-1) for one in (model, start))
    for now, then, pair in zip(ours, before, batch[1].tolist(), strict=True):
        kept = [[(t, y) for t, y in enumerate(answer) if y != -100] for answer in pair]
        gain = [sum(float(now[a, t, y] - then[a, t, y]) for t, y in kept[a]) for a in range(2)]
        if all(kept):
            found.append(math.log1p(math.exp(-beta * (gain[0] - gain[1]))))
    return math.fsum(found) / len(found)


@pytest.mark.parametrize(
    ("flat", "dropout", "sizes"), [(False, 0.0, (6,)), (True, 0.0, (1, 3, 2)), (True, 0.5, (4, 2))]
)
def test_steps_and_evaluations_compare_with_the_model_at_its_start(
    flat: bool, dropout: float, sizes: tuple[int, ...]
) -> None:
    model = Answers(flat, dropout).double()
    start = copy.deepcopy(model).eval()
    program = trainc.compile(SPEC, model)
    for seed in range(3):
        batch = pairs(seed)
        loss, count, metrics = program.evaluate(*batch)
        want = by_hand(copy.deepcopy(model).eval(), start, batch, 0.5)
        assert loss / count == pytest.approx(want, rel=1e-10)
        assert metrics["accuracy"][1] == count == 5
        found = program.step(divided(batch, sizes))["loss"]
        assert dropout or found == pytest.approx(want, rel=1e-10)
    assert want != pytest.approx(math.log(2), rel=1e-2)


def test_the_reference_is_kept_by_checkpoints() -> None:
    program = trainc.compile(SPEC, Answers())
    for seed in range(2):
        program.step(pairs(seed))
    other = Answers()
    with torch.no_grad():
        other.get_parameter("model.head.weight").mul_(2.0)
    later = trainc.compile(SPEC, other)
    assert later.evaluate(*pairs(5)) != program.evaluate(*pairs(5))
    later.load_state_dict(copy.deepcopy(program.state_dict()))
    assert later.evaluate(*pairs(5)) == program.evaluate(*pairs(5))
    assert later.step(pairs(5)) == program.step(pairs(5))


def test_the_reference_is_the_model_before_clauses_change_it() -> None:
    program = trainc.compile(f"mask magnitude on ndim(2) {{ density = 10% }} {SPEC}", Answers())
    assert program.step(pairs(0))["loss"] != pytest.approx(math.log(2), rel=1e-4)


def test_it_may_be_one_of_several_losses_of_named_or_numbered_targets() -> None:
    spec = """loss dpo { target = %s, weight = 0.5 } loss cross_entropy { target = %s }
        optimizer sgd { lr = 1 }"""
    (ids, answers), found = pairs(0), list[Any]()
    several: list[tuple[Any, tuple[str, str], Any]] = [
        ("graph", ("0", "1"), (answers, answers)),
        ("module", ('"pair"', '"words"'), {"pair": answers, "words": answers}),
    ]
    for executor, names, targets in several:
        program = trainc.compile(spec % names, Answers().double(), executor=executor)
        batch = ids, targets
        steps = [program.step(batch) for _ in range(2)]
        evaluated = program.evaluate(*batch)[2]
        found += [(*steps, {name: value / count for name, (value, count) in evaluated.items()})]
    for of_graph, of_modules in zip(*found, strict=True):
        assert of_graph == pytest.approx(of_modules, rel=1e-12)
    step = found[0][1]
    assert step["loss"] == pytest.approx(0.5 * step["dpo"] + step["cross_entropy"], rel=1e-12)


def test_graphs_and_verify_have_the_reference_too() -> None:
    model = Answers().double()
    start = copy.deepcopy(model)
    program = trainc.compile(SPEC, model, executor="graph")
    program.step(pairs(0))
    rows = compare(program, pairs(1))
    assert len(rows) == 4
    assert all(row.ok for row in rows)
    want = by_hand(copy.deepcopy(model), start, pairs(1), 0.5)
    assert program.step(pairs(1))["loss"] == pytest.approx(want, rel=1e-10)


def test_the_function_is_that_of_log_probabilities() -> None:
    a, b, c, d = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).double()
    each = functional.dpo_loss(a, b, c, d, beta=0.3, reduction="none")
    torch.testing.assert_close(each, -F.logsigmoid(0.3 * ((a - c) - (b - d))))
    torch.testing.assert_close(functional.dpo_loss(a, b, c, d, 0.3), each.mean())
    both = functional.dpo_loss(a, b, c, d, 0.3, 0.1, "sum")
    other = functional.dpo_loss(b, a, d, c, 0.3, 0.0, "sum")
    torch.testing.assert_close(both, 0.9 * each.sum() + 0.1 * other)
    for wrong, says in (
        ({"rejected": b[:2]}, "same place of all four"),
        ({"beta": 0.0}, "beta = 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"reduction": "max"}, "mean, sum or none"),
    ):
        given: Any = {"rejected": b, **wrong}
        with pytest.raises(ValueError, match=says):
            functional.dpo_loss(a, reference_chosen=c, reference_rejected=d, **given)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((pairs(0)[0], pairs(0)[1][:, 0]), "preferred answer first"),
        ((pairs(0)[0], pairs(0)[1][:, :, 1:]), "Let `forward` fold"),
        ((pairs(0)[0], pairs(0)[1].double()), "int64"),
        ((pairs(0)[0], pairs(0)[1] + 6), "output has 11 classes"),
    ],
)
def test_what_does_not_fit_says_what_to_write(batch: Batch, says: str) -> None:
    for call in ("step", "loss"):
        with pytest.raises(LossMismatch, match=says) as found:
            getattr(trainc.compile(SPEC, Answers()), call)(batch)
        assert found.value.label == "dpo"


def test_the_loss_alone_says_that_it_lacks_the_reference() -> None:
    with pytest.raises(ValueError, match="let the program compute"):
        DpoLoss(0.1, 0.0, -100)(torch.zeros(6, 2, 5, 11), pairs(0)[1])
