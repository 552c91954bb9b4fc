"""DR-Tune: the published calibration, classes of one row, and training equal to a loop by hand."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided
from trainc import functional
from trainc.compiler.constructs.regularize.features.dr_tune import DrTune, Enqueue
from trainc.compiler.errors import SiteError
from trainc.runtime.companion.bank import Bank
from trainc.runtime.data.batch import Batch
from trainc.runtime.processes.replica_group import ReplicaGroup

REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.3 } run { length = 40 steps, seed = 1 } "
K = 7


def tensor(stored: dict[str, Any]) -> Tensor:
    return torch.tensor(stored["data"], dtype=torch.float64).view(*stored["shape"])


def published() -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    row = json.loads(REFERENCE.read_text())["dr_tune"]
    names = ("pre_queue", "down_queue", "head_w", "down_feat")
    pre, down, head, features = (tensor(row[name]) for name in names)
    return row["calibrated"], (pre, down, torch.tensor(row["labels"]), head, features)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return calibrated features, as a function and row by row, where a class has one row and where one has none."""
    _, (pre, down, _, _, features) = published()
    head = torch.tensor([[0.3, -0.2, 0.9], [0.1, 0.5, -0.4], [1.0, 0.0, 0.2]]).double()
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, labels in (("one", [0, 0, 2, 0, 0, 0]), ("all", [0, 1, 2, 0, 1, 2])):
        given = pre, down, torch.tensor(labels), head
        turn, scale = functional.dr_rotation(pre, down), features.norm(dim=1).mean()
        results[0][name] = functional.dr_calibrate(*given, features)
        results[1][name] = DrTune.model_validate({"weight": 1}).reference(*given, scale, turn)
    return results


@pytest.mark.parametrize("rotation", [True, False])
def test_the_calibration_is_the_published_one(rotation: bool) -> None:
    wanted, (pre, down, labels, head, features) = published()
    name = "iter0_with_rotation" if rotation else "iter1_no_rotation"
    found = functional.dr_calibrate(pre, down, labels, head, features, rotation)
    torch.testing.assert_close(found, tensor(wanted[name]), rtol=0, atol=1e-6)


def test_the_rotation_is_one_and_finds_another() -> None:
    made = torch.Generator().manual_seed(0)
    down = torch.randn(40, 4, dtype=torch.float64, generator=made)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=made))[0]
    turn[:, 0] *= torch.linalg.det(turn)
    found = functional.dr_rotation(down @ turn, down)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.dr_rotation(down @ turn, down), found)
    torch.testing.assert_close(found, turn)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(()).double())


def test_rows_that_are_not_filled_take_no_part() -> None:
    _, (pre, down, labels, head, features) = published()
    filled = torch.tensor([True, True, True, True, False, False])
    found = functional.dr_calibrate(pre, down, labels, head, features, True, filled)
    want = functional.dr_calibrate(pre[:4], down[:4], labels[:4], head, features)
    torch.testing.assert_close(found[:4], want)
    assert not found[4:].any()


def test_a_bank_is_first_in_first_out_whatever_the_number_of_rows() -> None:
    bank, held = Bank(5, {"row": torch.zeros(0, 2)}), torch.zeros(0, 2)
    for step, new in enumerate((3, 4, 0, 12, 1, 5)):
        rows = torch.arange(2 * new).view(new, 2) + 100.0 * step
        bank.add({"row": rows})
        held = torch.cat([held, rows])[-5:]
        slots = bank.get_buffer("row")[bank.filled]
        assert sorted(slots.tolist()) == sorted(held.tolist())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 5))
    return nn.Sequential(body, nn.Linear(5, 3)).double()


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (4,), generator=made)
    y[seed % 4] = -100
    return torch.randn(4, 4, generator=made, dtype=torch.float64), y


def by_hand(model: Any, steps: Sequence[list[Batch]], keeps: bool) -> list[float]:
    start = copy.deepcopy(model[0]).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    pre, down, labels = torch.zeros(2, 0, 5).double(), None, torch.zeros(0).long()
    pre, down = pre[0], pre[1]
    turn, terms = torch.eye(5).double(), []
    for step, parts in enumerate(steps):
        if step % 2 == 0:
            turn = functional.dr_rotation(pre, down)
        elif not keeps:
            turn = torch.eye(5).double()
        optimizer.zero_grad()
        total, rows = sum(int((y != -100).sum()) for _, y in parts), []
        terms.append(0.0)
        for x, y in parts:
            features, kept = model[0](x), y != -100
            loss = F.cross_entropy(model[1](features), y)
            if len(pre):
                scale = features.detach()[kept].norm(dim=1).mean()
                rule = DrTune.model_validate({"weight": 1})
                moved = rule.reference(pre, down, labels, model[1].weight.detach(), scale, turn)
                term = F.cross_entropy(model[1](moved), labels)
                loss = loss + 0.5 * term
                terms[-1] += float(term.detach()) * int(kept.sum()) / total
            (loss * (int(kept.sum()) / total)).backward()
            rows.append((start(x).detach()[kept], features.detach()[kept], y[kept]))
        optimizer.step()
        one, two, three = (torch.cat(column) for column in zip(*rows, strict=True))
        pre, down = torch.cat([pre, one])[-K:], torch.cat([down, two])[-K:]
        labels = torch.cat([labels, three])[-K:]
    return terms


@pytest.mark.parametrize(
    ("executor", "sizes", "rotate"),
    [("graph", (), "keep"), ("module", (3, 1), "keep"), ("graph", (3, 1), "published")],
)
def test_training_is_a_loop_by_hand(executor: Any, sizes: tuple[int, ...], rotate: str) -> None:
    steps = [divided(b, sizes) if sizes else [b] for b in map(batch, (0, 1, 2, 1, 0, 2))]
    clause = f'on "0" {{ bank = {K}, weight = 0.5, refresh = 2 steps, rotate = {rotate} }}'
    program = trainc.compile(SPEC + "regularize dr_tune " + clause, net(), executor=executor)
    wanted = net()
    torch.manual_seed(3)
    terms = by_hand(wanted, steps, rotate == "keep")
    torch.manual_seed(3)
    said = [program.step(parts)["dr_tune"] for parts in steps]
    assert said == pytest.approx(terms, rel=1e-10)
    assert said[0] == 0
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_the_term_trains_the_head_alone_and_may_follow_the_batch() -> None:
    spec = SPEC + f'regularize dr_tune on "0" {{ bank = {K}, weight = {K} / batch }}'
    program, plain = trainc.compile(spec, net()), trainc.compile(SPEC, net())
    for one in (program, plain):
        torch.manual_seed(0)
        for seed in range(2):
            one.step(batch(seed))
    pairs = zip(program.module.named_parameters(), plain.module.parameters(), strict=True)
    same = {name for (name, one), two in pairs if torch.equal(one, two)}
    # The first step has an empty bank; the second moves the head, which no feature has met since.
    assert same == {n for n, _ in net().named_parameters() if n.startswith("0.")}


class Peers:
    """Two processes in one: the other gave the same rows and one more."""

    def gather_examples(self, own: Tensor) -> Tensor:
        return torch.cat([own, own, own[:1]])


def test_the_bank_has_the_rows_of_all_replicas() -> None:
    program = trainc.compile(SPEC + 'regularize dr_tune on "0" { weight = 1 }', net())
    (observer,) = program.execution.method.rewrite.observers
    assert isinstance(observer, Enqueue)
    rows = torch.arange(10.0).view(2, 5)
    observer.seen.append({"pre": rows, "down": rows + 1, "labels": torch.tensor([2, 0])})
    observer.found(cast("ReplicaGroup", Peers()))
    state = program.state_dict()["actions"]["dr_tune bank"]
    assert state["labels"][:6].tolist() == [2, 0, 2, 0, 2, 0]
    assert int(state["count"]) == 5


def test_a_head_that_computes_its_weight_is_refused_by_name() -> None:
    module = net()
    nn.utils.parametrizations.weight_norm(module[1])
    with pytest.raises(
        trainc.SpecError, match="the head `1` computes its weight of other parameters"
    ):
        trainc.compile(SPEC + 'regularize dr_tune on "0" { weight = 1 }', module)


@pytest.mark.parametrize(
    ("clause", "says"),
    [
        ('on "0" | "1" { weight = 1 }', "`on` selects 2"),
        ('on "0" { weight = 1, head = "0.1" }', "`head` selects `0.1` .Tanh."),
        ('on "0.0" { weight = 1 }', "features of width 6, and the head `1.weight` takes 5"),
    ],
)
def test_a_clause_that_does_not_fit_says_what_to_write(clause: str, says: str) -> None:
    with pytest.raises((trainc.SpecError, SiteError), match=says):
        trainc.compile(SPEC + "regularize dr_tune " + clause, net()).step(batch(0))
