"""Which samples a micro-batch holds, for terms and observers: a table of what each gave last, as in a loop by hand."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.compiler.sample_methods import (
    BASE,
    SAMPLES,
    Hand,
    Reads,
    Shifted,
    Split,
    assert_equal,
    batches,
    data,
    net,
    shifted,
    spec,
    table_of,
)
from tests.conformance import Setup, assert_close_steps, divided, train_double
from tests.processes import run_processes, run_rank
from trainc.compiler.driver.verify import compare
from trainc.compiler.graph.serialize import step_from_json, step_to_json
from trainc.compiler.method.term import SAMPLE_IDS
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Duration
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.reader import Reader
from trainc.runtime.run.loop import train
from trainc.runtime.storage.jsonl import read_jsonl

# In `trainc run`

RUN = "run { length = 44 samples, seed = 4, checkpoint = 2 steps } "
DATA = 'data "tests.compiler.sample_methods:data" { batch = %s } '
BATCHES = {
    "whole": "8 samples",
    "divided": "8 samples, micro = 4 samples",
    "growing": "ramp(4 samples, to = 12 samples, over = 60%), micro = 4 samples",
}


def of_run(kind: str, executor: Any) -> Program:
    text = BASE + RUN + DATA % BATCHES[kind]
    return trainc.compile(spec(text), net(), executor=executor)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_run_of_two_shuffled_epochs(kind: str, executor: Any, tmp_path: Path) -> None:
    found = data(prefetch=kind == "divided")
    program = of_run(kind, executor)
    train(program, found, out=tmp_path / "run")
    lines = metrics(tmp_path / "run")
    hand, read = Hand(), iter(itertools.chain.from_iterable(found.train.asked))
    for line in lines:
        ids = list(itertools.islice(read, line["batch"]))
        assert line["history.sum"] == sum(ids)
        hand.step(found.train.rows(ids), ids)
    assert sum(line["batch"] for line in lines) >= 2 * SAMPLES
    assert_equal(program, hand, (line["history"] for line in lines))


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_run_resumed_in_an_epoch_is_the_uninterrupted_one(executor: Any, tmp_path: Path) -> None:
    whole = of_run("growing", executor)
    train(whole, data(), out=tmp_path / "whole")
    asked = itertools.count()
    train(
        of_run("growing", executor),
        data(),
        out=tmp_path / "run",
        stop_requested=lambda: "interrupted" if next(asked) == 3 else None,
    )
    resumed = of_run("growing", executor)
    train(resumed, data(), out=tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert torch.equal(table_of(resumed), table_of(whole))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]


def test_a_run_in_which_nothing_reads_ids_makes_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("ids were made")

    monkeypatch.setattr(Reader, "sample_ids", fail)
    program = trainc.compile(BASE + RUN + DATA % "8 samples", net())
    train(program, data(), out=tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 6


# In a loop of one's own


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_batches_of_many_sizes_whole_and_as_lists(executor: Any) -> None:
    program, hand, said = trainc.compile(spec(), net(), executor=executor), Hand(), []
    for i, (batch, ids) in enumerate(batches(6, 9, 7, 8, 6)):
        if i % 2:
            cut = (2, len(ids) - 2)
            given: Any = (divided(batch, cut), list(ids.split(cut)))
        else:
            given = batch, ids
        said.append(program.step(given[0], sample_ids=given[1])["history"])
        hand.step(batch, ids.tolist())
    assert_equal(program, hand, said)
    if executor == "graph":
        assert program.execution.graphs.installed is not None
        assert program.execution.graphs.installed.is_open


def test_loss_and_update_over_two_micro_batches() -> None:
    program, hand, said = trainc.compile(spec(), net()), Hand(), []
    for batch, ids in batches(6, 6, 6):
        for part, own in zip(divided(batch, (2, 4)), ids.split((2, 4)), strict=True):
            program.loss(part, len(own) / 6, sample_ids=own).backward()
        said.append(program.update()["history"])
        hand.step(batch, ids.tolist())
    assert_equal(program, hand, said)


def test_the_graph_takes_ids() -> None:
    program, hand, said = trainc.compile(spec(), net()), Hand(), []
    for batch, ids in batches(6, 6, 6):
        program.graph(batch, sample_ids=ids)
        said.append(program.update()["history"])
        hand.step(batch, ids.tolist())
    assert_equal(program, hand, said)


def test_a_graph_has_no_place_for_ids_that_nothing_reads() -> None:
    program = trainc.compile(BASE, net(), executor="graph")
    (batch, ids), *_ = batches(6)
    program.step(batch, sample_ids=ids)
    graph = program.execution.graphs.installed
    assert graph is not None
    assert graph.interface is not None
    assert SAMPLE_IDS not in dict(graph.interface.scalars)


def test_the_conformance_suite_gives_them() -> None:
    setup = Setup(net, lambda seed: batches(6, seed=seed)[0][0])
    whole = train_double(spec(), setup)
    assert_close_steps(train_double(spec(), setup, sizes=(1, 3, 2)), whole)
    assert_close_steps(train_double(spec(), setup, executor="graph"), whole)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_clause_that_acts_for_a_while(executor: Any) -> None:
    times: Any = {"start": Duration(1, "steps"), "stop": Duration(3, "steps")}
    program = trainc.compile(spec(**times), net(), executor=executor)
    hand, said = Hand(), []
    for i, (batch, ids) in enumerate(batches(*[6] * 5)):
        said.append(program.step(batch, sample_ids=ids)["history"])
        hand.step(batch, ids.tolist(), acts=1 <= i < 3)
    assert_equal(program, hand, said)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_views_have_the_ids_of_their_examples(executor: Any) -> None:
    text = BASE + "regularize r_drop { weight = 0.5 }"
    program = trainc.compile(spec(text), net(), executor=executor)
    hand, said = Hand(), []
    for batch, ids in batches(6, 6, 6):
        parts, own = divided(batch, (4, 2)), list(ids.split((4, 2)))
        said.append(program.step(parts, sample_ids=own)["history"])
        hand.step(batch, ids.tolist())
    assert_equal(program, hand, said)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_the_first_pass_of_sam_has_them(executor: Any) -> None:
    program = trainc.compile(spec(BASE + "perturb sam { rho = 0.3 }"), net(), executor=executor)
    hand, said = Hand(rho=0.3), []
    for batch, ids in batches(6, 6, 6):
        parts, own = divided(batch, (4, 2)), list(ids.split((4, 2)))
        said.append(program.step(parts, sample_ids=own)["history"])
        hand.step(batch, ids.tolist())
    assert_equal(program, hand, said)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_micro_batch_without_counted_targets_has_them(executor: Any) -> None:
    program, hand = trainc.compile(spec(scale=2.0), net(), executor=executor), Hand(scale=2.0)
    said = []
    for (x, y), ids in batches(6, 6, 6):
        y[2:] = -100
        parts, own = divided((x, y), (2, 4)), list(ids.split((2, 4)))
        said.append(program.step(parts, sample_ids=own)["history"])
        hand.step((x, y), ids.tolist())
    assert_equal(program, hand, said)


def test_every_answer_of_a_closure_has_them() -> None:
    """An optimizer that asks for the loss at other weights too gets that of the same samples."""
    text = 'loss cross_entropy optimizer torch("torch.optim:LBFGS") { lr = 0.5, max_iter = 4 } '
    program, hand = trainc.compile(spec(text, scale=2.0), net()), Hand(scale=2.0)
    wanted = torch.optim.LBFGS(hand.model.parameters(), lr=0.5, max_iter=4)
    for batch, ids in batches(6, 6):
        answers: list[tuple[Tensor, Tensor, Tensor]] = []

        def closure(batch: Batch = batch, ids: Tensor = ids, to: list[Any] = answers) -> Tensor:
            to.append(hand.loss(batch, ids.tolist(), True))
            wanted.zero_grad()
            to[-1][0].backward()
            found: Tensor = to[-1][0]
            return found

        wanted.step(closure)
        program.step(batch, sample_ids=ids)
        hand.table[ids] = answers[0][2]
    assert_equal(program, hand, [])


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_changes_of_batches_by_sample(executor: Any) -> None:
    text = "loss cross_entropy optimizer sgd { lr = 0.2 } regularize r_drop { weight = 1 }"
    base = trainc.check(text).spec
    assert base is not None
    program = trainc.compile(Spec((*base.clauses, Clause(Shifted()))), net(), executor=executor)
    plain = trainc.compile(base, net(), executor=executor)
    drawn = batches(6, 6, 6)
    with pytest.raises(ValueError, match="`shifted` reads which samples"):
        program.step(drawn[0][0])
    for batch, ids in drawn:
        parts, own = divided(batch, (4, 2)), list(ids.split((4, 2)))
        found = program.step(parts, sample_ids=own)
        assert found == plain.step(divided(shifted(batch, ids), (4, 2)))


def test_single_examples_are_measured_with_their_own() -> None:
    text = BASE + "noise_scale gns on type(LayerNorm) { smooth = 1 steps }"
    program = trainc.compile(spec(text, scale=3.0), net())
    rows = compare(program, Split().rows(range(6)))
    assert rows[-1].title == "per-example norms, one pass per example"
    assert all(row.ok for row in rows)


def test_calibration_measures_with_the_ids_of_its_step() -> None:
    text = (
        BASE + "run { length = 9 steps } noise_scale gns on type(LayerNorm) { calibrate = 2 steps }"
    )
    (batch, ids), *_ = batches(6)
    program = trainc.compile(spec(text, scale=3.0), net())
    program.step(batch, sample_ids=ids)
    last = program._runner.last
    assert last is not None
    (sample,) = last.calibrations.values()
    hand = Hand(scale=3.0)
    for name, squares in sample.sq_norms.items():
        weight = hand.model.get_parameter(name)
        for i in range(len(squares)):
            one = (batch[0][i : i + 1], batch[1][i : i + 1])
            loss, *_ = hand.loss(one, [int(ids[i])], True)
            (gradient,) = torch.autograd.grad(loss, [weight])
            wanted = float((gradient / len(ids)).square().sum())
            assert float(squares[i]) == pytest.approx(wanted, rel=1e-9)


def test_a_saved_graph_and_state_go_on_with_them() -> None:
    program, hand = trainc.compile(spec(), net(), executor="graph"), Hand()
    (batch, ids), (other, others) = batches(6, 6)
    program.step(batch, sample_ids=ids)
    hand.step(batch, ids.tolist())
    later = trainc.compile(spec(), net(), executor="graph")
    later.load_state_dict(copy.deepcopy(program.state_dict()))
    saved = json.loads(json.dumps(step_to_json(program.graph)))
    later.execution.graphs.use(
        step_from_json(saved, later.module, program.graph.constant_tensors())
    )
    said = later.step(other, sample_ids=others)["history"]
    assert later.report().notes == ()
    hand.step(other, others.tolist())
    assert_equal(later, hand, [hand.terms[0], said])


# What is wrong


def calls(program: Program) -> dict[str, Callable[[], object]]:
    (batch, _), *_ = batches(6)
    return {
        "step": lambda: program.step(batch),
        "list": lambda: program.step(divided(batch, (4, 2))),
        "loss": lambda: program.loss(batch),
        "graph": lambda: program.graph(batch),
    }


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("call", ["step", "list", "loss", "graph"])
def test_missing_ids_are_an_error_of_the_first_step(call: str, start: int) -> None:
    times: Any = {"start": Duration(start, "steps")} if start else {}
    program = trainc.compile(spec(**times), net())
    assert program.reads_sample_ids
    with pytest.raises(ValueError, match=r"`history` reads which samples .* sample_ids=ids"):
        calls(program)[call]()
    hand = Hand()
    (batch, ids), *_ = batches(6)
    said = program.step(batch, sample_ids=ids)["history"]
    hand.step(batch, ids.tolist(), acts=not start)
    assert_equal(program, hand, [said])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.arange(5), r"`sample_ids` is int64\[5\], and must be int64\[6\]"),
        (torch.arange(6).int(), r"`sample_ids` is int32\[6\], and must be int64\[6\]"),
        (torch.arange(12).reshape(6, 2), r"`sample_ids` is int64\[6, 2\]"),
        ([0, 1, 2, 3, 4, 5], r"`sample_ids` is of type list, and must be int64\[6\]"),
    ],
)
@pytest.mark.parametrize("text", ["history", "nothing"])
def test_wrong_ids_are_an_error_whoever_reads_them(given: Any, said: str, text: str) -> None:
    program = trainc.compile(spec() if text == "history" else BASE, net())
    (batch, _), *_ = batches(6)
    for call in (program.step, program.loss):
        with pytest.raises(ValueError, match=said):
            call(batch, sample_ids=given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.arange(6), r"a list of 2 micro-batches, and `sample_ids` is int64\[6\]: give a list"),
        ([torch.arange(6)], r"a list of 2 micro-batches, and `sample_ids` is a list of 1"),
        (7, r"a list of 2 micro-batches, and `sample_ids` is of type int"),
        ([torch.arange(2), torch.arange(4)], r"`sample_ids\[0\]` is int64\[2\], and must be int64\[4\]"),
    ],
)  # fmt: skip
def test_a_list_of_micro_batches_has_a_list_of_ids(given: Any, said: str) -> None:
    program = trainc.compile(spec(), net())
    (batch, _), *_ = batches(6)
    with pytest.raises(ValueError, match=said):
        program.step(divided(batch, (4, 2)), sample_ids=given)


def test_an_observer_asks_before_it_reads() -> None:
    base = trainc.check(BASE).spec
    assert base is not None
    program = trainc.compile(Spec((*base.clauses, Clause(Reads()))), net())
    assert not program.reads_sample_ids
    (batch, _), *_ = batches(6)
    with pytest.raises(
        RuntimeError, match=r"was not asked for: .*`sample_ids = True` in the class"
    ):
        program.step(batch)


def test_evaluations_have_no_ids() -> None:
    base = trainc.check(BASE).spec
    assert base is not None
    asking = Clause(Reads(of="evaluation", asks=True))
    with pytest.raises(SpecError, match=r"sample ids number the training data"):
        trainc.compile(Spec((*base.clauses, asking)), net())


# In two processes


def shared(ranks: int) -> list[tuple[list[Batch], list[Tensor], Batch, list[int]]]:
    """Return, by step, the parts of the replicas and the whole."""
    found = []
    for batch, ids in batches(8, 8, 8, 8):
        sizes = [8 // ranks] * ranks
        found.append((divided(batch, sizes), list(ids.split(sizes)), batch, ids.tolist()))
    return found


def process(rank: int) -> Any:
    """Train a replica on its part of every batch, in two micro-batches, with the samples' numbers in all data."""
    program = trainc.compile(spec(), net())
    program.forward = DistributedDataParallel(program.module)
    terms = []
    for parts, ids, *_ in shared(2):
        given = divided(parts[rank], (3, 1)), list(ids[rank].split((3, 1)))
        terms.append(program.step(given[0], sample_ids=given[1])["history"])
    weights = [p.detach() for p in program.module.parameters()]
    return {"terms": terms, "weights": weights, "table": table_of(program)}


def test_replicas_have_ids_of_their_own(tmp_path: Path) -> None:
    hand = Hand()
    for *_, batch, ids in shared(2):
        hand.step(batch, ids)
    for found in run_processes(__file__, 2, tmp_path):
        assert found["terms"] == pytest.approx(hand.terms, rel=1e-9)
        torch.testing.assert_close(found["table"], hand.table, rtol=1e-9, atol=1e-12)
        for got, want in zip(found["weights"], hand.model.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    run_rank(process)
