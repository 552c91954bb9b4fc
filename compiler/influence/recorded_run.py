"""A run as it is looked at afterwards: its program and data, and its checkpoints with the rates in force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trainc.compiler.catalog import catalog
from trainc.compiler.driver.compile import compile_with_data, require_clauses
from trainc.compiler.driver.hardware import hardware_of, placed
from trainc.compiler.driver.train import SPEC
from trainc.compiler.influence.streamed import NumberedData
from trainc.compiler.model.factories import seeded_model
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.data.identity import data_differences, data_identity
from trainc.runtime.data.order import Data
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.storage.checkpoint import checkpoints_in, load_checkpoint
from trainc.runtime.storage.differences import ChangedRun, check_differences
from trainc.runtime.storage.foreign_files import interpreting, read_json


@dataclass(eq=False)
class RecordedRun:
    """A run that was trained: its program, on the hardware of its spec, its data, and its checkpoints by step."""

    folder: Path
    program: Program
    data: Data
    """Its samples by number, also those of a stream."""
    hardware: Hardware
    checkpoints: dict[int, Path]
    identity: dict[str, Any]
    """What checkpoints keep of the data."""

    @classmethod
    def read(cls, folder: Path, spec: Path | None = None, device: str | None = None) -> RecordedRun:
        """Return the run of a folder; what its spec names is imported from the folder of `spec`, or from here.

        Raises ValueError where there is no run or no checkpoint, SpecError where the model or data cannot be built.
        """
        if not (folder / SPEC).exists():
            raise ValueError(
                f"{folder} holds no run: there is no {SPEC} in it. Give the folder that `trainc run --out` wrote"
            )
        found = {step: path for step, _, path in sorted(checkpoints_in(folder / "checkpoints"))}
        if not found:
            raise ValueError(
                f"{folder} has no checkpoint, and influence is measured at those of a run: write"
                " `checkpoint = 100 steps` and `keep = 5` in its `run`, and train again"
            )
        with interpreting(folder / SPEC):
            checked = Spec.from_json(read_json(folder / SPEC), catalog())
        require_clauses(checked, "model", "data", "loss", "optimizer")
        hardware = hardware_of(checked, device)
        with searching(spec):
            model = placed(seeded_model(checked), hardware, checked)
            program, data = compile_with_data(checked, model)
        numbered: Data = NumberedData(data, program.settings.seed)
        return cls(folder, program, numbered, hardware, found, data_identity(data))

    def load(self, step: int) -> dict[str, float]:
        """Give the program the state of a checkpoint; return the rates in force by parameter, none before a step."""
        path = self.checkpoints[step]
        state = load_checkpoint(path)
        with interpreting(path):
            program, data = state["program"], state.get("data")
        changes = [] if data is None else [*data_differences(data, self.identity)]
        try:
            check_differences(changes, accept=False)
            self.program.load_state_dict(program)
        except ChangedRun as error:
            lines = "".join(f"\n  {one.text}" for one in error.differences)
            raise ValueError(
                f"{path} was made with another model or data than the spec in {self.folder / SPEC} builds now, so its"
                f" gradients cannot be taken:{lines}"
            ) from error
        return rates_of(program)


def rates_of(program: dict[str, Any]) -> dict[str, float]:
    """Return the learning rates of the last step before a program was saved, by parameter, all factors in them.

    They are 0 for parameters that did not move in that step, since a rule or a clause had paused them.
    """
    paused, rates = program["rates"].get("paused", ()), program["rates"]["in_force"].items()
    return {name: 0.0 if name in paused else float(rate) for name, rate in rates}


def masked_in(program: dict[str, Any]) -> list[str]:
    """Return the parameters of which masks chose entries: they keep these as `index/` or `kept/` in their state."""
    keys = (key.partition("/") for state in program["actions"].values() for key in state)
    return sorted(name for kind, _, name in keys if kind in ("index", "kept") and name)


def checkpoint_loader(model: nn.Module, checkpoint: str | Path) -> float:
    """Load a checkpoint of `trainc run`, `RUN/checkpoints/step-00000100`, into a model, and return its learning rate.

    The model is of the run's own kind, with its adapters where it has some; the rate is that of the last step before
    the checkpoint was saved. It is what captum's TracInCP takes as `checkpoints_load_func`. Raises ValueError where the
    parameters had several rates, for which one number does not stand, or none yet, and where a mask lets some entries
    train, since captum takes gradients of all; DamagedCheckpoint for a file that was changed; RuntimeError, from torch,
    where the weights are of another model.
    """
    path = Path(checkpoint)
    program = load_checkpoint(path)["program"]
    if masked := masked_in(program):
        raise ValueError(
            f"{path}: a mask lets only some entries of `{masked[0]}` train, and the gradients that are taken with this"
            " loader are of all: use `trainc influence`, which takes those that trained"
        )
    rates = {*rates_of(program).values()}
    if len(rates) != 1:
        found = (
            f"{len(rates)} learning rates, {min(rates):g} to {max(rates):g}"
            if rates
            else "no learning rate yet"
        )
        raise ValueError(
            f"{path}: its parameters had {found}, and this loader returns one: use `trainc influence`, which takes each"
            " parameter's own"
        )
    model.load_state_dict(program["model"])
    return rates.pop()
