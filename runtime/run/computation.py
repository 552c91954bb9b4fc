"""How a run computes: its batches on its device, its losses scaled where its precision needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import Data
from trainc.runtime.data.reader import Reader
from trainc.runtime.data.stream import StreamReader
from trainc.runtime.device.hardware import Hardware, after_step
from trainc.runtime.processes.team import Team
from trainc.runtime.run.interface import ReadsSampleIds, RunnableProgram
from trainc.runtime.run.summary import evaluate


@dataclass(eq=False)
class Computation:
    """Runs the steps and evaluations of one program on the hardware of a run."""

    program: RunnableProgram
    hardware: Hardware | None
    """None: batches stay where the data puts them, and nothing is known of the device."""
    team: Team = field(default_factory=Team)
    scaler: torch.amp.GradScaler | None = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = None if self.hardware is None else self.hardware.scaler()

    def step(
        self, batches: list[Batch], reader: Reader | StreamReader, first_sample: int
    ) -> dict[str, float]:
        """Run one step on its micro-batches, which begin at a sample of the run; return its metrics."""
        program, number = self.program, self.program.clock.steps
        more: dict[str, Any] = {} if self.scaler is None else {"scaler": self.scaler}
        if isinstance(program, ReadsSampleIds) and program.reads_sample_ids:
            size = program.micro_size
            more["sample_ids"] = reader.sample_ids(first_sample, program.batch_size, size)
        try:
            return program.step([self._place(one) for one in batches], **more)
        finally:
            if self.scaler is not None and program.clock.steps > number:
                after_step(self.scaler)

    def evaluate(self, data: Data, *, whole: bool) -> tuple[dict[str, float], str | None]:
        """Return means over held-out samples; see `summary.evaluate`. `whole`: each process evaluates all of them."""
        return evaluate(self.program, data, self._place, Team() if whole else self.team)

    def _place(self, batch: Batch) -> Batch:
        return batch if self.hardware is None else self.hardware.place(batch)

    @property
    def _device(self) -> str | None:
        return None if self.hardware is None else self.hardware.device.type

    def summary(self) -> list[str]:
        """Return the lines of the summary, with one on the hardware."""
        lines = self.program.summary()
        return lines if self.hardware is None else [f"trained on {self.hardware}", *lines]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, and the device to be compared.

        Random numbers of the device are no part of it: before each step its generator is seeded, too.
        """
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"device": self._device, "scaler": scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> Iterator[str]:
        """Restore what `state_dict` gave, and yield a note where another device made it."""
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if state["device"] != (now := self._device):
            yield (
                f"the checkpoint was made on {state['device']}, and the run goes on on {now}: its numbers differ by"
                " rounding, and so do those that the model draws at random"
            )
