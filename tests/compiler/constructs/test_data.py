"""`data "module:callable"` with what people have: from the spec to the numbers of a run; mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from tests.compiler.sample_methods import Shifted
from tests.runtime import people, test_streams
from tests.runtime.runs import events
from trainc.compiler.driver.compile import compile_with_data
from trainc.compiler.driver.train import train
from trainc.compiler.driver.verify import verify
from trainc.compiler.model.factories import seeded_model
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.run.loop import train as loop
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.jsonl import read_jsonl

HERE = f"{__name__}:"
SPEC = """
train 1
model "{here}net" {{ width = {width} }}
data "{here}{data}" {{ {fields} }}
loss cross_entropy
run {{ {run} }}
optimizer sgd {{ lr = 0.1 }}
"""
RUN = "length = 2 epochs, seed = 3, eval = 4 steps, eval_batches = 3, checkpoint = 3 steps"


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Dropout(0.2), nn.Linear(8, 10))


def pairs() -> Any:
    return people.Pairs(0, 30), people.Pairs(30, 40)


def table() -> Any:
    return {"train": people.table(0, 30), "test": people.table(30, 40)}


def augmented() -> Any:
    return people.Augmented(), people.Augmented()


def named() -> Any:
    return people.Dicts("x", "y")


def alone() -> Any:
    return people.Pairs()


def none_held_out() -> Any:
    return people.Pairs(), people.Pairs(0, 0)


def wrong() -> Any:
    return {"train": people.INPUTS, "val": people.Dicts("x", "y")}


def summed(samples: list[Any]) -> Any:
    rows = torch.stack([x for x, _ in samples])
    return rows + 1, torch.tensor([y for _, y in samples])


def spec(data: str, fields: str = "", run: str = RUN, width: int = people.WIDTH) -> str:
    fields = ", ".join(filter(None, ["batch = 8 samples, micro = 4 samples", fields]))
    return SPEC.format(here=HERE, width=width, data=data, fields=fields, run=run)


def run(out: Path, text: str, **options: Any) -> Summary:
    return train(text, out, quiet=True, **options)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]


def metrics(out: Path) -> bytes:
    return (out / "metrics.jsonl").read_bytes()


def said(text: str, tmp_path: Path) -> str:
    with pytest.raises(trainc.SpecError) as error:
        run(tmp_path / "wrong", text)
    return str(error.value)


def test_a_table_trains_as_its_pairs_do_and_epochs_are_counted(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, spec(name)) for name in ("pairs", "table"))
    assert one.steps == 8  # two epochs of 30 samples
    assert losses(tmp_path / "pairs") == losses(tmp_path / "table")
    assert one.eval_loss == two.eval_loss
    assert one.eval_loss is not None


def test_collate_and_target_of_the_spec(tmp_path: Path) -> None:
    run(tmp_path / "plain", spec("alone", run="length = 2 steps"))
    run(tmp_path / "named", spec("named", 'target = "y"', "length = 2 steps"))
    assert losses(tmp_path / "named") == losses(tmp_path / "plain")
    run(tmp_path / "summed", spec("alone", f'collate = "{HERE}summed"', "length = 2 steps"))
    assert losses(tmp_path / "summed") != losses(tmp_path / "plain")


def test_a_run_by_workers_is_the_run_without_and_so_is_a_resumed_one(tmp_path: Path) -> None:
    width = people.WIDTH + 6
    run(tmp_path / "alone", spec("augmented", width=width))
    for workers in (1, 2):
        text = spec("augmented", f"workers = {workers}", width=width)
        run(tmp_path / f"by {workers}", text)
        assert losses(tmp_path / f"by {workers}") == losses(tmp_path / "alone")
        assert metrics(tmp_path / f"by {workers}") == metrics(tmp_path / "alone")


def test_a_run_resumed_in_an_epoch_with_another_number_of_workers(tmp_path: Path) -> None:
    text = {n: spec("augmented", f"workers = {n}", width=people.WIDTH + 6) for n in (0, 1, 2)}
    run(tmp_path / "whole", text[0])
    checked = trainc.check(text[2]).spec
    assert checked is not None
    program, data = compile_with_data(checked, seeded_model(checked))
    asked = iter([None] * 4 + ["interrupted"])
    assert loop(program, data, out=tmp_path / "run", stop_requested=lambda: next(asked)).steps == 4
    run(tmp_path / "run", text[1], resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_verify_reads_a_batch_of_it() -> None:
    assert all(row.ok for row in verify(spec("pairs")))


def test_all_that_is_missing_is_told_at_once_with_the_contract(tmp_path: Path) -> None:
    text = said(spec("wrong"), tmp_path)
    assert "error[data-failed]" in text
    assert f"`{HERE}wrong` returns a dict, which lacks what the data of a run needs" in text
    assert "`torch.utils.data.TensorDataset(inputs, targets)`" in text
    assert "`evaluation`: a sample has no field named as targets are" in text
    assert "a pair (train, evaluation)" in text
    assert "`trainc explain data` has all forms" in text


def test_eval_without_held_out_samples(tmp_path: Path) -> None:
    text = said(spec("alone"), tmp_path)
    assert "the data has no held-out samples" in text
    assert run(tmp_path / "run", spec("alone", run="length = 1 epochs")).eval_loss is None


def test_clauses_that_measure_evaluations_need_samples_for_them(tmp_path: Path) -> None:
    for name in ("alone", "none_held_out"):
        text = said(spec(name, run="length = 1 epochs") + "observe calibration", tmp_path)
        assert "`observe calibration` measures evaluations, and the data has no samples to" in text
        assert "or remove the clause" in text
    assert "the data has no held-out samples" in said(spec("none_held_out"), tmp_path)
    steps = spec("alone", run="length = 1 epochs") + "observe calibration { of = training }"
    assert run(tmp_path / "run", steps).steps > 0


def test_a_collate_that_is_none(tmp_path: Path) -> None:
    assert "has no `colate`" in said(spec("alone", f'collate = "{HERE}colate"'), tmp_path)
    assert "is not callable" in said(spec("alone", f'collate = "{HERE}RUN"'), tmp_path)


def test_epochs_of_a_plan_need_a_description() -> None:
    with pytest.raises(trainc.SpecError, match="how many samples an epoch has is not known"):
        trainc.plan(spec("pairs"))


def test_the_data_of_the_quickstart(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/quickstart.md").read_text()
    section = page.partition("## Your own data")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    (clause,) = re.findall(r'`(data "mine:waves" \{.*?\})`', section)
    (tmp_path / "mine.py").write_text(code)
    text = spec("none", run="length = 1 epochs", width=64).replace(f'data "{HERE}none"', clause)
    text = text.replace(clause + " { batch = 8 samples, micro = 4 samples }", clause)
    (tmp_path / "spec.train").write_text(text)
    assert run(tmp_path / "run", str(tmp_path / "spec.train")).steps == -(-450 // 32)


def loader() -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(people.Pairs(), batch_size=2, shuffle=True)


def test_what_of_a_loader_is_not_used_is_said_once(tmp_path: Path) -> None:
    run(tmp_path / "run", spec("loader", run="length = 2 steps"))
    run(tmp_path / "run", spec("loader", run="length = 2 steps"), resume=True)
    assert events(tmp_path / "run").count("note") == 1


STREAMS = {"plain": test_streams.Plain, "stateful": test_streams.Stateful, "numbered": test_streams.Numbered,
           "loader": test_streams.Loader}  # fmt: skip


def stream(kind: str) -> Any:
    return STREAMS[kind](), people.Pairs(30, 40)


def streaming(kind: str, run: str) -> str:
    return spec(
        "stream", f'kind = "{kind}"', f"seed = 3, eval = 4 steps, checkpoint = 3 steps, {run}"
    )


@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_on_a_stream_is_resumed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    text = streaming(kind, "length = 14 steps")
    whole = run(tmp_path / "whole", text)
    assert whole.steps == 14  # 112 samples of 40
    checked = trainc.check(text).spec
    assert checked is not None
    program, data = compile_with_data(checked, seeded_model(checked))
    asked = iter([None] * 7 + ["interrupted"])
    assert loop(program, data, out=tmp_path / "run", stop_requested=lambda: next(asked)).steps == 7
    run(tmp_path / "run", text, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_epochs_of_a_stream_need_its_length(tmp_path: Path) -> None:
    assert run(tmp_path / "run", streaming("numbered", "length = 2 epochs")).steps == 10
    text = said(streaming("plain", "length = 2 epochs"), tmp_path)
    assert (
        "`length = 2 epochs` counts epochs, but how many samples an epoch has is not known" in text
    )


def test_a_clause_that_reads_sample_ids_is_refused_by_name() -> None:
    checked = trainc.check(streaming("plain", "length = 3 steps")).spec
    assert checked is not None
    reading = Spec((*checked.clauses, Clause(Shifted())))
    with pytest.raises(
        trainc.SpecError, match=r"reads which samples a step holds.*no numbers"
    ) as error:
        compile_with_data(reading, seeded_model(checked))
    assert "`perturb shifted`" in str(error.value) or "`shifted`" in str(error.value)


def test_verify_reads_the_beginning_of_a_stream() -> None:
    assert all(row.ok for row in verify(streaming("numbered", "length = 3 steps")))
