"""SWA: torch's running mean, statistics estimated as torch estimates them, and batches that must be known."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import TensorDataset

from tests.compiler.constructs.test_ema import average, compiled, data, net, newest
from trainc.compiler.constructs.regularize.weights.swa import Swa
from trainc.compiler.driver.train import train


def batches(count: int = 4) -> list[Any]:
    return [data(100 + i) for i in range(count)]


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    program = compiled("regularize swa from 2 steps every 2 steps")
    program.estimate_from(batches)
    kept: dict[str, list[Tensor]] = {}
    for step in range(8):
        program.step(data(step))
        if step % 2:  # after steps 2, 4, 6 and 8
            for name, parameter in program.module.named_parameters():
                kept.setdefault(name, []).append(parameter.detach().clone())
    found = average(program)
    return {n: found[n] for n in kept}, {n: Swa().reference(seen) for n, seen in kept.items()}


def test_it_is_torchs_average_with_its_statistics() -> None:
    program = compiled("regularize swa")
    program.estimate_from(batches)
    theirs = AveragedModel(program.module)
    for step in range(6):
        program.step(data(step))
        theirs.update_parameters(program.module)
        if step == 3:
            average(program)  # statistics are estimated anew after later updates
    twin = copy.deepcopy(theirs.module)
    update_bn([x for x, _ in batches()], twin)
    trained = copy.deepcopy(program.module.state_dict())
    found = average(program)
    for name, value in dict(twin.state_dict()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    after = program.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in trained.items())
    with program.evaluation_weights():
        again = copy.deepcopy(program.module.state_dict())
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_batches_must_be_known_where_statistics_are_estimated(tmp_path: Path) -> None:
    program = compiled("regularize swa")
    program.step(data(0))
    with pytest.raises(RuntimeError, match=r"program.estimate_from\(lambda: loader\)"):
        program.evaluate(*data(1))
    program.state_dict()
    program.estimate_from(list)
    with pytest.raises(ValueError, match="there were none"):
        program.save(tmp_path / "saved")
    copied = compiled("regularize swa { statistics = copy }")
    copied.step(data(0))
    copied.evaluate(*data(1))
    plain = compiled("regularize swa", nn.Sequential(nn.Linear(6, 4)).double())
    plain.step(data(0))
    plain.evaluate(*data(1))


def samples() -> Any:
    x, y = data(5, rows=40)
    made = TensorDataset(x, y)
    return made, TensorDataset(*made[:8])


def test_a_run_estimates_from_its_training_data(tmp_path: Path) -> None:
    spec = (
        'model "tests.compiler.constructs.test_ema:net"\n'
        'data "tests.compiler.constructs.test_swa:samples" { batch = 8 samples }\n'
        "loss cross_entropy optimizer sgd { lr = 0.1 } regularize swa from 1 steps { batches = 2 }\n"
        "run { length = 4 steps, eval = 2 steps, checkpoint = 2 steps }\n"
    )
    (tmp_path / "swa.train").write_text(spec)
    train(tmp_path / "swa.train", tmp_path / "run", quiet=True)
    found = newest(tmp_path / "run")["evaluation"]
    twin = net()
    twin.load_state_dict(found)
    x, _ = samples()[0][:16]
    update_bn([x[:8], x[8:]], twin)
    for name, value in dict(twin.state_dict()).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
