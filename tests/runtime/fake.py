"""A small program for the loop to run: a linear layer with dropout, trained by a torch optimizer.

As a script it trains in the folder it is given, so that tests can kill it:
`python fake.py OUT [--resume] [--kill-at STEP] [--in-save]`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainc.kernels.library import atomic
from trainc.runtime.data.batch import Batch, Evaluated
from trainc.runtime.run.interface import RunSettings, StepReport
from trainc.runtime.run.loop import train
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.schedules import compile_schedule
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.action import StopRun

SAMPLES, WIDTH = 50, 6
LENGTH = RunLength(20, "steps")
EVALUATE, SAVE = Gate(every=TimeSpan(4, "steps")), Gate(every=TimeSpan(6, "steps"))


class Points:
    """Fixed random regression points."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, WIDTH, generator=generator)
        self.targets = self.inputs.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> Batch:
        # Drawn from the global generator, as an augmentation would.
        index = list(indices)
        noise = 0.01 * torch.randn(len(index), WIDTH)
        return self.inputs[index] + noise, self.targets[index]


@dataclass
class FakeData:
    """The data of the fake program."""

    train: Points = field(default_factory=lambda: Points(SAMPLES, 1))
    evaluation: Points | None = field(default_factory=lambda: Points(17, 2))
    tokens_per_sample: int = 3


class FakeProgram:
    """Implements `RunnableProgram`: evaluates every 4 steps, saves every 6; the batch grows, dropout draws numbers."""

    def __init__(
        self, length: RunLength | None = LENGTH, nan_at: int = -1, stop_at: int = -1
    ) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.clock = Clock(samples_per_epoch=SAMPLES)
        self.length = length
        self.settings = RunSettings(7, EVALUATE, SAVE, evaluation_batches=2)
        self.micro_size = 4
        self.nan_at, self.stop_at, self.kill_at = nan_at, stop_at, -1
        self.batch_size = 8
        recipe = ["then", ["call", "warmup", [["dur", 0.2, "run"]], {}], ["call", "cosine", [], {}]]
        self.rate = compile_schedule(recipe, UnitConversion(8, 3, SAMPLES), length or LENGTH)

    def begin(self) -> None:
        self.batch_size = 8 if self.clock.steps < 10 else 12

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        number = self.clock.steps
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rate = 1e-2 * self.rate(self.clock, {})
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad()
        samples = sum(len(targets) for _, targets in micro_batches)
        total = 0.0
        for inputs, targets in micro_batches:
            loss = nn.functional.mse_loss(self.module(inputs), targets) * (len(targets) / samples)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.clock.advance(samples=samples, tokens=samples * 3, seconds=0.0)
        metrics = {
            "loss": float("nan") if number == self.nan_at else total,
            "lr_min": rate,
            "lr_max": rate,
            "seconds_forward": 0.1,
        }
        if number == self.stop_at:
            raise StopRun("enough", metrics)
        return metrics

    @property
    def loss_weights(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Tensor) -> Evaluated:
        self.module.eval()
        error = self.module(inputs) - targets
        others = {"error": (error.abs().sum().item(), float(len(targets)))}
        return error.square().sum().item(), len(targets), others

    def state_dict(self) -> dict[str, Any]:
        names = [name for name, _ in self.module.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        return {
            "model": dict(self.module.state_dict()),
            "optimizer": {names[index]: dict(entry) for index, entry in state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = [name for name, _ in self.module.named_parameters()]
        self.module.load_state_dict(state["model"])
        entries = {names.index(name): entry for name, entry in state["optimizer"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})

    def summary(self) -> list[str]:
        return ["a linear layer was trained"]


class ReportingProgram(FakeProgram):
    """A program that also reports: figures by layer, a note and a request to save at step 3."""

    def report(self) -> StepReport:
        norms = {str(i): float(layer.weight.detach().norm()) for i, layer in self.layers().items()}
        here = self.clock.steps == 3
        stop = "reported" if self.clock.steps == 15 else None
        return StepReport({"norm": norms}, ("step three",) if here else (), save=here, stop=stop)

    def layers(self) -> dict[int, nn.Linear]:
        return {i: m for i, m in enumerate(self.module) if isinstance(m, nn.Linear)}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--kill-in-save", type=int, default=-1)
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    program = FakeProgram(RunLength(10**6, "steps") if arguments.slow else LENGTH)
    program.kill_at = arguments.kill_at
    if arguments.kill_in_save >= 0:
        kill_in_save(arguments.kill_in_save)
    if arguments.slow:
        print("ready", flush=True)
    return train(program, FakeData(), out=arguments.out, resume=arguments.resume).exit_code


def kill_in_save(calls: int) -> None:
    """Kill this process in the midst of saving: at the given call that reaches the disk."""
    sync = atomic.sync
    left = [calls]

    def count(path: Path) -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        sync(path)

    atomic.sync = count


if __name__ == "__main__":
    sys.exit(main())
